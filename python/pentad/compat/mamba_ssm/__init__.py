# SPDX-License-Identifier: Apache-2.0
"""mamba_ssm's functions on pentad's kernels.

For Mamba-1 see `ops.selective_scan_interface`, for Mamba-2 `ops.triton.ssd_combined`, for both
`ops.triton.selective_state_update`.

`__version__` is that of the interface. What belongs to later models is absent, so that programs
which ask for it take their own way without it.
"""

import functools
import sys

from pentad.compat.mamba_ssm.modules.mamba2 import Mamba2
from pentad.compat.mamba_ssm.modules.mamba_simple import Mamba
from pentad.compat.mamba_ssm.ops import selective_scan_interface
from pentad.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from pentad.compat.mamba_ssm.ops.triton import ssd_combined

__version__ = "2.3.2+pentad"

# Whole blocks, which transformers' models call in training alone.
_BLOCKS = {
    "mamba_inner_fn": selective_scan_interface.mamba_inner_fn,
    "mamba_split_conv1d_scan_combined": ssd_combined.mamba_split_conv1d_scan_combined,
}


def _not_supported(function):
    @functools.wraps(function)
    def answer(*args, **kwargs):
        return None

    return answer


_ANSWERS = {name: _not_supported(function) for name, function in _BLOCKS.items()}


def __getattr__(name):
    """`mamba_inner_fn`; and for transformers one whose answer is None, "not supported", for it and
    for `mamba_split_conv1d_scan_combined`.

    Its models call them in training alone, and without the padding mask, for which they have no
    argument; Falcon-Mamba's time step is normalised before its projection except there. On None
    they call the convolution and the scan, which costs nothing here and is the function that they
    evaluate.
    """
    asker = sys._getframe(1).f_globals.get("__name__", "")
    if name in _BLOCKS and asker.split(".")[0] == "transformers":
        return _ANSWERS[name]
    if name == "mamba_inner_fn":
        return _BLOCKS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Mamba", "Mamba2", "mamba_inner_fn", "selective_scan_fn"]
