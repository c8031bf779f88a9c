# SPDX-License-Identifier: Apache-2.0
"""The definitions, in plain numpy with float64 sums. The kernels are tested against these."""

import numpy as np


def bits(codes, dim=None):
    """(..., dim) of 0 and 1."""
    return np.unpackbits(np.asarray(codes), axis=-1, count=dim)


def pack(x, threshold=0.0):
    return np.packbits(np.asarray(x) > threshold, axis=-1)


def unpack(codes, dim):
    return bits(codes, dim) * 2.0 - 1.0


def distance(a, b, metric="hamming"):
    a, b = bits(a).astype(np.int64), bits(b).astype(np.int64)
    both = a @ b.T
    ones = a.sum(1)[:, None] + b.sum(1)[None, :]
    if metric == "and":
        return both.astype(np.int32)
    if metric == "hamming":
        return (ones - 2 * both).astype(np.int32)
    any_ = ones - both
    numerator, denominator = (any_ - both).astype(np.float32), any_.astype(np.float32)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=any_ > 0)


def best(values, k, largest, mask=None):
    """The k best columns of each row by (value, column), as (values, columns) padded with -1."""
    values = np.asarray(values)
    order = np.argsort(-values.astype(np.float64) if largest else values, axis=1, kind="stable")
    found = np.full((len(values), k), -1, np.int64)
    for row, columns in enumerate(order):
        columns = columns if mask is None else columns[mask[columns]]
        found[row, : len(columns[:k])] = columns[:k]
    return np.take_along_axis(values, np.maximum(found, 0), 1) if values.shape[1] else values, found


def topk(queries, codes, k, metric="hamming", mask=None):
    values, ids = best(distance(queries, codes, metric), k, metric == "and", mask)
    missing = {"hamming": np.iinfo(np.int32).max, "and": -1, "jaccard": np.inf}[metric]
    out = np.full(ids.shape, missing, np.float32 if metric == "jaccard" else np.int32)
    out[ids >= 0] = values[ids >= 0] if values.size else []
    return out, ids


def range_search(queries, codes, radius, metric="hamming", mask=None):
    values = distance(queries, codes, metric)
    # In double: a float32 radius would be rounded before it is compared.
    wide = values.astype(np.float64)
    inside = wide >= radius if metric == "and" else wide <= radius
    if mask is not None:
        inside &= mask
    rows, ids = np.nonzero(inside)
    indptr = np.concatenate([[0], np.cumsum(inside.sum(1))]).astype(np.int64)
    return indptr, values[rows, ids], ids


def score(x, codes):
    x = np.asarray(x, np.float64)
    return x @ unpack(codes, x.shape[-1]).T


def weighted_sum(weights, codes, dim):
    return np.asarray(weights, np.float64) @ unpack(codes, dim)


def permute(codes, dim, shift):
    return np.packbits(np.roll(bits(codes, dim), shift, axis=-1), axis=-1)


def bundle(codes, dim, weights=None, ties="first"):
    signs = unpack(codes, dim)
    weights = np.ones(signs.shape[-2]) if weights is None else np.asarray(weights, np.float64)
    votes = np.einsum("...m,...md->...d", np.broadcast_to(weights, signs.shape[:-1]), signs)
    tie = {"first": signs[..., 0, :] > 0, "zero": False, "one": True}[ties]
    return np.packbits(np.where(votes == 0, tie, votes > 0), axis=-1)
