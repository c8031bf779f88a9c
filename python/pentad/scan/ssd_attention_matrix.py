# SPDX-License-Identifier: Apache-2.0
"""What each head of Mamba-2 takes from each step: its implicit attention, tile by tile."""

import math

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from pentad._ops import needs_grad
from pentad.scan._checks import (
    accumulator,
    autocasts,
    check_cuda_devices,
    check_dtype,
    check_integers,
    check_rank,
    check_shape,
    check_tensor,
    parameter,
    promoted,
)
from pentad.scan._matrix_checks import check_size
from pentad.scan.matrix_autograd import matrix_scan
from pentad.scan.ssd import begins, step_sizes

_ELEMENTS = 1 << 22  # of a tile's answers, (B, steps, H, sources)
_SOURCES = (16, 256)  # least and most of a tile

# Over the heads, and what stands for a step's channels of a head: the two together are over both.
_REDUCTIONS = {
    "mean": (lambda alpha: alpha.mean(2), lambda x: x.mean(3)),
    "sum": (lambda alpha: alpha.sum(2), lambda x: x.sum(3)),
    "abs": (lambda alpha: alpha.abs().mean(2), lambda x: x.abs().mean(3)),
    "norm": (
        lambda alpha: torch.linalg.vector_norm(alpha, dim=2),
        lambda x: torch.linalg.vector_norm(x, dim=3),
    ),
}


