# SPDX-License-Identifier: Apache-2.0
"""What every index of the package returns and how it takes ids."""

from typing import Any, NamedTuple

import numpy as np


class SearchResult(NamedTuple):
    """The k best of each query, best first; ids are -1 where fewer than k exist.

    scores : (nq, k), larger or smaller is better as the index's metric says
    ids : (nq, k) int64
    """

    scores: Any
    ids: Any


def check_ids(op: str, ids, count: int | None = None, *, unique: bool = True) -> np.ndarray:
    """`ids` as a contiguous int64 array: 1-D, not negative, without duplicates, `count` of them."""
    array = np.asarray(ids)
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
