# SPDX-License-Identifier: Apache-2.0
"""Functions on binary codes: packing, distances, search, scores of float queries.

A code is a uint8 row in `numpy.packbits` order, as sentence-transformers and faiss use it: bit j of
a vector is bit ``7 - j % 8`` of byte ``j // 8``, a row has ``ceil(dim / 8)`` bytes and its padding
bits are zero. Every function takes torch tensors or numpy arrays, of any strides, and returns the
same kind. The mathematics stand in ``csrc/hamming/hamming.h`` and, in numpy, in
`pentad.hamming.reference`.
"""

import math

import numpy as np

from pentad import _C
from pentad._arrays import is_numpy
from pentad._checks import FLOATS, check_choice, check_count, check_dtype
from pentad.hamming import _kernels

METRICS = ("hamming", "jaccard", "and")
_ESTIMATORS = ("ste", "tanh", "bernoulli")


# --- Checks ---------------------------------------------------------------------------------------


def check_rank(op, name, array, rank, shape):
    if array.ndim != rank:
        raise ValueError(f"[{op}] {name} has shape {tuple(array.shape)}, expected {shape}")


def check_codes(op, name, codes, rank=2):
    check_dtype(op, name, codes, ("uint8",))
    if rank is not None:
        check_rank(op, name, codes, rank, "(n, bytes)")
    elif codes.ndim < 1:
        raise ValueError(f"[{op}] {name} has no dimension")
    if codes.shape[-1] < 1:
        raise ValueError(f"[{op}] {name} has 0 bytes per row, expected at least 1")


def check_same_bytes(op, a_name, a, b_name, b):
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"[{op}] {a_name} have {a.shape[-1]} bytes per row but {b_name} have {b.shape[-1]}"
        )
    if a.shape[-1] > _C.hamming_max_bytes:
        raise ValueError(
            f"[{op}] {a_name} have {a.shape[-1]} bytes per row, at most "
            f"{_C.hamming_max_bytes} are supported"
        )


def check_dim(op, codes, dim):
    dim = check_count(op, "dim", dim, 1)
    if codes.shape[-1] != -(-dim // 8):
        raise ValueError(
            f"[{op}] codes have {codes.shape[-1]} bytes per row but dim {dim} takes {-(-dim // 8)}"
        )
    return dim


def check_mask(op, mask, rows):
    if mask is None:
        return None
    check_dtype(op, "mask", mask, ("bool",))
    if tuple(mask.shape) != (rows,):
        raise ValueError(f"[{op}] mask has shape {tuple(mask.shape)}, expected ({rows},)")
    return np.ascontiguousarray(mask) if isinstance(mask, np.ndarray) else mask.contiguous()


def _as_float32(x):
    """float32 of any strides; a cast takes part in autograd."""
    if isinstance(x, np.ndarray):
        return x.astype(np.float32, copy=False)
    return x.float()


# --- Codes ----------------------------------------------------------------------------------------


def pack(x, threshold=0.0):
    """Pack the signs of `x` into bits: bit j is set where ``x[..., j] > threshold``.

    Parameters
    ----------
    x : (..., dim) float32, float16, bfloat16, float64, int8 or bool
    threshold : float

    Returns
    -------
    (..., ceil(dim / 8)) uint8
        In `numpy.packbits` order; padding bits are zero.

    Raises
    ------
    ValueError
        If `x` contains NaN or has no last dimension. On a CUDA device nobody waits to hear of a
        NaN, which clears its bit.
    TypeError
        For another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> pentad.hamming.pack(np.array([[0.5, -1.0, 2.0]]))
    array([[160]], dtype=uint8)
    """
    numpy = is_numpy("hamming.pack", x=x, cuda=True)
    check_dtype("hamming.pack", "x", x, (*FLOATS, "int8", "bool"))
    if x.ndim < 1:
        raise ValueError("[hamming.pack] x has no dimension to pack")
    threshold = float(threshold)
    if threshold != threshold:  # not math.isnan, which torch.compile cannot trace symbolically
        raise ValueError("[hamming.pack] threshold is NaN")
    if numpy:
        return _kernels.pack(x, threshold)
    from pentad.hamming import autograd

    return autograd.pack(x, threshold)


def unpack(codes, dim, dtype=None):
    """Unpack bits to +1 (set) and -1 (clear).

    Parameters
    ----------
    codes : (..., ceil(dim / 8)) uint8
    dim : int
    dtype : optional
        float32 (the default), float64, float16, int8, or torch.bfloat16; of numpy or torch as
        `codes` is.

    Returns
    -------
    (..., dim) of `dtype`

    Examples
    --------
    >>> import numpy as np
    >>> pentad.hamming.unpack(np.array([[160]], np.uint8), 3)
    array([[ 1., -1.,  1.]], dtype=float32)
    """
    numpy = is_numpy("hamming.unpack", codes=codes, cuda=True)
    check_codes("hamming.unpack", "codes", codes, rank=None)
    dim = check_dim("hamming.unpack", codes, dim)
    if numpy:
        name = np.dtype(dtype or np.float32).name
        check_choice("hamming.unpack", "dtype", name, ("float32", "float64", "float16", "int8"))
        return _kernels.unpack(codes, dim, name)
    import torch

    from pentad.hamming import autograd

    dtype = dtype or torch.float32
    accepted = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8)
    if dtype not in accepted:
        raise ValueError(f"[hamming.unpack] dtype is {dtype}, expected one of {accepted}")
    return autograd.unpack(codes, dim, dtype)


