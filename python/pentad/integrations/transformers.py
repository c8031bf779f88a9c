# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="pentad"`` for Hugging Face transformers, through its registries.

>>> import pentad.integrations.transformers  # doctest: +SKIP
>>> pentad.integrations.transformers.register()  # doctest: +SKIP
>>> model = AutoModel.from_pretrained(name, attn_implementation="pentad")  # doctest: +SKIP

A mask that is causal, a sliding window or padding, in any combination, is never formed: `mask`
returns what is left of it, in one of these forms, and `attention_forward` reads them.

- None: nothing is hidden; the module's ``is_causal`` says whether the last query is aligned with
  the last key.
- (B or 1, n) bool: causal, the last query aligned with key n - 1. False hides a key, and keys from
  n on, the unused part of a static cache, are not read.
- (B or 1, n) int32: the same with 0 for False and a sliding window of that many keys, itself
  included; a negative number is a window of as many to both sides, and not causal.
- (B or 1, H or 1, Sq or 1, Sk) bool or float: complete, as of other implementations.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from pentad.attention import attention


def register(name="pentad") -> None:
    """Make ``attn_implementation=name`` known to transformers.

    Parameters
    ----------
    name : str
    """
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, mask)


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    position_bias=None,
    cache=None,
    **kwargs,
):
    """The attention of one module, as transformers' models call it.

    Parameters
    ----------
    module : torch.nn.Module
    query : (B, Hq, Sq, D)
    key : (B, Hk, Sk, D)
    value : (B, Hk, Sk, Dv)
    attention_mask : optional
        From `mask`, or (B or 1, Hq or 1, Sq or 1, Sk) bool or float.
    dropout : float
    scaling : float, optional
    is_causal : bool, optional
        By default the module's, or True.
    sliding_window : int, optional
        Used where `attention_mask` is None.
    softcap : float, optional
    s_aux : (Hq,), optional
        Attention sinks.
    position_bias : (B or 1, Hq or 1, Sq, Sk) float, optional

    Returns
    -------
    out : (B, Sq, Hq, Dv)
    weights : None
    """
    if cache is not None:
        raise ValueError("[transformers] the paged cache of continuous batching is not supported")
    causal, window, bias = False, None, None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if sliding_window is not None:
            window = sliding_window - 1, 0 if causal else sliding_window - 1
    elif attention_mask.ndim == 2:
        n = attention_mask.shape[1]
        key, value = key[:, :, :n], value[:, :, :n]
        causal, window, bias = _compact(attention_mask)
    else:
        bias = attention_mask[..., : key.shape[2]]
        if bias.stride(-2) == 0:
            bias = bias[..., :1, :]
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        if bias is None:
            bias = position_bias
        elif bias.dtype == torch.bool:
            bias = position_bias.masked_fill(~bias, -torch.inf)
        else:
            bias = position_bias + bias
    if query.shape[0] != key.shape[0]:  # learned queries, the same for all
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    out = attention(
        query,
        key,
        value,
        causal=bool(causal),
        window=window,
        scale=scaling,
        bias=bias,
        softcap=softcap or 0.0,
        sink=s_aux,
        dropout_p=dropout,
    )
    return out.transpose(1, 2).contiguous(), None


def _compact(mask):
    """(causal, window, bias) of a mask of rank 2."""
    visible = mask if mask.dtype == torch.bool else mask != 0
    bias = visible[:, None, None]
    if not torch.compiler.is_compiling() and visible.all():
        bias = None
    if mask.dtype == torch.bool:
        return True, None, bias
    low, high = (int(n) for n in mask.aminmax())
    if low < 0:
        return False, (-low - 1, -low - 1), bias
    return True, (max(high - 1, 0), 0), bias


def mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False,
    use_vmap=False,
    device="cpu",
    **kwargs,
):
    """What `attention_forward` needs of a mask, see the module; arguments as transformers has them.

    Patterns other than causal, sliding window and padding, and windows under ``torch.compile``, are
    returned as dense boolean masks.
    """
    compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()
    padding = attention_mask
    compact = None
    if not use_vmap and (padding is None or padding.ndim == 2):
        if allow_is_causal_skip and (isinstance(q_offset, int) or not compiling):
            compact = _causal(
                q_length, kv_length, int(q_offset), kv_offset, mask_function, padding, local_size,
                device, compiling,
            )  # fmt: skip
        elif allow_is_bidirectional_skip:
            compact = _bidirectional(
                q_length, kv_length, q_offset, kv_offset, mask_function, padding, local_size,
                device, compiling,
            )  # fmt: skip
    if compact is not None:
        return compact[0]
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _causal(
    q_length, kv_length, q_offset, kv_offset, mask_function, padding, local_size, device, compiling
):
    """The compact mask in a tuple, or None where there is none."""
    n = q_offset + q_length - kv_offset  # keys up to the last query
    if not q_length <= n <= kv_length:
        return None
    window = 0
    if mask_function is not causal_mask_function:
        if local_size is None or compiling or not _is_window(mask_function, local_size, device):
            return None
        window = local_size if local_size < n else 0
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + n]
        if padding.shape[1] < n:
            return None
        if not compiling and padding.all():
            padding = None
    if padding is None:
        if not window and n == kv_length:
            return (None,)
        padding = torch.ones(1, n, dtype=torch.bool, device=device)
    return (padding.int() * window if window else padding,)


def _bidirectional(
    q_length, kv_length, q_offset, kv_offset, mask_function, padding, local_size, device, compiling
):
    window = 0
    if mask_function is not bidirectional_mask_function:
        aligned = q_length == kv_length and kv_offset == 0 and isinstance(q_offset, int)
        if local_size is None or compiling or not aligned or q_offset != 0:
            return None
        if not _is_two_sided(mask_function, local_size, device):
            return None
        window = local_size + 1 if local_size + 1 < kv_length else 0
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if padding.shape[1] < kv_length:
            return None
        if not compiling and padding.all():
            padding = None
    if padding is None:
        if not window:
            return (None,)
        padding = torch.ones(1, kv_length, dtype=torch.bool, device=device)
    return (padding.int() * -window if window else padding[:, None, None],)


def _is_window(mask_function, size, device):
    """Whether this is the causal window of `size` keys, and not chunks of that size."""
    # The farthest keys that two neighbours see are in one chunk with them for one of them at most,
    # unless chunks are of one token, which are windows.
    pairs = [(size - 1, 0, True), (size, 1, True), (size, 0, False), (size, size + 1, False)]
    return _agrees(mask_function, pairs, device)


def _is_two_sided(mask_function, size, device):
    pairs = [(0, size, True), (size, 0, True), (0, size + 1, False), (size + 1, 0, False)]
    return _agrees(mask_function, pairs, device)


def _agrees(mask_function, pairs, device):
    q, k, expected = torch.tensor(pairs, device=device).unbind(1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return bool((mask_function(zero, zero, q, k) == expected.bool()).all())
