# SPDX-License-Identifier: Apache-2.0
"""SparseIndex: against a dict and brute force."""

import numpy as np
import pytest
from cases import assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sparse_index_cases import (
    LEVELS,
    VALUES,
    Model,
    as_csr,
    as_dicts,
    draw,
    one_each,
    only_right_scores,
    part,
    ranked,
)

from pentad.sparse import SparseIndex, _documents, search_reference

# --- A random life, against a dict ----------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """The index must answer as a dict of id -> document that is searched by brute force."""

    @initialize(
        vocab=st.sampled_from([1, 5, 1000, 2**31 - 1]),
        values=st.sampled_from(VALUES),
        kind=st.sampled_from(list(LEVELS)),
        n=st.sampled_from([20, 0, 50]),
        seed=st.integers(0, 2**32 - 1),
    )
    def begin(self, vocab, values, kind, n, seed):
        self.rng = np.random.default_rng(seed)
        self.vocab, self.kind = vocab, kind
        self.index, self.model = SparseIndex(vocab, values=values), Model(values)
        self.add(n)

    def vectors(self, n):
        return draw(self.rng, n, self.vocab, kind=self.kind)

    @rule(n=st.integers(0, 40))
    def add_more(self, n):
        self.add(n)

    def add(self, n):
        vectors, first = self.vectors(n), max(self.model.rows, default=-1) + 1
        self.index.add(vectors)
        self.model.put(range(first, first + n), vectors)

    @rule(n=st.integers(0, 20), high=st.sampled_from([60, 1000, 2**62]))
    def add_with_ids(self, n, high):
        ids = np.setdiff1d(self.rng.integers(0, high, n), self.model.ids)
        self.rng.shuffle(ids)
        vectors = self.vectors(len(ids))
        self.index.add(vectors, ids.tolist() if self.rng.random() < 0.5 else ids)
        self.model.put(ids, vectors)

    @rule(share=st.sampled_from([0.1, 0.9, 1.0]), strangers=st.booleans())
    def remove(self, share, strangers):
        gone = [i for i in self.model.rows if self.rng.random() < share]
        unknown = [2**40 + 1, 2**40 + 2] if strangers else []
        self.rng.shuffle(gone)
        assert self.index.remove(unknown + gone) == len(gone)
        for i in gone:
            del self.model.rows[i]

    @precondition(lambda self: self.model.rows)
    @rule()
    def update(self):
        ids = [i for i in self.model.rows if self.rng.random() < 0.5]
        self.rng.shuffle(ids)
        vectors = self.vectors(len(ids))
        self.index.update(ids, vectors)
        self.model.put(ids, vectors)

    @rule(mmap=st.booleans(), verify=st.booleans())
    def save_and_load(self, mmap, verify):
        path = self.folder / "life.pentad"
        self.index.save(path)
        self.index = SparseIndex.load(path, mmap=mmap, verify=verify)

    @rule()
    def embed(self):
        self.index = SparseIndex.from_sections(*self.index.to_sections())

    @rule(ids=st.lists(st.integers(0, 100), min_size=1, max_size=4))
    def refused_add_changes_nothing(self, ids):
        taken = [*ids, *list(self.model.rows)[:1]] if self.model.rows else [-1, *ids]
        with pytest.raises(ValueError, match=r"already|negative|twice"):
            self.index.add(self.vectors(len(taken)), taken)

    @invariant()
    def answers_like_the_dict(self):
        if not hasattr(self, "index"):
            return
        index, model, ids = self.index, self.model, self.model.ids
        assert len(index) == len(ids)
        assert_same(index.ids, ids)
        assert_same(index.reconstruct(ids[::-1]), (*model.content(ids[::-1]), self.vocab))

        queries = draw(self.rng, 3, self.vocab, kind=self.kind, signs=self.rng.random() < 0.5)
        k = int(self.rng.choice([0, 1, 5, len(ids), len(ids) + 2]))
        want = model.search(queries, k)
        assert_same(tuple(index.search(queries, k)), want)
        assert_same(tuple(index.rescore(queries, want[1])), want)
        assert only_right_scores(index.search(queries, k, exact=False), model, queries)
        radius = float(self.rng.choice(model.scores(queries)[0])) if len(ids) else 1.0
        assert_same(index.range_search(queries, radius), model.range_search(queries, radius))

        keep = self.rng.random(len(ids)) < 0.5
        want = model.search(queries, k, keep)
        assert_same(tuple(index.search(queries, k, filter=keep)), want)
        chosen = [*ids[keep], 2**50]  # an unknown one is passed over
        assert_same(tuple(index.search(queries, k, filter=chosen)), want)
        assert_same(
            index.range_search(queries, radius, filter=keep),
            model.range_search(queries, radius, keep),
        )


