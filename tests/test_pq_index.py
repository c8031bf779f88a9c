# SPDX-License-Identifier: Apache-2.0
"""PQIndex and IVFPQIndex: against a dict and brute force."""

import numpy as np
import pytest
from cases import assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pq_index_cases import CLASSES, LISTS, METRICS, STORES, Model, in_order, make, whole_vectors

from pentad.pq import IVFPQIndex, PQIndex, _exact

# --- A random life, against a dict ----------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """The index must answer as a dict of id -> vector that is coded and searched by brute force."""

    @initialize(
        cls=st.sampled_from(CLASSES),
        metric=st.sampled_from(METRICS),
        store=st.sampled_from(STORES),
        shape=st.sampled_from([(1, 1, 4), (6, 3, 6), (9, 9, 4), (4, 1, 8), (15, 5, 4)]),
        rotation=st.booleans(),
        residual=st.booleans(),
        ties=st.booleans(),
        n=st.sampled_from([40, 0, 70]),
        seed=st.integers(0, 2**32 - 1),
    )
    def begin(self, cls, metric, store, shape, rotation, residual, ties, n, seed):
        self.rng = np.random.default_rng(seed)
        (self.dim, M, nbits), self.store, self.ties = shape, store, ties
        options = {"residual": residual} if cls is IVFPQIndex else {}
        options |= {"metric": metric, "store": store, "rotation": rotation}
        self.index = make(cls, self.dim, M, nbits, rng=self.rng, spread=2, **options)
        self.dict = {}
        self.add(n)

    def vectors(self, n):
        return whole_vectors(self.rng, n, self.dim, self.ties)

    def remember(self, ids, vectors):
        self.dict |= {int(i): v for i, v in zip(ids, vectors, strict=True)}

    @rule(n=st.integers(0, 90))
    def add_more(self, n):
        self.add(n)

    def add(self, n):
        vectors = self.vectors(n)
        first = max(self.dict, default=-1) + 1
        self.index.add(vectors)
        self.remember(range(first, first + n), vectors)

    @rule(n=st.integers(0, 40), high=st.sampled_from([60, 1000, 2**62]))
    def add_with_ids(self, n, high):
        ids = np.setdiff1d(self.rng.integers(0, high, n), list(self.dict))
        self.rng.shuffle(ids)
        vectors = self.vectors(len(ids))
        self.index.add(vectors, ids.tolist() if self.rng.random() < 0.5 else ids)
        self.remember(ids, vectors)

    @rule(share=st.sampled_from([0.1, 0.9, 1.0]), strangers=st.booleans())
    def remove(self, share, strangers):
        gone = [i for i in self.dict if self.rng.random() < share]
        unknown = [2**40 + 1, 2**40 + 2] if strangers else []
        self.rng.shuffle(gone)
        assert self.index.remove(unknown + gone) == len(gone)
        for i in gone:
            del self.dict[i]

    @precondition(lambda self: self.dict)
    @rule()
    def update(self):
        ids = [i for i in self.dict if self.rng.random() < 0.5]
        self.rng.shuffle(ids)
        vectors = self.vectors(len(ids))
        self.index.update(ids, vectors)
        self.remember(ids, vectors)

    @rule(mmap=st.booleans(), verify=st.booleans())
    def save_and_load(self, mmap, verify):
        path = self.folder / "life.pentad"
        self.index.save(path)
        self.index = type(self.index).load(path, mmap=mmap, verify=verify)

    @rule()
    def embed(self):
        self.index = type(self.index).from_sections(*self.index.to_sections())

    @rule(ids=st.lists(st.integers(0, 100), min_size=1, max_size=4))
    def refused_add_changes_nothing(self, ids):
        taken = [*ids, *list(self.dict)[:1]] if self.dict else [-1, *ids]
        with pytest.raises(ValueError, match=r"already|negative|twice"):
            self.index.add(self.vectors(len(taken)), taken)

    @invariant()
    def answers_like_the_dict(self):
        if not hasattr(self, "index"):
            return
        ids = np.array(sorted(self.dict), np.int64)
        vectors = np.array([self.dict[i] for i in ids], np.float32).reshape(len(ids), self.dim)
        model = Model(self.index, vectors, ids)
        assert len(self.index) == len(ids)
        assert_same(self.index.ids, ids)
        assert_same(self.index.codes(), model.codes)

        queries = whole_vectors(self.rng, 3, self.dim)
        k = int(self.rng.choice([0, 1, 5, len(ids), len(ids) + 2]))
        assert_same(tuple(self.index.search(queries, k)), model.search(queries, k))
        costs = model.costs(queries)
        radius = float(self.rng.choice(model.scores(costs)[0])) if len(ids) else 1.0
        assert_same(self.index.range_search(queries, radius), model.range_search(queries, radius))

        keep = self.rng.random(len(ids)) < 0.5
        want = model.search(queries, k, keep)
        assert_same(tuple(self.index.search(queries, k, filter=keep)), want)
        chosen = [*ids[keep], 2**50]  # an unknown one is passed over
        assert_same(tuple(self.index.search(queries, k, filter=chosen)), want)
        assert_same(
            self.index.range_search(queries, radius, filter=keep),
            model.range_search(queries, radius, keep),
        )

        if self.store is not None:
            assert_same(self.index.reconstruct(ids[::-1]), model.stored()[::-1])
            everything = max(1, len(ids))
            got = self.index.search(queries, k, rescore=self.store, oversample=everything)
            assert_same(tuple(got), model.rescored(queries, k))


