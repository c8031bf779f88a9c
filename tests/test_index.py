# SPDX-License-Identifier: Apache-2.0
"""What every kind of index does alike: ids, empty ones, copies, torch, training, rescoring."""

import copy
import pickle

import numpy as np
import pytest
from cases import assert_same, laid_out
from index_cases import KINDS, arrays_of, bits, each_file, each_kind

import pentad

DENSE = [kind for kind in KINDS.values() if kind.stores]
each_dense = pytest.mark.parametrize("kind", DENSE, ids=[kind.cls.__name__ for kind in DENSE])
TRAINED = [KINDS[name] for name in ("binary lists", "pq", "pq lists")]
each_trained = pytest.mark.parametrize("kind", TRAINED, ids=[k.cls.__name__ for k in TRAINED])


def pickled(index):
    return pickle.loads(pickle.dumps(index))


@each_kind
def test_automatic_ids_follow_the_largest_present(rng, kind):
    index, vectors = kind.full(), kind.draw(rng, 6)
    index.add(kind.part(vectors, range(3)), [7, 2, 100])
    index.add(kind.part(vectors, [3, 4]))
    assert index.ids.tolist() == [2, 7, 100, 101, 102]
    index.remove([101])
    index.add(kind.part(vectors, [5]))
    assert index.ids.tolist() == [2, 7, 100, 102, 103]


@each_kind
def test_the_largest_id(rng, kind):
    vectors = kind.draw(rng, 2)
    index = kind.filled(kind.part(vectors, [0]), np.array([2**63 - 1], np.uint64))
    assert index.search(kind.part(vectors, [0]), 1).ids.tolist() == [[2**63 - 1]]
    with pytest.raises(ValueError, match="no 1 ids are left"):
        index.add(kind.part(vectors, [1]))
    index.add(kind.part(vectors, []))
    assert index.ids.tolist() == [2**63 - 1]


# The score where there is no row, by metric; None: an inner product of sparse vectors.
WORST = {"hamming": 2**31 - 1, "and": -1, "jaccard": np.inf}
WORST |= {"l2": np.inf, "ip": -np.inf, "cosine": -np.inf, None: -np.inf}


@each_file
def test_an_empty_index_answers(rng, kind, options):
    index, queries = kind.make(**options), kind.draw(rng, 2)
    none, rescores = kind.part(queries, []), [{}]
    if getattr(index, "store", None):
        rescores += [{"rescore": by} for by in index._by]
    worst, binary = WORST[options.get("metric")], kind.cls._kind.startswith("hamming")
    for k in (0, 3):
        for filter in (None, [], np.zeros(0, bool), [4]):
            for rescore in rescores:
                scores, ids = index.search(queries, k, filter=filter, **rescore)
                assert_same(ids, np.full((2, k), -1, np.int64))
                assert scores.shape == (2, k)
                assert (scores == (-np.inf if rescore and binary else worst)).all()
    indptr, scores, ids = index.range_search(queries, 100)
    assert indptr.tolist() == [0, 0, 0]
    assert len(scores) == len(ids) == 0
    assert index.remove([1, 2]) == 0
    index.add(none)
    index.update([], none)
    assert bits(index.reconstruct([])) == bits(index.reconstruct(index.ids))
    assert index.search(none, 3).ids.shape == (0, 3)
    assert index.range_search(none, 3)[0].tolist() == [0]
    if len(rescores) > 1 or not kind.stores:
        assert index.rescore(none, np.zeros((0, 4), np.int64)).ids.shape == (0, 4)
    if kind.stores:
        assert len(index.codes()) == 0
    assert len(index) == 0
    assert_same(index.ids, np.zeros(0, np.int64))


@each_file
def test_the_index_and_the_caller_share_no_arrays(rng, kind, options):
    vectors, ids = kind.draw(rng, 20), np.arange(20)
    index = kind.filled(vectors, ids, **options)
    want = bits(index.reconstruct(index.ids))
    for array in (*arrays_of(vectors), ids, *arrays_of(index.reconstruct(index.ids))):
        array[...] = 0
    assert index.ids.tolist() == list(range(20))
    assert bits(index.reconstruct(index.ids)) == want
    with pytest.raises(ValueError, match="read-only"):
        index.ids[0] = 5


