# SPDX-License-Identifier: Apache-2.0
"""The SPLADE head as plain numpy, with a matrix per token: the definition."""

import numpy as np


def logits(hidden, weight, bias=None):
    """(B, L, V) in double."""
    out = hidden.astype(np.float64) @ weight.astype(np.float64).T
    return out if bias is None else out + bias.astype(np.float64)


def activate(x, activation):
    out = np.log1p(np.maximum(x, 0))
    return np.log1p(out) if activation == "log1p_log1p_relu" else out


def slope(x, activation):
    """The derivative of `activate`, 0 where x <= 0."""
    positive = np.maximum(x, 0)
    out = 1 / (1 + positive)
    if activation == "log1p_log1p_relu":
        out /= 1 + np.log1p(positive)
    return np.where(x > 0, out, 0)


def splade_head(hidden, weight, bias, mask, pooling, activation):
    """(B, V) in double; mask (B, L) of 0 and 1, or None."""
    x = activate(logits(hidden, weight, bias), activation)
    if mask is not None:
        x = x * (np.asarray(mask) != 0)[..., None]
    return x.sum(1) if pooling == "sum" else x.max(1, initial=0)


def splade_head_backward(d_out, hidden, weight, bias, mask, pooling, activation):
    """The gradients of hidden, weight and bias, in double."""
    x = logits(hidden, weight, bias)
    if mask is not None:
        x = np.where((np.asarray(mask) != 0)[..., None], x, -np.inf)
    slopes = d_out[:, None, :] * slope(x, activation)
    if pooling == "max":
        first = x.argmax(1)[:, None, :]
        chosen = np.zeros_like(x)
        np.put_along_axis(chosen, first, 1, 1)
        slopes = slopes * chosen
    return (
        slopes @ weight.astype(np.float64),
        np.einsum("blv,blh->vh", slopes, hidden.astype(np.float64)),
        slopes.sum((0, 1)),
    )
