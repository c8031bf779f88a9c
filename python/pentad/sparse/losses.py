# SPDX-License-Identifier: Apache-2.0
"""Losses that make activations sparse, of dense arrays and of sparse rows."""

import numpy as np

from pentad._arrays import is_numpy
from pentad._checks import FLOATS, check_count, check_dtype
from pentad.sparse._csr import is_dense, rows_and_values

MOST_SUMS = 1 << 20  # columns summed in an array of them all, however few values there are


def flops_loss(activations, threshold=None):
    """The expected work of scoring: ``sum_j (mean_i |x_ij|) ** 2``.

    Paria et al. 2020, "Minimizing FLOPs to Learn Efficient Sparse Representations", the relaxed
    regularizer, as SPLADE has it. With `threshold`, rows of few activations count as zeros, so that
    only long ones become shorter (Geng et al. 2025, "Towards Competitive Search Relevance For
    Inference-Free Learned Sparse Retrievers"). What `FlopsLoss` of sentence-transformers computes
    for activations that are not negative.

    Parameters
    ----------
    activations : (B, V) float32, float16, bfloat16 or float64, or sparse rows
        A torch tensor, dense, sparse CSR or COO, a numpy array, a scipy.sparse matrix, or a tuple
        (indptr, indices, values). Differentiable; of sparse rows the values are, and duplicates
        count as their sum.
    threshold : int, optional
        Rows with at most so many entries other than 0 are taken for rows of zeros; the mean is over
        all rows still.

    Returns
    -------
    () float32, or float64 for float64
        0 for no rows. The gradient at 0 is 0.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    >>> float(pentad.sparse.flops_loss(x))
    5.0
    >>> float(pentad.sparse.flops_loss(x, threshold=1))
    1.25
    """
    op = "sparse.flops_loss"
    if threshold is not None:
        threshold = check_count(op, "threshold", threshold)
    if not is_dense(activations):
        return _sparse_flops(op, activations, threshold)
    x = _dense(op, activations)
    if threshold is not None:
        x = x * (count_nonzero(activations) > threshold)[:, None]
    return ((abs(x).sum(0) / max(x.shape[0], 1)) ** 2).sum()


def l1_loss(activations):
    """The mean over rows of the sum of magnitudes: ``mean_i sum_j |x_ij|``.

    Parameters
    ----------
    activations : (B, V) float32, float16, bfloat16 or float64, or sparse rows
        As in `flops_loss`. Differentiable.

    Returns
    -------
    () float32, or float64 for float64
        0 for no rows. The gradient at 0 is 0.

    Examples
    --------
    >>> import numpy as np
    >>> float(pentad.sparse.l1_loss(np.array([[1.0, 0.0, -2.0], [3.0, 0.0, 0.0]])))
    3.0
    """
    op = "sparse.l1_loss"
    if not is_dense(activations):
        rows, values = rows_and_values(op, "activations", activations)
        return abs(values).sum() / max(rows.shape[0], 1)
    x = _dense(op, activations)
    return abs(x).sum() / max(x.shape[0], 1)


def count_nonzero(x):
    return (x != 0).sum(1)


def _dense(op, x):
    """Of any device, in float32 at least."""
    is_numpy(op, activations=x, any_device=True)
    check_dtype(op, "activations", x, FLOATS)
    if x.ndim != 2:
        raise ValueError(f"[{op}] activations have shape {tuple(x.shape)}, expected (B, V)")
    return _wide(x)


def _wide(x):
    if isinstance(x, np.ndarray):
        return x.astype(np.promote_types(x.dtype, np.float32), copy=False)
    return x if "float64" in str(x.dtype) else x.float()


def _sparse_flops(op, x, threshold):
    rows, values = rows_and_values(op, "activations", x)
    values, columns = abs(values), rows.indices
    if threshold is not None:
        row = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
        active = np.bincount(row, rows.values != 0, minlength=rows.shape[0])
        values = values * _as(values, (active > threshold)[row])
    count = rows.shape[1]
    if count > MOST_SUMS + 4 * len(columns):  # a vocabulary mostly unseen
        distinct, columns = np.unique(columns, return_inverse=True)
        count = len(distinct)
    if isinstance(values, np.ndarray):
        sums = np.bincount(columns, values, minlength=count)
        loss = ((sums / max(rows.shape[0], 1)) ** 2).sum()
        return values.dtype.type(loss)
    index = _as(values, columns.astype(np.int64))
    sums = values.new_zeros(count).index_add(0, index, values)
    return ((sums / max(rows.shape[0], 1)) ** 2).sum()


def _as(values, array):
    if isinstance(values, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array)
