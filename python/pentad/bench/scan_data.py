# SPDX-License-Identifier: Apache-2.0
"""Inputs of the scan benchmark, and their answers in float64 by the equations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.functional import conv1d, silu, softplus

# Largest error admitted, relative to the largest value of the answer.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape, f"{name} is {actual.shape}, not {expected.shape}"
    error = (actual.detach().double() - expected).abs().max() / expected.abs().max()
    limit = TOLERANCES[actual.dtype]
    assert error <= limit, f"{name} is off by {error:.2g} of its largest value, more than {limit}"


def check(results, expected: dict[str, torch.Tensor]) -> None:
    """results are the output and, where there are more, the gradients, in the answers' order."""
    for (name, answer), actual in zip(expected.items(), results, strict=False):
        assert_close(name, actual, answer)


# Selective scan ----------------------------------------------------------------------------------

FLOP_PER_STATE = {"forward": 22, "training": 62}


def d_silu(z: torch.Tensor) -> torch.Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


@dataclass
class Scan:
    """u, delta, z, d_out (B, D, L), A (D, N), B, C (B, N, L), D and delta_bias (D); z may be None.

    Decays and steps are those of a Mamba block at its start.
    """

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    z: torch.Tensor | None
    delta_bias: torch.Tensor
    d_out: torch.Tensor
    expected: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def leaves(self) -> list[torch.Tensor]:
        given = [self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias]
        return [x for x in given if x is not None]

    @property
    def states(self) -> int:
        """The number of states, over channels and time."""
        return self.u.numel() * self.A.shape[1]

    def solve(self) -> None:
        """The recurrence and its adjoint, step by step with all states in memory.

        In place: many short-lived arrays of this size grow the heap without end in some versions of
        the C library.
        """
        u, delta, A, B, C, D, *z, bias = (x.double() for x in self.leaves)
        steps = delta + bias[:, None]
        dt, d_out = softplus(steps), self.d_out.double()
        dy = d_out * silu(z[0]) if z else d_out
        # Time first, then batch; channels and states as columns and rows of what they multiply.
        dt_t, u_t, dy_t = (x.movedim(2, 0).unsqueeze(3).contiguous() for x in (dt, u, dy))
        B_t, C_t = (x.movedim(2, 0).unsqueeze(2).contiguous() for x in (B, C))
        dtu_t = dt_t * u_t
        states = A.new_zeros(len(u_t) + 1, u.shape[0], *A.shape)
        decay, g, w = (torch.empty_like(states[0]) for _ in range(3))
        y_t, g_B, w_A = (torch.empty_like(u_t) for _ in range(3))
        for t in range(len(u_t)):
            torch.mul(dt_t[t], A, out=decay).exp_()
            torch.mul(decay, states[t], out=states[t + 1]).addcmul_(dtu_t[t], B_t[t])
            torch.mul(states[t + 1], C_t[t], out=w)
            torch.sum(w, -1, keepdim=True, out=y_t[t])
        dA, dB_t, dC_t = torch.zeros_like(A), torch.empty_like(B_t), torch.empty_like(C_t)
        carried = torch.zeros_like(decay)
        for t in reversed(range(len(u_t))):
            torch.mul(dy_t[t], C_t[t], out=g).add_(carried)
            torch.matmul(dy_t[t].mT, states[t + 1], out=dC_t[t])
            torch.matmul(dtu_t[t].mT, g, out=dB_t[t])
            torch.mul(g, B_t[t], out=w)
            torch.sum(w, -1, keepdim=True, out=g_B[t])
            torch.mul(dt_t[t], A, out=decay).exp_()
            torch.mul(decay, g, out=carried)
            torch.mul(carried, states[t], out=w)
            dA += torch.mul(w, dt_t[t], out=g).sum(0)
            torch.sum(w.mul_(A), -1, keepdim=True, out=w_A[t])
        y, g_B, w_A = (x.squeeze(3).movedim(0, 2) for x in (y_t, g_B, w_A))
        y = y + D[:, None] * u
        ddelta = (u * g_B + w_A) * torch.sigmoid(steps)
        self.expected = {
            "out": y * silu(z[0]) if z else y,
            "du": dt * g_B + D[:, None] * dy,
            "ddelta": ddelta,
            "dA": dA,
            "dB": dB_t.squeeze(2).movedim(0, 2),
            "dC": dC_t.squeeze(2).movedim(0, 2),
            "dD": (dy * u).sum((0, 2)),
            **({"dz": d_out * y * d_silu(z[0])} if z else {}),
            "ddelta_bias": ddelta.sum((0, 2)),
        }

    def check(self, results) -> None:
        check(results, self.expected)


