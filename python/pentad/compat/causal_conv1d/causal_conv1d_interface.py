# SPDX-License-Identifier: Apache-2.0
"""The causal depthwise convolution in front of a scan: causal_conv1d's names and arguments.

Every layout, width and number of channels works with every option, where causal_conv1d wants
channels side by side, widths of 2 to 4 and multiples of 8.
"""

from pentad import scan
from pentad.scan import reference


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """`pentad.scan.causal_conv1d`.

    Parameters
    ----------
    x : (B, D, L)
    weight : (D, W)
    bias : (D,), optional
    seq_idx : (B, L) int32, optional
        The sequence of each step, ascending; a tap counts only within its sequence, and a negative
        entry is padding: its output is 0. Not with initial or final states.
    initial_states : (B, D, W - 1), optional
        The inputs before the first step.
    return_final_states : bool
    final_states_out : (B, D, W - 1), optional
        Where the final states are written.
    activation : None, "silu" or "swish"

    Returns
    -------
    out : (B, D, L)
    final_states : (B, D, W - 1)
        With `return_final_states`: the last inputs.
    """
    result = scan.causal_conv1d(
        x,
        weight,
        bias,
        activation=activation,
        initial_states=initial_states,
        return_final_states=return_final_states,
        seq_idx=seq_idx,
    )
    return _with_final(result, return_final_states, final_states_out)


def causal_conv1d_ref(
    x,
    weight,
    bias=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """`causal_conv1d_fn` in plain PyTorch: a sum over taps in float32 (float64 for float64)."""
    result = reference.causal_conv1d(
        x,
        weight,
        bias,
        activation=activation,
        initial_states=initial_states,
        return_final_states=return_final_states,
    )
    return _with_final(result, return_final_states, final_states_out)


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
):
    """`pentad.scan.causal_conv1d_update`.

    Parameters
    ----------
    x : (B, D) or (B, D, L)
        The next steps.
    conv_state : (S, D, state_len)
        The latest inputs, the newest last; at least W - 1 of them. `x` is shifted in, in place.
    weight : (D, W)
    bias : (D,), optional
    activation : None, "silu" or "swish"
    cache_seqlens : (B,) int32, optional
        The number of steps before: `conv_state` is a ring, in which step i lies at i % state_len.
    conv_state_indices : (B,) int32, optional
        The row of `conv_state` of each sequence; by default S = B. A negative index is padding: its
        output is 0 and its state stays.

    Returns
    -------
    as x
    """
    return scan.causal_conv1d_update(
        x,
        conv_state,
        weight,
        bias,
        activation=activation,
        cache_seqlens=cache_seqlens,
        conv_state_indices=conv_state_indices,
    )


def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    """`causal_conv1d_update` in plain PyTorch."""
    return reference.causal_conv1d_update(
        x, conv_state, weight, bias, activation=activation, cache_seqlens=cache_seqlens
    )


def _with_final(result, return_final_states, final_states_out):
    """The result of a convolution, its final states in `final_states_out` if that is given."""
    if not return_final_states or final_states_out is None:
        return result
    out, final_states = result
    return out, final_states_out.copy_(final_states)


__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
]
