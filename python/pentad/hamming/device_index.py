# SPDX-License-Identifier: Apache-2.0
"""Search over binary codes that lie on a CUDA device: all of them, or some lists."""

import numpy as np
import torch

from pentad import _C
from pentad._checks import check_count
from pentad._device_index import DeviceIndex
from pentad._errors import DeviceError
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


class DeviceCodeIndex(DeviceIndex):
    """Codes and stored vectors in some order of the rows; `_at` finds those of ids' ranks.

    Padding bits of query codes are taken as zero. NaNs in queries clear their bits, and where rows
    are ordered by scores, come first.
    """

    def __init__(self, index, device, order=None):
        super().__init__(index, device)
        state = index._state
        everywhere = state.everywhere() if order is None else state.everywhere()[order]
        codes = state.rows.codes(everywhere)
        self._bytes = codes.shape[1]
        wide = -(-self._bytes // _PIECE) * _PIECE
        self._pad = wide - self._bytes if wide <= _C.hamming_max_bytes else 0
        self._codes = self._there(np.pad(codes, ((0, 0), (0, self._pad))))
        columns = [state.rows.used(name) for name in ("vectors", "scale")]
        self._stored = [None if c is None else self._there(c[everywhere]) for c in columns]
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
        return _Input(self._padded(codes), floats)

    def _padded(self, codes):
        return torch.nn.functional.pad(codes, (0, self._pad))

    def _at(self, ranks):
        return ranks

    def _scores(self, given, ranks, by):
        at = self._at(ranks)
        if by == "bits":
            return _kernels.score_candidates(given.floats, self._codes[:, : self._bytes], at)
        return _kernels.dot_candidates(given.floats, *self._stored, at)

    def _search(self, queries, k, filter, rescore, oversample, topk) -> SearchResult:
        """The k best by ``topk(codes, candidates, mask)``: (values, ranks of ids)."""
        op = self._op("search")
        k = check_count(op, "k", k)
        by = self._empty._rescored_by(op, rescore)
        oversample = check_count(op, "oversample", oversample, 1)
        given = self._input("search", queries)
        if by is not None and given.floats is None:
            raise TypeError(f"[{op}] rescoring takes float queries, not codes")
        candidates = k if by is None else min(k * oversample, len(self))
        values, ranks = topk(given.codes, candidates, self._mask(op, filter))
        if by is None:
            return SearchResult(values, self._ids_at(ranks))
        return self._best(given, ranks, by, k)


class DeviceBinaryIndex(DeviceCodeIndex):
    """What `BinaryIndex.to` returns."""

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

        def topk(codes, k, mask):
            return functional.topk(codes, self._codes, k, metric=self._empty.metric, mask=mask)

        return self._search(queries, k, filter, rescore, oversample, topk)

    def range_search(self, queries, radius, *, filter=None):
        """Every row within `radius`, inclusive: (indptr, scores, ids), ids rising per query."""
        op, metric = self._op("range_search"), self._empty.metric
        radius = self._empty._radius(radius)
        codes, mask = self._input("range_search", queries).codes, self._mask(op, filter)
        indptr, values, at = functional.range_search(
            codes, self._codes, radius, metric=metric, mask=mask
        )
        return indptr, values, self._ids_at(at)


class DeviceBinaryIVFIndex(DeviceCodeIndex):
    """What `BinaryIVFIndex.to` returns: rows list by list, each list in the order of ids."""

    def __init__(self, index, device):
        state = index._state
        home = state.home(state.everywhere())
        order = np.argsort(home, kind="stable")
        super().__init__(index, device, order)
        self._ids_of = self._there(order)
        self._place = self._there(np.argsort(order))
        self._borders = self._there(np.concatenate([[0], np.cumsum(state.sizes)]))
        self._centroids = self._padded(self._there(index.centroids))

    def _at(self, ranks):
        return torch.where(ranks >= 0, self._place[ranks.clamp(min=0)], -1) if len(self) else ranks

    def search(
        self, queries, k, *, filter=None, rescore=None, oversample=4, nprobe=None
    ) -> SearchResult:
        """The k best rows of the visited lists, as `BinaryIVFIndex.search` has them."""
        nprobe = self._empty._probes("search", nprobe)

        def topk(codes, k, mask):
            probes = functional.topk(codes, self._centroids, nprobe)[1]
            lists = self._borders, self._ids_of
            return _kernels.topk_lists(
                codes, self._codes, k, self._empty.metric, mask, probes, *lists
            )

        return self._search(queries, k, filter, rescore, oversample, topk)

    def range_search(self, queries, radius, *, filter=None, nprobe=None):
        """Not on a device: there is no kernel for the ranges of lists."""
        raise DeviceError(
            f"[{self._op('range_search')}] there is no CUDA kernel for this, only a CPU one"
        )


__all__ = ["DeviceBinaryIVFIndex", "DeviceBinaryIndex"]
