# SPDX-License-Identifier: Apache-2.0
"""Approximate search over binary codes: an inverted file of lists around trained centroids."""

import numpy as np

from pentad._arrays import like
from pentad._checks import check_count
from pentad._errors import FormatError
from pentad._index import SearchResult
from pentad._lists import InvertedIndex
from pentad.hamming import _rows, functional, hyperdimensional
from pentad.hamming.index import CodeIndex

_ITERATIONS = 10


class BinaryIVFIndex(CodeIndex, InvertedIndex):
    """Search in the `nprobe` lists whose centroids are nearest to the query.

    Parameters
    ----------
    dim : int
        Bits per code.
    lists : int
        About the square root of the number of rows is a fair start.
    metric : {"hamming", "jaccard", "and"}
        Within the lists; centroids are compared by Hamming distance.
    store : {None, "int8", "float16"}
        As in `BinaryIndex`.
    nprobe : int
        Lists visited per query; an attribute that may be set. ``nprobe = lists`` is exact.

    Notes
    -----
    Centroids are codes, trained by k-majority: Lloyd's iteration with the bitwise majority as the
    mean, which is the point of least total Hamming distance (Grana et al. 2013, "A fast approach
    for integrating ORB descriptors in the bag of words model"). Rows stand list by list, each list
    on a block border, in the order of ids. Every change rebuilds the lists, so add in large
    batches.

    Examples
    --------
    >>> import numpy as np
    >>> vectors = np.random.default_rng(0).standard_normal((1000, 64), np.float32)
    >>> index = pentad.hamming.BinaryIVFIndex(64, lists=16, nprobe=4)
    >>> index.train(vectors)
    >>> index.add(vectors)
    >>> index.search(vectors[:2], k=1).ids
    array([[0],
           [1]])
    """

    _kind = "hamming.BinaryIVFIndex"
    _options = ("dim", "lists", "metric", "store", "nprobe")

    def __init__(
        self, dim: int, lists: int, *, metric: str = "hamming", store=None, nprobe: int = 8
    ):
        CodeIndex.__init__(self, dim, metric=metric, store=store)
        self._begin_lists(lists, nprobe)
        self.centroids = None

    # --- Training ---------------------------------------------------------------------------------

    def train(
        self, vectors_or_codes, *, seed: int = 0, iterations: int = _ITERATIONS, progress=None
    ) -> None:
        """Fit the centroids to a sample of the rows to come. The index must be empty.

        Parameters
        ----------
        vectors_or_codes : (n, dim) float or (n, ceil(dim / 8)) uint8
            At least as many as there are lists.
        seed : int
            The result depends on this and the rows alone.
        iterations : int
        progress : callable, optional
            Called with (stage, done, total).

        Raises
        ------
        ValueError, TypeError
            The index is unchanged.
        """
        op = self._op("train")
        codes = self._input("train", vectors_or_codes).codes
        iterations = check_count(op, "iterations", iterations)
        if len(codes) < self.lists:
            raise ValueError(f"[{op}] {len(codes)} rows for {self.lists} lists")
        with self._writing:
            if len(self):
                raise ValueError(f"[{op}] the index already holds {len(self)} rows")
            self.centroids = k_majority(codes, self.dim, self.lists, seed, iterations, progress)

    def _ready(self, name):
        if self.centroids is None:
            raise ValueError(f"[{self._op(name)}] the index is not trained; call train() first")

    def _content(self, given):
        nearest = functional.topk(given.codes, self.centroids, 1)[1][:, 0]
        return super()._content(given) | {"list": nearest}

    # --- Search -----------------------------------------------------------------------------------

    def search(self, queries, k, *, filter=None, rescore=None, oversample=4, nprobe=None):
        """The k best rows of the visited lists; arguments as in `BinaryIndex.search`.

        `nprobe` overrides the attribute for this call.
        """
        view = self._view()
        view._ready("search")
        given = view._input("search", queries, "queries")
        ranges = view._ranges(given.codes, view._probes("search", nprobe))
        mask = view._mask("search", filter)
        found = view._search(given, k, mask, rescore, oversample, ranges)
        return SearchResult(*(like(queries, part) for part in found))

    def range_search(self, queries, radius, *, filter=None, nprobe=None):
        """Rows of the visited lists within `radius`, inclusive: (indptr, scores, ids)."""
        view = self._view()
        view._ready("range_search")
        given = view._input("range_search", queries, "queries")
        radius = view._radius(radius)
        ranges = view._ranges(given.codes, view._probes("range_search", nprobe))
        mask = view._mask("range_search", filter)
        rows = view._state.rows
        found = _rows.range_search(rows, given.codes, radius, mask, ranges=ranges)
        return tuple(like(queries, part) for part in found)

    def _on_device(self, device):
        from pentad.hamming.device_index import DeviceBinaryIVFIndex

        self._ready("to")
        return DeviceBinaryIVFIndex(self, device)

    def _ranges(self, codes, nprobe):
        return self._state.ranges(functional.topk(codes, self.centroids, nprobe)[1])

    # --- Files ------------------------------------------------------------------------------------

    def to_sections(self):
        """(meta, arrays) for a file that embeds this index; see `from_sections`."""
        trained = {} if self.centroids is None else {"centroids": self.centroids}
        return self._meta(), self._list_arrays() | trained

    @classmethod
    def from_sections(cls, meta: dict, arrays: dict) -> "BinaryIVFIndex":
        """Rebuild an index from `to_sections`; raises FormatError where the parts do not fit."""
        sizes, centroids = cls._check_sizes(meta, arrays), arrays.get("centroids")
        index = cls._made(meta)
        shape = (index.lists, -(-index.dim // 8))
        if (
            sizes.any()
            if centroids is None
            else centroids.shape != shape or centroids.dtype != np.uint8
        ):
            raise FormatError("the centroids of the index are malformed")
        index.centroids = centroids
        index._restore(arrays, sizes, also=("centroids",))
        return index


def k_majority(codes, dim, count, seed=0, iterations=_ITERATIONS, progress=None):
    """`count` centroid codes of (n, bytes) codes by Lloyd's iteration in Hamming space.

    An empty cluster takes over the code that lies farthest from its centroid.
    """
    rng = np.random.default_rng(seed)
    centroids = codes[np.sort(rng.choice(len(codes), count, replace=False))]
    for done in range(iterations):
        if progress is not None:
            progress("lists", done, iterations)
        distances, nearest = (part[:, 0] for part in functional.topk(codes, centroids, 1))
        order = np.argsort(nearest, kind="stable")
        borders = np.searchsorted(nearest[order], np.arange(count + 1))
        fresh = centroids.copy()
        farthest = iter(np.argsort(-distances, kind="stable"))
        for c in range(count):
            members = order[borders[c] : borders[c + 1]]
            fresh[c] = (
                hyperdimensional.bundle(codes[members], dim)
                if len(members)
                else codes[next(farthest)]
            )
        if (fresh == centroids).all():
            break
        centroids = fresh
    if progress is not None:
        progress("lists", iterations, iterations)
    return np.ascontiguousarray(centroids)


__all__ = ["BinaryIVFIndex", "SearchResult", "k_majority"]
