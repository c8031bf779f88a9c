# SPDX-License-Identifier: Apache-2.0
"""The nearest centroids of vectors, hard and soft.

The mathematics stand in ``csrc/pq/assign.h`` and, in numpy, in `pentad.pq.assign_reference`. Codes
are those of double-precision distances, ties to the smaller number, and do not depend on the
instruction set, the number of threads or the batch.
"""

import math

import numpy as np

from pentad import _C
from pentad._arrays import dtype_name, empty_like, is_numpy, on_device, to_numpy
from pentad._checks import check_choice, check_count, check_floats

METRICS = ("l2", "ip", "cosine")
FORMS = ("product", "residual", "grouped")
MOST_CENTROIDS = 65536


# --- Checks ---------------------------------------------------------------------------------------


def check_codebooks(op, codebooks, form="product"):
    if codebooks.ndim != 3:
        shape = "(M, K, dsub)" if form == "product" else "(M, K, dim)"
        raise ValueError(f"[{op}] codebooks have shape {tuple(codebooks.shape)}, expected {shape}")
    centroids = codebooks.shape[1]
    if min(codebooks.shape) < 1:
        raise ValueError(f"[{op}] codebooks have shape {tuple(codebooks.shape)}, which is empty")
    if centroids > MOST_CENTROIDS:
        raise ValueError(
            f"[{op}] codebooks have {centroids} centroids, at most {MOST_CENTROIDS} are supported"
        )


def check_columns(op, x, codebooks, form="product"):
    """The last dimension of `x` is what the codebooks take."""
    if x.ndim < 1:
        raise ValueError(f"[{op}] x has no dimension")
    count, _, dim = codebooks.shape
    columns = x.shape[-1]
    if form == "product":
        if columns % count:
            raise ValueError(
                f"[{op}] x has {columns} columns, which {count} codebooks do not divide"
            )
        if columns != count * dim:
            raise ValueError(
                f"[{op}] x has {columns} columns, but {count} codebooks of {dim} take {count * dim}"
            )
    elif columns != dim:
        raise ValueError(f"[{op}] x has {columns} columns, but the codebooks have {dim}")


def code_dtype(centroids):
    return "uint8" if centroids <= 256 else "int32"


# --- Kernels --------------------------------------------------------------------------------------


def nearest(x, codebooks, metric, top=1, *, distances=False):
    """Codes (n, M, top) of x (n, M, dsub), and the float32 costs where asked for, else None."""
    shape = (x.shape[0], x.shape[1], top)
    codes = empty_like(x, shape, code_dtype(codebooks.shape[1]))
    costs = empty_like(x, shape, "float32") if distances else None
    sizes = (*shape[:2], *codebooks.shape[1:], top)
    device = on_device(x, _C.pq_assign_scratch, *sizes)
    _C.pq_assign(x, codebooks, metric, codes, costs, *device)
    return codes, costs


def _residual(x, codebooks, metric):
    """Every level takes what the levels before it left, in float32 (float64 where either is)."""
    if not isinstance(x, np.ndarray) and x.is_cuda:
        return residual_of_tensors(x.float(), codebooks.float(), metric)
    dtypes = {dtype_name(x), dtype_name(codebooks)}
    work = np.float64 if "float64" in dtypes else np.float32
    rest = to_numpy(x).astype(work)  # a copy
    books = to_numpy(codebooks).astype(work, copy=False)
    codes = empty_like(x, (x.shape[0], len(books)), code_dtype(books.shape[1]))
    for level, book in enumerate(books):
        found, _ = nearest(rest[:, None], book[None], metric)
        to_numpy(codes)[:, level] = found[:, 0, 0]
        rest -= book[found[:, 0, 0]]
    return codes


def residual_of_tensors(rest, codebooks, metric):
    """`_residual` of float32 tensors on any device."""
    levels = []
    for book in codebooks:
        levels.append(nearest(rest[:, None], book[None], metric)[0][:, 0, 0])
        rest = rest - book[levels[-1].long()]
    import torch

    return torch.stack(levels, 1)


def assign_kernel(x, codebooks, metric, form, top):
    """The operator, for numpy arrays and CPU tensors; top 0 stands for None."""
    count, _, dim = codebooks.shape
    lead = tuple(x.shape[:-1])
    rows = math.prod(lead)
    last = () if top == 0 else (top,)
    if form == "residual":
        return _residual(x.reshape(rows, dim), codebooks, metric).reshape(*lead, count)
    if form == "product":
        parts = x.reshape(rows, count * dim).reshape(rows, count, dim)
    elif isinstance(x, np.ndarray):
        parts = np.broadcast_to(x.reshape(rows, 1, dim), (rows, count, dim))
    else:
        parts = x.reshape(rows, 1, dim).expand(rows, count, dim)
    return nearest(parts, codebooks, metric, max(top, 1))[0].reshape(*lead, count, *last)


# --- Functions ------------------------------------------------------------------------------------


