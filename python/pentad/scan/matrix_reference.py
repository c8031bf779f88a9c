# SPDX-License-Identifier: Apache-2.0
"""The definitions of the recurrences whose state is a matrix, in plain PyTorch: loops over time.

All are one recurrence, of a state S of keys times values for each sequence and head:

    S_t = a_t S_{t-1} + k_t u_t^T      u_t = w_t v_t, or w_t (v_t - (a_t S_{t-1})^T k_t): delta rule
    y_t = S_t^T q_t                    a_t: a number, or one for each key

The functions of `pentad.scan` are tested against these, which have the same signatures and which
autograd differentiates. They compute in float32, or in float64 where the inputs are float64: then
they give the values that the others approximate.
"""

import itertools

import torch
from torch.nn.functional import elu, silu, softplus
from torch.nn.functional import normalize as unit_length

EPSILON = 1e-6  # beside the normaliser


def ssd(
    x,
    dt,
    A,
    B,
    C,
    *,
    chunk_size=None,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    return_final_states=False,
    causal=True,
    reverse=False,
):
    """S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, out_t = (S_t^T C_t + D x_t) silu(z_t)
    (Mamba-2: Dao & Gu, arXiv 2405.21060, equation 1 and section 3).

    With `seq_idx` a step forgets the past where it belongs to another sequence than the step before
    it. Not causal: out_t = (sum_s dt_s A x_s B_s^T) C_t + D x_t (VSSD: Shi et al., arXiv
    2407.18559, section 3.2, with the weight dt A of its code).
    """
    wide = _wide(x)
    x_, dt, A, B, C = (t.to(wide) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    if dt_softplus:
        dt = softplus(dt)
    dt = dt.clamp(*dt_limit)
    states = None if initial_states is None else initial_states.transpose(-1, -2)
    if causal:
        a = torch.exp(dt * A)
        if seq_idx is not None:
            a = a.where(~_begins(seq_idx, reverse)[..., None], 0)
        y, last = _scan(C, B, x_, a, dt, states, cu_seqlens, reverse=reverse)
    else:
        last = _sum(B, x_ * (dt * A)[..., None], states)
        y = _read_all(last, C)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).to(wide) * x_
    if z is not None:
        y = y * silu(z.to(wide))
    out = y.to(x.dtype)
    return (out, last.transpose(-1, -2)) if return_final_states else out


def linear_attention(
    q,
    k,
    v,
    *,
    decay=None,
    log_space=False,
    normalize=False,
    feature_map=None,
    scale=1.0,
    initial_state=None,
    causal=True,
    reverse=False,
    prefix_k=None,
    prefix_v=None,
    cu_seqlens=None,
    return_final_state=False,
):
    """S_t = decay_t S_{t-1} + phi(k_t) v_t^T, out_t = scale S_t^T phi(q_t)
    (Katharopoulos et al., arXiv 2006.16236, equations 16 to 20; with a decay per head RetNet, Sun
    et al., arXiv 2307.08621, equation 6; per key GLA, Yang et al., arXiv 2312.06635, section 4).

    With `normalize`, out_t is divided by z_t . phi(q_t), where z_t is the state that belongs to
    values of 1, kept as its last column. Not causal: every query sees the last state. The prefix is
    part of the state before the first step (JRT: Arora et al., arXiv 2407.05483, section 4).
    """
    wide = _wide(v)
    phi = _feature_map(feature_map)
    state = None if initial_state is None else initial_state.to(wide)
    q_, k_, v_ = phi(q.to(wide)), phi(k.to(wide)), v.to(wide)
    v_ = _with_ones(v_) if normalize else v_
    if prefix_k is not None:
        prefix_v_ = prefix_v.to(wide)
        prefix_v_ = _with_ones(prefix_v_) if normalize else prefix_v_
        state = _sum(phi(prefix_k.to(wide)), prefix_v_, state)
    if causal:
        a = _decays(decay, log_space, v_)
        y, last = _scan(q_, k_, v_, a, None, state, cu_seqlens, reverse=reverse)
    else:
        last = _sum(k_, v_, state)
        y = _read_all(last, q_)
    if normalize:
        y = y[..., :-1] / (y[..., -1:] + EPSILON)
    out = (scale * y).to(v.dtype)
    return (out, last) if return_final_state else out


def delta_rule(
    q,
    k,
    v,
    beta,
    *,
    decay=None,
    log_space=False,
    scale=1.0,
    initial_state=None,
    reverse=False,
    cu_seqlens=None,
    return_final_state=False,
):
    """S_t = (I - beta_t k_t k_t^T) decay_t S_{t-1} + beta_t k_t v_t^T, out_t = scale S_t^T q_t
    (DeltaNet: Yang et al., arXiv 2406.06484, section 2.2; with decays Gated DeltaNet: Yang et al.,
    arXiv 2412.06464, equation 10)."""
    wide = _wide(v)
    q_, k_, v_, beta = (t.to(wide) for t in (q, k, v, beta))
    a = _decays(decay, log_space, v_)
    y, last = _scan(q_, k_, v_, a, beta, initial_state, cu_seqlens, delta=True, reverse=reverse)
    out = (scale * y).to(v.dtype)
    return (out, last) if return_final_state else out


