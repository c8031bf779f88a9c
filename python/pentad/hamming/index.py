# SPDX-License-Identifier: Apache-2.0
"""Exact search over binary codes, with rescoring, filters, removal and files."""

import threading

import numpy as np

from pentad import _C, _file
from pentad._arrays import dtype_name, is_numpy, like, to_numpy
from pentad._errors import FormatError
from pentad._index import SearchResult, check_ids, present_ids
from pentad.hamming import functional
from pentad.hamming._rows import STORES, Rows, best_scores, quantize

_RESCORES = (None, "bits", "store")


class _Input:
    """Vectors or codes, brought to numpy: `codes` always, `floats` where floats were given."""

    def __init__(self, op: str, array, dim: int, name: str, *, finite: bool):
        is_numpy(op, **{name: array})
        if array.ndim != 2:
            raise ValueError(
                f"[{op}] {name} have shape {tuple(array.shape)}, expected (n, columns)"
            )
        width = -(-dim // 8)
        if dtype_name(array) == "uint8":
            if array.shape[1] != width:
                raise ValueError(
                    f"[{op}] {name} are codes of {array.shape[1]} bytes, dim {dim} takes {width}"
                )
            self.floats = None
            self.codes = to_numpy(array)
            spare = width * 8 - dim
            if spare and (self.codes[:, -1] & ((1 << spare) - 1)).any():
                raise ValueError(f"[{op}] {name} have padding bits set beyond dim {dim}")
            return
        functional.check_dtype(op, name, array, ("uint8", *functional._FLOATS))
        if array.shape[1] != dim:
            raise ValueError(f"[{op}] {name} have {array.shape[1]} columns but the index has {dim}")
        with np.errstate(
            over="ignore"
        ):  # what exceeds float32 becomes infinite, which counts below
            self.floats = to_numpy(array).astype(np.float32, copy=False)
        if finite and not np.isfinite(self.floats).all():
            raise ValueError(f"[{op}] {name} hold a NaN or an infinity")
        self.codes = to_numpy(functional.pack(array))  # of the original: narrowing loses signs


class CodeIndex:
    """What the flat and the inverted index share: checks, the order of results, files."""

    _kind = ""

    def __init__(self, dim: int, *, metric: str = "hamming", store=None):
        op = self._op("__init__")
        self.dim = functional.check_count(op, "dim", dim, 1)
        functional.check_choice(op, "metric", metric, functional.METRICS)
        if store not in STORES:
            raise ValueError(f"[{op}] store is {store!r}, expected one of None, 'int8', 'float16'")
        if dim > 8 * _C.hamming_max_bytes:
            raise ValueError(f"[{op}] dim is {dim}, at most {8 * _C.hamming_max_bytes} bits")
        self.metric = metric
        self.store = store
        self._writing = threading.Lock()

    def __reduce__(self):
        """Copies and pickles carry the rows, and share nothing that a later change writes to."""
        return type(self).from_sections, self.to_sections()

    def _op(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"

    def _input(self, name, array, what="vectors", *, finite=True) -> _Input:
        given = _Input(self._op(name), array, self.dim, what, finite=finite)
        if self.store is not None and given.floats is None and name in ("add", "update"):
            raise TypeError(
                f"[{self._op(name)}] the index stores {self.store} vectors, so it takes float "
                f"vectors, not codes"
            )
        return given

    def _new_ids(self, name, ids, count: int, state_ids: np.ndarray) -> np.ndarray:
        """Given ids, checked against those present, which rise; or the numbers after those."""
        if ids is None:
            last = int(state_ids[-1]) if len(state_ids) else -1
            if last + count >= 2**63:
                raise ValueError(f"[{self._op(name)}] no {count} ids are left after {last}")
            return last + np.arange(1, count + 1, dtype=np.int64)
        ids = check_ids(self._op(name), ids if not hasattr(ids, "detach") else to_numpy(ids), count)
        at = np.searchsorted(state_ids, ids)
        present = np.append(state_ids, -1)[at] == ids
        if present.any():
            raise ValueError(f"[{self._op(name)}] id {ids[present][0]} is already in the index")
        return ids

    def _search(
        self, rows: Rows, given: _Input, k, mask, rescore, oversample, lists=None, ranges=None
    ):
        """(scores, ids) as numpy arrays; with `lists`, only the rows of the ranges."""
        op = self._op("search")
        k = functional.check_count(op, "k", k)
        if rescore not in _RESCORES:
            raise ValueError(f"[{op}] rescore is {rescore!r}, expected None, 'bits' or 'store'")
        oversample = functional.check_count(op, "oversample", oversample, 1)
        if rescore is not None and given.floats is None:
            raise TypeError(f"[{op}] rescoring takes float queries, not codes")
        if rescore == "store" and self.store is None:
            raise ValueError(f"[{op}] rescore='store' but the index was made with store=None")
        candidates = k if rescore is None else min(k * oversample, rows.count)
        if lists is None:  # rows in the order of ids: ties by position are ties by id
            values, at = rows.topk(given.codes, candidates, self.metric, mask)
            found = np.where(at >= 0, rows.ids[np.maximum(at, 0)] if rows.count else -1, -1)
        else:
            values, found = rows.topk(
                given.codes, candidates, self.metric, mask, ids=True, ranges=ranges
            )
            at = lists.positions(found)
        if rescore is not None:
            values, found = best_scores(rows.rescore(given.floats, at, rescore), found, k)
        return values, found

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
        op = self._op("rescore")
        functional.check_choice(op, "by", by, ("store", "bits"))
        if by == "store" and self.store is None:
            raise ValueError(f"[{op}] by='store' but the index was made with store=None")
        given = self._input("rescore", queries, "queries")
        if given.floats is None:
            raise TypeError(f"[{op}] rescoring takes float queries, not codes")
        candidates = np.asarray(to_numpy(ids) if hasattr(ids, "detach") else ids)
        if candidates.dtype != np.int64:
            raise TypeError(f"[{op}] ids have dtype {candidates.dtype}, expected int64")
        if candidates.ndim != 2 or len(candidates) != len(given.floats):
            raise ValueError(
                f"[{op}] ids have shape {candidates.shape}, expected ({len(given.floats)}, c)"
            )
        rows, at = self._locate(candidates)
        found = np.where(at >= 0, candidates, -1)
        scores, found = best_scores(rows.rescore(given.floats, at, by), found, found.shape[1])
        return SearchResult(like(queries, scores), like(queries, found))

    # --- Files ------------------------------------------------------------------------------------

    def save(self, path) -> None:
        """Write the index to one file, atomically: a save cut short leaves an old file whole.

        Searches go on meanwhile, changes wait: an `add` may fill up the last block in place.
        """
        with self._writing:
            _file.write(path, self._kind, *self.to_sections())

    @classmethod
    def load(cls, path, mmap: bool = True, verify: bool = True):
        """Read an index written by `save`.

        Parameters
        ----------
        path : str or path-like
        mmap : bool
            Map the file rather than read it. The first change copies the rows to memory.
        verify : bool
            Compare every section with its checksum first, which reads the file once.

        Raises
        ------
        FormatError
            If the file is truncated, altered, or holds something else.
        """
        return cls.from_sections(*_file.read(path, cls._kind, mmap=mmap, verify=verify))


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

    def __init__(self, dim: int, *, metric: str = "hamming", store=None):
        super().__init__(dim, metric=metric, store=store)
        self._rows = Rows.empty(0, self.dim, metric, store)

    def __len__(self) -> int:
        return self._rows.count

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64, rising, read-only."""
        rows = self._rows
        ids = rows.ids[: rows.count]
        ids.flags.writeable = False
        return ids

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
        given = self._input("add", vectors_or_codes, finite=self.store is not None)
        vectors, scale = quantize(given.floats, self.store)
        with self._writing:
            rows = self._rows
            present = rows.ids[: rows.count]
            new = self._new_ids("add", ids, len(given.codes), present)
            order = np.argsort(new, kind="stable")
            content = [
                None if part is None else part[order] for part in (given.codes, new, vectors, scale)
            ]
            if not len(new):
                return
            if rows.count and content[1][0] < present[-1]:
                self._rows = self._merged(rows, content)
                return
            total = rows.count + len(new)
            if total > rows.capacity or not rows.ids.flags.writeable:
                rows = rows.grown(max(total, rows.capacity * 3 // 2 if rows.count else 0))
            rows.write(rows.count, *content)
            self._rows = _with_count(rows, total)

    def _merged(self, rows: Rows, content) -> Rows:
        order = np.argsort(np.concatenate([rows.ids[: rows.count], content[1]]), kind="stable")
        old = rows.content(np.arange(rows.count))
        both = [
            None if a is None else np.concatenate([a, b])[order]
            for a, b in zip(old, content, strict=True)
        ]
        return self._rebuilt(both)

    def _rebuilt(self, content) -> Rows:
        rows = Rows.empty(len(content[1]), self.dim, self.metric, self.store)
        rows.write(0, *content)
        return _with_count(rows, len(content[1]))

    def _positions(self, name: str, ids, *, missing="raise", unique=True) -> np.ndarray:
        """Row numbers of ids; unknown ones raise, or are left out."""
        rows = self._rows
        ids = to_numpy(ids) if hasattr(ids, "detach") else ids
        ids = check_ids(self._op(name), ids, unique=unique)
        present = rows.ids[: rows.count]
        at = np.searchsorted(present, ids)
        known = at < rows.count
        known[known] = present[at[known]] == ids[known]
        if missing == "raise" and not known.all():
            raise ValueError(f"[{self._op(name)}] id {ids[~known][0]} is not in the index")
        return at[known]

    def _locate(self, ids):
        """The present rows, and the position of each id in them, -1 where unknown."""
        rows = self._rows
        present = rows.ids[: rows.count]
        if not rows.count:
            return rows, np.full(ids.shape, -1, np.int64)
        at = np.minimum(np.searchsorted(present, ids), rows.count - 1)
        return rows, np.where(present[at] == ids, at, -1)

    def _mask(self, name: str, keep):
        if keep is None:
            return None
        if hasattr(keep, "detach"):
            keep = to_numpy(keep)
        keep = np.asarray(keep)
        count = self._rows.count
        if keep.dtype == np.bool_:
            if keep.shape != (count,):
                raise ValueError(
                    f"[{self._op(name)}] filter has shape {keep.shape}, expected ({count},)"
                )
            return np.ascontiguousarray(keep)
        mask = np.zeros(count, np.bool_)
        mask[self._positions(name, present_ids(keep), missing="skip")] = True
        return mask

    def search(self, queries, k, *, filter=None, rescore=None, oversample=4) -> SearchResult:
        """The k best rows of each query.

        Parameters
        ----------
        queries : (nq, dim) float or (nq, ceil(dim / 8)) uint8
        k : int
        filter : (n,) bool, or a list of ids, optional
            Rows that may be returned: a mask over the rows in the order of `ids`, or the ids
            themselves (unknown ones are passed over).
        rescore : {None, "bits", "store"}
            Take ``k * oversample`` candidates by the index's metric, then order them by the inner
            product of the float query with the candidate's +-1 bits, or with its stored vector.
        oversample : int

        Returns
        -------
        SearchResult
            scores : (nq, k) int32 distances (float32 for jaccard), smaller first ("and": counts,
            larger first); with rescoring float32 inner products, larger first. ids : (nq, k) int64,
            ties in rising order, -1 where fewer than k rows exist.
        """
        # One snapshot for the mask and the search: another thread may add between the two.
        snapshot = _view(self)
        mask = snapshot._mask("search", filter)
        given = snapshot._input("search", queries, "queries")
        found = snapshot._search(snapshot._rows, given, k, mask, rescore, oversample)
        return SearchResult(*(like(queries, part) for part in found))

    def range_search(self, queries, radius, *, filter=None):
        """Every row within `radius`, inclusive: (indptr, values, ids), ids rising per query.

        See `pentad.hamming.range_search`; `filter` as in `search`.
        """
        snapshot = _view(self)
        given = snapshot._input("range_search", queries, "queries")
        radius = float(radius)
        if np.isnan(radius):
            raise ValueError(f"[{self._op('range_search')}] radius is NaN")
        mask = snapshot._mask("range_search", filter)
        found = snapshot._rows.range_search(given.codes, radius, self.metric, mask)
        return tuple(like(queries, part) for part in found)

    def remove(self, ids) -> int:
        """Remove rows by id; unknown ids are passed over. Returns how many were removed."""
        with self._writing:
            rows = self._rows
            gone = self._positions("remove", ids, missing="skip")
            if len(gone):
                keep = np.ones(rows.count, np.bool_)
                keep[gone] = False
                self._rows = self._rebuilt(rows.content(np.flatnonzero(keep)))
            return len(gone)

    def update(self, ids, vectors_or_codes) -> None:
        """Replace the rows of `ids`, which must be present."""
        given = self._input("update", vectors_or_codes, finite=self.store is not None)
        vectors, scale = quantize(given.floats, self.store)
        with self._writing:
            at = self._positions("update", ids)
            if len(at) != len(given.codes):
                raise ValueError(
                    f"[{self._op('update')}] {len(at)} ids for {len(given.codes)} rows"
                )
            content = [part for part in self._rows.content(np.arange(self._rows.count))]
            for old, new in zip(content, (given.codes, None, vectors, scale), strict=True):
                if old is not None and new is not None:
                    old[at] = new
            self._rows = self._rebuilt(content)

    def reconstruct(self, ids) -> np.ndarray:
        """What the index holds of `ids`: (n, dim) float32 of stored vectors, else of +-1.

        An id may be given more than once.
        """
        snapshot = _view(self)
        at = snapshot._positions("reconstruct", ids, unique=False)
        return _reconstruct(snapshot._rows, at, self.dim)

    def codes(self, ids=None) -> np.ndarray:
        """(n, ceil(dim / 8)) uint8 codes of `ids`, by default of all rows."""
        snapshot = _view(self)
        rows = snapshot._rows
        if ids is None:
            return rows.codes(np.arange(rows.count))
        return rows.codes(snapshot._positions("codes", ids, unique=False))

    def to_sections(self):
        """(meta, arrays) for a file that embeds this index; see `from_sections`.

        The arrays are the index's own: an `add` before they are written may change the last block.
        """
        meta = {"dim": self.dim, "metric": self.metric, "store": self.store}
        return meta, self._rows.arrays()

    @classmethod
    def from_sections(cls, meta: dict, arrays: dict) -> "BinaryIndex":
        """Rebuild an index from `to_sections`; the arrays are used as they are.

        Raises
        ------
        FormatError
            If they do not fit each other.
        """
        try:
            index = cls(meta["dim"], metric=meta["metric"], store=meta["store"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the description of the index is malformed: {error!r}") from error
        index._rows = Rows.from_arrays(arrays, index.dim, index.metric, index.store)
        if (np.diff(index._rows.ids) <= 0).any() or (index._rows.ids[:1] < 0).any():
            raise FormatError("the ids of the index are not in rising order")
        return index


def _with_count(rows: Rows, count: int) -> Rows:
    return Rows(count, rows.bytes, rows.blocks, rows.ones, rows.ids, rows.vectors, rows.scale)


def _view(index: BinaryIndex) -> BinaryIndex:
    """A shallow copy of the index, fixed to its present rows."""
    view = object.__new__(type(index))
    view.__dict__.update(index.__dict__)
    return view


def _reconstruct(rows: Rows, at: np.ndarray, dim: int) -> np.ndarray:
    if rows.vectors is None:
        return functional.unpack(rows.codes(at), dim)
    vectors = rows.vectors[at].astype(np.float32)
    return vectors if rows.scale is None else vectors * rows.scale[at, None]


__all__ = ["BinaryIndex", "CodeIndex"]
