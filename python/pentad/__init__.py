# SPDX-License-Identifier: Apache-2.0
"""Native kernels for the ways a model looks something up, in PyTorch models and as indexes.

Importing this package imports numpy and nothing heavier; the families are loaded when they are
first used, and torch only when a function is given a torch tensor.
"""

import importlib

from pentad._C import (
    __version__,
    cuda_built,
    cuda_devices,
    isa,
    isa_available,
    num_threads,
    thread_runtime,
)
from pentad._C import set_num_threads as _set_num_threads
from pentad._errors import DeviceError, FormatError
from pentad._index import SearchResult

_FAMILIES = ("attention", "hamming", "nn", "pq", "scan", "sparse")


def set_num_threads(n: int) -> None:
    """Set the number of threads that kernels use; where torch is loaded, torch's too.

    Parameters
    ----------
    n : int
        1 to 1024. Before any call: torch's number where torch is loaded, else
        ``PENTAD_NUM_THREADS``, else the processors this process may use.

    Raises
    ------
    ValueError
        If `n` is not between 1 and 1024.
    """
    _set_num_threads(n)


def __getattr__(name):
    if name in _FAMILIES:
        return importlib.import_module(f"pentad.{name}")
    raise AttributeError(f"module 'pentad' has no attribute '{name}'")


def __dir__():
    return sorted([*globals(), *_FAMILIES])


__all__ = [
    "DeviceError",
    "FormatError",
    "SearchResult",
    "__version__",
    "attention",
    "cuda_built",
    "cuda_devices",
    "hamming",
    "isa",
    "isa_available",
    "nn",
    "num_threads",
    "pq",
    "scan",
    "set_num_threads",
    "sparse",
    "thread_runtime",
]
