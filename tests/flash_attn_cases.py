# SPDX-License-Identifier: Apache-2.0
"""Attention and rotary embedding in plain PyTorch, in flash-attention's layout."""

import torch


def visible(sq, sk, causal, window, q_mask=None, k_mask=None):
    """(B or 1, 1, Sq, Sk): the last valid query is aligned with the last valid key."""
    rows, columns = torch.arange(sq)[:, None], torch.arange(sk)
    used_q = torch.tensor(sq) if q_mask is None else q_mask.sum(-1)[:, None, None, None]
    used_k = torch.tensor(sk) if k_mask is None else k_mask.sum(-1)[:, None, None, None]
    diagonal = rows + used_k - used_q
    left, right = window
    if causal:
        right = 0
    seen = torch.ones(1, 1, sq, sk, dtype=torch.bool)
    if left >= 0:
        seen = seen & (columns >= diagonal - left)
    if right >= 0:
        seen = seen & (columns <= diagonal + right)
    if k_mask is not None:
        seen = seen & k_mask[:, None, None]
    return seen, (diagonal - columns).abs()


def reference(
    q, k, v, causal=False, window=(-1, -1), softcap=0.0, alibi=None, q_mask=None, k_mask=None,
    keep=None, dropout_p=0.0, scale=None, upcast=True,
):  # fmt: skip
    """(out, lse, probabilities) of (B, S, H, D) tensors, in plain PyTorch."""
    dtype = q.dtype
    if upcast:
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # As flash-attention: another order of operations in low precision.
    scores = (q * scale) @ k.mT if upcast else q @ (k * scale).mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen, distance = visible(q.shape[2], k.shape[2], causal, window, q_mask, k_mask)
    if alibi is not None:
        slopes = alibi if alibi.ndim == 2 else alibi[None]
        scores = scores - (slopes[:, :, None, None] * distance).to(scores.dtype)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores.float() if not upcast else scores, -1)
    weights = torch.softmax(scores, -1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    used = weights if keep is None else (weights * keep) / (1 - dropout_p)
    out = (used @ v).transpose(1, 2)
    if q_mask is not None:
        out = out.masked_fill(~q_mask[:, :, None, None], 0.0)
    return out.to(dtype), torch.where(lse == -torch.inf, torch.inf, lse), weights


def turned(x, cos, sin, positions, interleaved):
    """Rotary embedding of (B, S, H, D) as complex products."""
    half = cos.shape[1]
    pairs = x[..., : 2 * half].float()
    if interleaved:
        a, b = pairs[..., ::2], pairs[..., 1::2]
    else:
        a, b = pairs[..., :half], pairs[..., half:]
    angle = torch.complex(cos[positions].float(), sin[positions].float())[:, :, None]
    product = torch.complex(a.contiguous(), b.contiguous()) * angle
    out = x.clone()
    if interleaved:
        out[..., : 2 * half : 2], out[..., 1 : 2 * half : 2] = product.real, product.imag
    else:
        out[..., :half], out[..., half : 2 * half] = product.real, product.imag
    return out
