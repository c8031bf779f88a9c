# SPDX-License-Identifier: Apache-2.0
"""BinaryIndex and BinaryIVFIndex: against a dict and brute force, refusals, threads, files."""

import sys
import threading

import numpy as np
import pytest
from cases import METRICS, assert_same, codes, laid_out
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pentad
from pentad.hamming import BinaryIndex, BinaryIVFIndex, reference

STORES = (None, "int8", "float16")
CLASSES = (BinaryIndex, BinaryIVFIndex)


def make(cls, dim, *, rng=None, lists=5, **options):
    """An empty index, trained and exhaustive where it is an inverted one."""
    if cls is BinaryIndex:
        return BinaryIndex(dim, **options)
    index = BinaryIVFIndex(dim, lists, nprobe=lists, **options)
    index.train(codes(rng or np.random.default_rng(5), 40, dim))
    return index


def whole_vectors(rng, n, dim):
    """Vectors that int8 and float16 keep exactly: integers with 127 as the largest."""
    vectors = rng.integers(-5, 6, (n, dim)).astype(np.float32)
    vectors[:, 0] = np.where(rng.random(n) < 0.5, 127, -127)
    return vectors


def expected_search(ids, rows, queries, k, metric, keep=None):
    values, at = reference.topk(queries, rows, k, metric, keep)
    return values, np.where(at >= 0, ids[np.maximum(at, 0)] if len(ids) else -1, -1)


def expected_range(ids, rows, queries, radius, metric, keep=None):
    indptr, values, at = reference.range_search(queries, rows, radius, metric, keep)
    return indptr, values, ids[at]


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
    "search filter negative": (lambda i: i.search(V, 1, filter=[-1]), ValueError, "negative"),
    "search beyond memory": (lambda i: i.search(V, 2**42), MemoryError, None),
    "rescored beyond memory": (lambda i: i.search(V, 2**42, rescore="bits"), MemoryError, None),
    "range NaN": (lambda i: i.range_search(V, np.nan), ValueError, "radius is NaN"),
    "range queries": (lambda i: i.range_search(V[:, :5], 1), ValueError, "5 columns"),
    "range text": (lambda i: i.range_search(V, "x"), ValueError, None),
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
        (lambda: BinaryIndex(65_473), ValueError, "at most 8184"),
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


# --- Several threads ------------------------------------------------------------------------------


def run_beside(work, helpers):
    """Runs work() while each helper() repeats in a thread of its own; returns their results."""
    ended, results, errors = threading.Event(), [], []

    def repeat(helper):
        try:
            while True:
                last = ended.is_set()  # one more round after the end
                results.append(helper())
                if last:
                    return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(h,)) for h in helpers]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        ended.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert not errors, errors
    return results


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("rising", [True, False])
def test_searches_beside_adds_see_one_state(rng, cls, rising):
    dim, batch, batches, k = 40, 7, 60 if cls is BinaryIndex else 25, 6
    n = batch * batches
    vectors = rng.integers(-1, 2, (n, dim)).astype(np.float32)
    vectors[:, 0] = 127
    ids = np.arange(n) if rising else rng.permutation(n)
    queries = rng.standard_normal((5, dim)).astype(np.float32)
    packed = pentad.hamming.pack(queries)
    index = make(cls, dim, store="int8")

    wants = set()
    for size in range(0, n + 1, batch):
        order = np.argsort(ids[:size])
        rows = pentad.hamming.pack(vectors[:size][order])
        wants.add(
            b"".join(p.tobytes() for p in expected_search(ids[order], rows, packed, k, "hamming"))
        )

    def add():
        for first in range(0, n, batch):
            index.add(vectors[first : first + batch], ids[first : first + batch])

    def search():
        return "search", b"".join(part.tobytes() for part in index.search(queries, k))

    def rescore():
        scores, found = index.search(queries, k, rescore="store")
        exact = (queries.astype(np.float64) @ vectors.T.astype(np.float64))[
            np.arange(5)[:, None], np.argsort(ids)[np.maximum(found, 0)]
        ]
        return "rescore", np.abs(np.where(found >= 0, exact - scores, 0)).max()

    def reconstruct():
        known = index.ids
        return "vectors", (index.reconstruct(known) == vectors[np.argsort(ids)[known]]).all()

    def count():
        known = index.ids
        return "ids", len(known) % batch == 0 and len(np.unique(known)) == len(known)

    results = run_beside(add, [search, search, rescore, reconstruct, count])
    for kind, result in results:
        if kind == "search":
            assert result in wants
        elif kind == "rescore":
            assert result < 1e-3
        else:
            assert result
    assert len(index) == n


