# SPDX-License-Identifier: Apache-2.0
"""Random codes and what a search in them must find, by matrix products of +-1.

This brute force shares nothing with the kernels that are measured against it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def random_codes(rows: int, bits: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, bits // 8), dtype=np.uint8)


def signs(codes: np.ndarray) -> np.ndarray:
    """+-1 in float32, (rows, bits)."""
    return np.unpackbits(codes, axis=1).astype(np.float32) * 2 - 1


def distance_blocks(
    queries: np.ndarray, codes: np.ndarray, rows: int = 16384
) -> Iterator[tuple[int, np.ndarray]]:
    """(first code, Hamming distances of all queries to a block of codes), by matrix products."""
    query_signs = signs(queries)
    bits = query_signs.shape[1]
    for start in range(0, len(codes), rows):
        products = query_signs @ signs(codes[start : start + rows]).T
        yield start, ((bits - products) / 2).astype(np.int64)


def nearest(
    queries: np.ndarray, codes: np.ndarray, k: int, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (int32) and ids of the k nearest codes, ties by the smaller id."""
    best = np.empty((len(queries), 0), dtype=np.int64)
    for start, distances in distance_blocks(queries, codes):
        ids = np.arange(start, start + distances.shape[1])
        keys = distances << 32 | ids
        if mask is not None:
            keys = keys[:, mask[ids]]
        best = np.concatenate([best, keys], axis=1)
        best = np.partition(best, min(k, best.shape[1]) - 1, axis=1)[:, :k]
    best.sort(axis=1)
    return (best >> 32).astype(np.int32), best & 0xFFFFFFFF