def test_a_random_life(tmp_path):
    Life.folder = tmp_path
    Life.TestCase.settings = settings(
        max_examples=60, stateful_step_count=10, suppress_health_check=list(HealthCheck)
    )
    Life.TestCase("runTest").runTest()


# --- Search ---------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.sampled_from(CLASSES),
    st.sampled_from(METRICS),
    st.sampled_from([4, 6, 8]),
    st.integers(1, 128),
    st.integers(1, 3),
    st.integers(0, 500),
    st.integers(0, 12),
    st.integers(0, 30),
    st.sampled_from(["random", "whole", "ties"]),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_search_is_exact(isa, threads, cls, metric, nbits, M, dsub, n, nq, k, kind, t, seed):
    rng = np.random.default_rng(seed)
    threads(t)
    dim = M * dsub
    spread = 1 if kind == "random" else None
    index = make(cls, dim, M, nbits, rng=rng, metric=metric, spread=spread)
    vectors, queries = rng.standard_normal((n, dim)), rng.standard_normal((nq, dim))
    if kind != "random":  # codes of few distinct costs
        vectors, queries = vectors.round(), queries.round()
    if kind == "ties" and n:
        vectors = vectors[rng.integers(0, min(n, 3), n)]
    vectors, queries = vectors.astype(np.float32), queries.astype(np.float32)
    ids = rng.permutation(3 * n + 1)[:n]
    index.add(vectors, ids)
    model = Model(index, vectors, ids)
    assert_same(index.codes(ids), model.codes)
    want = model.search(queries, k)
    assert_same(tuple(index.search(queries, k)), want)
    radius = float(np.median(want[0])) if want[0].size and np.isfinite(want[0]).all() else 0.5
    assert_same(index.range_search(queries, radius), model.range_search(queries, radius))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("M", "nbits"), [(16, 4), (7, 4), (8, 8), (5, 6)])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_many_rows_in_unaligned_pieces(rng, threads, cls, M, nbits, metric):
    threads(3)
    vectors, queries = rng.standard_normal((5000, M)), rng.standard_normal((4, M))
    vectors, queries = vectors.astype(np.float32), queries.astype(np.float32)
    vectors[3000:3100] = vectors[:100]
    index = make(cls, M, M, nbits, rng=rng, metric=metric)
    for first, last in ((0, 5), (5, 2499), (2499, 2500), (2500, 5000)):
        index.add(vectors[first:last])
    model = Model(index, vectors)
    assert_same(index.codes(), model.codes)
    assert_same(tuple(index.search(queries, 20)), model.search(queries, 20))
    keep = rng.random(5000) < 0.02
    assert_same(tuple(index.search(queries, 20, filter=keep)), model.search(queries, 20, keep))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rotation", [False, True])
