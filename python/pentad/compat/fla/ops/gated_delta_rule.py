# SPDX-License-Identifier: Apache-2.0
"""The delta rule with a decay for each head and step (arXiv 2412.06464)."""

from pentad.compat.fla.ops._delta_rule import delta_rule, gate, wide


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    cp_context=None,
    A_log=None,
    dt_bias=None,
    **kwargs,
):
    """`pentad.scan.delta_rule` with ``decay=g, log_space=True``.

    Parameters
    ----------
    q, k : (B, T, H, K)
    v : (B, T, HV, V)
    g : (B, T, HV)
        The logarithm of the decay.
    beta : (B, T, HV)
    scale : float, optional
        Of the queries, K ** -0.5 by default.
    initial_state : (B, HV, K, V), optional
        With `cu_seqlens` (S, HV, K, V).
    output_final_state : bool
    use_qk_l2norm_in_kernel : bool
        Divide queries and keys by their lengths.
    use_gate_in_kernel : bool
        The decay is ``-exp(A_log) softplus(g + dt_bias)``.
    use_beta_sigmoid_in_kernel : bool
        `beta` has yet to go through the sigmoid; with `allow_neg_eigval` twice that.
    allow_neg_eigval : bool
    state_v_first : bool
        States are (B, HV, V, K).
    cu_seqlens : (S + 1,) int, optional
        Where the packed sequences begin, and the end; B is 1.
    cu_seqlens_cpu : (S + 1,) int, optional
        Ignored.
    cp_context : None
    A_log, dt_bias : (HV,), optional

    Returns
    -------
    out : (B, T, HV, V)
    final_state : as initial_state, float32; None without `output_final_state`
    """
    if use_gate_in_kernel:
        g = gate("chunk_gated_delta_rule", g, A_log, dt_bias)
    return delta_rule(
        "chunk_gated_delta_rule", q, k, v, beta, g, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens, cp_context=cp_context, **kwargs,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q,
    k,
    v,
    g=None,
    gk=None,
    gv=None,
    beta=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    cu_seqlens=None,
    A_log=None,
    dt_bias=None,
    **kwargs,
):
    """`chunk_gated_delta_rule`, with further decays; one step goes to `delta_rule_update`.

    Parameters
    ----------
    gk : (B, T, HV, K), optional
        The logarithm of a decay for each key channel, beside `g`, which may be absent.
    gv : None
        A decay for each value channel is not supported.
    beta : (B, T, HV), optional
        1 by default.
    """
    if gv is not None:
        raise ValueError(
            "[fused_recurrent_gated_delta_rule] gv: a decay per value is not supported"
        )
    if use_gate_in_kernel:
        g = gate("fused_recurrent_gated_delta_rule", g, A_log, dt_bias)
    if gk is not None:
        g = gk if g is None else wide(gk) + wide(g).unsqueeze(-1)
    return delta_rule(
        "fused_recurrent_gated_delta_rule", q, k, v, beta, g, scale=scale,
        initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens, **kwargs,
    )  # fmt: skip


__all__ = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]
