# SPDX-License-Identifier: Apache-2.0
"""Sparse rows as callers have them, checked and brought into one form.

What functions take: torch sparse CSR and COO tensors, scipy.sparse matrices and arrays of any
format, and tuples (indptr, indices, values) or (indptr, indices, values, V) of numpy arrays or
torch tensors.
"""

import sys
from typing import NamedTuple

import numpy as np

from pentad import _C
from pentad._arrays import dtype_name, is_numpy, to_numpy
from pentad._checks import FLOATS, check_count, check_dtype

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
MOST_COLUMNS = 2**31 - 1
EXPECTED = (
    "a torch sparse CSR or COO tensor, a scipy.sparse matrix, or a tuple (indptr, indices, values) "
    "or (indptr, indices, values, columns)"
)


class Rows(NamedTuple):
    """Checked sparse rows, in numpy: terms rise in each row, none twice.

    indptr : (n + 1,) int64
    indices : (nnz,) int32
    values : (nnz,) float32, or float64 where the caller's are; explicit zeros are kept
    shape : (n, V); V is the greatest index + 1 where the caller names none
    place : (given,) int64 or None
        Where each value of the caller's stands in `values`; None: at its own position.
    dtype : str
        Of the caller's values.
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]
    place: np.ndarray | None
    dtype: str

    def to_caller(self, gradient):
        """A gradient of `values` as one of the caller's: duplicates have that of their sum."""
        return gradient if self.place is None else gradient[self.place]


class Parts(NamedTuple):
    """Sparse rows as they came: three arrays of one kind, contents unchecked.

    indptr : (n + 1,)
    indices, values : (nnz,)
    columns : int or None
        Where the caller names them.
    order : (nnz,) or None
        Of a COO tensor: the position that each of `indices` and `values` had.
    """

    indptr: object
    indices: object
    values: object
    columns: int | None
    order: object = None


def rows_of(op: str, name: str, x, *, vocab: int | None = None) -> Rows:
    """The checked rows of the argument `name`; `vocab` columns where that is given.

    Raises TypeError for what are no sparse rows or has another dtype, ValueError for shapes, an
    indptr that does not rise from 0 to the number of indices, indices outside the columns, and
    values that are not finite.
    """
    parts = parts_of(op, name, x)
    rows = _rows_of_parts(op, name, parts, vocab)
    if parts.order is None:
        return rows
    order = to_numpy(parts.order)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) if rows.place is None else rows.place
    return rows._replace(place=place)


def usual_rows(op: str, name: str, x, vocab: int):
    """(indptr, indices, values) for a native entry that checks and sorts what stands in them, or
    None where they are not of the usual kinds, which the entry takes as they are.

    In 1 us, a tuple of three sooner than others, where `rows_of` takes 11. Raises as that does, but
    not for contents.
    """
    three = type(x) is tuple and len(x) == 3 and _are_usual(*x)
    if three and len(x[0]) > 0 and len(x[1]) == len(x[2]):
        return x
    parts = parts_of(op, name, x)
    columns_of(op, name, parts, vocab)
    return parts[:3] if _are_usual(*parts[:3]) else None


def rows_and_values(op: str, name: str, x, *, vocab: int | None = None):
    """The checked rows, and their values in the caller's kind, float32 or float64.

    Those of tensors lead the gradient to the caller's. Raises as `rows_of`.
    """
    parts = parts_of(op, name, x)
    rows = _rows_of_parts(op, name, parts, vocab)
    if isinstance(parts.values, np.ndarray):
        return rows, rows.values
    import torch

    double = parts.values.dtype == torch.float64
    values = parts.values.to(torch.float64 if double else torch.float32)
    if rows.place is not None:
        sums = values.new_zeros(len(rows.values))
        values = sums.index_add(0, torch.from_numpy(rows.place), values)
    return rows, values


def _rows_of_parts(op, name, parts, vocab) -> Rows:
    """Rows whose `place` counts the entries of `parts`."""
    columns = columns_of(op, name, parts, vocab)
    arrays = (to_numpy(a, op) for a in parts[:3])
    return canonical(op, name, *arrays, columns, dtype_name(parts.values))


def columns_of(op: str, name: str, parts: Parts, vocab: int | None) -> int | None:
    """V, where either names it."""
    if vocab is None or parts.columns is None:
        return parts.columns if vocab is None else vocab
    if parts.columns != vocab:
        raise ValueError(f"[{op}] {name} has {parts.columns} columns, expected {vocab}")
    return vocab


def canonical(op, name, indptr, indices, values, columns, dtype) -> Rows:
    """Rows of numpy arrays of the right dtypes and ranks."""
    indptr = np.array(indptr, np.int64)
    indices, values = index_dtype(indices), np.ascontiguousarray(values)
    wide = np.float64 if dtype == "float64" else np.float32
    given = (op, name, indptr, indices, values, MOST_COLUMNS if columns is None else columns)
    rises, last = _C.sparse_check(*given)
    shape = (len(indptr) - 1, last + 1 if columns is None else columns)
    if rises:
        indices, values = indices.astype(np.int32, copy=False), values.astype(wide, copy=False)
        return Rows(indptr, indices, values, shape, None, dtype)
    out = np.empty_like(indptr), np.empty(len(indices), np.int32), np.empty(len(indices), wide)
    place = np.empty(len(indices), np.int64)
    count = _C.sparse_merge(*given, *out, place)
    return Rows(out[0], out[1][:count], out[2][:count], shape, place, dtype)


