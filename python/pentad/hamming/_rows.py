# SPDX-License-Identifier: Apache-2.0
"""The rows of an index of binary codes: their blocks, and the search over them."""

import numpy as np

from pentad import _C
from pentad._rows import Layout, Rows, stored_columns
from pentad.hamming import _kernels


class CodeLayout(Layout):
    """Blocks (words, 32) uint16, see csrc/hamming/hamming.h; for jaccard also the popcounts."""

    block = _C.hamming_block_rows

    def __init__(self, dim: int, metric: str, store):
        self.bytes = -(-dim // 8)
        self.metric = metric
        self.blocks = ((_C.hamming_words(self.bytes), self.block), "uint16")
        ones = {"ones": ((), "uint16")} if metric == "jaccard" else {}
        self.columns = ones | {"ids": ((), "int64")} | stored_columns(dim, store)

    def write(self, rows: Rows, first: int, codes: np.ndarray) -> None:
        _C.hamming_to_blocks(codes, first, rows.blocks, rows.columns.get("ones"))

    def read(self, rows: Rows, positions: np.ndarray) -> np.ndarray:
        out = np.empty((len(positions), self.bytes), np.uint8)
        _C.hamming_from_blocks(rows.blocks, rows.count, positions, out)
        return out


def _where(rows: Rows, mask, ids, ranges):
    ids = rows.ids if ids else None
    ranges = ranges or (None, None, None)
    return (rows.blocks, rows.count, rows.used("ones"), mask, ids, *ranges)


def topk(rows: Rows, codes, k, mask=None, *, ids=False, ranges=None):
    """(values, positions), or with ids=True (values, ids); the order is (value, that)."""
    metric = rows.layout.metric
    values = np.empty((len(codes), k), _kernels.value_dtype(metric))
    found = np.empty((len(codes), k), np.int64)
    _C.hamming_topk(codes, *_where(rows, mask, ids, ranges), metric, values, found)
    return values, found


def range_search(rows: Rows, codes, radius, mask=None, *, ranges=None):
    """(indptr, values, ids), ids rising per query."""
    metric = rows.layout.metric
    found = _C.hamming_range(codes, *_where(rows, mask, True, ranges), metric, radius)
    return _kernels.write_range(codes, found, metric)


def scores(rows: Rows, x, positions, by: str) -> np.ndarray:
    """float32 scores of the candidate positions (nq, c); -inf where the position is -1."""
    out = np.empty(positions.shape, np.float32)
    if by == "bits":
        _C.hamming_score_candidates(x, rows.blocks, rows.count, positions, out)
    else:
        _C.hamming_dot_candidates(x, rows.used("vectors"), rows.used("scale"), positions, out)
    return out
