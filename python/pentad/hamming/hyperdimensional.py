# SPDX-License-Identifier: Apache-2.0
"""Hyperdimensional arithmetic on packed codes: binding, superposition, rotation.

The operations of binary spatter codes (Kanerva 1996, "Binary spatter-coding of ordered K-tuples").
"""

import math
import operator

import numpy as np

from pentad._arrays import is_numpy
from pentad.hamming import _kernels
from pentad.hamming.functional import (
    check_choice,
    check_codes,
    check_dim,
    check_dtype,
    check_same_bytes,
    pack,
)

_TIES = ("first", "zero", "one")


def bind(a, b):
    """Bind codes by exclusive or, which is its own inverse and keeps distances.

    Parameters
    ----------
    a, b : (..., bytes) uint8
        Broadcast against each other.

    Returns
    -------
    (..., bytes) uint8

    Examples
    --------
    >>> import numpy as np
    >>> pentad.hamming.bind(np.array([12], np.uint8), np.array([10], np.uint8))
    array([6], dtype=uint8)
    """
    op = "hamming.bind"
    is_numpy(op, a=a, b=b, any_device=True)  # an operator of numpy's and torch's own
    check_codes(op, "a", a, rank=None)
    check_codes(op, "b", b, rank=None)
    check_same_bytes(op, "a", a, "b", b)
    for m, n in zip(reversed(a.shape[:-1]), reversed(b.shape[:-1]), strict=False):
        if m != n and m != 1 and n != 1:
            raise ValueError(
                f"[{op}] a has shape {tuple(a.shape)}, which does not broadcast against b's "
                f"{tuple(b.shape)}"
            )
    return a ^ b


def bundle(codes, dim, *, weights=None, ties="first"):
    """The bitwise majority of codes, the superposition of binary spatter codes (Kanerva 1996).

    Parameters
    ----------
    codes : (..., m, ceil(dim / 8)) uint8
        At least one code.
    dim : int
    weights : (m,) or (..., m) float32, optional
        One vote each by default. Sums are float32: exact for integer weights that total below
        2**24.
    ties : {"first", "zero", "one"}
        A bit whose votes cancel takes the first code's bit (unbiased, the default), 0, or 1.

    Returns
    -------
    (..., ceil(dim / 8)) uint8

    Examples
    --------
    >>> import numpy as np
    >>> codes = np.array([[0b11000000], [0b10100000], [0b10010000]], np.uint8)
    >>> pentad.hamming.bundle(codes, 4)
    array([128], dtype=uint8)
    """
    op = "hamming.bundle"
    numpy = is_numpy(op, codes=codes, weights=weights, optional=["weights"], cuda=True)
    check_codes(op, "codes", codes, rank=None)
    check_choice(op, "ties", ties, _TIES)
    dim = check_dim(op, codes, dim)
    if codes.ndim < 2 or codes.shape[-2] < 1:
        raise ValueError(
            f"[{op}] codes have shape {tuple(codes.shape)}, expected (..., m >= 1, bytes)"
        )
    lead, m = codes.shape[:-2], codes.shape[-2]
    batch = math.prod(lead)
    if weights is None:
        weights = np.ones(m, np.float32) if numpy else codes.new_ones(m).float()
    check_dtype(op, "weights", weights, ("float32",))
    if tuple(weights.shape) not in ((m,), tuple(codes.shape[:-1])):
        raise ValueError(
            f"[{op}] weights have shape {tuple(weights.shape)}, expected ({m},) or "
            f"{tuple(codes.shape[:-1])}"
        )
    flat = codes.reshape(batch, m, codes.shape[-1])
    if numpy:
        rows = np.broadcast_to(weights, (*lead, m)).reshape(batch, 1, m)
        votes = _kernels.weighted_sum(rows, flat, dim)[:, 0]
    else:
        from pentad.hamming import autograd

        rows = weights.detach().expand(*lead, m).reshape(batch, 1, m)
        votes = autograd.weighted_sum_op(rows, flat, dim)[:, 0]
    result = pack(votes)
    if ties == "one":
        result = result | pack(votes == 0)
    elif ties == "first":
        result = result | (pack(votes == 0) & flat[:, 0])
    return result.reshape(*lead, codes.shape[-1])


def permute(codes, dim, shift):
    """Rotate the bits: bit ``(j + shift) % dim`` of the result is bit j of the code.

    Parameters
    ----------
    codes : (..., ceil(dim / 8)) uint8
    dim : int
    shift : int
        May be negative.

    Returns
    -------
    (..., ceil(dim / 8)) uint8

    Examples
    --------
    >>> import numpy as np
    >>> pentad.hamming.permute(np.array([0b10000000], np.uint8), 5, -1)
    array([8], dtype=uint8)
    """
    op = "hamming.permute"
    numpy = is_numpy(op, codes=codes, cuda=True)
    check_codes(op, "codes", codes, rank=None)
    dim = check_dim(op, codes, dim)
    shift = operator.index(shift) % dim
    if numpy:
        return _kernels.permute(codes, dim, shift)
    from pentad.hamming import autograd

    return autograd.permute(codes, dim, shift)
