# SPDX-License-Identifier: Apache-2.0
"""The definition of `pentad.pq.product_key_lookup`, by brute force over all n * n keys."""

import numpy as np


def half_scores(q, subkeys):
    """(rows, heads, 2, n) of q (rows, heads, 2 * half) and subkeys (heads, 2, n, half).

    Chains over the columns, each product and each sum rounded: to float32, or float64 for that.
    """
    heads, _, n, half = subkeys.shape
    dtype = np.float64 if q.dtype == np.float64 else np.float32
    parts = q.astype(dtype).reshape(-1, heads, 2, 1, half)
    keys = subkeys.astype(dtype)
    scores = np.zeros((len(q), heads, 2, n), dtype)
    for d in range(half):
        scores = scores + parts[..., d] * keys[None, ..., d]
    return scores


def product_key_lookup(
    q, subkeys, values, k, *, scale=1.0, softmax=True, combine="sum", return_indices=False
):
    """As `pentad.pq.product_key_lookup`, for finite numpy arrays and q (rows, heads, 2 half)."""
    rows, heads, _ = q.shape
    halves = half_scores(q, subkeys).astype(np.float64)
    first, second = halves[:, :, 0, :, None], halves[:, :, 1, None, :]
    # The exact sum is `scores + rest` (Knuth's two-sum).
    scores = first + second
    part = scores - first
    rest = (first - (scores - part)) + (second - part)
    scores, rest = (x.reshape(rows, heads, subkeys.shape[2] ** 2) for x in (scores, rest))
    # Stable, so that of equal sums the smaller index comes first.
    indices = np.lexsort((-rest, -scores), axis=-1)[..., :k]
    best = np.take_along_axis(scores, indices, -1)
    if softmax:
        weights = np.exp(scale * (best - best[..., :1]))
        weights = weights / weights.sum(-1, keepdims=True)
    else:
        weights = scale * best
    out = np.einsum("rhk,rhkd->rhd", weights, values.astype(np.float64)[indices])
    out = out.sum(1) if combine == "sum" else out
    return (out, indices, weights) if return_indices else out
