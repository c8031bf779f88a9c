# SPDX-License-Identifier: Apache-2.0
"""Kimi delta attention: the delta rule with a decay for each key channel (arXiv 2510.26692)."""

from pentad.compat.fla.ops._delta_rule import delta_rule, gate


def chunk_kda(
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
    safe_gate=False,
    lower_bound=None,
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
    g : (B, T, HV, K)
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
        The decay is ``-exp(A_log) softplus(g + dt_bias)``; with `lower_bound` it is
        ``lower_bound sigmoid(exp(A_log) (g + dt_bias))``.
    use_beta_sigmoid_in_kernel : bool
        `beta` has yet to go through the sigmoid; with `allow_neg_eigval` twice that.
    allow_neg_eigval, safe_gate : bool
        `safe_gate` is ignored: every decay is safe.
    lower_bound : float, optional
    state_v_first : bool
        States are (B, HV, V, K).
    cu_seqlens : (S + 1,) int, optional
        Where the packed sequences begin, and the end; B is 1.
    cu_seqlens_cpu : (S + 1,) int, optional
        Ignored.
    cp_context : None
    A_log : (HV,), optional
    dt_bias : (HV K,), optional

    Returns
    -------
    out : (B, T, HV, V)
    final_state : as initial_state, float32; None without `output_final_state`
    """
    if use_gate_in_kernel:
        g = gate("chunk_kda", g, A_log, dt_bias, lower_bound)
    return delta_rule(
        "chunk_kda", q, k, v, beta, g, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens, cp_context=cp_context, **kwargs,
    )  # fmt: skip


def fused_recurrent_kda(
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
    lower_bound=None,
    state_v_first=False,
    cu_seqlens=None,
    A_log=None,
    dt_bias=None,
    **kwargs,
):
    """`chunk_kda`; one step goes to `pentad.scan.delta_rule_update`."""
    return chunk_kda(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound=lower_bound,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias, **kwargs,
    )  # fmt: skip


__all__ = ["chunk_kda", "fused_recurrent_kda"]
