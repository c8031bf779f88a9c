# SPDX-License-Identifier: Apache-2.0
"""The k largest numbers of each row, dense or as sparse codes.

The mathematics stand in ``csrc/sparse/select.h``.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from pentad import _C
from pentad._arrays import is_numpy, on_device
from pentad._checks import FLOATS, check_count, check_dtype


class SparseCodes(NamedTuple):
    """Sparse rows: the tuple that `score`, `sparse_decode` and `SparseIndex` take as it is.

    Fields: ``indptr`` (n + 1,) int64, where each row begins and ends; ``indices`` (nnz,) int32,
    rising in each row; ``values`` (nnz,), differentiable in torch; ``columns``, their number. A
    torch or scipy matrix is made of them by ``torch.sparse_csr_tensor(*codes[:3], size=(n,
    codes.columns))`` or ``scipy.sparse.csr_array((codes.values, codes.indices, codes.indptr),
    shape=(n, codes.columns))``.

    Examples
    --------
    >>> import numpy as np
    >>> codes = pentad.sparse.topk_codes(np.array([[3.0, 0.0, 5.0]]), 2)
    >>> isinstance(codes, pentad.sparse.SparseCodes), codes.columns
    (True, 3)
    >>> codes.dense()
    array([[3., 0., 5.]])
    """

    indptr: Any
    indices: Any
    values: Any
    columns: int

    def dense(self):
        """(n, columns); duplicates add."""
        n = len(self.indptr) - 1
        if isinstance(self.values, np.ndarray):
            out = np.zeros((n, self.columns), self.values.dtype)
            np.add.at(
                out, (np.repeat(np.arange(n), np.diff(self.indptr)), self.indices), self.values
            )
            return out
        from pentad.sparse import topk_autograd

        return topk_autograd.dense(n, *self)


def topk_sparsify(x, k, *, absolute=False, straight_through=False):
    """Keep the k largest numbers of each row and put 0 for the others.

    The activation of k-sparse autoencoders (Makhzani and Frey 2013, arXiv 1312.5663, section 2).

    Parameters
    ----------
    x : (..., d) float32, float16, bfloat16 or float64
        Of any strides. Differentiable.
    k : int
        At least 1; where it is d or more, all are kept.
    absolute : bool
        Largest by magnitude. A NaN is larger than all either way.
    straight_through : bool
        Give the gradient of the result to every number of x, and not to those kept alone.

    Returns
    -------
    (..., d) of the dtype of `x`
        Ties go to the smaller column; the result does not depend on the instruction set or the
        number of threads.

    Raises
    ------
    ValueError
        For a k below 1.
    TypeError
        For what are no floats.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, -4.0, 3.0, 3.0]])
    >>> pentad.sparse.topk_sparsify(x, 1)
    array([[0., 0., 3., 0.]])
    >>> pentad.sparse.topk_sparsify(x, 2, absolute=True)
    array([[ 0., -4.,  3.,  0.]])
    """
    numpy, rows, k = _rows("sparse.topk_sparsify", x, k)
    if numpy:
        out = np.empty(rows.shape, rows.dtype)
        _C.sparse_topk_sparsify(rows, k, bool(absolute), out, *on_device(rows))
    else:
        from pentad.sparse import topk_autograd

        out = topk_autograd.sparsify(rows, k, bool(absolute), straight_through)
    return out if x.ndim == 2 else out.reshape(x.shape)


def topk_codes(x, k, *, absolute=False):
    """The k largest numbers of each row as sparse rows, for `score` and indexes as they are.

    What is kept is what `topk_sparsify` keeps, so ``topk_codes(x, k).dense()`` is its result. Rows
    have the same number of entries, ``min(k, d)``: `indices` and `values` may be viewed as
    ``(n, k)``.

    Parameters
    ----------
    x : (..., d) float32, float16, bfloat16 or float64
        Of any strides; the dimensions before the last become the n rows. Differentiable.
    k : int
        At least 1.
    absolute : bool
        Largest by magnitude.

    Returns
    -------
    SparseCodes
        Values of the dtype of `x`; zeros among the k largest are entries too.

    Raises
    ------
    ValueError
        For a k below 1.
    TypeError
        For what are no floats.

    Examples
    --------
    >>> import numpy as np
    >>> codes = pentad.sparse.topk_codes(np.array([[1.0, -4.0, 3.0], [7.0, 8.0, 9.0]]), 2)
    >>> codes.indptr, codes.indices, codes.values
    (array([0, 2, 4]), array([0, 2, 1, 2], dtype=int32), array([1., 3., 8., 9.]))
    """
    numpy, rows, k = _rows("sparse.topk_codes", x, k)
    if numpy:
        indices, values = np.empty((len(rows), k), np.int32), np.empty((len(rows), k), rows.dtype)
        _C.sparse_topk(rows, k, bool(absolute), indices, values, *on_device(rows))
        indptr = np.arange(len(rows) + 1, dtype=np.int64) * k
        return SparseCodes(indptr, indices.reshape(-1), values.reshape(-1), rows.shape[1])
    from pentad.sparse import topk_autograd

    indices, values = topk_autograd.pairs(rows, k, bool(absolute))
    return topk_autograd.of_pairs(indices, values, rows.shape[1])


def _rows(op, x, k):
    """Whether in numpy, (n, d), and the number that is kept."""
    numpy = is_numpy(op, x=x, cuda=True)
    check_dtype(op, "x", x, FLOATS)
    k = check_count(op, "k", k, 1)
    if x.ndim < 1:
        raise ValueError(f"[{op}] x has no dimension, expected (..., d)")
    *lead, columns = x.shape
    rows = x if x.ndim == 2 else x.reshape(math.prod(lead), columns)
    return numpy, rows, min(k, columns)
