# SPDX-License-Identifier: Apache-2.0
"""What every index of the package shares: ids, changes, snapshots, filters, rescoring, files."""

import threading
from typing import Any, NamedTuple

import numpy as np

from pentad import _file
from pentad._arrays import like, to_numpy
from pentad._checks import check_choice
from pentad._errors import DeviceError, FormatError
from pentad._rows import STORES, Layout, Rows, best_scores


class SearchResult(NamedTuple):
    """The k best of each query, best first; ids are -1 where fewer than k exist.

    scores : (nq, k), larger or smaller is better as the index's metric says
    ids : (nq, k) int64
    """

    scores: Any
    ids: Any


def plain(op: str, array):
    """A tensor as numpy; anything else as it is."""
    return to_numpy(array, op) if hasattr(array, "detach") else array


def check_ids(op: str, ids, count: int | None = None, *, unique: bool = True) -> np.ndarray:
    """`ids` as a contiguous int64 array: 1-D, not negative, without duplicates, `count` of them."""
    array = np.asarray(plain(op, ids))
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"[{op}] ids have dtype {array.dtype}, expected integers")
    if array.ndim != 1:
        raise ValueError(f"[{op}] ids have shape {array.shape}, expected one dimension")
    if count is not None and len(array) != count:
        raise ValueError(f"[{op}] {len(array)} ids for {count} rows")
    if array.dtype == np.uint64 and (array > np.uint64(2**63 - 1)).any():
        raise ValueError(f"[{op}] an id exceeds 2**63 - 1")
    array = np.ascontiguousarray(array, dtype=np.int64)
    if (array < 0).any():
        raise ValueError(f"[{op}] id {array[array < 0][0]} is negative; -1 means 'no result'")
    if unique and len(np.unique(array)) != len(array):
        values, counts = np.unique(array, return_counts=True)
        raise ValueError(f"[{op}] id {values[counts > 1][0]} is given twice")
    return array


def present_ids(ids):
    """Each id once, without -1, which stands for 'no result'."""
    ids = np.unique(ids)
    return ids[ids != -1] if ids.dtype.kind in "iu" else ids