def test_batches_and_threads_change_nothing(rng, threads, monkeypatch, cls, metric, rotation):
    vectors = rng.standard_normal((700, 24)).astype(np.float32)
    queries = rng.standard_normal((40, 24)).astype(np.float32)
    index = make(cls, 24, 6, 8, metric=metric, rotation=rotation, store="float16")
    threads(2)
    index.add(vectors)
    found = index.search(queries, 9)
    hits = index.range_search(queries, float(np.median(found.scores)))
    rescored = index.search(queries, 9, rescore="store")
    monkeypatch.setattr("pentad.pq._exact._CHUNK", 100)
    monkeypatch.setattr("pentad.pq.index._TABLES", 3 * 6 * 256 * 4)
    monkeypatch.setattr("pentad.pq.index._ROWS", 64)
    threads(1)
    other = make(cls, 24, 6, 8, metric=metric, rotation=rotation, store="float16")
    for first, last in ((0, 1), (1, 64), (64, 300), (300, 700)):
        other.add(vectors[first:last])
    assert_same(other.codes(), index.codes())
    assert_same(tuple(other.search(queries, 9)), tuple(found))
    assert_same(other.range_search(queries, float(np.median(found.scores))), hits)
    assert_same(tuple(other.search(queries, 9, rescore="store")), tuple(rescored))
    for q in range(0, 40, 7):
        alone = other.search(queries[q : q + 1], 9)
        assert_same(tuple(alone), (found.scores[q : q + 1], found.ids[q : q + 1]))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("store", ["int8", "float16"])
def test_rescoring_with_stored_vectors(rng, cls, metric, store):
    vectors, queries = whole_vectors(rng, 300, 20), whole_vectors(rng, 5, 20)
    vectors[100:200] = vectors[:100]  # equal scores: the smaller id comes first
    index = make(cls, 20, store=store, metric=metric, spread=30)
    index.add(vectors)
    model = Model(index, vectors)
    for rescore in ("store", store):
        got = index.search(queries, 20, rescore=rescore, oversample=3)
        assert_same(tuple(got), model.rescored(queries, 20, 60))
    keep = np.zeros(300, bool)
    keep[[5, 105, 7]] = True
    got = index.search(queries, 5, rescore="store", filter=keep)
    assert_same(tuple(got), model.rescored(queries, 5, keep=keep))
    assert (got.ids[:, 3:] == -1).all()
    assert (got.scores[:, 3:] == (np.inf if metric == "l2" else -np.inf)).all()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("metric", METRICS)
