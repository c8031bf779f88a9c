# SPDX-License-Identifier: Apache-2.0
"""Linear attention: a matrix that sums keys times values, with and without decay."""

import torch
from torch.nn.functional import elu
from torch.nn.functional import normalize as unit_length

from pentad.scan._checks import (
    accumulator,
    autocasts,
    check_cu_seqlens,
    check_cuda_devices,
    check_dtype,
    check_number,
    check_shape,
    check_tensor,
    parameter,
    promoted,
)
from pentad.scan._matrix_checks import check_inputs, check_sizes, factors
from pentad.scan._matrix_sums import read, total
from pentad.scan.matrix_autograd import matrix_scan

_EPSILON = 1e-6  # beside the normaliser


def linear_attention(
    q,
    k,
    v,
    *,
    decay=None,
    log_space=False,
    normalize=False,
    feature_map=None,
    scale=1.0,
    initial_state=None,
    causal=True,
    reverse=False,
    prefix_k=None,
    prefix_v=None,
    cu_seqlens=None,
    return_final_state=False,
):
    r"""Linear attention, with or without decay, over whole sequences, with gradients.

    Per head, with a state S of N x P, ``S_t = decay_t S_{t-1} + phi(k_t) v_t^T`` and ``out_t =
    scale S_t^T phi(q_t)`` (Katharopoulos et al. 2020, "Transformers are RNNs", arXiv 2006.16236,
    equations 16 to 20; with a decay per head Sun et al. 2023, "Retentive Network", arXiv
    2307.08621, equation 6; per key Yang et al. 2023, "Gated Linear Attention Transformers with
    Hardware-Efficient Training", arXiv 2312.06635, section 4). All is computed in float32 (float64
    for float64). The bits of the result do not depend on the number of threads. Differentiable once
    in every floating argument, through both results.

    Parameters
    ----------
    q, k : (B, L, G, N)
        In v's dtype, of any strides, as are all others. Head h reads group ``h // (H // G)``.
    v : (B, L, H, P) float32, bfloat16, float16 or float64
        P, and N after `feature_map`, are at most 1024. Under ``torch.autocast`` `q`, `k`, `v`,
        `prefix_k` and `prefix_v` are taken in the widest dtype among them.
    decay : (H,), (B, L, H), (H, N) or (B, L, H, N) float, optional
        Factors of the state per head or per key (of phi's N), constant or for each step: any
        numbers, 0 and negative ones included, of which the products of 64 steps are finite. Taken
        in float32; float64 only with float64 `v`.
    log_space : bool
        `decay` is the logarithm of the factors.
    normalize : bool
        Divide by ``z_t . phi(q_t) + 1e-6``, where ``z_t = decay_t z_{t-1} + phi(k_t)`` is kept as
        one more column of the state, the last.
    feature_map : "elu", "relu", "cosine", "taylor" or callable, optional
        phi, taken in float32 (float64 for float64): ``elu(x) + 1``; ``relu(x)``; x of length 1
        (Mongaras et al. 2024, "Cottention", arXiv 2409.18747); or ``[1, y, y y^T / sqrt(2)]`` with
        ``y = x / N^(1/4)``, so that ``phi(q) . phi(k) = 1 + u + u^2 / 2`` for ``u = q . k /
        sqrt(N)`` (Arora et al. 2024, "Simple linear attention", arXiv 2402.18668, section 3). A
        callable takes (..., N) and gives (..., M).
    scale : float
    initial_state : (B, H, N, P) float, optional
        By default zeros. (B, H, N, P + 1) with `normalize`; S in place of B with `cu_seqlens`.
    causal : bool
        If not, every query sees all keys: without `decay` and `cu_seqlens`.
    reverse : bool
        Run from the last step to the first; the final state is then that after the first step.
    prefix_k : (B, M, G, N), optional
        In v's dtype: further keys, which all queries see, through the initial state (Arora et al.
        2024, "Just read twice", arXiv 2407.05483, section 4). S in place of B with `cu_seqlens`.
    prefix_v : (B, M, H, P), optional
        Their values.
    cu_seqlens : (S + 1,) int32 or int64, optional
        Sequence s is the steps ``[cu_seqlens[s], cu_seqlens[s + 1])`` of the only batch row.
    return_final_state : bool

    Returns
    -------
    out : (B, L, H, P)
        In v's dtype.
    final_state : the shape of `initial_state`, float32 (float64 for float64)
        With `return_final_state`.

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes or options that do not fit together; cu_seqlens that do not rise from 0 to L.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative, or one of forward mode.

    Examples
    --------
    >>> import torch
    >>> ones, v = torch.ones(1, 3, 1, 1), torch.tensor([4.0, 2.0, 6.0]).view(1, 3, 1, 1)
    >>> pentad.scan.linear_attention(ones, ones, v).flatten()
    tensor([ 4.,  6., 12.])
    >>> pentad.scan.linear_attention(ones, ones, v, decay=torch.tensor([0.5])).flatten()
    tensor([4., 4., 8.])
    >>> pentad.scan.linear_attention(ones, ones, v, normalize=True).flatten()
    tensor([4.0000, 3.0000, 4.0000])
    """
    op = "linear_attention"
    if autocasts(v):
        q, k, v, prefix_k, prefix_v = promoted(q, k, v, prefix_k, prefix_v)
    phi = feature_map_of(op, feature_map)
    check_inputs(
        op, q, k, v, decay=decay, initial_state=initial_state, prefix_k=prefix_k,
        prefix_v=prefix_v, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    dtype, wide, sequences = v.dtype, accumulator(v.dtype), v.shape[0]
    if not causal:
        for name, tensor in (("decay", decay), ("cu_seqlens", cu_seqlens)):
            if tensor is not None:
                raise ValueError(f"[{op}] {name} cannot be used without causal")
    if cu_seqlens is not None:
        sequences = check_cu_seqlens(op, "v", sequences, cu_seqlens)
    prefix = _prefix(op, prefix_k, prefix_v, k, v, sequences)

    q, k, v = prepared(op, q, k, v, phi, normalize, widen=not causal)
    check_sizes(op, k, v)
    heads, (keys, values) = v.shape[2], (k.shape[3], v.shape[3])
    state = initial_state
    if state is not None:
        shape = (sequences, heads, keys, values)
        state = parameter(op, "initial_state", state, wide, shape, whose="v")
    if prefix is not None:
        _, prefix_k, prefix_v = prepared(op, None, *prefix, phi, normalize, widen=True)
        state = total(prefix_k, prefix_v, state)

    scale = check_number(op, "scale", scale)
    inner = 1.0 if normalize else scale
    if causal:
        out, last = matrix_scan(
            op, q, k, v, a=factors(op, decay, log_space, v, keys), initial=state,
            cu_seqlens=cu_seqlens, reverse=bool(reverse), scale=inner,
            want_last=bool(return_final_state),
        )  # fmt: skip
    else:
        last = total(k, v, state)
        out = read(last, q)
        out = out if inner == 1.0 else out * inner
    if normalize:
        out = normalized(out, scale)
    if out.dtype != dtype:
        out = out.to(dtype)
    return (out, last) if return_final_state else out


def prepared(op, q, k, v, phi, normalize, *, widen=False):
    """phi(q), phi(k) and v, with ones beside it to normalise; in float32 unless as they were."""
    if phi is None and not normalize and not widen:
        return q, k, v
    wide = accumulator(v.dtype)
    q, k, v = (None if t is None else t.to(wide) for t in (q, k, v))
    if phi is not None:
        q, k = (None if t is None else phi(t) for t in (q, k))
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return q, k, v


def normalized(out, scale):
    """Values over their normaliser, which is the last of them."""
    return out[..., :-1] * (scale / (out[..., -1:] + _EPSILON))


def _prefix(op, k, v, like_k, like_v, sequences):
    """(keys, values), checked, or None."""
    if k is None and v is None:
        return None
    for name, tensor, like in (("prefix_k", k, like_k), ("prefix_v", v, like_v)):
        if tensor is None:
            raise ValueError(f"[{op}] {name} is None, expected prefix_k and prefix_v")
        check_tensor(op, name, tensor)
        check_dtype(op, name, tensor, like_v.dtype, "v")
        length = k.shape[1] if k is not None and k.ndim == 4 else 0
        check_shape(op, name, tensor, (sequences, length, *like.shape[2:]))
    check_cuda_devices(op, ("prefix_k", k), prefix_v=v)
    return k, v


# --- Feature maps ---------------------------------------------------------------------------------


def feature_map_of(op, feature_map):
    """A function of (..., N), or None for the identity."""
    if feature_map is None:
        return None
    if isinstance(feature_map, str) and feature_map in _FEATURE_MAPS:
        return _FEATURE_MAPS[feature_map]
    if not callable(feature_map):
        raise ValueError(
            f"[{op}] feature_map is {feature_map!r}, "
            "expected 'elu', 'relu', 'cosine', 'taylor', a callable or None"
        )

    def phi(x):
        result = feature_map(x)
        check_tensor(op, "feature_map(x)", result)
        check_cuda_devices(op, ("q", x), **{"feature_map(x)": result})
        check_shape(op, "feature_map(x)", result, (*x.shape[:-1], *result.shape[-1:]))
        return result.to(x.dtype)

    return phi


def _taylor(x):
    x = x / x.shape[-1] ** 0.25
    pairs = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / 2**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs], -1)


_FEATURE_MAPS = {
    "elu": lambda x: elu(x) + 1,
    "relu": torch.relu,
    "cosine": lambda x: unit_length(x, dim=-1),
    "taylor": _taylor,
}
