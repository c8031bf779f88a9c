# SPDX-License-Identifier: Apache-2.0
"""Vectors to search, what a search in them should find, and what it must find by definition.

All vectors have 128 dimensions and length one, so that squared distance, inner product and cosine
agree on the order.

- "random": Gaussian clusters whose variances fall off as those of embeddings do.
- "real": the passages of the installed documentation as `pentad.docsearch` encodes them (512
  dimensions), cut to their first 128 principal components. Queries are passages held out.
- "copies": a million of the same, each passage with copies of itself that differ by noise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np

from .machine import cache_folder

DIM = 128
QUERIES = 256
TRAINING = 65_536  # what a search's codebooks are trained on
K = 10
# Scores of two kernels differ by rounding, and equal docstrings have equal scores.
TIE = 1e-6


@dataclass(frozen=True, eq=False)
class Data:
    """vectors (n, 128) and queries (256, 128) float32 of length one.

    best : (256,) the inner product of each query with its tenth nearest vector
    """

    name: str
    vectors: np.ndarray
    queries: np.ndarray
    best: np.ndarray

    @property
    def training(self) -> np.ndarray:
        return self.vectors[:TRAINING]

    def recall(self, ids: np.ndarray) -> float:
        """The share of `ids` (256, 10) that are among the ten nearest of their query."""
        ids = np.asarray(ids, dtype=np.int64)
        assert ids.shape == (len(self.queries), K)
        products = np.einsum("qd,qkd->qk", self.queries, self.vectors[np.maximum(ids, 0)])
        found = (products >= self.best[:, None] - TIE) & (ids >= 0)
        return float(found.mean())


def unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.ascontiguousarray(x / np.where(length > 0, length, 1), dtype=np.float32)


def with_best(name: str, vectors: np.ndarray, queries: np.ndarray) -> Data:
    best = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(vectors), 1 << 16):
        products = queries @ vectors[start : start + (1 << 16)].T
        best = np.concatenate([best, products], axis=1)
        best = -np.partition(-best, K - 1, axis=1)[:, :K]
    return Data(name, vectors, queries, best.min(axis=1))


@cache
def random_data(rows: int) -> Data:
    rng = np.random.default_rng(1)
    spread = ((1 + np.arange(DIM)) ** -0.5).astype(np.float32)
    turn = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)
    centres = rng.standard_normal((1000, DIM), dtype=np.float32)
    vectors = rng.standard_normal((rows + QUERIES, DIM), dtype=np.float32)
    vectors += centres[rng.integers(0, len(centres), len(vectors))]
    vectors = unit((vectors * spread) @ turn)
    return with_best("random", vectors[QUERIES:], vectors[:QUERIES])


@cache
def passages(quick: bool) -> np.ndarray:
    """The principal components of the passages, shuffled; kept: they take a minute."""
    from pentad.docsearch import corpus, encoders, installed

    state = hashlib.sha256(installed.fingerprint().encode()).hexdigest()[:16]
    path = cache_folder() / f"passages-{state}.npy"
    if not quick and path.exists():
        return np.load(path)
    sources = corpus.sources()
    if quick:
        sources = corpus.restrict(sources, ["numpy", "json"])
    vectors = encoders.LsaEncoder.fit(corpus.read(sources).passages)[1]
    _, directions = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)
    vectors = unit(vectors @ directions[:, ::-1][:, :DIM])
    vectors = np.random.default_rng(2).permutation(vectors[vectors.any(axis=1)])
    if not quick:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors)
    return vectors


@cache
def real_data(quick: bool) -> Data:
    vectors = passages(quick)
    return with_best("real", vectors[QUERIES:], vectors[:QUERIES])


@cache
def copied_data(quick: bool, rows: int) -> Data:
    """Noise of half the length of a vector: a copy is nearly as far as the next passages are."""
    vectors, rng = passages(quick)[QUERIES:], np.random.default_rng(3)
    copies = vectors[rng.permutation(np.arange(rows) % len(vectors))]
    noise = rng.standard_normal((rows, DIM), dtype=np.float32) * vectors.std(axis=0)
    copies += 0.5 * noise / np.linalg.norm(vectors.std(axis=0))
    return with_best("copies", unit(copies), passages(quick)[:QUERIES])


def definition(query: np.ndarray, codebooks: np.ndarray, codes: np.ndarray, k: int):
    """(costs, ids) of the k rows of least (cost, id): sums of table entries in their order."""
    costs = np.zeros(len(codes), np.float32)
    for part, book, code in zip(
        query.reshape(len(codebooks), -1).astype(np.float64), codebooks, codes.T, strict=True
    ):
        terms = (part - book) ** 2
        costs += np.add.accumulate(terms, axis=1)[:, -1].astype(np.float32)[code]
    near = np.flatnonzero(costs <= np.partition(costs, k - 1)[k - 1])
    order = near[np.lexsort((near, costs[near]))][:k]
    return costs[order], order


def distortion(x: np.ndarray, codebooks: np.ndarray, rows: int = 2048) -> float:
    """The mean squared error of the nearest centroids, by matrix products."""
    total = 0.0
    for part, book in zip(np.split(x, len(codebooks), axis=1), codebooks, strict=True):
        squares = (book.astype(np.float64) ** 2).sum(axis=1)
        for start in range(0, len(part), rows):
            some = part[start : start + rows].astype(np.float64)
            costs = squares - 2 * (some @ book.T.astype(np.float64))
            total += (costs.min(axis=1) + (some * some).sum(axis=1)).sum()
    return total / len(x)
