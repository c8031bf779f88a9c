# SPDX-License-Identifier: Apache-2.0
"""Sums whose bits depend on nothing but their terms: double, over rising columns, then float32.

What an index makes of a vector before it is coded or compared goes through these, so that codes and
scores are the same for every batch, thread count and library that multiplies matrices.
"""

import numpy as np

_CHUNK = 1 << 20  # elements at a time


def _in_chunks(function, x, columns):
    """function over the rows of x, a chunk at a time: doubles of everything would take space."""
    step = max(1, _CHUNK // max(x.shape[1], columns, 1))
    out = np.empty((len(x), columns), np.float32)
    for first in range(0, len(x), step):
        out[first : first + step] = function(x[first : first + step])
    return out


def summed(terms: np.ndarray) -> np.ndarray:
    """Sums over the last axis of doubles, in its order."""
    if not terms.shape[-1]:
        return np.zeros(terms.shape[:-1])
    return np.add.accumulate(terms, axis=-1)[..., -1]


def normalized(x: np.ndarray) -> np.ndarray:
    """Rows of float32 `x` over their lengths; zeros stay zeros."""

    def of(rows):
        rows = rows.astype(np.float64)
        length = np.sqrt(summed(rows * rows))
        return rows / np.where(length > 0, length, 1)[:, None]

    return _in_chunks(of, x, x.shape[1])


class Rotation:
    """``x @ rotation.T`` of float32 arrays (n, d) and (d, d).

    A matrix product of doubles differs from the sum in order by less than 2 d 2^-53 |x| |row|, as
    either differs from the true value by half of that (products of float32 numbers are exact in
    double). Where this cannot change the rounding to float32, which is nearly everywhere, the
    product is the sum; the rest is summed in order.
    """

    def __init__(self, rotation: np.ndarray):
        self.rows = rows = rotation.astype(np.float64)
        self.longest = np.sqrt(np.einsum("ij,ij->i", rows, rows).max(initial=0)) * (1 + 1e-9)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return _in_chunks(self._of, x, len(self.rows))

    def _of(self, part):
        part, d = part.astype(np.float64), self.rows.shape[1]
        product = part @ self.rows.T
        lengths = np.sqrt((part * part).sum(axis=1, keepdims=True))
        bound = 2.1 * d * 2.0**-53 * self.longest * lengths
        low = (product - bound).astype(np.float32)
        n, i = np.nonzero(low != (product + bound).astype(np.float32))
        total = np.zeros(len(n))
        for j in range(d if len(n) else 0):
            total += part[n, j] * self.rows[i, j]
        low[n, i] = total
        return low + np.float32(0)  # which makes 0 of -0


def rotated(x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    return Rotation(rotation)(x)


def inner_products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(...) float32 sums of x * y over the last axis."""
    return summed(x.astype(np.float64) * y).astype(np.float32)


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(...) float32 sums of (x - y)^2 over the last axis."""
    difference = x.astype(np.float64) - y
    return summed(difference * difference).astype(np.float32)
