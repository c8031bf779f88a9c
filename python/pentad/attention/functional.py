# SPDX-License-Identifier: Apache-2.0
"""Softmax attention of torch tensors: checks, and the options in the form the kernels take.

The mathematics stand in ``csrc/attention/attention.h`` and, in plain PyTorch, in
`pentad.attention.reference`.
"""

import operator

import torch
from torch import Tensor

from pentad import _C
from pentad._errors import DeviceError
from pentad._ops import autocast_device
from pentad.attention import autograd
from pentad.attention._kernels import accumulator
from pentad.attention.block_mask import BlockMask

MAX_DIM = 512
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_UNBOUNDED = 1 << 40
_LARGEST = 3.4028234663852886e38  # of float32


# --- Checks ---------------------------------------------------------------------------------------


def fail_tensor(op, name, tensor):
    raise TypeError(f"[{op}] {name} is {type(tensor).__name__}, expected a torch tensor")


def check_float(op, name, tensor):
    if not isinstance(tensor, Tensor):
        fail_tensor(op, name, tensor)
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"[{op}] {name} has dtype {_name(tensor.dtype)}, "
            "expected float32, bfloat16, float16 or float64"
        )


def check_integers(op, name, tensor, accepted=(torch.int32, torch.int64)):
    if not isinstance(tensor, Tensor):
        fail_tensor(op, name, tensor)
    if tensor.dtype not in accepted:
        names = " or ".join(_name(dtype) for dtype in accepted)
        raise TypeError(f"[{op}] {name} has dtype {_name(tensor.dtype)}, expected {names}")


def check_device(op, name, tensor, q):
    if tensor.device != q.device:
        raise DeviceError(f"[{op}] {name} is on {tensor.device} but q is on {q.device}")


def check_shape(op, name, tensor, *accepted):
    shape = tensor.shape
    for expected in accepted:  # size by size, as symbolic ones are compared
        if len(shape) == len(expected) and all(map(operator.eq, shape, expected)):
            return
    shapes = " or ".join(f"{expected}" for expected in accepted)
    raise ValueError(f"[{op}] {name} has shape {tuple(shape)}, expected {shapes}")


def check_operands(op, q, k, v, packed=False, names=("k", "v")):
    """What q, k and v must have in common; they may be caches, whose batch is another.

    Returns their shapes: each look at one costs a hundredth of a small call.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        for name, tensor in zip(("q", *names), (q, k, v), strict=True):
            if not isinstance(tensor, Tensor):
                fail_tensor(op, name, tensor)
    dtype = q.dtype
    if dtype not in _FLOATS:
        check_float(op, "q", q)
    if k.dtype != dtype or v.dtype != dtype:
        name, other = (names[0], k) if k.dtype != dtype else (names[1], v)
        raise TypeError(
            f"[{op}] {name} has dtype {_name(other.dtype)} but q has {_name(dtype)}, "
            "expected one dtype"
        )
    if not (q.is_cpu and k.is_cpu and v.is_cpu):
        check_device(op, names[0], k, q)
        check_device(op, names[1], v, q)
        check_kernels(op, q)
    shapes = sq, sk, sv = q.shape, k.shape, v.shape
    rank = 3 if packed else 4
    if not len(sq) == len(sk) == len(sv) == rank:
        expected = "(total, H, D) with cu_seqlens" if packed else "(B, H, S, D)"
        for name, shape in zip(("q", *names), shapes, strict=True):
            if len(shape) != rank:
                raise ValueError(f"[{op}] {name} has shape {tuple(shape)}, expected {expected}")
    return shapes


def check_kernels(op, q):
    """That there are kernels for q's device."""
    kind = q.device.type
    if kind == "cuda" and not _C.cuda_built():
        raise DeviceError(f"[{op}] this build of pentad has no CUDA kernels, only CPU ones")
    if kind not in ("cpu", "cuda", "meta"):
        raise DeviceError(f"[{op}] there is no {kind} kernel, only CPU and CUDA ones")


def check_sizes(op, hq, hk, hv, d, dk, dv, names=("k", "v")):
    """Heads and head dimensions of q, k and v."""
    if dk != d:
        raise ValueError(f"[{op}] {names[0]} has head_dim {dk} but q has {d}")
    if hv != hk:
        raise ValueError(f"[{op}] {names[1]} has {hv} heads but {names[0]} has {hk}")
    if hk < 1 or hq < 1 or hq % hk:
        raise ValueError(
            f"[{op}] q has {hq} heads and {names[0]} has {hk}, "
            f"expected q's to be a multiple of {names[0]}'s"
        )
    if d < 1 or d > MAX_DIM or dv < 1 or dv > MAX_DIM:
        name, dim = (names[1], dv) if 1 <= d <= MAX_DIM else ("q", d)
        raise ValueError(f"[{op}] {name} has head_dim {dim}, expected 1 to {MAX_DIM}")


