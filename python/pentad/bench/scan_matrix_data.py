# SPDX-License-Identifier: Apache-2.0
"""Inputs of the benchmark of matrix states, and their answers in float64.

The answers come from the chunked forms below, which are written in plain PyTorch and are peers as
well; tests compare them with the recurrences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid, normalize, pad, softplus

from .scan_data import check

# Steps a chunk: in the plain forms, and in the counts of flop.
CHUNK = 64


# Chunked forms in plain PyTorch ------------------------------------------------------------------


def in_chunks(x: torch.Tensor) -> torch.Tensor:
    """(B, H, L / CHUNK, CHUNK, ...) of (B, L, H, ...), zeros behind the last step."""
    missing = -x.shape[1] % CHUNK
    if missing:
        x = pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, CHUNK)).movedim(3, 1)


def over_time(x: torch.Tensor, length: int) -> torch.Tensor:
    return x.movedim(1, 3).flatten(1, 2)[:, :length]


def lower(size: int) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def segments(g: torch.Tensor) -> torch.Tensor:
    """(..., i, j) of g (..., n): exp of the sum over (j, i], and 0 where j > i."""
    sums = g.cumsum(-1)
    differences = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    return differences.masked_fill(~lower(g.shape[-1]), -torch.inf).exp()


def chunked_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor
) -> torch.Tensor:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, out_t = S_t^T q_t, all in matrix products.

    q, k (B, L, H, N), v (B, L, H, P); g is the logarithm of a decay for each head (B, L, H) or for
    each key (B, L, H, N). Decays per key are divided out of the keys of a chunk, so that they must
    not be too strong; those of gated linear attention are not.
    """
    length = q.shape[1]
    q, k, v, g = map(in_chunks, (q, k, v, g))
    sums = g.cumsum(3)
    ends = sums[:, :, :, -1:]
    if g.dim() == 4:
        scores = (q @ k.mT) * segments(g)
        entering, own = q * sums.exp()[..., None], (k * (ends - sums).exp()[..., None]).mT @ v
        # From the end of a chunk to the beginning of another: as many factors as states.
        between = segments(pad(ends[..., 0], (1, 0)))[..., :-1, 1:]
        states = (between @ own.flatten(3)).view_as(own)
    else:
        entering, own = q * sums.exp(), (k * (ends - sums).exp()).mT @ v
        scores = (entering @ (k * (-sums).exp()).mT) * lower(CHUNK)
        between = segments(pad(ends[..., 0, :].mT, (1, 0)))[..., :-1, 1:]
        states = (between @ own.movedim(2, 3)).movedim(3, 2)
    return over_time(scores @ v + entering @ states, length)


def chunked_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor
) -> torch.Tensor:
    """S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T, out_t = S_t^T q_t / N^0.5.

    The WY form: a triangular system for each chunk, all of them at once, and a loop over chunks.
    q, k (B, L, H, N), v (B, L, H, P), beta, g (B, L, H).
    """
    length, values = v.shape[1], v.shape[3]
    q, k, v, beta, g = map(in_chunks, (q, k, v, beta, g))
    pairs, sums = segments(g), g.cumsum(3)
    written = beta[..., None] * k
    right = torch.cat([beta[..., None] * v, written * sums.exp()[..., None]], -1)
    solved = torch.linalg.solve_triangular(
        (written @ k.mT) * pairs, right, upper=False, unitriangular=True
    )
    new, seen = solved[..., :values], solved[..., values:]
    q = q * q.shape[-1] ** -0.5
    scores, entering = (q @ k.mT) * pairs, q * sums.exp()[..., None]
    ends = sums[:, :, :, -1:]
    leaving, decays = (k * (ends - sums).exp()[..., None]).mT, ends.exp()[..., None]
    state = v.new_zeros(*v.shape[:2], k.shape[4], values)
    outs = []
    for c in range(v.shape[2]):
        fresh = new[:, :, c] - seen[:, :, c] @ state
        outs.append(entering[:, :, c] @ state + scores[:, :, c] @ fresh)
        state = decays[:, :, c] * state + leaving[:, :, c] @ fresh
    return over_time(torch.stack(outs, 2), length)


def chunked_ssd(x, dt, A, B, C, D, dt_bias) -> torch.Tensor:
    """x (B, L, H, P), dt (B, L, H), A, D, dt_bias (H), B, C (B, L, G, N); softplus on the steps."""
    steps, per_group = softplus(dt + dt_bias), x.shape[2] // B.shape[2]
    k, q = (t.repeat_interleave(per_group, 2) for t in (B, C))
    return chunked_linear_attention(q, k, x * steps[..., None], steps * A) + D[:, None] * x


# Problems ----------------------------------------------------------------------------------------


