# SPDX-License-Identifier: Apache-2.0
"""Between padded batches (B, S, ...) and packed sequences (total, ...), with gradients."""

import torch


def index_first_axis(input, indices):
    """Rows `indices` of `input`.

    Parameters
    ----------
    input : (rows, ...)
    indices : (total,) int64

    Returns
    -------
    (total, ...)
    """
    return input.index_select(0, indices)


def index_put_first_axis(values, indices, first_axis_dim):
    """The inverse of `index_first_axis`: zeros but for the rows `indices`.

    Parameters
    ----------
    values : (total, ...)
    indices : (total,) int64
        No row twice.
    first_axis_dim : int
        Rows of the result.

    Returns
    -------
    (first_axis_dim, ...)
    """
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """Pack the tokens that a mask selects.

    Parameters
    ----------
    hidden_states : (B, S, ...)
    attention_mask : (B, S) bool or int
        1 where the token is valid.
    unused_mask : (B, S) bool or int, optional
        1 where a token keeps its place although it is not used.

    Returns
    -------
    hidden_states : (total, ...)
        `total` tokens are in one mask or the other.
    indices : (total,) int64
        Where they lay in (B * S).
    cu_seqlens : (B + 1,) int32
        Sequence b is the rows ``[cu_seqlens[b], cu_seqlens[b + 1])``.
    max_seqlen_in_batch : int
    seqused : (B,) int32
        Tokens of each sequence in `attention_mask`.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    cu_seqlens = lengths.new_zeros(len(lengths) + 1)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
    indices = kept.flatten().nonzero().flatten()
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        cu_seqlens,
        int(lengths.max()),
        attention_mask.sum(-1, dtype=torch.int32),
    )


def pad_input(hidden_states, indices, batch, seqlen):
    """The inverse of `unpad_input`, with zeros where no token was.

    Parameters
    ----------
    hidden_states : (total, ...)
    indices : (total,) int64
    batch, seqlen : int

    Returns
    -------
    (batch, seqlen, ...)
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))