def span(op, causal, window):
    """(left, right, top_left) as the kernels take them, -1 for no bound."""
    left = right = -1
    if window is not None:
        left, right = _window(op, window)
    if not causal:
        return left, right, False
    if isinstance(causal, str) and causal != "top_left":
        raise ValueError(f"[{op}] causal is {causal!r}, expected False, True or 'top_left'")
    return left, 0, causal == "top_left"


def _window(op, window):
    try:
        left, right = (-1 if n is None else operator.index(n) for n in window)
    except (TypeError, ValueError):
        raise ValueError(
            f"[{op}] window is {window!r}, expected (left, right) of integers or None"
        ) from None
    if left < -1 or right < -1:
        raise ValueError(f"[{op}] window is {window!r}, expected at least 0, or -1 for no bound")
    return (-1 if left >= _UNBOUNDED else left), (-1 if right >= _UNBOUNDED else right)


def number(op, name, value):
    if isinstance(value, Tensor):
        raise TypeError(f"[{op}] {name} is a tensor, expected a number")
    return float(value)


def scale_of(op, scale):
    scale = number(op, "scale", scale)
    if not -_LARGEST <= scale <= _LARGEST:
        raise ValueError(f"[{op}] scale is not finite: {scale}, expected a finite float32")
    return scale


def softcap_of(op, softcap):
    softcap = number(op, "softcap", softcap)
    if softcap != 0.0 and not 1 / _LARGEST <= softcap <= _LARGEST:
        raise ValueError(
            f"[{op}] softcap is {softcap}, expected 0 (none) or more, a finite float32"
        )
    return softcap


