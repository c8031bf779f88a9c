# SPDX-License-Identifier: Apache-2.0
"""Inputs of the attention benchmark, and their answers in float64 by the plain definition."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

# Largest error admitted, relative to the largest value of the answer: roundings of inputs near 1,
# of probabilities and of results. torch adds up bfloat16 gradients in bfloat16.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
RESULTS = ("out", "dq", "dk", "dv", "dbias")


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape, f"{name} is {actual.shape}, not {expected.shape}"
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    limit = TOLERANCES[actual.dtype]
    assert error <= limit, f"{name} is off by {error:.2g} of its largest value, more than {limit}"


def visible(queries: torch.Tensor, keys: int, causal: bool, window: int | None) -> torch.Tensor:
    """(queries, keys) bool: which keys the queries at these positions see."""
    distance = queries[:, None] - torch.arange(keys)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    return seen


def plain(q, k, v, seen=None, bias=None) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, the matrix in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


@dataclass
class Problem:
    """(B, H, S, D) inputs, and the answers of the last head and of three rows of every head."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    causal: bool = False
    window: int | None = None
    bias: torch.Tensor | None = None
    last_head: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    out_rows: torch.Tensor | None = None

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [x for x in (self.q, self.k, self.v, self.bias) if x is not None]

    def solve(self, gradients: bool) -> None:
        length = self.k.shape[2]
        limited = self.causal or self.window is not None

        def seen(queries: torch.Tensor) -> torch.Tensor | None:
            return visible(queries, length, self.causal, self.window) if limited else None

        leaves = [x[:, -1:].double().requires_grad_(gradients) for x in self.leaves]
        out = plain(*leaves[:3], seen(torch.arange(length)), *leaves[3:])
        answers = [out.detach()]
        if gradients:
            answers += torch.autograd.grad(out, leaves, self.d_out[:, -1:].double())
        self.last_head = dict(zip(RESULTS, answers, strict=False))

        self.rows = (0, length // 2, length - 1)
        rows = torch.tensor(self.rows)
        bias = None if self.bias is None else self.bias[:, :, rows].double()
        self.out_rows = plain(
            self.q[:, :, rows].double(), self.k.double(), self.v.double(), seen(rows), bias
        )

    def check(self, results: tuple[torch.Tensor, ...]) -> None:
        """results are the output and, where there are more, the gradients to the leaves."""
        assert_close("out at some rows", results[0].detach()[:, :, self.rows], self.out_rows)
        for name, actual in zip(RESULTS, results, strict=False):
            assert_close(f"{name} of the last head", actual.detach()[:, -1:], self.last_head[name])

    def flop(self, gradients: bool) -> float:
        """Two per multiply-add, over the pairs seen: two products, and five in the backward."""
        batch, heads, length, dim = self.q.shape
        pairs = length * length
        if self.window is not None:
            pairs = length * self.window - self.window * (self.window - 1) / 2
        elif self.causal:
            pairs /= 2
        return 4.0 * batch * heads * pairs * dim * (3.5 if gradients else 1)


def random_problem(shape, dtype: torch.dtype, **options) -> Problem:
    generator = torch.Generator().manual_seed(1)
    arrays = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
    return Problem(*arrays, **options)


@dataclass
class Documents:
    """Sequences of several lengths, packed (total, H, D) and padded (N, H, longest, D)."""

    lengths: list[int]
    packed: list[torch.Tensor]  # q, k, v, d_out
    padded: list[torch.Tensor]
    expected: list[torch.Tensor]  # out, dq, dk, dv, packed

    @property
    def bounds(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(itertools.accumulate(self.lengths, initial=0)))

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        rows = [sequence[:, :n] for sequence, n in zip(x, self.lengths, strict=True)]
        return torch.cat(rows, dim=1).transpose(0, 1)

    def check(self, results: tuple[torch.Tensor, ...]) -> None:
        for name, actual, expected in zip(RESULTS, results, self.expected, strict=False):
            packed = actual if actual.dim() == 3 else self.unpad(actual)
            assert_close(name, packed.detach(), expected)

    def flop(self, gradients: bool) -> float:
        _, heads, dim = self.packed[0].shape
        pairs = sum(n * n for n in self.lengths)
        return 4.0 * pairs * heads * dim * (3.5 if gradients else 1)


def random_documents(count: int, longest: int, heads: int, dim: int) -> Documents:
    """Lengths drawn evenly from 1 to `longest`, float32."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    packed = [torch.randn(sum(lengths), heads, dim, generator=generator) for _ in range(4)]
    documents = Documents(lengths, packed, [], [])
    documents.padded = [torch.zeros(count, heads, max(lengths), dim) for _ in packed]
    answers = []
    for number, (begin, end) in enumerate(documents.bounds):
        one = [x[begin:end].transpose(0, 1) for x in packed]
        for padded, rows in zip(documents.padded, one, strict=True):
            padded[number, :, : end - begin] = rows
        *leaves, d_out = [x.double() for x in one]
        leaves = [x.requires_grad_() for x in leaves]
        out = plain(*leaves)
        results = (out.detach(), *torch.autograd.grad(out, leaves, d_out))
        answers.append([x.transpose(0, 1) for x in results])
    documents.expected = [torch.cat(parts) for parts in zip(*answers, strict=True)]
    return documents