# --- Distances and search -------------------------------------------------------------------------


def distance(a, b, *, metric="hamming"):
    """All distances between two sets of codes.

    Parameters
    ----------
    a : (na, bytes) uint8
    b : (nb, bytes) uint8
        At most 8184 bytes (65,472 bits) per row.
    metric : {"hamming", "jaccard", "and"}
        Differing bits; ``1 - |a & b| / |a | b|``, 0 where both are empty; common ones.

    Returns
    -------
    (na, nb) int32, or float32 for jaccard

    Raises
    ------
    ValueError
        For an unknown metric or rows of different widths.

    Examples
    --------
    >>> import numpy as np
    >>> codes = np.array([[0b11110000], [0b11000000]], np.uint8)
    >>> pentad.hamming.distance(codes, codes, metric="and")
    array([[4, 2],
           [2, 2]], dtype=int32)
    """
    op = "hamming.distance"
    numpy = is_numpy(op, a=a, b=b, cuda=True)
    check_choice(op, "metric", metric, METRICS)
    check_codes(op, "a", a)
    check_codes(op, "b", b)
    check_same_bytes(op, "a", a, "b", b)
    if numpy:
        return _kernels.distance(a, b, metric)
    from pentad.hamming import autograd

    return autograd.distance(a, b, metric)


def intersection(a, b):
    """Common ones of all pairs, ``distance(a, b, metric="and")``: (na, nb) int32.

    Examples
    --------
    >>> import numpy as np
    >>> pentad.hamming.intersection(np.array([[7]], np.uint8), np.array([[3], [8]], np.uint8))
    array([[2, 0]], dtype=int32)
    """
    return distance(a, b, metric="and")


def topk(queries, codes, k, *, metric="hamming", mask=None):
    """The k nearest codes of each query, exactly, without forming the matrix of distances.

    Parameters
    ----------
    queries : (nq, bytes) uint8
    codes : (n, bytes) uint8
    k : int
    metric : {"hamming", "jaccard", "and"}
        As in `distance`; for "and" larger is better.
    mask : (n,) bool, optional
        Rows that may be returned.

    Returns
    -------
    values : (nq, k) int32, or float32 for jaccard
        Best first.
    ids : (nq, k) int64
        Row numbers; equal values in rising order of id. Where fewer than k rows exist, the id is -1
        and the value is 2**31 - 1, inf, or (for "and") -1.

    Examples
    --------
    >>> import numpy as np
    >>> codes = np.array([[0b11110000], [0b11000000], [0b11100000]], np.uint8)
    >>> pentad.hamming.topk(codes[:1], codes, 2)
    (array([[0, 1]], dtype=int32), array([[0, 2]]))
    """
    op = "hamming.topk"
    numpy = is_numpy(op, queries=queries, codes=codes, mask=mask, optional=["mask"], cuda=True)
    check_choice(op, "metric", metric, METRICS)
    check_codes(op, "queries", queries)
    check_codes(op, "codes", codes)
    check_same_bytes(op, "queries", queries, "codes", codes)
    k = check_count(op, "k", k)
    mask = check_mask(op, mask, codes.shape[0])
    if numpy:
        return _kernels.topk(queries, codes, k, metric, mask)
    from pentad.hamming import autograd

    return autograd.topk(queries, codes, k, metric, mask)


