# SPDX-License-Identifier: Apache-2.0
"""One-token steps on caches of states: the calls of a decoding loop.

Without gradients they go straight to the kernels, which check everything; what is refused is then
looked at again, for an error in the caller's terms. With gradients they are the functions over
whole sequences, whose last state is copied into the cache.
"""

import torch

from pentad._ops import forward_mode
from pentad.scan import autograd
from pentad.scan._checks import (
    accumulator,
    autocasts,
    check_conv_update,
    check_state_update,
    complex_of,
    parameter,
    promoted,
    weights,
)
from pentad.scan.functional import causal_conv1d, is_silu, selective_scan


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
    r"""One token of `selective_scan` on a cache of states, in place.

    ``state <- exp(dt A) state + dt x B``, ``out = C . state + D x``, times ``silu(z)`` with `z`,
    where ``dt`` has `dt_bias` added and has gone through softplus with `dt_softplus` (Gu & Dao
    2023, "Mamba", arXiv 2312.00752, section 3; with heads Dao & Gu 2024, "Transformers are SSMs",
    arXiv 2405.21060, section 7). The output is taken from the state before that is rounded.
    Without heads H = 1 and P is the number of channels. Where a gradient is needed, it is
    differentiable once in every floating argument, the state before the call included.

    Parameters
    ----------
    state : (S, P, N) or (S, H, P, N) float32, bfloat16, float16, float64, complex64 or complex128
        Changed in place. S is B unless `state_batch_indices` are given.
    x : (B, P) or (B, H, P) float32, bfloat16, float16 or float64
        Under ``torch.autocast`` `x`, `dt`, `z`, `B` and `C` are taken in the widest dtype.
    dt : (B, P) or (B, H, P)
        In x's dtype, as `z`, `B` and `C`; expanded dimensions of stride 0 cost nothing, here and
        below.
    A : (P, N) or (H, P, N) float or complex
    B : (B, N) or (B, G, N)
        Head h reads group ``h // (H // G)``; without heads channel p reads ``p // (P // G)``.
    C : (B, N) or (B, G, N)
    D : (P,) or (H, P) float, optional
    z : (B, P) or (B, H, P), optional
    dt_bias : (P,) or (H, P) float, optional
    dt_softplus : bool
    state_batch_indices : (B,) int32 or int64, optional
        The row of `state` that belongs to each of the batch, no row twice; a negative one is
        padding: its output is 0 and no state changes.

    Returns
    -------
    out : the shape and dtype of `x`

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes that do not fit together; rows out of range, or twice the same.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative, or one of forward mode.

    Examples
    --------
    >>> import torch
    >>> state = torch.zeros(1, 2, 1)
    >>> A, B = torch.zeros(2, 1), torch.ones(1, 1)
    >>> for n in range(3):
    ...     out = pentad.scan.selective_state_update(
    ...         state, torch.ones(1, 2), torch.ones(1, 2), A, B, B
    ...     )
    >>> out
    tensor([[3., 3.]])
    """
    op = "selective_state_update"
    if autocasts(x):
        x, dt, z, B, C = promoted(x, dt, z, B, C)
    given = (state, x, dt, A, B, C, D, z, dt_bias)
    if _by_gradient(given) or (isinstance(A, torch.Tensor) and A.is_complex()):
        return _scan_update(*given, dt_softplus, state_batch_indices)
    try:
        wide = accumulator(x.dtype)
        if A.dtype != wide:
            A = parameter(op, "A", A, wide, A.shape, whose="x")
        if D is not None and D.dtype != wide:
            D = parameter(op, "D", D, wide, D.shape, whose="x")
        if dt_bias is not None and dt_bias.dtype != wide:
            dt_bias = parameter(op, "dt_bias", dt_bias, wide, dt_bias.shape, whose="x")
        if B.ndim == 3 and state.ndim == 3 and B.shape[1] != 1:  # groups of channels are heads
            arguments = _as_heads(state, x, dt, A, B, C, D, z, dt_bias)
            out = autograd.state_update(*arguments, bool(dt_softplus), state_batch_indices)
            return out.flatten(1)
        return autograd.state_update(
            state, x, dt, A, B, C, D, z, dt_bias, bool(dt_softplus), state_batch_indices
        )
    except Exception:
        check_state_update(op, *given, state_batch_indices)
        raise


def _by_gradient(tensors):
    if forward_mode():
        return True
    return torch.is_grad_enabled() and any(
        isinstance(t, torch.Tensor) and t.requires_grad for t in tensors
    )


def _as_heads(state, x, dt, A, B, C, D, z, dt_bias):
    """The arguments without heads, with one for each group of channels."""
    heads = (B.shape[1], -1)
    state, x, dt, z = (None if t is None else t.unflatten(1, heads) for t in (state, x, dt, z))
    A, D, dt_bias = (None if t is None else t.unflatten(0, heads) for t in (A, D, dt_bias))
    return state, x, dt, A, B, C, D, z, dt_bias


