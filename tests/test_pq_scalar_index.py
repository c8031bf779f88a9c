# SPDX-License-Identifier: Apache-2.0
"""ScalarIndex: how well it decodes, and that its scores are those of the decoded vectors.

That the index answers by its definition is tested in test_pq_free_index.py.
"""

import numpy as np
import pytest
from cases import assert_same
from pq_free_cases import Model

from pentad.pq import ScalarIndex

DIM = 128


def filled(rng, nbits, n=500, metric="l2", centred=False, offset=0.0):
    vectors = (rng.standard_normal((n, DIM)) + offset).astype(np.float32)
    index = ScalarIndex(DIM, nbits, metric=metric)
    if centred:
        index.train(vectors)
    index.add(vectors)
    return index, vectors


@pytest.mark.parametrize(("nbits", "most"), [(4, 0.015), (8, 6e-5)])
@pytest.mark.parametrize("heavy", [False, True])
def test_what_rounding_loses(rng, nbits, most, heavy):
    """Steps of 2 a / (2^nbits - 1) lose a twelfth of their square; the largest of 128 normal
    deviates is some a = 2.7. One heavy component makes no difference once it is turned."""
    index, vectors = filled(rng, nbits)
    if heavy:
        vectors[:, 5] *= 30
        index = ScalarIndex(DIM, nbits)
        index.add(vectors)
    decoded = index.reconstruct(index.ids).astype(np.float64)
    lost = ((decoded - vectors) ** 2).sum() / (vectors.astype(np.float64) ** 2).sum()
    assert most / 4 < lost < most


@pytest.mark.parametrize("nbits", [4, 8])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("centred", [False, True])
def test_scores_are_those_of_the_decoded(rng, nbits, metric, centred):
    index, vectors = filled(rng, nbits, metric=metric, centred=centred, offset=2.0)
    queries = vectors[:7] + 0.1 * rng.standard_normal((7, DIM)).astype(np.float32)
    decoded = Model(index, vectors).decoded()
    np.testing.assert_allclose(index.reconstruct(index.ids), decoded, atol=1e-4)
    if metric == "l2":
        want = ((queries[:, None].astype(np.float64) - decoded) ** 2).sum(2)
    else:
        want = queries.astype(np.float64) @ decoded.T
    found = index.search(queries, 20)
    got = np.take_along_axis(want, found.ids, axis=1)
    # Numbers of up to |q|^2 ~ 128 * 5, summed in float32 over 128 terms.
    np.testing.assert_allclose(found.scores, got, atol=640 * 140 * 2.0**-24)
    assert (found.ids[:, 0] == np.arange(7)).all()


@pytest.mark.parametrize("nbits", [4, 8])
def test_decoded_vectors_keep_their_codes(rng, nbits):
    """The outermost level stays the outermost, so that the levels stay where they were."""
    index, _ = filled(rng, nbits)
    codes = index.codes()
    index.update(index.ids, index.reconstruct(index.ids))
    assert_same(index.codes(), codes)


def test_more_bits_find_more(rng):
    centres = rng.standard_normal((20, DIM))
    vectors = centres[rng.integers(0, 20, 3000)] + 0.5 * rng.standard_normal((3000, DIM))
    queries = centres[rng.integers(0, 20, 30)] + 0.5 * rng.standard_normal((30, DIM))
    true = np.argsort(((queries[:, None] - vectors) ** 2).sum(2), axis=1)[:, :10]

    def recall(nbits):
        index = ScalarIndex(DIM, nbits)
        index.add(vectors)
        found = index.search(queries, 10).ids
        return np.mean([np.isin(a, b).mean() for a, b in zip(found, true, strict=True)])

    assert 0.7 < recall(4) < recall(8)
    assert recall(8) > 0.97
