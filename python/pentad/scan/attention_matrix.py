# SPDX-License-Identifier: Apache-2.0
"""What a selective scan takes from each step: its implicit attention, tile by tile."""

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from pentad._ops import needs_grad
from pentad.scan import autograd
from pentad.scan._checks import check_devices, check_dtype, check_shape, check_tensor
from pentad.scan.functional import canonical, promoted_inputs

_ELEMENTS = 1 << 22  # of a tile's answers, (sources, D, steps)
_REDUCTIONS = {
    None: lambda alpha: alpha,
    "mean": lambda alpha: alpha.mean(1),
    "sum": lambda alpha: alpha.sum(1),
    "abs": lambda alpha: alpha.abs().mean(1),
    "norm": lambda alpha: torch.linalg.vector_norm(alpha, dim=1),
}


def attention_matrix(
    delta,
    A,
    B,
    C,
    *,
    u=None,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    reverse=False,
    reduce="mean",
):
    r"""The matrix that a selective scan multiplies its input with, as in attention.

    ``selective_scan(u, delta, ...)[b, d, t] = sum_s alpha[b, d, t, s] u[b, d, s]`` with ``alpha =
    silu(z_t) (sum_n C_t exp(A sum_{s < r <= t} dt_r) B_s dt_s + D [t = s])`` (Ali, Zimerman & Wolf
    2024, "The Hidden Attention of Mamba Models", arXiv 2403.01590, section 4; with D and z
    Zimerman, Ali & Wolf 2024, "Explaining Modern Gated-Linear RNNs via a Unified Implicit Attention
    Formulation", arXiv 2405.16504). Column s is the scan's answer to a unit impulse at step s, so
    that no decay is ever divided; a tile of columns at a time is reduced over the channels, and
    with `reduce` nothing of size D x L x L is stored. Differentiable once in every floating
    argument; the backward pass computes the tiles again.

    Parameters
    ----------
    delta : (B, D, L) float32, bfloat16, float16 or float64
        Computed in float32 (float64 for float64).
    A : (D, N) float32 or complex64
    B : (D, N), (B, N, L) or (B, G, N, L)
        As in `selective_scan`, and so are the following.
    C : (D, N), (B, N, L) or (B, G, N, L)
    u : (B, D, L), optional
        Of delta's dtype. With it the contributions ``alpha[b, d, t, s] u[b, d, s]``.
    D : (D,) float, optional
        On the diagonal.
    z : (B, D, L), optional
        Of delta's dtype.
    delta_bias : (D,) float, optional
    delta_softplus : bool
    reverse : bool
    reduce : "mean", "sum", "abs", "norm" or None
        Over the channels: their mean, their sum, the mean of magnitudes, or the Euclidean norm (the
        token contributions of LaTIM, Pitorro & Treviso 2025, arXiv 2502.15612).

    Returns
    -------
    alpha : (B, L, L), or (B, D, L, L) where `reduce` is None
        In delta's dtype; [..., t, s] is what step t takes from step s.

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
    >>> delta, B = torch.ones(1, 1, 3), torch.ones(1, 1)
    >>> A = torch.full((1, 1), 0.5).log()  # half of the state is left after a step
    >>> pentad.scan.attention_matrix(delta, A, B, B)
    tensor([[[1.0000, 0.0000, 0.0000],
             [0.5000, 1.0000, 0.0000],
             [0.2500, 0.5000, 1.0000]]])
    """
    op = "attention_matrix"
    if reduce is not None and reduce not in _REDUCTIONS:
        raise ValueError(
            f"[{op}] reduce is {reduce!r}, expected 'mean', 'sum', 'abs', 'norm' or None"
        )
    if torch.is_autocast_enabled("cpu"):
        u, delta, z, B, C = promoted_inputs(u, delta, z, B, C)
    delta, _, A, B, C, D, z, delta_bias = canonical(
        op, delta, delta, A, B, C, D, z, delta_bias, first="delta"
    )
    if u is not None:
        check_tensor(op, "u", u)
        check_devices(op, ("delta", delta), u=u)
        check_dtype(op, "u", u, delta.dtype, "delta")
        check_shape(op, "u", u, tuple(delta.shape))
    dtype, (batch, dim, length) = delta.dtype, delta.shape
    if dtype in (torch.bfloat16, torch.float16):
        delta, z, u = (None if t is None else t.float() for t in (delta, z, u))
        B, C = (t if t.ndim == 2 else t.float() for t in (B, C))

    shape = (length, length) if reduce is not None else (dim, length, length)
    if not batch or not length:
        return delta.new_zeros((batch, *shape), dtype=dtype)

    width = max(1, min(length, _ELEMENTS // max(1, dim * length)))
    settings = (bool(delta_softplus), bool(reverse), reduce)
    constants = (A, D, delta_bias)
    rows = []
    for row in range(batch):
        varying = [None if t is None else t[row : row + 1] for t in (delta, z, u)]
        matrices = [t if t.ndim == 2 else t[row : row + 1] for t in (B, C)]
        tensors = (*varying, *matrices, *constants)
        tiles = []
        for first in range(0, length, width):
            tile = (first, min(first + width, length))
            if needs_grad(*(t for t in tensors if t is not None)):  # a tile is not kept
                answers = checkpoint(
                    _tile, tile, settings, *tensors, use_reentrant=False, preserve_rng_state=False
                )
            else:
                answers = _tile(tile, settings, *tensors)
            tiles.append(answers)
        rows.append(torch.cat(tiles, -1))
    return torch.stack(rows).to(dtype)


def _tile(tile, settings, delta, z, u, B, C, A, D, delta_bias):
    """([D,] L, sources of the tile): the scan's answers to an impulse at each, as a batch."""
    (first, past), (softplus, reverse, reduce) = tile, settings
    dim, length = delta.shape[1:]
    begin, end = (0, past) if reverse else (first, length)  # steps that take anything
    sources = past - first
    impulses = delta.new_zeros(sources, 1, end - begin)
    impulses.diagonal(first - begin, 0, 2).fill_(1)

    def cut(t, axis):
        return t.narrow(axis, begin, end - begin).expand(sources, *(-1,) * (t.ndim - 1))

    B, C = (t if t.ndim == 2 else cut(t, 3) for t in (B, C))
    alpha, _, _ = autograd.selective_scan(
        impulses.expand(-1, dim, -1), cut(delta, 2), A, B, C, D, None if z is None else cut(z, 2),
        delta_bias, None, None, softplus, reverse, False,
    )  # fmt: skip
    if u is not None:
        alpha = alpha * u[0, :, first:past].t().unsqueeze(2)
    return pad(_REDUCTIONS[reduce](alpha), (begin, length - end)).movedim(0, -1)
