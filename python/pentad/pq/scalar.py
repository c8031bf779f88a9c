# SPDX-License-Identifier: Apache-2.0
"""Quantization of single numbers: finite levels (FSQ) and signs (LFQ), and their indices.

Plain functions of torch or numpy, in float32 (float64 for float64).
"""

import math
from typing import Any, NamedTuple

import numpy as np

from pentad._arrays import dtype_name, is_numpy
from pentad._checks import FLOATS, check_choice, check_count, check_counts, check_dtype
from pentad.pq.lookup import INTEGERS

_MOST_BITS = 62  # of an index
_SLACK = 1e-3


class ScalarCodes(NamedTuple):
    """What `fsq` and `lfq` return: the numbers put in the place of x, their codes, and one index.

    Examples
    --------
    >>> import numpy as np
    >>> result = pentad.pq.lfq(np.array([0.5, -2.0]))
    >>> isinstance(result, pentad.pq.ScalarCodes), result.codes
    (True, array([1, 0]))
    """

    quantized: Any
    codes: Any
    index: Any


# --- Finite scalar quantization -------------------------------------------------------------------


def fsq(x, levels):
    """Round each number to one of finitely many levels.

    Number j is bounded by ``tanh(x + shift) * (levels[j] - 1) * (1 + 1e-3) / 2``, shifted by a half
    for an even count so that there are as many values as levels, rounded, and divided by
    ``levels[j] // 2`` to lie in [-1, 1] (Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE
    Made Simple", section 3.1 and appendix A.1). Zero goes to zero. The gradient of the rounding is
    taken to be 1.

    Parameters
    ----------
    x : (..., d) float32, float16, bfloat16 or float64
        Differentiable.
    levels : sequence of d int
        Each at least 2, and at most 2**62 multiplied.

    Returns
    -------
    ScalarCodes
        ``quantized`` (..., d) of the dtype of `x`; ``codes`` (..., d) int64, 0 to
        ``levels[j] - 1``, and 0 for a NaN, which stays one;
        ``index`` (...) int64, the codes as digits of a mixed radix, the first the lowest.

    Raises
    ------
    ValueError
        For a last dimension that is not as long as `levels`.

    Examples
    --------
    >>> import numpy as np
    >>> result = pentad.pq.fsq(np.array([[0.0, 9.0, -9.0]]), [8, 5, 5])
    >>> result.quantized
    array([[ 0.,  1., -1.]])
    >>> result.codes, result.index
    (array([[4, 4, 0]]), array([36]))
    """
    op = "pq.fsq"
    numpy = is_numpy(op, any_device=True, x=x)
    check_dtype(op, "x", x, FLOATS)
    levels = _check_levels(op, levels)
    if x.ndim < 1 or x.shape[-1] != len(levels):
        raise ValueError(f"[{op}] x has shape {tuple(x.shape)} but there are {len(levels)} levels")
    wide = _widened(x)
    half = _constant(wide, [n // 2 for n in levels])
    reach = _constant(wide, [(n - 1) * (1 + _SLACK) / 2 for n in levels])
    offset = _constant(wide, [0.5 * (1 - n % 2) for n in levels])
    shift = _constant(
        wide, [math.atanh(0.5 * (1 - n % 2) / ((n - 1) * (1 + _SLACK) / 2)) for n in levels]
    )
    top = _constant(wide, [(n - 1) // 2 for n in levels])
    if numpy:
        rounded = np.clip(np.rint(np.tanh(wide + shift) * reach - offset), -half, top)
        codes = np.nan_to_num(rounded + half).astype(np.int64)
        return ScalarCodes((rounded / half).astype(x.dtype), codes, _index(codes, levels))
    import torch

    bounded = torch.tanh(wide + shift) * reach - offset
    # The slack of very many levels reaches beyond the last one.
    rounded = torch.minimum(torch.maximum(bounded.detach().round(), -half), top)
    codes = (rounded + half).nan_to_num().long()
    # Not bounded + (rounded - bounded), whose value would be off by roundings.
    straight = rounded + (bounded - bounded.detach())
    return ScalarCodes((straight / half).to(x.dtype), codes, _index(codes, levels))


def fsq_decode(index, levels):
    """The quantized vectors of `fsq` from their indices.

    Parameters
    ----------
    index : (...) of any integer dtype
        0 to the product of `levels` less one; digits beyond it are dropped.
    levels : sequence of d int
        As in `fsq`.

    Returns
    -------
    (..., d) float32

    Examples
    --------
    >>> import numpy as np
    >>> pentad.pq.fsq_decode(np.array([36]), [8, 5, 5])
    array([[ 0.,  1., -1.]], dtype=float32)
    """
    op = "pq.fsq_decode"
    is_numpy(op, any_device=True, index=index)
    check_dtype(op, "index", index, INTEGERS)
    levels = _check_levels(op, levels)
    parts, place = [], 1
    wide = _as_int64(index)
    for n in levels:
        parts.append((wide // place) % n)
        place *= n
    codes = _stack(parts)
    half = _constant(_floats(codes), [n // 2 for n in levels])
    return (_floats(codes) - half) / half


# --- Signs ----------------------------------------------------------------------------------------


def lfq(x):
    """The sign of each number, and the signs as the bits of an index.

    Lookup-free quantization (Yu et al. 2024, "Language Model Beats Diffusion: Tokenizer is Key to
    Visual Generation", section 3.1): +1 where ``x > 0``, else -1. The gradient is taken to be that
    of the identity. `lfq_entropy` is its auxiliary loss.

    Parameters
    ----------
    x : (..., d) float32, float16, bfloat16 or float64
        d at most 62. Differentiable.

    Returns
    -------
    ScalarCodes
        ``quantized`` (..., d) of the dtype of `x`; ``codes`` (..., d) int64, 1 where positive,
        and 0 for a NaN, which stays one; ``index`` (...) int64, bit j of which is code j.

    Examples
    --------
    >>> import numpy as np
    >>> pentad.pq.lfq(np.array([[0.5, -2.0, 1.0]])).index
    array([5])
    """
    op = "pq.lfq"
    numpy = is_numpy(op, any_device=True, x=x)
    check_dtype(op, "x", x, FLOATS)
    if x.ndim < 1 or not 1 <= x.shape[-1] <= _MOST_BITS:
        raise ValueError(f"[{op}] x has shape {tuple(x.shape)}, expected 1 to {_MOST_BITS} columns")
    positive = x > 0
    if numpy:
        codes = positive.astype(np.int64)
        signs = np.where(np.isnan(x), x, np.where(positive, 1, -1)).astype(x.dtype)
        return ScalarCodes(signs, codes, _index(codes, [2] * x.shape[-1]))
    import torch

    codes = positive.long()
    signs = torch.where(positive, 1.0, -1.0).to(x.dtype).where(~x.isnan(), x)
    if x.requires_grad and torch.is_grad_enabled():
        finite = x.where(x.isfinite(), 0)  # an infinity less itself is none
        signs = signs.detach() + (finite - finite.detach())
    return ScalarCodes(signs, codes, _index(codes, [2] * x.shape[-1]))


def lfq_decode(index, dim):
    """The signs of `lfq` from their indices.

    Parameters
    ----------
    index : (...) of any integer dtype
    dim : int
        1 to 62.

    Returns
    -------
    (..., dim) float32

    Examples
    --------
    >>> import numpy as np
    >>> pentad.pq.lfq_decode(np.array([5]), 3)
    array([[ 1., -1.,  1.]], dtype=float32)
    """
    op = "pq.lfq_decode"
    is_numpy(op, any_device=True, index=index)
    check_dtype(op, "index", index, INTEGERS)
    dim = check_count(op, "dim", dim, 1)
    if dim > _MOST_BITS:
        raise ValueError(f"[{op}] dim is {dim}, expected 1 to {_MOST_BITS}")
    wide = _as_int64(index)
    return _floats(_stack([(wide >> j) & 1 for j in range(dim)])) * 2 - 1


def lfq_entropy(x, *, temperature=1.0, reduction="mean"):
    """The entropy loss of `lfq`: codes sure for each vector, and evenly used by all.

    With ``p = sigmoid(4 x / temperature)`` the probability of +1 (a softmax over the squared
    distances to both signs), the mean entropy of the vectors' codes less that of the mean code, of
    independent bits (Yu et al. 2024, equation 5, in the factorized form of its section 3.1).

    Parameters
    ----------
    x : (..., d) float32, float16, bfloat16 or float64
        Differentiable.
    temperature : float
        Above 0.
    reduction : {"mean", "none"}
        With "none" both entropies, (2,): of the vectors, of their mean.

    Returns
    -------
    () or (2,) float32, or float64 for float64
        In nats.

    Examples
    --------
    >>> import numpy as np
    >>> round(float(pentad.pq.lfq_entropy(np.array([[9.0], [-9.0]]))), 4)
    -0.6931
    """
    op = "pq.lfq_entropy"
    numpy = is_numpy(op, any_device=True, x=x)
    check_dtype(op, "x", x, FLOATS)
    check_choice(op, "reduction", reduction, ("mean", "none"))
    if x.ndim < 1 or not math.prod(x.shape[:-1]):
        raise ValueError(f"[{op}] x has shape {tuple(x.shape)}, expected at least one vector")
    if not temperature > 0:
        raise ValueError(f"[{op}] temperature is {temperature}, expected above 0")
    logits = _widened(x).reshape(-1, x.shape[-1]) * (4 / temperature)
    if numpy:
        positive = 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
        both = (_entropy(positive).sum(1).mean(), _entropy(positive.mean(0)).sum())
        return both[0] - both[1] if reduction == "mean" else np.stack(both)
    import torch

    positive = torch.sigmoid(logits)
    both = (_entropy(positive).sum(1).mean(), _entropy(positive.mean(0)).sum())
    return both[0] - both[1] if reduction == "mean" else torch.stack(both)


def _entropy(p):
    """Of one bit; 0 where it is sure."""
    if isinstance(p, np.ndarray):
        least = np.finfo(p.dtype).tiny
        return -(p * np.log(p.clip(least)) + (1 - p) * np.log((1 - p).clip(least)))
    import torch

    least = torch.finfo(p.dtype).tiny
    return -(p * p.clamp(min=least).log() + (1 - p) * (1 - p).clamp(min=least).log())


# --- Both kinds of arrays -------------------------------------------------------------------------


def _check_levels(op, levels):
    levels = check_counts(op, "levels", levels, 2)
    if not levels or math.prod(levels) > 2**_MOST_BITS:
        raise ValueError(
            f"[{op}] levels are {levels}, expected at least one, and at most 2**{_MOST_BITS} "
            "multiplied"
        )
    return levels


def _widened(x):
    if isinstance(x, np.ndarray):
        return x if x.dtype == np.float64 else x.astype(np.float32)
    return x if dtype_name(x) == "float64" else x.float()


def _constant(like, values):
    if isinstance(like, np.ndarray):
        return np.array(values, like.dtype)
    return like.new_tensor(values)


def _as_int64(array):
    return array.astype(np.int64) if isinstance(array, np.ndarray) else array.long()


def _floats(codes):
    return codes.astype(np.float32) if isinstance(codes, np.ndarray) else codes.float()


def _stack(parts):
    if isinstance(parts[0], np.ndarray):
        return np.stack(parts, -1)
    import torch

    return torch.stack(parts, -1)


def _index(codes, levels):
    places = [math.prod(levels[:j]) for j in range(len(levels))]
    if isinstance(codes, np.ndarray):
        return (codes * np.array(places)).sum(-1)
    return (codes * codes.new_tensor(places)).sum(-1)
