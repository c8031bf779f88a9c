# SPDX-License-Identifier: Apache-2.0
"""BinaryIndex and BinaryIVFIndex: against a dict and brute force, and what they refuse."""

import copy
import pickle

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


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_input_of_every_dtype(rng, cls, dtype):
    vectors = whole_vectors(rng, 30, 20)
    index = make(cls, 20, store="int8")
    index.add(vectors.astype(dtype))
    assert_same(index.reconstruct(np.arange(30)), vectors)
    want = index.search(vectors, 3, rescore="store")
    assert_same(tuple(index.search(vectors.astype(dtype), 3, rescore="store")), tuple(want))


@pytest.mark.parametrize("cls", CLASSES)
def test_torch_comes_back_as_torch(rng, cls):
    torch = pytest.importorskip("torch")
    vectors = whole_vectors(rng, 60, 20)
    index, other = make(cls, 20, store="int8"), make(cls, 20, store="int8")
    ids = np.arange(60)[::-1].copy()
    index.add(vectors, ids)
    leaf = torch.nn.Parameter(torch.from_numpy(vectors))
    other.add(leaf, torch.from_numpy(ids))
    for rescore in (None, "bits", "store"):
        want = index.search(vectors[:4], 3, rescore=rescore)
        got = other.search(leaf[:4], 3, rescore=rescore, filter=torch.ones(60, dtype=torch.bool))
        assert all(isinstance(part, torch.Tensor) for part in got)
        assert_same(tuple(part.numpy() for part in got), tuple(want))
    got = other.range_search(torch.from_numpy(vectors[:4]), 3, filter=torch.arange(60))
    assert all(isinstance(part, torch.Tensor) for part in got)
    assert_same(tuple(p.numpy() for p in got), index.range_search(vectors[:4], 3))
    negated = torch.from_numpy(vectors)._neg_view()
    assert_same(other.search(negated, 1).ids.numpy(), index.search(-vectors, 1).ids)
    assert_same(
        other.search(torch.from_numpy(vectors).bfloat16(), 2, rescore="store").scores.numpy(),
        index.search(vectors, 2, rescore="store").scores,
    )
    other.update(torch.tensor([5]), -leaf[:1])
    assert_same(other.reconstruct(torch.tensor([5])), -vectors[:1])
    assert other.remove(torch.tensor([1, 2, 999])) == 2


@pytest.mark.parametrize("cls", CLASSES)
def test_automatic_ids_follow_the_largest_present(rng, cls):
    index = make(cls, 16)
    index.add(codes(rng, 3, 16), [7, 2, 100])
    index.add(codes(rng, 2, 16))
    assert index.ids.tolist() == [2, 7, 100, 101, 102]
    index.remove([101])
    index.add(codes(rng, 1, 16))
    assert index.ids.tolist() == [2, 7, 100, 102, 103]


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


@pytest.mark.parametrize("cls", CLASSES)
def test_an_id_may_be_reconstructed_twice(rng, cls):
    vectors = whole_vectors(rng, 9, 20)
    index = make(cls, 20, store="float16")
    index.add(vectors)
    assert_same(index.reconstruct([3, 3, 0, 3]), vectors[[3, 3, 0, 3]])


@pytest.mark.parametrize("cls", CLASSES)
def test_the_largest_id(rng, cls):
    rows = codes(rng, 2, 16)
    index = make(cls, 16)
    index.add(rows[:1], np.array([2**63 - 1], np.uint64))
    assert index.search(rows[:1], 1).ids.tolist() == [[2**63 - 1]]
    with pytest.raises(ValueError, match="no 1 ids are left"):
        index.add(rows[1:])
    assert index.ids.tolist() == [2**63 - 1]
    index.add(rows[:0])
    assert len(index) == 1


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_index_answers(cls, metric):
    index = make(cls, 24, metric=metric, store="int8")
    queries = np.ones((2, 24), np.float32)
    worst = {"hamming": 2**31 - 1, "and": -1, "jaccard": np.inf}[metric]
    for k in (0, 3):
        for filter in (None, [], np.zeros(0, bool), [4]):
            scores, ids = index.search(queries, k, filter=filter)
            assert_same(ids, np.full((2, k), -1, np.int64))
            assert (scores == worst).all()
            assert scores.shape == (2, k)
            for rescore in ("bits", "store"):
                scores, ids = index.search(queries, k, rescore=rescore, filter=filter)
                assert_same(ids, np.full((2, k), -1, np.int64))
                assert_same(scores, np.full((2, k), -np.inf, np.float32))
    indptr, values, ids = index.range_search(queries, 100)
    assert indptr.tolist() == [0, 0, 0]
    assert len(values) == len(ids) == 0
    assert index.remove([1, 2]) == 0
    index.add(np.zeros((0, 24), np.float32))
    index.update([], np.zeros((0, 24), np.float32))
    assert index.reconstruct([]).shape == (0, 24)
    assert index.search(queries[:0], 3).ids.shape == (0, 3)
    assert len(index) == 0
    assert index.ids.tolist() == []