class Flat:
    """Rows in the order of their ids, so that ties by position are ties by id.

    A state of an index: `rows`, the `ids` that rise, where the i-th of them stands (`place`), and
    what the rows become by a change.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self.ids = rows.ids[:]
        self.ids.flags.writeable = False

    def place(self, order):
        return order

    def spread(self, keep):
        """A mask over the rows, of one over the ids."""
        return np.ascontiguousarray(keep)

    def find(self, ids):
        """Row of each id, of the same shape, -1 where unknown."""
        count = len(self.ids)
        if not count:
            return np.full(ids.shape, -1, np.int64)
        if self.ids[-1] == count - 1:  # the numbers from 0: an id is its own place
            known = (ids >= 0) & (ids < count)
            return np.where(known, self.place(np.where(known, ids, 0)), -1)
        at = np.minimum(np.searchsorted(self.ids, ids), count - 1)
        return np.where(self.ids[at] == ids, self.place(at), -1)

    def everywhere(self):
        """The rows in the order of ids."""
        return self.place(np.arange(len(self.ids)))

    def added(self, content: dict) -> "Flat":
        """With new rows; ids that rise further are written behind those that are counted."""
        rows, count = self.rows, len(content["ids"])
        order = np.argsort(content["ids"], kind="stable")
        content = {name: part[order] for name, part in content.items()}
        if not count:
            return self
        if rows.count and content["ids"][0] < self.ids[-1]:
            order = np.argsort(np.concatenate([self.ids, content["ids"]]), kind="stable")
            old = rows.content(np.arange(rows.count))
            both = {
                name: np.concatenate([old[name], part])[order] for name, part in content.items()
            }
            return Flat(Rows.of(rows.layout, both))
        total = rows.count + count
        if total > rows.capacity or not rows.columns["ids"].flags.writeable:
            rows = rows.grown(max(total, rows.capacity * 3 // 2 if rows.count else 0))
        rows.write(rows.count, content)
        return Flat(rows.counting(total))

    def without(self, gone: np.ndarray) -> "Flat":
        keep = np.ones(self.rows.count, np.bool_)
        keep[gone] = False
        return Flat(Rows.of(self.rows.layout, self.rows.content(np.flatnonzero(keep))))

    def replaced(self, at: np.ndarray, content: dict) -> "Flat":
        all_rows = self.rows.content(np.arange(self.rows.count))
        for name, part in content.items():
            all_rows[name][at] = part
        return Flat(Rows.of(self.rows.layout, all_rows))


class Index:
    """One state of rows, which a change replaces by the next and a search looks at throughout.

    A kind of index says how vectors become content (`_input`, `_content`), what its rows stand for
    (`_decoded`) and how candidates are scored anew (`_scores`).
    """

    _kind = ""
    _options = ()  # arguments of the class, which are attributes and stand in files
    _by = ("store",)  # what `rescore` may go by
    _largest = True  # of the scores of rescoring

    def __init__(self, layout: Layout | None, state=None):
        self._layout = layout
        self._state = Flat(Rows.empty(layout)) if state is None else state
        self._writing = threading.Lock()

    # Copies and pickles carry the rows, and share nothing that a later change writes to.
    def __reduce__(self):
        return type(self).from_sections, self.to_sections()

    def _op(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"

    def _view(self):
        """A shallow copy of the index, fixed to its present state."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        return view

    # --- What a kind of index defines -------------------------------------------------------------

    def _input(self, name: str, array, what="vectors"):
        """`array`, checked for the method `name`; its length is that of the rows it stands for."""
        raise NotImplementedError

    def _content(self, given) -> dict:
        """What rows hold of an input, but for the ids."""
        raise NotImplementedError

    def _like(self, queries, result: np.ndarray):
        """`result` as the kind of the queries."""
        return like(queries, result)

    def _ready(self, name: str) -> None:
        """Raises where the method needs what is not there yet, such as training."""

    def _decoded(self, at: np.ndarray) -> np.ndarray:
        """(n, dim) float32: the vectors that the codes at these positions stand for."""
        raise NotImplementedError

    def _scores(self, rows: Rows, given, at: np.ndarray, by: str) -> np.ndarray:
        """float32 scores of the candidate positions (nq, c), the worst where one is -1."""
        raise NotImplementedError

    # --- Content ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._state.ids)

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64, rising, read-only."""
        return self._state.ids

    def _new_ids(self, name, ids, count: int, present: np.ndarray) -> np.ndarray:
        """Given ids, checked against those present, which rise; or the numbers after those."""
        if ids is None:
            last = int(present[-1]) if len(present) else -1
            if last + count >= 2**63:
                raise ValueError(f"[{self._op(name)}] no {count} ids are left after {last}")
            return last + np.arange(1, count + 1, dtype=np.int64)
        ids = check_ids(self._op(name), ids, count)
        taken = np.append(present, -1)[np.searchsorted(present, ids)] == ids
        if taken.any():
            raise ValueError(f"[{self._op(name)}] id {ids[taken][0]} is already in the index")
        return ids

    def _add(self, vectors, ids) -> None:
        self._ready("add")
        given = self._input("add", vectors)
        with self._writing:
            new = self._new_ids("add", ids, len(given), self._state.ids)
            self._state = self._state.added(self._content(given) | {"ids": new})

    def remove(self, ids) -> int:
        """Remove rows by id; unknown ids are passed over. Returns how many were removed."""
        ids = check_ids(self._op("remove"), ids)
        with self._writing:
            gone = self._state.find(ids)
            gone = gone[gone >= 0]
            if len(gone):
                self._state = self._state.without(gone)
            return len(gone)

    def update(self, ids, vectors) -> None:
        """Replace the rows of `ids`, which must be present, by `vectors`, as `add` takes them.

        Raises
        ------
        ValueError, TypeError
            The index is unchanged.
        """
        self._ready("update")
        given = self._input("update", vectors)
        ids = check_ids(self._op("update"), ids, len(given))
        with self._writing:
            at = self._known("update", self._state, ids)
            self._state = self._state.replaced(at, self._content(given) | {"ids": ids})

    def _known(self, name, state, ids):
        at = state.find(ids)
        if (at < 0).any():
            raise ValueError(f"[{self._op(name)}] id {ids[at < 0][0]} is not in the index")
        return at

    def _reconstruct(self, ids) -> np.ndarray:
        view = self._view()
        ids = check_ids(view._op("reconstruct"), ids, unique=False)
        at = view._known("reconstruct", view._state, ids)
        rows = view._state.rows
        return rows.vectors(at) if "vectors" in rows.columns else view._decoded(at)

    def _codes(self, ids) -> np.ndarray:
        state = self._state
        if ids is None:
            return state.rows.codes(state.everywhere())
        ids = check_ids(self._op("codes"), ids, unique=False)
        return state.rows.codes(self._known("codes", state, ids))

    # --- Search -----------------------------------------------------------------------------------

    def _mask(self, name: str, keep):
        """`filter` of a search as a mask over the rows: given over the rising ids, or as ids."""
        if keep is None:
            return None
        state, keep = self._state, np.asarray(plain(self._op(name), keep))
        if keep.dtype == np.bool_:
            if keep.shape != state.ids.shape:
                raise ValueError(
                    f"[{self._op(name)}] filter has shape {keep.shape}, expected {state.ids.shape}"
                )
            return state.spread(keep)
        at = state.find(check_ids(self._op(name), present_ids(keep)))
        mask = np.zeros(state.rows.count, np.bool_)
        mask[at[at >= 0]] = True
        return mask

    def _radius(self, radius) -> float:
        op = self._op("range_search")
        try:
            radius = float(radius)
        except (TypeError, ValueError):
            raise TypeError(f"[{op}] radius is {radius!r}, expected a number") from None
        if np.isnan(radius):
            raise ValueError(f"[{op}] radius is NaN")
        return radius

    def _rescored_by(self, op: str, rescore):
        """What the `rescore` of a search goes by; the type that is stored means "store" too."""
        if rescore is None:
            return None
        check_choice(op, "rescore", rescore, dict.fromkeys((*self._by, *STORES[1:])))
        if rescore in self._by and rescore != "store":
            return rescore
        if self.store is None:
            raise ValueError(f"[{op}] rescore={rescore!r} but the index was made with store=None")
        if rescore not in ("store", self.store):
            raise ValueError(f"[{op}] rescore={rescore!r} but the index stores {self.store}")
        return "store"

    def _best(self, given, found: np.ndarray, by: str, k: int):
        """(scores, ids): the k best of the candidate ids (nq, c), scored anew."""
        at = self._state.find(found)
        scores = self._scores(self._state.rows, given, at, by)
        return best_scores(scores, np.where(at >= 0, found, -1), k, largest=self._largest)

    def _rescore(self, queries, ids, by) -> SearchResult:
        view = self._view()
        op = view._op("rescore")
        view._ready("rescore")
        check_choice(op, "by", by, view._by)
        if by == "store" and view.store is None:
            raise ValueError(f"[{op}] by='store' but the index was made with store=None")
        given = view._input("rescore", queries, "queries")
        candidates = np.asarray(plain(op, ids))
        if candidates.dtype != np.int64:
            raise TypeError(f"[{op}] ids have dtype {candidates.dtype}, expected int64")
        if candidates.ndim != 2 or len(candidates) != len(given):
            raise ValueError(
                f"[{op}] ids have shape {candidates.shape}, expected ({len(given)}, c)"
            )
        scores, found = view._best(given, candidates, by, candidates.shape[1])
        return SearchResult(view._like(queries, scores), view._like(queries, found))

    # --- On a device ------------------------------------------------------------------------------

    def to(self, device):
        """The present rows, in the memory of a CUDA device, to be searched there.

        Parameters
        ----------
        device : str or torch.device
            "cuda", "cuda:1"; for "cpu" the index itself.

        Returns
        -------
        An index on the device
            It has `search`, `range_search` and `rescore` of this one, with the same arguments and
            results, as tensors on the device; `ids`, `device` and a length. It never changes: later
            changes of this index do not reach it.

            Its searches put their work on the current stream and do not wait for it, but for
            `range_search`, which needs the number of hits. So what only the values could tell is
            not refused: NaNs in queries, or ids that are unknown.

        Raises
        ------
        DeviceError
            Without such a device, or where this kind of index has no kernels for one.
        """
        from pentad._device_index import cuda_device

        device = cuda_device(self._op("to"), device)
        return self if device is None else self._view()._on_device(device)

    def _on_device(self, device):
        raise DeviceError(
            f"[{self._op('to')}] there are no CUDA kernels for this kind of index, only CPU ones"
        )

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

    def to_sections(self):
        """(meta, arrays) for a file that embeds this index; see `from_sections`.

        The arrays are the index's own: an `add` before they are written may change the last block.
        """
        raise NotImplementedError

    @classmethod
    def from_sections(cls, meta: dict, arrays: dict):
        """Rebuild an index from `to_sections`; the arrays are used as they are.

        Raises
        ------
        FormatError
            If they do not fit each other.
        """
        raise NotImplementedError

    def _meta(self) -> dict:
        return {name: getattr(self, name) for name in self._options}

    @classmethod
    def _made(cls, meta: dict):
        """The empty index that `meta` describes."""
        try:
            return cls(**{name: meta[name] for name in cls._options})
        except (KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise FormatError(f"the description of the index is malformed: {error!r}") from error


def check_rising(ids: np.ndarray) -> None:
    """Raises FormatError unless the ids of a file are not negative and rise."""
    if (np.diff(ids) <= 0).any() or (ids[:1] < 0).any():
        raise FormatError("the ids of the index are negative or not in rising order")
