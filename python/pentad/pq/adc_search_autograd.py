# SPDX-License-Identifier: Apache-2.0
"""The operator of `topk_adc` and its shape function."""

import math

import torch

from pentad._arrays import to_numpy
from pentad._ops import define
from pentad.pq import adc_search
from pentad.pq.adc import adc

_CHUNK = 1 << 24  # scores at a time on a device


def _topk_adc(queries, codes, codebooks, k, metric, mask):
    if queries.is_cuda:
        return by_parts(queries, codes, codebooks, k, metric, mask)
    arrays = (None if x is None else to_numpy(x) for x in (queries, codes, codebooks, mask))
    queries, codes, codebooks, mask = arrays
    found = adc_search.search(queries, codes, codebooks, k, metric, mask)
    return tuple(torch.from_numpy(part) for part in found)


def by_parts(queries, codes, codebooks, k, metric, mask, chunk=_CHUNK):
    """Of tensors on any device: scores of a part of the rows, sorted together with the best yet."""
    device, worst = queries.device, math.inf if metric == "l2" else -math.inf
    best = torch.full((len(queries), k), worst, device=device)
    ids = torch.full((len(queries), k), -1, dtype=torch.int64, device=device)
    step = max(1, chunk // max(len(queries), 1))
    for first in range(0, len(codes), step):
        part = slice(first, first + step)
        scores = adc(queries, codes[part], codebooks, metric=metric) + 0.0  # no -0
        lost = scores.isnan() if mask is None else scores.isnan() | ~mask[part]
        rows = torch.arange(first, first + scores.shape[1], device=device).expand_as(scores)
        both = torch.cat([best, scores.masked_fill(lost, worst)], 1)
        named = torch.cat([ids, rows.masked_fill(lost, -1)], 1)
        # Rows rise over the parts, so a stable order is that of (score, id).
        both, order = torch.sort(both, dim=1, descending=metric != "l2", stable=True)
        best, ids = both[:, :k], named.gather(1, order)[:, :k]
    return best.contiguous(), ids.contiguous()


def _empty(queries, codes, codebooks, k, metric, mask):
    shape = (queries.shape[0], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


topk_adc_op = define(
    "pq_topk_adc(Tensor queries, Tensor codes, Tensor codebooks, SymInt k, str metric, "
    "Tensor? mask) -> (Tensor, Tensor)",
    _topk_adc,
    _empty,
    cuda=True,
)