@dataclass
class Matrix:
    """The arguments of a function, the gradient of its result, and the answers."""

    arguments: dict[str, torch.Tensor]
    d_out: torch.Tensor
    expected: dict[str, torch.Tensor]
    flop: dict[str, float]

    @property
    def leaves(self) -> list[torch.Tensor]:
        return list(self.arguments.values())

    def check(self, results) -> None:
        check(results, self.expected)


def solved(
    function: Callable[..., torch.Tensor],
    arguments: dict[str, torch.Tensor],
    flop: dict[str, float],
    generator: torch.Generator,
) -> Matrix:
    """The problem, with the answers by the function in float64."""
    leaves = {name: x.double().requires_grad_() for name, x in arguments.items()}
    out = function(**leaves)
    d_out = torch.randn(out.shape, generator=generator)
    gradients = torch.autograd.grad(out, list(leaves.values()), d_out.double())
    answers = dict(zip((f"d_{name}" for name in leaves), gradients, strict=True))
    return Matrix(arguments, d_out, {"out": out.detach(), **answers}, flop)


def flop_of(batch, length, heads, groups, keys, values, delta=False) -> dict[str, float]:
    """Two per multiply-add, of the products in chunks; of a triangle, its half.

    The products of queries and keys are counted once for each group. Backward passes recompute
    them, and the delta rule's new values, but not the states between chunks.
    """
    pairs = CHUNK * keys * groups / heads
    inner, state = CHUNK * values, 2 * keys * values
    if delta:
        forward, both = 2 * pairs + 2 * inner + 3 * state, 7 * pairs + 7 * inner + 10 * state
    else:
        forward, both = pairs + inner + 2 * state, 4 * pairs + 3 * inner + 6 * state
    heads *= batch * length
    return {"forward": heads * forward, "training": heads * both}


def random_ssd(batch, length, heads, values, keys) -> Matrix:
    """Decays and steps as those of a Mamba-2 block at its start."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    steps = torch.logspace(-3, -1, heads)
    arguments = {
        "x": normal(batch, length, heads, values),
        "dt": 0.5 * normal(batch, length, heads),
        "A": -torch.linspace(1, 16, heads),
        "B": normal(batch, length, 1, keys),
        "C": normal(batch, length, 1, keys),
        "D": normal(heads),
        "dt_bias": steps + torch.log(-torch.expm1(-steps)),  # the inverse of softplus
    }
    flop = flop_of(batch, length, heads, 1, keys, values)
    return solved(chunked_ssd, arguments, flop, generator)


def random_linear_attention(batch, length, heads, dim, per_key) -> Matrix:
    """Decays as of gated linear attention, ``sigmoid(x) ** (1 / 16)``."""
    generator = torch.Generator().manual_seed(1)
    shape = batch, length, heads, dim
    q, k, v, gate = (torch.randn(shape, generator=generator) for _ in range(4))
    g = logsigmoid(gate if per_key else gate[..., 0]) / 16
    arguments = {"q": q, "k": k, "v": v, "g": g}
    flop = flop_of(batch, length, heads, heads, dim, dim)
    return solved(chunked_linear_attention, arguments, flop, generator)


def random_delta_rule(batch, length, heads, dim) -> Matrix:
    """Keys of length 1, weights between 0 and 1, decays as of gated DeltaNet at its start."""
    generator = torch.Generator().manual_seed(1)
    shape = batch, length, heads, dim
    q, k, v, gate = (torch.randn(shape, generator=generator) for _ in range(4))
    arguments = {
        "q": normalize(q, dim=-1),
        "k": normalize(k, dim=-1),
        "v": v,
        "beta": torch.sigmoid(gate[..., 1]),
        "g": -0.1 * softplus(gate[..., 0]),
    }
    flop = flop_of(batch, length, heads, heads, dim, dim, delta=True)
    return solved(chunked_delta_rule, arguments, flop, generator)


# One token ---------------------------------------------------------------------------------------


@dataclass
class Token:
    """state (B, H, N, P), q, k (B, H, N), v (B, H, P), decay (B, H), and what is read."""

    state: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    decay: torch.Tensor
    expected: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Of the states, read and written."""
        return 2 * self.state.nbytes

    def check(self, result: torch.Tensor) -> None:
        check([result], {"out": self.expected})


def random_token(batch: int, heads: int, dim: int) -> Token:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q, k, v = (normal(batch, heads, dim) for _ in range(3))
    state, decay = normal(batch, heads, dim, dim), torch.sigmoid(normal(batch, heads))
    new = decay.double()[..., None, None] * state + k.double()[..., None] * v[..., None, :]
    return Token(state, q, k, v, decay, torch.einsum("bhn,bhnp->bhp", q.double(), new))