def range_search(queries, codes, radius, *, metric="hamming", mask=None):
    """Every code within `radius` of each query, as compressed rows.

    Parameters
    ----------
    queries : (nq, bytes) uint8
    codes : (n, bytes) uint8
    radius : float
        Inclusive: distance <= radius; for "and", common ones >= radius.
    metric, mask
        As in `topk`.

    Returns
    -------
    indptr : (nq + 1,) int64
        The hits of query q are ``[indptr[q], indptr[q + 1])``.
    values : (hits,) int32, or float32 for jaccard
    ids : (hits,) int64
        Rising within a query.

    Notes
    -----
    On a CUDA device this waits for the number of hits, which the results need for their size: no
    captured graph can hold it.

    Examples
    --------
    >>> import numpy as np
    >>> codes = np.array([[0b11110000], [0b11000000], [0b11100000]], np.uint8)
    >>> indptr, values, ids = pentad.hamming.range_search(codes[:1], codes, 1)
    >>> values, ids
    (array([0, 1], dtype=int32), array([0, 2]))
    """
    op = "hamming.range_search"
    numpy = is_numpy(op, queries=queries, codes=codes, mask=mask, optional=["mask"], cuda=True)
    check_choice(op, "metric", metric, METRICS)
    check_codes(op, "queries", queries)
    check_codes(op, "codes", codes)
    check_same_bytes(op, "queries", queries, "codes", codes)
    radius = float(radius)
    if radius != radius:
        raise ValueError(f"[{op}] radius is NaN")
    mask = check_mask(op, mask, codes.shape[0])
    if numpy:
        return _kernels.range_search(queries, codes, radius, metric, mask)
    from pentad.hamming import autograd

    return autograd.range_search(queries, codes, radius, metric, mask)


# --- Float queries --------------------------------------------------------------------------------


