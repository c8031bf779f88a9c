# SPDX-License-Identifier: Apache-2.0
"""The scan benchmark's cases of images: the cross-scan of VMamba, four selective scans summed.

All of it "as the image lies", so that whoever scans must put u, delta, B and C in order; or with
delta, B and C in the order of each scan already, as VMamba computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.functional import softplus

from .harness import Call, Case, Contender, Target
from .passes import PASSES
from .scan_data import FLOP_PER_STATE, Scan, check

RATIO = 2.0
DIRECTIONS = 4
RESULTS = ("out", "du", "ddelta", "dA", "dB", "dC", "dD", "ddelta_bias")
OVER_PLACES = ("delta", "B", "C")


@dataclass
class Image:
    """u, d_out (B, D, H, W); for each of four directions delta (B, 4, D, H W), A (4, D, N), B, C
    (B, 4, N, H W), D and delta_bias (4, D), as the image lies."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    delta_bias: torch.Tensor
    d_out: torch.Tensor
    expected: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.u, self.delta, self.A, self.B, self.C, self.D, self.delta_bias]

    @property
    def orders(self) -> torch.Tensor:
        """(4, H W): the places by rows, by columns, and both backwards."""
        height, width = self.u.shape[2:]
        places = torch.arange(height * width).view(height, width)
        orders = torch.stack([places.flatten(), places.mT.flatten()])
        return torch.cat([orders, orders.flip(1)])

    @property
    def leaves_by_step(self) -> list[torch.Tensor]:
        """The same with delta, B and C in the order of each scan."""
        u, delta, A, B, C, D, bias = self.leaves
        delta, B, C = (along(x, self.orders) for x in (delta, B, C))
        return [u, delta, A, B, C, D, bias]

    @property
    def states(self) -> int:
        return self.delta.numel() * self.A.shape[2]

    def solve(self) -> None:
        """Each direction by itself; what it gives goes back to its place."""
        orders = self.orders
        places = orders.argsort(1)
        u, d_out = (x.flatten(2) for x in (self.u, self.d_out))
        _, delta, A, B, C, D, bias = self.leaves_by_step
        found = []
        for k, order in enumerate(orders):
            scan = Scan(
                u[..., order], delta[:, k], A[k], B[:, k], C[:, k], D[k], None, bias[k],
                d_out[..., order],
            )  # fmt: skip
            scan.solve()
            found.append(scan.expected)
        for name in RESULTS:
            parts = [
                answers[name][..., places[k]] if answers[name].dim() == 3 else answers[name]
                for k, answers in enumerate(found)
            ]
            if name in ("out", "du"):
                self.expected[name] = sum(parts).view(self.u.shape)
            else:
                self.expected[name] = torch.stack(parts, int(parts[0].dim() == 3))

    def check(self, results) -> None:
        check(results, self.expected)

    def check_by_step(self, results) -> None:
        places = self.orders.argsort(1)
        named = zip(RESULTS, results, strict=False)
        check(
            [along(x.detach(), places) if n[1:] in OVER_PLACES else x for n, x in named],
            self.expected,
        )


