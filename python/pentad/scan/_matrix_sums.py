# SPDX-License-Identifier: Apache-2.0
"""Sums over all steps at once, for what is not causal: plain matrix products.

Not in 16 bits under ``torch.autocast``, which is why it is switched off here.
"""

import torch

from pentad._ops import autocast_device


def total(k, v, state=None):
    """``state + sum_s k_s v_s^T`` (B, H, N, P) of k (B, L, G, N) and v (B, L, H, P)."""
    (batch, length, groups, keys), (heads, values) = k.shape, v.shape[2:]
    each = heads // groups
    with torch.autocast(autocast_device(v), enabled=False):
        v = v.reshape(batch, length, groups, each * values).transpose(1, 2)
        out = k.permute(0, 2, 3, 1) @ v
    out = out.reshape(batch, groups, keys, each, values).transpose(2, 3)
    out = out.reshape(batch, heads, keys, values)
    return out if state is None else out + state


def read(state, q):
    """``state^T q_t`` (B, L, H, P) for all steps of q (B, L, G, N)."""
    (batch, length, groups, keys), (heads, values) = q.shape, state.shape[1::2]
    each = heads // groups
    with torch.autocast(autocast_device(q), enabled=False):
        state = state.reshape(batch, groups, each, keys, values).transpose(2, 3)
        out = q.transpose(1, 2) @ state.reshape(batch, groups, keys, each * values)
    return out.transpose(1, 2).reshape(batch, length, heads, values)
