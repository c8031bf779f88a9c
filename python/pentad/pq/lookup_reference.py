# SPDX-License-Identifier: Apache-2.0
"""Lookups, sums of table entries and integer codes as plain numpy: the definitions.

Floats are added and multiplied one rounding at a time, in the order that ``csrc/pq/lookup.h`` and
``csrc/pq/table_sum.h`` give, so the kernels must have the same bits.
"""

import numpy as np


def _bags(rows, offsets):
    ends = [*offsets[1:], rows] if len(offsets) else []
    return [range(a, b) for a, b in zip(offsets, ends, strict=True)]


def _terms(codes, tables, weights, wide):
    """(n, M, width), each rounded."""
    rows = [np.asarray(t, wide)[codes[:, m].astype(np.int64)] for m, t in enumerate(tables)]
    terms = np.stack(rows, 1)
    return terms if weights is None else weights.astype(wide)[..., None] * terms


def lookup(codes, tables, combine, weights=None, offsets=None, wide=np.float32):
    """In `wide`, before the one rounding to the tables' dtype; tables (K_m, width) each."""
    terms = _terms(codes, tables, weights, wide)
    n, count, width = terms.shape
    bags = [range(i, i + 1) for i in range(n)] if offsets is None else _bags(n, offsets)
    out = np.zeros((len(bags), count * width if combine == "concat" else width), wide)
    for b, rows in enumerate(bags):
        for i in rows:
            if combine == "concat":
                out[b] += terms[i].reshape(-1)
            elif combine == "product":
                product = np.ones(width, wide)
                for m in range(count):
                    product *= terms[i, m]
                out[b] += product
            else:
                for m in range(count):
                    out[b] += terms[i, m]
        if combine == "mean" and len(rows):
            out[b] /= wide(len(rows) * count)
    return out


def lookup_backward(d_out, codes, tables, combine, weights=None, offsets=None, wide=np.float32):
    """The gradients of the tables, a list, and of the weights."""
    entries = _terms(codes, tables, None, wide)
    terms = _terms(codes, tables, weights, wide)
    n, count, width = terms.shape
    bags = [range(i, i + 1) for i in range(n)] if offsets is None else _bags(n, offsets)
    d_tables = [np.zeros((len(t), width), wide) for t in tables]
    d_weights = np.zeros((n, count), wide)
    for b, rows in enumerate(bags):
        scale = wide(1) / wide(len(rows) * count) if combine == "mean" and len(rows) else wide(1)
        for i in rows:
            for m in range(count):
                grad = d_out[b].astype(wide)
                if combine == "concat":
                    grad = grad[m * width : (m + 1) * width]
                if combine == "product":
                    left, right = np.ones(width, wide), np.ones(width, wide)
                    for j in range(m):
                        left *= terms[i, j]
                    for j in range(count - 1, m, -1):
                        right *= terms[i, j]
                    grad = grad * (left * right)
                weight = wide(1) if weights is None else wide(weights[i, m])
                d_tables[m][codes[i, m]] += grad * (weight * scale)
                lanes = np.zeros(16, wide)
                for d in range(width):
                    lanes[d % 16] += grad[d] * entries[i, m, d]
                for half in (8, 4, 2, 1):
                    lanes[:half] += lanes[half : 2 * half]
                d_weights[i, m] = lanes[0] * scale
    return d_tables, d_weights


def score_tables(queries, codebooks, metric):
    """(nq, M, K): sums in double over rising columns, rounded to the dtype of `queries`."""
    count, levels, width = codebooks.shape
    q = queries.astype(np.float64).reshape(len(queries), count, 1, width)
    c = codebooks.astype(np.float64)
    total = np.zeros((len(queries), count, levels))
    for d in range(width):
        if metric == "ip":
            total += q[..., d] * c[..., d]
        else:
            total += (q[..., d] - c[..., d]) * (q[..., d] - c[..., d])
    return total.astype(queries.dtype)


def table_sum(tables, codes):
    out = np.zeros((len(tables), len(codes)), tables.dtype)
    for m in range(codes.shape[1]):
        out += tables[:, m, codes[:, m].astype(np.int64)]
    return out


def table_sum_backward(d_out, codes, levels):
    d_tables = np.zeros((len(d_out), codes.shape[1], levels), d_out.dtype)
    for i in range(len(codes)):
        for m in range(codes.shape[1]):
            d_tables[:, m, codes[i, m]] += d_out[:, i]
    return d_tables


def pack_codes(codes, nbits):
    bits = codes.astype(np.int64)[..., None] >> np.arange(nbits) & 1
    flat = bits.reshape(*codes.shape[:-1], codes.shape[-1] * nbits).astype(np.uint8)
    return np.packbits(flat, axis=-1, bitorder="little")


def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_codes(ids, seeds, sizes):
    columns = []
    for seed, size in zip(seeds, sizes, strict=True):
        key = _mix(np.array([(seed + 0x9E3779B97F4A7C15) % 2**64], np.uint64))
        high = _mix(ids.astype(np.uint64) + key) >> np.uint64(32)
        columns.append((high * np.uint64(size)) >> np.uint64(32))
    return np.stack(columns, -1).astype(np.int64)
