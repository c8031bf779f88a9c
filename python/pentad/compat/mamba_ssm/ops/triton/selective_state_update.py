# SPDX-License-Identifier: Apache-2.0
"""One token of a selective scan, on a cache and in place."""

from pentad import scan
from pentad.scan import reference


def selective_state_update(
    state,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    state_batch_indices=None,
):
    """`pentad.scan.selective_state_update`.

    Parameters
    ----------
    state : (S, dim, N) or (S, heads, head_dim, N)
        Updated in place.
    x, dt, z : (B, dim) or (B, heads, head_dim)
    A : (dim, N) or (heads, head_dim, N)
    B, C : (B, N) or (B, groups, N)
    D, dt_bias : (dim,) or (heads, head_dim)
    dt_softplus : bool
    state_batch_indices : (B,) int32, optional
        The row of `state` of each sequence; by default S = B. A negative index is padding: its
        output is 0 and its state stays.

    Returns
    -------
    out : as x
    """
    return scan.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
    )


def selective_state_update_ref(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False
):
    """`selective_state_update` in plain PyTorch, in float32 (float64 for float64)."""
    return reference.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


__all__ = ["selective_state_update", "selective_state_update_ref"]