def random_scan(
    batch: int, dim: int, length: int, states: int, dtype: torch.dtype, solve: bool = True
) -> Scan:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    steps = torch.logspace(-3, -1, dim)
    problem = Scan(
        u=normal(batch, dim, length).to(dtype),
        delta=(0.5 * normal(batch, dim, length)).to(dtype),
        A=-torch.arange(1.0, states + 1).repeat(dim, 1),
        B=normal(batch, states, length).to(dtype),
        C=normal(batch, states, length).to(dtype),
        D=normal(dim),
        z=normal(batch, dim, length).to(dtype),
        delta_bias=steps + torch.log(-torch.expm1(-steps)),  # the inverse of softplus
        d_out=normal(batch, dim, length).to(dtype),
    )
    if solve:
        problem.solve()
    return problem


# Elementwise recurrence --------------------------------------------------------------------------


@dataclass
class Recurrence:
    """a (the gates, 0 to 1), x and d_h: (..., L)."""

    a: torch.Tensor
    x: torch.Tensor
    d_h: torch.Tensor
    expected: dict[str, torch.Tensor]

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.a, self.x]

    def check(self, results) -> None:
        check(results, self.expected)


def random_recurrence(shape: tuple[int, ...]) -> Recurrence:
    generator = torch.Generator().manual_seed(1)
    a, x, d_h = (torch.randn(shape, generator=generator) for _ in range(3))
    a = torch.sigmoid(2 * a + 2)
    gates, inputs, seeds = (v.double().movedim(-1, 0).contiguous() for v in (a, x, d_h))
    h = inputs.clone()
    for t in range(1, len(h)):
        h[t] += gates[t] * h[t - 1]
    dx = seeds
    for t in reversed(range(len(h) - 1)):
        dx[t] += gates[t + 1] * dx[t + 1]
    da = dx * torch.cat([torch.zeros_like(h[:1]), h[:-1]])
    answers = {"h": h, "da": da, "dx": dx}
    return Recurrence(a, x, d_h, {name: v.movedim(0, -1) for name, v in answers.items()})


# Causal convolution ------------------------------------------------------------------------------


@dataclass
class Convolution:
    """silu of a causal depthwise convolution: x, d_out (B, D, L), weight (D, W), bias (D)."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    d_out: torch.Tensor
    expected: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.x, self.weight, self.bias]

    def check(self, results) -> None:
        check(results, self.expected)


def torch_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As in every Mamba implementation without kernels."""
    dim, width = weight.shape
    padded = conv1d(x, weight[:, None], bias, padding=width - 1, groups=dim)
    return silu(padded[..., : x.shape[2]])


def random_convolution(
    batch: int, dim: int, length: int, width: int, dtype: torch.dtype, channels_last: bool
) -> Convolution:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, length, dim) if channels_last else (batch, dim, length)
    x, d_out = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    if channels_last:
        x, d_out = x.transpose(1, 2), d_out.transpose(1, 2)
    weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((dim, width), (dim,)))
    problem = Convolution(x, weight, bias, d_out)
    leaves = [v.double().requires_grad_() for v in problem.leaves]
    out = torch_conv(*leaves)
    gradients = torch.autograd.grad(out, leaves, d_out.double())
    answers = (out.detach(), *gradients)
    problem.expected = dict(zip(("out", "dx", "dweight", "dbias"), answers, strict=True))
    return problem