def linear_attention_update(
    state,
    q,
    k,
    v,
    *,
    decay=None,
    log_space=False,
    normalize=False,
    feature_map=None,
    scale=1.0,
    state_batch_indices=None,
):
    """One step of `linear_attention` on a cache of states, which is overwritten in place.

    A negative index gives 0 and touches no state.
    """
    options = {"normalize": normalize, "feature_map": feature_map}
    return _update(
        linear_attention, state, (q, k, v), decay, state_batch_indices,
        log_space=log_space, scale=scale, **options,
    )  # fmt: skip


def delta_rule_update(
    state,
    q,
    k,
    v,
    beta,
    *,
    decay=None,
    log_space=False,
    scale=1.0,
    state_batch_indices=None,
):
    """One step of `delta_rule` on a cache of states, as `linear_attention_update`."""
    return _update(
        delta_rule, state, (q, k, v, beta), decay, state_batch_indices,
        log_space=log_space, scale=scale,
    )  # fmt: skip


# --- The recurrence -------------------------------------------------------------------------------


def _scan(q, k, v, a, w, state, cu_seqlens, *, delta=False, reverse=False):
    """All y_t, and the last states; q, k (B, L, G, N), v (B, L, H, P), a (B, L, H, N or 1)."""
    q, k = (_per_head(t, v.shape[2]) for t in (q, k))
    a = v.new_ones(*v.shape[:3], 1) if a is None else a
    a = a[..., None] if a.ndim == 3 else a
    w = v.new_ones(v.shape[:3]) if w is None else w
    varying = (q, k, v, a, w[..., None])
    if state is None:
        sequences = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
        state = v.new_zeros(sequences, v.shape[2], k.shape[3], v.shape[3])
    state = state.to(v.dtype)
    if cu_seqlens is None:
        return _scan_piece(*varying, state, delta, reverse)
    ys, lasts = [v[:, :0]], [state[:0]]
    for s, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        piece = (t[:, begin:end] for t in varying)
        y, last = _scan_piece(*piece, state[s : s + 1], delta, reverse)
        ys.append(y)
        lasts.append(last)
    return torch.cat(ys, 1), torch.cat(lasts)


def _scan_piece(q, k, v, a, w, S, delta, reverse):
    ys = []
    steps = list(zip(*(t.unbind(1) for t in (q, k, v, a, w)), strict=True))
    for q_t, k_t, v_t, a_t, w_t in reversed(steps) if reverse else steps:
        S = a_t[..., None] * S
        u_t = v_t - _read(S, k_t) if delta else v_t
        S = S + k_t[..., :, None] * (w_t * u_t)[..., None, :]
        ys.append(_read(S, q_t))
    if reverse:
        ys.reverse()
    return (torch.stack(ys, 1) if ys else v), S


def _read(S, k):
    """S^T k."""
    return (k[..., :, None] * S).sum(-2)


def _sum(k, v, state):
    """S = state + sum_s k_s v_s^T."""
    S = torch.einsum("blhn,blhp->bhnp", _per_head(k, v.shape[2]), v)
    return S if state is None else state.to(v.dtype) + S


def _read_all(S, q):
    """S^T q_t for all t."""
    return torch.einsum("blhn,bhnp->blhp", _per_head(q, S.shape[1]), S)


# --- Arguments ------------------------------------------------------------------------------------


def _wide(tensor):
    return torch.promote_types(torch.float32, tensor.dtype)


def _per_head(tensor, heads):
    """Head h has group h // (H // G)."""
    return tensor.repeat_interleave(heads // tensor.shape[2], 2)


def _with_ones(v):
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def _begins(seq_idx, reverse):
    """Where a step does not continue the one that the scan came from."""
    differs = seq_idx[:, 1:] != seq_idx[:, :-1]
    first = torch.zeros_like(seq_idx[:, :1], dtype=torch.bool)
    return torch.cat([differs, first] if reverse else [first, differs], 1)


def _decays(decay, log_space, v):
    """(H,), (H, N), (B, L, H) or (B, L, H, N) as one of the last two."""
    if decay is None:
        return None
    decay = torch.exp(decay.to(v.dtype)) if log_space else decay.to(v.dtype)
    return decay if decay.ndim > 2 else decay.expand(*v.shape[:2], *decay.shape)


def _feature_map(name):
    if name is None:
        return lambda x: x
    if callable(name):
        return name
    return {"elu": lambda x: elu(x) + 1, "relu": torch.relu, "cosine": _cosine, "taylor": _taylor}[
        name
    ]


def _cosine(x):
    """(Cottention: Mongaras et al., arXiv 2409.18747, equation 4)."""
    return unit_length(x, dim=-1)


def _taylor(x):
    """phi(q) . phi(k) = 1 + u + u^2 / 2 with u = q . k / sqrt(N)
    (Based: Arora et al., arXiv 2402.18668, section 3)."""
    x = x / x.shape[-1] ** 0.25
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs / 2**0.5], -1)


def _update(function, state, inputs, decay, indices, **options):
    """`function` over one step; a decay is (H,), (H, N), (B, H) or (B, H, N)."""
    batch = len(inputs[0])
    used = torch.arange(batch) if indices is None else torch.nonzero(indices >= 0)[:, 0]
    rows = used if indices is None else indices[used].long()
    if decay is not None and decay.ndim > 1 and decay.shape != state.shape[1:3]:
        decay = decay[used][:, None]
    out, last = function(
        *(t[used][:, None] for t in inputs),
        decay=decay,
        initial_state=state[rows],
        return_final_state=True,
        **options,
    )
    state.index_copy_(0, rows, last.to(state.dtype))
    return torch.zeros_like(inputs[2]).index_copy(0, used, out[:, 0])
