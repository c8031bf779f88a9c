# SPDX-License-Identifier: Apache-2.0
"""IVFPQIndex: lists, what a query visits, and what residual codes add."""

import numpy as np
import pytest
from cases import assert_same
from pq_index_cases import METRICS, Model, make

from pentad.pq import IVFPQIndex, PQIndex


def clusters(rng, n, dim, count=24):
    centres = rng.standard_normal((count, dim)) * 3
    return (centres[rng.integers(0, count, n)] + rng.standard_normal((n, dim))).astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("rotation", "coarse_dims", "nbits"), [(False, None, 8), (True, None, 4), (False, 5, 6)]
)
def test_probed_lists_are_searched_exactly(
    rng, isa, metric, residual, rotation, coarse_dims, nbits
):
    vectors, queries = clusters(rng, 600, 12), clusters(rng, 9, 12)
    index = make(
        *(IVFPQIndex, 12, 4, nbits),
        **{"metric": metric, "residual": residual, "rotation": rotation, "lists": 12},
        **{"coarse_dims": coarse_dims, "nprobe": 2},
        spread=0.3 if metric == "cosine" else 3,  # centroids as far out as the rows
    )
    index.add(vectors)
    model = Model(index, vectors)
    assert_same(index.codes(), model.codes)
    chosen = rng.random(600) < 0.5
    for nprobe in (1, 3, 12, 100):
        visited = model.visited(queries, nprobe)
        for keep, allowed in ((None, visited), (chosen, visited & chosen)):
            want = model.search(queries, 15, allowed)
            got = index.search(queries, 15, nprobe=nprobe, filter=keep)
            assert_same(tuple(got), want)
            finite = want[0][np.isfinite(want[0])]
            radius = float(np.median(finite)) if len(finite) else 0.0
            hits = index.range_search(queries, radius, nprobe=nprobe, filter=keep)
            assert_same(hits, model.range_search(queries, radius, allowed))
        assert visited.all() == (nprobe >= 12)
    index.nprobe = 3
    assert_same(tuple(index.search(queries, 15)), tuple(index.search(queries, 15, nprobe=3)))
    with pytest.raises(ValueError, match="nprobe is 0"):
        index.search(queries, 1, nprobe=0)


@pytest.mark.parametrize("metric", METRICS)
def test_prefixes_choose_lists_too(rng, metric):
    vectors, queries = clusters(rng, 300, 12), clusters(rng, 5, 12)
    for coarse_dims in (None, 3, 8):
        index = make(
            IVFPQIndex, 12, 4, 6, metric=metric, lists=9, coarse_dims=coarse_dims, spread=3
        )
        index.add(vectors)
        model = Model(index, vectors)
        for dims in (3, 6, 12):
            visited = model.visited(queries[:, :dims], 2, dims)
            want = model.search(queries[:, :dims], 10, visited, dims)
            got = index.search(queries[:, :dims], 10, nprobe=2, dims=dims)
            assert_same(tuple(got), want)


@pytest.mark.parametrize("metric", METRICS)
def test_without_residuals_all_lists_are_the_flat_index(rng, metric):
    vectors, queries = clusters(rng, 500, 12), clusters(rng, 7, 12)
    index = make(IVFPQIndex, 12, 4, 8, metric=metric, residual=False)
    flat = PQIndex(12, 4, 8, metric=metric)
    flat.set_codebooks(index.codebooks)
    ids = rng.permutation(2000)[:500]
    for each in (index, flat):
        each.add(vectors, ids)
    assert_same(tuple(index.search(queries, 30)), tuple(flat.search(queries, 30)))
    assert_same(index.codes(), flat.codes())


