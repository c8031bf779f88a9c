# SPDX-License-Identifier: Apache-2.0
"""Sparse vectors: scores with gradients, the SPLADE head, sparse codes, and an inverted index."""

from pentad.sparse.bm25 import Bm25, bm25
from pentad.sparse.decode import sparse_decode
from pentad.sparse.densify import Densified, gated_inner_product, sliced_densify
from pentad.sparse.index import SparseIndex
from pentad.sparse.losses import flops_loss, l1_loss
from pentad.sparse.multi import score_multi, stack_buckets
from pentad.sparse.pursuit import MatchingPursuit, matching_pursuit
from pentad.sparse.score import score
from pentad.sparse.splade import splade_head
from pentad.sparse.topk import SparseCodes, topk_codes, topk_sparsify

__all__ = [
    "Bm25",
    "Densified",
    "MatchingPursuit",
    "SparseCodes",
    "SparseIndex",
    "bm25",
    "flops_loss",
    "gated_inner_product",
    "l1_loss",
    "matching_pursuit",
    "score",
    "score_multi",
    "sliced_densify",
    "sparse_decode",
    "splade_head",
    "stack_buckets",
    "topk_codes",
    "topk_sparsify",
]