def check_query(op, x, codes):
    check_dtype(op, "x", x, FLOATS)
    if x.shape[-1] < 1 or codes.shape[-1] != -(-x.shape[-1] // 8):
        raise ValueError(
            f"[{op}] x has {x.shape[-1]} columns, which takes {-(-x.shape[-1] // 8)} bytes, "
            f"but codes have {codes.shape[-1]} bytes per row"
        )


def score(x, codes):
    """Inner products of float queries with the +-1 vectors of codes.

    ``out[..., i] = sum_j x[..., j] * (+1 if bit j of codes[i] else -1)``, in float32 and in one
    fixed order: the same bits for any batch size, thread count and instruction set. Rescoring the
    best candidates of a binary search this way recovers most of the float ranking (Yamada et al.
    2021, "Efficient Passage Retrieval with Hashing", section 3.3).

    Parameters
    ----------
    x : (..., dim) float32, float16, bfloat16 or float64
        Differentiable.
    codes : (n, ceil(dim / 8)) uint8

    Returns
    -------
    (..., n) float32

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[0.5, -1.0, 2.0]], np.float32)
    >>> pentad.hamming.score(x, pentad.hamming.pack(x))
    array([[3.5]], dtype=float32)
    """
    op = "hamming.score"
    numpy = is_numpy(op, x=x, codes=codes, cuda=True)
    if x.ndim < 1:
        raise ValueError(f"[{op}] x has no dimension")
    check_codes(op, "codes", codes)
    check_query(op, x, codes)
    rows = _as_float32(x.reshape(-1, x.shape[-1]))
    if numpy:
        scores = _kernels.score(rows, codes)
    else:
        from pentad.hamming import autograd

        scores = autograd.score(rows, codes)
    return scores.reshape(*x.shape[:-1], codes.shape[0])


def topk_score(x, codes, k, *, mask=None):
    """The k codes with the largest `score`, without the (nq, n) matrix.

    Parameters
    ----------
    x : (nq, dim) float32, float16, bfloat16 or float64
        Finite.
    codes : (n, ceil(dim / 8)) uint8
    k : int
    mask : (n,) bool, optional
        Rows that may be returned.

    Returns
    -------
    scores : (nq, k) float32
        Largest first, the same bits as `score`; not differentiable (gather from `score` for that).
    ids : (nq, k) int64
        Row numbers, ties to the smaller; -1 with score -inf where fewer than k rows exist.

    Raises
    ------
    ValueError
        If `x` holds a NaN or an infinity. On a CUDA device nobody waits to hear of those: scores
        that are NaN come first.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[0.5, -1.0, 2.0]], np.float32)
    >>> pentad.hamming.topk_score(x, np.array([[0], [160]], np.uint8), 1)
    (array([[3.5]], dtype=float32), array([[1]]))
    """
    op = "hamming.topk_score"
    numpy = is_numpy(op, x=x, codes=codes, mask=mask, optional=["mask"], cuda=True)
    check_rank(op, "x", x, 2, "(nq, dim)")
    check_codes(op, "codes", codes)
    check_query(op, x, codes)
    k = check_count(op, "k", k)
    mask = check_mask(op, mask, codes.shape[0])
    if numpy:
        return _kernels.topk_score(_as_float32(x), codes, k, mask)
    from pentad.hamming import autograd

    return autograd.topk_score(_as_float32(x.detach()), codes, k, mask)


def weighted_sum(weights, codes, dim):
    """Weighted sums of the +-1 vectors of codes: the transpose of `score`.

    ``out[..., j] = sum_i weights[..., i] * (+1 if bit j of codes[i] else -1)``. With
    ``softmax(score)`` as weights this is the clean-up step of an associative memory over packed
    codes.

    Parameters
    ----------
    weights : (..., n) float32, float16, bfloat16 or float64
        Differentiable.
    codes : (n, ceil(dim / 8)) uint8
    dim : int

    Returns
    -------
    (..., dim) float32

    Examples
    --------
    >>> import numpy as np
    >>> codes = np.array([[0b10100000], [0b11000000]], np.uint8)
    >>> pentad.hamming.weighted_sum(np.array([1.0, 0.5], np.float32), codes, 3)
    array([ 1.5, -0.5,  0.5], dtype=float32)
    """
    op = "hamming.weighted_sum"
    numpy = is_numpy(op, weights=weights, codes=codes, cuda=True)
    check_dtype(op, "weights", weights, FLOATS)
    check_codes(op, "codes", codes)
    dim = check_dim(op, codes, dim)
    if weights.ndim < 1 or weights.shape[-1] != codes.shape[0]:
        raise ValueError(
            f"[{op}] weights have shape {tuple(weights.shape)} for {codes.shape[0]} codes"
        )
    lead = weights.shape[:-1]
    rows = _as_float32(weights.reshape(1, math.prod(lead), codes.shape[0]))
    if numpy:
        return _kernels.weighted_sum(rows, codes[None], dim).reshape(*lead, dim)
    from pentad.hamming import autograd

    return autograd.weighted_sum(rows, codes.unsqueeze(0), dim).reshape(*lead, dim)


def binarize(x, estimator="ste", temperature=1.0, generator=None):
    """The signs of `x` as +-1 (0 counts as -1, as in `pack`), with a gradient.

    Parameters
    ----------
    x : float tensor or array of any shape
    estimator : {"ste", "tanh", "bernoulli"}
        What the gradient pretends. "ste": identity where ``|x| <= temperature``, else 0 (Hubara et
        al. 2016, "Binarized Neural Networks", eq. 4). "tanh": the derivative of ``tanh(x /
        temperature)``. "bernoulli": the output is a sample, +1 with probability ``sigmoid(x /
        temperature)``, and the gradient that of its mean ``2 sigmoid(x / temperature) - 1``.
    temperature : float
        Positive.
    generator : torch.Generator or numpy.random.Generator, optional
        Source of "bernoulli"; the result is a function of its state.

    Returns
    -------
    +-1 in the dtype and shape of `x`; NaN stays NaN.

    Examples
    --------
    >>> import numpy as np
    >>> pentad.hamming.binarize(np.array([0.5, -1.0], np.float32))
    array([ 1., -1.], dtype=float32)
    """
    op = "hamming.binarize"
    numpy = is_numpy(op, x=x, any_device=True)  # torch's own elementwise functions
    check_dtype(op, "x", x, FLOATS)
    check_choice(op, "estimator", estimator, _ESTIMATORS)
    if not temperature > 0:
        raise ValueError(f"[{op}] temperature is {temperature}, expected a positive number")
    if not numpy:
        from pentad.hamming import autograd

        return autograd.binarize(x, estimator, temperature, generator)
    if estimator == "bernoulli":
        p = 0.5 + 0.5 * np.tanh(x.astype(np.float64) / (2 * temperature))
        one = (generator or np.random.default_rng()).random(x.shape) < p
    else:
        one = x > 0
    return np.where(np.isnan(x), x, np.where(one, 1, -1).astype(x.dtype))