def assign(x, codebooks, *, metric="l2", form="product", top=None):
    """The nearest centroids of vectors in every codebook, without forming the distances.

    Product quantization's encoder (Jegou, Douze and Schmid 2011, equation 8), and the residual
    (Chen, Guan and Wang 2010) and grouped ones. Distances are those of float64 arithmetic, ties go
    to the smaller number. Vectors that `lookup` makes of codes have these codes again in the
    product form with "l2" and "cosine" (of distinct codewords); sums of codewords need not.

    Parameters
    ----------
    x : (..., dim) float32, float16, bfloat16 or float64
    codebooks : (M, K, dsub) of these types
        At most 65,536 centroids each.
    metric : {"l2", "ip", "cosine"}
        The least squared distance; the largest inner product; that with ``c / |c|``, 0 where the
        centroid is.
    form : {"product", "residual", "grouped"}
        Codebook m takes columns ``m * dsub`` to ``(m + 1) * dsub`` of `x`, dim being M * dsub; what
        the codebooks before it left of `x`; the whole `x`. In the latter two dsub is dim.
    top : int, optional
        Return the `top` nearest, nearest first; not for "residual".

    Returns
    -------
    (..., M) or (..., M, top) uint8, int32 where K > 256
        Carries no gradient.

    Raises
    ------
    ValueError
        For shapes that do not fit, an unknown metric or form, `top` out of range, and NaN or
        infinity in either array; on a CUDA device, whose arrays are not looked at, those have any
        code.
    TypeError
        For another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> codebooks = np.array([[[0.0], [1.0]], [[-1.0], [2.0]]])
    >>> pentad.pq.assign(np.array([[0.9, -0.2], [0.1, 5.0]]), codebooks)
    array([[1, 0],
           [0, 1]], dtype=uint8)
    """
    op = "pq.assign"
    numpy = is_numpy(op, cuda=True, x=x, codebooks=codebooks)
    check_choice(op, "metric", metric, METRICS)
    check_choice(op, "form", form, FORMS)
    check_floats(op, x=x, codebooks=codebooks)
    check_codebooks(op, codebooks, form)
    check_columns(op, x, codebooks, form)
    if top is not None:
        top = check_count(op, "top", top, 1)
        if top > codebooks.shape[1]:
            raise ValueError(f"[{op}] top is {top}, but there are {codebooks.shape[1]} centroids")
        if form == "residual":
            raise ValueError(f"[{op}] top is for the forms product and grouped, not residual")
    if numpy:
        return assign_kernel(x, codebooks, metric, form, top or 0)
    from pentad.pq import assign_autograd

    return assign_autograd.assign(x.detach(), codebooks.detach(), metric, form, top or 0)


def soft_assign(x, codebooks, *, metric="l2", temperature=1.0):
    """Probabilities of the centroids: the softmax of minus the costs over `temperature`.

    The relaxation of Agustsson et al. 2017 (equation 3) for every codebook of the product form.
    Differentiable in both arrays; half floats are computed in float32.

    Parameters
    ----------
    x : (..., M * dsub) float32, float16, bfloat16 or float64
    codebooks : (M, K, dsub) of these types
    metric : {"l2", "ip", "cosine"}
        As in `assign`.
    temperature : float
        Above 0; towards 0 the result becomes the one-hot `assign`.

    Returns
    -------
    (..., M, K) of the dtype of `x`

    Raises
    ------
    ValueError
        For shapes that do not fit, an unknown metric, or a temperature that is not above 0.
    TypeError
        For another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> codebooks = np.array([[[0.0], [1.0]]])
    >>> pentad.pq.soft_assign(np.array([[0.5], [3.0]]), codebooks).round(3)
    array([[[0.5  , 0.5  ]],
           [[0.007, 0.993]]])
    """
    op = "pq.soft_assign"
    numpy = is_numpy(op, x=x, codebooks=codebooks, any_device=True)
    check_choice(op, "metric", metric, METRICS)
    check_floats(op, x=x, codebooks=codebooks)
    check_codebooks(op, codebooks)
    check_columns(op, x, codebooks)
    temperature = float(temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"[{op}] temperature is {temperature}, expected a number above 0")
    if numpy:
        return _soft_numpy(x, codebooks, metric, temperature)
    from pentad.pq import assign_autograd

    return assign_autograd.soft_assign(x, codebooks, metric, temperature)


def _soft_numpy(x, codebooks, metric, temperature):
    work = np.result_type(x.dtype, codebooks.dtype, np.float32)
    books = codebooks.astype(work)
    parts = x.astype(work).reshape(*x.shape[:-1], books.shape[0], books.shape[2])
    bias = 0
    if metric == "l2":  # up to a constant of each row, which the softmax does not see
        centre = books.mean(1)
        books, parts = books - centre[:, None], parts - centre
        bias = (books**2).sum(-1)
        books = books * 2
    elif metric == "cosine":
        norms = np.sqrt((books**2).sum(-1, keepdims=True))
        books = books / np.where(norms > 0, norms, 1)
    logits = (np.einsum("...md,mkd->...mk", parts, books) - bias) / temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(x.dtype)