def test_ids_cannot_be_written(rng):
    for cls in CLASSES:
        index = make(cls, 8)
        index.add(codes(rng, 3, 8))
        with pytest.raises(ValueError, match="read-only"):
            index.ids[0] = 5


def test_what_was_given_may_change_afterwards(rng):
    for cls in CLASSES:
        vectors = whole_vectors(rng, 20, 10)
        ids = np.arange(20)
        index = make(cls, 10, store="float16")
        index.add(vectors, ids)
        want = vectors.copy()
        vectors[:] = 0
        ids[:] = 0
        assert index.ids.tolist() == list(range(20))
        assert_same(index.reconstruct(index.ids), want)


@pytest.mark.parametrize("cls", [BinaryIndex, BinaryIVFIndex])
@pytest.mark.parametrize("by", ["bits", "store"])
def test_rescoring_apart_equals_rescoring_within(cls, by):
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((300, 70)).astype(np.float32)
    index = cls(70, store="int8") if cls is BinaryIndex else cls(70, 4, store="int8", nprobe=4)
    if cls is BinaryIVFIndex:
        index.train(vectors)
    index.add(vectors, rng.permutation(1000)[:300])
    within = index.search(vectors[:9], 6, rescore=by, oversample=5)
    apart = index.rescore(vectors[:9], index.search(vectors[:9], 30).ids, by=by)
    assert (apart.ids[:, :6] == within.ids).all()
    assert (apart.scores[:, :6] == within.scores).all()
    found = index.search(vectors[:9], 30).ids
    for layout in ("fortran", "reversed", "strided"):
        again = index.rescore(laid_out(vectors[:9], layout), laid_out(found, layout), by=by)
        assert_same(tuple(again), tuple(apart))
    assert index.rescore(vectors[:9], found[:, :0], by=by).ids.shape == (9, 0)
    assert index.rescore(vectors[:0], found[:0], by=by).ids.shape == (0, 30)
    some = index.rescore(vectors[:1], np.array([[-1, 2000, index.ids[7]]]), by=by)
    assert some.ids.tolist() == [[index.ids[7], -1, -1]]
    assert some.scores[0, 1:].tolist() == [-np.inf, -np.inf]


def test_rescore_refuses():
    index = BinaryIndex(16)
    index.add(np.ones((3, 16), np.float32))
    query, ids = np.ones((2, 16), np.float32), np.zeros((2, 1), np.int64)
    with pytest.raises(ValueError, match="store=None"):
        index.rescore(query, ids)
    with pytest.raises(ValueError, match="by is 'best'"):
        index.rescore(query, ids, by="best")
    with pytest.raises(TypeError, match="not codes"):
        index.rescore(np.zeros((2, 2), np.uint8), ids, by="bits")
    with pytest.raises(TypeError, match="int32"):
        index.rescore(query, ids.astype(np.int32), by="bits")
    with pytest.raises(ValueError, match=r"expected \(2, c\)"):
        index.rescore(query, ids[:1], by="bits")


# --- Refusals -------------------------------------------------------------------------------------

V = np.ones((2, 20), np.float32)
C = np.zeros((2, 3), np.uint8)
NAN = np.where(np.eye(2, 20), np.nan, 1).astype(np.float32)

