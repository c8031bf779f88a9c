# SPDX-License-Identifier: Apache-2.0
"""Scores of float queries against product codes, by tables: asymmetric distance computation.

The mathematics stand in ``csrc/pq/table_sum.h`` and, in numpy, in `pentad.pq.lookup_reference`.
"""

import math

import numpy as np

from pentad import _C
from pentad._arrays import dtype_name, is_numpy, on_device
from pentad._checks import FLOATS, check_choice, check_dtype
from pentad.pq import _exact
from pentad.pq.lookup import INTEGERS

METRICS = ("l2", "ip", "cosine")


def adc(queries, codes, codebooks, *, metric="l2"):
    """Scores of queries against the vectors that codes stand for, without decoding them.

    A table holds each query's score with every row of every codebook, and a score is the sum of the
    entries that a row of codes names (Jegou, Douze, Schmid 2011, "Product quantization for nearest
    neighbor search", section 3, asymmetric distance computation).

    Parameters
    ----------
    queries : (..., M * width) float32, float16, bfloat16 or float64
        Differentiable.
    codes : (n, M) of any integer dtype
        0 to K - 1.
    codebooks : (M, K, width) float32, float16, bfloat16 or float64
        Differentiable.
    metric : {"l2", "ip", "cosine"}
        Squared Euclidean distance, smaller is better; inner product, larger is better; the inner
        product divided by both lengths, 0 where one is 0.

    Returns
    -------
    (..., n) float32, or float64 where an input is
        Each table entry is a sum in double over rising columns, rounded, and each score the sum of
        entries over rising m: the same bits on every instruction set, for any batch and number of
        threads.

    Raises
    ------
    ValueError
        For a code that has no row (on a CUDA device, whose codes are not looked at, its score is
        NaN), or sizes that do not match.
    TypeError
        For codes that are no integers, or queries and codebooks that are no floats.

    Examples
    --------
    >>> import numpy as np
    >>> codebooks = np.array([[[0.0], [2.0]], [[4.0], [6.0]]], np.float32)
    >>> codes = np.array([[0, 1], [1, 1]], np.uint8)
    >>> pentad.pq.adc(np.array([[1.0, 6.0]], np.float32), codes, codebooks)
    array([[1., 1.]], dtype=float32)
    >>> pentad.pq.adc(np.array([[1.0, 6.0]], np.float32), codes, codebooks, metric="ip")
    array([[36., 38.]], dtype=float32)
    """
    op = "pq.adc"
    numpy = is_numpy(op, cuda=True, queries=queries, codes=codes, codebooks=codebooks)
    check_choice(op, "metric", metric, METRICS)
    check_dtype(op, "queries", queries, FLOATS)
    check_dtype(op, "codebooks", codebooks, FLOATS)
    check_dtype(op, "codes", codes, INTEGERS)
    if codebooks.ndim != 3 or codebooks.shape[0] < 1:
        raise ValueError(
            f"[{op}] codebooks have shape {tuple(codebooks.shape)}, expected (M, K, width)"
        )
    count, _, width = codebooks.shape
    if codes.ndim != 2 or codes.shape[1] != count:
        raise ValueError(f"[{op}] codes have shape {tuple(codes.shape)}, expected (n, {count})")
    if queries.ndim < 1 or queries.shape[-1] != count * width:
        raise ValueError(
            f"[{op}] queries have shape {tuple(queries.shape)}, expected {count * width} columns, "
            f"as {count} codebooks of width {width} have"
        )
    lead = tuple(queries.shape[:-1])
    double = "float64" in (dtype_name(queries), dtype_name(codebooks))
    rows = _widened(queries.reshape(math.prod(lead), count * width), double)
    scores = _scores(numpy, rows, codes, _widened(codebooks, double), metric)
    return scores.reshape(*lead, codes.shape[0])


def _widened(array, double):
    if isinstance(array, np.ndarray):
        return array.astype(np.float64 if double else np.float32, copy=False)
    return array.double() if double else array.float()


def _scores(numpy, queries, codes, codebooks, metric):
    if numpy:
        tables, table_sum = _tables, _table_sum
    else:
        from pentad.pq.adc_autograd import score_tables as tables
        from pentad.pq.adc_autograd import table_sum
    if metric != "cosine":
        return table_sum(tables(queries, codebooks, metric), codes)
    products = table_sum(tables(queries, codebooks, "ip"), codes)
    # The squared lengths of the decoded vectors are their distances from zero.
    origin = _origin(queries)
    squares = table_sum(tables(origin, codebooks, "l2"), codes)
    return _cosines(products, queries, squares)


def _origin(queries):
    shape = (1, queries.shape[1])
    if isinstance(queries, np.ndarray):
        return np.zeros(shape, queries.dtype)
    return queries.new_zeros(shape)


def _cosines(products, queries, squares):
    if isinstance(products, np.ndarray):
        lengths = np.sqrt(_exact.summed(queries.astype(np.float64) ** 2)).astype(queries.dtype)
        both = lengths[:, None] * np.sqrt(squares)
        with np.errstate(invalid="ignore"):
            return np.divide(products, both, out=np.zeros_like(products), where=both != 0)
    import torch

    # The roots' slopes at zero would be infinite, so they are taken of ones there; torch rounds
    # roots of float32 numbers otherwise than numpy unless they are taken in double.
    lengths = queries.double().square().cumsum(-1)[..., -1:].sum(-1)
    lengths = torch.where(lengths > 0, lengths, 1).sqrt().to(queries.dtype)
    roots = torch.where(squares > 0, squares, 1).double().sqrt().to(squares.dtype)
    some = (queries != 0).any(-1).unsqueeze(-1) & (squares != 0)
    return torch.where(some, products / (lengths.unsqueeze(-1) * roots), 0)


def _tables(queries, codebooks, metric):
    tables = np.empty((len(queries), *codebooks.shape[:2]), queries.dtype)
    _C.pq_score_tables(queries, codebooks, metric, tables, *on_device(queries))
    return tables


def _table_sum(tables, codes):
    out = np.empty((len(tables), len(codes)), tables.dtype)
    _C.pq_table_sum(tables, codes, out, *on_device(tables))
    return out
