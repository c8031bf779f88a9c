# SPDX-License-Identifier: Apache-2.0
"""State space duality: the selective state space model of Mamba-2."""

import math
import operator

import torch
from torch.nn.functional import silu, softplus

from pentad.scan._checks import (
    accumulator,
    autocasts,
    check_cu_seqlens,
    check_dtype,
    check_integers,
    check_shape,
    check_tensor,
    parameter,
    promoted,
)
from pentad.scan._matrix_checks import check_inputs, check_sizes
from pentad.scan._matrix_sums import read, total
from pentad.scan.matrix_autograd import matrix_scan

_NAMES = ("C", "B", "x")


def ssd(
    x,
    dt,
    A,
    B,
    C,
    *,
    chunk_size=None,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    return_final_states=False,
    causal=True,
    reverse=False,
):
    r"""The state space model of Mamba-2, one decay per head, with gradients.

    Per head, with a state S of P x N, ``S_t = exp(dt'_t A) S_{t-1} + dt'_t x_t B_t^T`` and ``out_t
    = S_t C_t + D x_t``, times ``silu(z_t)`` with `z`, where ``dt'_t = dt_t + dt_bias``, through
    softplus with `dt_softplus`, and then clamped to `dt_limit` (Dao & Gu 2024, "Transformers are
    SSMs", arXiv 2405.21060, sections 2.1 and 7, computed in chunks as in section 6). All is
    computed in float32 (float64 for float64). The bits of the result do not depend on the number of
    threads. Differentiable once in every floating argument, through both results.

    Parameters
    ----------
    x : (B, L, H, P) float32, bfloat16, float16 or float64
        Of any strides, as are all others; P and N are at most 1024. Under ``torch.autocast`` `x`,
        `z`, `B` and `C` are taken in the widest dtype among them.
    dt : (B, L, H) float
        Taken in float32; float64 only with float64 `x`, here and below.
    A : (H,) float
    B : (B, L, G, N)
        In x's dtype, as are `C` and `z`. Head h reads group ``h // (H // G)``.
    C : (B, L, G, N)
    chunk_size : int, optional
        Accepted for mamba_ssm's sake: the values do not depend on it, and the kernel has its own.
    D : (H,) or (H, P) float, optional
    z : (B, L, H, P), optional
    dt_bias : (H,) float, optional
    dt_softplus : bool
        ``log(1 + exp(x))``, or x itself above 20.
    dt_limit : (float, float)
        Least and greatest step size.
    initial_states : (B, H, P, N) float, optional
        By default zeros. With `cu_seqlens` (S, H, P, N).
    seq_idx : (B, L) int32 or int64, optional
        The sequence of each step: the state is forgotten where it changes. The first step continues
        `initial_states`.
    cu_seqlens : (S + 1,) int32 or int64, optional
        Sequence s is the steps ``[cu_seqlens[s], cu_seqlens[s + 1])`` of the only batch row. Not
        with `seq_idx`.
    return_final_states : bool
    causal : bool
        If not, every step reads one state of all steps, ``out_t = (sum_s dt'_s A x_s B_s^T) C_t + D
        x_t`` (Shi et al. 2024, "VSSD: Vision Mamba with Non-Causal State Space Duality", arXiv
        2407.18559, section 3.2, with the weights of its code). Not with `initial_states`, `seq_idx`
        or `cu_seqlens`.
    reverse : bool
        Run from the last step to the first; the final state is then that after the first step.

    Returns
    -------
    out : (B, L, H, P)
        In x's dtype.
    final_states : (B, H, P, N) or (S, H, P, N), float32 (float64 for float64)
        With `return_final_states`.

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
    >>> x, ones = torch.ones(1, 4, 1, 1), torch.ones(1, 4, 1, 1)
    >>> dt, A = torch.ones(1, 4, 1), torch.tensor([0.5]).log()  # half of the state is left
    >>> pentad.scan.ssd(x, dt, A, ones, ones).flatten()
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    >>> out, state = pentad.scan.ssd(x, dt, A, ones, ones, return_final_states=True)
    >>> pentad.scan.ssd(x, dt, A, ones, ones, initial_states=state).flatten()  # the next piece
    tensor([1.9375, 1.9688, 1.9844, 1.9922])
    """
    op = "ssd"
    if autocasts(x):
        x, z, B, C = promoted(x, z, B, C)
    _check_chunk_size(op, chunk_size)
    check_inputs(
        op, C, B, x, names=_NAMES, dt=dt, A=A, D=D, z=z, dt_bias=dt_bias,
        initial_states=initial_states, seq_idx=seq_idx, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    check_sizes(op, B, x, names=("B", "x"))
    batch, length, heads, values = x.shape
    wide, keys = accumulator(x.dtype), B.shape[3]
    if z is not None:
        check_tensor(op, "z", z)
        check_dtype(op, "z", z, x.dtype, "x")
        check_shape(op, "z", z, tuple(x.shape))
    dt, A = step_sizes(op, dt, A, dt_bias, dt_softplus, dt_limit, (batch, length, heads), wide)
    if D is not None:
        check_tensor(op, "D", D)
        check_shape(op, "D", D, (heads,), (heads, values))
        D = parameter(op, "D", D, wide, D.shape, whose="x")
        D = D if D.ndim == 2 else D.unsqueeze(1).expand(heads, values)

    options = {"initial_states": initial_states, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    if not causal:
        for name, tensor in options.items():
            if tensor is not None:
                raise ValueError(f"[{op}] {name} cannot be used without causal")
        x_ = x.to(wide)
        last = total(B.to(wide), x_ * (dt * A).unsqueeze(3))
        out = read(last, C.to(wide))
        if D is not None:
            out = out + D * x_
    else:
        if seq_idx is not None and cu_seqlens is not None:
            raise ValueError(f"[{op}] seq_idx cannot be used with cu_seqlens")
        sequences = batch
        if cu_seqlens is not None:
            sequences = check_cu_seqlens(op, "x", batch, cu_seqlens)
        if initial_states is not None:
            shape = (sequences, heads, values, keys)
            initial_states = parameter(
                op, "initial_states", initial_states, wide, shape, whose="x"
            ).transpose(2, 3)
        a = torch.exp(dt * A)
        if seq_idx is not None:
            check_integers(op, "seq_idx", seq_idx, (batch, length))
            a = a.masked_fill(begins(seq_idx, reverse).unsqueeze(2), 0)
        out, last = matrix_scan(
            op, C, B, x, a=a, w=dt, d=D, initial=initial_states, cu_seqlens=cu_seqlens,
            reverse=bool(reverse), wide=z is not None, want_last=bool(return_final_states),
        )  # fmt: skip
    if z is not None:
        out = out * silu(z.to(wide))
    if out.dtype != x.dtype:
        out = out.to(x.dtype)
    return (out, last.transpose(2, 3)) if return_final_states else out


def step_sizes(op, dt, A, dt_bias, dt_softplus, dt_limit, shape, wide, *, whose="x"):
    """dt' and A, checked, in the accumulator's dtype."""
    dt = parameter(op, "dt", dt, wide, shape, whose=whose)
    A = parameter(op, "A", A, wide, shape[2:], whose=whose)
    if dt_bias is not None:
        dt = dt + parameter(op, "dt_bias", dt_bias, wide, shape[2:], whose=whose)
    dt = softplus(dt) if dt_softplus else dt
    return limited(op, dt, dt_limit, positive=bool(dt_softplus)), A


def limited(op, dt, limit, *, positive):
    """Step sizes clamped to the two limits; `positive` ones need no least one of 0."""
    try:
        low, high = (float(end) for end in limit)
    except (TypeError, ValueError):
        raise ValueError(f"[{op}] dt_limit is {limit!r}, expected (low, high)") from None
    if not low <= high:
        raise ValueError(f"[{op}] dt_limit is {limit!r}, expected a low end that is not above")
    low = None if low == -math.inf or (positive and low <= 0) else low
    high = None if high == math.inf else high
    return dt if low is None and high is None else dt.clamp(low, high)


def _check_chunk_size(op, chunk_size):
    if chunk_size is None:
        return
    try:
        size = operator.index(chunk_size)
    except TypeError:
        raise TypeError(
            f"[{op}] chunk_size is {type(chunk_size).__name__}, expected an int or None"
        ) from None
    if size < 1:
        raise ValueError(f"[{op}] chunk_size is {size}, expected at least 1")


def begins(seq_idx, reverse):
    """Where a step does not belong to the sequence of the step that the scan came from."""
    differs = seq_idx[:, 1:] != seq_idx[:, :-1]
    first = torch.zeros_like(seq_idx[:, :1], dtype=torch.bool)
    return torch.cat([differs, first] if reverse else [first, differs], 1)
