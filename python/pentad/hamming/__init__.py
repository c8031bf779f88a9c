# SPDX-License-Identifier: Apache-2.0
"""Binary codes: functions usable inside a model, and indexes."""

from pentad.hamming.functional import (
    binarize,
    distance,
    intersection,
    pack,
    range_search,
    score,
    topk,
    topk_score,
    unpack,
    weighted_sum,
)
from pentad.hamming.hyperdimensional import bind, bundle, permute
from pentad.hamming.index import BinaryIndex
from pentad.hamming.ivf import BinaryIVFIndex

__all__ = [
    "BinaryIVFIndex",
    "BinaryIndex",
    "binarize",
    "bind",
    "bundle",
    "distance",
    "intersection",
    "pack",
    "permute",
    "range_search",
    "score",
    "topk",
    "topk_score",
    "unpack",
    "weighted_sum",
]
