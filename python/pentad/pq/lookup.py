# SPDX-License-Identifier: Apache-2.0
"""Rows of tables, gathered by codes and combined: the decoder of every product code.

The mathematics stand in ``csrc/pq/lookup.h`` and, in numpy, in `pentad.pq.lookup_reference`.
"""

import math

import numpy as np

from pentad import _C
from pentad._arrays import dtype_name, is_numpy, on_device
from pentad._checks import FLOATS, check_choice, check_dtype

COMBINATIONS = ("concat", "sum", "mean", "product")
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


def lookup(codes, codebooks, *, combine="concat", weights=None, offsets=None):
    """Rows of the codebooks named by `codes`, combined.

    Row i takes ``weights[i, m] * codebooks[m, codes[i, m]]`` of each codebook m and puts them next
    to each other, or adds, averages or multiplies them. So it decodes product codes (concat),
    residual ones (sum) and grouped ones (mean), and is the lookup of compositional embeddings
    (Shi et al. 2020, "Compositional Embeddings Using Complementary Partitions for Memory-Efficient
    Recommendation Systems", section 3) whose tables may differ in length.

    Parameters
    ----------
    codes : (..., M) of any integer dtype
        0 to K_m - 1 in column m.
    codebooks : (M, K, width) float32, float16, bfloat16 or float64, or a list of M (K_m, width)
        Of any strides; tables whose columns do not follow each other are copied. Differentiable.
    combine : {"concat", "sum", "mean", "product"}
        The mean divides by M, weights or not.
    weights : (..., M) float, optional
        Factors of the rows. Differentiable.
    offsets : (b,) int32 or int64, optional
        Where each bag begins, as `torch.nn.functional.embedding_bag` has it: for codes (n, M), bag
        i holds the rows ``[offsets[i], offsets[i + 1])``, the last bag all that remain; the first
        offset is 0 and none descends. The result of a bag is the sum of what its rows give, for
        "mean" their mean; of an empty bag, zeros.

    Returns
    -------
    (..., M * width) for "concat", else (..., width); (b, ...) with offsets
        Of the codebooks' dtype. Sums are in float32 (float64 for float64) and in one order: the
        same bits on every instruction set and for any number of threads; gradients too.

    Raises
    ------
    ValueError
        For a code that has no row, columns that are not as many as the codebooks, or offsets that
        do not begin with 0, descend, or pass the last row. On a CUDA device codes and offsets are
        not looked at: such a code gives NaN, and offsets are brought into the rows.
    TypeError
        For codes that are no integers, or codebooks that are not of one float dtype.

    Examples
    --------
    >>> import numpy as np
    >>> codebooks = np.array([[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, 7.0]]], np.float32)
    >>> codes = np.array([[0, 1], [1, 1]], np.uint8)
    >>> pentad.pq.lookup(codes, codebooks)
    array([[0., 1., 6., 7.],
           [2., 3., 6., 7.]], dtype=float32)
    >>> pentad.pq.lookup(codes, codebooks, combine="sum", offsets=np.array([0]))
    array([[14., 18.]], dtype=float32)
    """
    op = "pq.lookup"
    check_choice(op, "combine", combine, COMBINATIONS)
    tables = list(codebooks) if isinstance(codebooks, (list, tuple)) else [codebooks]
    numpy = _check_kinds(op, codes, tables, weights, offsets)
    count = _check_tables(op, tables, isinstance(codebooks, (list, tuple)))
    check_dtype(op, "codes", codes, INTEGERS)
    if codes.ndim < 1 or codes.shape[-1] != count:
        raise ValueError(
            f"[{op}] codes have shape {tuple(codes.shape)}, expected {count} columns, as many as "
            "there are codebooks"
        )
    if weights is not None:
        weights = _as_weights(op, weights, codes, tables[0])
    if offsets is not None:
        check_dtype(op, "offsets", offsets, ("int32", "int64"))
        if offsets.ndim != 1 or codes.ndim != 2:
            raise ValueError(
                f"[{op}] offsets have shape {tuple(offsets.shape)} and codes "
                f"{tuple(codes.shape)}, expected (b,) and (n, {count})"
            )
    lead = tuple(codes.shape[:-1])
    rows = codes if codes.ndim == 2 else codes.reshape(math.prod(lead), count)
    if weights is not None and weights.ndim != 2:
        weights = weights.reshape(math.prod(lead), count)
    if numpy:
        out = _forward(rows, tables, weights, offsets, combine)
    else:
        from pentad.pq import lookup_autograd

        out = lookup_autograd.lookup(rows, tables, weights, offsets, combine)
    return out if codes.ndim == 2 else out.reshape(*lead, out.shape[-1])


def _forward(codes, tables, weights, offsets, combine):
    rows, width = len(codes if offsets is None else offsets), tables[0].shape[-1]
    columns = width * codes.shape[1] if combine == "concat" else width
    out = np.empty((rows, columns), tables[0].dtype)
    device = on_device(codes, _C.pq_lookup_scratch, codes.shape[1])
    _C.pq_lookup(codes, tables, weights, offsets, combine, out, *device)
    return out


def _check_kinds(op, codes, tables, weights, offsets):
    if not tables:
        raise ValueError(f"[{op}] codebooks are an empty list, expected at least one table")
    named = {"codebooks": tables[0]}
    if len(tables) > 1:
        named = {f"codebooks[{m}]": table for m, table in enumerate(tables)}
    named |= {"codes": codes, "weights": weights, "offsets": offsets}
    return is_numpy(op, cuda=True, optional=("weights", "offsets"), **named)


def _check_tables(op, tables, ragged):
    """The number of codebooks."""
    first = tables[0]
    for table in tables:
        check_dtype(op, "codebooks", table, FLOATS)
        shape = "a list of (K_m, width)" if ragged else "(M, K, width)"
        if table.ndim != (2 if ragged else 3):
            raise ValueError(f"[{op}] codebooks have shape {tuple(table.shape)}, expected {shape}")
        if table.dtype != first.dtype:
            raise TypeError(
                f"[{op}] codebooks have dtypes {dtype_name(first)} and {dtype_name(table)}, "
                "expected one"
            )
        if table.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"[{op}] codebooks have rows of {first.shape[-1]} and {table.shape[-1]} numbers, "
                "expected one width"
            )
    count = len(tables) if ragged else first.shape[0]
    if count < 1:
        raise ValueError(f"[{op}] codebooks have shape {tuple(first.shape)}, expected at least one")
    return count


def _as_weights(op, weights, codes, table):
    check_dtype(op, "weights", weights, FLOATS)
    if tuple(weights.shape) != tuple(codes.shape):
        raise ValueError(
            f"[{op}] weights have shape {tuple(weights.shape)} but codes {tuple(codes.shape)}"
        )
    double = dtype_name(table) == "float64"
    if double == (dtype_name(weights) == "float64"):
        return weights
    if isinstance(weights, np.ndarray):
        return weights.astype(np.float64 if double else np.float32)
    return weights.double() if double else weights.float()