def truth(vectors, queries, metric, k):
    x, q = vectors.astype(np.float64), queries.astype(np.float64)
    if metric == "cosine":
        x, q = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, q))
    far = ((q[:, None] - x) ** 2).sum(2) if metric == "l2" else -(q @ x.T)
    return np.argsort(far, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("metric", METRICS)
def test_recall_rises_with_the_lists_visited(metric):
    rng = np.random.default_rng(3)
    vectors, queries = clusters(rng, 3000, 16), clusters(rng, 60, 16)
    want = truth(vectors, queries, metric, 10)
    index = IVFPQIndex(16, 8, 4, metric=metric, lists=24, store="float16")
    index.train(vectors, iterations=8)
    index.add(vectors)

    def recall(**options):
        found = index.search(queries, 10, **options).ids
        return np.mean([np.isin(a, b).mean() for a, b in zip(found, want, strict=True)])

    probes = [1, 2, 6, 24]
    coded = [recall(nprobe=n) for n in probes]
    rescored = [recall(nprobe=n, rescore="store", oversample=10) for n in probes]
    # More lists never lose a true neighbour to rescoring by nearly exact vectors.
    assert rescored == sorted(rescored)
    assert rescored[0] < 0.999
    assert rescored[-1] > 0.98
    assert coded[-1] > coded[0] - 0.02
    assert all(r > c for r, c in zip(rescored, coded, strict=True))


def test_residual_codes_are_nearer(rng):
    vectors = clusters(rng, 1500, 16)
    errors = []
    for residual in (True, False):
        index = IVFPQIndex(16, 4, 4, lists=24, nprobe=24, residual=residual)
        index.train(vectors, iterations=8)
        index.add(vectors)
        errors.append(((index.reconstruct(index.ids) - vectors) ** 2).sum())
    assert errors[0] < 0.7 * errors[1]


def test_training_is_deterministic(rng):
    vectors = clusters(rng, 400, 8)
    made = []
    for seed in (0, 0, 1):
        index = IVFPQIndex(8, 2, 4, lists=6, rotation="opq")
        index.train(vectors, seed=seed, iterations=4)
        made.append(index)
    for a, b in zip(made[0]._trained, made[1]._trained, strict=True):
        assert_same(a, b)
    assert (made[0].centroids != made[2].centroids).any()


def test_lists_by_a_prefix_are_trained(rng):
    """The centroids that `coarse_dims` chooses by go on as the means of their lists."""
    vectors = clusters(rng, 500, 12)
    index = IVFPQIndex(12, 4, 4, lists=8, nprobe=8, coarse_dims=4)
    index.train(vectors, iterations=6)
    home = (
        ((vectors[:, None, :4].astype(np.float64) - index.centroids[:, :4]) ** 2).sum(2).argmin(1)
    )
    for c in range(8):
        np.testing.assert_allclose(  # of float32 coordinates, rounded once
            index.centroids[c, 4:], vectors[home == c, 4:].mean(0, np.float64), rtol=1e-6, atol=1e-6
        )
    index.add(vectors)
    assert_same(tuple(index.search(vectors[:9], 5)), Model(index, vectors).search(vectors[:9], 5))


@pytest.mark.parametrize("rows", [1, 3])
def test_training_on_few_distinct_vectors(rng, rows):
    distinct = rng.standard_normal((rows, 8)).astype(np.float32)
    index = IVFPQIndex(8, 2, 4, lists=6, nprobe=6)
    index.train(distinct[rng.integers(0, rows, 30)])
    index.add(np.repeat(distinct, 4, 0))
    found = index.search(distinct, 4).ids
    assert_same(found, np.arange(rows * 4).reshape(rows, 4))
    np.testing.assert_allclose(index.reconstruct(index.ids), np.repeat(distinct, 4, 0), atol=1e-5)


def test_nprobe_is_checked_when_set(tmp_path):
    index = make(IVFPQIndex, 16)
    for value, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="nprobe is"):
            index.nprobe = value
    index.nprobe = np.int64(3)
    index.save(tmp_path / "x")
    assert IVFPQIndex.load(tmp_path / "x").nprobe == 3
