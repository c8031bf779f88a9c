# SPDX-License-Identifier: Apache-2.0
"""`torch.nn.functional.scaled_dot_product_attention` by these kernels."""

import torch

from pentad.attention.functional import attention, check_float, fail_tensor


def scaled_dot_product_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """What torch's function of this name gives, with its arguments.

    Parameters
    ----------
    query : (..., Hq, L, E) float32, bfloat16, float16 or float64
        At least of rank 2. The sizes before the last two broadcast among `query`, `key` and
        `value`, but for the heads where `enable_gqa` is given.
    key : (..., H, S, E)
    value : (..., H, S, Ev)
    attn_mask : broadcastable to (..., Hq, L, S), float or bool, optional
        Added to the scores, or True where the key may be seen.
    dropout_p : float
    is_causal : bool
        Query i sees the keys up to i, whatever L and S. Not with `attn_mask`.
    scale : float, optional
        By default ``E ** -0.5``.
    enable_gqa : bool
        `key` and `value` may have fewer heads, each for a group of the query's.

    Returns
    -------
    (..., Hq, L, Ev) in the dtype of `query`

    Raises
    ------
    TypeError, ValueError, pentad.DeviceError
        As `attention`, where torch raises RuntimeError.

    Examples
    --------
    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 4, 10, 16).unbind()
    >>> got = pentad.attention.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(got, want, atol=1e-5)
    True
    """
    op = "scaled_dot_product_attention"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_float(op, name, tensor)
        if tensor.ndim < 2:
            raise ValueError(
                f"[{op}] {name} has shape {tuple(tensor.shape)}, expected at least 2 dimensions"
            )
    if attn_mask is not None:
        if is_causal:
            raise ValueError(f"[{op}] attn_mask cannot be used with is_causal")
        if not isinstance(attn_mask, torch.Tensor):
            fail_tensor(op, "attn_mask", attn_mask)
    causal = "top_left" if is_causal else False

    leads = [tuple(t.shape[:-2]) for t in (query, key, value)]
    same = leads[0][:1] == leads[1][:1] if enable_gqa else leads[0] == leads[1]
    if len(leads[0]) == 2 and same and leads[1] == leads[2]:
        return attention(
            query, key, value, causal=causal, bias=attn_mask, dropout_p=dropout_p, scale=scale
        )

    if enable_gqa:
        if min(map(len, leads)) < 1:
            raise ValueError(f"[{op}] enable_gqa needs at least 3 dimensions")
        key, value = (_repeated(op, n, query, t) for n, t in (("key", key), ("value", value)))
        leads = [tuple(t.shape[:-2]) for t in (query, key, value)]
    try:
        lead = tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        raise ValueError(
            f"[{op}] query, key and value have the batch dimensions {leads[0]}, {leads[1]} and "
            f"{leads[2]}, which do not broadcast"
        ) from None
    if attn_mask is not None:
        attn_mask = _folded_mask(op, attn_mask, lead, query.shape[-2], key.shape[-2])
    out = attention(
        *(_folded(t, lead) for t in (query, key, value)),
        causal=causal,
        bias=attn_mask,
        dropout_p=dropout_p,
        scale=scale,
    )
    return out.reshape(*lead, *out.shape[-2:])


def _repeated(op, name, query, tensor):
    """`tensor` with the heads of `query`."""
    heads, given = query.shape[-3], tensor.shape[-3]
    if given < 1 or heads % given:
        raise ValueError(
            f"[{op}] query has {heads} heads and {name} has {given}, "
            f"expected query's to be a multiple of {name}'s"
        )
    return tensor.repeat_interleave(heads // given, -3)


def _folded(tensor, lead):
    """(B, H, S, D) of what broadcasts to `lead`."""
    tensor = tensor.expand(*lead, *tensor.shape[-2:])
    if len(lead) < 2:
        return tensor[(None,) * (2 - len(lead))]
    return tensor if len(lead) == 2 else tensor.flatten(0, len(lead) - 2)


def _folded_mask(op, mask, lead, rows, columns):
    if len(lead) <= 2:
        return mask
    try:
        return mask.expand(*lead, rows, columns).flatten(0, len(lead) - 2)
    except RuntimeError:
        raise ValueError(
            f"[{op}] attn_mask has shape {tuple(mask.shape)}, "
            f"expected one that broadcasts to {(*lead, rows, columns)}"
        ) from None
