# SPDX-License-Identifier: Apache-2.0
"""Matching pursuit: codes found one dictionary row at a time."""

from typing import Any, NamedTuple

import numpy as np

from pentad._arrays import dtype_name, is_numpy
from pentad._checks import FLOATS, check_count, check_dtype
from pentad.sparse import _largest_product as _search
from pentad.sparse._checks import check_number
from pentad.sparse.topk import SparseCodes

_SLACK = 0.01  # of a squared length: sixteen-bit floats are off by a third of it


class MatchingPursuit(NamedTuple):
    """What `matching_pursuit` returns: `SparseCodes` of (n, V), and what they leave of x (n, d).

    Examples
    --------
    >>> import numpy as np
    >>> result = pentad.sparse.matching_pursuit(np.ones((1, 2)), np.eye(2), 1)
    >>> isinstance(result, pentad.sparse.MatchingPursuit), result.residual
    (True, array([[0., 1.]]))
    """

    codes: SparseCodes
    residual: Any


def matching_pursuit(x, dictionary, steps, *, absolute=False, tolerance=0.0):
    """Sparse codes of x by a dictionary, one row of it at a time.

    With r = x at first, each step takes ``j = argmax <r, dictionary[j]>``, adds ``c = <r,
    dictionary[j]>`` to code j and subtracts ``c * dictionary[j]`` from r (Mallat and Zhang 1993,
    "Matching Pursuits with Time-Frequency Dictionaries"; with the argmax of the signed products:
    Costa et al. 2025, "From Flat to Hierarchical: Extracting Sparse Representations with Matching
    Pursuit", arXiv 2506.03093). The argmax of an r is that of sums in double
    over rising columns, with ties to the smaller j, as `pentad.pq.assign` has it.

    Parameters
    ----------
    x : (n, d) float32, float16, bfloat16 or float64
        Differentiable.
    dictionary : (V, d) of rows of length 1
        Differentiable. The gradients, of both, are those for the rows that were taken; that other
        rows would have been has none.
    steps : int
        At least 1.
    absolute : bool
        Take the largest magnitude of a product, so that codes may be negative.
    tolerance : float
        A row of x is done when the length of its r is at most `tolerance` times its own. It is
        also done when no product is above 0 (with `absolute`: other than 0), which by itself would
        make r grow or stand still.

    Returns
    -------
    MatchingPursuit
        ``codes`` with at most `steps` entries a row, and ``residual`` (n, d), so that
        ``sparse_decode(codes, dictionary) + residual`` is x but for roundings; both float32, or
        float64 where an input is.

    Raises
    ------
    ValueError
        For numbers that are not finite, rows of `dictionary` that are not of length 1 within half a
        percent, and sizes that do not match.
    TypeError
        For what are no floats, and a `tolerance` that is no number.

    Examples
    --------
    >>> import numpy as np
    >>> dictionary = np.array([[1.0, 0.0], [0.6, 0.8]])
    >>> codes, residual = pentad.sparse.matching_pursuit(np.array([[2.2, 1.6]]), dictionary, 2)
    >>> codes.dense().round(3), residual.round(3)
    (array([[0.64, 2.6 ]]), array([[ 0.  , -0.48]]))
    """
    op = "sparse.matching_pursuit"
    numpy = is_numpy(op, x=x, dictionary=dictionary)
    for name, array in (("x", x), ("dictionary", dictionary)):
        check_dtype(op, name, array, FLOATS)
        if array.ndim != 2:
            raise ValueError(f"[{op}] {name} has shape {tuple(array.shape)}, expected two axes")
    if x.shape[1] != dictionary.shape[1] or 0 in dictionary.shape:
        raise ValueError(
            f"[{op}] x has shape {tuple(x.shape)} but dictionary {tuple(dictionary.shape)}, "
            "expected (n, d) and (V, d) with V and d of at least 1"
        )
    steps = check_count(op, "steps", steps, 1)
    tolerance = check_number(op, "tolerance", tolerance)
    if not 0 <= tolerance < 1:
        raise ValueError(f"[{op}] tolerance is {tolerance}, expected 0 to below 1")
    double = "float64" in (dtype_name(x), dtype_name(dictionary))
    if numpy:
        wide = np.float64 if double else np.float32
        x, dictionary = x.astype(wide, copy=False), dictionary.astype(wide, copy=False)
        _check_contents(op, x, dictionary)
        picks, active = _picks(x, dictionary, steps, absolute, tolerance)
        steps_taken, residual = _path(x, dictionary[picks], active)
        codes = _codes_numpy(picks, np.stack(steps_taken, 1), active, len(dictionary))
        return MatchingPursuit(codes, residual)
    from pentad.sparse import pursuit_torch

    return MatchingPursuit(*pursuit_torch.pursue(op, x, dictionary, steps, absolute, tolerance))


def _check_contents(op, x, dictionary):
    if not (abs(x) <= np.finfo(np.float64).max).all():
        raise ValueError(f"[{op}] x has numbers that are not finite")
    squares = (dictionary * dictionary).sum(-1)
    wrong = ~(abs(squares - 1) <= _SLACK)
    if wrong.any():
        row = int(wrong.nonzero()[0][0])
        raise ValueError(
            f"[{op}] dictionary has a row {row} of length {float(squares[row]) ** 0.5:.6g}, "
            "expected rows of length 1"
        )


def _picks(x, dictionary, steps, absolute, tolerance):
    """The row of each step (n, steps) int64, and whether the step was made."""
    rest, limit = x, tolerance**2 * _search.squares(x)
    active = _search.squares(rest) > limit
    pick = _search.zeros(x, len(x))
    picks, made = [], []
    for _ in range(steps):
        pick = pick * 0
        pick[active] = _search.largest(rest[active], dictionary, absolute)
        atom = dictionary[pick]
        product = (rest * atom).sum(-1)
        active = active & ((product != 0) if absolute else (product > 0))
        picks.append(pick)
        made.append(active)
        rest, _ = _step(rest, atom, active)
        active = active & (_search.squares(rest) > limit)
    return _search.stack(picks), _search.stack(made)


def _step(rest, atom, active):
    """What is left of `rest`, and the product, which is 0 where no step is made."""
    product = (rest * atom).sum(-1) * active
    return rest - product[:, None] * atom, product


def _path(x, atoms, active):
    """The products of all steps and the residual; atoms (n, steps, d). Differentiable."""
    rest, products = x, []
    for step in range(atoms.shape[1]):
        rest, product = _step(rest, atoms[:, step], active[:, step])
        products.append(product)
    return products, rest


def _codes_numpy(picks, products, active, columns):
    """A row that was taken twice has one entry."""
    n = len(picks)
    keys = (np.arange(n)[:, None] * columns + picks)[active]
    keys, slot = np.unique(keys, return_inverse=True)
    values = np.bincount(slot, products[active], len(keys)).astype(products.dtype)
    indptr = np.searchsorted(keys, np.arange(n + 1) * columns)
    return SparseCodes(indptr, (keys % columns).astype(np.int32), values, columns)
