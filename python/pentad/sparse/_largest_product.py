# SPDX-License-Identifier: Apache-2.0
"""The dictionary row of the largest product with each vector, in numpy or torch.

The definition is that of `pentad.pq.assign` with metric "ip": a sum in double over rising columns,
ties to the smaller row. `assign` brings the dictionary into an order of its own first, which for
fewer than some hundred vectors takes longer than the products themselves (8192 rows of 256, one
thread: 28 ms for 64 vectors and 55 for 1024, against 6 and 70 by a plain product and its argmax).
For those, a plain product bounds, and what is near the largest is settled by the definition.
"""

import numpy as np

from pentad.pq.assign import MOST_CENTROIDS, assign

_FEW = 512  # vectors below which the plain product is faster
_HELD = 1 << 22  # products at a time


def largest(x, dictionary, absolute):
    """(n,) int64 of x (n, d) and dictionary (V, d), one dtype and finite, rows of length 1.

    `absolute`: of the largest magnitude.
    """
    if len(x) >= _FEW:
        return _by_assign(x, dictionary, absolute)
    step = max(1, _HELD // len(dictionary))
    parts = [
        _by_product(x[begin : begin + step], dictionary, absolute)
        for begin in range(0, len(x), step)
    ]
    return _concatenate(parts) if parts else zeros(x, 0)


def _by_product(x, dictionary, absolute):
    scores = x @ dictionary.T
    scores = abs(scores) if absolute else scores
    most = scores.max(1) if isinstance(x, np.ndarray) else scores.amax(1)
    # Twice the error of a sum in any order, and that of the definition.
    error = (x.shape[1] + 4) * float(np.finfo(_wide_dtype(x)).eps) / 2 + _narrowing(x)
    slack = 4.1 * error * squares(x) ** 0.5 + x.shape[1] * 2.0**-120  # of what underflows
    least = most - slack
    least = least.astype(x.dtype) if isinstance(x, np.ndarray) else least.to(x.dtype)
    row, column = _nonzero(scores >= least[:, None])
    if len(row) == len(x):
        return column
    if len(row) > 4 * len(x) + 64:  # rows that are nearly equal
        return _by_assign(x, dictionary, absolute)
    return _settled(x, dictionary, absolute, row, column)


def _by_assign(x, dictionary, absolute):
    signs = (x, -x) if absolute else (x,)
    found = []
    for begin in range(0, len(dictionary), MOST_CENTROIDS):
        books = dictionary[None, begin : begin + MOST_CENTROIDS]
        for signed in signs:
            found.append(_integers(assign(signed, books, metric="ip"))[:, 0] + begin)
    if len(found) == 1:
        return found[0]
    column = stack(found)
    row = np.repeat(np.arange(len(x)), len(found))
    return _settled(x, dictionary, absolute, row, column.reshape(-1))


def _settled(x, dictionary, absolute, row, column):
    """By the definition, among candidates of rising rows."""
    products = _double(x[row]) * _double(dictionary[column])
    sums = products.cumsum(-1)[:, -1]
    sums = abs(sums) if absolute else sums
    row, column, sums = (np.asarray(a) for a in (row, column, sums))
    order = np.lexsort((column, -sums, row))
    first = np.unique(row[order], return_index=True)[1]
    best = column[order][first]
    if isinstance(x, np.ndarray):
        return best
    import torch

    return torch.from_numpy(best)


# --- Both kinds of array --------------------------------------------------------------------------


def squares(x):
    """Squared lengths, in double: those of large float32 numbers are infinite."""
    return (_double(x) ** 2).sum(-1)


def zeros(x, n):
    return np.zeros(n, np.int64) if isinstance(x, np.ndarray) else x.new_zeros(n).long()


def stack(parts):
    """Along the second axis."""
    if isinstance(parts[0], np.ndarray):
        return np.stack(parts, 1)
    import torch

    return torch.stack(parts, 1)


def _concatenate(parts):
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    import torch

    return torch.cat(parts)


def _wide_dtype(x):
    return np.float64 if "64" in str(x.dtype) else np.float32


def _double(x):
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.double()


def _integers(x):
    return x.astype(np.int64) if isinstance(x, np.ndarray) else x.long()


def _nonzero(mask):
    return mask.nonzero() if isinstance(mask, np.ndarray) else mask.nonzero(as_tuple=True)


def _narrowing(x):
    """What torch may round factors to, where it was told that this is precise enough."""
    if isinstance(x, np.ndarray):
        return 0.0
    import torch

    return 0.0 if torch.get_float32_matmul_precision() == "highest" else 2.0**-7
