# SPDX-License-Identifier: Apache-2.0
"""Allocate outputs and call the native kernels; for numpy arrays and tensors alike.

These are what the functions call for numpy and what the dispatcher calls for torch. Arguments have
been checked by the functions; the extension checks again whatever could harm memory.
"""

import functools
import math

import numpy as np

from pentad import _C
from pentad._arrays import empty_like, on_device, runs_cuda
from pentad._errors import DeviceError


def value_dtype(metric: str) -> str:
    return "float32" if metric == "jaccard" else "int32"


def pack(x, threshold):
    out = empty_like(x, (*x.shape[:-1], -(-x.shape[-1] // 8)), "uint8")
    _C.hamming_pack(x, threshold, out, *on_device(x))
    return out


def unpack(codes, dim, dtype):
    out = empty_like(codes, (*codes.shape[:-1], dim), str(dtype).removeprefix("torch."))
    _C.hamming_unpack(codes, dim, out, *on_device(codes))
    return out


def permute(codes, dim, shift):
    out = empty_like(codes, codes.shape, "uint8")
    _C.hamming_permute(codes, dim, shift, out, *on_device(codes))
    return out


def distance(a, b, metric):
    out = empty_like(a, (a.shape[0], b.shape[0]), value_dtype(metric))
    rows = a.shape[0], b.shape[0]
    _C.hamming_distance(a, b, metric, out, *on_device(a, _C.hamming_distance_scratch, *rows))
    return out


def topk(queries, codes, k, metric, mask):
    if _sorts(queries, k):
        return sorted_topk(queries, codes, k, metric, mask)
    shape = (queries.shape[0], k)
    values = empty_like(queries, shape, value_dtype(metric))
    ids = empty_like(queries, shape, "int64")
    if _lists(queries, k):
        device = on_device(queries, _C.hamming_topk_scratch, shape[0], codes.shape[0], k)
        _C.hamming_topk_cuda(queries, codes, mask, metric, values, ids, *device)
    else:
        _C.hamming_topk(queries, codes, -1, None, mask, None, None, None, None, metric, values, ids)
    return values, ids


def _lists(array, k) -> bool:
    """Whether a CUDA kernel runs, which keeps lists of k hits."""
    return runs_cuda(array) and k <= _C.hamming_cuda_max_k


def _sorts(array, k) -> bool:
    """Whether no list on the device holds k hits."""
    return runs_cuda(array) and k > _C.hamming_cuda_max_k and not isinstance(array, np.ndarray)


def topk_lists(queries, codes, k, metric, mask, probes, borders, ids_of):
    """`topk` of codes on a device, of the lists (nq, count) in `probes` alone.

    List l has the rows from ``borders[l]`` to ``borders[l + 1]``; what is returned, and what `mask`
    is over, are their numbers in `ids_of`.
    """
    if k > _C.hamming_cuda_max_k:
        raise DeviceError(
            f"[hamming.topk_lists] k is {k}, on a device a search of lists takes at most "
            f"{_C.hamming_cuda_max_k}"
        )
    nq, sizes = queries.shape[0], (probes.shape[1], codes.shape[0], borders.shape[0] - 1)
    values = empty_like(queries, (nq, k), value_dtype(metric))
    ids = empty_like(queries, (nq, k), "int64")
    device = on_device(queries, _C.hamming_topk_lists_scratch, nq, *sizes, k)
    lists = probes, borders, ids_of
    _C.hamming_topk_lists_cuda(queries, codes, *lists, mask, metric, values, ids, *device)
    return values, ids


def sorted_topk(queries, codes, k, metric, mask):
    """`topk` of tensors by a sort of all distances: for a k that no list on a device holds."""
    worst = {"hamming": 2**31 - 1, "jaccard": math.inf, "and": -1}[metric]
    dtype, largest = value_dtype(metric), metric == "and"
    distances = functools.partial(distance, b=codes, metric=metric)
    return _sorted(distances, queries, codes, k, mask, dtype, worst, largest)


def sorted_topk_score(x, codes, k, mask):
    """`topk_score`, likewise."""
    scores = functools.partial(score, codes=codes)
    return _sorted(scores, x, codes, k, mask, "float32", -math.inf, True)


def _sorted(values_of, queries, codes, k, mask, dtype, worst, largest):
    """The k best values of each query by a stable sort of all.

    Queries pass in groups, so that the values are about 64 MB at once.
    """
    import torch

    shape, device = (len(queries), k), queries.device
    values = torch.full(shape, worst, dtype=getattr(torch, dtype), device=device)
    ids = torch.full(shape, -1, dtype=torch.int64, device=device)
    if mask is None:
        mask = torch.ones(len(codes), dtype=torch.bool, device=device)
    rows = torch.sort(~mask, stable=True).indices  # what may be returned comes first
    keep, step = min(k, len(codes)), max(1, 2**24 // max(1, len(codes)))
    for i in range(0, len(queries), step):
        found = values_of(queries[i : i + step])[:, rows].masked_fill_(~mask[rows], worst)
        found, at = torch.sort(found, dim=1, descending=largest, stable=True)
        values[i : i + step, :keep] = found[:, :keep]
        ids[i : i + step, :keep] = torch.where(mask[rows[at]], rows[at], -1)[:, :keep]
    return values, ids


def range_search(queries, codes, radius, metric, mask):
    if runs_cuda(queries):
        return _range_cuda(queries, codes, radius, metric, mask)
    found = _C.hamming_range(queries, codes, -1, None, mask, None, None, None, None, metric, radius)
    return write_range(queries, found, metric)


def _range_cuda(queries, codes, radius, metric, mask):
    arguments = (queries, codes, mask, metric, radius)
    rows = queries.shape[0], codes.shape[0]
    device = on_device(queries, _C.hamming_range_scratch, *rows)
    indptr = empty_like(queries, (rows[0] + 1,), "int64")
    _C.hamming_range_cuda(*arguments, indptr, None, None, *device)
    total = int(indptr[-1])  # waits for the device: the results have no size before
    values = empty_like(queries, (total,), value_dtype(metric))
    ids = empty_like(queries, (total,), "int64")
    _C.hamming_range_cuda(*arguments, None, values, ids, *device)
    return indptr, values, ids


def write_range(like, found, metric):
    indptr = empty_like(like, (like.shape[0] + 1,), "int64")
    values = empty_like(like, (found.total,), value_dtype(metric))
    ids = empty_like(like, (found.total,), "int64")
    found.write(indptr, values, ids)
    return indptr, values, ids


def score(x, codes):
    out = empty_like(x, (x.shape[0], codes.shape[0]), "float32")
    _C.hamming_score(x, codes, out, *on_device(x))
    return out


def topk_score(x, codes, k, mask):
    if _sorts(x, k):
        return sorted_topk_score(x, codes, k, mask)
    shape = (x.shape[0], k)
    values, ids = empty_like(x, shape, "float32"), empty_like(x, shape, "int64")
    if _lists(x, k):
        device = on_device(x, _C.hamming_topk_score_scratch, shape[0], codes.shape[0], k)
        _C.hamming_topk_score_cuda(x, codes, mask, values, ids, *device)
    else:
        _C.hamming_topk_score(x, codes, -1, mask, None, values, ids)
    return values, ids


def score_candidates(x, codes, rows):
    """float32 scores of the rows (nq, c) of codes on a device; -inf where there is none."""
    out = empty_like(x, rows.shape, "float32")
    _C.hamming_score_candidates(x, codes, codes.shape[0], rows, out, *on_device(x))
    return out


def dot_candidates(x, vectors, scale, rows):
    """Likewise of stored vectors."""
    out = empty_like(x, rows.shape, "float32")
    _C.hamming_dot_candidates(x, vectors, scale, rows, out, *on_device(x))
    return out


def weighted_sum(weights, codes, dim):
    out = empty_like(weights, (weights.shape[0], weights.shape[1], dim), "float32")
    scratch = on_device(weights, _C.hamming_weighted_sum_scratch, *weights.shape, dim)
    _C.hamming_weighted_sum(weights, codes, dim, out, *scratch)
    return out
