# SPDX-License-Identifier: Apache-2.0
"""Caches of a causal convolution from packed sequences."""

import torch


def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    """The last inputs of each sequence, behind zeros where it is shorter.

    Parameters
    ----------
    x : (total, D)
    cu_seqlens : (B + 1,) int32
        Sequence b is the rows ``[cu_seqlens[b], cu_seqlens[b + 1])``.
    state_len : int

    Returns
    -------
    (B, D, state_len)
        Channels side by side in memory.
    """
    begins, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    rows = ends + torch.arange(-state_len, 0, device=x.device)
    inside = rows >= begins
    states = x.new_zeros(*rows.shape, x.shape[1])
    states[inside] = x[rows[inside]]
    return states.transpose(1, 2)


def causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len):
    """`causal_conv1d_varlen_states`, one sequence after another."""
    bounds = cu_seqlens.tolist()
    states = x.new_zeros(len(bounds) - 1, x.shape[1], state_len)
    for state, begin, end in zip(states, bounds[:-1], bounds[1:], strict=True):
        kept = min(end - begin, state_len)
        state[:, state_len - kept :] = x[end - kept : end].T
    return states


__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]
