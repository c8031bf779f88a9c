# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens to a cache of keys and values, which may be paged."""

import torch

from pentad.attention import autograd
from pentad.attention._kernels import accumulator
from pentad.attention.functional import (
    bias_of,
    check_device,
    check_integers,
    check_operands,
    check_shape,
    check_sizes,
    scale_of,
    sink_of,
    slopes_of,
    softcap_of,
    span,
)
from pentad.attention.rotary import check_tables, rotate, rows_at, token_positions

_CACHES = ("k_cache", "v_cache")


def decode(
    q,
    k_cache,
    v_cache,
    cache_seqlens,
    *,
    k_new=None,
    v_new=None,
    block_table=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    rotary_cos=None,
    rotary_sin=None,
    rotary_interleaved=False,
    causal=True,
    window=None,
    scale=None,
    softcap=0.0,
    alibi_slopes=None,
    sink=None,
    bias=None,
    return_lse=False,
):
    """Attention of the newest tokens to cached keys and values; appends to the cache in place.

    Sequence b has ``n = cache_seqlens[b]`` tokens in the cache; T new ones are written after them,
    and q attends to the ``n + T`` keys, its last token aligned with the last key. The keys are
    divided over the threads where there are few heads; the bits of the result do not depend on the
    number of threads, nor on pages and their order. Everything is checked before anything is
    written. No gradients.

    On a CUDA device nothing waits for what `cache_seqlens`, `block_table`, `cache_batch_idx` and
    `cache_leftpad` hold: a sequence for which they are out of range gets NaN, and what would lie
    outside of its cache is not written.

    Parameters
    ----------
    q : (B, Hq, Sq, D) float32, bfloat16, float16 or float64
        Any Sq, of any strides.
    k_cache : (Bc, Hk, capacity, D)
        Bc at least B, of any strides: a (B, S, H, D) cache is given as its ``transpose(1, 2)``.
        With `block_table` (pages, Hk, page_size, D), page_size any number.
    v_cache : (Bc, Hk, capacity, Dv), or (pages, Hk, page_size, Dv)
    cache_seqlens : int or (B,) int32 or int64
        Tokens in the cache before this call.
    k_new : (B, Hk, T, D), optional
    v_new : (B, Hk, T, Dv), optional
        Both or none.
    block_table : (B, pages_per_sequence) int32, optional
        Token j of sequence b lies in row ``j % page_size`` of page ``block_table[b, j //
        page_size]`` (Kwon et al. 2023, "PagedAttention", arXiv 2309.06180, section 4.1). Not with
        `cache_batch_idx` or `cache_leftpad`.
    cache_batch_idx : (B,) int32 or int64, optional
        The cache's row of each sequence, by default b; no row twice where tokens are appended.
    cache_leftpad : (B,) int32 or int64, optional
        Where in its row each sequence begins, by default 0; not counted in `cache_seqlens`.
    rotary_cos, rotary_sin : (positions, rotary_dim / 2) float, optional
        Rotates `k_new` at position ``n + t`` before it is written, and q likewise where `causal` or
        `window` is given, else all of it at n (`apply_rotary`). Both or none, and only with
        `k_new`.
    rotary_interleaved : bool
        As `apply_rotary` takes it.
    causal : bool
    window : (int, int), optional
    scale : float, optional
    softcap : float
    alibi_slopes : (Hq,) or (B, Hq) float, optional
    sink : (Hq,) float, optional
    bias : broadcastable to (B, Hq, Sq, capacity), float or bool, optional
        Capacity of a paged cache: ``pages_per_sequence * page_size``. As the others, see
        `attention`.
    return_lse : bool

    Returns
    -------
    out : (B, Hq, Sq, Dv) in the dtype of `q`
    lse : (B, Hq, Sq) float32 (float64 for float64)
        With `return_lse`.

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes or options that do not fit together; lengths beyond the capacity; pages, rows or
        positions out of range (those in tensors on a CUDA device are not looked at).
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        If a gradient is asked for.

    Examples
    --------
    >>> import torch
    >>> k_cache, v_cache = torch.zeros(2, 1, 1, 16, 8).unbind()
    >>> for n in range(3):
    ...     new = torch.full((1, 1, 1, 8), float(n))
    ...     out = pentad.attention.decode(
    ...         torch.zeros(1, 1, 1, 8), k_cache, v_cache, n, k_new=new, v_new=new
    ...     )
    >>> v_cache[0, 0, :4, 0], out[0, 0, 0, 0]
    (tensor([0., 1., 2., 0.]), tensor(1.))
    """
    op = "attention.decode"
    shapes = check_operands(op, q, k_cache, v_cache, names=_CACHES)
    (b, hq, sq, d), (rows, hk, sk, dk), (v_rows, hv, sv, dv) = shapes
    check_sizes(op, hq, hk, hv, d, dk, dv, _CACHES)
    if v_rows != rows or sv != sk:
        raise ValueError(
            f"[{op}] v_cache has shape {tuple(v_cache.shape)} but k_cache {tuple(k_cache.shape)}, "
            "expected the same but for the last size"
        )
    capacity = sk
    if block_table is not None:
        check_integers(op, "block_table", block_table, (torch.int32,))
        check_device(op, "block_table", block_table, q)
        if block_table.ndim != 2 or block_table.shape[0] != b:
            raise ValueError(
                f"[{op}] block_table has shape {tuple(block_table.shape)}, "
                f"expected ({b}, pages_per_sequence)"
            )
        for name, option in (
            ("cache_batch_idx", cache_batch_idx),
            ("cache_leftpad", cache_leftpad),
        ):
            if option is not None:
                raise ValueError(f"[{op}] {name} cannot be used with block_table")
        capacity = block_table.shape[1] * sk
    elif cache_batch_idx is None and rows != b:
        if rows < b:
            raise ValueError(f"[{op}] k_cache has batch {rows}, expected at least q's {b}")
        k_cache, v_cache = k_cache[:b], v_cache[:b]
    for name, option in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if option is not None:
            check_integers(op, name, option)
            check_device(op, name, option, q)
            check_shape(op, name, option, (b,))
    lengths = _lengths(op, cache_seqlens, q, b)

    if isinstance(causal, str):
        raise ValueError(f"[{op}] causal is {causal!r}, expected False or True")
    left, right, _ = span(op, causal, window)
    if scale is not None:
        scale = scale_of(op, scale)
    softcap = softcap_of(op, softcap)
    if alibi_slopes is not None:
        alibi_slopes = slopes_of(op, alibi_slopes, q, b, hq)
    if sink is not None:
        sink = sink_of(op, sink, q, hq)
    if bias is not None:
        bias = bias_of(op, bias, q, b, hq, sq, capacity)
    if torch.is_grad_enabled():
        for tensor in (q, k_cache, v_cache, k_new, v_new, sink, bias):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"[{op}] an argument requires a gradient, which is not computed; "
                    "use torch.no_grad() or attention"
                )

    if k_new is None and v_new is None:
        if rotary_cos is not None or rotary_sin is not None:
            raise ValueError(f"[{op}] rotary_cos and rotary_sin are only used with k_new")
    else:
        t = _check_new(op, k_new, v_new, q, b, hk, d, dv)
        if rotary_cos is not None or rotary_sin is not None:
            q, k_new = _rotated(
                op, q, k_new, rotary_cos, rotary_sin, lengths, rotary_interleaved,
                causal or window is not None,
            )  # fmt: skip
        autograd.append(
            k_new, v_new, k_cache, v_cache, lengths, cache_batch_idx, cache_leftpad, block_table
        )
        lengths = lengths + t
    out, lse = autograd.decode(
        q, k_cache, v_cache, lengths, cache_batch_idx, cache_leftpad, block_table, bias, sink,
        alibi_slopes, scale, softcap, left, right,
    )  # fmt: skip
    return (out, lse.to(accumulator(q.dtype))) if return_lse else out


