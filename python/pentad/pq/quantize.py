# SPDX-License-Identifier: Apache-2.0
"""Vector quantization as a step of a model: the value of the codeword, a gradient to its input."""

from typing import Any, NamedTuple

import numpy as np

from pentad._arrays import is_numpy
from pentad._checks import check_choice, check_count, check_dtype, check_floats
from pentad.pq.assign import METRICS, assign, check_codebooks, check_columns
from pentad.pq.lookup import INTEGERS, lookup

COMBINE = {"product": "concat", "residual": "sum", "grouped": "mean"}
ESTIMATORS = ("ste", "rotation", "none")


class Quantized(NamedTuple):
    """What `quantize` returns.

    Examples
    --------
    >>> pentad.pq.Quantized._fields
    ('quantized', 'codes', 'commitment')
    """

    quantized: Any
    codes: Any
    commitment: Any


def quantize(x, codebooks, *, metric="l2", form="product", estimator="ste"):
    """Replace each vector by its nearest codewords, with a gradient that passes the rounding.

    The value of `quantized` is exactly ``lookup(assign(x))``; the distances are never formed as an
    (n, K) array. Its gradient g goes

    | estimator    | to x                       | to the codebooks                    |
    |--------------|----------------------------|-------------------------------------|
    | `"ste"`      | g, straight through        | added up over the rows of each code |
    | `"rotation"` | g, rotated and scaled back | none                                |
    | `"none"`     | none                       | added up over the rows of each code |

    With "ste" the sum over the rows is that of codebook features; where the codebooks shall learn
    from a loss of their own or from averages alone, pass ``codebooks.detach()``. The rotation
    trick treats the rotation and scaling that takes x to its codeword as a constant matrix, whose
    transpose acts on g: in each sub-vector of the product form, on the whole vector and its sum or
    mean of codewords otherwise. A zero vector has no direction, and its gradient passes straight.

    `commitment` is ``mean((x - quantized)**2)`` with `quantized` held constant, so that it pulls x
    towards the codewords. The other half of the VQ-VAE loss, which pulls the codewords towards x,
    is the same with `lookup` of the codes and ``x.detach()``, as below (`combine` is "concat" in
    product form, "sum" in residual, "mean" in grouped form).

    With metric "cosine" a code is the largest inner product with the codewords at unit length, but
    `quantized` is the codeword as it is: to quantize on the sphere, as UniTok does, bring both x
    and the codebooks to unit length first.

    Parameters
    ----------
    x : (..., d) float32, float16, bfloat16 or float64
        Vectors in the last dimension. Channels first, as images have them, must be moved.
    codebooks : (M, K, dsub) of the same dtypes
        ``d = M * dsub`` in product form, ``d = dsub`` otherwise.
    metric : "l2", "ip" or "cosine"
    form : "product", "residual" or "grouped"
        Each codebook quantizes its part of x; or what the codebooks before it left, and the
        codewords are added up; or all of x, and the mean is taken.
    estimator : "ste", "rotation" or "none"

    Returns
    -------
    Quantized
        `quantized` (..., d) in the codebooks' dtype; `codes` (..., M) uint8 where K <= 256, else
        int32; `commitment`, a float32 scalar (float64 beside float64 inputs), 0 without vectors.

    Raises
    ------
    ValueError
        For shapes that do not fit, unknown choices, and NaN or infinity in `x` or `codebooks`.
    TypeError
        For other dtypes.

    References
    ----------
    van den Oord et al. 2017, "Neural Discrete Representation Learning", arXiv 1711.00937, section
    3.2; Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick", arXiv
    2410.06424, section 4.2; Tamkin et al. 2023, "Codebook Features", arXiv 2310.17230; Ma et al.
    2025, "UniTok", arXiv 2502.20321.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.9, 0.1, -1.2, 0.0]], requires_grad=True)
    >>> codebooks = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    >>> quantized, codes, commitment = pentad.pq.quantize(x, codebooks)
    >>> quantized.detach(), codes
    (tensor([[ 1.,  0., -1.,  0.]]), tensor([[0, 1]], dtype=torch.uint8))
    >>> (quantized * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    >>> x.grad
    tensor([[1., 2., 3., 4.]])
    >>> words = pentad.pq.lookup(codes, codebooks.requires_grad_(), combine="concat")
    >>> codebook_loss = ((words - x.detach()) ** 2).mean()
    >>> codebook_loss.backward()
    >>> codebooks.grad[0, 0]
    tensor([ 0.0500, -0.0500])
    """
    op = "pq.quantize"
    numpy = is_numpy(op, cuda=True, x=x, codebooks=codebooks)
    check_floats(op, x=x, codebooks=codebooks)
    check_choice(op, "metric", metric, METRICS)
    check_choice(op, "form", form, COMBINE)
    check_choice(op, "estimator", estimator, ESTIMATORS)
    check_codebooks(op, codebooks, form)
    check_columns(op, x, codebooks, form)
    combine = COMBINE[form]
    if numpy:
        codes = assign(x, codebooks, metric=metric, form=form)
        quantized = lookup(codes, codebooks, combine=combine)
        wide = np.result_type(x, quantized, np.float32)
        square = np.square(np.subtract(x, quantized, dtype=wide)).sum()
        return Quantized(quantized, codes, wide.type(square / max(x.size, 1)))
    from pentad.pq import quantize_autograd

    codes = assign(x.detach(), codebooks.detach(), metric=metric, form=form)
    quantized = quantize_autograd.quantize(x, codebooks, codes, combine, estimator)
    return Quantized(quantized, codes, quantize_autograd.mean_square(x, quantized.detach()))


def histogram(codes, K):
    """`usage` of a numpy array."""
    if codes.size and not 0 <= codes.min() <= codes.max() < K:
        raise ValueError(
            f"[pq.usage] codes span {codes.min()} to {codes.max()}, expected 0 to {K - 1}"
        )
    counts = np.zeros((codes.shape[-1], K), np.int64)
    for m, row in enumerate(counts):
        row += np.bincount(codes[..., m].ravel().astype(np.intp, copy=False), minlength=K)
    return counts


def usage(codes, K):
    """How often each code occurs: the histogram of every codebook.

    Parameters
    ----------
    codes : (..., M) of any integer dtype
        As `assign` gives them.
    K : int
        Codewords in each codebook.

    Returns
    -------
    (M, K) int64

    Raises
    ------
    ValueError
        If a code is not within 0 to K - 1 (on a CUDA device such codes are not counted), or K is
        not positive.
    TypeError
        For another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> pentad.pq.usage(np.array([[0, 1], [0, 2], [2, 2]]), 4)
    array([[2, 0, 1, 0],
           [0, 1, 2, 0]])
    """
    numpy = is_numpy("pq.usage", cuda=True, codes=codes)
    check_dtype("pq.usage", "codes", codes, INTEGERS)
    K = check_count("pq.usage", "K", K, 1)
    if codes.ndim < 1:
        raise ValueError("[pq.usage] codes have no dimension of codebooks")
    if numpy:
        return histogram(codes, K)
    from pentad.pq import quantize_autograd

    return quantize_autograd.usage(codes, K)
