# SPDX-License-Identifier: Apache-2.0
"""What inverted indexes share: rows that stand list by list, and lists that a query visits."""

import numpy as np

from pentad._checks import check_count
from pentad._errors import FormatError
from pentad._index import Flat, Index, check_rising
from pentad._rows import Layout, Rows


class Lists(Flat):
    """Rows list by list: list l fills [start[l], start[l] + sizes[l]), in the order of ids.

    Every list begins on the border of a block. The content of new rows names the "list" of each.
    Every change rebuilds the lists.
    """

    def __init__(self, rows: Rows, sizes: np.ndarray):
        self.rows = rows
        self.sizes = sizes
        self.start = _starts(rows.layout, sizes)
        before = np.repeat(self.start[:-1] - np.cumsum(sizes) + sizes, sizes)
        self.filled = np.arange(len(before), dtype=np.int64) + before
        ids = rows.ids[self.filled]
        order = np.argsort(ids, kind="stable")
        self.ids, self.sorted_at = ids[order], self.filled[order]
        self.ids.flags.writeable = False

    @classmethod
    def empty(cls, layout: Layout, lists: int) -> "Lists":
        return cls(Rows.empty(layout), np.zeros(lists, np.int64))

    @classmethod
    def of(cls, layout: Layout, lists: int, content: dict) -> "Lists":
        order = np.lexsort((content["ids"], content["list"]))
        sizes = np.bincount(content["list"], minlength=lists).astype(np.int64)
        start = _starts(layout, sizes)
        rows = Rows.empty(layout, int(start[-1]))
        first = np.concatenate([[0], np.cumsum(sizes)])
        for i in np.flatnonzero(sizes):
            part = order[first[i] : first[i + 1]]
            rows.write(int(start[i]), {name: c[part] for name, c in content.items()})
        return cls(rows.counting(int(start[-1])), sizes)

    def place(self, order):
        return self.sorted_at[order]

    def spread(self, keep):
        mask = np.zeros(self.rows.count, np.bool_)
        mask[self.sorted_at[keep]] = True
        return mask

    def home(self, at: np.ndarray) -> np.ndarray:
        """The list that each row stands in."""
        return np.searchsorted(self.start, at, side="right") - 1

    def content(self, at: np.ndarray) -> dict:
        return self.rows.content(at) | {"list": self.home(at)}

    def added(self, content: dict) -> "Lists":
        if not len(content["ids"]):
            return self
        return self._joined(self.filled, content)

    def without(self, gone: np.ndarray) -> "Lists":
        keep = np.setdiff1d(self.filled, gone, assume_unique=True)
        return Lists.of(self.rows.layout, len(self.sizes), self.content(keep))

    def replaced(self, at: np.ndarray, content: dict) -> "Lists":
        return self._joined(np.setdiff1d(self.filled, at, assume_unique=True), content)

    def _joined(self, keep, content) -> "Lists":
        old = self.content(keep)
        both = {name: np.concatenate([old[name], part]) for name, part in content.items()}
        return Lists.of(self.rows.layout, len(self.sizes), both)

    def ranges(self, visited: np.ndarray):
        """(offsets, begin, end) of the rows of the lists (nq, nprobe) that each query visits."""
        queries, nprobe = visited.shape
        offsets = np.arange(queries + 1, dtype=np.int64) * nprobe
        begin = self.start[visited].reshape(-1)
        return offsets, begin, begin + self.sizes[visited].reshape(-1)


def _starts(layout: Layout, sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(layout.padded(sizes))]).astype(np.int64)


class InvertedIndex(Index):
    """An index of `lists` lists around centroids, of which a query visits `nprobe`."""

    def _begin_lists(self, lists: int, nprobe: int) -> None:
        self.lists = check_count(self._op("__init__"), "lists", lists, 1)
        self.nprobe = nprobe
        self._state = Lists.empty(self._layout, self.lists)

    @property
    def nprobe(self) -> int:
        """Lists visited per query; may be set. ``nprobe = lists`` visits every row."""
        return self._nprobe

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        self._nprobe = check_count(self._op("nprobe"), "nprobe", value, 1)

    def _probes(self, name, nprobe) -> int:
        value = self.nprobe if nprobe is None else nprobe
        return min(check_count(self._op(name), "nprobe", value, 1), self.lists)

    def _list_arrays(self) -> dict:
        return self._state.rows.arrays() | {"sizes": self._state.sizes}

    @classmethod
    def _check_sizes(cls, meta: dict, arrays: dict) -> np.ndarray:
        """The sizes of the lists, checked before as many lists are made."""
        sizes = arrays.get("sizes")
        if (
            sizes is None
            or sizes.shape != (meta.get("lists"),)
            or sizes.dtype != np.int64
            or (sizes < 0).any()
        ):
            raise FormatError("the lists of the index are malformed")
        return sizes

    def _restore(self, arrays: dict, sizes: np.ndarray, also=()) -> None:
        """The state that the arrays of a file describe."""
        rows = Rows.from_arrays(self._layout, arrays, also=("sizes", *also))
        if sum(self._layout.padded(int(size)) for size in sizes) != rows.count:
            raise FormatError("the lists of the index do not add up to its rows")
        self._state = Lists(rows, sizes)
        check_rising(self._state.ids)