def test_a_random_life(tmp_path):
    Life.folder = tmp_path
    Life.TestCase.settings = settings(
        max_examples=50, stateful_step_count=10, suppress_health_check=list(HealthCheck)
    )
    Life.TestCase("runTest").runTest()


# --- Search ---------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.sampled_from([1, 2, 17, 30522, 2**31 - 1]),
    st.sampled_from(VALUES),
    st.sampled_from(list(LEVELS)),
    st.integers(0, 120),
    st.integers(0, 9),
    st.integers(0, 30),
    st.integers(0, 15),
    st.sampled_from([None, 0.0, 0.1, 0.9]),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_search_is_exact(isa, threads, vocab, values, kind, n, nq, k, most, share, signs, t, seed):
    rng = np.random.default_rng(seed)
    threads(t)
    vectors = draw(rng, n, vocab, most, kind, start=vocab // 2)
    queries = draw(rng, nq, vocab, most, kind, signs=signs, start=vocab // 2)
    ids = rng.permutation(3 * n + 1)[:n]
    index, model = SparseIndex(vocab, values=values), Model(values, vectors, ids)
    index.add(vectors, ids)
    keep = None if share is None else rng.random(n) < share
    want = model.search(queries, k, keep)
    assert_same(tuple(index.search(queries, k, filter=keep)), want)
    for radius in (0.0, float(np.median(want[0])) if want[0].size else -1.0, 1e-3):
        assert_same(
            index.range_search(queries, radius, filter=keep),
            model.range_search(queries, radius, keep),
        )
    candidates = rng.integers(-1, 3 * n + 1, (nq, 7))
    assert_same(tuple(index.rescore(queries, candidates)), model.rescore(queries, candidates))
    knobs = {
        "query_cut": [None, 1, 2, 5],
        "block_factor": [None, 0, 0.5, 3],
        "alpha": [None, 0.5, 1],
    }
    knobs = {name: choices[rng.integers(len(choices))] for name, choices in knobs.items()}
    pruned = index.search(queries, k, filter=keep, exact=False, **knobs)
    assert only_right_scores(pruned, model, queries)
    assert np.isin(pruned.ids, [-1, *(model.ids if keep is None else model.ids[keep])]).all()


def test_queries_without_a_term_in_common(rng):
    vectors = one_each(rng, 30, 100)
    index = SparseIndex(100)
    index.add(vectors, np.arange(30)[::-1] * 2)
    queries = as_csr([{}, {50: np.float32(1)}, {3: np.float32(0)}])  # empty, unseen, weightless
    scores, ids = index.search(queries, 4)
    assert (scores == 0).all()
    assert not np.signbit(scores).any()
    assert ids.tolist() == [[0, 2, 4, 6]] * 3
    indptr, scores, ids = index.range_search(queries, 0)
    assert np.diff(indptr).tolist() == [30] * 3
    assert ids.tolist() == index.ids.tolist() * 3
    assert index.range_search(queries, 1e-300)[0].tolist() == [0] * 4


def test_documents_without_a_common_term_beat_negative_scores():
    index = SparseIndex(4)
    index.add(as_csr([{0: 2.0}, {1: 1.0}, {}, {0: 1.0}]))
    scores, ids = index.search(as_csr([{0: -1.0}]), 4)
    assert scores.tolist() == [[0, 0, -1, -2]]
    assert ids.tolist() == [[1, 2, 3, 0]]


def test_sums_go_in_the_order_of_terms():
    """In doubles 2**60 swallows the 1, and what is left of it depends on the order."""
    rows = [{0: 2.0**30, 1: 1.0, 2: 2.0**30}, {0: 2.0**30, 1: 2.0**30, 2: 1.0}]
    index = SparseIndex(3)
    index.add(as_csr(rows))
    queries = as_csr([{0: 2.0**30, 1: 1.0, 2: -(2.0**30)}, {0: 2.0**30, 1: -(2.0**30), 2: 1.0}])
    ids = np.array([[0, 1], [0, 1]])
    assert_same(tuple(index.rescore(queries, ids)), Model(csr=as_csr(rows)).rescore(queries, ids))
    assert index.search(queries, 2).scores[0, 1] == 0
    assert index.search(queries, 2).scores[1, 1] == 1


@pytest.mark.parametrize("values", VALUES)
def test_large_and_tiny_values(values):
    """Sums of the largest products stay finite; what float32 cannot hold of a score is 0."""
    largest = 65504.0 if values == "float16" else 2.0**48
    rows = [dict.fromkeys(range(400), largest), {5: 1e-7}, {5: 1e-40}, {5: 1e-7, 9: largest}]
    index = SparseIndex(400, values=values)
    index.add(as_csr(rows))
    model = Model(values, as_csr(rows))
    queries = as_csr([dict.fromkeys(range(400), 2.0**48), {5: 1e-40}, {5: -1e-45}])
    got = index.search(queries, 4)
    assert_same(tuple(got), model.search(queries, 4))
    assert np.isfinite(got.scores).all()
    assert got.scores[0, 0] == 400 * largest * 2.0**48
    assert not np.signbit(got.scores[2, 0])


@pytest.mark.parametrize("values", VALUES)
def test_windows_and_a_last_short_one(rng, threads, values):
    """More documents than a window holds, added, changed and removed; whole numbers are exact."""
    threads(2)
    n, vocab = 2 * 65536 + 300, 6
    dense = (rng.integers(1, 4, (n, vocab)) * (rng.random((n, vocab)) < 0.3)).astype(np.float32)
    if values == "uint8":
        dense[:, 0] = 255  # so that the scale is 1
    ids = np.arange(n)
    queries = np.array([[0, 1, 2, 3, 0, 1], [1, 0, 0, 0, 0, 0], [0, 0, -1, 0, 2, 0]], np.float32)

    def check():
        want = ranked((queries.astype(np.float64) @ dense.T).astype(np.float32), ids, 40)
        assert_same(tuple(index.search(as_sparse(queries), 40)), want)
        keep = rng.random(len(ids)) < 0.01
        want = ranked((queries.astype(np.float64) @ dense.T).astype(np.float32), ids, 40, keep)
        assert_same(tuple(index.search(as_sparse(queries), 40, filter=keep)), want)
        assert_same(index.ids, ids)
        some = rng.integers(0, len(ids), 9)
        assert_same(index.reconstruct(ids[some])[:3], as_sparse(dense[some]))
        lone = index.search(as_sparse(queries), 3, filter=[ids[-1]])
        assert lone.ids[:, 0].tolist() == [ids[-1]] * 3

    index = SparseIndex(vocab, values=values)
    for first, last in ((0, 10), (10, 65536), (65536, 65537), (65537, 131072 + 99), (131171, n)):
        index.add(as_sparse(dense[first:last]))
    check()
    gone = np.array([3, 70000, 131071, n - 1])
    assert index.remove(gone) == 4
    ids, dense = np.delete(ids, gone), np.delete(dense, gone, axis=0)
    check()
    other = [66000, 131080]
    dense[np.searchsorted(ids, other)] = dense[:2] * [1, 2, 2, 2, 2, 2]
    index.update(other, as_sparse(dense[np.searchsorted(ids, other)]))
    check()
    index.add(as_sparse(dense[:2]), [131071, n + 7])
    ids, dense = np.append(ids, [131071, n + 7]), np.concatenate([dense, dense[:2]])
    order = np.argsort(ids)
    ids, dense = ids[order], dense[order]
    check()


def as_sparse(dense):
    rows, terms = np.nonzero(dense)
    indptr = np.searchsorted(rows, np.arange(len(dense) + 1)).astype(np.int64)
    return indptr, terms.astype(np.int32), dense[rows, terms].astype(np.float32)


def test_windows_are_built_when_they_are_needed(rng, tmp_path, monkeypatch):
    """Small changes leave them to the next search or save; a large one builds its own."""
    built = []

    def count(forward, first, last):
        built.append(first // 65536)
        return native(forward, first, last)

    native = _documents._search.build
    monkeypatch.setattr(_documents._search, "build", count)
    vectors = zipf(rng, 140_000, 50, 2)
    index = SparseIndex(50)

    def after(change):
        built.clear()
        change()
        return sorted(built)

    one = part(vectors, [0])
    query = one
    assert after(lambda: index.add(vectors)) == [0, 1, 2]
    assert after(lambda: [index.add(one) for _ in range(50)]) == []
    assert after(lambda: index.search(query, 1)) == [2]
    assert after(lambda: index.search(query, 1)) == []
    assert after(lambda: index.update([70_000, 3], part(vectors, [0, 1]))) == []
    assert after(lambda: index.add(one)) == []
    assert after(lambda: index.save(tmp_path / "x")) == [0, 1, 2]
    assert after(lambda: SparseIndex.load(tmp_path / "x").search(query, 1)) == []
    assert after(lambda: index.remove([70_000])) == []
    assert after(lambda: index.update([5], one)) == []
    assert after(lambda: index.range_search(query, 1)) == [0, 1, 2]
    assert after(lambda: index.add(one, [70_000])) == []
    assert after(lambda: index.search(query, 1, exact=False)) == [1, 2]
    assert after(lambda: index.update(np.arange(5000), part(vectors, range(5000)))) == [0]
    small = SparseIndex(50)
    assert after(lambda: [small.add(one) for _ in range(9000)]) == [0, 0]


@pytest.mark.parametrize(("values", "k"), [("exact", 10), ("float16", 1000), ("uint8", 100)])
def test_search_is_its_definition(rng, isa, threads, values, k):
    """More documents than a window, terms from rare to common, few distinct scores."""
    threads(2)
    index = SparseIndex(5000, values=values)
    indptr, terms, weights = zipf(rng, 70_000, 5000, 6)
    index.add((indptr, terms, np.ceil(weights)))
    _, arrays = index.to_sections()
    parts = (arrays[name] for name in ("indptr", "terms", "values"))
    forward = search_reference.Forward(*parts, arrays.get("scale"))
    indptr, terms, weights = zipf(rng, 6, 5000, 12)
    weights[:36] = np.round(weights[:36])
    weights[60:] *= rng.choice(np.float32([-1, 1]), 12)
    queries = part((indptr, terms, weights), range(6))
    for keep in (None, rng.random(70_000) < 0.3):
        want = search_reference.topk(None, forward, queries, keep, k, None)
        assert_same(tuple(index.search(queries, k, filter=keep)), want)
    scores = search_reference.scores_at(forward, queries, want[1])
    assert_same(tuple(index.rescore(queries, want[1])), (scores, want[1]))


@pytest.mark.parametrize("values", VALUES)
def test_batches_and_threads_change_nothing(rng, threads, values):
    vectors, queries = draw(rng, 700, 20), draw(rng, 40, 20, signs=True)
    index, other = SparseIndex(20, values=values), SparseIndex(20, values=values)
    threads(2)
    index.add(vectors)
    found, hits = index.search(queries, 9), index.range_search(queries, 0.5)
    threads(1)
    for first, last in ((0, 1), (1, 64), (64, 300), (300, 700)):
        other.add(part(vectors, range(first, last)))
    assert_same(tuple(other.search(queries, 9)), tuple(found))
    assert_same(other.range_search(queries, 0.5), hits)
    for name, array in index.to_sections()[1].items():  # inverted lists too
        assert_same(other.to_sections()[1][name], array)
    for q in range(0, 40, 7):
        alone = other.search(part(queries, [q]), 9)
        assert_same(tuple(alone), (found.scores[q : q + 1], found.ids[q : q + 1]))


def test_a_range_of_many(rng):
    """More than the number that a range search asks for first."""
    vectors, queries = draw(rng, 3000, 30, kind="ties"), draw(rng, 5, 30, kind="ties")
    index, model = SparseIndex(30), Model(csr=vectors)
    index.add(vectors)
    scores = model.scores(queries)
    sizes = []
    for radius in (0, 0.25, 1, 4, float(scores.max()), np.inf, -np.inf):
        got = index.range_search(queries, radius)
        assert_same(got, model.range_search(queries, radius))
        sizes.append(len(got[1]))
    assert sizes[-1] == sizes[0] == 15000
    assert sizes[-2] == 0
    assert 64 < np.diff(index.range_search(queries, 1)[0]).max() < 3000


def test_a_radius_between_two_floats():
    """Scores are float32, the radius is a double: neither is rounded to meet the other."""
    index = SparseIndex(2)
    index.add(as_csr([{0: 0.3, 1: 0.4}]))
    query = as_csr([{0: 0.7, 1: 0.1}])
    score = float(index.search(query, 1).scores[0, 0])
    for radius, count in (
        *((score, 1), (np.nextafter(score, 9), 0), (np.nextafter(score, 0), 1)),
        *((np.inf, 0), (-np.inf, 1), (1e300, 0), (-1e300, 1)),
    ):
        assert len(index.range_search(query, radius)[2]) == count


# --- Pruned search --------------------------------------------------------------------------------


def zipf(rng, n, vocab, size):
    """Documents and their terms as those of a language: few common ones, many rare ones."""
    terms = np.minimum(rng.zipf(1.3, (n, size)) - 1, vocab - 1)
    values = rng.gamma(2.0, 1.0, (n, size)).astype(np.float32)
    return np.arange(n + 1) * size, terms.reshape(-1), values.reshape(-1)


@pytest.mark.parametrize("values", VALUES)
def test_pruned_search_finds_most_with_exact_scores(rng, values):
    vectors, queries = zipf(rng, 3000, 500, 20), zipf(rng, 20, 500, 8)
    index = SparseIndex(500, values=values)
    index.add(vectors)
    exact = index.search(queries, 10)
    every = index.search(queries, 3000)

    def recall(**knobs):
        scores, ids = index.search(queries, 10, exact=False, **knobs)
        for q in range(20):
            order = np.argsort(every.ids[q])
            assert_same(scores[q], every.scores[q, order][ids[q]])
        return np.mean([np.isin(a, b).mean() for a, b in zip(ids, exact.ids, strict=True)])

    assert recall() >= 0.9
    assert recall(query_cut=500, alpha=1) >= 0.99
    assert recall(query_cut=1, alpha=1) < 0.95
    for steps in (
        [{"alpha": 1, "query_cut": cut} for cut in (1, 2, 4, 8)],
        [{"alpha": alpha, "query_cut": 2} for alpha in (1, 0.8, 0.5, 0.2)],
        [{"alpha": 1, "block_factor": factor} for factor in (2, 0.8, 0.4, 0.1, 0)],
        [{"alpha": alpha, "block_factor": 0.5} for alpha in (1, 0.8, 0.5, 0.2)],
    ):
        recalls = [recall(**knobs) for knobs in steps]
        assert recalls == sorted(recalls), steps


@pytest.mark.parametrize("knobs", [{"query_cut": 1}, {"block_factor": 1.0}])
def test_cut_terms_count_in_the_scores(isa, knobs):
    """Documents that only the terms left out lead to, returned because there are no others."""
    rows = [{i: 1.0, 12: 0.5} if i % 3 else {i: 1.0} for i in range(12)]
    index, model = SparseIndex(20), Model(csr=as_csr(rows))
    index.add(as_csr(rows))
    queries = as_csr([{i: 1.0 + i for i in range(13)}, {i: 1.0 for i in range(12)}, {5: 3.0}])
    for k in (1, 5, 12, 15):
        got = index.search(queries, k, exact=False, alpha=1.0, **knobs)
        assert only_right_scores(got, model, queries)
        assert (got.ids >= 0).sum() == 3 * min(k, 12)


# --- Vectors --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse")
def test_every_form_of_vectors(rng):
    torch, sp = pytest.importorskip("torch"), pytest.importorskip("scipy.sparse")
    vectors, vocab = one_each(rng, 40, 50), 50
    queries = part(vectors, [5, 6, 7])
    index = SparseIndex(vocab)
    index.add(vectors)
    want = index.search(queries, 6)

    def forms(csr):
        tensors = tuple(torch.from_numpy(np.asarray(p)) for p in csr)
        matrix = sp.csr_array(csr[::-1], shape=(len(csr[0]) - 1, vocab))
        tensor = torch.sparse_csr_tensor(*tensors[:2], tensors[2], size=matrix.shape)
        yield from ((matrix, False), (matrix.tocoo(), False), (matrix.tocsc(), False))
        yield from (((*csr, vocab), False), ((csr[0].astype(np.uint16), *csr[1:]), False))
        yield from ((tensors, True), ((*tensors, vocab), True), (tensor.to_sparse_coo(), True))

    for form, _ in forms(vectors):
        other = SparseIndex(vocab)
        other.add(form)
        other.update([3], part(vectors, [3]))
        assert_same(other.reconstruct(other.ids), index.reconstruct(index.ids))
    for form, tensors in forms(queries):
        results = (*other.search(form, 6), *other.rescore(form, np.array(want.ids)))
        hits = other.range_search(form, 0.1)
        for result in (*results, *hits):
            assert isinstance(result, torch.Tensor if tensors else np.ndarray)
        assert_same(tuple(map(np.asarray, results)), (*want, *want))
        assert_same(tuple(map(np.asarray, hits)), index.range_search(queries, 0.1))

    back = other.reconstruct(torch.tensor([6, 5, 6]))
    assert back.layout == torch.sparse_csr
    other.add(back)
    assert_same(other.reconstruct([40, 41, 42]), index.reconstruct([6, 5, 6]))
    other.add(other.reconstruct([7]))
    assert_same(other.reconstruct([43]), index.reconstruct([7]))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_queries_as_they_come(rng, dtype):
    """The native entry sorts terms, merges those that are given twice, and needs no copies."""
    index = SparseIndex(50)
    index.add(one_each(rng, 300, 50))
    want = index.search(as_csr([{3: 1.5, 7: -2.0, 40: 1.0}, {}, {49: 3.0}]), 9)
    indptr = np.array([0, 4, 4, 5], dtype)
    terms, weights = np.array([40, 3, 7, 3, 49], dtype), np.array([1, 1, -2, 0.5, 3], np.float32)
    given = indptr, terms, weights
    kept = [part.copy() for part in given]
    spread = tuple(np.repeat(part, 2)[::2] for part in given)
    for queries in (given, spread, (indptr, terms, weights.astype(np.float64))):
        assert_same(tuple(index.search(queries, 9)), tuple(want))
    assert_same(given, tuple(kept))
    assert index._state.lists() is index._state.lists()  # what is looked at once
    index.add(as_csr([{49: 2.0**48}]))
    assert index.search(given, 1).ids[2, 0] == len(index) - 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_values_of_every_dtype(rng, dtype):
    torch = pytest.importorskip("torch")
    indptr, terms, values = one_each(rng, 20, 30, "ties")
    given = (torch.from_numpy(a) for a in (indptr, terms))
    index, other = SparseIndex(30), SparseIndex(30)
    index.add((indptr, terms, values))
    other.add((*given, torch.from_numpy(values).to(getattr(torch, dtype))))
    assert_same(other.reconstruct(other.ids), index.reconstruct(index.ids))


def test_zeros_are_dropped(rng):
    index = SparseIndex(10)
    index.add(as_csr([{0: 0.0, 1: 1.0, 2: -0.0}, {3: 0.0}, {}, {4: 1e-46}]))
    assert_same(index.reconstruct(index.ids)[:3], as_csr([{1: 1.0}, {}, {}, {}]))
    index = SparseIndex(10, values="float16")
    index.add(as_csr([{0: 1e-9, 1: 1.0}]))  # rounds to zero
    assert_same(index.reconstruct([0])[:3], as_csr([{1: 1.0}]))
    step, small = np.float32(1) / np.float32(255), np.float32(0.001) / np.float32(255)
    index = SparseIndex(10, values="uint8")
    index.add(as_csr([{0: 0.001, 1: 1.0, 2: 0.25}, {0: 0.001}]))
    assert_same(
        index.reconstruct([0, 1])[:3],
        as_csr([{1: step * 255, 2: step * 64}, {0: small * 255}]),
    )


def test_what_the_values_cost_in_precision(rng):
    vectors = one_each(rng, 200, 64)
    given = as_dicts(vectors)
    for values, relative, of_largest in (("float16", 2**-11, 0), ("uint8", 0, 0.51 / 255)):
        index = SparseIndex(64, values=values)
        index.add(vectors)
        worst = 0
        for row, kept in zip(given, as_dicts(index.reconstruct(index.ids)), strict=True):
            largest = max(row.values(), default=0)
            for t, v in row.items():  # half a unit of float16's smallest step: 2**-25
                allowed = relative * v + of_largest * largest + 2**-25
                assert abs(kept.get(t, 0) - v) <= allowed
                worst = max(worst, abs(kept.get(t, 0) - v))
        assert worst > 0


def test_without_torch_and_scipy():
    from cases import WITHOUT_TORCH, run_python

    run_python(
        WITHOUT_TORCH
        + """
import numpy as np
import pentad.sparse

assert "scipy" not in sys.modules
index = pentad.sparse.SparseIndex(5)
index.add((np.array([0, 1]), np.array([4]), np.array([2.0])))
assert index.search((np.array([0, 1]), np.array([4]), np.array([3.0])), 1).scores == 6
assert "scipy" not in sys.modules
"""
    )
