# SPDX-License-Identifier: Apache-2.0
"""What the tests of the binary indexes share: making them, vectors that stores keep, answers."""

import numpy as np
from cases import codes

from pentad.hamming import BinaryIndex, BinaryIVFIndex, reference

STORES = (None, "int8", "float16")
CLASSES = (BinaryIndex, BinaryIVFIndex)


def make(cls, dim, *, rng=None, lists=5, **options):
    """An empty index, trained and exhaustive where it is an inverted one."""
    if cls is BinaryIndex:
        return BinaryIndex(dim, **options)
    index = BinaryIVFIndex(dim, lists, nprobe=lists, **options)
    index.train(codes(rng or np.random.default_rng(5), 40, dim))
    return index


def whole_vectors(rng, n, dim):
    """Vectors that int8 and float16 keep exactly: integers with 127 as the largest."""
    vectors = rng.integers(-5, 6, (n, dim)).astype(np.float32)
    vectors[:, 0] = np.where(rng.random(n) < 0.5, 127, -127)
    return vectors


def expected_search(ids, rows, queries, k, metric, keep=None):
    values, at = reference.topk(queries, rows, k, metric, keep)
    return values, np.where(at >= 0, ids[np.maximum(at, 0)] if len(ids) else -1, -1)


def expected_range(ids, rows, queries, radius, metric, keep=None):
    indptr, values, at = reference.range_search(queries, rows, radius, metric, keep)
    return indptr, values, ids[at]
