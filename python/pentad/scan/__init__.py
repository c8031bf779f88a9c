# SPDX-License-Identifier: Apache-2.0
"""Linear recurrences over time: selective scans, causal convolutions, and their one-token steps.

Importing this imports torch.
"""

from pentad.scan.attention_matrix import attention_matrix
from pentad.scan.functional import causal_conv1d, linear_recurrence, selective_scan
from pentad.scan.update import causal_conv1d_update, selective_state_update

__all__ = [
    "attention_matrix",
    "causal_conv1d",
    "causal_conv1d_update",
    "linear_recurrence",
    "selective_scan",
    "selective_state_update",
]
