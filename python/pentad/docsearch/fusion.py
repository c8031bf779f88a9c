# SPDX-License-Identifier: Apache-2.0
"""Several rankings merged into one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONSTANT = 60  # of the paper; the larger, the less do the first ranks stand out


def reciprocal_rank_fusion(
    rankings: Sequence[np.ndarray], constant: float = CONSTANT
) -> tuple[np.ndarray, np.ndarray]:
    """(scores float64, ids int64): everything that a ranking names, best first.

    A score is the sum of 1 / (constant + rank), ranks from 1, over the rankings that have the id;
    ties go to the smaller id. Cormack, Clarke and Buettcher 2009, "Reciprocal Rank Fusion
    outperforms Condorcet and individual Rank Learning Methods", section 2.
    """
    named = np.concatenate([np.zeros(0, np.int64), *rankings])
    shares = [1 / (constant + np.arange(1, len(ranking) + 1)) for ranking in rankings]
    ids, at = np.unique(named, return_inverse=True)
    scores = np.bincount(at, np.concatenate([np.zeros(0), *shares]), minlength=len(ids))
    order = np.argsort(-scores, kind="stable")
    return scores[order], ids[order]
