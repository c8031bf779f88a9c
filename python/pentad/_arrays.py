# SPDX-License-Identifier: Apache-2.0
"""The little that functions need to treat numpy arrays and torch tensors alike, without torch."""

import functools
import math

import numpy as np

from pentad import _C
from pentad._errors import DeviceError


def is_numpy(op: str, *, optional=(), any_device=False, cuda=False, traced=True, **arrays) -> bool:
    """Whether the named arguments are numpy arrays (True) or torch tensors (False), never both.

    Those named in `optional` may be None. Raises TypeError for anything else, DeviceError for
    tensors on different devices or, unless `any_device`, on one that no kernel serves (`cuda`:
    there are CUDA kernels). Where `traced` is False, tensors without values ("meta") are refused.
    """
    kinds = {}
    for name, array in arrays.items():
        if array is None and name in optional:
            continue
        if isinstance(array, np.ndarray):
            kinds[name] = "numpy"
        elif hasattr(array, "__torch_function__") and hasattr(array, "device"):
            kind = array.device.type
            kinds[name] = str(array.device) if cuda and kind == "cuda" else kind
        else:
            raise TypeError(
                f"[{op}] {name} is {type(array).__name__}, expected a torch tensor or numpy array"
            )
    found = set(kinds.values())
    if len(found) > 1:
        if "numpy" in found:
            raise TypeError(f"[{op}] arguments mix numpy arrays and torch tensors: {kinds}")
        raise DeviceError(f"[{op}] arguments are on different devices: {kinds}")
    kind = found.pop()
    if cuda and kind.startswith("cuda"):
        if not _C.cuda_built():
            raise DeviceError(f"[{op}] this build of pentad has no CUDA kernels, only CPU ones")
        return False
    if kind not in (("numpy", "cpu", "meta") if traced else ("numpy", "cpu")) and not any_device:
        raise DeviceError(f"[{op}] there is no {kind} kernel for this operation, only a CPU one")
    return kind == "numpy"


def dtype_name(array) -> str:
    """'float32', for either kind."""
    if isinstance(array, np.ndarray):
        return _numpy_name(array.dtype)
    return str(array.dtype).removeprefix("torch.")


@functools.cache  # numpy takes 7 us to put a name together, a fifth of a small search
def _numpy_name(dtype) -> str:
    return str(dtype)


def empty_like(array, shape, dtype: str):
    """Uninitialised memory of `array`'s kind and device."""
    if isinstance(array, np.ndarray):
        return np.empty(shape, dtype=dtype)
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device=array.device)


def runs_cuda(array) -> bool:
    """Whether CUDA kernels are to run on `array`: those of its device, or in the build that tests
    them on the CPU."""
    return _C.cuda_on_host or (not isinstance(array, np.ndarray) and array.is_cuda)


def on_device(array, scratch=None, *sizes) -> tuple:
    """What a CUDA kernel takes on top where one is to run on `array`; nothing for the CPU's.

    That is scratch memory of ``scratch(*sizes)`` bytes, if the kernel wants any, and the current
    stream as a number. The memory may be reused at once: what comes next on the stream waits.
    """
    if not runs_cuda(array):
        return ()
    stream = 0
    if not isinstance(array, np.ndarray) and array.is_cuda:
        import torch

        stream = torch.cuda.current_stream(array.device).cuda_stream
    if scratch is None:
        return (stream,)
    return empty_like(array, (scratch(*sizes),), "uint8"), stream


def aligned_zeros(shape, dtype) -> np.ndarray:
    """Zeros on a 64-byte boundary, so that a register's worth never straddles two cache lines."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def to_numpy(array, op: str = "") -> np.ndarray:
    """A numpy view of a CPU tensor, or the array itself; bfloat16, unknown to numpy, is widened."""
    if isinstance(array, np.ndarray):
        return array
    if array.device.type != "cpu":
        where = f"[{op}] " if op else ""
        raise DeviceError(f"{where}expected a CPU tensor, but it is on {array.device}")
    array = array.detach()
    return (array.float() if dtype_name(array) == "bfloat16" else array).resolve_neg().numpy()


def like(array, result: np.ndarray):
    """`result` as the kind of `array`."""
    if isinstance(array, np.ndarray):
        return result
    import torch

    return torch.from_numpy(result)