@pytest.mark.parametrize("cls", CLASSES)
def test_searches_beside_removals_and_updates_see_one_state(rng, cls):
    dim, n, k = 30, 200, 200
    old, new = codes(rng, n, dim), codes(rng, n, dim)
    index = make(cls, dim)
    index.add(old)
    query = codes(rng, 1, dim)
    old_d, new_d = (reference.distance(query, rows)[0] for rows in (old, new))

    def change():
        for i in range(0, n, 10):
            index.update(np.arange(i, i + 10), new[i : i + 10])
            index.remove(np.arange(i, i + 5))

    results = run_beside(change, [lambda: index.search(query, k)] * 3)
    for scores, ids in results:
        d, found = scores[0][ids[0] >= 0], ids[0][ids[0] >= 0]
        assert len(np.unique(found)) == len(found)
        assert (np.diff(d) >= 0).all()
        assert ((d == old_d[found]) | (d == new_d[found])).all()
        # Changes go upwards in tens: a state is new codes below some border, old ones above it.
        border = np.flatnonzero(d[np.argsort(found)] != new_d[np.sort(found)])
        if len(border):
            first_old = np.sort(found)[border[0]] // 10 * 10
            above = np.sort(found)[np.sort(found) >= first_old]
            assert (d[np.argsort(found)][np.sort(found) >= first_old] == old_d[above]).all()
            assert set(above) == set(range(first_old, n))


def interrupted(call, change, at):
    """call(), with change() made just before its at-th bytecode in the modules of the indexes.

    Returns what call() gave or raised, and whether it lasted that long. What another thread may do
    at any moment is done here at every moment in turn.
    """
    left = [at]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.endswith(("hamming/index.py", "hamming/ivf.py")):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left[0] -= 1
            if left[0] == 0:
                change()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = call()
    except ValueError as error:
        result = str(error)
    finally:
        sys.settrace(before)
    return result, left[0] <= 0


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("change", ["append", "insert", "remove", "update"])
@pytest.mark.parametrize(
    "call", ["search", "rescored", "filter", "range", "rescore", "reconstruct", "ids"]
)
def test_a_change_at_any_moment(rng, cls, call, change):
    """Each result is that of the state before or of the one after, never of a mixture."""
    vectors, new = whole_vectors(rng, 40, 12), whole_vectors(rng, 40, 12)
    queries = vectors[:2] + 0
    changes = {
        "append": lambda index: index.add(new[:30], np.arange(100, 130)),
        "insert": lambda index: index.add(new[:30], np.arange(30)),
        "remove": lambda index: index.remove(np.arange(30, 50)),
        "update": lambda index: index.update(np.arange(30, 60), new[:30]),
    }
    calls = {
        "search": lambda index: tuple(index.search(queries, 5)),
        "rescored": lambda index: tuple(index.search(queries, 5, rescore="store")),
        "rescore": lambda index: tuple(index.rescore(queries, np.array([[31, 60, 45, 2]] * 2))),
        "filter": lambda index: tuple(index.search(queries, 5, filter=[31, 45, 60, 69, 101, 3])),
        "range": lambda index: tuple(index.range_search(queries, 6)),
        "reconstruct": lambda index: (index.reconstruct([60, 31, 45, 69]),),
        "ids": lambda index: (index.ids + 0,),
    }

    def fresh():
        index = make(cls, 12, store="int8")
        index.add(vectors, np.arange(30, 70))
        return index

    def bits(result):
        return result if isinstance(result, str) else [part.tobytes() for part in result]

    states = [fresh(), fresh()]
    changes[change](states[1])
    wants = [bits(interrupted(lambda s=s: calls[call](s), None, -1)[0]) for s in states]
    assert wants[0] != wants[1] or call in ("ids", "reconstruct")
    at, lasted = 1, True
    while lasted:
        index = fresh()
        result, lasted = interrupted(
            lambda i=index: calls[call](i), lambda i=index: changes[change](i), at
        )
        assert bits(result) in wants, at
        at += 1 if call in ("ids", "reconstruct") else 7
    assert at > 5