def along(x: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    """x (B, 4, ..., H W) in an order for each direction."""
    return x.gather(3, orders[None, :, None].expand(x.shape))


def random_image(batch: int, dim: int, height: int, width: int, states: int) -> Image:
    """Decays and steps are those of a Mamba block at its start."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    steps, length = torch.logspace(-3, -1, dim), height * width
    problem = Image(
        u=normal(batch, dim, height, width),
        delta=0.5 * normal(batch, DIRECTIONS, dim, length),
        A=-torch.arange(1.0, states + 1).repeat(DIRECTIONS, dim, 1),
        B=normal(batch, DIRECTIONS, states, length),
        C=normal(batch, DIRECTIONS, states, length),
        D=normal(DIRECTIONS, dim),
        delta_bias=(steps + torch.log(-torch.expm1(-steps))).repeat(DIRECTIONS, 1),
        d_out=normal(batch, dim, height, width),
    )
    problem.solve()
    return problem


# Contenders --------------------------------------------------------------------------------------


def scan2d(what: str, by_step: bool, problem: Image) -> Call:
    from pentad.scan import scan2d

    options = {"delta_softplus": True, "by_step": OVER_PLACES if by_step else ()}

    def op(u, delta, A, B, C, D, delta_bias):
        return scan2d(u, delta, A, B, C, D, delta_bias=delta_bias, **options)

    leaves = problem.leaves_by_step if by_step else problem.leaves
    return PASSES[what](op, leaves, problem.d_out)


def in_order(x: torch.Tensor, k: int, height: int, width: int) -> torch.Tensor:
    """x (..., H W) by rows, by columns, or either backwards."""
    x = x.unflatten(-1, (height, width)).mT.flatten(-2) if k % 2 else x
    return x.flip(-1) if k >= 2 else x


def permuted(scan: Callable[..., torch.Tensor], by_step: bool):
    """The image by rows, by columns and both backwards, four scans, and back."""

    def op(u, delta, A, B, C, D, delta_bias):
        height, width = u.shape[2:]
        ways = []
        for k in range(DIRECTIONS):
            given = delta[:, k], B[:, k], C[:, k]
            if not by_step:
                given = (in_order(x, k, height, width) for x in given)
            steps, b, c = given
            way = in_order(u.flatten(2), k, height, width)
            ways.append(scan(way, steps, A[k], b, c, D[k], delta_bias[k]))
        rows, columns, rows_back, columns_back = ways
        rows, columns = rows + rows_back.flip(2), columns + columns_back.flip(2)
        return rows.unflatten(2, (height, width)) + columns.unflatten(2, (width, height)).mT

    return op


def permute_and_scan(what: str, by_step: bool, problem: Image) -> Call:
    from pentad.scan import selective_scan

    def scan(u, delta, A, B, C, D, delta_bias):
        return selective_scan(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)

    leaves = problem.leaves_by_step if by_step else problem.leaves
    return PASSES[what](permuted(scan, by_step), leaves, problem.d_out)


def permute_and_mambapy(what: str, problem: Image) -> Call:
    from mambapy.mamba import MambaBlock

    def scan(u, delta, A, B, C, D, delta_bias):
        u, steps, B, C = (x.mT for x in (u, softplus(delta + delta_bias[:, None]), B, C))
        return MambaBlock.selective_scan(None, u, steps, A, B, C, D).mT

    return PASSES[what](permuted(scan, True), problem.leaves_by_step, problem.d_out)


# The cases ---------------------------------------------------------------------------------------


def setup(states: int, quick: bool, threads: int) -> Image:
    return random_image(1, 8, 6, 5, states) if quick else random_image(1, 192, 56, 56, states)


def scan2d_case(what: str, states: int, by_step: bool) -> Case:
    own, mambapy = "permute, four scans of pentad", "permute, four scans of mambapy"
    checked = Image.check_by_step if by_step else Image.check
    contenders = [
        Contender("pentad", partial(scan2d, what, by_step), checked),
        Contender(own, partial(permute_and_scan, what, by_step), checked),
    ]
    if by_step:
        once = what == "training"  # some ten seconds
        contenders.append(Contender(mambapy, partial(permute_and_mambapy, what), checked, once))
    order = "delta, B and C in scan order" if by_step else "all as the image lies"
    return Case(
        f"scan2d cross-scan {what} float32 1,192,56,56 N {states}, {order}",
        partial(setup, states),
        contenders,
        lambda problem: {
            "states": problem.states,
            "flop": problem.states * FLOP_PER_STATE[what],
        },
        Target(tuple(c.name for c in contenders[1:]), RATIO),
        "float32",
    )


CASES = [
    scan2d_case(what, states, by_step)
    for states in (16, 1)
    for what in ("forward", "training")
    for by_step in (False, True)
]