def _scan_update(state, x, dt, A, B, C, D, z, dt_bias, softplus, rows):
    """`selective_scan` over the one step; channels are (head, channel) pairs."""
    check_state_update("selective_state_update", state, x, dt, A, B, C, D, z, dt_bias, rows)
    dtype, shape, states = x.dtype, x.shape, state.shape[-1]
    wide = accumulator(dtype)
    if A.is_complex():  # B and C may be real
        x, dt, z = (None if t is None else t.to(wide) for t in (x, dt, z))
        B, C = B.to(complex_of(wide)), C.to(complex_of(wide))
        wide = complex_of(wide)
    u, delta, gate = (None if t is None else t.flatten(1).unsqueeze(2) for t in (x, dt, z))
    A = A.reshape(-1, states)
    D, dt_bias = (None if t is None else t.flatten() for t in (D, dt_bias))
    # A copy, as the state itself changes before the backward pass.
    initial, places = _gathered("selective_state_update", "state_batch_indices", state, rows)
    initial = initial.to(wide, copy=rows is None)
    out, last = selective_scan(
        u, delta, A, B.unsqueeze(-1), C.unsqueeze(-1), D, gate, dt_bias, softplus,
        initial_state=initial.flatten(1, -2), return_last_state=True,
    )  # fmt: skip
    _scatter(state, last.reshape(initial.shape), places)
    return _without_padding(out.to(dtype).reshape(shape), places, state.shape[0])


def _gathered(op, name, state, rows):
    """The rows of the batch, and where they are; padding is a row of zeros past the end."""
    if rows is None:
        return state, None
    places = autograd.cache_rows(op, name, rows, state.shape[0])
    return torch.cat([state, torch.zeros_like(state[:1])]).index_select(0, places), places


def _scatter(state, new, places):
    if places is not None:
        padded = torch.cat([state, torch.zeros_like(state[:1])])
        new = padded.index_copy(0, places, new.to(state.dtype))[:-1]
    state.copy_(new)


def _without_padding(out, places, rows):
    if places is None:
        return out
    return out.where((places < rows).view(-1, *(1,) * (out.ndim - 1)), 0)


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    *,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
):
    r"""Further steps of `causal_conv1d` on a cache of the latest inputs, in place.

    The newest input is the last of the cache; the inputs of this call are shifted in. Where a
    gradient is needed, it is differentiable once in every floating argument, the cache before the
    call included (Dao, causal-conv1d; for the convolution Gu & Dao 2023, "Mamba", arXiv
    2312.00752, figure 3).

    Parameters
    ----------
    x : (B, D) or (B, D, L) float32, bfloat16, float16 or float64
        Under ``torch.autocast`` it is taken in conv_state's dtype.
    conv_state : (S, D, M)
        Changed in place; in x's dtype, M at least W - 1. S is B unless `conv_state_indices` are
        given.
    weight : (D, W) float
        W is 1 to 64.
    bias : (D,) float, optional
    activation : "silu" or "swish" (the same), optional
    cache_seqlens : (B,) int32 or int64, optional
        Inputs before this call: the cache is then a ring, where input i has place ``i % M``.
    conv_state_indices : (B,) int32 or int64, optional
        The row of `conv_state` that belongs to each of the batch, no row twice; a negative one is
        padding: its output is 0 and no state changes.

    Returns
    -------
    out : the shape and dtype of `x`

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes that do not fit together; rows out of range, or twice the same.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative, or one of forward mode.

    Examples
    --------
    >>> import torch
    >>> conv_state, weight = torch.zeros(1, 1, 1), torch.tensor([[10.0, 1.0]])
    >>> for n in (1.0, 2.0, 3.0):
    ...     out = pentad.scan.causal_conv1d_update(torch.tensor([[n]]), conv_state, weight)
    >>> out, conv_state
    (tensor([[23.]]), tensor([[[3.]]]))
    """
    op = "causal_conv1d_update"
    silu = activation is not None and is_silu(op, activation)
    given = (x, conv_state, weight, bias)
    try:
        dtype = x.dtype
        if dtype != conv_state.dtype and autocasts(x):
            x = x.to(conv_state.dtype)
        if x.dtype == torch.float64:
            weight, bias = weights(op, weight, bias, dtype, weight.shape[0])
        if _by_gradient(given):
            check_conv_update(op, x, *given[1:], cache_seqlens, conv_state_indices)
            out = _conv_update(
                x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
            )
        else:
            out = autograd.conv_update(
                x, conv_state, weight, bias, silu, conv_state_indices, cache_seqlens
            )
        return out if out.dtype == dtype else out.to(dtype)
    except Exception:
        check_conv_update(op, *given, cache_seqlens, conv_state_indices)
        raise


def _conv_update(x, state, weight, bias, activation, positions, rows):
    """`causal_conv1d` behind the inputs of the cache."""
    steps = x if x.ndim == 3 else x.unsqueeze(2)
    size, length = state.shape[2], steps.shape[2]
    latest, places = _gathered("causal_conv1d_update", "conv_state_indices", state, rows)
    ring = positions is not None and size > 0
    if ring:  # from the oldest to the newest
        positions = autograd.cache_positions("causal_conv1d_update", positions, length)
        order = torch.arange(size, device=x.device)
        order = ((positions.unsqueeze(1) + order) % size).unsqueeze(1).expand(latest.shape)
        latest = latest.clone().gather(2, order)  # its backward pass looks at what it gathers from
    history = torch.cat([latest, steps], 2)
    initial = history[..., size - (weight.shape[1] - 1) : size]
    out = causal_conv1d(steps, weight, bias, activation=activation, initial_states=initial)
    new = history[..., length:]
    if ring:
        new = torch.zeros_like(latest).scatter(2, (order + length) % size, new)
    _scatter(state, new, places)
    out = out if x.ndim == 3 else out.squeeze(2)
    return _without_padding(out, places, state.shape[0])
