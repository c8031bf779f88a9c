# SPDX-License-Identifier: Apache-2.0
"""Allocate outputs and call the native kernels of the recurrences whose state is a matrix.

As `pentad.scan._kernels`, which has the others.
"""

import torch

from pentad import _C
from pentad._arrays import on_device
from pentad.scan._checks import accumulator

CHUNK = _C.matrix_chunk  # steps between stored states


def _renamed(op, error):
    """The extension's error in the name of the function that was called."""
    _, _, text = str(error).partition("] ")
    return type(error)(f"[{op}] {text}")


def empty_scan(v, q, cu_seqlens, wide, want_last, store):
    """(out, last states, stored states); the last two empty where they are not wanted."""
    (batch, length, heads, values), keys = v.shape, q.shape[3]
    dtype = accumulator(v.dtype)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = (sequences, heads, keys, values) if want_last else (0,)
    stored = (0,)
    if store and v.dtype != torch.float64:
        if cu_seqlens is None:
            chunks = batch * ((length + CHUNK - 1) // CHUNK)
        else:
            chunks = length // CHUNK + sequences
        stored = (chunks, heads, keys, values)
    return (
        v.new_empty(v.shape, dtype=dtype if wide else v.dtype),
        v.new_empty(last, dtype=dtype),
        v.new_empty(stored, dtype=torch.float32),
    )


def _device_arguments(q, v, a, cu_seqlens, delta, *, backward=False, stored=True):
    """What a CUDA kernel takes on top: scratch memory and the stream; nothing for the CPU's."""
    (batch, length, heads, values), (groups, keys) = v.shape, q.shape[2:]
    sequences = -1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    key_decay = a is not None and a.ndim == v.ndim
    return on_device(
        v, _C.matrix_scan_scratch, batch, length, heads, groups, keys, values, sequences, delta,
        key_decay, backward, stored,
    )  # fmt: skip


def scan_forward(
    op, q, k, v, a, w, d, initial, cu_seqlens, delta, reverse, scale, wide, want_last, store
):
    out, last, stored = empty_scan(v, q, cu_seqlens, wide, want_last, store)
    store = store and v.dtype != torch.float64
    try:
        _C.matrix_scan_forward(
            q, k, v, a, w, d, initial, cu_seqlens, delta, reverse, scale, out,
            last if want_last else None,
            stored if store else None,
            *_device_arguments(q, v, a, cu_seqlens, delta, stored=store),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise _renamed(op, error) from None
    return out, last, stored


def empty_scan_gradients(q, k, v, a, w, d, initial, wanted):
    """Where the kernel writes the wanted gradients; None for the others."""
    inputs = (q, k, v, a, w, d, initial)
    return [t.new_empty(t.shape) if want else None for t, want in zip(inputs, wanted, strict=True)]


def scan_backward(
    d_out, d_last, stored, q, k, v, a, w, d, initial, cu_seqlens, delta, reverse, scale, wanted
):
    grads = empty_scan_gradients(q, k, v, a, w, d, initial, wanted)
    _C.matrix_scan_backward(
        d_out, d_last, None if v.dtype == torch.float64 else stored, q, k, v, a, w, d, initial,
        cu_seqlens, delta, reverse, scale, *grads,
        *_device_arguments(q, v, a, cu_seqlens, delta, backward=True),
    )  # fmt: skip
    return [grad for grad in grads if grad is not None]


def update(op, state, q, k, v, a, w, delta, scale, rows):
    out = torch.empty_like(v)
    try:
        _C.matrix_update(state, q, k, v, a, w, None, delta, scale, rows, out, *on_device(v))
    except (TypeError, ValueError) as error:
        raise _renamed(op, error) from None
    torch.autograd.graph.increment_version(state)
    return out
