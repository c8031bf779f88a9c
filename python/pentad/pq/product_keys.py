# SPDX-License-Identifier: Apache-2.0
"""Product-key memory as a function. The mathematics stand in ``csrc/pq/product_keys.h``."""

from typing import Any, NamedTuple

import numpy as np

from pentad import _C
from pentad._arrays import dtype_name, empty_like, is_numpy, on_device
from pentad._checks import FLOATS, check_choice, check_count, check_dtype

OP = "pq.product_key_lookup"
MOST_ON_DEVICE = _C.pq_product_keys_cuda_max_k


class ProductKeyResult(NamedTuple):
    """What `product_key_lookup` returns with ``return_indices=True``.

    Attributes
    ----------
    out : (..., dim) or (..., heads, dim)
    indices : (..., heads, k) int64
        Rows of the values, best first.
    weights : (..., heads, k) float32, or float64
        Differentiable.

    Examples
    --------
    >>> import numpy as np
    >>> q, values = np.ones((1, 2), np.float32), np.eye(4, dtype=np.float32)
    >>> subkeys = np.array([[[[0], [1]], [[0], [1]]]], np.float32)
    >>> found = pentad.pq.product_key_lookup(q, subkeys, values, 1, return_indices=True)
    >>> isinstance(found, pentad.pq.ProductKeyResult)
    True
    >>> found.indices
    array([[3]])
    """

    out: Any
    indices: Any
    weights: Any


def product_key_lookup(
    q,
    subkeys,
    values,
    k,
    *,
    scale=1.0,
    softmax=True,
    combine="sum",
    sparse_grad=False,
    return_indices=False,
):
    """The k best of ``n_keys ** 2`` keys for each query and head, and the sum of their values.

    Key ``i * n_keys + j`` is the concatenation of sub-keys i and j, so that its score is the sum
    of two half scores, and its value is row ``i * n_keys + j``. The k best are found exactly, from
    the best of each half; of equal scores the smaller index counts. What is selected, and every
    result, is the same for each instruction-set level, number of threads and batch. Nothing of
    ``n_keys ** 2`` scores is formed, and nothing of the selected values is copied.

    Lample et al. 2019, "Large Memory Layers with Product Keys", section 3 (equations 1 to 5).

    Parameters
    ----------
    q : (..., heads, 2 * half) float32, float16, bfloat16 or float64
        A query is compared with the first and the second half of the keys by its halves.
    subkeys : (heads, 2, n_keys, half)
        At most 65,536 for each half.
    values : (n_keys ** 2, dim)
        Shared by the heads. Dtypes may differ; with one float64 all is computed in that, else in
        float32.
    k : int
        1 to ``n_keys ** 2``; on a CUDA device at most 2048.
    scale : float
        Positive factor of the scores in the weights, the inverse of a temperature.
    softmax : bool
        Weights are the softmax of ``scale * score`` over the k best of a head; otherwise
        ``scale * score`` itself.
    combine : {"sum", "none"}
        The sum over heads, or a result for each.
    sparse_grad : bool
        The gradient of `values` is a coalesced sparse COO tensor of the selected rows, as that of
        ``torch.nn.Embedding(sparse=True)``: for torch.optim.SparseAdam or SGD. Otherwise it is
        dense. Not under torch.compile, which has no sparse gradients. On a CUDA device its size
        is waited for.
    return_indices : bool
        Return a `ProductKeyResult`.

    Returns
    -------
    (..., dim) in the dtype of `values`, or (..., heads, dim) for ``combine="none"``
        NaN where a NaN was among the selected scores.

    Raises
    ------
    ValueError
        For shapes that do not fit, a k or scale out of range.
    TypeError
        For arrays that are not of floats.

    Examples
    --------
    >>> import torch
    >>> subkeys = torch.tensor([[[[1.0], [2.0], [3.0]], [[1.0], [0.0], [-1.0]]]])
    >>> values = torch.arange(9.0).view(9, 1)
    >>> result = pentad.pq.product_key_lookup(
    ...     torch.tensor([[[1.0, 2.0]]]), subkeys, values, 3, return_indices=True
    ... )
    >>> result.indices
    tensor([[[6, 3, 0]]])
    >>> result.weights
    tensor([[[0.6652, 0.2447, 0.0900]]])
    """
    numpy = is_numpy(OP, cuda=True, q=q, subkeys=subkeys, values=values)
    k, scale = _check(q, subkeys, values, k, scale, combine)
    arrays = q, subkeys, values
    if "float64" in map(dtype_name, arrays):
        arrays = [_as_float64(x, numpy) for x in arrays]
    q, subkeys, values = arrays
    lead = tuple(q.shape[:-2])
    rows = q.reshape(_product(lead), *q.shape[-2:])
    per_head = combine == "none"
    if numpy:
        out, indices, weights = lookup(rows, subkeys, values, k, scale, softmax, per_head)
    else:
        from pentad.pq import product_keys_autograd

        out, indices, weights = product_keys_autograd.lookup(
            rows, subkeys, values, k, scale, softmax, per_head, bool(sparse_grad)
        )
    out = out.reshape(*lead, *out.shape[1:])
    if not return_indices:
        return out
    shape = (*lead, *indices.shape[1:])
    return ProductKeyResult(out, indices.reshape(shape), weights.reshape(shape))


