# SPDX-License-Identifier: Apache-2.0
"""Allocate outputs and call the native kernels: what the dispatcher runs for CPU and CUDA tensors.

Arguments have been checked by the functions; the extension checks again whatever could harm memory.
Shapes and dtypes of outputs stand in the functions `empty_*`, which the shape functions run too.
"""

import torch

from pentad import _C
from pentad._arrays import on_device
from pentad.scan._checks import accumulator, complex_of, real_of

CHUNK = _C.scan_chunk  # steps between stored states


def parts(tensor):
    """Complex numbers as pairs of reals, which is what the kernels take."""
    if tensor is not None and tensor.is_complex():
        return torch.view_as_real(tensor)
    return tensor


def empty_like(x):
    """(B, D, L) with the channels next to each other in memory where those of `x` are."""
    b, d, length = x.shape
    if x.stride(1) == 1 and x.stride(2) != 1:
        return x.new_empty((b, length, d)).transpose(1, 2)
    return x.new_empty((b, d, length))


# --- Selective scan -------------------------------------------------------------------------------


def empty_scan(u, A, cu_seqlens, want_last, store):
    """(out, last state, stored states); the last two empty where they are not wanted."""
    batch, dim, length = u.shape
    states = A.shape[1]
    wide = accumulator(u.dtype)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = (sequences, dim, states) if want_last else (0,)
    last = u.new_empty(last, dtype=complex_of(wide) if A.is_complex() else wide)
    stored = (0,)
    if store and u.dtype != torch.float64:
        if cu_seqlens is None:
            chunks = batch * ((length + CHUNK - 1) // CHUNK)
        else:
            chunks = length // CHUNK + sequences
        stored = (chunks, states, 2 if A.is_complex() else 1, dim)
    return empty_like(u), last, u.new_empty(stored, dtype=torch.float32)


def _scan_device(u, A, B, C, cu_seqlens, *, backward):
    """What a CUDA kernel of the scan takes on top."""
    groups = next((t.shape[1] for t in (B, C) if t.ndim > 2), 1)
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    more = A.is_complex(), sequences, cu_seqlens is not None
    if backward:
        scratch = _C.selective_scan_backward_scratch
        return on_device(u, scratch, *u.shape, A.shape[1], groups, *more)
    return on_device(u, _C.selective_scan_forward_scratch, *u.shape, A.shape[1], *more)


def scan_forward(
    u, delta, A, B, C, D, z, delta_bias, initial, cu_seqlens, softplus, reverse, want_last, store
):
    out, last, stored = empty_scan(u, A, cu_seqlens, want_last, store)
    _C.selective_scan_forward(
        u, delta, parts(A), parts(B), parts(C), D, z, delta_bias, parts(initial), cu_seqlens,
        softplus, reverse, A.is_complex(), out, parts(last) if want_last else None,
        stored if store and u.dtype != torch.float64 else None,
        *_scan_device(u, A, B, C, cu_seqlens, backward=False),
    )  # fmt: skip
    return out, last, stored


def _empty_coefficients(B, wide):
    """The gradient of B or C as it is summed: states next to each other in memory."""
    dtype = complex_of(wide) if B.is_complex() else wide
    if B.ndim == 2:
        return B.new_empty(B.shape, dtype=dtype)
    batch, groups, states, length, *pair = B.shape
    return B.new_empty((batch, groups, length, states, *pair), dtype=dtype).transpose(2, 3)


def empty_scan_gradients(u, delta, A, B, C, D, z, delta_bias, initial, wanted):
    """Where the kernel writes the wanted gradients: None for the others, but always u's."""
    wide = accumulator(u.dtype)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial)
    makers = (
        empty_like, empty_like, _contiguous, lambda t: _empty_coefficients(t, wide),
        lambda t: _empty_coefficients(t, wide), _contiguous, empty_like, _contiguous, _contiguous,
    )  # fmt: skip
    return [
        make(t) if want or t is u else None
        for t, make, want in zip(inputs, makers, wanted, strict=True)
    ]


