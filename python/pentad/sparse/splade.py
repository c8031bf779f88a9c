# SPDX-License-Identifier: Apache-2.0
"""The SPLADE head: token states to weights of the vocabulary, without a matrix per token.

The mathematics stand in ``csrc/sparse/splade.h`` and, in numpy, in
`pentad.sparse.splade_reference`.
"""

import numpy as np

from pentad import _C
from pentad._arrays import dtype_name, is_numpy, on_device
from pentad._checks import FLOATS, check_choice, check_count, check_dtype

OP = "sparse.splade_head"
POOLINGS = ("max", "sum")
ACTIVATIONS = ("log1p_relu", "log1p_log1p_relu")
MASKS = ("bool", "uint8", "int8", "int16", "int32", "int64", *FLOATS)


def splade_head(
    hidden,
    weight,
    bias=None,
    attention_mask=None,
    *,
    pooling="max",
    activation="log1p_relu",
    sparse_output=False,
    top_k=None,
):
    """Weights of the vocabulary for each sequence, of its tokens' projections onto it.

    ``out[b, v]`` is the maximum, or the sum, over the tokens l of ``log(1 + relu(logit[b, l, v]))``
    with ``logit = hidden @ weight.T + bias``: Formal et al. 2021, "SPLADE: Sparse Lexical and
    Expansion Model for First Stage Ranking", equation 3 (sum), and "SPLADE v2", equation 6 (max).
    Logits live in cache only: nothing of shape (B, L, V) is formed, forward or backward. The
    gradient of "max" goes to the first token that attains it; that of "sum" forms the logits anew.

    Parameters
    ----------
    hidden : (B, L, H) float32, float16, bfloat16 or float64
        States of the tokens, as the last linear layer of a masked-language model takes them. Of any
        strides. Differentiable.
    weight : (V, H) of the same dtype
        Rows of that layer. Differentiable.
    bias : (V,) of the same dtype, optional
        Differentiable.
    attention_mask : (B, L) of any integer or float dtype or bool, optional
        1 for tokens that count, 0 for the others, which are not read. A sequence without tokens
        has weights 0.
    pooling : {"max", "sum"}
        Over the tokens.
    activation : {"log1p_relu", "log1p_log1p_relu"}
        As it reads: ``log1p(relu(x))``, or ``log1p(log1p(relu(x)))`` (Geng et al. 2025, "Towards
        Competitive Search Relevance For Inference-Free Learned Sparse Retrievers").
        `SpladePooling` of sentence-transformers names only what comes before its own ``log1p``: its
        ``activation_function="relu"`` is "log1p_relu" here and its ``"log1p_relu"`` is
        "log1p_log1p_relu" here; plain "relu" is refused.
    sparse_output : bool
        Return only what is not zero.
    top_k : int, optional
        Keep the `top_k` largest weights of each sequence, of equal ones those of smaller v; the
        others become 0 and have no gradient.

    Returns
    -------
    (B, V) of hidden's dtype
        With `sparse_output`, a torch sparse CSR tensor whose values carry the gradient, or, for
        numpy arrays, the tuple (indptr, indices, values, V). Sums of logits are in float32
        (float64 for float64); results are the same for any number of threads. Under
        ``torch.autocast`` float32 arguments become its dtype, as those of a linear layer do.

    Raises
    ------
    ValueError
        For shapes that do not fit, a mask with other numbers, or another pooling or activation. (On
        a CUDA device a sequence with such a mask has weights NaN: nothing waits for its contents.)
    TypeError
        For arguments of several float dtypes, or of none.
    RuntimeError
        For a second derivative.

    Examples
    --------
    >>> import numpy as np
    >>> hidden = np.array([[[1.0, 0.0], [0.0, 2.0]], [[5.0, 5.0], [0.0, 1.0]]])
    >>> weight = np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, -1.0]])
    >>> mask = np.array([[1, 1], [0, 1]])
    >>> np.expm1(pentad.sparse.splade_head(hidden, weight, attention_mask=mask)).round(6)
    array([[1., 2., 0.],
           [0., 1., 0.]])
    >>> indptr, indices, values, columns = pentad.sparse.splade_head(
    ...     hidden, weight, attention_mask=mask, sparse_output=True, top_k=1
    ... )
    >>> indptr, indices
    (array([0, 1, 2]), array([1, 1]))
    """
    numpy = is_numpy(
        OP,
        hidden=hidden,
        weight=weight,
        bias=bias,
        attention_mask=attention_mask,
        optional=("bias", "attention_mask"),
        cuda=True,
    )
    check_choice(OP, "pooling", pooling, POOLINGS)
    _check_activation(activation)
    if top_k is not None:
        top_k = check_count(OP, "top_k", top_k, 1)
    if not numpy:
        from pentad.sparse import splade_autograd

        hidden, weight, bias = splade_autograd.autocast(hidden, weight, bias)
    _check_shapes(hidden, weight, bias, attention_mask)
    if not numpy:
        return splade_autograd.splade_head(
            hidden, weight, bias, attention_mask, pooling, activation, sparse_output, top_k
        )
    out = np.empty((hidden.shape[0], weight.shape[0]), hidden.dtype)
    given = (hidden, weight, bias, attention_mask, pooling, activation)
    device = on_device(hidden, _C.sparse_splade_scratch, *hidden.shape[:2])
    _C.sparse_splade_head(*given, out, None, None, *device)
    if top_k is not None:
        _C.sparse_splade_keep(out, top_k)
    return (*compressed(out), out.shape[1]) if sparse_output else out


def compressed(x):
    """indptr and indices, int64, and values of the rows of an array, without what is zero."""
    indptr = np.empty(x.shape[0] + 1, np.int64)
    _C.sparse_splade_count(x, indptr)
    indices, values = np.empty(indptr[-1], np.int64), np.empty(indptr[-1], x.dtype)
    _C.sparse_splade_compress(x, indptr, indices, values)
    return indptr, indices, values


def _check_activation(activation):
    if activation == "relu":
        raise ValueError(
            f"[{OP}] activation is 'relu', expected 'log1p_relu', log(1 + relu(x)), which "
            "sentence-transformers calls 'relu', or 'log1p_log1p_relu', which it calls "
            "'log1p_relu'"
        )
    check_choice(OP, "activation", activation, ACTIVATIONS)


def _check_shapes(hidden, weight, bias, mask):
    check_dtype(OP, "hidden", hidden, FLOATS)
    for name, array in (("weight", weight), ("bias", bias)):
        if array is not None and array.dtype != hidden.dtype:
            raise TypeError(
                f"[{OP}] {name} has dtype {dtype_name(array)} but hidden {dtype_name(hidden)}, "
                "expected one"
            )
    if hidden.ndim != 3:
        raise ValueError(f"[{OP}] hidden has shape {tuple(hidden.shape)}, expected (B, L, H)")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"[{OP}] weight has shape {tuple(weight.shape)}, expected (V, {hidden.shape[2]})"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"[{OP}] bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)"
        )
    if mask is not None:
        check_dtype(OP, "attention_mask", mask, MASKS)
        if tuple(mask.shape) != tuple(hidden.shape[:2]):
            raise ValueError(
                f"[{OP}] attention_mask has shape {tuple(mask.shape)}, expected "
                f"{tuple(hidden.shape[:2])}"
            )
