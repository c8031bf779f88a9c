# SPDX-License-Identifier: Apache-2.0
"""The native search over product-quantized codes: numpy arrays in, numpy arrays out.

Names, arguments and results are those of the definition in `pentad.pq.scan_reference`; the
mathematics, layout and method stand in ``csrc/pq/code_scan.h``.
"""

import numpy as np

from pentad import _C
from pentad.pq.scan_reference import Ranges

BLOCK = _C.pq_block_rows


def block_shape(M: int, nbits: int) -> tuple:
    return _C.pq_block_shape(M, nbits)


def to_blocks(codes: np.ndarray, nbits: int, first: int, blocks: np.ndarray) -> None:
    _C.pq_to_blocks(codes, nbits, first, blocks)


def from_blocks(blocks, nbits: int, M: int, rows: int, positions: np.ndarray) -> np.ndarray:
    out = np.empty((len(positions), M), np.uint8)
    _C.pq_from_blocks(blocks, nbits, M, rows, positions, out)
    return out


def tables(queries: np.ndarray, codebooks: np.ndarray, metric: str) -> np.ndarray:
    out = np.empty((len(queries), *codebooks.shape[:2]), np.float32)
    _C.pq_score_tables(queries, codebooks, metric, out)
    return out if metric == "l2" else np.negative(out, out=out)


def _where(tables, offsets, blocks, nbits, M, rows, factors, mask, ids, lists):
    scale, bias = (None, None) if factors is None else factors
    return (tables, offsets, blocks, nbits, M, rows, scale, bias, mask, ids, *(lists or [None] * 5))


def topk(tables, offsets, blocks, nbits, M, rows, factors, mask, ids, k, lists=None):
    count = len(tables) if lists is None else len(lists.offsets) - 1
    values, found = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
    where = _where(tables, offsets, blocks, nbits, M, rows, factors, mask, ids, lists)
    _C.pq_topk(*where, values, found)
    return values, found


def range_search(tables, offsets, blocks, nbits, M, rows, factors, mask, ids, radius, lists=None):
    count = len(tables) if lists is None else len(lists.offsets) - 1
    where = _where(tables, offsets, blocks, nbits, M, rows, factors, mask, ids, lists)
    result = _C.pq_range(*where, radius)
    indptr, values = np.empty(count + 1, np.int64), np.empty(result.total, np.float32)
    found = np.empty(result.total, np.int64)
    result.write(indptr, values, found)
    return indptr, values, found


__all__ = [
    "BLOCK",
    "Ranges",
    "block_shape",
    "from_blocks",
    "range_search",
    "tables",
    "to_blocks",
    "topk",
]