def _contiguous(tensor):
    return tensor.new_empty(tensor.shape)


def scan_gradients(written, B, C, wanted):
    """Of what the kernel has written, the wanted ones, in the dtypes of the inputs."""
    written[3] = written[3] if written[3] is None else written[3].to(B.dtype)
    written[4] = written[4] if written[4] is None else written[4].to(C.dtype)
    return [grad for grad, want in zip(written, wanted, strict=True) if want]


def scan_backward(
    d_out, d_last, stored, u, delta, A, B, C, D, z, delta_bias, initial, cu_seqlens,
    softplus, reverse, wanted,
):  # fmt: skip
    written = empty_scan_gradients(u, delta, A, B, C, D, z, delta_bias, initial, wanted)
    _C.selective_scan_backward(
        d_out, parts(d_last), None if u.dtype == torch.float64 else stored, u, delta, parts(A),
        parts(B), parts(C), D, z, delta_bias, parts(initial), cu_seqlens, softplus, reverse,
        A.is_complex(), *map(parts, written), *_scan_device(u, A, B, C, cu_seqlens, backward=True),
    )  # fmt: skip
    return scan_gradients(written, B, C, wanted)


def state_update(state, x, dt, A, B, C, D, z, dt_bias, softplus, rows):
    out = torch.empty_like(x)
    if state.dim() == 4:  # one group for all heads
        B = B if B.dim() == 3 else B.unsqueeze(1)
        C = C if C.dim() == 3 else C.unsqueeze(1)
    _C.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, softplus, rows, out, *on_device(x)
    )
    torch.autograd.graph.increment_version(state)
    return out


def few_rows_linear(x, weight, bias):
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _C.few_rows_linear(x, weight, bias, out, *on_device(x))
    return out


def cache_rows(op, name, rows, size):
    """Rows of a cache as indices, with `size` for padding."""
    if rows.is_cuda:  # not looked at, as the host would have to wait: what is outside is padding
        return rows.long().where((rows >= 0) & (rows < size), size)
    live = rows[rows >= 0]
    if live.numel() and live.max() >= size:
        raise ValueError(f"[{op}] {name} holds {int(live.max())}, but there are {size} rows")
    used, counts = live.unique(return_counts=True)
    if used.numel() != live.numel():
        raise ValueError(f"[{op}] {name} has row {int(used[counts > 1][0])} twice")
    return rows.long().where(rows >= 0, size)


def cache_positions(op, positions, steps):
    """How many inputs came before these steps."""
    if positions.is_cuda:
        return positions.long().clone()
    most = torch.iinfo(torch.int64).max - steps
    for position in positions.tolist():
        if not 0 <= position <= most:
            raise ValueError(f"[{op}] cache_seqlens holds {position}, expected 0 or more")
    return positions.long().clone()


# --- Elementwise recurrence -----------------------------------------------------------------------


def recurrence_forward(a, x, h0, log_space, reverse):
    h = torch.empty_like(x)
    h0 = None if h0 is None else parts(h0.expand(x.shape[:2]))
    _C.recurrence_forward(
        parts(a.expand(x.shape)), parts(x), h0, parts(h), log_space, reverse, x.is_complex(),
        *on_device(x),
    )  # fmt: skip
    return h


def empty_recurrence_gradients(a, x, h0, wanted):
    """Of a and h0 in the accumulator's dtype where they are summed over broadcast sizes."""
    wide = accumulator(real_of(x.dtype))
    wide = complex_of(wide) if x.is_complex() else wide
    (outer, inner, length), (want_a, want_x, want_h0) = x.shape, wanted
    da = dx = dh0 = None
    if want_x:
        dx = torch.empty_like(x)
    if want_a and a.shape == x.shape:
        da = torch.empty_like(a)
    elif want_a:
        summed = a.shape[2] == 1 and length != 1
        da = x.new_empty((outer, inner, 1 if summed else length), dtype=wide)
    if want_h0:
        same = h0.shape == x.shape[:2]
        dh0 = x.new_empty((outer, inner), dtype=x.dtype if same else wide)
    return da, dx, dh0


