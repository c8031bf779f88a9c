# SPDX-License-Identifier: Apache-2.0
"""Sparse codes times a dictionary: the decoder of sparse coding."""

import numpy as np

from pentad._arrays import is_numpy, like
from pentad._checks import FLOATS, check_dtype
from pentad.pq.lookup import INTEGERS, lookup
from pentad.sparse._csr import parts_of, rows_and_values


def sparse_decode(codes, dictionary, bias=None):
    """The sums of dictionary rows that sparse codes stand for: ``codes @ dictionary + bias``.

    Only the rows that a code names are read, and only those of `dictionary` get gradients other
    than zero; neither the dense codes nor their gradients are formed.

    Parameters
    ----------
    codes : sparse rows (n, V), or a tuple (indices (n, k), values (n, k))
        A `SparseCodes`, a torch sparse CSR or COO tensor, a scipy.sparse matrix or a tuple
        (indptr, indices, values) or (indptr, indices, values, V), of any integer and float dtypes.
        Values are differentiable.
    dictionary : (V, d) float32, float16, bfloat16 or float64
        Differentiable.
    bias : (d,) float, optional
        Differentiable.

    Returns
    -------
    (n, d) of the dtype of `dictionary`
        Each row is summed over rising indices (of a pair: as they stand) in float32, or float64
        for a float64 dictionary: the same bits on every instruction set and for any number of
        threads.

    Raises
    ------
    ValueError
        For an index that has no row, and for sparse rows that are malformed or not finite.
    TypeError
        For other dtypes.

    Examples
    --------
    >>> import numpy as np
    >>> dictionary = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> codes = pentad.sparse.topk_codes(np.array([[2.0, 1.0, 3.0]]), 2)
    >>> pentad.sparse.sparse_decode(codes, dictionary, bias=np.array([0.0, 10.0]))
    array([[ 5., 13.]])
    >>> pentad.sparse.sparse_decode((np.array([[0, 2]]), np.array([[2.0, 3.0]])), dictionary)
    array([[5., 3.]])
    """
    op = "sparse.sparse_decode"
    is_numpy(op, dictionary=dictionary, bias=bias, optional=("bias",), cuda=True)
    check_dtype(op, "dictionary", dictionary, FLOATS)
    if dictionary.ndim != 2:
        raise ValueError(f"[{op}] dictionary has shape {tuple(dictionary.shape)}, expected (V, d)")
    if bias is not None:
        check_dtype(op, "bias", bias, FLOATS)
        if tuple(bias.shape) != (dictionary.shape[1],):
            raise ValueError(
                f"[{op}] bias has shape {tuple(bias.shape)}, expected ({dictionary.shape[1]},)"
            )
    if isinstance(codes, tuple) and len(codes) == 2:
        indices, values = _pair(op, *codes, dictionary)
        return decode_pairs(indices, values, dictionary, bias)
    if isinstance(codes, tuple) and len(codes) > 2 and _is_traced(codes[2]):
        # The kernel checks them when they are at hand, and sums duplicates like others.
        return decode_rows(*codes[:3], dictionary, bias)
    if getattr(dictionary, "is_cuda", False):
        parts = parts_of(op, "codes", codes)
        is_numpy(op, codes=parts.values, dictionary=dictionary, cuda=True)
        return decode_rows(*parts[:3], dictionary, bias)
    rows, values = rows_and_values(op, "codes", codes, vocab=dictionary.shape[0])
    is_numpy(op, codes=values, dictionary=dictionary)
    indptr, indices = like(values, rows.indptr), like(values, rows.indices)
    return decode_rows(indptr, indices, values, dictionary, bias)


def decode_pairs(indices, values, dictionary, bias=None):
    """Of (n, k) columns and numbers, which the kernel checks."""
    n, k = indices.shape
    if isinstance(indices, np.ndarray):
        indptr = np.arange(n + 1, dtype=np.int64) * k
    else:
        import torch

        indptr = torch.arange(n + 1, device=indices.device) * k
    return decode_rows(indptr, indices.reshape(-1), values.reshape(-1), dictionary, bias)


def decode_rows(indptr, indices, values, dictionary, bias=None):
    """Of rows that are known to be good."""
    out = lookup(
        indices[:, None], [dictionary], combine="sum", weights=values[:, None], offsets=indptr[:-1]
    )
    if bias is None:
        return out
    return out + (bias.astype(out.dtype) if isinstance(bias, np.ndarray) else bias.to(out.dtype))


def _pair(op, indices, values, dictionary):
    is_numpy(op, **{"codes[0]": indices, "codes[1]": values, "dictionary": dictionary}, cuda=True)
    check_dtype(op, "codes[0]", indices, INTEGERS)
    check_dtype(op, "codes[1]", values, FLOATS)
    if indices.ndim != 2 or indices.shape != values.shape:
        raise ValueError(
            f"[{op}] codes have shapes {tuple(indices.shape)} and {tuple(values.shape)}, expected "
            "(n, k) indices and as many values"
        )
    if isinstance(indices, np.ndarray) or _may_read(indices):
        rows = dictionary.shape[0]
        wrong = (indices < 0) | (indices >= rows)
        if wrong.any():
            first = indices[wrong].reshape(-1)[0].item()
            raise ValueError(f"[{op}] codes have an index {first}, expected 0 to {rows - 1}")
    return indices, values


def _is_traced(values):
    return hasattr(values, "detach") and not _may_read(values)


def _may_read(tensor):
    """Whether its numbers are at hand: else the kernel is the one to check them."""
    from pentad._ops import direct

    return direct(tensor) and not tensor.is_meta and not tensor.is_cuda
