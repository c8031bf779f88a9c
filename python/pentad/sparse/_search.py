# SPDX-License-Identifier: Apache-2.0
"""The native search of sparse documents: numpy arrays in, numpy arrays out.

Names, arguments and results are those of the definition in `pentad.sparse.search_reference`; the
mathematics, layout and method stand in ``csrc/sparse/postings.h`` and ``search.h``.
"""

import numpy as np

from pentad import _C
from pentad._errors import FormatError
from pentad.sparse.search_reference import Forward, Options, Window

WINDOW = _C.sparse_window


def build(forward: Forward, first: int, last: int) -> Window:
    builder = _C.sparse_build(*forward, first, last)
    window = Window(
        np.empty(builder.count, np.int32),
        np.empty(builder.count + 1, np.int64),
        np.empty(builder.count, np.float32),
        np.empty(builder.bytes, np.uint8),
    )
    builder.write(*window)
    return window


def check(window: Window, count: int) -> None:
    defect = _C.sparse_defect(*window, count)
    if defect is not None:
        raise FormatError(f"the inverted lists of the index are malformed: {defect}")


def topk(windows, forward: Forward, queries, mask, k: int, options: Options | None):
    nq = len(queries[0]) - 1
    scores, positions = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)
    cut, block_factor, alpha = (None, 0.0, 1.0) if options is None else options
    _C.sparse_search(
        *(list(windows), *forward, *queries, mask, k),
        *(cut or 0, block_factor, alpha, scores, positions),
    )
    return scores, positions


def scores_at(forward: Forward, queries, positions: np.ndarray) -> np.ndarray:
    scores = np.empty(positions.shape, np.float32)
    _C.sparse_scores_at(*forward, *queries, positions, scores)
    return scores


__all__ = [
    *("WINDOW", "Forward", "Options", "Window"),
    *("build", "check", "scores_at", "topk"),
]
