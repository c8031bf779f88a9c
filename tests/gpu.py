# SPDX-License-Identifier: Apache-2.0
"""What tests of CUDA kernels share: whether there is a device, and ways to it and back."""

import numpy as np
import pytest

import pentad

try:
    import torch

    DEVICES = torch.cuda.device_count()
except ImportError:
    DEVICES = 0

if not pentad._C.cuda_built():
    _missing = "this build of pentad has no CUDA kernels"
elif not DEVICES:
    _missing = "torch sees no CUDA device"
else:
    _missing = ""
needs_gpu = pytest.mark.skipif(bool(_missing), reason=_missing)


def on_gpu(array, device=0):
    """A tensor on the device with the strides of `array`, as far as torch has them."""
    if array is None:
        return None
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        return torch.from_numpy(np.ascontiguousarray(array)).to(f"cuda:{device}")
    here = torch.from_numpy(array)
    device = f"cuda:{device}"
    there = torch.empty_strided(here.shape, here.stride(), dtype=here.dtype, device=device)
    return there.copy_(here)


def to_numpy(result):
    if isinstance(result, tuple):
        return tuple(to_numpy(r) for r in result)
    return result.cpu().numpy()
