# SPDX-License-Identifier: Apache-2.0
"""The definition of `pentad.pq.assign` in numpy: double sums in order, ties to the smaller."""

import numpy as np


def costs(x, codebooks, metric="l2"):
    """(n, M, K) float64 of x (n, M, dsub) and codebooks (M, K, dsub); see ``csrc/pq/assign.h``."""
    x, books = x.astype(np.float64), codebooks.astype(np.float64)
    total = np.zeros((x.shape[0], *books.shape[:2]))
    squares = np.zeros(books.shape[:2])
    for j in range(books.shape[2]):  # in order: numpy's own sums go by pairs
        if metric == "l2":
            total += (x[:, :, None, j] - books[..., j]) ** 2
        else:
            total += x[:, :, None, j] * books[..., j]
            squares += books[..., j] ** 2
    if metric == "l2":
        return total
    if metric == "ip":
        return -total
    norms = np.sqrt(squares)
    return np.where(norms > 0, -(total / np.where(norms > 0, norms, 1)), 0.0)


def parts(x, codebooks, form):
    """x (n, dim) as (n, M, dsub), for the forms product and grouped."""
    count, _, dim = codebooks.shape
    if form == "product":
        return x.reshape(len(x), count, dim)
    return np.broadcast_to(x[:, None], (len(x), count, dim))


def assign(x, codebooks, metric="l2", form="product", top=None):
    """Codes (n, M), or (n, M, top), of x (n, dim)."""
    dtype = np.uint8 if codebooks.shape[1] <= 256 else np.int32
    if form == "residual":
        work = np.result_type(x.dtype, codebooks.dtype, np.float32)
        rest, codes = x.astype(work), []
        for book in codebooks.astype(work):
            codes.append(costs(rest[:, None], book[None], metric)[:, 0].argmin(1))
            rest = rest - book[codes[-1]]
        return np.stack(codes, 1).astype(dtype)
    order = costs(parts(x, codebooks, form), codebooks, metric).argsort(-1, kind="stable")
    return order[..., 0].astype(dtype) if top is None else order[..., :top].astype(dtype)
