# SPDX-License-Identifier: Apache-2.0
"""Lexical vectors as short dense ones: the largest weight of each slice of the vocabulary."""

from typing import Any, NamedTuple

import numpy as np

from pentad._arrays import is_numpy, to_numpy
from pentad._checks import FLOATS, check_count, check_dtype
from pentad.sparse._csr import MOST_COLUMNS, is_dense, rows_and_values
from pentad.sparse.topk import SparseCodes


class Densified(NamedTuple):
    """What `sliced_densify` returns: the largest weight of each slice (n, M), and its term (n, M).

    Examples
    --------
    >>> import numpy as np
    >>> pentad.sparse.sliced_densify(np.array([[0.0, 2.0, 1.0, 0.0]]), 2)
    Densified(values=array([[2., 1.]]), ids=array([[1, 2]], dtype=int32))
    >>> isinstance(_, pentad.sparse.Densified)
    True
    """

    values: Any
    ids: Any


def sliced_densify(x, slices, *, stride=False):
    """Cut the vocabulary into M slices and keep the largest weight of each, and whose it is.

    Representational slicing (Lin and Lin 2021, "Densifying Sparse Representations for Passage
    Retrieval by Representational Slicing", arXiv 2112.04666). Two such vectors are
    compared by `gated_inner_product`; a model that has dense vectors too adds their inner product:

        score = gated_inner_product(q, p) + weight * dense_q @ dense_p.T

    Weights are at least 0, and those of 0 or less do not count: where a slice has no other, its
    value is 0 and its id is -1. So sparse rows and the same rows with their zeros agree.

    Parameters
    ----------
    x : (n, V) floats, dense, or sparse rows
        A float32, float16, bfloat16 or float64 array or tensor; or a `SparseCodes`, a torch sparse
        CSR or COO tensor, a scipy.sparse matrix or a tuple (indptr, indices, values, V).
        Differentiable.
    slices : int
        M, from 1 to V. A slice has ``ceil(V / M)`` terms; where they do not divide V, the last
        ones have fewer or none.
    stride : bool
        Slice m holds the terms m, m + M, m + 2 M ... instead of consecutive ones, which spreads a
        vocabulary that is sorted by frequency (as the authors' code does).

    Returns
    -------
    Densified
        ``values`` (n, M), of the dtype of a dense `x`, else float32, or float64 of float64;
        ``ids`` (n, M) int32, columns of `x`, ties to the smaller one. A NaN is the largest weight.

    Raises
    ------
    ValueError
        For slices below 1 or beyond V, and for sparse rows that are malformed, not finite, or of
        unknown width.
    TypeError
        For other dtypes.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[0.0, 3.0, 1.0, 2.0, 0.0, 0.0]])
    >>> pentad.sparse.sliced_densify(x, 3)
    Densified(values=array([[3., 2., 0.]]), ids=array([[ 1,  3, -1]], dtype=int32))
    >>> pentad.sparse.sliced_densify(x, 3, stride=True).ids
    array([[3, 1, 2]], dtype=int32)
    """
    op = "sparse.sliced_densify"
    slices = check_count(op, "slices", slices, 1)
    if is_dense(x):
        numpy = is_numpy(op, x=x)
        check_dtype(op, "x", x, FLOATS)
        if x.ndim != 2:
            raise ValueError(f"[{op}] x has shape {tuple(x.shape)}, expected (n, V)")
        _check_slices(op, slices, x.shape[1])
        if numpy:
            return _dense_numpy(x, slices, stride)
        from pentad.sparse import densify_torch

        return Densified(*densify_torch.dense(x, slices, stride))
    if isinstance(x, tuple) and len(x) == 3:
        raise ValueError(f"[{op}] x has no width, expected (indptr, indices, values, V)")
    rows, values = rows_and_values(op, "x", x)
    _check_slices(op, slices, rows.shape[1])
    return Densified(*_sparse(rows, values, slices, stride))


