# SPDX-License-Identifier: Apache-2.0
"""What an installed wheel must do beside numpy alone: import, and search each kind of index."""

import sys

import numpy as np

import pentad
from pentad.hamming import BinaryIndex
from pentad.pq import ScalarIndex

assert not {"torch", "sklearn", "rich"} & set(sys.modules), "an optional package was imported"
vectors = np.random.default_rng(0).standard_normal((500, 100)).astype(np.float32)
binary = BinaryIndex(100, store="int8")
binary.add(vectors)
assert (binary.search(vectors, 1, rescore="store").ids[:, 0] == np.arange(500)).all()
scalar = ScalarIndex(100)
scalar.add(vectors)
assert (scalar.search(vectors, 1).ids[:, 0] == np.arange(500)).all()
print("imports and searches beside numpy alone:", pentad.__version__, pentad.isa())
