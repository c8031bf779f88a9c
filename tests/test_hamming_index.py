# SPDX-License-Identifier: Apache-2.0
"""BinaryIndex and BinaryIVFIndex: against a dict and brute force, and what they refuse."""

import numpy as np
import pytest
from cases import METRICS, assert_same, codes, laid_out
from hamming_index_cases import (
    CLASSES,
    STORES,
    expected_range,
    expected_search,
    make,
    whole_vectors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from index_cases import assert_unchanged_by_refusals

import pentad
from pentad.hamming import BinaryIndex, BinaryIVFIndex, reference

# --- A random life, against a dict ----------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """The index must answer as a dict of id -> code that is searched by brute force."""

    @initialize(
        cls=st.sampled_from(CLASSES),
        metric=st.sampled_from(METRICS),
        store=st.sampled_from(STORES),
        dim=st.sampled_from([1, 8, 21, 64, 130]),
        ties=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    def begin(self, cls, metric, store, dim, ties, seed):
        self.rng = np.random.default_rng(seed)
        self.dim, self.metric, self.store, self.ties = dim, metric, store, ties
        self.index = make(cls, dim, rng=self.rng, metric=metric, store=store)
        self.model = {}

    def vectors(self, n):
        vectors = whole_vectors(self.rng, n, self.dim)
        if self.ties and n:
            vectors = vectors[self.rng.integers(0, min(n, 2), n)]
        return vectors

    def remember(self, ids, vectors):
        self.model |= {int(i): v for i, v in zip(ids, vectors, strict=True)}

    def given(self, vectors):
        """Vectors, or their codes where the index takes codes."""
        if self.store is None and self.rng.random() < 0.5:
            return pentad.hamming.pack(vectors)
        return vectors

    @rule(n=st.integers(0, 70))
    def add(self, n):
        vectors = self.vectors(n)
        first = max(self.model, default=-1) + 1
        self.index.add(self.given(vectors))
        self.remember(range(first, first + n), vectors)

    @rule(n=st.integers(0, 40), high=st.sampled_from([60, 1000, 2**62]))
    def add_with_ids(self, n, high):
        ids = np.setdiff1d(self.rng.integers(0, high, n), list(self.model))
        self.rng.shuffle(ids)
        vectors = self.vectors(len(ids))
        self.index.add(self.given(vectors), ids.tolist() if self.rng.random() < 0.5 else ids)
        self.remember(ids, vectors)

    @rule(share=st.sampled_from([0.1, 0.9, 1.0]), strangers=st.booleans())
    def remove(self, share, strangers):
        gone = [i for i in self.model if self.rng.random() < share]
        unknown = [2**40 + 1, 2**40 + 2] if strangers else []
        self.rng.shuffle(gone)
        assert self.index.remove(unknown + gone) == len(gone)
        for i in gone:
            del self.model[i]

    @precondition(lambda self: self.model)
    @rule()
    def update(self):
        ids = [i for i in self.model if self.rng.random() < 0.3]
        self.rng.shuffle(ids)
        vectors = self.vectors(len(ids))
        self.index.update(ids, self.given(vectors))
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
        taken = [*ids, *list(self.model)[:1]] if self.model else [-1, *ids]
        with pytest.raises(ValueError, match=r"already|negative|twice"):
            self.index.add(self.vectors(len(taken)), taken)

    @invariant()
    def answers_like_the_dict(self):
        if not hasattr(self, "index"):
            return
        ids = np.array(sorted(self.model), np.int64)
        vectors = np.array([self.model[i] for i in ids], np.float32).reshape(len(ids), self.dim)
        rows = reference.pack(vectors)
        assert len(self.index) == len(ids)
        assert_same(self.index.ids, ids)

        queries = whole_vectors(self.rng, 3, self.dim)
        packed = reference.pack(queries)
        k = int(self.rng.choice([0, 1, 5, len(ids), len(ids) + 2]))
        want = expected_search(ids, rows, packed, k, self.metric)
        assert_same(tuple(self.index.search(queries, k)), want)
        radius = float(self.rng.integers(0, self.dim + 1)) / (self.dim if self.ties else 1)
        assert_same(
            self.index.range_search(packed, radius),
            expected_range(ids, rows, packed, radius, self.metric),
        )

        keep = self.rng.random(len(ids)) < 0.5
        want = expected_search(ids, rows, packed, k, self.metric, keep)
        assert_same(tuple(self.index.search(packed, k, filter=keep)), want)
        chosen = [*ids[keep], 2**50]  # an unknown one is passed over
        assert_same(tuple(self.index.search(packed, k, filter=chosen)), want)
        assert_same(
            self.index.range_search(packed, radius, filter=keep),
            expected_range(ids, rows, packed, radius, self.metric, keep),
        )

        if self.store is not None:
            assert_same(self.index.reconstruct(ids[::-1]), vectors[::-1])
            everything = max(1, len(ids))
            values = (queries.astype(np.float64) @ vectors.T.astype(np.float64)).astype(np.float32)
            want = reference.best(values, k, largest=True)[1]
            got = self.index.search(queries, k, rescore="store", oversample=everything)
            assert_same(got.ids, np.where(want >= 0, ids[want] if len(ids) else -1, -1))
        else:
            assert_same(self.index.reconstruct(ids), reference.unpack(rows, self.dim).astype("f4"))


def test_a_random_life(tmp_path):
    Life.folder = tmp_path
    Life.TestCase.settings = settings(
        max_examples=60, stateful_step_count=12, suppress_health_check=list(HealthCheck)
    )
    Life.TestCase("runTest").runTest()


# --- Search ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.sampled_from(CLASSES),
    st.sampled_from(METRICS),
    st.integers(1, 300),
    st.integers(0, 400),
    st.integers(0, 20),
    st.integers(0, 30),
    st.sampled_from(["random", "ties"]),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_search_is_exact(isa, threads, cls, metric, dim, n, nq, k, kind, t, seed):
    rng = np.random.default_rng(seed)
    threads(t)
    rows, queries = codes(rng, n, dim, kind), codes(rng, nq, dim)
    ids = rng.permutation(3 * n + 1)[:n]
    index = make(cls, dim, metric=metric)
    index.add(rows, ids)
    order = np.argsort(ids)
    want = expected_search(ids[order], rows[order], queries, k, metric)
    assert_same(tuple(index.search(queries, k)), want)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("oversample", [1, 3])
def test_rescoring_with_bits(rng, isa, cls, metric, oversample):
    rows, queries = codes(rng, 500, 100), rng.standard_normal((6, 100)).astype(np.float32)
    index = make(cls, 100, metric=metric)
    index.add(rows)
    k = 7
    got = index.search(queries, k, rescore="bits", oversample=oversample)
    scores = pentad.hamming.score(queries, rows)
    packed = pentad.hamming.pack(queries)
    _, candidates = reference.topk(packed, rows, k * oversample, metric)
    for q in range(len(queries)):
        ids = np.sort(candidates[q])
        best = ids[np.argsort(-scores[q, ids], kind="stable")][:k]
        assert_same(got.ids[q], best)
        assert_same(got.scores[q], scores[q, best])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("store", ["int8", "float16"])
def test_rescoring_with_stored_vectors(rng, isa, cls, store):
    vectors, queries = whole_vectors(rng, 300, 50), whole_vectors(rng, 5, 50)
    vectors[100:200] = vectors[:100]  # equal scores: the smaller id comes first
    index = make(cls, 50, store=store)
    index.add(vectors)
    got = index.search(queries, 20, rescore="store", oversample=15)
    want = reference.best((queries @ vectors.T).astype(np.float32), 20, largest=True)
    assert_same(tuple(got), want)
    keep = np.zeros(300, bool)
    keep[[5, 105, 7]] = True
    got = index.search(queries, 5, rescore="store", filter=keep)
    want = reference.best((queries @ vectors.T).astype(np.float32), 5, True, keep)
    assert_same(got.ids, want[1])
    assert (got.ids[:, 3:] == -1).all()
    assert (got.scores[:, 3:] == -np.inf).all()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("rescore", [None, "bits", "store"])
@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed"])
def test_queries_of_any_strides(rng, cls, rescore, layout):
    index = make(cls, 40, store="int8")
    index.add(rng.standard_normal((100, 40)))
    queries = rng.standard_normal((5, 40)).astype(np.float32)
    want = index.search(queries, 4, rescore=rescore)
    assert_same(tuple(index.search(laid_out(queries, layout), 4, rescore=rescore)), tuple(want))


@pytest.mark.parametrize("store", ["int8", "float16"])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4, 1e-30])
def test_stored_vectors_are_near_the_originals(rng, store, size):
    vectors = (rng.standard_normal((50, 33)) * size).astype(np.float32)
    vectors[7] = 0
    index = BinaryIndex(33, store=store)
    index.add(vectors)
    step = np.abs(vectors).max(1, keepdims=True) / 127
    if store == "float16":
        step = np.abs(vectors) * 2**-10 + 6e-8
    error = np.abs(index.reconstruct(np.arange(50)).astype(np.float64) - vectors)
    assert (error <= 0.5001 * step).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("largest", [1e-45, 1e-43, 2e-43, 1e-40, 3e38])
