# SPDX-License-Identifier: Apache-2.0
"""What the tests of the product-quantized indexes share: making them, and what they must answer.

`Model` says in plain numpy what an index of some vectors answers: codes by the least double
distance, costs by `pentad.pq.scan_reference`, order by (cost, id).
"""

import numpy as np

from pentad._rows import quantize
from pentad.pq import scan_reference
from pentad.pq.index import Fitted, PQIndex
from pentad.pq.ivf import IVFPQIndex

STORES = (None, "int8", "float16")
METRICS = ("l2", "ip", "cosine")
CLASSES = (PQIndex, IVFPQIndex)
LISTS = 5


def trained(rng, cls, dim, M, nbits, rotation=False, lists=LISTS, spread=None, metric="l2"):
    """Codebooks as training gives them, but drawn at random; whole numbers where spread is None."""

    def draw(*shape):
        if spread is None:
            return rng.integers(-3, 4, shape).astype(np.float32)
        return (rng.standard_normal(shape) * spread).astype(np.float32)

    turn = None
    if rotation:
        turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    fitted = Fitted(draw(M, 2**nbits, dim // M), turn)
    if cls is not IVFPQIndex:
        return fitted
    wide = None if metric == "l2" else abs(draw(lists))
    return fitted._replace(centroids=draw(lists, dim), spread=wide)


def make(cls, dim, M=None, nbits=4, *, rng=None, rotation=False, lists=LISTS, spread=1, **options):
    """An empty index that is as if trained, exhaustive where it is an inverted one."""
    rng = rng or np.random.default_rng(5)
    M = M or max(m for m in (1, 2, 3, 4, 5) if dim % m == 0)
    if cls is IVFPQIndex:
        options = {"lists": lists, "nprobe": lists} | options
    index = cls(dim, M, nbits, rotation="opq" if rotation else None, **options)
    index._trained = trained(rng, cls, dim, M, nbits, rotation, lists, spread, index.metric)
    return index


def whole_vectors(rng, n, dim, ties=False):
    """Vectors that int8 and float16 keep exactly: integers with 127 as the largest."""
    vectors = rng.integers(-5, 6, (n, dim)).astype(np.float32)
    vectors[:, 0] = np.where(rng.random(n) < 0.5, 127, -127)
    return vectors[rng.integers(0, min(n, 2), n)] if ties and n else vectors


def in_order(terms):
    """Sums over the last axis, one term after the other."""
    total = np.zeros(terms.shape[:-1])
    for j in range(terms.shape[-1]):
        total = total + terms[..., j]
    return total


def in_eights(terms):
    """Sums of the columns 0, 1, ... 7 mod 8 in order, then of these: csrc/pq/rescore.h."""
    terms = np.pad(terms, [(0, 0)] * (terms.ndim - 1) + [(0, -terms.shape[-1] % 8)])
    return in_order(
        in_order(np.moveaxis(terms.reshape(*terms.shape[:-1], terms.shape[-1] // 8, 8), -2, -1))
    )


def best(costs, ids, k, keep=None):
    """(costs, ids): the k least (cost, id) of each query; `keep` is (n,) or (nq, n)."""
    values = np.full((len(costs), k), np.inf, np.float32)
    found = np.full((len(costs), k), -1, np.int64)
    for q, row in enumerate(costs):
        allowed = np.flatnonzero(np.broadcast_to(True if keep is None else keep, costs.shape)[q])
        order = allowed[np.lexsort((ids[allowed], row[allowed]))][:k]
        values[q, : len(order)], found[q, : len(order)] = row[order], ids[order]
    return values, found


class Model:
    def __init__(self, index, vectors, ids=None):
        self.index, self.metric = index, index.metric
        self.books, self.turn, self.centroids, self.spread = index._trained
        self.ids = np.arange(len(vectors)) if ids is None else np.asarray(ids, np.int64)
        self.given = self.normal(np.asarray(vectors, np.float32).reshape(-1, index.dim))
        x = self.turned(self.given)
        self.home = None
        if self.centroids is not None:
            c = index.coarse_dims
            self.home = self.squares(x[:, None, :c], self.centroids[None, :, :c]).argmin(1)
            if index.residual:
                x = x - self.centroids[self.home]
        parts = np.split(x[:, None], index.M, axis=2)
        nearest = [
            self.squares(part, book[None]).argmin(1)
            for part, book in zip(parts, self.books, strict=True)
        ]
        self.codes = np.stack(nearest, axis=1).astype(np.uint8)

    @staticmethod
    def squares(a, b):
        return in_order((a.astype(np.float64) - b) ** 2)

    def normal(self, x):
        if self.metric != "cosine":
            return x
        length = np.sqrt(in_order(x.astype(np.float64) ** 2))[:, None]
        return (x / np.where(length > 0, length, 1)).astype(np.float32)

    def turned(self, x):
        if self.turn is None:
            return x
        return in_order(x[:, None].astype(np.float64) * self.turn).astype(np.float32)

    def costs(self, queries, dims=None):
        """(nq, n), of every row."""
        index, dims = self.index, dims or self.index.dim
        q = self.turned(self.normal(queries))[:, :dims]
        books, metric = self.books[: dims // index.dsub], "l2" if self.metric == "l2" else "ip"
        if self.centroids is None or not index.residual:
            return scan_reference.costs(scan_reference.tables(q, books, metric), self.codes)
        costs = np.zeros((len(q), len(self.codes)), np.float32)
        for c in range(len(self.centroids)):
            rows, centroid = self.home == c, self.centroids[c, :dims]
            offset = factors = None
            if metric == "l2" and dims < index.dim:
                tables = scan_reference.tables(q - centroid, books, "l2")
            elif metric == "l2":  # |q - c - r|^2 as the squares of its parts
                tables = 2 * scan_reference.tables(q, books, "ip")
                offset = self.squares(q, centroid[None]).astype(np.float32)
                words = books[np.arange(index.M), self.codes[rows]].reshape(-1, dims)
                words = words.astype(np.float64)
                factors = None, in_order(words * (words + 2.0 * centroid)).astype(np.float32)
            else:
                tables = scan_reference.tables(q, books, "ip")
                offset = self.offsets(q, dims)[:, c]
            costs[:, rows] = scan_reference.costs(tables, self.codes[rows], offset, factors)
        return costs

    def far(self, q):
        """(costs, what is far) of the lists for (nq, used) `q` in metrics of inner products."""
        length = np.sqrt(in_order(q.astype(np.float64) ** 2).astype(np.float32))
        reach = np.float32(4.0) * length[:, None]
        products = in_order(q.astype(np.float64)[:, None] * self.centroids[:, : q.shape[1]])
        return -(products + reach.astype(np.float64) * self.spread), reach * self.spread

    def offsets(self, q, dims):
        """(nq, lists) float32: minus the products with the centroids."""
        used = min(dims, self.index.coarse_dims or self.index.dim)
        if used < dims:
            return -in_order(q.astype(np.float64)[:, None] * self.centroids[:, :dims]).astype(
                np.float32
            )
        far, reach = self.far(q)
        return far.astype(np.float32) + reach

    def visited(self, queries, nprobe, dims=None):
        """(nq, n): the rows in the nprobe lists that are best for a query."""
        used = min(dims or self.index.dim, self.index.coarse_dims or self.index.dim)
        q, centroids = self.turned(self.normal(queries))[:, None, :used], self.centroids[:, :used]
        far = self.squares(q, centroids[None]) if self.metric == "l2" else self.far(q[:, 0])[0]
        lists = np.argsort(far, axis=1, kind="stable")[:, :nprobe]
        return (self.home[None, :, None] == lists[:, None, :]).any(2)

    def scores(self, costs):
        return costs if self.metric == "l2" else 0 - costs

    def search(self, queries, k, keep=None, dims=None):
        costs, found = best(self.costs(queries, dims), self.ids, k, keep)
        return self.scores(costs), found

    def range_search(self, queries, radius, keep=None, dims=None):
        scores = self.scores(self.costs(queries, dims)).astype(np.float64)
        near = scores <= radius if self.metric == "l2" else scores >= radius
        near &= np.broadcast_to(True if keep is None else keep, near.shape)
        order = np.argsort(self.ids)
        parts = [order[row[order]] for row in near]
        found = np.concatenate([np.zeros(0, np.int64), *parts])
        query = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        values = scores[query, found].astype(np.float32)
        return np.cumsum([0, *map(len, parts)]), values, self.ids[found]

    def stored(self):
        """(n, dim) what the index keeps of the vectors."""
        kept = quantize(self.given, self.index.store)
        vectors = kept["vectors"].astype(np.float32)
        return vectors * kept["scale"][:, None] if "scale" in kept else vectors

    def rescored(self, queries, k, candidates=None, keep=None):
        """The k best of the `candidates` first by codes (all where None) by stored vectors."""
        queries = self.normal(queries)
        v = self.stored()[None, :, : queries.shape[1]]
        if self.metric == "l2":
            costs = in_eights((queries[:, None].astype(np.float64) - v) ** 2).astype(np.float32)
        else:
            costs = -in_eights(queries[:, None].astype(np.float64) * v).astype(np.float32)
        costs, found = best(costs, self.ids, k, self.among(queries, candidates, keep))
        return self.scores(costs), found

    def among(self, queries, candidates, keep):
        if candidates is None:
            return keep
        dims = queries.shape[1]
        first = best(self.costs(queries, dims), self.ids, candidates, keep)[1]
        return np.array([np.isin(self.ids, row) for row in first]).reshape(len(first), -1)
