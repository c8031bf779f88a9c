# SPDX-License-Identifier: Apache-2.0
"""What the delta rules of flash-linear-attention have in common."""

import torch
from torch.nn.functional import softplus

from pentad import scan
from pentad.scan._layers import unit_length


def delta_rule(
    op,
    q,
    k,
    v,
    beta,
    g=None,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    cu_seqlens=None,
    cp_context=None,
    **ignored,
):
    """(out, final state or None), of `pentad.scan.delta_rule` with the logarithmic decay `g`."""
    if cp_context is not None:
        raise ValueError(f"[{op}] cp_context shards a sequence over processes: not supported")
    if ignored.get("head_first"):
        raise ValueError(f"[{op}] head_first is not supported: steps come before heads")
    state_v_first = state_v_first or ignored.get("transpose_state_layout", False)
    if beta is None:
        beta = v.new_ones(v.shape[:3], dtype=torch.promote_types(torch.float32, v.dtype))
    elif use_beta_sigmoid_in_kernel:
        beta = wide(beta).sigmoid() * (2 if allow_neg_eigval else 1)
    if use_qk_l2norm_in_kernel:
        q, k = unit_length(q), unit_length(k)
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    out, state = _delta_rule(
        q, k, v, beta, g, k.shape[-1] ** -0.5 if scale is None else scale, initial_state, cu_seqlens
    )
    if not output_final_state:
        return out, None
    return out, state.transpose(-1, -2).contiguous() if state_v_first else state


def _delta_rule(q, k, v, beta, g, scale, initial_state, cu_seqlens):
    if v.shape[1] != 1 or cu_seqlens is not None:
        return scan.delta_rule(
            q, k, v, beta, decay=g, log_space=True, scale=scale, initial_state=initial_state,
            cu_seqlens=cu_seqlens, return_final_state=True,
        )  # fmt: skip
    if initial_state is None:
        dtype = torch.promote_types(torch.float32, v.dtype)
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=dtype)
    else:
        state = wide(initial_state, copy=True)
    q, k, v, beta = (x.squeeze(1) for x in (q, k, v, beta))
    if g is not None:
        g = g.squeeze(1)
        if g.shape == state.shape[1:3]:  # which might be a decay for each head and key
            g = g.unsqueeze(2).expand(state.shape[:3])
    out = scan.delta_rule_update(state, q, k, v, beta, decay=g, log_space=True, scale=scale)
    return out.unsqueeze(1), state


def gate(op, g, A_log, dt_bias, lower_bound=None):
    """The logarithmic decay of `g` (B, T, HV) or (B, T, HV, K), as the layers compute it."""
    for name, tensor in (("g", g), ("A_log", A_log)):
        if tensor is None:
            raise ValueError(f"[{op}] {name} is None, expected a tensor with use_gate_in_kernel")
    rate, g = wide(A_log).exp().reshape(-1, *(1,) * (g.ndim - 3)), wide(g)
    if dt_bias is not None:
        g = g + wide(dt_bias).reshape(g.shape[2:])
    return -rate * softplus(g) if lower_bound is None else lower_bound * (rate * g).sigmoid()


def wide(x, copy=False):
    return x.to(torch.promote_types(torch.float32, x.dtype), copy=copy)
