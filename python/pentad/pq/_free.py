# SPDX-License-Identifier: Apache-2.0
"""What the indexes share whose codes need no training: a turn at random, and factors of each row.

A vector x is coded as y = R (x - centre), with R a random rotation. The codes choose words w, and a
row keeps two numbers beside them, scale >= 0 and bias; a query q costs

    bias + scale * (T[0][c_0] + T[1][c_1] + ...)      T of the query, see csrc/pq/code_scan.h

and its score is that cost and a constant of the query, rounded to float32: the scan orders by cost,
so rows of one score may stand in the order of costs that rounding made equal.
"""

import numpy as np

from pentad._arrays import like
from pentad._checks import check_choice, check_count
from pentad._errors import FormatError
from pentad._index import Flat, Index, SearchResult, check_rising
from pentad._rows import Rows, check_store
from pentad.pq import _exact, _rows, _scan
from pentad.pq.index import _LARGEST, _TABLES, METRICS, Fitted, QuantizedIndex
from pentad.pq.train import random_hadamard

_MOST = 4096  # dimensions


class FreeIndex(QuantizedIndex):
    """The kinds say how a turned vector becomes codes and factors, and what a query costs."""

    _options = ("dim", "metric", "store", "seed")

    def __init__(self, dim, nbits, width, metric, store, seed):
        """Codes of `nbits` bits for every `width` dimensions."""
        op = self._op("__init__")
        self.dim = check_count(op, "dim", dim, 1)
        if self.dim > _MOST:
            raise ValueError(f"[{op}] dim is {dim}, at most {_MOST}")
        check_choice(op, "metric", metric, METRICS)
        check_store(op, store)
        self.seed = check_count(op, "seed", seed)
        self.nbits, self.M = nbits, -(-self.dim // width)
        self.metric, self.store, self.rotation = metric, store, "random_hadamard"
        self._largest = metric != "l2"
        self._turn_by(random_hadamard(self.dim, self.seed))
        self.centre = np.zeros(self.dim, np.float32)
        self.centre.flags.writeable = False
        Index.__init__(self, _rows.CodeLayout(self.dim, self.M, nbits, store, _rows.FACTORS))

    def _turn_by(self, rotation):
        self._trained = Fitted(self._books(), rotation)
        self._turn = _exact.Rotation(rotation)

    def _books(self) -> np.ndarray:
        """(M, 2**nbits, width) float32: the words of the codes."""
        raise NotImplementedError

    def _coded(self, y) -> dict:
        """Codes, code_scale and code_bias of turned vectors."""
        raise NotImplementedError

    def _asked(self, x) -> tuple:
        """(turned queries whose negated products with the words are tables, (nq,) constants)."""
        raise NotImplementedError

    # --- Content ----------------------------------------------------------------------------------

    def train(self, vectors, *, progress=None) -> None:
        """Put the centre at the mean of a sample; without this it is zero. The index must be empty.

        Worth it where vectors share an offset that is long beside their differences.

        Parameters
        ----------
        vectors : (n, dim) float
            At least one.
        progress : callable, optional
            Called with (stage, done, total).
        """
        op, given = self._op("train"), self._input("train", vectors)
        if not len(given):
            raise ValueError(f"[{op}] 0 vectors, at least 1 is needed")
        mean = _exact.summed(given.floats.T.astype(np.float64)) / len(given)
        with self._writing:
            if len(self):
                raise ValueError(f"[{op}] the index already holds {len(self)} rows")
            self.centre = mean.astype(np.float32)
            self.centre.flags.writeable = False
        if progress is not None:
            progress("finding the centre", 1, 1)

    def _rotated(self, x):
        return self._turn(x - self.centre)

    def _padded(self, y):
        width = self.M * self._trained.codebooks.shape[2]
        return np.pad(y, ((0, 0), (0, width - self.dim)))

    def _encoded(self, x) -> dict:
        return self._coded(x)

    def _words(self, at):
        if not len(at):
            return np.zeros((0, self.dim), np.float32)
        rows = self._state.rows
        words = self._trained.codebooks[np.arange(self.M), rows.codes(at)]
        return words.reshape(len(at), -1)[:, : self.dim] * rows.columns["code_scale"][at, None]

    def _decoded(self, at):
        return super()._decoded(at) + self.centre

    # --- Search -----------------------------------------------------------------------------------

    def _once(self, given):
        if not hasattr(given, "asked"):
            given.asked = self._asked(given.floats)
        return given.asked

    def _queries(self, given, nprobe=None):
        books, (y, _) = self._trained.codebooks, self._once(given)
        step = max(1, _TABLES // (books.shape[0] * books.shape[1] * 4))
        for first in range(0, len(given), step):
            part = slice(first, first + step)
            yield part, _scan.tables(np.ascontiguousarray(self._padded(y[part])), books, "ip"), None

    def _as_scores(self, costs, given):
        constant = self._once(given)[1]
        scores = (costs.astype(np.float64) + constant[:, None]).astype(np.float32)
        return scores if self.metric == "l2" else 0 - scores

    def search(self, queries, k, *, filter=None, rescore=None, oversample=4) -> SearchResult:
        """The k best rows of each query; arguments, results and errors as in `PQIndex.search`."""
        return self._view()._search(queries, k, filter, rescore, oversample, None)

    def range_search(self, queries, radius, *, filter=None):
        """Rows of a score up to `radius`, or for inner products of at least that.

        See `PQIndex.range_search`.
        """
        view = self._view()
        given, radius = view._input("range_search", queries, "queries"), view._radius(radius)
        mask, found = view._mask("range_search", filter), []
        constants = view._once(given)[1]
        for part, tables, _ in view._queries(given):
            for table, constant in zip(tables, constants[part], strict=True):
                found.append(view._within(table, constant, radius, mask))
        sizes = [len(ids) for _, ids in found]
        empty = np.zeros(0, np.float32), np.zeros(0, np.int64)
        scores, ids = (np.concatenate(parts) for parts in zip(empty, *found, strict=True))
        indptr = np.cumsum([0, *sizes], dtype=np.int64)
        return tuple(like(queries, part) for part in (indptr, scores, ids))

    def _within(self, table, constant, radius, mask):
        """(scores, ids) of one query: of costs with room for their rounding, those that fit."""
        most = (radius if self.metric == "l2" else -radius) - constant
        most += (abs(radius) + abs(constant)) * 2.0**-22 if np.isfinite(radius) else 0
        _, costs, ids = _rows.range_search(self._state.rows, table[None], most, mask)
        scores = (costs.astype(np.float64) + constant).astype(np.float32)
        if self._largest:
            scores = 0 - scores
        exact = scores.astype(np.float64)  # a radius is a double, and not rounded to meet them
        fits = exact >= radius if self._largest else exact <= radius
        return scores[fits], ids[fits]

    # --- Files ------------------------------------------------------------------------------------

    def to_sections(self):
        """(meta, arrays) for a file that embeds this index; see `from_sections`.

        The arrays are the index's own: an `add` before they are written may change the last block.
        """
        also = {"rotation": self._trained.rotation, "centre": self.centre}
        return self._meta(), self._state.rows.arrays() | also

    @classmethod
    def from_sections(cls, meta: dict, arrays: dict):
        """Rebuild an index from `to_sections`; the arrays are used as they are.

        Raises
        ------
        FormatError
            If they do not fit each other.
        """
        index = cls._made(meta)
        index._state = Flat(Rows.from_arrays(index._layout, arrays, ("rotation", "centre")))
        check_rising(index.ids)
        for name, shape in (("rotation", (index.dim, index.dim)), ("centre", (index.dim,))):
            part = arrays.get(name)
            if part is None or part.shape != shape or part.dtype != np.float32:
                raise FormatError(f"section {name} does not fit the index")
            if not (np.abs(part) <= _LARGEST).all():
                raise FormatError(f"section {name} does not fit the index")
        index._check_rows()
        index._turn_by(arrays["rotation"])
        index.centre = arrays["centre"]
        return index


def as_constants(x: np.ndarray) -> np.ndarray:
    """(n,) doubles that are float32 numbers: what a score adds to a cost."""
    return x.astype(np.float32).astype(np.float64)


__all__ = ["FreeIndex", "as_constants"]
