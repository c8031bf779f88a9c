# SPDX-License-Identifier: Apache-2.0
"""Linear recurrences over time: selective scans, linear attention, the delta rule, causal
convolutions, and their one-token steps.

Importing this imports torch.
"""

from pentad.scan import kernels
from pentad.scan.attention_matrix import attention_matrix
from pentad.scan.delta_rule import delta_rule
from pentad.scan.functional import causal_conv1d, linear_recurrence, selective_scan
from pentad.scan.linear_attention import linear_attention
from pentad.scan.long_conv import long_conv
from pentad.scan.matrix_update import delta_rule_update, linear_attention_update
from pentad.scan.scan2d import scan2d, scan2d_wavefront
from pentad.scan.ssd import ssd
from pentad.scan.ssd_attention_matrix import ssd_attention_matrix
from pentad.scan.update import causal_conv1d_update, selective_state_update

__all__ = [
    "attention_matrix",
    "causal_conv1d",
    "causal_conv1d_update",
    "delta_rule",
    "delta_rule_update",
    "kernels",
    "linear_attention",
    "linear_attention_update",
    "linear_recurrence",
    "long_conv",
    "scan2d",
    "scan2d_wavefront",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_attention_matrix",
]