REFUSED = {
    "add columns": (lambda i: i.add(V[:, :19]), ValueError, "19 columns"),
    "add bytes": (lambda i: i.add(C[:, :2]), (ValueError, TypeError), "bytes"),
    "add rank": (lambda i: i.add(V[0]), ValueError, "shape"),
    "add dtype": (lambda i: i.add(V.astype(np.int32)), TypeError, "dtype int32"),
    "add objects": (lambda i: i.add(V.astype(object)), TypeError, "dtype object"),
    "add structures": (lambda i: i.add(np.zeros((2, 20), [("a", "f4")])), TypeError, "dtype"),
    "add big-endian": (lambda i: i.add(V.astype(">f4")), TypeError, "dtype >f4"),
    "add a list": (lambda i: i.add([[1.0] * 20]), TypeError, "is list"),
    "add None": (lambda i: i.add(None), TypeError, "vectors is NoneType"),
    "add NaN": (lambda i: i.add(NAN), ValueError, "NaN"),
    "add padding": (lambda i: i.add(C | 1), (ValueError, TypeError), "padding|takes float"),
    "add ids length": (lambda i: i.add(V, [90]), ValueError, "1 ids for 2 rows"),
    "add ids twice": (lambda i: i.add(V, [90, 90]), ValueError, "90 is given twice"),
    "add ids taken": (lambda i: i.add(V, [90, 4]), ValueError, "id 4 is already"),
    "add ids negative": (lambda i: i.add(V, [90, -1]), ValueError, "-1 is negative"),
    "add ids float": (lambda i: i.add(V, [90.0, 91.0]), TypeError, "dtype float64"),
    "add ids bool": (lambda i: i.add(V, [True, False]), TypeError, "dtype bool"),
    "add ids text": (lambda i: i.add(V, ["a", "b"]), TypeError, "dtype"),
    "add ids rank": (lambda i: i.add(V, [[90, 91]]), ValueError, "one dimension"),
    "add ids scalar": (lambda i: i.add(V, 90), ValueError, "one dimension"),
    "add ids huge": (lambda i: i.add(V, np.array([90, 2**63], "u8")), ValueError, "exceeds"),
    "add ids beyond": (lambda i: i.add(V, [90, 2**64]), TypeError, "dtype object"),
    "search k": (lambda i: i.search(V, -1), ValueError, "k is -1"),
    "search float k": (lambda i: i.search(V, 1.0), TypeError, "k is 1.0"),
    "search columns": (lambda i: i.search(V[:, :5], 1), ValueError, "5 columns"),
    "search rank": (lambda i: i.search(V[0], 1), ValueError, "shape"),
    "search NaN": (lambda i: i.search(NAN, 1), ValueError, "NaN"),
    "search infinity": (lambda i: i.search(V * np.inf, 1), ValueError, "infinity"),
    "search padding": (lambda i: i.search(C | 1, 1), ValueError, "padding"),
    "search list": (lambda i: i.search([[0, 0, 0]], 1), TypeError, "is list"),
    "search rescore": (lambda i: i.search(V, 1, rescore="all"), ValueError, "rescore is 'all'"),
    "search rescore codes": (lambda i: i.search(C, 1, rescore="bits"), TypeError, "float queries"),
    "search oversample": (lambda i: i.search(V, 1, oversample=0), ValueError, "oversample is 0"),
    "search oversample type": (lambda i: i.search(V, 1, oversample=1.5), TypeError, "oversample"),
    "search filter length": (
        lambda i: i.search(V, 1, filter=np.ones(3, bool)),
        ValueError,
        "filter",
    ),
    "search filter rank": (
        lambda i: i.search(V, 1, filter=np.ones((10, 1), bool)),
        ValueError,
        "filter",
    ),
    "search filter float": (lambda i: i.search(V, 1, filter=[1.5]), TypeError, "dtype float64"),
    "search filter negative": (lambda i: i.search(V, 1, filter=[-2]), ValueError, "negative"),
    "search beyond memory": (lambda i: i.search(V, 2**42), MemoryError, None),
    "rescored beyond memory": (lambda i: i.search(V, 2**42, rescore="bits"), MemoryError, None),
    "range NaN": (lambda i: i.range_search(V, np.nan), ValueError, "radius is NaN"),
    "range queries": (lambda i: i.range_search(V[:, :5], 1), ValueError, "5 columns"),
    "range text": (lambda i: i.range_search(V, "x"), TypeError, "radius is 'x'"),
    "remove twice": (lambda i: i.remove([1, 1]), ValueError, "1 is given twice"),
    "remove negative": (lambda i: i.remove([-1]), ValueError, "negative"),
    "remove float": (lambda i: i.remove([1.0]), TypeError, "dtype float64"),
    "remove scalar": (lambda i: i.remove(1), ValueError, "one dimension"),
    "update unknown": (lambda i: i.update([1, 99], V), ValueError, "99 is not in the index"),
    "update length": (lambda i: i.update([1], V), ValueError, r"update\] 1 ids for 2 rows"),
    "update twice": (lambda i: i.update([1, 1], V), ValueError, "given twice"),
    "update columns": (lambda i: i.update([1, 2], V[:, :3]), ValueError, r"update\].*3 columns"),
    "update NaN": (lambda i: i.update([1, 2], NAN), ValueError, "NaN"),
    "update dtype": (lambda i: i.update([1, 2], V.astype(int)), TypeError, "dtype int64"),
    "update padding": (lambda i: i.update([1, 2], C | 1), (ValueError, TypeError), None),
    "reconstruct unknown": (lambda i: i.reconstruct([99]), ValueError, "99 is not in the index"),
    "reconstruct scalar": (lambda i: i.reconstruct(1), ValueError, "one dimension"),
    "save nowhere": (lambda i: i.save("/nonexistent/folder/x"), FileNotFoundError, None),
}


