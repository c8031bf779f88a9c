# SPDX-License-Identifier: Apache-2.0
"""RaBitQIndex: the estimator of Gao and Long 2024, over random rotations and many vectors.

That the index answers by its definition is tested in test_pq_free_index.py.
"""

import numpy as np
import pytest
from pq_free_cases import Model

from pentad.pq import RaBitQIndex

DIM = 64


def estimates(seed, vectors, queries, metric="l2", centre=None):
    """(nq, n) scores of an index of one rotation."""
    index = RaBitQIndex(vectors.shape[1], metric=metric, seed=seed)
    if centre is not None:
        index.train(centre)
    index.add(vectors)
    found = index.search(queries, len(vectors))
    out = np.empty(found.scores.shape)
    np.put_along_axis(out, found.ids, found.scores.astype(np.float64), axis=1)
    return out


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("centred", [False, True])
def test_unbiased_over_rotations(rng, metric, centred):
    vectors, queries = rng.standard_normal((12, DIM)), rng.standard_normal((6, DIM))
    offset = 3.0 if centred else 0.0
    vectors, queries = (x.astype(np.float32) + np.float32(offset) for x in (vectors, queries))
    vectors[:3] = queries[:3] + 0.1 * vectors[:3]  # near ones too
    centre = np.full((1, DIM), offset, np.float32) if centred else None
    if metric == "l2":
        true = ((queries[:, None].astype(np.float64) - vectors) ** 2).sum(2)
    else:
        true = queries.astype(np.float64) @ vectors.T
    rounds = 300
    errors = np.stack(
        [estimates(seed, vectors, queries, metric, centre) - true for seed in range(rounds)]
    )
    deviation = errors.std(axis=0) / np.sqrt(rounds)
    # 72 means of 300: the largest of so many normal deviates is below 4 but once in 200 times.
    assert (np.abs(errors.mean(axis=0)) < 4 * deviation + 1e-6).all()
    # It can tell: signs at the plain scale |r| / sqrt(dim) would give some 80 % of every product,
    # and l2 counts it twice.
    assert 4 * deviation.max() < 0.1 * np.abs(queries.astype(np.float64) @ vectors.T).max()


def test_the_error_bound(rng):
    """Theorem 3.2: |estimate - <o, q>| <= sqrt((1 - c^2) / c^2) e / sqrt(D - 1), c = <o_bar, o>.

    e sigma of a normal deviate in the limit: 94 % within 1.9, 99.7 % within 3.
    """
    dim = 128
    vectors, queries = rng.standard_normal((300, dim)), rng.standard_normal((20, dim))
    vectors, queries = (
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        for x in (vectors, queries)
    )
    index = RaBitQIndex(dim, metric="ip")
    index.add(vectors)
    model = Model(index, vectors)
    turned = model.turned(vectors).astype(np.float64)
    overlap = np.abs(turned).sum(1) / np.sqrt(dim)
    # sqrt(2 / pi) in the mean, with a deviation of sqrt((1 - 2 / pi) / dim) = 0.05 of each.
    assert abs(overlap.mean() - np.sqrt(2 / np.pi)) < 0.01
    error = np.abs(estimates(0, vectors, queries, "ip") - queries.astype(np.float64) @ vectors.T)
    bound = np.sqrt((1 - overlap**2) / overlap**2 / (dim - 1))
    assert 0.92 < (error <= 1.9 * bound).mean() < 0.97
    assert (error <= 3 * bound).mean() > 0.99


def test_a_vector_against_itself(rng):
    """<s, r> |r|^2 / <s, r> = |r|^2, so that l2 gives 0 up to rounding."""
    vectors = rng.standard_normal((50, DIM)).astype(np.float32)
    itself = np.diag(estimates(0, vectors, vectors))
    # Three numbers of |r|^2 ~ 64, each a float32, and a float32 sum of 16 terms.
    np.testing.assert_allclose(itself, 0, atol=64 * 20 * 2.0**-24)


def test_the_centre_helps(rng):
    """Errors are those of what is left of the centre."""
    vectors, queries = rng.standard_normal((200, DIM)) + 5, rng.standard_normal((5, DIM)) + 5
    vectors, queries = vectors.astype(np.float32), queries.astype(np.float32)
    true = ((queries[:, None].astype(np.float64) - vectors) ** 2).sum(2)
    plain = np.abs(estimates(0, vectors, queries) - true).mean()
    centred = np.abs(estimates(0, vectors, queries, centre=vectors) - true).mean()
    assert centred < plain / 5  # in proportion to |r| |y|: some 8 * 8 beside 41 * 41


def test_recall_with_rescoring(rng):
    centres = rng.standard_normal((20, DIM))
    vectors = centres[rng.integers(0, 20, 3000)] + 0.5 * rng.standard_normal((3000, DIM))
    queries = centres[rng.integers(0, 20, 30)] + 0.5 * rng.standard_normal((30, DIM))
    index = RaBitQIndex(DIM, store="float16")
    index.train(vectors)
    index.add(vectors)
    true = np.argsort(((queries[:, None] - vectors) ** 2).sum(2), axis=1)[:, :10]

    def recall(**options):
        found = index.search(queries, 10, **options).ids
        return np.mean([np.isin(a, b).mean() for a, b in zip(found, true, strict=True)])

    assert 0.2 < recall() < recall(rescore="store", oversample=4)
    assert recall(rescore="store", oversample=20) > 0.95