def bias_of(op, bias, q, b, hq, sq, sk):
    """`bias` in rank 4, checked."""
    if not isinstance(bias, Tensor):
        fail_tensor(op, "bias", bias)
    if bias.dtype != torch.bool and bias.dtype not in _FLOATS:
        raise TypeError(
            f"[{op}] bias has dtype {_name(bias.dtype)}, "
            "expected bool, float32, bfloat16, float16 or float64"
        )
    check_device(op, "bias", bias, q)
    shape, full = tuple(bias.shape), (b, hq, sq, sk)
    fits = 2 <= len(shape) <= 4 and all(
        n == 1 or n == m for n, m in zip(shape[::-1], full[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"[{op}] bias has shape {shape}, expected one that broadcasts to {full}")
    while bias.ndim < 4:
        bias = bias.unsqueeze(0)
    if bias.dtype == torch.float64 and q.dtype != torch.float64:
        bias = bias.float()
    return bias


def slopes_of(op, alibi_slopes, q, b, hq):
    check_float(op, "alibi_slopes", alibi_slopes)
    check_device(op, "alibi_slopes", alibi_slopes, q)
    check_shape(op, "alibi_slopes", alibi_slopes, (hq,), (b, hq))
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"[{op}] alibi_slopes require a gradient, which is not computed")
    return alibi_slopes.to(accumulator(q.dtype))


def sink_of(op, sink, q, hq):
    check_float(op, "sink", sink)
    check_device(op, "sink", sink, q)
    check_shape(op, "sink", sink, (hq,))
    return sink.to(accumulator(q.dtype)).contiguous()


def _name(dtype):
    return str(dtype).removeprefix("torch.")


# --- Attention ------------------------------------------------------------------------------------


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    window=None,
    scale=None,
    bias=None,
    key_bias=None,
    block_mask=None,
    softcap=0.0,
    alibi_slopes=None,
    sink=None,
    dropout_p=0.0,
    generator=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    return_lse=False,
    return_key_mass=False,
):
    r"""Exact softmax attention in memory linear in the sequence length, with gradients.

    For query i and key j of one sequence, ``s_ij = cap(scale * <q_i, k_j>) + bias_ij + key_bias_j -
    slope * |i + offset - j|`` over the keys that i may see, ``out_i = sum_j p_ij v_j`` with ``p_ij
    = exp(s_ij - lse_i)``. Nothing of size Sq x Sk is formed, forward or backward (Rabe & Staats
    2021, "Self-attention Does Not Need O(n^2) Memory", arXiv 2112.05682, section 2; Dao et al.
    2022, "FlashAttention", arXiv 2205.14135, algorithm 1 and appendix B). Query heads share
    key-value heads in groups: head h reads ``h // (Hq // Hk)``. A row that sees no key gives zeros.
    The bits of the result do not depend on the number of threads. Differentiable once in `q`, `k`,
    `v`, `bias`, `key_bias` and `sink`, through any of the results.

    Parameters
    ----------
    q : (B, Hq, Sq, D) float32, bfloat16, float16 or float64
        Of any strides: ``x.transpose(1, 2)`` of (B, S, H, D) memory costs no copy. D is at most
        512. With `cu_seqlens_q`, packed: (total_q, Hq, D). Under ``torch.autocast`` float32 `q`,
        `k` and `v` are cast to its dtype.
    k : (B, Hk, Sk, D)
        Of q's dtype, Hq a multiple of Hk. Packed: (total_k, Hk, D).
    v : (B, Hk, Sk, Dv)
        Dv is at most 512. Packed: (total_k, Hk, Dv).
    causal : bool or "top_left"
        Query i sees the keys up to ``i + Sk - Sq``, so that the last query sees the last key; with
        "top_left" those up to i, as in torch.
    window : (int, int), optional
        (left, right): query i sees the keys from ``i + offset - left`` to ``i + offset + right``,
        offset as for `causal` (0 with "top_left", else ``Sk - Sq``); None or -1 is no bound.
        `causal` sets right to 0.
    scale : float, optional
        By default ``D ** -0.5``.
    bias : broadcastable to (B, Hq, Sq, Sk), float or bool, optional
        Added to the scores, or True where the key may be seen. Not with `cu_seqlens_q`.
    key_bias : (B, Hq or Hk, Sk) float, optional
        Added to the scores of each key, for all queries. Packed: (Hq or Hk, total_k).
    block_mask : BlockMask, optional
        Blocks of keys outside it are never read. Its lengths must be Sq and Sk. Not with
        `cu_seqlens_q`.
    softcap : float
        With c > 0, ``cap(x) = c tanh(x / c)`` (Gemma Team 2024, arXiv 2408.00118, section 2).
    alibi_slopes : (Hq,) or (B, Hq) float, optional
        Press et al. 2021, "Train Short, Test Long", arXiv 2108.12409, section 3; on both sides of
        the diagonal. Without gradient.
    sink : (Hq,) float, optional
        Score of a key without a value: ``exp(sink)`` in the denominator (Xiao et al. 2023,
        "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.2).
    dropout_p : float
        Probability, in [0, 1), that a weight becomes 0; the others are divided by
        ``1 - dropout_p``. Acts whenever it is positive.
    generator : torch.Generator, optional
        Source of the dropout's seed, by default torch's.
    cu_seqlens_q : (N + 1,) int32 or int64, optional
        Sequence n is the rows ``[cu_seqlens_q[n], cu_seqlens_q[n + 1])`` of q.
    cu_seqlens_k : (N + 1,) int32 or int64, optional
        The same for `k` and `v`; both or none.
    return_lse : bool
    return_key_mass : bool

    Returns
    -------
    out : (B, Hq, Sq, Dv), or (total_q, Hq, Dv)
        In the dtype of `q`; a view of (B, S, H, D) memory where `q` is one, or part of one.
    lse : (B, Hq, Sq) float32 (float64 for float64), or (Hq, total_q)
        With `return_lse`: natural logarithm of each row's denominator, the sink included; -inf for
        a row that sees nothing.
    key_mass : (B, Hq, Sk) in the dtype of `lse`, or (Hq, total_k)
        With `return_key_mass`: the probability that each key received, ``sum_i p_ij`` before
        dropout.

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes or options that do not fit together; cu_seqlens that do not rise from 0 to the
        total; slopes that require a gradient.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative.

    Examples
    --------
    >>> import torch
    >>> q, k, v = torch.zeros(3, 1, 2, 3, 8).unbind()
    >>> v = v + torch.tensor([1.0, 2.0, 3.0])[:, None]
    >>> out, lse = pentad.attention.attention(q, k, v, causal=True, return_lse=True)
    >>> out[0, 0, :, 0]
    tensor([1.0000, 1.5000, 2.0000])
    >>> torch.allclose(lse[0, 0].exp(), torch.tensor([1.0, 2.0, 3.0]))
    True
    """
    op = "attention"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        q, k, v = _autocast(q, k, v)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    shapes = check_operands(op, q, k, v, packed)
    settings = ()  # the defaults
    if causal is not False or window is not None or scale is not None:
        settings = (None if scale is None else scale_of(op, scale), *span(op, causal, window))
    if packed:
        (total_q, hq, d), (sk, hk, dk), (sv, hv, dv) = shapes
        check_packed(op, q, cu_seqlens_q, cu_seqlens_k, bias, block_mask)
        b, sq = cu_seqlens_q.shape[0] - 1, total_q
    else:
        (b, hq, sq, d), (bk, hk, sk, dk), (bv, hv, sv, dv) = shapes
        if bk != b or bv != b:
            name, other = ("k", bk) if bk != b else ("v", bv)
            raise ValueError(f"[{op}] {name} has batch {other} but q has {b}")
    if sk != sv:
        raise ValueError(f"[{op}] v has {sv} keys but k has {sk}")
    check_sizes(op, hq, hk, hv, d, dk, dv)

    if (
        bias is key_bias is block_mask is alibi_slopes is sink is cu_seqlens_q is None
        and not softcap
        and not dropout_p
        and not return_lse
        and not return_key_mass
    ):
        if autograd.needs_grad(q, k, v):
            return autograd.attention(q, k, v, settings)[0]
        return autograd.plain(q, k, v, *settings)

    softcap = softcap_of(op, softcap)
    dropout_p = number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"[{op}] dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")
    if key_bias is not None:
        check_float(op, "key_bias", key_bias)
        check_device(op, "key_bias", key_bias, q)
        if packed:
            check_shape(op, "key_bias", key_bias, (hq, sk), (hk, sk))
        else:
            check_shape(op, "key_bias", key_bias, (b, hq, sk), (b, hk, sk))
        key_bias = key_bias.to(accumulator(q.dtype))
    if bias is not None:
        bias = bias_of(op, bias, q, b, hq, sq, sk)
        if bias.shape[2] == 1 and sq != 1 and bias.dtype != torch.bool:
            key_bias = _as_key_bias(bias.to(accumulator(q.dtype)), key_bias, b, hq, hk, sk)
            bias = None
    if alibi_slopes is not None:
        alibi_slopes = slopes_of(op, alibi_slopes, q, b, hq)
    if sink is not None:
        sink = sink_of(op, sink, q, hq)
    mask, q_block, k_block = None, 0, 0
    if block_mask is not None:
        mask = _block_mask_tensors(op, block_mask, q, b, hq, sq, sk)
        q_block, k_block = block_mask.q_block, block_mask.k_block
    seed = None
    if dropout_p:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator, device="cpu")

    out, lse, mass = autograd.attention(
        q,
        k,
        v,
        (*(settings or (None, -1, -1, False)), bool(return_key_mass)),
        (bias, key_bias, sink, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed, mask),
        (softcap, dropout_p, q_block, k_block),
    )
    if return_lse:
        lse = lse.to(accumulator(q.dtype))
        return (out, lse, mass) if return_key_mass else (out, lse)
    return (out, mass) if return_key_mass else out


