# SPDX-License-Identifier: Apache-2.0
"""The rows of an index of product-quantized codes: their blocks, and the search over them."""

import math

import numpy as np

from pentad import _C
from pentad._errors import FormatError
from pentad._rows import Layout, Rows, stored_columns
from pentad.pq import _scan

FACTORS = ("code_scale", "code_bias")
_FINITE = float(np.finfo(np.float32).max)


class CodeLayout(Layout):
    """Blocks of 64 rows, see csrc/pq/code_scan.h, and which of the `FACTORS` each row has."""

    block = _scan.BLOCK

    def __init__(self, dim: int, M: int, nbits: int, store, factors: tuple = ()):
        self.M, self.nbits = M, nbits
        self.blocks = (_scan.block_shape(M, nbits), "uint8")
        self.columns = {"ids": ((), "int64")} | stored_columns(dim, store)
        self.columns |= {name: ((), "float32") for name in factors}

    def write(self, rows: Rows, first: int, codes: np.ndarray) -> None:
        _scan.to_blocks(codes, self.nbits, first, rows.blocks)

    def read(self, rows: Rows, positions: np.ndarray) -> np.ndarray:
        return _scan.from_blocks(rows.blocks, self.nbits, self.M, rows.count, positions)

    def check(self, rows: Rows) -> None:
        """Raises FormatError for codes beyond the codebooks, and factors that are none."""
        if self.nbits == 6 and (rows.blocks >= 64).any():
            raise FormatError("the codes of the index exceed 6 bits")
        scale, bias = (rows.used(name) for name in FACTORS)
        if (scale is not None and (scale < 0).any()) or not all(
            np.isfinite(part).all() for part in (scale, bias) if part is not None
        ):
            raise FormatError("the factors of the index are negative or not finite")


def _where(rows: Rows, tables, mask):
    layout = rows.layout
    # Factors are of all subspaces: a search by the first ones goes without.
    factors = tuple(rows.used(name) for name in FACTORS)
    if factors[1] is None or tables.shape[1] < layout.M:
        factors = None
    blocks, count = rows.blocks, rows.count
    return tables, None, blocks, layout.nbits, layout.M, count, factors, mask, rows.ids


def topk(rows: Rows, tables, k, mask, ranges=None):
    """(costs, ids) of the k rows of least (cost, id)."""
    return _scan.topk(*_where(rows, tables, mask), k, ranges)


def range_search(rows: Rows, tables, radius: float, mask, ranges=None):
    """(indptr, costs, ids) of the rows of cost <= radius, ids rising per query."""
    limit = np.clip(radius, -_FINITE, _FINITE) if math.isfinite(radius) else radius
    limit = np.float32(limit)
    if float(limit) > radius:  # no float32 lies between the two
        with np.errstate(over="ignore"):
            limit = np.nextafter(limit, np.float32(-np.inf))
    return _scan.range_search(*_where(rows, tables, mask), float(limit), ranges)


def rescore(rows: Rows, x, positions, l2: bool):
    """(nq, c) float32 squared distances, or inner products, of x with the stored vectors.

    Infinitely bad where a position is -1.
    """
    out = np.empty(positions.shape, np.float32)
    _C.pq_rescore(x, rows.used("vectors"), rows.used("scale"), positions, l2, out)
    return out
