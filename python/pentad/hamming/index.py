# SPDX-License-Identifier: Apache-2.0
"""Exact search over binary codes, with rescoring, filters, removal and files."""

import numpy as np

from pentad import _C
from pentad._arrays import dtype_name, is_numpy, like, to_numpy
from pentad._checks import FLOATS, check_choice, check_count, check_dtype
from pentad._index import Flat, Index, SearchResult, check_rising
from pentad._rows import Rows, check_store, quantize
from pentad.hamming import _rows, functional


def check_vectors(op: str, array, dim: int, name: str) -> bool:
    """Whether an (n, columns) argument holds codes of `dim` bits, and not `dim` floats."""
    if array.ndim != 2:
        raise ValueError(f"[{op}] {name} have shape {tuple(array.shape)}, expected (n, columns)")
    if dtype_name(array) == "uint8":
        width = -(-dim // 8)
        if array.shape[1] != width:
            raise ValueError(
                f"[{op}] {name} are codes of {array.shape[1]} bytes, dim {dim} takes {width}"
            )
        return True
    check_dtype(op, name, array, ("uint8", *FLOATS))
    if array.shape[1] != dim:
        raise ValueError(f"[{op}] {name} have {array.shape[1]} columns but the index has {dim}")
    return False


class _Input:
    """Vectors or codes, brought to numpy: `codes` always, `floats` where floats were given."""

    def __init__(self, op: str, array, dim: int, name: str, *, finite: bool):
        is_numpy(op, traced=False, **{name: array})
        if check_vectors(op, array, dim, name):
            self.floats = None
            self.codes = to_numpy(array)
            spare = -dim % 8
            if spare and (self.codes[:, -1] & ((1 << spare) - 1)).any():
                raise ValueError(f"[{op}] {name} have padding bits set beyond dim {dim}")
            return
        # What exceeds float32 becomes infinite, which counts below.
        with np.errstate(over="ignore"):
            self.floats = to_numpy(array).astype(np.float32, copy=False)
        if finite and not np.isfinite(self.floats).all():
            raise ValueError(f"[{op}] {name} hold a NaN or an infinity")
        self.codes = to_numpy(functional.pack(array))  # of the original: narrowing loses signs

    def __len__(self) -> int:
        return len(self.codes)


class CodeIndex(Index):
    """What the flat and the inverted index share: checks, the order of results."""

    _by = ("store", "bits")

    def __init__(self, dim: int, *, metric: str = "hamming", store=None):
        op = self._op("__init__")
        self.dim = check_count(op, "dim", dim, 1)
        check_choice(op, "metric", metric, functional.METRICS)
        check_store(op, store)
        if dim > 8 * _C.hamming_max_bytes:
            raise ValueError(f"[{op}] dim is {dim}, at most {8 * _C.hamming_max_bytes} bits")
        self.metric = metric
        self.store = store
        super().__init__(_rows.CodeLayout(self.dim, metric, store))

    def _input(self, name, array, what="vectors") -> _Input:
        # Codes alone need only signs, which infinities have.
        signs = name == "train" or (self.store is None and name in ("add", "update"))
        given = _Input(self._op(name), array, self.dim, what, finite=not signs)
        if self.store is not None and given.floats is None and name in ("add", "update"):
            raise TypeError(
                f"[{self._op(name)}] the index stores {self.store} vectors, so it takes float "
                f"vectors, not codes"
            )
        if given.floats is None and name == "rescore":
            raise TypeError(f"[{self._op(name)}] rescoring takes float queries, not codes")
        return given

    def _content(self, given) -> dict:
        return {"codes": given.codes} | quantize(given.floats, self.store)

    def _decoded(self, at):
        return functional.unpack(self._state.rows.codes(at), self.dim)

    def _scores(self, rows, given, at, by):
        return _rows.scores(rows, given.floats, at, by)

    def _search(self, given: _Input, k, mask, rescore, oversample, ranges=None) -> tuple:
        """(scores, ids); with `ranges`, only the rows of those."""
        op, rows = self._op("search"), self._state.rows
        k = check_count(op, "k", k)
        by = self._rescored_by(op, rescore)
        oversample = check_count(op, "oversample", oversample, 1)
        if by is not None and given.floats is None:
            raise TypeError(f"[{op}] rescoring takes float queries, not codes")
        candidates = k if by is None else min(k * oversample, rows.count)
        if ranges is None:  # rows in the order of ids: ties by position are ties by id
            values, at = _rows.topk(rows, given.codes, candidates, mask)
            found = np.where(at >= 0, rows.ids[np.maximum(at, 0)] if rows.count else -1, -1)
        else:
            values, found = _rows.topk(rows, given.codes, candidates, mask, ids=True, ranges=ranges)
        return (values, found) if by is None else self._best(given, found, by, k)

    def add(self, vectors_or_codes, ids=None) -> None:
        """Add rows.

        Parameters
        ----------
        vectors_or_codes : (n, dim) float or (n, ceil(dim / 8)) uint8
            Float vectors are packed by sign (bit = x > 0) and, with `store`, kept; then codes alone
            are refused.
        ids : (n,) integers, optional
            Not negative, new, unique. By default the numbers after the largest present.

        Raises
        ------
        ValueError, TypeError
            The index is unchanged.
        """
        self._add(vectors_or_codes, ids)

    def reconstruct(self, ids) -> np.ndarray:
        """What the index holds of `ids`: (n, dim) float32 of stored vectors, else of +-1.

        An id may be given more than once.
        """
        return self._reconstruct(ids)

    def codes(self, ids=None) -> np.ndarray:
        """(n, ceil(dim / 8)) uint8 codes of `ids`, by default of all rows in their order."""
        return self._codes(ids)

    def rescore(self, queries, ids, *, by="store") -> SearchResult:
        """Order candidates, such as the ids of a search, by inner products with the float queries.

        ``search(q, k, rescore=by, oversample=m)`` is ``search(q, k * m)``, this, and its first k
        columns; apart, the two can be timed, or candidates of several searches merged.

        Parameters
        ----------
        queries : (nq, dim) float
        ids : (nq, c) int64
            -1 and unknown ids score -inf and come last, as -1.
        by : {"store", "bits"}
            The candidates' stored vectors or their +-1 bits.

        Returns
        -------
        SearchResult
            scores : (nq, c) float32, larger first. ids : (nq, c) int64, ties in rising order.
        """
        return self._rescore(queries, ids, by)


class BinaryIndex(CodeIndex):
    """Exact search over binary codes, brute force at the speed of memory.

    Parameters
    ----------
    dim : int
        Bits per code, 1 to 65,472.
    metric : {"hamming", "jaccard", "and"}
        See `pentad.hamming.distance`.
    store : {None, "int8", "float16"}
        Keep the vectors too, quantised, for rescoring.

    Notes
    -----
    Rows are kept in the order of their ids, so that ties by position are ties by id, and ids are
    looked up by bisection. Adding rising ids appends; other ids, `remove` and `update` copy the
    rows. A search works on the state that it found when it began, whatever other threads add or
    remove meanwhile; writers wait for each other.

    Examples
    --------
    >>> import numpy as np
    >>> vectors = np.random.default_rng(0).standard_normal((1000, 96), np.float32)
    >>> index = pentad.hamming.BinaryIndex(96, store="int8")
    >>> index.add(vectors)
    >>> scores, ids = index.search(vectors[:2], k=3, rescore="store")
    >>> ids[:, 0]
    array([0, 1])
    """

    _kind = "hamming.BinaryIndex"
    _options = ("dim", "metric", "store")

    def search(self, queries, k, *, filter=None, rescore=None, oversample=4) -> SearchResult:
        """The k best rows of each query.

        Parameters
        ----------
        queries : (nq, dim) float or (nq, ceil(dim / 8)) uint8
        k : int
        filter : (n,) bool, or a list of ids, optional
            Rows that may be returned: a mask over the rows in the order of `ids`, or the ids
            themselves (unknown ones are passed over).
        rescore : {None, "bits", "store", "float16", "int8"}
            Take ``k * oversample`` candidates by the index's metric, then order them by the inner
            product of the float query with the candidate's +-1 bits, or with its stored vector:
            "store" or the type that is stored.
        oversample : int

        Returns
        -------
        SearchResult
            scores : (nq, k) int32 distances (float32 for jaccard), smaller first ("and": counts,
            larger first); with rescoring float32 inner products, larger first. ids : (nq, k) int64,
            ties in rising order, -1 where fewer than k rows exist.
        """
        # One snapshot for the mask and the search: another thread may add between the two.
        view = self._view()
        mask = view._mask("search", filter)
        given = view._input("search", queries, "queries")
        found = view._search(given, k, mask, rescore, oversample)
        return SearchResult(*(like(queries, part) for part in found))

    def range_search(self, queries, radius, *, filter=None):
        """Every row within `radius`, inclusive: (indptr, scores, ids), ids rising per query.

        See `pentad.hamming.range_search`; `filter` as in `search`.
        """
        view = self._view()
        given = view._input("range_search", queries, "queries")
        radius = view._radius(radius)
        mask = view._mask("range_search", filter)
        found = _rows.range_search(view._state.rows, given.codes, radius, mask)
        return tuple(like(queries, part) for part in found)

    def _on_device(self, device):
        from pentad.hamming.device_index import DeviceBinaryIndex

        return DeviceBinaryIndex(self, device)

    def to_sections(self):
        """(meta, arrays) for a file that embeds this index; see `from_sections`.

        The arrays are the index's own: an `add` before they are written may change the last block.
        """
        return self._meta(), self._state.rows.arrays()

    @classmethod
    def from_sections(cls, meta: dict, arrays: dict) -> "BinaryIndex":
        """Rebuild an index from `to_sections`; the arrays are used as they are.

        Raises
        ------
        FormatError
            If they do not fit each other.
        """
        index = cls._made(meta)
        index._state = Flat(Rows.from_arrays(index._layout, arrays))
        check_rising(index.ids)
        return index


__all__ = ["BinaryIndex", "CodeIndex"]
