# SPDX-License-Identifier: Apache-2.0
"""Inner products of sparse rows, with gradients to the values of both sides.

The mathematics stand in ``csrc/sparse/score.h`` and, in plain Python, in `pentad.sparse.reference`.
"""

import numpy as np

from pentad import _C
from pentad._arrays import is_numpy
from pentad._checks import check_dtype
from pentad.sparse._csr import INTEGERS, MOST_COLUMNS, index_dtype, parts_of


def score(queries, docs, *, pairs=None):
    """Inner products of sparse queries and sparse documents.

    The score of a query and a document is the sum of ``q_j * d_j`` over the terms j that both have:
    what learned sparse retrieval ranks by (Formal et al. 2021, "SPLADE: Sparse Lexical and
    Expansion Model for First Stage Ranking", section 3) and is trained through. Neither side is
    ever made dense, nor is any gradient of it.

    Parameters
    ----------
    queries : sparse rows (nq, V)
        A torch sparse CSR or COO tensor (coalesced or not), a scipy.sparse matrix or array of any
        format, or a tuple (indptr, indices, values) or (indptr, indices, values, V) of numpy
        arrays or torch tensors: row i has the terms ``indices[indptr[i]:indptr[i + 1]]`` of any
        integer dtype, in any order, and finite float16, bfloat16, float32 or float64 values. The
        values of a term that a row names twice add up. V is at most 2**31 - 1. Differentiable: a
        tuple in its values, a sparse tensor in itself, with a gradient of its own sparsity.
    docs : sparse rows (n, V)
        The same.
    pairs : (p, 2) integers, or a tuple of two (p,) of them, optional
        Rows of queries and docs to score with each other, instead of all with all.

    Returns
    -------
    (nq, n), or (p,) with pairs
        Of the dtype that the values' promote to, dense. A score is the double sum of its products,
        over rising terms, rounded to float32 (kept for float64), then to that dtype: the same bits
        for any number of threads and any batch, and never -0. Gradients are double sums as well,
        on the non-zeros alone, explicit zeros among them; equal terms of a row have equal ones.

    On a CUDA device the checks end in a few flags that the host waits for, and are left out while a
    graph is captured, which rows of rising terms can be part of.

    Raises
    ------
    ValueError
        For an indptr that does not rise from 0 to the number of indices, indices outside the
        columns, values that are NaN or infinite, sides of different V, or pairs without a row.
    TypeError
        For dense arrays, other dtypes, or numpy beside torch.

    Examples
    --------
    >>> import numpy as np
    >>> query = np.array([0, 2]), np.array([4, 1]), np.array([1.0, 2.0], np.float32)
    >>> docs = np.array([0, 1, 3]), np.array([1, 1, 4]), np.array([3.0, 5.0, 7.0], np.float32)
    >>> pentad.sparse.score(query, docs)
    array([[ 6., 17.]], dtype=float32)
    >>> pentad.sparse.score(query, docs, pairs=np.array([[0, 1]]))
    array([17.], dtype=float32)
    """
    op = "sparse.score"
    q, d = parts_of(op, "queries", queries), parts_of(op, "docs", docs)
    if q.columns is not None and d.columns is not None and q.columns != d.columns:
        raise ValueError(f"[{op}] queries have {q.columns} columns but docs {d.columns}")
    columns = d.columns if q.columns is None else q.columns
    if columns is None:
        columns = MOST_COLUMNS
    if isinstance(pairs, tuple):
        pairs = _paired(op, q.values, pairs)
    numpy = is_numpy(
        op, queries=q.values, docs=d.values, pairs=pairs, optional=("pairs",), cuda=True
    )
    if pairs is not None:
        check_dtype(op, "pairs", pairs, INTEGERS)
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"[{op}] pairs have shape {tuple(pairs.shape)}, expected (p, 2)")
    if numpy:
        return _forward(q, d, pairs, columns)
    from pentad.sparse import score_autograd

    return score_autograd.score(*q[:3], *d[:3], pairs, columns)


def _paired(op, values, pairs):
    """Two index arrays as one (p, 2)."""
    if len(pairs) != 2:
        raise ValueError(f"[{op}] pairs are a tuple of {len(pairs)}, expected (queries, docs)")
    one, other = pairs
    numpy = is_numpy(op, queries=values, **{"pairs[0]": one, "pairs[1]": other}, cuda=True)
    for i, part in enumerate(pairs):
        check_dtype(op, f"pairs[{i}]", part, INTEGERS)
        if part.ndim != 1 or part.shape != one.shape:
            shapes = f"{tuple(one.shape)} and {tuple(other.shape)}"
            raise ValueError(f"[{op}] pairs have shapes {shapes}, expected (p,) and (p,)")
    if numpy:
        return np.stack([one.astype(np.int64), other.astype(np.int64)], 1)
    import torch

    return torch.stack([one.to(torch.int64), other.to(torch.int64)], 1)


def _forward(q, d, pairs, columns):
    dtype = np.result_type(q.values, d.values)
    wide = np.float64 if dtype == np.float64 else np.float32
    shape = (len(q.indptr) - 1, len(d.indptr) - 1) if pairs is None else len(pairs)
    out = np.empty(shape, wide)
    pairs = None if pairs is None else pairs.astype(np.int64, copy=False)
    _C.sparse_score(*_ready(q), *_ready(d), pairs, columns, out)
    with np.errstate(over="ignore"):
        return out.astype(dtype, copy=False)


def _ready(parts):
    values = np.ascontiguousarray(parts.values)
    return index_dtype(parts.indptr), index_dtype(parts.indices), values