def ssd_attention_matrix(
    dt,
    A,
    B,
    C,
    *,
    x=None,
    D=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    seq_idx=None,
    reverse=False,
    reduce="mean",
):
    r"""The matrices that the heads of `ssd` multiply their inputs with, as in attention.

    ``ssd(x, dt, A, B, C, ...)[b, t, h] = sum_s alpha[b, h, t, s] x[b, s, h]`` with ``alpha = (C_t .
    B_s) dt'_s exp(A sum_{s < r <= t} dt'_r) + D [t = s]`` (Dao & Gu 2024, "Transformers are SSMs",
    arXiv 2405.21060, section 3.2; with `x` the contributions of tokens to tokens in LaTIM, Pitorro
    & Treviso 2025, arXiv 2502.15612). Column s is the scan's answer to a unit impulse at step s, so
    that no decay is ever divided; a tile of columns at a time is reduced over the heads, and with
    `reduce` nothing of size H x L x L is stored. Differentiable once in every floating argument;
    the backward pass computes the tiles again.

    Parameters
    ----------
    dt : (B, L, H) float
        As in `ssd`, and so are the following.
    A : (H,) float
    B : (B, L, G, N) float32, bfloat16, float16 or float64
        Computed in float32 (float64 for float64).
    C : (B, L, G, N)
        In B's dtype.
    x : (B, L, H, P), optional
        In B's dtype. With it the contributions ``alpha[b, h, t, s] x[b, s, h, p]``, reduced over h
        and p.
    D : (H,) float, optional
        On the diagonal.
    dt_bias : (H,) float, optional
    dt_softplus : bool
    dt_limit : (float, float)
    seq_idx : (B, L) int32 or int64, optional
    reverse : bool
    reduce : "mean", "sum", "abs", "norm" or None
        Over the heads, and the channels of `x`: their mean, their sum, the mean of magnitudes, or
        the Euclidean norm. None only without `x`.

    Returns
    -------
    alpha : (B, L, L), or (B, H, L, L) where `reduce` is None
        In B's dtype; [..., t, s] is what step t takes from step s.

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes that do not fit together, and another `reduce`.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative, or one of forward mode.

    Examples
    --------
    >>> import torch
    >>> dt, ones = torch.ones(1, 3, 1), torch.ones(1, 3, 1, 1)
    >>> A = torch.tensor([0.5]).log()  # half of the state is left after a step
    >>> pentad.scan.ssd_attention_matrix(dt, A, ones, ones)
    tensor([[[1.0000, 0.0000, 0.0000],
             [0.5000, 1.0000, 0.0000],
             [0.2500, 0.5000, 1.0000]]])
    """
    op = "ssd_attention_matrix"
    if reduce is not None and not (isinstance(reduce, str) and reduce in _REDUCTIONS):
        raise ValueError(
            f"[{op}] reduce is {reduce!r}, expected 'mean', 'sum', 'abs', 'norm' or None"
        )
    if reduce is None and x is not None:
        raise ValueError(f"[{op}] x cannot be used with reduce=None")
    if autocasts(B):
        x, B, C = promoted(x, B, C)
    heads = _check(op, dt, A, B, C, x, D, dt_bias, seq_idx)
    (batch, length), dtype = B.shape[:2], B.dtype
    wide = accumulator(dtype)
    dt, A = step_sizes(
        op, dt, A, dt_bias, dt_softplus, dt_limit, (batch, length, heads), wide, whose="B"
    )
    if D is not None:
        D = parameter(op, "D", D, wide, (heads,), whose="B")
    a = torch.exp(dt * A)
    if seq_idx is not None:
        a = a.masked_fill(begins(seq_idx, reverse).unsqueeze(2), 0)
    B, C = B.to(wide), C.to(wide)
    weight = None if x is None else _REDUCTIONS[reduce][1](x.to(wide))

    if not (batch and length and heads):
        shape = (batch, length, length) if reduce is not None else (batch, heads, length, length)
        return B.new_zeros(shape, dtype=dtype)
    tensors = (B, C, a, dt, D, weight)
    least, most = _SOURCES
    width = min(length, max(least, min(most, _ELEMENTS // (batch * length * heads))))
    tiles = []
    for first in range(0, length, width):
        given = ((first, min(first + width, length)), bool(reverse), reduce, *tensors)
        if needs_grad(*(t for t in tensors if t is not None)):  # a tile is not kept
            tiles.append(checkpoint(_tile, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            tiles.append(_tile(*given))
    return torch.cat(tiles, -1).to(dtype)


def _tile(tile, reverse, reduce, B, C, a, dt, D, weight):
    """(B, [H,] L, sources of the tile): the scan's answers to an impulse at each, as its values."""
    first, past = tile
    batch, length, heads = dt.shape
    begin, end = (0, past) if reverse else (first, length)  # steps that take anything
    sources = past - first
    impulses = B.new_zeros(end - begin, sources)
    impulses.diagonal(begin - first).fill_(1)
    B, C, a, dt = (t[:, begin:end] for t in (B, C, a, dt))
    alpha, _ = matrix_scan(
        "ssd_attention_matrix", C, B, impulses.unsqueeze(1).expand(batch, -1, heads, -1), a=a,
        w=dt, d=None if D is None else D.unsqueeze(1).expand(-1, sources), reverse=reverse,
    )  # fmt: skip
    if weight is not None:
        alpha = alpha * weight[:, first:past].transpose(1, 2).unsqueeze(1)
    alpha = alpha.transpose(1, 2) if reduce is None else _REDUCTIONS[reduce][0](alpha)
    return pad(alpha, (0, 0, begin, length - end))


def _check(op, dt, A, B, C, x, D, dt_bias, seq_idx):
    """All but the small operands; the number of heads."""
    check_tensor(op, "B", B)
    check_rank(op, "B", B, 4, "(B, L, G, N)")
    check_cuda_devices(op, ("B", B), dt=dt, A=A, C=C, x=x, D=D, dt_bias=dt_bias, seq_idx=seq_idx)
    check_tensor(op, "C", C)
    check_dtype(op, "C", C, B.dtype, "B")
    check_shape(op, "C", C, tuple(B.shape))
    check_size(op, "B", B, "keys")
    check_tensor(op, "A", A)
    check_rank(op, "A", A, 1, "(H,)")
    batch, length, groups, _ = B.shape
    heads = A.shape[0]
    if groups < 1 or heads % groups:
        raise ValueError(
            f"[{op}] B has {groups} groups but A has {heads} heads, "
            f"which are not a multiple of {groups}"
        )
    if x is not None:
        check_tensor(op, "x", x)
        check_dtype(op, "x", x, B.dtype, "B")
        check_rank(op, "x", x, 4, "(B, L, H, P)")
        check_shape(op, "x", x, (batch, length, heads, x.shape[3]))
    if seq_idx is not None:
        check_integers(op, "seq_idx", seq_idx, (batch, length))
    return heads