@pytest.mark.parametrize("store", [None, "int8"])
@pytest.mark.parametrize("cls", CLASSES)
def test_refused_calls_change_nothing(rng, cls, store):
    index = make(cls, 20, store=store)
    index.add(whole_vectors(rng, 10, 20))
    queries = whole_vectors(rng, 4, 20)

    def state():
        _, arrays = index.to_sections()
        found = tuple(index.search(queries, 12)) + tuple(index.range_search(queries, 8))
        return (*found, index.ids, *(a.copy() for a in arrays.values()))

    before = state()
    for call, error, message in REFUSED.values():
        with pytest.raises(error, match=message):
            call(index)
        assert_same(state(), before)


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


def test_rescoring_by_what_was_not_stored():
    for cls in CLASSES:
        with pytest.raises(ValueError, match="store=None"):
            make(cls, 20).search(V, 1, rescore="store")


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
        (lambda: BinaryIVFIndex(8, 4).search(C[:, :1], 1), ValueError, "not trained"),
        (lambda: BinaryIVFIndex(8, 4).range_search(C[:, :1], 1), ValueError, "not trained"),
        (lambda: BinaryIVFIndex(8, 4).add(C[:, :1]), ValueError, "not trained"),
        (lambda: BinaryIVFIndex(8, 4).update([], C[:0, :1]), ValueError, "not trained"),
        (lambda: BinaryIVFIndex(8, 4).train(C[:, :1]), ValueError, "2 rows for 4 lists"),
        (lambda: BinaryIVFIndex(8, 1).train(V), ValueError, "20 columns"),
        (lambda: BinaryIVFIndex(20, 1).train(NAN), ValueError, "NaN"),
    ],
)
def test_bad_construction_and_order_of_use(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_widest_index(rng):
    index = BinaryIndex(65_472)
    rows = codes(rng, 3, 65_472)
    index.add(rows)
    assert_same(tuple(index.search(rows, 2)), reference.topk(rows, rows, 2))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda i: pickle.loads(pickle.dumps(i))])
def test_copies_are_independent(how):
    rng = np.random.default_rng(6)
    index = BinaryIndex(64)
    index.add(rng.integers(0, 256, (10, 8), dtype=np.uint8))
    index.add(rng.integers(0, 256, (10, 8), dtype=np.uint8))  # leaves room in the last block
    other = how(index)
    rows = index.codes()
    index.add(np.full((1, 8), 1, np.uint8))
    other.add(np.full((1, 8), 2, np.uint8))
    assert (index.codes() == np.vstack([rows, np.full((1, 8), 1)])).all()
    assert (other.codes() == np.vstack([rows, np.full((1, 8), 2)])).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_results_of_a_search_may_filter_another(cls):
    index = make(cls, 8)
    index.add(np.array([[1], [2], [4]], np.uint8))
    found = index.search(np.array([[1]], np.uint8), 5).ids  # ends with -1
    again = index.search(np.array([[1]], np.uint8), 5, filter=found[0])
    assert (again.ids == found).all()
