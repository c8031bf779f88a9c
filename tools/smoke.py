# SPDX-License-Identifier: Apache-2.0
"""What an installed wheel must do beside numpy alone: import, search, save and load; and, with CUDA
kernels but no device, say so."""

import sys
import tempfile
from pathlib import Path

import numpy as np

import pentad
from pentad import _C
from pentad.hamming import BinaryIndex
from pentad.pq import ScalarIndex
from pentad.sparse import SparseIndex

assert not {"torch", "sklearn", "rich"} & set(sys.modules), "an optional package was imported"
vectors = np.random.default_rng(0).standard_normal((500, 100)).astype(np.float32)
binary = BinaryIndex(100, store="int8")
binary.add(vectors)
assert (binary.search(vectors, 1, rescore="store").ids[:, 0] == np.arange(500)).all()
scalar = ScalarIndex(100)
scalar.add(vectors)
assert (scalar.search(vectors, 1).ids[:, 0] == np.arange(500)).all()
words = SparseIndex(100)
words.add((np.arange(101), np.arange(100), np.ones(100, np.float32)))
with tempfile.TemporaryDirectory() as folder:
    for index, asked in ((binary, vectors), (scalar, vectors), (words, words.reconstruct([7, 3]))):
        index.save(Path(folder, "index"))
        loaded = type(index).load(Path(folder, "index"), mmap=False)
        assert (loaded.search(asked, 3).ids == index.search(asked, 3).ids).all()
if _C.cuda_built() and not _C.cuda_devices():
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from device_array import DeviceArray

    codes, out = DeviceArray(np.zeros((2, 8), np.uint8)), DeviceArray(np.zeros((2, 2), np.int32))
    scratch = DeviceArray(np.zeros(_C.hamming_distance_scratch(2, 2), np.uint8))
    try:
        _C.hamming_distance(codes, codes, "hamming", out, scratch)
    except pentad.DeviceError as error:
        print("CUDA kernels are built in, and without a device refuse:", error)
    else:
        raise AssertionError("a CUDA kernel ran without a device")
print("imports, searches, saves and loads beside numpy alone:", pentad.__version__, pentad.isa())
