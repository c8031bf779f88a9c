# SPDX-License-Identifier: Apache-2.0
"""Exact search over sparse documents that lie on a CUDA device."""

from typing import Any, NamedTuple

import torch

from pentad import _C
from pentad._arrays import on_device
from pentad._checks import check_count
from pentad._device_index import DeviceIndex
from pentad._errors import DeviceError
from pentad._index import SearchResult
from pentad.sparse._csr import parts_of
from pentad.sparse.score_device import checked

WINDOW = _C.sparse_device_window
MOST_HITS = _C.sparse_device_most_hits
_HELD = 1 << 28  # bytes of hits at a time


class _Lists(NamedTuple):
    """Inverted lists by windows of documents, as ``csrc/sparse/search_cuda.h`` has them."""

    windows: Any
    list_terms: Any
    starts: Any
    places: Any
    values: Any


class DeviceSparseIndex(DeviceIndex):
    """What `SparseIndex.to` returns: 6 bytes on the device for each entry of a document.

    Queries are checked as on the CPU; the host waits for the flags that this ends in, unless a
    graph is captured. `range_search` and `rescore` have no kernels yet.
    """

    def __init__(self, index, device):
        super().__init__(index, device)
        self.vocab_size = index.vocab_size
        rows = index._state.rows
        indptr, terms = (self._there(a) for a in rows.forward()[:2])
        values = self._there(rows.decoded())
        document = torch.repeat_interleave(indptr.diff(), output_size=len(terms))
        key = document // WINDOW * self.vocab_size + terms
        key, order = torch.sort(key, stable=True)
        lists, sizes = torch.unique_consecutive(key, return_counts=True)
        starts = torch.zeros(len(lists) + 1, dtype=torch.int64, device=self.device)
        starts[1:] = sizes.cumsum(0)
        windows = torch.arange(-(-len(self) // WINDOW) + 1, device=self.device)
        self._lists = _Lists(
            torch.searchsorted(lists, windows * self.vocab_size),
            (lists % self.vocab_size).int(),
            starts,
            (document[order] % WINDOW).to(torch.int16),
            values[order],
        )

    def search(self, queries, k, *, filter=None, exact=True) -> SearchResult:
        """The k best documents of each query, as `SparseIndex.search` has them.

        Parameters
        ----------
        queries : (nq, vocab_size) sparse tensor on the device, or a tuple of tensors there
        k : int
            At most 2048.
        filter : (n,) bool, or a list of ids, optional
            A tensor on the device, or what has to be brought there.
        exact : bool
            Searches on a device are exact in either case.

        Returns
        -------
        SearchResult
            Tensors on the device.
        """
        op = self._op("search")
        k = check_count(op, "k", k)
        if k > MOST_HITS:
            raise ValueError(f"[{op}] k is {k}, expected at most {MOST_HITS} on a device")
        parts = parts_of(op, "queries", queries)
        self._here(op, "queries", parts.values)
        if parts.columns not in (None, self.vocab_size):
            raise ValueError(
                f"[{op}] queries has {parts.columns} columns, expected {self.vocab_size}"
            )
        given = checked(op, "queries", *parts[:3], self.vocab_size)
        mask = self._mask(op, filter)
        mask = None if mask is None else mask.contiguous()
        nq, n = len(given.indptr) - 1, len(self)
        scores = torch.empty((nq, k), dtype=torch.float32, device=self.device)
        at = torch.empty((nq, k), dtype=torch.int64, device=self.device)
        step = max(1, _HELD // max(1, _C.sparse_search_scratch(1, n, k)))
        for first in range(0, nq, step):
            some = slice(first, min(first + step, nq))
            count = some.stop - first
            indptr = given.indptr[first : some.stop + 1].contiguous()
            scratch = on_device(scores, _C.sparse_search_scratch, count, n, k)
            _C.sparse_search_cuda(
                *self._lists, n, indptr, *given[1:3], mask, scores[some], at[some], *scratch
            )
        return SearchResult(scores, self._ids_at(at))

    def range_search(self, queries, radius, *, filter=None):
        raise DeviceError(f"[{self._op('range_search')}] there is no CUDA kernel, only a CPU one")

    def rescore(self, queries, ids, *, by="values"):
        raise DeviceError(f"[{self._op('rescore')}] there is no CUDA kernel, only a CPU one")


__all__ = ["DeviceSparseIndex"]
