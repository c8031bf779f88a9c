# SPDX-License-Identifier: Apache-2.0
"""The delta rule (arXiv 2406.06484)."""

from pentad.compat.fla.ops._delta_rule import delta_rule


def chunk_delta_rule(
    q,
    k,
    v,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    **kwargs,
):
    """`pentad.scan.delta_rule`.

    Parameters
    ----------
    q, k : (B, T, H, K)
    v : (B, T, H, V)
    beta : (B, T, H)
    scale : float, optional
        Of the queries, K ** -0.5 by default.
    initial_state : (B, H, K, V), optional
        With `cu_seqlens` (S, H, K, V).
    output_final_state : bool
    use_qk_l2norm_in_kernel : bool
        Divide queries and keys by their lengths.
    cu_seqlens : (S + 1,) int, optional
        Where the packed sequences begin, and the end; B is 1.

    Returns
    -------
    out : (B, T, H, V)
    final_state : (B, H, K, V) float32; None without `output_final_state`
    """
    return delta_rule(
        "chunk_delta_rule", q, k, v, beta, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens, **kwargs,
    )  # fmt: skip


def fused_recurrent_delta_rule(
    q,
    k,
    v,
    beta=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    **kwargs,
):
    """`chunk_delta_rule`; `beta` is 1 by default."""
    return delta_rule(
        "fused_recurrent_delta_rule", q, k, v, beta, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens, **kwargs,
    )  # fmt: skip


__all__ = ["chunk_delta_rule", "fused_recurrent_delta_rule"]
