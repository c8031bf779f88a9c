# SPDX-License-Identifier: Apache-2.0
"""pentad.sparse against pyseismic-lsr, bmp, bm25s, scipy and torch.

    pentad bench sparse [--quick] [--only TEXT] [--json FILE]

Vectors are described in `sparse_data`. Exact searches must give the scores and ids of the
definition; pruned ones, tuned to the same recall each on its own, the exact scores of what they
find.

How the peers are used, where it is not obvious:

- scipy and sentence-transformers' way (torch.mm of two sparse matrices, made dense) have no index:
  the documents are transposed, or made a tensor, before the time starts. scipy has one thread.
- bmp keeps bytes and takes one query at a time in one thread, so that it is compared on whole
  numbers, on which it is exact but for some of a thousand results.
- pyseismic-lsr keeps float16 values and prunes its lists to 3,500 postings by default; it has no
  exact search. With 20,000 it finds 0.95 of SPLADE's ten best; of drawn documents it keeps 1,000,
  as it would else take a quarter of an hour to build them. Its threads are rayon's.
- bm25s compiles itself before the time starts.

"cores" are the CPU seconds of a search over its wall seconds; "bytes/posting" the bytes of an
index, the documents that it rescores with among them, over the non-zeros of the documents: of the
file that it is saved to, and of pyseismic-lsr what it says that it holds in memory.
"""

from __future__ import annotations

import warnings

from . import sparse_search, sparse_training
from .harness import Family

PACKAGES = ("torch", "scipy", "pyseismic-lsr", "bmp", "bm25s", "numba")

CASES = [*sparse_search.CASES, *sparse_training.CASES]

# torch says so of every product of sparse matrices.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

FAMILY = Family("sparse", [*CASES, *sparse_training.MEMORY], PACKAGES, rounds=5, budget=4.0)
