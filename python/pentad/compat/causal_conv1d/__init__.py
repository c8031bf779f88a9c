# SPDX-License-Identifier: Apache-2.0
"""causal_conv1d's interface on pentad's kernels, see `causal_conv1d_interface`.

`__version__` is that of the interface.
"""

from pentad.compat.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)
from pentad.compat.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states

__version__ = "1.7.0+pentad"

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
]
