# SPDX-License-Identifier: Apache-2.0
"""The content of a sparse index: documents row by row, and the inverted lists of their windows."""

import concurrent.futures
import dataclasses
import itertools
import threading
from typing import NamedTuple

import numpy as np

from pentad import _C
from pentad._errors import FormatError
from pentad._index import Flat, check_rising
from pentad.sparse import _search

VALUES = {"exact": "float32", "float16": "float16", "uint8": "uint8"}
LARGEST = 2.0**48  # of a value or a weight: a score of 2**31 products stays below 2**128
MOST = {"float32": LARGEST, "float16": 65504.0, "uint8": 255}
_ROWS = 1 << 16  # copied or checked at a time
_RUNS = 1 << 12  # of consecutive rows that are copied one by one
_PENDING = 1 << 12  # changed documents whose windows are built at once
_FIRST = 64  # of the best that a range search asks for first
_HELD = 1 << 22  # scores of a range search at a time
_WINDOW = {"terms": "int32", "starts": "int64", "scales": "float32", "postings": "uint8"}


class Queries(NamedTuple):
    """indptr (nq + 1,) int64; terms (nnz,) int32, rising in each row; values (nnz,) float32."""

    indptr: np.ndarray
    terms: np.ndarray
    values: np.ndarray


def stored(values: str, indptr, terms, given) -> dict:
    """The content of documents but for their ids, of float32 values that are not negative.

    Entries whose stored value is zero are left out.
    """
    sizes, scale = np.diff(indptr), {}
    if values == "uint8":
        largest = np.zeros(len(sizes), np.float32)
        if len(given):
            largest[sizes > 0] = np.maximum.reduceat(given, indptr[:-1][sizes > 0])
        # No scale below the normal numbers: its few bits would round a value past 255, or be zero.
        scale["scale"] = np.maximum(largest / np.float32(255), np.finfo(np.float32).tiny)
        kept = np.empty(len(given), np.uint8)
        for first in range(0, len(sizes), _ROWS):
            rows = slice(first, first + _ROWS)
            part = slice(indptr[first], indptr[min(first + _ROWS, len(sizes))])
            kept[part] = np.rint(given[part] / np.repeat(scale["scale"][rows], sizes[rows]))
    else:
        kept = given.astype(VALUES[values], copy=False)
    zeros = np.flatnonzero(kept == 0)
    if len(zeros):
        home = np.searchsorted(indptr, zeros, side="right") - 1
        sizes -= np.bincount(home, minlength=len(sizes))
        terms, kept = np.delete(terms, zeros), np.delete(kept, zeros)
    return {"sizes": sizes, "terms": terms, "values": kept} | scale