def test_stored_vectors_at_the_ends_of_float32(largest):
    vectors = np.array([[largest, -largest, 0]], np.float32)
    index = BinaryIndex(3, store="int8")
    index.add(vectors)
    got = index.reconstruct([0])
    assert np.isfinite(got).all()
    tiny = np.finfo(np.float32).tiny
    assert (np.abs(got - vectors) <= np.maximum(np.float32(largest) / 254, tiny)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cls", CLASSES)
def test_doubles_keep_their_signs(cls):
    doubles = np.array([[1e-60, -1e-60, 1e60, -1e60, 0, np.inf, -np.inf]])
    index = make(cls, 7)
    index.add(doubles)
    want = np.array([[1, -1, 1, -1, -1, 1, -1]], np.float32)
    assert_same(index.reconstruct([0]), want)
    assert index.search(doubles[:, :5].repeat(2, 1)[:, :7] * 0 + 1e-60, 1).scores.tolist() == [[4]]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("cls", CLASSES)
def test_large_adds_in_unaligned_pieces(rng, threads, cls, metric):
    threads(3)
    rows, queries = codes(rng, 10_000, 70), codes(rng, 4, 70)
    index = make(cls, 70, metric=metric)
    for first, last in ((0, 5), (5, 4999), (4999, 5000), (5000, 10_000)):
        index.add(rows[first:last])
    assert_same(tuple(index.search(queries, 20)), reference.topk(queries, rows, 20, metric))
    assert_same(index.reconstruct(index.ids), reference.unpack(rows, 70).astype(np.float32))


# --- What binary indexes alone refuse: test_index_errors.py has the rest --------------------------
# --- What binary indexes alone refuse: test_index_errors.py has the rest --------------------------
V = np.ones((2, 20), np.float32)
C = np.zeros((2, 3), np.uint8)
NAN = np.where(np.eye(2, 20), np.nan, 1).astype(np.float32)

REFUSED = {
    "add bytes": (lambda i: i.add(C[:, :2]), (ValueError, TypeError), "bytes"),
    "add padding": (lambda i: i.add(C | 1), (ValueError, TypeError), "padding|takes float"),
    "search padding": (lambda i: i.search(C | 1, 1), ValueError, "padding"),
    "search rescore codes": (lambda i: i.search(C, 1, rescore="bits"), TypeError, "float queries"),
    "rescored beyond memory": (lambda i: i.search(V, 2**42, rescore="bits"), MemoryError, None),
    "update padding": (lambda i: i.update([1, 2], C | 1), (ValueError, TypeError), None),
}


@pytest.mark.parametrize("store", [None, "int8"])
@pytest.mark.parametrize("cls", CLASSES)
def test_refused_calls_change_nothing(rng, cls, store):
    index = make(cls, 20, store=store)
    index.add(whole_vectors(rng, 10, 20))
    assert_unchanged_by_refusals(index, REFUSED.values(), whole_vectors(rng, 4, 20), 8)


def test_a_storing_index_takes_no_codes():
    for cls in CLASSES:
        index = make(cls, 20, store="int8")
        with pytest.raises(TypeError, match="takes float vectors, not codes"):
            index.add(C)
        index.add(V)
        with pytest.raises(TypeError, match="takes float vectors, not codes"):
            index.update([0, 1], C)
        with pytest.raises(ValueError, match="infinity"):
            index.add(V * np.inf)
        assert_same(index.reconstruct([0, 1]), V)


def test_rescoring_takes_no_codes():
    index = make(BinaryIndex, 20)
    index.add(V)
    with pytest.raises(TypeError, match="not codes"):
        index.rescore(C, np.zeros((2, 1), np.int64), by="bits")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BinaryIndex(0), ValueError, "dim is 0"),
        (lambda: BinaryIndex(8.0), TypeError, "dim is 8.0"),
        (lambda: BinaryIndex(65_473), ValueError, "at most 65472"),
        (lambda: BinaryIndex(10**18), ValueError, None),
        (lambda: BinaryIndex(8, metric="l2"), ValueError, "metric is 'l2'"),
        (lambda: BinaryIndex(8, store="int4"), ValueError, "store is 'int4'"),
        (lambda: BinaryIVFIndex(8, 0), ValueError, "lists is 0"),
        (lambda: BinaryIVFIndex(8, 2.5), TypeError, "lists is 2.5"),
        (lambda: BinaryIVFIndex(8, 4, nprobe=0), ValueError, "nprobe is 0"),
        (lambda: BinaryIVFIndex(8, 4).train(C[:, :1]), ValueError, "2 rows for 4 lists"),
        (lambda: BinaryIVFIndex(8, 1).train(V), ValueError, "20 columns"),
        (lambda: BinaryIVFIndex(20, 1).train(NAN), ValueError, "NaN"),
    ],
)
def test_bad_construction_and_training(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_widest_index(rng):
    index = BinaryIndex(65_472)
    rows = codes(rng, 3, 65_472)
    index.add(rows)
    assert_same(tuple(index.search(rows, 2)), reference.topk(rows, rows, 2))