def _lengths(op, cache_seqlens, q, b):
    if isinstance(cache_seqlens, torch.Tensor):
        check_integers(op, "cache_seqlens", cache_seqlens)
        check_device(op, "cache_seqlens", cache_seqlens, q)
        check_shape(op, "cache_seqlens", cache_seqlens, (b,))
        return cache_seqlens
    if not isinstance(cache_seqlens, int):
        raise TypeError(
            f"[{op}] cache_seqlens is {type(cache_seqlens).__name__}, "
            "expected an int or a torch tensor"
        )
    return torch.full((b,), cache_seqlens, dtype=torch.int64, device=q.device)


def _check_new(op, k_new, v_new, q, b, hk, d, dv):
    for name, tensor in (("k_new", k_new), ("v_new", v_new)):
        if tensor is None:
            raise ValueError(f"[{op}] {name} is None, expected k_new and v_new")
    check_operands(op, q, k_new, v_new, names=("k_new", "v_new"))
    t = k_new.shape[2]
    check_shape(op, "k_new", k_new, (b, hk, t, d))
    check_shape(op, "v_new", v_new, (b, hk, t, dv))
    return t


def _rotated(op, q, k_new, cos, sin, lengths, interleaved, per_token):
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if table is None:
            raise ValueError(f"[{op}] {name} is None, expected rotary_cos and rotary_sin")
    check_tables(op, cos, sin, q, "q")
    b, t, sq = q.shape[0], k_new.shape[2], q.shape[2]
    steps = token_positions(op, lengths, q, b, max(t, sq) if per_token else t)
    cos, sin = rows_at(op, cos, sin, steps)
    k_new = rotate(k_new, cos[:, :, :t], sin[:, :, :t], interleaved)
    span = slice(sq) if per_token else slice(1)
    return rotate(q, cos[:, :, span], sin[:, :, span], interleaved), k_new