def index_dtype(indices: np.ndarray) -> np.ndarray:
    """Contiguous int32 or int64; uint64 past int64 becomes negative, which is refused."""
    known = indices.dtype in (np.int32, np.int64)
    return np.ascontiguousarray(indices, None if known else np.int64)


def parts_of(op: str, name: str, x) -> Parts:
    """The three arrays of what a caller gave; dtypes and ranks are checked, contents are not."""
    if isinstance(x, tuple):
        if len(x) not in (3, 4):
            raise ValueError(f"[{op}] {name} is a tuple of {len(x)}, expected {EXPECTED}")
        columns = None
        if len(x) == 4:
            columns = check_count(op, f"{name}[3]", x[3])
            check_columns(op, name, columns)
        parts = Parts(*x[:3], columns)
    elif hasattr(x, "__torch_function__") and hasattr(x, "layout"):
        parts = _torch_parts(op, name, x)
    elif "scipy.sparse" in sys.modules and sys.modules["scipy.sparse"].issparse(x):
        parts = _scipy_parts(op, name, x)
    else:
        kind = type(x).__name__
        dense = "a dense array" if isinstance(x, np.ndarray) else kind
        raise TypeError(f"[{op}] {name} is {dense}, expected {EXPECTED}")
    if not _are_usual(*parts[:3]):
        _check_parts(op, name, parts)
    if parts.indptr.shape[0] < 1:
        raise ValueError(f"[{op}] {name}'s indptr is empty, expected one more than there are rows")
    if parts.indices.shape[0] != parts.values.shape[0]:
        raise ValueError(
            f"[{op}] {name} has {parts.indices.shape[0]} indices but {parts.values.shape[0]} values"
        )
    return parts


_USUAL = {np.dtype(np.int32), np.dtype(np.int64)}
_FLOAT32 = np.dtype(np.float32)


def _are_usual(indptr, indices, values) -> bool:
    """Whether these are contiguous arrays of numpy, of dtypes that no kernel copies: no check of
    `_check_parts` can fail. The words of its errors alone take 4 us, a tenth of a small search.
    """
    return (
        (type(indptr) is type(indices) is type(values) is np.ndarray)
        and (indptr.ndim == indices.ndim == values.ndim == 1)
        and (indptr.dtype in _USUAL and indices.dtype in _USUAL and values.dtype == _FLOAT32)
        and (indices.flags.c_contiguous and values.flags.c_contiguous)
    )


def _check_parts(op: str, name: str, parts: Parts) -> None:
    """Kinds, dtypes and ranks."""
    given = {f"{name}'s {part}": getattr(parts, part) for part in ("indptr", "indices", "values")}
    is_numpy(op, **given, cuda=True)
    check_dtype(op, f"{name}'s indptr", parts.indptr, INTEGERS)
    check_dtype(op, f"{name}'s indices", parts.indices, INTEGERS)
    check_dtype(op, f"{name}'s values", parts.values, FLOATS)
    for part, array in given.items():
        if array.ndim != 1:
            raise ValueError(f"[{op}] {part} have shape {tuple(array.shape)}, expected one axis")


def is_dense(x) -> bool:
    """Whether x is an array or a tensor, and no sparse one."""
    return isinstance(x, np.ndarray) or str(getattr(x, "layout", "")) == "torch.strided"


def check_columns(op, name, columns):
    if columns > MOST_COLUMNS:
        raise ValueError(f"[{op}] {name} has {columns} columns, expected at most {MOST_COLUMNS}")


def _check_matrix(op, name, shape):
    if len(shape) != 2:
        raise ValueError(f"[{op}] {name} has shape {tuple(shape)}, expected (rows, columns)")
    check_columns(op, name, shape[1])


def _torch_parts(op, name, x) -> Parts:
    import torch

    if x.layout == torch.sparse_csr:
        _check_matrix(op, name, x.shape)
        return Parts(x.crow_indices(), x.col_indices(), x.values(), x.shape[1])
    if x.layout != torch.sparse_coo:
        what = "dense" if x.layout == torch.strided else str(x.layout).removeprefix("torch.")
        raise TypeError(f"[{op}] {name} is a {what} tensor, expected {EXPECTED}")
    _check_matrix(op, name, x.shape)
    if x.dense_dim():
        raise ValueError(f"[{op}] {name} has {x.dense_dim()} dense axes, expected none")
    if x.requires_grad:  # the gradient goes by way of the coalesced tensor
        x = x.coalesce()
    row, column = x._indices()
    values = x.values() if x.is_coalesced() else x._values()
    order = None
    if not x.is_coalesced():
        row, order = torch.sort(row, stable=True)
        column, values = column[order], values[order]
    indptr = torch.searchsorted(row, torch.arange(x.shape[0] + 1, device=row.device))
    return Parts(indptr, column, values, x.shape[1], order)


def _scipy_parts(op, name, x) -> Parts:
    _check_matrix(op, name, x.shape)
    if x.format == "csr":
        return Parts(x.indptr, x.indices, x.data, x.shape[1])
    coo = x.tocoo()
    order = np.argsort(coo.row, kind="stable")
    indptr = np.zeros(x.shape[0] + 1, np.int64)
    np.cumsum(np.bincount(coo.row, minlength=x.shape[0]), out=indptr[1:])
    return Parts(indptr, coo.col[order], coo.data[order], x.shape[1], order)