def test_rescoring_improves_recall(cls, metric):
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((2000, 16)).astype(np.float32)
    queries = rng.standard_normal((50, 16)).astype(np.float32)
    lists = {"lists": LISTS, "nprobe": LISTS} if cls is IVFPQIndex else {}
    index = cls(16, 4, 4, metric=metric, store="float16", **lists)
    index.train(vectors, iterations=5)
    index.add(vectors)
    exact = Model(index, vectors).rescored(queries, 10)[1]

    def recall(**options):
        ids = index.search(queries, 10, **options).ids
        return np.mean([np.isin(a, b).mean() for a, b in zip(ids, exact, strict=True)])

    coded = recall()
    assert coded < recall(rescore="store", oversample=4) < 1
    assert recall(rescore="store", oversample=40) > 0.95


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dims", [3, 9, 15])
def test_prefixes_of_the_dimensions(rng, isa, cls, metric, dims):
    vectors = rng.standard_normal((400, 15)).astype(np.float32)
    queries = rng.standard_normal((6, 15)).astype(np.float32)
    index = make(cls, 15, 5, 6, metric=metric, store="float16")
    index.add(vectors)
    model = Model(index, vectors)
    assert_same(tuple(index.search(queries, 7, dims=dims)), model.search(queries, 7, dims=dims))
    short = queries[:, :dims]
    want = model.search(short, 7, dims=dims)
    assert_same(tuple(index.search(short, 7, dims=dims)), want)
    radius = float(want[0][:, 3].mean())
    assert_same(
        index.range_search(short, radius, dims=dims), model.range_search(short, radius, dims=dims)
    )
    got = index.search(short, 7, dims=dims, rescore="store", oversample=3)
    assert_same(tuple(got), model.rescored(short, 7, 21))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_radius_between_two_floats(cls, metric):
    """Scores are float32, the radius is a double: neither is rounded to meet the other."""
    index = make(cls, 2, 1, 4, metric=metric)
    index.add(np.array([[0.3, 0.4], [3.0, 1.0]], np.float32))
    query = np.array([[0.7, 0.1]], np.float32)
    score = index.search(query, 1).scores[0, 0]
    inward = -np.inf if metric == "l2" else np.inf
    for radius, count in (
        (float(score), 1),
        (np.nextafter(float(score), inward), 0),
        (np.nextafter(float(score), -inward), 1),
        (inward, 0),
        (-inward, 2),
        (np.copysign(1e300, inward), 0),
        (np.copysign(1e300, -inward), 2),
    ):
        assert len(index.range_search(query, radius)[2]) == count


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_codes_decode(rng, cls, rotation):
    """Without a store: the nearest words, and the centroid, turned back."""
    vectors = rng.standard_normal((50, 12)).astype(np.float32)
    index = make(cls, 12, 4, 6, rng=rng, rotation=rotation)
    index.add(vectors, np.arange(50)[::-1])
    books, turn, centroids, _ = index._trained
    model = Model(index, vectors)
    want = books[np.arange(4), model.codes].reshape(50, 12).astype(np.float64)
    if cls is IVFPQIndex:
        want += centroids[model.home]
    if rotation:
        want = want @ turn.astype(np.float64)
    # float32 sums of two numbers, and of a turn 12 products of them: a few roundings of 2^-24.
    np.testing.assert_allclose(index.reconstruct(np.arange(50)[::-1]), want, atol=1e-5)
    again = index.codes()
    index.update(np.arange(50), index.reconstruct(np.arange(50)))
    if cls is PQIndex and not rotation:  # lists or roundings may part what lies equally far
        assert_same(index.codes(), again)


@pytest.mark.parametrize("cls", CLASSES)
def test_zero_vectors_under_cosine(cls):
    index = make(cls, 4, metric="cosine", store="float16")
    index.add(np.array([[0, 0, 0, 0], [1e-30, 0, 0, 0], [3e38, 0, 0, 0]], np.float32))
    assert_same(
        index.reconstruct([0, 1, 2]), np.array([[0] * 4, [1, 0, 0, 0], [1, 0, 0, 0]], np.float32)
    )
    got = index.search(np.array([[2.5, 0, 0, 0], [0, 0, 0, 0]]), 3, rescore="store")
    assert got.ids.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert got.scores.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_sums_in_order(rng):
    """`_exact` gives the bits of the plain sums, for sums that cancel too."""
    for d in (1, 2, 7, 64, 300):
        x = (rng.standard_normal((90, d)) * 10.0 ** rng.integers(-8, 8, (90, 1))).astype("f4")
        x[30:60] = x[30:60].round(1)
        x[60:, ::2] = 0
        x[80:] = 0
        for turn in (
            np.linalg.qr(rng.standard_normal((d, d)))[0].astype("f4"),
            np.where(rng.random((d, d)) < 0.5, 1, -1).astype("f4"),
            np.eye(d, dtype="f4")[rng.permutation(d)],
        ):
            want = in_order(x[:, None].astype(np.float64) * turn).astype(np.float32) + 0
            assert_same(_exact.rotated(x, turn), want)
            assert not np.signbit(_exact.rotated(x, turn)[_exact.rotated(x, turn) == 0]).any()
        length = np.sqrt(in_order(x.astype(np.float64) ** 2))[:, None]
        want = (x / np.where(length > 0, length, 1)).astype(np.float32)
        assert_same(_exact.normalized(x), want)


