# SPDX-License-Identifier: Apache-2.0
"""The operator of `topk_adc` and its shape function."""

import torch

from pentad._arrays import to_numpy
from pentad._ops import define
from pentad.pq import adc_search


def _topk_adc(queries, codes, codebooks, k, metric, mask):
    arrays = (None if x is None else to_numpy(x) for x in (queries, codes, codebooks, mask))
    queries, codes, codebooks, mask = arrays
    found = adc_search.search(queries, codes, codebooks, k, metric, mask)
    return tuple(torch.from_numpy(part) for part in found)


def _empty(queries, codes, codebooks, k, metric, mask):
    shape = (queries.shape[0], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


topk_adc_op = define(
    "pq_topk_adc(Tensor queries, Tensor codes, Tensor codebooks, SymInt k, str metric, "
    "Tensor? mask) -> (Tensor, Tensor)",
    _topk_adc,
    _empty,
)