@each_kind
def test_an_id_may_be_reconstructed_twice(rng, kind):
    vectors = kind.draw(rng, 9)
    index = kind.filled(vectors, np.arange(9))
    want = kind.filled(kind.part(vectors, [3, 3, 0, 3]), np.arange(4)).reconstruct(range(4))
    assert bits(index.reconstruct([3, 3, 0, 3])) == bits(want)


@each_kind
def test_results_of_a_search_may_filter_another(rng, kind):
    vectors = kind.draw(rng, 3)
    index = kind.filled(vectors, [3, 1, 7])
    found = index.search(kind.part(vectors, [0]), 5).ids  # ends with -1
    assert_same(index.search(kind.part(vectors, [0]), 5, filter=found[0]).ids, found)


@each_file
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickled])
def test_copies_are_independent(rng, kind, options, how):
    vectors = kind.draw(rng, 24)

    def rows(at, ids):
        return bits(kind.filled(kind.part(vectors, at), ids, **options).search(vectors, 30))

    index = kind.filled(kind.part(vectors, range(10)), np.arange(10), **options)
    index.add(kind.part(vectors, range(10, 20)))  # leaves room in the last block
    other = how(index)
    assert other._meta() == index._meta()
    assert bits(other.search(vectors, 30)) == rows(range(20), range(20))
    index.add(kind.part(vectors, [20]))
    other.add(kind.part(vectors, [21, 22]))
    index.remove(range(10))
    other.update([4], kind.part(vectors, [23]))
    assert bits(index.search(vectors, 30)) == rows(range(10, 21), range(10, 21))
    at = [23 if i == 4 else i for i in range(23) if i != 20]
    assert bits(other.search(vectors, 30)) == rows(at, range(22))


# --- Those of dense vectors -----------------------------------------------------------------------


@each_dense
def test_torch_comes_back_as_torch(rng, kind):
    torch = pytest.importorskip("torch")
    vectors, ids = kind.draw(rng, 60), np.arange(60)[::-1].copy()
    index, other = kind.filled(vectors, ids), kind.full()
    leaf = torch.nn.Parameter(torch.from_numpy(vectors))
    other.add(leaf, torch.from_numpy(ids))

    def same(got, want):
        assert all(isinstance(part, torch.Tensor) for part in got)
        assert_same(tuple(part.numpy() for part in got), tuple(want))

    for rescore in (None, *index._by):
        want = index.search(vectors[:4], 3, rescore=rescore)
        chosen = torch.ones(60, dtype=torch.bool)
        same(other.search(leaf[:4], 3, rescore=rescore, filter=chosen), want)
    within = index.range_search(vectors[:4], kind.radius)
    same(other.range_search(leaf[:4], kind.radius, filter=torch.arange(60)), within)
    same(other.search(torch.from_numpy(vectors)._neg_view(), 1), index.search(-vectors, 1))
    found = index.search(vectors, 2)
    same(other.search(torch.from_numpy(vectors).bfloat16(), 2), found)  # which keeps whole numbers
    same(other.rescore(leaf, torch.from_numpy(found.ids)), index.rescore(vectors, found.ids))
    other.update(torch.tensor([5]), -leaf[:1])
    index.update([5], -vectors[:1])
    assert_same(other.reconstruct(torch.tensor([5])), index.reconstruct([5]))
    assert other.remove(torch.tensor([1, 2, 999])) == 2


@each_dense
def test_tensors_without_values_are_refused(rng, kind):
    torch = pytest.importorskip("torch")
    vectors = kind.draw(rng, 3)
    index, meta = kind.filled(vectors, [0, 1, 2]), torch.ones(3, vectors.shape[1], device="meta")
    ids, name = torch.ones(3, dtype=torch.int64, device="meta"), kind.cls.__name__
    for op, call in (
        ("add", lambda: index.add(meta)),
        ("add", lambda: index.add(vectors, ids)),
        ("update", lambda: index.update(ids, vectors)),
        ("search", lambda: index.search(meta, 1)),
        ("search", lambda: index.search(vectors, 1, filter=ids > 0)),
        ("rescore", lambda: index.rescore(vectors, ids[:, None])),
    ):
        with pytest.raises(pentad.DeviceError, match=rf"\[{name}.{op}\] .* meta"):
            call()