def _autocast(*tensors):
    def cast(t):
        if not isinstance(t, Tensor) or t.dtype != torch.float32:
            return t
        kind = autocast_device(t)
        return t.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else t

    return tuple(map(cast, tensors))


def check_packed(op, q, cu_seqlens_q, cu_seqlens_k, bias, block_mask):
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if tensor is None:
            raise ValueError(f"[{op}] {name} is None, expected cu_seqlens_q and cu_seqlens_k")
        check_integers(op, name, tensor)
        check_device(op, name, tensor, q)
        if tensor.ndim != 1 or tensor.shape[0] < 1:
            raise ValueError(f"[{op}] {name} has shape {tuple(tensor.shape)}, expected (N + 1,)")
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        raise ValueError(
            f"[{op}] cu_seqlens_q has {cu_seqlens_q.shape[0]} entries "
            f"but cu_seqlens_k has {cu_seqlens_k.shape[0]}"
        )
    for name, option in (("bias", bias), ("block_mask", block_mask)):
        if option is not None:
            raise ValueError(f"[{op}] {name} cannot be used with cu_seqlens")


def _as_key_bias(bias, key_bias, b, hq, hk, sk):
    """`bias`, the same for all queries, plus `key_bias`; heads are not repeated needlessly."""
    heads = hk if bias.shape[1] == 1 else hq
    bias = bias[:, :, 0].expand(b, heads, sk)
    if key_bias is None:
        return bias
    if key_bias.shape[1] == heads:
        return bias + key_bias
    if heads == hk:  # and key_bias has hq
        return bias[:, :1] + key_bias
    return bias + key_bias.repeat_interleave(hq // hk, 1)


def _block_mask_tensors(op, block_mask, q, b, hq, sq, sk):
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"[{op}] block_mask is {type(block_mask).__name__}, expected a BlockMask")
    if block_mask.q_len != sq or block_mask.k_len != sk:
        raise ValueError(
            f"[{op}] block_mask is for {block_mask.q_len} queries and {block_mask.k_len} keys, "
            f"but q has {sq} and k has {sk}"
        )
    batch, heads = block_mask.row_ptr.shape[:2]
    if batch not in (1, b) or heads not in (1, hq):
        raise ValueError(
            f"[{op}] block_mask has batch {batch} and {heads} heads, "
            f"expected 1 or {b}, and 1 or {hq}"
        )
    tensors = block_mask.tensors_on(q.device)
    check_device(op, "block_mask", tensors[0], q)
    return tensors