@pytest.mark.parametrize("cls", CLASSES)
def test_adds_from_several_threads_all_arrive(rng, cls):
    rows = codes(rng, 400, 50)
    index = make(cls, 50)

    def add(part):
        for i in range(part * 100, part * 100 + 100, 20):
            index.add(rows[i : i + 20], np.arange(i, i + 20))

    threads = [threading.Thread(target=add, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.ids.tolist() == list(range(400))
    assert_same(tuple(index.search(rows[:9], 5)), reference.topk(rows[:9], rows, 5))


@pytest.mark.parametrize("cls", CLASSES)
def test_automatic_ids_from_several_threads_are_unique(rng, cls):
    rows = codes(rng, 5, 50)
    index = make(cls, 50)
    threads = [
        threading.Thread(target=lambda: [index.add(rows) for _ in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.ids.tolist() == list(range(200))


def test_a_save_beside_adds_is_one_state(rng, tmp_path, monkeypatch):
    """An add fills up the last block in place; it must not do so between checksum and write."""
    rows = codes(rng, 100, 30)
    index = BinaryIndex(30)
    index.add(rows[:40])
    checksum, adders = pentad._file.zlib.crc32, []

    def checksum_and_add(data):
        value = checksum(data)
        if not adders:
            adders.append(threading.Thread(target=index.add, args=(rows[40:41],)))
            adders[0].start()
            adders[0].join(timeout=0.3)  # either it waits for the save or it is done
        return value

    monkeypatch.setattr(pentad._file.zlib, "crc32", checksum_and_add)
    index.save(tmp_path / "x")
    monkeypatch.undo()
    adders[0].join()
    loaded = BinaryIndex.load(tmp_path / "x")
    assert len(loaded) == 40
    assert_same(tuple(loaded.search(rows[:9], 5)), reference.topk(rows[:9], rows[:40], 5))
    assert len(index) == 41


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("metric", METRICS)
def test_round_trip(rng, tmp_path, cls, store, metric):
    path = tmp_path / "x.pentad"
    rescore = "bits" if store is None else "store"
    for n, mmap in [(0, True), (1, True), (32, False), (77, True), (77, False)]:
        index = make(cls, 50, metric=metric, store=store)
        vectors = whole_vectors(rng, n + 5, 50)
        index.add(vectors[:n], rng.permutation(1000)[:n])
        index.save(path)
        loaded = cls.load(path, mmap=mmap)
        assert (loaded.dim, loaded.metric, loaded.store) == (50, metric, store)
        assert len(loaded) == n
        for options in ({}, {"rescore": rescore}, {"filter": index.ids[::2]}):
            assert_same(
                tuple(loaded.search(vectors[:3], 4, **options)),
                tuple(index.search(vectors[:3], 4, **options)),
            )
        before = path.read_bytes()
        first = index.ids[:2].tolist()
        for changed in (index, loaded):  # a loaded index can be changed; its file cannot
            changed.add(vectors[n:])
            changed.remove(first)
            changed.update(changed.ids[:1], vectors[:1])
        assert_same(tuple(loaded.search(vectors, 9)), tuple(index.search(vectors, 9)))
        assert path.read_bytes() == before
        loaded.save(path)  # over the file that it is mapped from
        assert_same(tuple(cls.load(path).search(vectors, 9)), tuple(index.search(vectors, 9)))


def test_loading_another_kind(tmp_path):
    make(BinaryIVFIndex, 8).save(tmp_path / "x")
    with pytest.raises(pentad.FormatError, match=r"holds 'hamming\.BinaryIVFIndex', expected"):
        BinaryIndex.load(tmp_path / "x")


@pytest.mark.parametrize("cls", CLASSES)
def test_damaged_files_are_refused(rng, tmp_path, cls):
    index = make(cls, 30, metric="jaccard", store="int8")
    index.add(whole_vectors(rng, 40, 30))
    path = tmp_path / "x"
    index.save(path)
    data = path.read_bytes()
    want = tuple(index.search(np.ones((2, 30), np.float32), 40, rescore="store"))
    for at in rng.integers(0, len(data), 150):
        bent = bytearray(data)
        bent[at] ^= 1 << rng.integers(8)
        path.write_bytes(bent)
        try:
            loaded = cls.load(path)
        except pentad.FormatError:
            continue
        # Only the gaps between the sections are free to change.
        got = loaded.search(np.ones((2, 30), np.float32), 40, rescore="store")
        assert_same(tuple(got), want)
    for length in rng.integers(0, len(data), 50):
        path.write_bytes(data[:length])
        with pytest.raises(pentad.FormatError):
            cls.load(path)


@pytest.mark.parametrize("cls", CLASSES)
def test_unverified_damage_never_crashes(rng, tmp_path, cls):
    index = make(cls, 30, metric="jaccard", store="int8")
    index.add(whole_vectors(rng, 90, 30))
    path = tmp_path / "x"
    index.save(path)
    data = path.read_bytes()
    queries = np.ones((2, 30), np.float32)
    for at in rng.integers(0, len(data), 150):
        bent = bytearray(data)
        bent[at : at + 8] = rng.bytes(len(bent[at : at + 8]))
        path.write_bytes(bent)
        try:
            loaded = cls.load(path, verify=False)
            loaded.search(queries, 5, rescore="store", filter=loaded.ids[:5])
            loaded.range_search(queries, 0.5)
            loaded.reconstruct(loaded.ids[:9])
        except ValueError:
            pass


@pytest.mark.parametrize("cls", CLASSES)
def test_sections_that_do_not_fit_are_refused(rng, cls):
    index = make(cls, 30, metric="jaccard", store="int8")
    index.add(whole_vectors(rng, 40, 30))
    meta, arrays = index.to_sections()
    cls.from_sections(meta, arrays)
    for name in arrays:
        if name == "centroids":
            continue  # an untrained index has none
        missing = {k: v for k, v in arrays.items() if k != name}
        with pytest.raises(pentad.FormatError):
            cls.from_sections(meta, missing)
    for name, array in arrays.items():
        wrong = (array[:-1], array[None], array.astype(np.float64), np.zeros((), array.dtype))
        for other in wrong:
            with pytest.raises(pentad.FormatError):
                cls.from_sections(meta, arrays | {name: other})
    for key in meta:
        with pytest.raises(pentad.FormatError):
            cls.from_sections({k: v for k, v in meta.items() if k != key}, arrays)
        for value in (None, -1, "x", [1], 10**30, 0):
            if (key, value) in (("store", None), ("nprobe", 10**30)):
                continue  # which are fine
            with pytest.raises(pentad.FormatError):
                cls.from_sections(meta | {key: value}, arrays)
    with pytest.raises(pentad.FormatError):
        cls.from_sections(meta | {"dim": 99}, arrays)
    with pytest.raises(pentad.FormatError):
        cls.from_sections(meta | {"store": None}, arrays)
    with pytest.raises(pentad.FormatError):
        cls.from_sections(meta | {"metric": "hamming"}, arrays)
    swapped = arrays["ids"].copy()
    swapped[:2] = swapped[0]
    with pytest.raises(pentad.FormatError):
        cls.from_sections(meta, arrays | {"ids": swapped})
    swapped[0] = -5
    with pytest.raises(pentad.FormatError):
        cls.from_sections(meta, arrays | {"ids": swapped})


# --- The inverted index ---------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nprobe", [1, 3, 12, 100])
def test_probed_lists_are_searched_exactly(rng, isa, metric, nprobe):
    rows, queries = codes(rng, 900, 60), codes(rng, 9, 60)
    index = BinaryIVFIndex(60, 12, metric=metric, nprobe=2)
    index.train(rows[:300])
    index.add(rows)
    home = reference.topk(rows, index.centroids, 1)[1][:, 0]
    visited = reference.topk(queries, index.centroids, min(nprobe, 12))[1]
    chosen = rng.random(900) < 0.5
    for keep in (None, chosen):
        found = index.search(queries, 15, nprobe=nprobe, filter=keep)
        hits = index.range_search(queries, 20, nprobe=nprobe, filter=keep)
        for q in range(len(queries)):
            allowed = np.isin(home, visited[q]) & (True if keep is None else keep)
            want = reference.topk(queries[q : q + 1], rows, 15, metric, allowed)
            assert_same((found.scores[q : q + 1], found.ids[q : q + 1]), want)
            _, values, ids = reference.range_search(queries[q : q + 1], rows, 20, metric, allowed)
            part = slice(hits[0][q], hits[0][q + 1])
            assert_same((hits[1][part], hits[2][part]), (values, ids))
    index.nprobe = nprobe
    assert_same(tuple(index.search(queries, 15)), tuple(index.search(queries, 15, nprobe=nprobe)))
    with pytest.raises(ValueError, match="nprobe is 0"):
        index.search(queries, 1, nprobe=0)


def test_nprobe_is_checked_when_set(tmp_path):
    index = make(BinaryIVFIndex, 16)
    for value, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="nprobe is"):
            index.nprobe = value
    index.nprobe = np.int64(3)
    index.save(tmp_path / "x")
    assert BinaryIVFIndex.load(tmp_path / "x").nprobe == 3


def test_training_is_deterministic_and_helps(rng):
    centres = codes(rng, 8, 128)
    noise = np.packbits(rng.random((800, 128)) < 0.08, axis=1)
    rows = centres[rng.integers(0, 8, 800)] ^ noise

    def cost(index):
        return int(reference.distance(rows, index.centroids).min(1).sum())

    fitted = []
    for seed, iterations in ((0, 10), (0, 10), (1, 10), (0, 0)):
        index = BinaryIVFIndex(128, 8)
        index.train(rows, seed=seed, iterations=iterations)
        fitted.append(index)
    assert_same(fitted[0].centroids, fitted[1].centroids)
    assert cost(fitted[0]) < cost(fitted[3])
    index = fitted[0]
    index.add(rows)
    exact = BinaryIndex(128)
    exact.add(rows)
    same = index.search(rows[:50], 10, nprobe=2).ids == exact.search(rows[:50], 10).ids
    assert same.mean() > 0.7


@pytest.mark.parametrize("rows", [1, 3])
def test_training_on_few_distinct_rows(rng, rows):
    distinct = codes(rng, rows, 40)
    index = BinaryIVFIndex(40, 6, nprobe=6)
    index.train(distinct[rng.integers(0, rows, 30)])
    index.add(np.repeat(distinct, 4, 0))
    want = reference.topk(distinct, np.repeat(distinct, 4, 0), 5)
    assert_same(tuple(index.search(distinct, 5)), want)


def test_training_again_needs_an_empty_index(rng):
    index = make(BinaryIVFIndex, 16)
    rows = codes(rng, 20, 16)
    index.add(rows)
    centroids = index.centroids.copy()
    with pytest.raises(ValueError, match="already holds 20 rows"):
        index.train(rows)
    assert_same(index.centroids, centroids)
    assert_same(tuple(index.search(rows, 2)), reference.topk(rows, rows, 2))
    index.remove(range(20))
    index.train(rows)
    index.add(rows)
    assert len(index) == 20


def test_an_untrained_index_survives_its_file(tmp_path, rng):
    BinaryIVFIndex(16, 3).save(tmp_path / "x")
    index = BinaryIVFIndex.load(tmp_path / "x")
    with pytest.raises(ValueError, match="not trained"):
        index.search(codes(rng, 1, 16), 1)
    index.train(codes(rng, 5, 16))
    index.add(codes(rng, 5, 16))
    assert len(index) == 5


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
