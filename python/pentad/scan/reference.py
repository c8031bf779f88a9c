# SPDX-License-Identifier: Apache-2.0
"""The definitions of `pentad.scan` in plain PyTorch: loops over time, with every option.

The functions of `pentad.scan` are tested against these, which have the same signatures and which
autograd differentiates. They compute in float32, or in float64 where the inputs are float64: then
they give the values that the others approximate.
"""

import torch
from torch.nn.functional import pad, silu, softplus

from pentad.scan.matrix_reference import (  # noqa: F401
    delta_rule,
    delta_rule_update,
    linear_attention,
    linear_attention_update,
    ssd,
)


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    initial_state=None,
    cu_seqlens=None,
    reverse=False,
    return_last_state=False,
):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t, out = y silu(z)
    (Gu & Dao, arXiv 2312.00752, section 3; complex A: 2 Re(C_t h_t) in place of C_t h_t)."""
    length = u.shape[2]
    B, C = _input_matrix(B, u, A), _input_matrix(C, u, A)

    def scan_piece(begin, end, sequence):
        return _selective_scan(
            *(t[..., begin:end] for t in (u, delta)),
            A,
            *(m[..., begin:end] for m in (B, C)),
            D,
            None if z is None else z[..., begin:end],
            delta_bias,
            delta_softplus,
            None if initial_state is None else initial_state[sequence],
            reverse,
        )

    if cu_seqlens is None:
        out, last = scan_piece(0, length, slice(None))
    else:
        ends = cu_seqlens.tolist()
        pieces = [scan_piece(*ends[s : s + 2], slice(s, s + 1)) for s in range(len(ends) - 1)]
        none, no_state = scan_piece(0, 0, slice(0, 0))
        out = torch.cat([none, *(out for out, _ in pieces)], -1)
        last = torch.cat([no_state[:0], *(last for _, last in pieces)])
    return (out, last) if return_last_state else out


def _selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reverse):
    """One piece of time; B and C are (B, D, N, L)."""
    dtype, wide = u.dtype, _wide(u)
    u, dt, A = u.to(wide), delta.to(wide), A.to(_wide(u, A))
    if delta_bias is not None:
        dt = dt + delta_bias.to(wide)[:, None]
    if delta_softplus:
        dt = softplus(dt)

    h = A.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(A.dtype)
    ys = []
    for dt_t, u_t, B_t, C_t in _steps(dt, u, B, C, reverse=reverse):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t
        y = (C_t * h).sum(-1)
        ys.append(2 * y.real if y.is_complex() else y)
    y = _stack(ys, reverse) if ys else torch.zeros_like(u)

    if D is not None:
        y = y + D.to(wide)[:, None] * u
    if z is not None:
        y = y * silu(z.to(wide))
    return y.to(dtype), h


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
    """One step of `selective_scan` on a cache of states, which is overwritten in place.

    A negative index gives 0 and touches no state. Heads are no more than groups of channels.
    """
    N = state.shape[-1]
    used, rows = _rows(state_batch_indices, x.shape[0])
    if A.is_complex():
        B, C = B.to(A.dtype), C.to(A.dtype)
    x_t, dt_t, z_t = (None if t is None else t.flatten(1)[used][..., None] for t in (x, dt, z))
    B_t, C_t = (m[used][..., None] for m in (B, C))
    y, h = selective_scan(
        x_t,
        dt_t,
        A.reshape(-1, N),
        B_t,
        C_t,
        None if D is None else D.flatten(),
        z_t,
        None if dt_bias is None else dt_bias.flatten(),
        dt_softplus,
        initial_state=state[rows].flatten(1, -2),
        return_last_state=True,
    )
    state.index_copy_(0, rows, h.reshape(len(rows), *state.shape[1:]).to(state.dtype))
    out = torch.zeros_like(x.flatten(1)).index_copy(0, used, y[..., 0])
    return out.reshape(x.shape)


def attention_matrix(
    delta,
    A,
    B,
    C,
    *,
    u=None,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    reverse=False,
    reduce="mean",
):
    """alpha with out[b, d, t] = sum_s alpha[b, d, t, s] u[b, d, s]: column s is the scan of an
    impulse at step s. With `u`, alpha u."""
    dtype, (batch, dim, length) = delta.dtype, delta.shape
    delta = delta.to(_wide(delta))
    columns = []
    for s in range(length):
        impulse = torch.zeros_like(delta)
        impulse[:, :, s] = 1
        columns.append(
            selective_scan(
                impulse, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse=reverse
            )
        )
    alpha = torch.stack(columns, -1) if columns else delta.new_zeros(batch, dim, 0, 0)
    if u is not None:
        alpha = alpha * u[:, :, None]
    if reduce == "mean":
        alpha = alpha.mean(1)
    elif reduce == "sum":
        alpha = alpha.sum(1)
    elif reduce == "abs":
        alpha = alpha.abs().mean(1)
    elif reduce == "norm":
        alpha = torch.linalg.vector_norm(alpha, dim=1)
    return alpha.to(dtype)


def linear_recurrence(a, x, h0=None, *, reverse=False, dim=-1, log_space=False):
    """All h_t = a_t h_{t-1} + x_t along `dim`, where `log_space` gives log a_t."""
    wide = _wide(x)
    a, xs = a.to(wide).broadcast_to(x.shape).movedim(dim, -1), x.to(wide).movedim(dim, -1)
    if log_space:
        a = torch.exp(a)
    h = xs.new_zeros(()) if h0 is None else h0.to(wide)
    hs = []
    for a_t, x_t in _steps(a, xs, reverse=reverse):
        h = a_t * h + x_t
        hs.append(h)
    return _stack(hs, reverse).movedim(-1, dim).to(x.dtype) if hs else x.clone()


def causal_conv1d(
    x,
    weight,
    bias=None,
    *,
    activation=None,
    initial_states=None,
    return_final_states=False,
    seq_idx=None,
    cu_seqlens=None,
):
    """p_t = bias + sum_k weight_k x_{t - (W - 1) + k}, per channel; out = p, or silu(p).

    Before the first step lie `initial_states`, or zeros. With `seq_idx`, a tap counts only where
    it equals that of step t, and a step where it is negative gives 0.
    """
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        pieces = [
            causal_conv1d(
                x[..., ends[s] : ends[s + 1]],
                weight,
                bias,
                activation=activation,
                initial_states=None if initial_states is None else initial_states[s : s + 1],
                return_final_states=True,
            )
            for s in range(len(ends) - 1)
        ]
        out = torch.cat([x[..., :0], *(out for out, _ in pieces)], -1)
        no_state = x.new_zeros(0, *weight.shape[:1], weight.shape[1] - 1)
        final = torch.cat([no_state, *(final for _, final in pieces)])
        return (out, final) if return_final_states else out

    wide, length, before = _wide(x), x.shape[2], weight.shape[1] - 1
    if initial_states is None:
        padded = pad(x, (before, 0))
    else:
        padded = torch.cat([initial_states.to(x.dtype), x], -1)
    p = x.new_zeros(x.shape, dtype=wide)
    if bias is not None:
        p = p + bias.to(wide)[:, None]
    own = None if seq_idx is None else pad(seq_idx, (before, 0), value=-1)
    for k, weight_k in enumerate(weight.to(wide).unbind(1)):
        x_k = padded[..., k : k + length].to(wide)
        if seq_idx is not None:
            counts = (own[:, k : k + length] == seq_idx) & (seq_idx >= 0)
            x_k = x_k.where(counts[:, None], 0)
        p = p + weight_k[:, None] * x_k
    out = p if activation is None else silu(p)
    if seq_idx is not None:
        out = out.where((seq_idx >= 0)[:, None], 0)
    out = out.to(x.dtype)
    return (out, padded[..., length:]) if return_final_states else out


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
    """`causal_conv1d` of x behind the latest inputs, a cache that is overwritten in place.

    The newest input lies last. With `cache_seqlens`, the number of inputs before, the cache is a
    ring: input i lies at i modulo its length. A negative index gives 0 and touches no row.
    """
    steps = x[..., None] if x.ndim == 2 else x
    length, size, before = steps.shape[2], conv_state.shape[2], weight.shape[1] - 1
    used, rows = _rows(conv_state_indices, x.shape[0])
    states = conv_state[rows]
    if cache_seqlens is None:
        places = torch.arange(size).expand(len(rows), size)  # of inputs, oldest first
    else:
        places = (cache_seqlens[used].long()[:, None] + torch.arange(size)) % size
    places = places[:, None].expand(states.shape)
    history = torch.cat([states.gather(2, places), steps[used]], -1)
    y = causal_conv1d(
        history[..., size:],
        weight,
        bias,
        activation=activation,
        initial_states=history[..., size - before : size],
    )
    if cache_seqlens is not None:
        places = (places + length) % size
    conv_state.index_copy_(0, rows, states.scatter(2, places, history[..., length:]))
    return torch.zeros_like(steps).index_copy(0, used, y).reshape(x.shape)


def _wide(*tensors):
    """The dtype to compute in: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _input_matrix(matrix, u, A):
    """B or C as (B, D, N, L), whether constant, varying or varying by groups of channels."""
    batch, dim, length = u.shape
    if matrix.ndim == 2:
        wide = matrix.to(_wide(u, A))
        return wide[..., None].expand(batch, *matrix.shape, length)
    if matrix.ndim == 3:
        matrix = matrix[:, None]
    if A.is_complex() and not matrix.is_complex():  # the parts are interleaved in time
        parts = matrix.to(_wide(matrix)).unflatten(-1, (length, 2))
        matrix = torch.complex(*parts.unbind(-1))
    matrix = matrix.to(_wide(u, matrix))
    return matrix.repeat_interleave(dim // matrix.shape[1], 1)


def _steps(*tensors, reverse):
    """The tensors' last dimensions in step, as the scan runs."""
    steps = list(zip(*(t.unbind(-1) for t in tensors), strict=True))
    return steps[::-1] if reverse else steps


def _stack(steps, reverse):
    return torch.stack(steps[::-1] if reverse else steps, -1)


def _rows(indices, batch):
    """Which batch elements are not padding, and the rows of the cache that they have."""
    if indices is None:
        return torch.arange(batch), torch.arange(batch)
    used = torch.nonzero(indices >= 0)[:, 0]
    return used, indices[used].long()
