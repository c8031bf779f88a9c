# SPDX-License-Identifier: Apache-2.0
"""mamba_ssm's functions for Mamba-1 on pentad's kernels, see `ops.selective_scan_interface`.

`__version__` is that of the interface. What belongs to later models is absent, so that programs
which ask for it take their own way without it.
"""

import functools
import sys

from pentad.compat.mamba_ssm.modules.mamba_simple import Mamba
from pentad.compat.mamba_ssm.ops import selective_scan_interface
from pentad.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn

__version__ = "2.3.2+pentad"


@functools.wraps(selective_scan_interface.mamba_inner_fn)
def _not_supported(*args, **kwargs):
    return None


def __getattr__(name):
    """`mamba_inner_fn`, and for transformers one whose answer is None: "not supported".

    Its models call it in training alone, and without the padding mask and the bounds of packed
    sequences, for which it has no arguments; Falcon-Mamba's time step is normalised before its
    projection except there. On None they call the convolution and the scan, which costs nothing
    here and is the function that they evaluate.
    """
    if name != "mamba_inner_fn":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    asker = sys._getframe(1).f_globals.get("__name__", "")
    if asker.split(".")[0] == "transformers":
        return _not_supported
    return selective_scan_interface.mamba_inner_fn


__all__ = ["Mamba", "mamba_inner_fn", "selective_scan_fn"]
