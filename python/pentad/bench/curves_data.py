# SPDX-License-Identifier: Apache-2.0
"""Inputs of the curves that are too large for the ways in which other cases are made and solved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .attention_data import RESULTS, Problem, assert_close, random_problem
from .pq_data import unit

ROWS = 1024  # queries, or vectors, at a time
DIM = 64  # of vectors


class LongProblem(Problem):
    """Causal attention of one head, solved without the matrix of all scores."""

    def solve(self, gradients: bool) -> None:
        q, k, v, d_out = (x[0, 0].double() for x in (self.q, self.k, self.v, self.d_out))
        scale = q.shape[1] ** -0.5
        out, dq, dk, dv = (torch.zeros_like(q) for _ in range(4))
        for first in range(0, len(q), ROWS):
            rows, seen = slice(first, first + ROWS), slice(0, first + ROWS)
            p = (q[rows] * scale) @ k[seen].T
            later = torch.ones_like(p, dtype=torch.bool).triu(1 + first)
            p = p.masked_fill_(later, float("-inf")).softmax(-1)
            out[rows] = p @ v[seen]
            if gradients:
                delta = (out[rows] * d_out[rows]).sum(-1, keepdim=True)
                dv[seen] += p.T @ d_out[rows]
                ds = (d_out[rows] @ v[seen].T).sub_(delta).mul_(p).mul_(scale)
                dq[rows] = ds @ k[seen]
                dk[seen] += ds.T @ q[rows]
        answers = (out, dq, dk, dv) if gradients else (out,)
        self.expected = dict(zip(RESULTS, answers, strict=False))

    def check(self, results) -> None:
        for (name, expected), actual in zip(self.expected.items(), results, strict=True):
            assert_close(name, actual.detach()[0, 0], expected)


def long_problem(length: int, gradients: bool) -> LongProblem:
    made = random_problem((1, 1, length, 64), torch.float32)
    problem = LongProblem(made.q, made.k, made.v, made.d_out, causal=True)
    problem.solve(gradients)
    return problem


@dataclass(frozen=True, eq=False)
class Vectors:
    """vectors (n, 64) in clusters and a query (1, 64), of length one, to search as codes."""

    vectors: np.ndarray
    query: np.ndarray
    bits: int


def random_vectors(rows: int, bits: int) -> Vectors:
    """Drawn in blocks; the vectors of a smaller collection are the first of a larger one."""
    centres = np.random.default_rng(1).standard_normal((1000, DIM), dtype=np.float32)
    spread = ((1 + np.arange(DIM)) ** -0.5).astype(np.float32)
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((DIM, DIM)))[0]
    turn = (spread[:, None] * turn).astype(np.float32)

    def block(number: int, count: int) -> np.ndarray:
        rng = np.random.default_rng([3, number])
        drawn = rng.standard_normal((count, DIM), dtype=np.float32)
        drawn += centres[rng.integers(0, len(centres), count)]
        return unit(drawn @ turn)

    vectors = np.empty((rows, DIM), np.float32)
    size = 1 << 16
    for first in range(0, rows, size):
        vectors[first : first + size] = block(1 + first, size)[: rows - first]
    return Vectors(vectors, block(0, 1), bits)