@dataclasses.dataclass(frozen=True)
class Documents:
    """One state of the documents. Rows that it counts are never written to.

    count, entries : int
        In use of the arrays, which have room for more.
    ids : (rows,) int64
    indptr : (rows + 1,) int64
    terms : (entries,) int32
    values : (entries,) float32, float16 or uint8
    scale : (rows,) float32, for uint8; else None
    """

    count: int
    entries: int
    ids: np.ndarray
    indptr: np.ndarray
    terms: np.ndarray
    values: np.ndarray
    scale: np.ndarray | None

    @classmethod
    def empty(cls, values: str) -> "Documents":
        return cls(
            count=0,
            entries=0,
            ids=np.zeros(0, np.int64),
            indptr=np.zeros(1, np.int64),
            terms=np.zeros(0, np.int32),
            values=np.zeros(0, VALUES[values]),
            scale=np.zeros(0, np.float32) if values == "uint8" else None,
        )

    def forward(self) -> _search.Forward:
        return _search.Forward(
            self.indptr[: self.count + 1],
            self.terms[: self.entries],
            self.values[: self.entries],
            None if self.scale is None else self.scale[: self.count],
        )

    def appended(self, content: dict) -> "Documents":
        """With more rows, which are written behind those that are counted."""
        rows, entries = self.count, self.entries
        count, total = rows + len(content["sizes"]), entries + len(content["terms"])
        new = {name: _with_room(getattr(self, name), rows, count) for name in ("ids", "scale")}
        new |= {
            name: _with_room(getattr(self, name), entries, total) for name in ("terms", "values")
        }
        new["indptr"] = _with_room(self.indptr, rows + 1, count + 1)
        new["indptr"][rows + 1 : count + 1] = entries + np.cumsum(content["sizes"])
        for name in ("terms", "values"):
            new[name][entries:total] = content[name]
        for name in content.keys() & {"ids", "scale"}:
            new[name][rows:count] = content[name]
        return Documents(count, total, **new)

    def taken(self, at: np.ndarray) -> "Documents":
        """The rows at these positions, copied."""
        sizes = self.indptr[at + 1] - self.indptr[at]
        indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        new = {
            name: np.empty(indptr[-1], getattr(self, name).dtype) for name in ("terms", "values")
        }
        runs = np.concatenate([[0], np.flatnonzero(np.diff(at) != 1) + 1, [len(at)]])
        if len(runs) <= _RUNS and len(at):
            pieces = [
                (slice(self.indptr[at[i]], self.indptr[at[j - 1] + 1]), i, j)
                for i, j in itertools.pairwise(runs)
            ]
        else:
            steps = range(0, len(at), _ROWS)
            pieces = ((_entries(self.indptr, at[i : i + _ROWS]), i, i + _ROWS) for i in steps)
        for source, i, j in pieces:
            target = slice(indptr[i], indptr[min(j, len(at))])
            for name, array in new.items():
                array[target] = getattr(self, name)[source]
        return Documents(
            count=len(at),
            entries=int(indptr[-1]),
            ids=self.ids[at],
            indptr=indptr,
            scale=None if self.scale is None else self.scale[at],
            **new,
        )

    def decoded(self) -> np.ndarray:
        """(entries,) float32: the values that the stored ones stand for."""
        values = self.values[: self.entries].astype(np.float32)
        if self.scale is None:
            return values
        return values * np.repeat(self.scale[: self.count], np.diff(self.indptr[: self.count + 1]))

    # --- Files ------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        forward = self.forward()._asdict()
        arrays = {"ids": self.ids[: self.count]} | forward
        return {name: array for name, array in arrays.items() if array is not None}

    @classmethod
    def from_arrays(cls, values: str, vocab_size: int, arrays: dict) -> "Documents":
        """Raises FormatError where the arrays do not fit each other, or are none of an index."""
        model = cls.empty(values)
        for name, like in model.arrays().items():
            _check_section(arrays, name, like.dtype)
        count, entries = len(arrays["ids"]), len(arrays["terms"])
        lengths = {"indptr": count + 1, "values": entries}
        lengths |= {} if model.scale is None else {"scale": count}
        for name, length in lengths.items():
            if len(arrays[name]) != length:
                raise FormatError(f"section {name} does not fit an index of {count} rows")
        rows = cls(count, entries, **{name: arrays.get(name) for name in ROW_SECTIONS})
        if model.scale is None and "scale" in arrays:
            raise FormatError("section scale is none of such an index")
        check_rising(rows.ids)
        rows._check(vocab_size)
        return rows

    def _check(self, vocab_size: int) -> None:
        indptr = self.indptr
        if indptr[0] or indptr[-1] != self.entries or (np.diff(indptr) < 0).any():
            raise FormatError("the rows of the index do not follow each other")
        most = MOST[self.values.dtype.name]
        if self.scale is not None and not ((self.scale >= 0) & (self.scale <= LARGEST / 254)).all():
            raise FormatError("section scale holds a value that is negative or not finite")
        for first in range(0, self.count, _ROWS):
            ends = indptr[first : first + _ROWS + 1]
            terms, values = self.terms[ends[0] : ends[-1]], self.values[ends[0] : ends[-1]]
            rises = np.diff(terms) > 0
            within = ends[1:-1] - ends[0] - 1
            rises[within[(within >= 0) & (within < len(rises))]] = True
            if not rises.all() or (terms < 0).any() or (terms >= vocab_size).any():
                raise FormatError(f"section terms does not fit a vocabulary of {vocab_size} terms")
            if not ((values >= 0) & (values <= most)).all():
                raise FormatError("section values holds one that is negative or not finite")


