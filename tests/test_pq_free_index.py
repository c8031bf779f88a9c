# SPDX-License-Identifier: Apache-2.0
"""ScalarIndex and RaBitQIndex: equal to their definitions."""

import numpy as np
import pytest
from cases import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from pq_free_cases import CLASSES, KINDS, Model, make
from pq_index_cases import METRICS, STORES, whole_vectors

from pentad.pq import RaBitQIndex, ScalarIndex


@settings(max_examples=40)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(METRICS),
    st.integers(1, 70),
    st.integers(0, 300),
    st.integers(0, 7),
    st.integers(0, 30),
    st.sampled_from(["random", "whole", "ties", "far"]),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_search_is_the_definition(isa, threads, kind, metric, dim, n, nq, k, data, t, seed):
    rng = np.random.default_rng(seed)
    threads(t)
    vectors, queries = rng.standard_normal((n, dim)), rng.standard_normal((nq, dim))
    if data in ("whole", "ties"):
        vectors, queries = vectors.round(), queries.round()
    if data == "ties" and n:
        vectors = vectors[rng.integers(0, min(n, 3), n)]
    index = make(kind, dim, metric=metric, seed=int(rng.integers(5)))
    if data == "far" and n:
        vectors, queries = vectors + 10, queries + 10
        index.train(vectors)
        assert index.centre.any() or metric == "cosine"
    ids = rng.permutation(3 * n + 1)[:n]
    index.add(vectors.astype(np.float32), ids)
    model = Model(index, vectors, ids)
    assert_same(index.codes(ids), model.codes)
    want = model.search(queries, k)
    assert_same(tuple(index.search(queries, k)), want)
    keep = np.sort(ids)[rng.random(n) < 0.4]
    allowed = np.isin(ids, keep)
    assert_same(tuple(index.search(queries, k, filter=keep)), model.search(queries, k, allowed))
    finite = want[0][np.isfinite(want[0])]
    for radius in (float(np.median(finite)) if len(finite) else 0.5, np.inf, -np.inf):
        assert_same(index.range_search(queries, radius), model.range_search(queries, radius))
    got = index.range_search(queries, 1.0, filter=keep)
    assert_same(got, model.range_search(queries, 1.0, allowed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_a_radius_is_a_double(rng, kind, metric):
    """Scores are float32: the radius is not rounded to meet them."""
    vectors = rng.standard_normal((40, 9)).astype(np.float32)
    index = make(kind, 9, metric=metric)
    index.add(vectors)
    scores = index.search(vectors[:1], 40).scores[0]
    inward = -np.inf if metric == "l2" else np.inf
    for place in (0, 3, 39):
        radius = float(scores[place])
        within = int((scores <= radius if metric == "l2" else scores >= radius).sum())
        equal = int((scores == scores[place]).sum())
        for given_radius, count in (
            (radius, within),
            (np.nextafter(radius, inward), within - equal),
            (np.nextafter(radius, -inward), within),
        ):
            assert len(index.range_search(vectors[:1], given_radius)[2]) == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("store", ["int8", "float16"])
def test_rescoring_with_stored_vectors(rng, kind, metric, store):
    vectors, queries = whole_vectors(rng, 200, 20), whole_vectors(rng, 5, 20)
    vectors[100:] = vectors[:100]  # equal scores: the smaller id comes first
    index = make(kind, 20, metric=metric, store=store)
    index.add(vectors)
    model = Model(index, vectors)
    got = index.search(queries, 7, rescore="store", oversample=3)
    assert_same(tuple(got), model.rescored(queries, 7, 21))
    assert_same(tuple(index.rescore(queries, index.search(queries, 21).ids))[1][:, :7], got.ids)
    assert_same(index.reconstruct([3, 150, 3]), model.stored()[[3, 150, 3]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_batches_and_threads_change_nothing(rng, threads, monkeypatch, kind, metric):
    vectors = rng.standard_normal((700, 24)).astype(np.float32)
    queries = rng.standard_normal((40, 24)).astype(np.float32)
    index, other = (make(kind, 24, metric=metric) for _ in range(2))
    threads(2)
    index.add(vectors)
    found = index.search(queries, 9)
    monkeypatch.setattr("pentad.pq._exact._CHUNK", 100)
    monkeypatch.setattr("pentad.pq._free._TABLES", 3 * 24 * 256 * 4)
    monkeypatch.setattr("pentad.pq.index._ROWS", 64)
    threads(1)
    for first, last in ((0, 1), (1, 64), (64, 300), (300, 700)):
        other.add(vectors[first:last])
    assert_same(other.codes(), index.codes())
    assert_same(tuple(other.search(queries, 9)), tuple(found))
    for q in range(0, 40, 7):
        alone = other.search(queries[q : q + 1], 9)
        assert_same(tuple(alone), (found.scores[q : q + 1], found.ids[q : q + 1]))


@pytest.mark.parametrize("cls", CLASSES)
def test_the_centre_is_the_mean(rng, cls):
    index, vectors = cls(7), rng.integers(-50, 50, (64, 7)).astype(np.float32)
    assert_same(index.centre, np.zeros(7, np.float32))
    stages = []
    index.train(vectors, progress=lambda *stage: stages.append(stage))
    assert_same(index.centre, vectors.mean(axis=0, dtype=np.float64).astype(np.float32))
    assert stages == [("finding the centre", 1, 1)]
    with pytest.raises(ValueError, match="read-only"):
        index.centre[0] = 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", STORES)
def test_changes(rng, kind, store):
    index = make(kind, 12, store=store)
    vectors = whole_vectors(rng, 90, 12)
    index.add(vectors[:50], np.arange(100, 150))
    index.add(vectors[50:70], np.arange(20))
    index.add(vectors[70:80])  # the numbers after the largest
    index.update([105, 3], vectors[80:82])
    assert index.remove([110, 7, 5000]) == 2
    rows = dict(zip([*range(100, 150), *range(20), *range(150, 160)], vectors[:80], strict=True))
    rows |= {105: vectors[80], 3: vectors[81]}
    del rows[110], rows[7]
    ids = np.array(sorted(rows))
    model = Model(index, np.stack([rows[i] for i in ids]), ids)
    assert_same(index.ids, ids)
    assert_same(index.codes(), model.codes)
    assert_same(tuple(index.search(vectors[:4], 30)), model.search(vectors[:4], 30))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_comes_back_as_torch(rng, kind):
    torch = pytest.importorskip("torch")
    vectors = rng.standard_normal((30, 9)).astype(np.float32)
    index, other = make(kind, 9), make(kind, 9)
    index.add(vectors)
    other.add(torch.from_numpy(vectors).requires_grad_())
    got, want = other.search(torch.from_numpy(vectors[:3]), 4), index.search(vectors[:3], 4)
    assert_same(tuple(part.numpy() for part in got), tuple(want))
    got = other.range_search(torch.from_numpy(vectors[:3]), 5.0)
    assert_same(tuple(part.numpy() for part in got), index.range_search(vectors[:3], 5.0))
    half = make(kind, 9)
    half.add(torch.from_numpy(vectors).bfloat16())
    assert_same(half.codes(), Model(half, torch.from_numpy(vectors).bfloat16().float()).codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_zeros_and_extremes(kind, metric):
    vectors = np.zeros((4, 8), np.float32)
    vectors[1, 0], vectors[2, 0] = 2.0**50, 1e-40
    index = make(kind, 8, metric=metric)
    index.add(vectors)
    got = index.search(vectors, 4)
    assert np.isfinite(got.scores).all()
    assert (index.reconstruct([0]) == 0).all()
    if metric == "l2":
        assert_same(got.scores[0, :1], np.zeros(1, np.float32))


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_refused(rng, cls):
    index = cls(6)
    assert index.search(np.zeros((2, 6)), 3).ids.tolist() == [[-1] * 3] * 2
    index.add(rng.standard_normal((3, 6)))
    name = cls.__name__
    with pytest.raises(ValueError, match=rf"{name}.train\] the index already holds 3 rows"):
        index.train(np.ones((2, 6)))
    with pytest.raises(ValueError, match=r"0 vectors, at least 1"):
        cls(6).train(np.ones((0, 6)))
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or an infinity"):
            index.add(np.full((1, 6), bad))
        with pytest.raises(ValueError, match="NaN or an infinity"):
            index.search(np.full((1, 6), bad), 1)
    with pytest.raises(ValueError, match="columns, expected 6"):
        index.add(np.zeros((1, 5)))
    with pytest.raises(TypeError):
        index.add(np.zeros((1, 6), np.uint8))
    with pytest.raises(ValueError, match="store=None"):
        index.search(np.zeros((1, 6)), 1, rescore="store")
    with pytest.raises(ValueError, match="radius is NaN"):
        index.range_search(np.zeros((1, 6)), np.nan)
    for options in ({"dim": 0}, {"dim": 4097}, {"metric": "l1"}, {"store": "int4"}, {"seed": -1}):
        with pytest.raises(ValueError, match=rf"{name}.__init__"):
            cls(**({"dim": 6} | options))
    assert len(index) == 3


def test_scalar_bits():
    for nbits in (1, 6, 16):
        with pytest.raises(ValueError, match="expected 4 or 8"):
            ScalarIndex(8, nbits)
    assert ScalarIndex(10, 4).codes().shape == (0, 10)
    assert RaBitQIndex(10).codes().shape == (0, 3)
