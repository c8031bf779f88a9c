# SPDX-License-Identifier: Apache-2.0
"""Arrays that say they are on a CUDA device, for the checks of the extension on any machine."""

import ctypes

import numpy as np

_CODES = {"u": 1, "i": 0, "f": 2}


class _Tensor(ctypes.Structure):
    """DLManagedTensor, with its DLTensor spelled out."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class DeviceArray:
    """The memory of a contiguous numpy array, under the name of a device."""

    def __init__(self, array, device=0):
        self.array = np.ascontiguousarray(array)
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.tensor = _Tensor(
            data=self.array.ctypes.data,
            device_type=2,
            device_id=device,
            ndim=array.ndim,
            code=_CODES[array.dtype.kind],
            bits=array.dtype.itemsize * 8,
            lanes=1,
            shape=self.shape,
        )

    def __dlpack__(self):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return new(ctypes.addressof(self.tensor), b"dltensor", None)
