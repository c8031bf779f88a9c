# SPDX-License-Identifier: Apache-2.0
"""The native search of sparse documents: numpy arrays in, numpy arrays out.

Names, arguments and results are those of the definition in `pentad.sparse.search_reference`, but
that `Lists` looks at the documents once for many searches; the mathematics, layout and method stand
in ``csrc/sparse/postings.h`` and ``search.h``.
"""

import numpy as np

from pentad import _C
from pentad._errors import FormatError
from pentad.sparse.search_reference import Forward, Options, Window

WINDOW = _C.sparse_window
_EXACT = Options()


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


class Lists:
    """The windows of all documents, for searches: what is looked at once stands here."""

    def __init__(self, windows, forward: Forward):
        self._search = _C.SparseLists(list(windows), *forward).search

    def topk(self, op: str, queries, columns: int, mask, k: int, options: Options | None = None):
        """As `search_reference.topk`, of queries whose terms stand in any order, some twice.

        Raises ValueError, in the words of `op`, for queries that are no sparse rows, have a term
        past the columns, or a value above 2**48 or not finite.
        """
        shape = len(queries[0]) - 1, k
        scores, positions = np.empty(shape, np.float32), np.empty(shape, np.int64)
        cut, block_factor, alpha = _EXACT if options is None else options
        knobs = cut or 0, block_factor, alpha
        self._search(op, *queries, columns, mask, k, *knobs, scores, positions)
        return scores, positions


def scores_at(forward: Forward, queries, positions: np.ndarray) -> np.ndarray:
    scores = np.empty(positions.shape, np.float32)
    _C.sparse_scores_at(*forward, *queries, positions, scores)
    return scores


__all__ = [
    *("WINDOW", "Forward", "Lists", "Options", "Window"),
    *("build", "check", "scores_at"),
]
