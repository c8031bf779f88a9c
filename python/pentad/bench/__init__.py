# SPDX-License-Identifier: Apache-2.0
"""The families' benchmarks against their peers: ``pentad bench``.

Each family's module has a `FAMILY`, which `command` runs; `harness` says how things are compared.
"""

FAMILIES = ("attention", "scan", "pq", "sparse", "hamming")
CURVES = "curves"  # all of them against sequence length and number of vectors