def gated_inner_product(queries, docs):
    """Inner products that count only the slices in which both sides kept the same term.

    ``sum_m q_m * d_m * [id(q)_m == id(d)_m]`` (Lin and Lin 2021, arXiv 2112.04666),
    computed as a sparse product: a slice in which the terms differ costs nothing.

    Parameters
    ----------
    queries, docs : Densified, or tuples (values (n, M), ids (n, M))
        Of the same slices. Values are differentiable; an id of -1 matches none.

    Returns
    -------
    (nq, n) of the dtype that the values' promote to
        As `pentad.sparse.score` has it: the double sum over rising terms, rounded.

    Raises
    ------
    ValueError
        For shapes that do not match, ids below -1, and values that are not finite.
    TypeError
        For other dtypes.

    Examples
    --------
    >>> import numpy as np
    >>> q = pentad.sparse.sliced_densify(np.array([[0.0, 2.0, 1.0, 0.0]]), 2)
    >>> docs = pentad.sparse.sliced_densify(np.array([[0.0, 3, 0, 4], [5, 0, 6, 0]]), 2)
    >>> pentad.sparse.gated_inner_product(q, docs)
    array([[6., 6.]])
    """
    from pentad.sparse.score import score

    op = "sparse.gated_inner_product"
    q, d = _pair(op, "queries", queries), _pair(op, "docs", docs)
    is_numpy(op, queries=q.values, docs=d.values)
    if q.values.shape[1] != d.values.shape[1]:
        raise ValueError(
            f"[{op}] queries have {q.values.shape[1]} slices but docs {d.values.shape[1]}"
        )
    return score(_kept(q), _kept(d))


# --- Parts ----------------------------------------------------------------------------------------


def _check_slices(op, slices, columns):
    if slices > columns:
        raise ValueError(f"[{op}] slices are {slices}, but x has only {columns} columns")


def _dense_numpy(x, slices, stride):
    n, columns = x.shape
    width = -(-columns // slices)
    padded = np.zeros((n, slices * width), x.dtype)
    padded[:, :columns] = x
    parts = padded.reshape(n, width, slices).transpose(0, 2, 1) if stride else padded.reshape(
        n, slices, width
    )  # fmt: skip
    place = parts.argmax(-1)
    values = np.take_along_axis(parts, place[..., None], -1)[..., 0]
    own = np.arange(slices)
    ids = (place * slices + own if stride else own * width + place).astype(np.int32)
    none = values <= 0
    values[none], ids[none] = 0, -1
    return Densified(values, ids)


def _sparse(rows, values, slices, stride):
    """The entries are chosen in numpy; their values are gathered in the caller's kind."""
    numpy = isinstance(values, np.ndarray)
    given = values if numpy else to_numpy(values)
    n, width = rows.shape[0], -(-rows.shape[1] // slices)
    entry = np.flatnonzero(given > 0)
    row = np.repeat(np.arange(n), np.diff(rows.indptr))[entry]
    term = rows.indices[entry].astype(np.int64)
    slot = row * slices + (term % slices if stride else term // width)
    order = np.lexsort((term, -given[entry], slot))
    slot, first = np.unique(slot[order], return_index=True)
    entry, term = entry[order][first], term[order][first]
    ids = np.full(n * slices, -1, np.int32)
    ids[slot] = term
    ids = ids.reshape(n, slices)
    if numpy:
        out = np.zeros(n * slices, values.dtype)
        out[slot] = values[entry]
        return out.reshape(n, slices), ids
    from pentad.sparse import densify_torch

    return densify_torch.placed(values, entry, slot, ids)


def _pair(op, name, given):
    if not isinstance(given, tuple) or len(given) != 2:
        raise TypeError(f"[{op}] {name} is {type(given).__name__}, expected (values, ids)")
    pair = Densified(*given)
    is_numpy(op, **{f"{name}'s values": pair.values, f"{name}'s ids": pair.ids})
    check_dtype(op, f"{name}'s values", pair.values, FLOATS)
    check_dtype(op, f"{name}'s ids", pair.ids, ("int32", "int64"))
    if pair.values.ndim != 2 or pair.values.shape != pair.ids.shape:
        raise ValueError(
            f"[{op}] {name} has shapes {tuple(pair.values.shape)} and {tuple(pair.ids.shape)}, "
            "expected (n, M) values and as many ids"
        )
    if (pair.ids < -1).any():
        raise ValueError(f"[{op}] {name} has an id below -1")
    return pair


def _kept(pair):
    kept = pair.ids >= 0
    counts = kept.sum(1)
    if isinstance(counts, np.ndarray):
        indptr = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=indptr[1:])
    else:
        indptr = counts.new_zeros(len(counts) + 1)
        indptr[1:] = counts.cumsum(0)
    return SparseCodes(indptr, pair.ids[kept], pair.values[kept], MOST_COLUMNS)
