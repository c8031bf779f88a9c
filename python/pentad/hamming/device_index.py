# SPDX-License-Identifier: Apache-2.0
"""Exact search over binary codes that lie on a CUDA device."""

import numpy as np
import torch

from pentad import _C
from pentad._checks import check_count
from pentad._device_index import DeviceIndex
from pentad._index import SearchResult
from pentad.hamming import _kernels, functional
from pentad.hamming.index import check_vectors

_PIECE = 16  # bytes that a lane loads at once, where rows are multiples of them


class _Input:
    """Queries on the device: `codes` always, `floats` where floats were given."""

    def __init__(self, codes, floats):
        self.codes = codes
        self.floats = floats

    def __len__(self) -> int:
        return len(self.codes)


class DeviceBinaryIndex(DeviceIndex):
    """What `BinaryIndex.to` returns.

    Padding bits of query codes are taken as zero. NaNs in queries clear their bits, and where rows
    are ordered by scores, come first.
    """

    def __init__(self, index, device):
        super().__init__(index, device)
        codes = index.codes()
        self._bytes = codes.shape[1]
        wide = -(-self._bytes // _PIECE) * _PIECE
        self._pad = wide - self._bytes if wide <= _C.hamming_max_bytes else 0
        self._codes = self._there(np.pad(codes, ((0, 0), (0, self._pad))))
        used = index._state.rows.used
        self._stored = [
            None if part is None else self._there(part) for part in map(used, ("vectors", "scale"))
        ]
        padding = np.full(self._bytes, 255, np.uint8)
        padding[-1] = 255 << (-index.dim % 8) & 255
        self._bits = self._there(padding)

    def _input(self, name, queries):
        op = self._op(name)
        queries = self._here(op, "queries", queries)
        if check_vectors(op, queries, self._empty.dim, "queries"):
            if name == "rescore":
                raise TypeError(f"[{op}] rescoring takes float queries, not codes")
            codes, floats = queries & self._bits, None
        else:
            codes, floats = functional.pack(queries), queries.float()
        return _Input(torch.nn.functional.pad(codes, (0, self._pad)), floats)

    def _scores(self, given, at, by):
        if by == "bits":
            return _kernels.score_candidates(given.floats, self._codes[:, : self._bytes], at)
        return _kernels.dot_candidates(given.floats, *self._stored, at)

    def search(self, queries, k, *, filter=None, rescore=None, oversample=4) -> SearchResult:
        """The k best rows of each query, as `BinaryIndex.search` has them.

        Parameters
        ----------
        queries : (nq, dim) float or (nq, ceil(dim / 8)) uint8 tensor on the device
        k : int
        filter : (n,) bool, or a list of ids, optional
            A tensor on the device, or what has to be brought there.
        rescore, oversample
            As in `BinaryIndex.search`.

        Returns
        -------
        SearchResult
            Tensors on the device.
        """
        op = self._op("search")
        k = check_count(op, "k", k)
        by = self._empty._rescored_by(op, rescore)
        oversample = check_count(op, "oversample", oversample, 1)
        given = self._input("search", queries)
        if by is not None and given.floats is None:
            raise TypeError(f"[{op}] rescoring takes float queries, not codes")
        candidates = k if by is None else min(k * oversample, len(self))
        mask = self._mask(op, filter)
        metric = self._empty.metric
        values, at = functional.topk(given.codes, self._codes, candidates, metric=metric, mask=mask)
        if by is None:
            return SearchResult(values, self._ids_at(at))
        return self._best(given, at, by, k)

    def range_search(self, queries, radius, *, filter=None):
        """Every row within `radius`, inclusive: (indptr, scores, ids), ids rising per query."""
        op, metric = self._op("range_search"), self._empty.metric
        radius = self._empty._radius(radius)
        codes, mask = self._input("range_search", queries).codes, self._mask(op, filter)
        indptr, values, at = functional.range_search(
            codes, self._codes, radius, metric=metric, mask=mask
        )
        return indptr, values, self._ids_at(at)


__all__ = ["DeviceBinaryIndex"]
