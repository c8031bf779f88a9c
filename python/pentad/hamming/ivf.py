# SPDX-License-Identifier: Apache-2.0
"""Approximate search over binary codes: an inverted file of lists around trained centroids."""

import numpy as np

from pentad._arrays import like, to_numpy
from pentad._errors import FormatError
from pentad._index import SearchResult, check_ids, present_ids
from pentad.hamming import functional, hyperdimensional
from pentad.hamming._rows import BLOCK, Rows, padded, quantize
from pentad.hamming.index import CodeIndex, _reconstruct, _with_count

_ITERATIONS = 10


class BinaryIVFIndex(CodeIndex):
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

    def __init__(
        self, dim: int, lists: int, *, metric: str = "hamming", store=None, nprobe: int = 8
    ):
        super().__init__(dim, metric=metric, store=store)
        self.lists = functional.check_count(self._op("__init__"), "lists", lists, 1)
        self.nprobe = nprobe
        self.centroids = None
        self._lists = _Lists.empty(self)

    @property
    def nprobe(self) -> int:
        return self._nprobe

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        self._nprobe = functional.check_count(self._op("nprobe"), "nprobe", value, 1)

    # --- Training ---------------------------------------------------------------------------------

    def train(self, vectors_or_codes, *, seed: int = 0, iterations: int = _ITERATIONS) -> None:
        """Fit the centroids to a sample of at least `lists` rows.

        Deterministic for a given seed. The index must be empty.
        """
        op = self._op("train")
        codes = self._input("train", vectors_or_codes, finite=False).codes
        if len(codes) < self.lists:
            raise ValueError(f"[{op}] {len(codes)} rows for {self.lists} lists")
        with self._writing:
            if len(self):
                raise ValueError(f"[{op}] the index already holds {len(self)} rows")
            self.centroids = k_majority(codes, self.dim, self.lists, seed, iterations)

    def _trained(self, name):
        if self.centroids is None:
            raise ValueError(f"[{self._op(name)}] the index is not trained; call train() first")

    # --- Content ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._lists.sorted_ids)

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64, rising, read-only."""
        return self._lists.sorted_ids

    def add(self, vectors_or_codes, ids=None) -> None:
        """Add rows; arguments and errors as in `BinaryIndex.add`."""
        self._trained("add")
        given = self._input("add", vectors_or_codes, finite=self.store is not None)
        vectors, scale = quantize(given.floats, self.store)
        with self._writing:
            new = self._new_ids("add", ids, len(given.codes), self._lists.sorted_ids)
            self._lists = self._lists.with_rows(self, (given.codes, new, vectors, scale))

    def remove(self, ids) -> int:
        """Remove rows by id; unknown ids are passed over. Returns how many were removed."""
        with self._writing:
            lists = self._lists
            gone = lists.positions(check_ids(self._op("remove"), _plain(ids)))
            gone = gone[gone >= 0]
            if len(gone):
                keep = np.setdiff1d(lists.filled, gone, assume_unique=True)
                self._lists = lists.rebuilt(self, lists.rows.content(keep), lists.assigned(keep))
            return len(gone)

    def update(self, ids, vectors_or_codes) -> None:
        """Replace the rows of `ids`, which must be present."""
        op = self._op("update")
        self._trained("update")
        given = self._input("update", vectors_or_codes, finite=self.store is not None)
        ids = check_ids(op, _plain(ids), len(given.codes))
        content = (given.codes, ids, *quantize(given.floats, self.store))
        with self._writing:
            lists = self._lists
            at = self._known("update", lists, ids)
            keep = np.setdiff1d(lists.filled, at, assume_unique=True)
            kept = lists.rebuilt(self, lists.rows.content(keep), lists.assigned(keep))
            self._lists = kept.with_rows(self, content)

    def reconstruct(self, ids) -> np.ndarray:
        """What the index holds of `ids`: (n, dim) float32 of stored vectors, else of +-1.

        An id may be given more than once.
        """
        lists = self._lists
        ids = check_ids(self._op("reconstruct"), _plain(ids), unique=False)
        at = self._known("reconstruct", lists, ids)
        return _reconstruct(lists.rows, at, self.dim)

    def _known(self, name, lists, ids):
        at = lists.positions(ids)
        if (at < 0).any():
            raise ValueError(f"[{self._op(name)}] id {ids[at < 0][0]} is not in the index")
        return at

    # --- Search -----------------------------------------------------------------------------------

    def search(self, queries, k, *, filter=None, rescore=None, oversample=4, nprobe=None):
        """The k best rows of the visited lists; arguments as in `BinaryIndex.search`.

        `nprobe` overrides the attribute for this call.
        """
        self._trained("search")
        lists = self._lists
        given = self._input("search", queries, "queries")
        ranges = lists.ranges(given.codes, self._probes("search", nprobe), self.centroids)
        mask = self._filter_mask("search", lists, filter)
        found = self._search(lists.rows, given, k, mask, rescore, oversample, lists, ranges)
        return SearchResult(*(like(queries, part) for part in found))

    def range_search(self, queries, radius, *, filter=None, nprobe=None):
        """Rows of the visited lists within `radius`, inclusive: (indptr, values, ids)."""
        self._trained("range_search")
        lists = self._lists
        given = self._input("range_search", queries, "queries")
        radius = float(radius)
        if np.isnan(radius):
            raise ValueError(f"[{self._op('range_search')}] radius is NaN")
        ranges = lists.ranges(given.codes, self._probes("range_search", nprobe), self.centroids)
        mask = self._filter_mask("range_search", lists, filter)
        found = lists.rows.range_search(given.codes, radius, self.metric, mask, ranges=ranges)
        return tuple(like(queries, part) for part in found)

    def _locate(self, ids):
        lists = self._lists
        return lists.rows, lists.positions(ids)

    def _probes(self, name, nprobe):
        value = self.nprobe if nprobe is None else nprobe
        return min(functional.check_count(self._op(name), "nprobe", value, 1), self.lists)

    def _filter_mask(self, name, lists, keep):
        if keep is None:
            return None
        keep = np.asarray(_plain(keep))
        mask = np.zeros(lists.rows.count, np.bool_)
        if keep.dtype == np.bool_:
            if keep.shape != (len(lists.sorted_ids),):
                raise ValueError(
                    f"[{self._op(name)}] filter has shape {keep.shape}, expected "
                    f"({len(lists.sorted_ids)},)"
                )
            mask[lists.sorted_at[keep]] = True
        else:
            at = lists.positions(check_ids(self._op(name), present_ids(keep)))
            mask[at[at >= 0]] = True
        return mask

    # --- Files ------------------------------------------------------------------------------------

    def to_sections(self):
        """(meta, arrays) for a file that embeds this index; see `from_sections`."""
        meta = {
            "dim": self.dim,
            "lists": self.lists,
            "metric": self.metric,
            "store": self.store,
            "nprobe": self.nprobe,
        }
        arrays = self._lists.rows.arrays() | {"sizes": self._lists.sizes}
        if self.centroids is not None:
            arrays["centroids"] = self.centroids
        return meta, arrays

    @classmethod
    def from_sections(cls, meta: dict, arrays: dict) -> "BinaryIVFIndex":
        """Rebuild an index from `to_sections`; raises FormatError where the parts do not fit."""
        sizes, centroids = arrays.get("sizes"), arrays.get("centroids")
        try:
            if sizes is None or sizes.shape != (meta["lists"],):  # before so many lists are made
                raise FormatError("the lists of the index are malformed")
            index = cls(
                meta["dim"],
                meta["lists"],
                metric=meta["metric"],
                store=meta["store"],
                nprobe=meta["nprobe"],
            )
        except FormatError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the description of the index is malformed: {error!r}") from error
        width = -(-index.dim // 8)
        if (
            sizes.dtype != np.int64
            or (sizes < 0).any()
            or (centroids is not None and centroids.shape != (index.lists, width))
            or (centroids is not None and centroids.dtype != np.uint8)
            or (centroids is None and sizes.any())
        ):
            raise FormatError("the lists of the index are malformed")
        rows = Rows.from_arrays(arrays, index.dim, index.metric, index.store)
        if sum(padded(int(size)) for size in sizes) != rows.count:
            raise FormatError("the lists of the index do not add up to its rows")
        index.centroids = centroids
        index._lists = _Lists(rows, sizes)
        ids = index._lists.sorted_ids
        if (np.diff(ids) <= 0).any() or (ids[:1] < 0).any():
            raise FormatError("the ids of the index are negative or not unique")
        return index


class _Lists:
    """Rows standing list by list: list l fills [start[l], start[l] + sizes[l])."""

    def __init__(self, rows: Rows, sizes: np.ndarray):
        self.rows = rows
        self.sizes = sizes
        self.start = np.concatenate([[0], np.cumsum(-(-sizes // BLOCK) * BLOCK)]).astype(np.int64)
        self.filled = np.concatenate(
            [np.arange(s, s + n) for s, n in zip(self.start, sizes, strict=False)]
            or [np.zeros(0, np.int64)]
        ).astype(np.int64)
        ids = rows.ids[self.filled]
        order = np.argsort(ids, kind="stable")
        self.sorted_ids, self.sorted_at = ids[order], self.filled[order]
        self.sorted_ids.flags.writeable = False

    @classmethod
    def empty(cls, index) -> "_Lists":
        rows = Rows.empty(0, index.dim, index.metric, index.store)
        return cls(rows, np.zeros(index.lists, np.int64))

    def positions(self, ids):
        """Row of each id, of the same shape, -1 where unknown."""
        if not len(self.sorted_ids):
            return np.full(ids.shape, -1, np.int64)
        at = np.minimum(np.searchsorted(self.sorted_ids, ids), len(self.sorted_ids) - 1)
        return np.where(self.sorted_ids[at] == ids, self.sorted_at[at], -1)

    def assigned(self, positions):
        """The list that each row stands in."""
        return np.searchsorted(self.start, positions, side="right") - 1

    def with_rows(self, index, content) -> "_Lists":
        """These and new rows, (codes, ids, vectors, scale), each in the list of its centroid."""
        nearest = functional.topk(content[0], index.centroids, 1)[1][:, 0]
        old = self.rows.content(self.filled)
        both = [
            None if a is None else np.concatenate([a, b]) for a, b in zip(old, content, strict=True)
        ]
        return self.rebuilt(index, both, np.concatenate([self.assigned(self.filled), nearest]))

    def rebuilt(self, index, content, assigned) -> "_Lists":
        """`content` as Rows.write takes it, row i into list assigned[i]."""
        order = np.lexsort((content[1], assigned))
        sizes = np.bincount(assigned, minlength=index.lists).astype(np.int64)
        total = int((-(-sizes // BLOCK) * BLOCK).sum())
        rows = Rows.empty(total, index.dim, index.metric, index.store)
        done = 0
        for start, size in zip(
            np.concatenate([[0], np.cumsum(-(-sizes // BLOCK) * BLOCK)]), sizes, strict=False
        ):
            part = order[done : done + size]
            rows.write(int(start), *(None if c is None else c[part] for c in content))
            done += size
        return _Lists(_with_count(rows, total), sizes)

    def ranges(self, codes, nprobe, centroids):
        """(offsets, begin, end) of the rows that each query visits."""
        visited = functional.topk(codes, centroids, nprobe)[1]
        offsets = np.arange(len(codes) + 1, dtype=np.int64) * nprobe
        begin = self.start[visited].reshape(-1)
        return offsets, begin, begin + self.sizes[visited].reshape(-1)


def k_majority(codes, dim, count, seed=0, iterations=_ITERATIONS):
    """`count` centroid codes of (n, bytes) codes by Lloyd's iteration in Hamming space.

    An empty cluster takes over the code that lies farthest from its centroid.
    """
    rng = np.random.default_rng(seed)
    centroids = codes[np.sort(rng.choice(len(codes), count, replace=False))]
    for _ in range(iterations):
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
    return np.ascontiguousarray(centroids)


def _plain(array):
    return to_numpy(array) if hasattr(array, "detach") else array


__all__ = ["BinaryIVFIndex", "SearchResult", "k_majority"]