# --- Codebooks from elsewhere, and training -------------------------------------------------------


@pytest.mark.parametrize("rotation", [False, True])
def test_codebooks_and_codes_of_a_layer(rng, rotation):
    like = make(PQIndex, 12, 4, 4, rng=rng, rotation=rotation)
    vectors = rng.standard_normal((60, 12)).astype(np.float32)
    like.add(vectors)
    index = PQIndex(12, 4, 4, rotation="opq" if rotation else None)
    index.set_codebooks(like.codebooks, like.rotation_matrix)
    index.add(like.codes())
    assert_same(tuple(index.search(vectors, 5)), tuple(like.search(vectors, 5)))
    index.update([3], like.codes([7]))
    assert_same(index.codes([3]), like.codes([7]))
    with pytest.raises(ValueError, match="beyond 4 bits"):
        index.add(like.codes() | 16)
    with pytest.raises(ValueError, match="codes of 3 subspaces, M is 4"):
        index.add(like.codes()[:, :3])
    with pytest.raises(ValueError, match="already holds 60 rows"):
        index.set_codebooks(like.codebooks, like.rotation_matrix)
    assert len(index) == 60


def test_bad_codebooks_are_refused(rng):
    books = rng.standard_normal((4, 16, 3)).astype(np.float32)
    for bad in (books[:3], books[:, :15], books[:, :, :2], books * np.nan, books * 1e30, books[0]):
        with pytest.raises(ValueError, match="finite codebooks of shape"):
            PQIndex(12, 4, 4).set_codebooks(bad)
    with pytest.raises(TypeError, match="dtype int64"):
        PQIndex(12, 4, 4).set_codebooks(books.astype(int))
    with pytest.raises(ValueError, match="rotation does not fit"):
        PQIndex(12, 4, 4).set_codebooks(books, np.eye(12, dtype="f4"))
    with pytest.raises(ValueError, match="rotation does not fit"):
        PQIndex(12, 4, 4, rotation="opq").set_codebooks(books)
    with pytest.raises(ValueError, match="a rotation of"):
        PQIndex(12, 4, 4, rotation="opq").set_codebooks(books, np.eye(11, dtype="f4"))


def clustered(rng, n, dim):
    """Vectors whose neighbouring dimensions are correlated, and unequally long."""
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return (rng.standard_normal((n, dim)) * 0.7 ** np.arange(dim) @ turn).astype(np.float32)


def error_of(index, vectors):
    index.add(vectors)
    return float(((index.reconstruct(index.ids) - vectors) ** 2).sum())


@pytest.mark.parametrize("cls", CLASSES)
def test_training_fits_the_vectors(rng, cls):
    vectors = clustered(rng, 900, 16)
    errors = {}
    for key, rotation, seed, iterations in (
        ("long", None, 0, 10),
        ("same", None, 0, 10),
        ("short", None, 0, 0),
        ("opq", "opq", 0, 10),
        ("random_hadamard", "random_hadamard", 0, 10),
    ):
        options = {"lists": 4, "nprobe": 4} if cls is IVFPQIndex else {}
        index = cls(16, 4, 4, rotation=rotation, **options)
        index.train(vectors, seed=seed, iterations=iterations)
        assert index.codebooks.shape == (4, 16, 4)
        if rotation:
            turn = index.rotation_matrix.astype(np.float64)
            np.testing.assert_allclose(turn @ turn.T, np.eye(16), atol=1e-5)  # float32 entries
        errors[key] = error_of(index, vectors)
        found = index.search(vectors[:30], 20).ids
        assert np.mean([i in row for i, row in enumerate(found)]) > 0.8
    assert errors["same"] == errors["long"] < errors["short"]
    assert errors["opq"] < 0.95 * errors["long"]
    assert errors["opq"] < errors["random_hadamard"] < errors["short"] * 2
