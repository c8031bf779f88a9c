# SPDX-License-Identifier: Apache-2.0
"""The delta rule, without and with decays, by the modules in which flash-linear-attention has them.

Of each there are two names, which are one function here: in chunks, and one step after another.
Queries and keys are (B, T, H, K), values (B, T, HV, V), HV a multiple of H; states (B, HV, K, V) in
float32, or (B, HV, V, K) with `state_v_first`; with `cu_seqlens` B is 1 and a state belongs to each
sequence. All are differentiable, the final state included. Arguments that choose between kernels
are ignored; what shards a sequence over processes is refused.
"""

from pentad.compat.fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from pentad.compat.fla.ops.gated_delta_rule import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
)
from pentad.compat.fla.ops.kda import chunk_kda, fused_recurrent_kda

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
]
