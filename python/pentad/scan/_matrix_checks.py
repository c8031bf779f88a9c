# SPDX-License-Identifier: Apache-2.0
"""What the recurrences whose state is a matrix refuse, and their decays in the kernels' form."""

from pentad.scan._checks import (
    accumulator,
    check_cuda_devices,
    check_dtype,
    check_rank,
    check_rows,
    check_shape,
    check_tensor,
    name_of,
    parameter,
)

MAX_SIZE = 1024  # keys, and values, that the kernels take


def check_inputs(op, q, k, v, *, names=("q", "k", "v"), steps=True, **others):
    """q, k (B, L, G, N) and v (B, L, H, P), or without the L of `steps`; `others`: only devices."""
    (q_name, k_name, v_name), letters = names, "B, L, " if steps else "B, "
    check_tensor(op, v_name, v)
    rank = 4 if steps else 3
    check_rank(op, v_name, v, rank, f"({letters}H, P)")
    check_cuda_devices(op, (v_name, v), **{q_name: q, k_name: k}, **others)
    for name, tensor in ((k_name, k), (q_name, q)):
        check_tensor(op, name, tensor)
        check_dtype(op, name, tensor, v.dtype, v_name)
        check_rank(op, name, tensor, rank, f"({letters}G, N)")
    groups, heads = k.shape[-2], v.shape[-2]
    check_shape(op, k_name, k, (*v.shape[:-2], *k.shape[-2:]))
    check_shape(op, q_name, q, tuple(k.shape))
    if groups < 1 or heads % groups:
        raise ValueError(
            f"[{op}] {k_name} has {groups} groups but {v_name} has {heads} heads, "
            f"which are not a multiple of {groups}"
        )


def check_sizes(op, k, v, *, names=("k", "v")):
    """The numbers of keys and of values, as they come to the kernel."""
    check_size(op, names[0], k, "keys")
    check_size(op, names[1], v, "values")


def check_size(op, name, tensor, what):
    if not 1 <= tensor.shape[-1] <= MAX_SIZE:
        raise ValueError(f"[{op}] {name} has {tensor.shape[-1]} {what}, expected 1 to {MAX_SIZE}")


def factors(op, decay, log_space, v, keys):
    """Decays as (B, L, H) or (B, L, H, N), where those that are constant in time are expanded.

    Without the L where `v` is a token's; there (H,) may stay as it is. A step of microseconds
    meets no more than the first comparisons.
    """
    if decay is None:
        return None
    check_tensor(op, "decay", decay)
    *lead, heads, _ = v.shape
    wide = accumulator(v.dtype)
    if len(lead) == 1 and decay.dtype == wide:
        sizes = decay.shape
        one = len(sizes) == 1 and sizes[0] == heads
        if one or (len(sizes) == 2 and sizes[1] == heads != keys and sizes[0] == lead[0]):
            return decay.exp() if log_space else decay
    constant = [(heads,), (heads, keys)]
    varying = [(*lead, heads), (*lead, heads, keys)]
    check_shape(op, "decay", decay, constant[0], varying[0], constant[1], varying[1])
    decay = parameter(op, "decay", decay, wide, decay.shape, whose="v")
    if log_space:
        decay = decay.exp()
    if len(lead) > 1:
        by_step = decay.ndim > 2
    else:  # of a token: both (B, H) and (H, N) have two dimensions
        by_step = decay.ndim == 3 or (decay.ndim == 2 and _same(decay.shape, varying[0]))
        if decay.ndim == 2 and by_step and _same(decay.shape, constant[1]) and heads > 1:
            raise ValueError(
                f"[{op}] decay has shape {tuple(decay.shape)}, which is both (B, H) and (H, N), "
                f"expected ({lead[0]}, {heads}, {keys}) or ({heads},)"
            )
    return decay if by_step else decay.expand(*lead, *decay.shape)


def _same(shape, expected):
    return tuple(shape) == tuple(expected)


def check_step(op, state, q, k, v, decay, beta, rows):
    """All that a token and the cache must have in common, but for the decay's shape."""
    check_inputs(
        op, q, k, v, steps=False, state=state, decay=decay, beta=beta, state_batch_indices=rows
    )
    batch, heads = v.shape[:2]
    check_tensor(op, "state", state)
    if accumulator(state.dtype) != accumulator(v.dtype):
        raise TypeError(
            f"[{op}] state has dtype {name_of(state.dtype)} but v has {name_of(v.dtype)}, "
            "expected float64 of both or of none"
        )
    check_rank(op, "state", state, 4, "(S, H, N, P)")
    check_shape(op, "state", state, (state.shape[0], heads, k.shape[2], v.shape[2]))
    if beta is not None:
        parameter(op, "beta", beta, accumulator(v.dtype), (batch, heads), whose="v")
    check_rows(op, "state_batch_indices", rows, batch, "state", state)
