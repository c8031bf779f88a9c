# SPDX-License-Identifier: Apache-2.0
"""The kinds of index that passages can be kept in, by name.

Those of vectors hold them as int8 too, by which candidates are scored again. Over 63,000 passages
of 512 numbers, recall@10 with nothing rescored, and with 4 and 20 candidates for each answer:

    binary   64 bytes a passage   0.75   0.96   0.99
    pq       64                   0.83   0.99   1.00
    scalar  256                   0.97   1.00   1.00
    rabitq   64                   0.83   0.99   1.00

"binary" and "pq" find ten of them in a quarter of a millisecond; the others turn the question
first, which takes as long again. Only "pq" is trained, which takes half a second.

"sparse" holds words instead and needs no encoder: it ranks by BM25, exactly. "hybrid" holds words
beside the vectors of "binary" and merges both rankings. Mean reciprocal rank of the first right
answer and the share of questions with one among the first three, 38 to 67,000 passages:

    binary   0.46   61 %      sparse   0.52   66 %      hybrid   0.52   71 %

Words are found in an eighth of a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..hamming import BinaryIndex
from .passages import Progress

# What candidates may be scored with again: the argument `by` of the index, None for nothing.
STORE = {"store": "store", "none": None}


def _binary(vectors: np.ndarray, progress: Progress | None):
    return BinaryIndex(vectors.shape[1], store="int8")


def _pq(vectors: np.ndarray, progress: Progress | None):
    """As many bytes as "binary": 4 bits for every 4 dimensions."""
    from ..pq import PQIndex

    if len(vectors) < 16:
        raise ValueError(f"an index of kind 'pq' needs 16 passages or more, got {len(vectors)}")
    index = PQIndex(vectors.shape[1], vectors.shape[1] // 4, 4, metric="ip", store="int8")
    index.train(vectors, progress=progress)
    return index


def _scalar(vectors: np.ndarray, progress: Progress | None):
    from ..pq import ScalarIndex

    return ScalarIndex(vectors.shape[1], 4, metric="ip", store="int8")


def _rabitq(vectors: np.ndarray, progress: Progress | None):
    from ..pq import RaBitQIndex

    return RaBitQIndex(vectors.shape[1], metric="ip", store="int8")


# Kinds of vectors; "hybrid" makes that part of it which is.
_MAKE: dict[str, Callable[[np.ndarray, Progress | None], Any]] = {
    "binary": _binary,
    "pq": _pq,
    "scalar": _scalar,
    "rabitq": _rabitq,
    "hybrid": _binary,
}
INDEXES = ("binary", "pq", "scalar", "rabitq", "sparse", "hybrid")


def check(kind: str) -> None:
    """Raise ValueError for an unknown kind."""
    if kind not in INDEXES:
        raise ValueError(f"index must be one of {', '.join(INDEXES)}, got {kind!r}")


def has_vectors(kind: str) -> bool:
    return kind != "sparse"


def has_words(kind: str) -> bool:
    return kind in ("sparse", "hybrid")


def make(kind: str, vectors: np.ndarray, progress: Progress | None = None):
    """An index of that kind, one that has vectors, which holds these, float32 (n, dim)."""
    index = _MAKE[kind](vectors, progress)
    index.add(vectors)
    return index


def from_sections(kind: str, meta: dict, arrays: dict):
    """The index of that kind that a file embeds; KeyError for an unknown kind."""
    if kind in ("binary", "hybrid"):
        return BinaryIndex.from_sections(meta, arrays)
    from .. import pq

    names = {"pq": pq.PQIndex, "scalar": pq.ScalarIndex, "rabitq": pq.RaBitQIndex}
    return names[kind].from_sections(meta, arrays)


def modes(kind: str) -> dict[str, str | None]:
    """What the candidates of that kind may be scored with again."""
    if kind == "sparse":  # whose scores are exact as they are
        return {"store": None, "none": None}
    if kind in ("binary", "hybrid"):
        return {"store": "store", "bits": "bits", "none": None}
    return STORE
