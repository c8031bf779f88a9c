# SPDX-License-Identifier: Apache-2.0
"""The definition of the search over product-quantized codes, in numpy (csrc/pq/code_scan.h).

The cost of a row with codes c under the tables T (M, K) of a query is, each operation rounded to
float32 and in this order,

    ((offset + T[0, c_0]) + T[1, c_1]) + ...        bias + scale * (that) where rows have factors

and -0 counts as 0. Less is better, ties go to the smaller id. These functions are slow and say what
is right; they have the names and arguments of those in `pentad.pq._scan`.
"""

from typing import NamedTuple

import numpy as np

BLOCK = 64


class Ranges(NamedTuple):
    """What each query visits: the rows of the ranges [offsets[q], offsets[q + 1]).

    offsets : (nq + 1,) int64
    begin, end : (R,) int64, `begin` on a border of blocks
    table : (R,) int64, the row of the tables that the range is searched by, or None: the query's
    offset : (R,) float32 or None: 0
    """

    offsets: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    table: np.ndarray | None = None
    offset: np.ndarray | None = None


# --- Codes in blocks ------------------------------------------------------------------------------


def block_shape(M: int, nbits: int) -> tuple:
    """Of the bytes of 64 rows: of 4 bits, byte j of group g holds subspaces 8g + j and 8g + 4 + j,
    the latter in its high half."""
    return (-(-M // 8), BLOCK, 4) if nbits == 4 else (M, BLOCK)


def to_blocks(codes: np.ndarray, nbits: int, first: int, blocks: np.ndarray) -> None:
    """Write codes (n, M) to rows [first, first + n)."""
    M = codes.shape[1]
    row = np.arange(first, first + len(codes))[:, None]
    m = np.arange(M)
    if nbits != 4:
        blocks[row // BLOCK, m, row % BLOCK] = codes
        return
    for half, keep, shift in ((m[m % 8 < 4], 0xF0, 0), (m[m % 8 >= 4], 0x0F, 4)):
        at = (row // BLOCK, half // 8, row % BLOCK, half % 4)
        blocks[at] = (blocks[at] & keep) | (codes[:, half] << shift)


def from_blocks(blocks, nbits: int, M: int, rows: int, positions: np.ndarray) -> np.ndarray:
    """The codes (p, M) of the rows at `positions`, all below `rows`."""
    row, m = positions[:, None], np.arange(M)
    if len(positions) and not 0 <= positions.min() <= positions.max() < rows:
        raise ValueError(f"[pq.from_blocks] a position is not below {rows}")
    if nbits != 4:
        return blocks[row // BLOCK, m, row % BLOCK]
    byte = blocks[row // BLOCK, m // 8, row % BLOCK, m % 4]
    return (byte >> np.where(m % 8 < 4, 0, 4).astype(np.uint8)) & 15


# --- Costs ----------------------------------------------------------------------------------------


def tables(queries: np.ndarray, codebooks: np.ndarray, metric: str) -> np.ndarray:
    """(nq, M, K) float32: squared distances, or negated inner products, of the parts of a query.

    Each is the rounding of a double sum over rising columns.
    """
    M, K, dsub = codebooks.shape
    parts = queries.reshape(len(queries), M, 1, dsub).astype(np.float64)
    words = codebooks.astype(np.float64)
    total = np.zeros((len(queries), M, K))
    for j in range(dsub):
        x, w = parts[..., j], words[..., j]
        total += (x - w) ** 2 if metric == "l2" else x * w
    return (total if metric == "l2" else -total).astype(np.float32)


def costs(tables, codes, offset=None, factors=None) -> np.ndarray:
    """(nq, n) float32 costs of codes (n, >= M) under tables (nq, M, K)."""
    total = np.zeros((len(tables), len(codes)), np.float32)
    if offset is not None:
        total += np.asarray(offset, np.float32).reshape(-1, 1)
    for m in range(tables.shape[1]):
        total += tables[:, m, codes[:, m]]
    if factors is not None:
        scale, bias = factors
        total = (total if scale is None else scale * total) + bias
    return total + np.float32(0)  # which makes 0 of -0


# --- Search ---------------------------------------------------------------------------------------


def _visits(tables, offsets, blocks, nbits, M, rows, factors, mask, ids, lists):
    """Per query: the costs and ids of the rows that it visits and that the mask allows."""
    codes = from_blocks(blocks, nbits, M, rows, np.arange(rows))
    ids = np.arange(rows) if ids is None else ids
    allowed = np.ones(rows, bool) if mask is None else mask
    everything = Ranges(np.arange(len(tables) + 1), np.zeros(len(tables), np.int64),
                        np.full(len(tables), rows), None, offsets)  # fmt: skip
    where = everything if lists is None else lists
    for q in range(len(where.offsets) - 1):
        values, found = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
        for r in range(where.offsets[q], where.offsets[q + 1]):
            at = np.arange(where.begin[r], where.end[r])
            at = at[allowed[at]]
            table = q if where.table is None else where.table[r]
            offset = None if where.offset is None else where.offset[r]
            parts = None if factors is None else [f if f is None else f[at] for f in factors]
            values.append(costs(tables[table : table + 1], codes[at], offset, parts)[0])
            found.append(ids[at])
        yield np.concatenate(values), np.concatenate(found)


def topk(tables, offsets, blocks, nbits, M, rows, factors, mask, ids, k, lists=None):
    """(values (nq, k) float32, found (nq, k) int64): the k smallest (cost, id); then +inf and -1.

    Parameters
    ----------
    tables : (nq, M', K) float32
        M' <= M searches by the first M' subspaces. With ``lists.table``, any number of them.
    offsets : (nq,) float32 or None
        Without `lists`.
    blocks, nbits, M, rows
        The codes.
    factors : (scale, bias) or None
        Of each row, (rows,) float32; the scale not negative, or None for 1.
    mask : (rows,) bool or None
    ids : (rows,) int64 or None: the positions
    lists : Ranges, optional
    """
    count = len(tables) if lists is None else len(lists.offsets) - 1
    values = np.full((count, k), np.inf, np.float32)
    found = np.full((count, k), -1, np.int64)
    visits = _visits(tables, offsets, blocks, nbits, M, rows, factors, mask, ids, lists)
    for q, (cost, at) in enumerate(visits):
        best = np.lexsort((at, cost))[:k]
        values[q, : len(best)], found[q, : len(best)] = cost[best], at[best]
    return values, found


def range_search(tables, offsets, blocks, nbits, M, rows, factors, mask, ids, radius, lists=None):
    """(indptr, values, ids) of the rows of cost <= radius, ids rising in each query's part."""
    parts = []
    for cost, at in _visits(tables, offsets, blocks, nbits, M, rows, factors, mask, ids, lists):
        near = np.flatnonzero(cost <= radius)
        near = near[np.argsort(at[near], kind="stable")]
        parts.append((cost[near], at[near]))
    indptr = np.cumsum([0, *(len(cost) for cost, _ in parts)])
    values = np.concatenate([np.zeros(0, np.float32), *(cost for cost, _ in parts)])
    return indptr, values, np.concatenate([np.zeros(0, np.int64), *(at for _, at in parts)])