def recurrence_gradients(written, a, h0):
    grads = []
    for grad, tensor in zip(written, (a, None, h0), strict=True):
        if grad is not None:
            if tensor is not None and grad.shape != tensor.shape:
                grad = grad.sum_to_size(tensor.shape)
            if tensor is not None and grad.dtype != tensor.dtype:
                grad = grad.to(tensor.dtype)
            grads.append(grad)
    return grads


def recurrence_backward(dh, a, x, h0, h, log_space, reverse, wanted):
    written = da, dx, dh0 = empty_recurrence_gradients(a, x, h0, wanted)
    _C.recurrence_backward(
        parts(a.expand(x.shape)), None if h0 is None else parts(h0.expand(x.shape[:2])), parts(h),
        parts(dh), parts(da), parts(dx), parts(dh0), log_space, reverse, x.is_complex(),
        *on_device(x),
    )  # fmt: skip
    return recurrence_gradients(written, a, h0)


# --- Causal convolution ---------------------------------------------------------------------------


def empty_conv(x, weight, cu_seqlens, want_final):
    batch, dim, _ = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = (sequences, dim, weight.shape[1] - 1) if want_final else (0,)
    return empty_like(x), x.new_empty(final)


def check_seq_idx(seq_idx):
    """Apart from padding, sequences follow each other. On a device nobody waits to see it."""
    if seq_idx.is_cuda:
        return
    if seq_idx.numel() and ((seq_idx >= 0) & (seq_idx < seq_idx.cummax(1).values)).any():
        raise ValueError(
            "[causal_conv1d] seq_idx descends, expected entries that rise along a row, "
            "or negative ones for padding"
        )


def conv_forward(x, weight, bias, initial, seq_idx, cu_seqlens, silu, want_final):
    if seq_idx is not None:
        check_seq_idx(seq_idx)
    out, final = empty_conv(x, weight, cu_seqlens, want_final)
    _C.causal_conv_forward(
        x, weight, bias, initial, seq_idx, cu_seqlens, silu, out, final if want_final else None,
        *on_device(x),
    )  # fmt: skip
    return out, final


def empty_conv_gradients(x, weight, bias, initial, wanted):
    wide = accumulator(x.dtype)
    want_x, want_weight, want_bias, want_initial = wanted
    return (
        empty_like(x) if want_x else None,
        weight.new_empty(weight.shape, dtype=wide) if want_weight else None,
        bias.new_empty(bias.shape, dtype=wide) if want_bias else None,
        _contiguous(initial) if want_initial else None,
    )


def conv_gradients(written, weight, bias):
    dx, dweight, dbias, dinitial = written
    dweight = None if dweight is None else dweight.to(weight.dtype)
    dbias = None if dbias is None else dbias.to(bias.dtype)
    return [grad for grad in (dx, dweight, dbias, dinitial) if grad is not None]


def conv_backward(
    d_out, d_final, x, weight, bias, initial, seq_idx, cu_seqlens, silu, wanted
):  # fmt: skip
    written = empty_conv_gradients(x, weight, bias, initial, wanted)
    _C.causal_conv_backward(
        d_out, d_final, x, weight, bias, initial, seq_idx, cu_seqlens, silu, *written,
        *on_device(x, _C.causal_conv_backward_scratch, *x.shape, weight.shape[1]),
    )  # fmt: skip
    return conv_gradients(written, weight, bias)


def conv_update(x, state, weight, bias, silu, rows, positions):
    out = torch.empty_like(x)
    _C.causal_conv_update(x, state, weight, bias, silu, rows, positions, out, *on_device(x))
    torch.autograd.graph.increment_version(state)
    return out
