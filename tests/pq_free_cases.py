# SPDX-License-Identifier: Apache-2.0
"""What ScalarIndex and RaBitQIndex must answer, in plain numpy, by the equations alone."""

import numpy as np
from pq_index_cases import best, in_order

from pentad._rows import quantize
from pentad.pq import RaBitQIndex, ScalarIndex, _exact

CLASSES = (ScalarIndex, RaBitQIndex)
KINDS = ("scalar 8", "scalar 4", "rabitq")


def make(kind, dim, **options):
    name, *bits = kind.split()
    if name == "rabitq":
        return RaBitQIndex(dim, **options)
    return ScalarIndex(dim, int(bits[0]), **options)


class Model:
    """Words, costs and scores of some vectors under an index's rotation and centre."""

    def __init__(self, index, vectors, ids=None):
        self.index, self.metric = index, index.metric
        self.turn, self.centre = index.rotation_matrix, index.centre
        self.ids = np.arange(len(vectors)) if ids is None else np.asarray(ids, np.int64)
        self.given = self.normal(np.asarray(vectors, np.float32).reshape(-1, index.dim))
        y = self.turned(self.given - self.centre).astype(np.float64)
        code = self.signs if isinstance(index, RaBitQIndex) else self.levels
        self.codes, self.words, self.scale, self.bias = code(y)

    def normal(self, x):
        return _exact.normalized(x) if self.metric == "cosine" else x

    def turned(self, x):
        return in_order(x[:, None].astype(np.float64) * self.turn).astype(np.float32) + 0

    def levels(self, y):
        """The nearest of 2**nbits even levels up to the largest component; least squares scale."""
        half = (2**self.index.nbits - 1) / 2
        step = np.abs(y).max(axis=1, initial=0)[:, None] / half
        with np.errstate(invalid="ignore"):
            codes = np.rint(np.where(step > 0, y / step, 0) + half).astype(np.uint8)
        words = codes - half
        squares = in_order(words * words)
        scale = (in_order(y * words) / squares).astype(np.float32)
        bias = scale.astype(np.float64) ** 2 * squares if self.metric == "l2" else 0 * squares
        return codes, words, scale, bias.astype(np.float32)

    def signs(self, y):
        """|y|^2 / sum |y| for the scale; four signs in a code."""
        words = np.where(y >= 0, 1.0, -1.0)
        M = self.index.M
        bits = np.ones((len(y), 4 * M), np.int64)
        bits[:, : y.shape[1]] = words > 0
        codes = (bits.reshape(-1, M, 4) * [1, 2, 4, 8]).sum(2).astype(np.uint8)
        squares, total = in_order(y * y), in_order(np.abs(y))
        with np.errstate(invalid="ignore"):
            scale = np.where(total > 0, squares / total, 0).astype(np.float32)
        bias = squares
        if self.metric != "l2":
            bias = -in_order(y * self.turned(self.centre[None]).astype(np.float64))
        return codes, words, scale, bias.astype(np.float32)

    def costs(self, queries):
        """(costs (nq, n) float32, constants (nq,) float32) of each query."""
        q = self.normal(np.asarray(queries, np.float32))
        l2, plain = self.metric == "l2", isinstance(self.index, ScalarIndex)
        y = self.turned(q if plain and not l2 else q - self.centre)
        if l2:
            constant = in_order(y.astype(np.float64) ** 2)
        else:
            constant = -in_order(q.astype(np.float64) * self.centre)
        width = 1 if plain else 4
        terms = y[:, None].astype(np.float64) * self.words * (-2 if l2 else -1)
        terms = np.pad(terms, ((0, 0), (0, 0), (0, -terms.shape[2] % width)))
        tables = in_order(terms.reshape(*terms.shape[:2], self.index.M, width)).astype(np.float32)
        total = np.zeros(tables.shape[:2], np.float32)
        for m in range(tables.shape[2]):
            total += tables[:, :, m]
        return self.bias + self.scale * total + np.float32(0), constant.astype(np.float32)

    def scores(self, costs, constant):
        total = (costs.astype(np.float64) + constant[:, None]).astype(np.float32)
        return total if self.metric == "l2" else 0 - total

    def search(self, queries, k, keep=None):
        costs, constant = self.costs(queries)
        found, ids = best(costs, self.ids, k, keep)
        return self.scores(found, constant), ids

    def range_search(self, queries, radius, keep=None):
        scores = self.scores(*self.costs(queries)).astype(np.float64)
        near = scores <= radius if self.metric == "l2" else scores >= radius
        near &= np.broadcast_to(True if keep is None else keep, near.shape)
        order = np.argsort(self.ids)
        parts = [order[row[order]] for row in near]
        found = np.concatenate([np.zeros(0, np.int64), *parts])
        query = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        values = scores[query, found].astype(np.float32)
        return np.cumsum([0, *map(len, parts)]), values, self.ids[found]

    def decoded(self):
        """(n, dim) the vectors that the codes stand for."""
        return (self.words * self.scale[:, None]) @ self.turn.astype(np.float64) + self.centre

    def stored(self):
        kept = quantize(self.given, self.index.store)
        vectors = kept["vectors"].astype(np.float32)
        return vectors * kept["scale"][:, None] if "scale" in kept else vectors

    def rescored(self, queries, k, candidates, keep=None):
        """The k best of the `candidates` first by codes, by their stored vectors."""
        q, v = self.normal(np.asarray(queries, np.float32))[:, None], self.stored()[None]
        if self.metric == "l2":
            costs = in_order((q.astype(np.float64) - v) ** 2).astype(np.float32)
        else:
            costs = -in_order(q.astype(np.float64) * v).astype(np.float32)
        first = self.search(queries, candidates, keep)[1]
        among = np.array([np.isin(self.ids, row) for row in first]).reshape(len(first), -1)
        costs, ids = best(costs, self.ids, k, among)
        return (costs if self.metric == "l2" else 0 - costs), ids