ROW_SECTIONS = ("ids", "indptr", "terms", "values", "scale")


class Postings(Flat):
    """Documents in the order of their ids, and the inverted lists of every window of them.

    kept : dict of int -> Window
        The windows that stand already; the others are built when they are needed.
    pending : int
        Documents that changed since all windows stood. Many are not left to the next search.
    """

    def __init__(self, rows: Documents, kept: dict, pending: int = 0):
        self.rows = rows
        self.ids = rows.ids[: rows.count]
        self.ids.flags.writeable = False
        self.forward = rows.forward()
        self._kept, self._pending = kept, pending
        self._all, self._lists, self._building = None, None, threading.Lock()
        if pending >= _PENDING:
            self.windows()

    def windows(self) -> tuple:
        """Every window; they stand from the first call on."""
        with self._building:
            if self._all is None:
                missing = [i for i in range(_windows(self.rows.count)) if i not in self._kept]
                every = self._kept | dict(zip(missing, self._built(missing), strict=True))
                self._all = tuple(every[i] for i in range(len(every)))
            return self._all

    def _built(self, missing):
        """The windows of these numbers."""

        def build(i):
            first = i * _search.WINDOW
            last = min(first + _search.WINDOW, self.rows.count)
            return _search.build(self.forward, first, last)

        if len(missing) < 2 or _C.num_threads() < 2:
            return map(build, missing)
        with concurrent.futures.ThreadPoolExecutor(_C.num_threads()) as pool:
            return list(pool.map(build, missing))

    def _changed(self, rows: Documents, count: int, keep) -> "Postings":
        """The next state: `count` documents changed, windows stay where keep(number) is true."""
        every, pending = self._all, self._pending
        kept, pending = (self._kept, pending) if every is None else (dict(enumerate(every)), 0)
        kept = {i: window for i, window in kept.items() if keep(i)}
        return Postings(rows, kept, pending + count)

    def _from(self, rows: Documents, count: int, first: int) -> "Postings":
        """The next state, where the documents from position `first` on changed."""
        return self._changed(rows, count, lambda i: (i + 1) * _search.WINDOW <= first)

    def added(self, content: dict) -> "Postings":
        """With new documents, which change the windows from the first of them on."""
        new = content["ids"]
        if not len(new):
            return self
        first, count = np.searchsorted(self.ids, new.min()), self.rows.count
        rows = self.rows.appended(content)
        if first < count or (np.diff(new) < 0).any():
            rows = rows.taken(np.argsort(rows.ids[: rows.count], kind="stable"))
        return self._from(rows, len(new), first)

    def without(self, gone: np.ndarray) -> "Postings":
        """Less some documents, which changes the windows from the first of them on."""
        keep = np.ones(self.rows.count, np.bool_)
        keep[gone] = False
        return self._from(self.rows.taken(np.flatnonzero(keep)), len(gone), gone.min())

    def replaced(self, at: np.ndarray, content: dict) -> "Postings":
        """With other documents at `at`, which changes the windows that hold one."""
        if not len(at):
            return self
        order = np.arange(self.rows.count)
        order[at] = self.rows.count + np.arange(len(at))
        rows = self.rows.appended(content).taken(order)
        changed = set((at // _search.WINDOW).tolist())
        return self._changed(rows, len(at), lambda i: i not in changed)

    # --- Search -----------------------------------------------------------------------------------

    def lists(self) -> _search.Lists:
        """The windows, for searches."""
        if self._lists is None:
            self._lists = _search.Lists(self.windows(), self.forward)
        return self._lists

    def named(self, at: np.ndarray) -> np.ndarray:
        """The ids of positions; -1 stays. Ids that are the numbers from 0 are positions."""
        if not len(self.ids) or self.ids[-1] == len(self.ids) - 1:
            return at
        return np.where(at < 0, -1, self.ids[at])

    def within(self, queries: Queries, columns: int, radius: float, mask):
        """(scores, positions) of each query, lists of arrays: scores of at least `radius`.

        Asks for the best until the last of them is below, for more and more of them.
        """
        most = self.rows.count if mask is None else int(np.count_nonzero(mask))
        found = [None] * (len(queries.indptr) - 1)
        left, k = np.arange(len(found)), min(_FIRST, most)
        while len(left):
            step, rest = max(1, _HELD // max(k, 1)), []
            for part in (left[i : i + step] for i in range(0, len(left), step)):
                chosen = _chosen(queries, part)
                scores, positions = self.lists().topk("range_search", chosen, columns, mask, k)
                hits = (scores.astype(np.float64) >= radius).sum(axis=1)
                for q, count, score, position in zip(part, hits, scores, positions, strict=True):
                    if count == k < most:
                        rest.append(q)
                        continue
                    order = np.argsort(position[:count])
                    found[q] = score[:count][order], position[:count][order]
            left, k = np.array(rest, np.int64), min(k * 16, most)
        return [part[0] for part in found], [part[1] for part in found]

    # --- Files ------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        lists = {
            f"window{i}.{name}": getattr(window, name)
            for i, window in enumerate(self.windows())
            for name in _WINDOW
        }
        return self.rows.arrays() | lists

    @classmethod
    def from_arrays(cls, values: str, vocab_size: int, arrays: dict) -> "Postings":
        """Raises FormatError where the arrays do not fit each other, or are none of an index."""
        rows = Documents.from_arrays(values, vocab_size, arrays)
        kept, wanted = {}, set(rows.arrays())
        for i, first in enumerate(range(0, rows.count, _search.WINDOW)):
            names = {name: f"window{i}.{name}" for name in _WINDOW}
            wanted |= set(names.values())
            for name, section in names.items():
                _check_section(arrays, section, np.dtype(_WINDOW[name]))
            window = _search.Window(**{name: arrays[s] for name, s in names.items()})
            lengths = len(window.terms) + 1, len(window.terms)
            if (len(window.starts), len(window.scales)) != lengths:
                raise FormatError(f"section {names['starts']} does not fit {names['terms']}")
            kept[i] = window
            if len(kept[i].terms) and kept[i].terms[-1] >= vocab_size:
                raise FormatError(f"section {names['terms']} does not fit the vocabulary")
            _search.check(kept[i], min(_search.WINDOW, rows.count - first))
        unknown = arrays.keys() - wanted
        if unknown:
            raise FormatError(f"section {min(unknown)} is none of such an index")
        return cls(rows, kept)


def _windows(count: int) -> int:
    return -(-count // _search.WINDOW)


def _with_room(array, used: int, total: int):
    """`array`, or a copy of what is used of it, with room for `total`."""
    if array is None or (total <= len(array) and array.flags.writeable):
        return array
    grown = np.empty(max(total, used * 3 // 2), array.dtype)
    grown[:used] = array[:used]
    return grown


def _entries(indptr, at):
    """Where the entries of rows stand."""
    sizes = indptr[at + 1] - indptr[at]
    ends = np.cumsum(sizes)
    return np.arange(sizes.sum()) + np.repeat(indptr[at] - ends + sizes, sizes)


def _chosen(queries, at) -> Queries:
    """The queries at these rows."""
    entries = _entries(queries.indptr, at)
    sizes = queries.indptr[at + 1] - queries.indptr[at]
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Queries(indptr, queries.terms[entries], queries.values[entries])


def scores_at(rows: Documents, queries: Queries, at: np.ndarray) -> np.ndarray:
    """(nq, c) float32: scores of the rows at these positions, -inf where one is -1."""
    return _search.scores_at(rows.forward(), queries, np.ascontiguousarray(at))


def _check_section(arrays: dict, name: str, dtype) -> None:
    have = arrays.get(name)
    if have is None or have.dtype != dtype or have.ndim != 1:
        raise FormatError(f"section {name} is missing or malformed")