@each_dense
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_vectors_of_every_dtype(rng, kind, dtype):
    vectors = kind.draw(rng, 30)
    index, other = (kind.filled(v, np.arange(30)) for v in (vectors, vectors.astype(dtype)))
    assert_same(other.reconstruct(other.ids), index.reconstruct(index.ids))
    for rescore in (None, "store"):
        want = index.search(vectors, 3, rescore=rescore)
        assert_same(tuple(other.search(vectors.astype(dtype), 3, rescore=rescore)), tuple(want))


@each_dense
@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed"])
def test_vectors_of_any_strides(rng, kind, layout):
    vectors = kind.draw(rng, 50)
    index, other = (kind.filled(v, np.arange(50)) for v in (vectors, laid_out(vectors, layout)))
    queries = rng.standard_normal((5, vectors.shape[1])).astype(np.float32)
    for rescore in (None, "store"):
        want = index.search(queries, 4, rescore=rescore)
        assert_same(tuple(other.search(laid_out(queries, layout), 4, rescore=rescore)), tuple(want))


@each_dense
def test_rescoring_apart_equals_rescoring_within(rng, kind):
    vectors = kind.draw(rng, 300)
    queries = vectors[:9] + 0
    for options in kind.files[1:]:
        index = kind.filled(vectors, rng.permutation(1000)[:300], **options)
        for by in index._by:
            within = index.search(queries, 6, rescore=by, oversample=5)
            if by == "store":
                named = index.search(queries, 6, rescore=index.store, oversample=5)
                assert_same(tuple(named), tuple(within))
            found = index.search(queries, 30).ids
            apart = index.rescore(queries, found, by=by)
            assert_same((apart.scores[:, :6], apart.ids[:, :6]), tuple(within))
            for layout in ("fortran", "reversed", "strided"):
                again = index.rescore(laid_out(queries, layout), laid_out(found, layout), by=by)
                assert_same(tuple(again), tuple(apart))
            assert index.rescore(queries, found[:, :0], by=by).ids.shape == (9, 0)
            some = index.rescore(queries[:1], np.array([[-1, 2000, index.ids[7]]]), by=by)
            assert some.ids.tolist() == [[index.ids[7], -1, -1]]
            assert np.isinf(some.scores[0, 1:]).all()


# --- Training -------------------------------------------------------------------------------------


@each_trained
def test_an_untrained_index_says_so(rng, tmp_path, kind):
    index, vectors = kind.cls(**kind.full()._meta()), kind.draw(rng, 80)
    index.save(tmp_path / "x")
    V = np.ones((2, index.dim), np.float32)
    for made in (index, kind.cls.load(tmp_path / "x"), copy.copy(index)):
        for call in (
            lambda i: i.search(V, 1),
            lambda i: i.range_search(V, 1),
            lambda i: i.add(V),
            lambda i: i.add(V[:0]),
            lambda i: i.update([], V[:0]),
            lambda i: i.rescore(V, np.zeros((2, 1), np.int64)),
        ):
            with pytest.raises(ValueError, match=r"not trained; call train\(\) first"):
                call(made)
        assert len(made) == made.remove([1]) == 0
        made.train(vectors)
        made.add(vectors)
        assert len(made) == len(vectors)


@each_trained
def test_training_again_needs_an_empty_index(rng, kind):
    index, vectors = kind.cls(**kind.full()._meta()), kind.draw(rng, 80)
    index.train(vectors, iterations=2)
    index.add(vectors)
    before = bits(index.search(vectors, 9))
    with pytest.raises(ValueError, match="already holds 80 rows"):
        index.train(vectors)
    assert bits(index.search(vectors, 9)) == before
    index.remove(range(80))
    other = kind.cls(**index._meta())
    for trained in (index, other):
        trained.train(vectors[::-1], seed=3, iterations=2)
        trained.add(vectors)
    assert bits(index.search(vectors, 9)) == bits(other.search(vectors, 9))


@pytest.mark.parametrize("kind", [kind for kind in DENSE if hasattr(kind.cls, "train")])
def test_training_shows_progress(rng, kind):
    index, steps = kind.cls(**kind.full()._meta()), []
    index.train(kind.draw(rng, 80), progress=lambda *step: steps.append(step), **kind.quickly)
    assert steps
    assert all(isinstance(stage, str) and 0 <= done <= total for stage, done, total in steps)
    assert ("lists" in {stage for stage, _, _ in steps}) == hasattr(kind.cls, "nprobe")
    assert steps[-1][1] == steps[-1][2]
