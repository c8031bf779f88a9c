# SPDX-License-Identifier: Apache-2.0
"""Inputs of the curves that are too large for the ways in which other cases are made and solved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .attention_data import RESULTS, Problem, assert_close, random_problem
from .pq_data import unit

DIM = 64  # of vectors
# Of causal attention one in so many queries is solved: some of every tile of any kernel.
APART = 61
ROWS = 128  # of these at a time


class LongProblem(Problem):
    """Causal attention of one head. The gradient of the result is zero but at the queries that are
    solved, so that all gradients are known though few rows of the matrix are.
    """

    def solve(self, gradients: bool) -> None:
        length = self.q.shape[2]
        self.rows = tuple(range(length - 1, -1, -APART))[::-1]
        seeds = torch.zeros_like(self.d_out)
        seeds[:, :, self.rows] = self.d_out[:, :, self.rows]
        self.d_out = seeds
        q, k, v, d_out = (x[0, 0].double() for x in (self.q, self.k, self.v, self.d_out))
        scale = q.shape[1] ** -0.5
        out, dq, dk, dv = (torch.zeros_like(q) for _ in range(4))
        for some in torch.tensor(self.rows).split(ROWS):
            seen = slice(0, int(some[-1]) + 1)
            scores = (q[some] * scale) @ k[seen].T
            later = torch.arange(seen.stop) > some[:, None]
            p = scores.masked_fill_(later, float("-inf")).softmax(-1)
            out[some] = p @ v[seen]
            if gradients:
                delta = (out[some] * d_out[some]).sum(-1, keepdim=True)
                dv[seen] += p.T @ d_out[some]
                ds = (d_out[some] @ v[seen].T).sub_(delta).mul_(p).mul_(scale)
                dq[some] = ds @ k[seen]
                dk[seen] += ds.T @ q[some]
        self.out_rows = out[list(self.rows)]
        self.gradients = (dq, dk, dv) if gradients else ()

    def check(self, results) -> None:
        out, *gradients = (x.detach()[0, 0] for x in results)
        assert_close(RESULTS[0], out[list(self.rows)], self.out_rows)
        names = RESULTS[1 : 1 + len(self.gradients)]
        for name, actual, expected in zip(names, gradients, self.gradients, strict=True):
            assert_close(name, actual, expected)


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