def _check(q, subkeys, values, k, scale, combine):
    for name, array in (("q", q), ("subkeys", subkeys), ("values", values)):
        check_dtype(OP, name, array, FLOATS)
    shape = tuple(subkeys.shape)
    if subkeys.ndim != 4 or shape[1] != 2 or min(shape) < 1:
        raise ValueError(
            f"[{OP}] subkeys have shape {shape}, expected (heads, 2, n_keys, half), none of them 0"
        )
    heads, _, n, half = shape
    if n > _C.pq_most_subkeys:
        raise ValueError(
            f"[{OP}] subkeys have {n} keys, at most {_C.pq_most_subkeys} are supported"
        )
    if q.ndim < 2 or q.shape[-2] != heads or q.shape[-1] != 2 * half:
        raise ValueError(
            f"[{OP}] q has shape {tuple(q.shape)} but subkeys {shape}, "
            f"expected (..., {heads}, {2 * half})"
        )
    if values.ndim != 2 or values.shape[0] != n * n:
        raise ValueError(
            f"[{OP}] values have shape {tuple(values.shape)}, expected ({n * n}, dim): "
            f"a row for each pair of the {n} keys"
        )
    check_choice(OP, "combine", combine, ("sum", "none"))
    k = check_count(OP, "k", k, 1)
    if k > n * n:
        raise ValueError(f"[{OP}] k is {k}, expected 1 to {n * n}, the number of values")
    scale = float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"[{OP}] scale is {scale}, expected a positive number")
    return k, scale


def _product(lead):
    """math.prod, which torch.compile does not trace for symbolic shapes."""
    count = 1
    for length in lead:
        count = count * length
    return count


def _as_float64(x, numpy):
    return x.astype(np.float64, copy=False) if numpy else x.double()


# --- Kernels --------------------------------------------------------------------------------------


def outputs(make, q, values, k, per_head):
    """(out, indices, weights) for q (rows, heads, 2 * half), by make(shape, dtype name)."""
    rows, heads = q.shape[:2]
    lead = (rows, heads) if per_head else (rows,)
    return (
        make((*lead, values.shape[1]), dtype_name(values)),
        make((rows, heads, k), "int64"),
        make((rows, heads, k), "float64" if dtype_name(q) == "float64" else "float32"),
    )


def lookup(q, subkeys, values, k, scale, softmax, per_head):
    """For numpy arrays and tensors alike; q (rows, heads, 2 * half)."""
    results = outputs(lambda *like: empty_like(q, *like), q, values, k, per_head)
    settings = k, scale, softmax, per_head
    sizes = *q.shape[:2], subkeys.shape[2], k
    device = on_device(q, _C.pq_product_keys_scratch, *sizes) if k <= MOST_ON_DEVICE else ()
    _C.pq_product_keys(q, subkeys, values, *settings, *results, *device)
    return results
