# SPDX-License-Identifier: Apache-2.0
"""The sparse benchmark: its vectors, its targets, and that it finds wrong answers."""

from types import SimpleNamespace

import numpy as np
import pytest
from bench_cases import load, timed_by

pytest.importorskip("rich")
torch = pytest.importorskip("torch")
csr_array = pytest.importorskip("scipy.sparse").csr_array


@pytest.fixture(scope="module")
def data():
    return load("sparse_data").zipf(700).first(8)


def search(data, k=10, **options):
    return load("sparse_search").Search(data, k, **options)


def test_targets():
    sparse = load("sparse")
    assert len({case.name for case in sparse.CASES}) == len(sparse.CASES)
    targets = {case.name: case.target for case in sparse.CASES}
    expected = {
        "exact top 10, 200,000 documents, 100 queries": 10,
        "exact top 10, 200,000 documents, 100 queries one at a time": 8,
        "exact top 1,000, 200,000 documents, 100 queries one at a time": 8,
        "exact top 10, 200,000 documents of whole numbers, 100 queries one at a time": 2,
        "exact top 1,000, 200,000 documents of whole numbers, 100 queries one at a time": 2,
        "BM25, the passages, top 10, 256 queries": 3,
        "BM25, the passages, top 10, 256 queries one at a time": 3,
        "build, 1,000,000 documents": 10,
        "splade_head forward and backward, B 16, L 128, V 30,522, H 128": 2,
        "splade_head forward and backward, B 16, L 128, V 30,522, H 768": 2,
        "scores and their gradient, 256 x 4096 documents": 5,
    }
    for name, target in targets.items():
        assert target.ratio == (2 if name.startswith("recall@10") else expected.pop(name))
    assert not expected
    for case in sparse.CASES:
        names = {contender.name for contender in case.contenders}
        against = case.target.against
        assert {against} if isinstance(against, str) else set(against) <= names
    assert [case.target.ratio for case in load("sparse_training").MEMORY] == [10, 10]


def test_drawn_rows():
    sparse_data = load("sparse_data")
    data, fewer = sparse_data.zipf(700), sparse_data.zipf_rows(1, 300, 120)
    assert (data.docs[:300] != fewer).nnz == 0  # fewer rows are the first of more
    for rows, count in ((data.docs, 120), (data.queries, 40)):
        terms = rows.indices.reshape(-1, count)
        assert (np.diff(terms, axis=1) > 0).all()
        assert terms.min() >= 0
        assert terms.max() < 30_522
        assert rows.data.min() > 0
        assert rows.data.max() <= 4
    # 120 / (ln(30,542 / 20) 20) of the documents have the most frequent term, but for chance.
    share = np.bincount(data.docs.indices).max() / 700
    assert 0.45 < share < 0.7
    whole = sparse_data.whole_numbers(700)
    assert set(np.unique(whole.docs.data)) <= set(range(1, 256))
    assert (whole.queries.max(axis=1).toarray() == 32).all()


def test_definition_and_recall(monkeypatch):
    sparse_data = load("sparse_data")
    monkeypatch.setattr(sparse_data, "BLOCK", 7)  # several blocks
    rng = np.random.default_rng(1)
    # Small whole numbers: many scores are equal, and many are zero.
    docs, queries = (
        csr_array((rng.integers(0, 3, shape) * (rng.random(shape) < 0.3)).astype(np.float32))
        for shape in ((50, 9), (6, 9))
    )
    data = sparse_data.Data("small", docs, queries)
    products = queries.toarray() @ docs.toarray().T
    order = np.lexsort((np.broadcast_to(np.arange(50), products.shape), -products), axis=1)
    for k in (1, 10, 50):
        scores, ids = sparse_data.Data("small", docs, queries).answer(k)
        np.testing.assert_array_equal(ids, order[:, :k])
        np.testing.assert_array_equal(scores, np.take_along_axis(products, ids, axis=1))
    np.testing.assert_array_equal(data.scores(order), np.take_along_axis(products, order, axis=1))
    assert data.recall(order[:, :10]) == 1
    assert data.recall(np.full((6, 10), -1)) == 0
    least = np.take_along_axis(products, order[:, 9:10], axis=1)
    worst = order[:, -10:]
    expected = (np.take_along_axis(products, worst, axis=1) >= least).mean()
    assert data.recall(worst) == expected < 1
    assert data.postings() == ((queries.toarray() != 0) @ (docs.toarray() != 0).T.astype(int)).sum()


def test_wrong_answers_are_found(data):
    bench, engines = load("sparse_search"), load("sparse_engines")
    for single in (False, True):
        inputs = search(data, single=single)
        call = bench.Searching(engines.Pentad(), inputs)
        found = call()
        bench.check_definition(engines.Pentad(), inputs, found)
        assert call.quality()["recall@10"] == 1
    scores, ids = (np.concatenate(part) for part in zip(*found, strict=True))
    swapped = ids.copy()
    swapped[0, [3, 4]] = swapped[0, [4, 3]]
    for wrong, complaint in (
        ((scores, swapped), "ids"),
        ((np.nextafter(scores, 9), ids), "scores"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            bench.check_definition(engines.Pentad(), inputs, [wrong])


def test_exact_peers_are_checked_too(data):
    bench, engines = load("sparse_search"), load("sparse_engines")
    inputs = search(data)
    for engine in (engines.Scipy(), engines.Torch(), engines.Scipy(top=False)):
        bench.check_exact(engine, 1e-5, inputs, bench.Searching(engine, inputs)())
    scores, ids = data.answer(10)
    reader = engines.Engine()  # takes arrays as they are
    bench.check_exact(reader, 1e-5, inputs, [(scores, ids)])
    twice = ids.copy()
    twice[1, 1] = twice[1, 0]
    other = (ids + 1) % 700
    for wrong in ((scores, twice), (scores + 0.1, ids), (scores, other)):
        with pytest.raises(AssertionError):
            bench.check_exact(reader, 1e-5, inputs, [wrong])
    with pytest.raises(AssertionError, match="scores"):
        bench.check_enough(reader, 1e-3, search(data, recall=0.9), [(scores + 1, ids)])
    worse = np.sort(ids)[:, :1] + np.arange(300, 310)
    worse = np.take_along_axis(
        worse % 700, np.argsort(-data.scores(worse % 700), axis=1, kind="stable"), axis=1
    )
    with pytest.raises(AssertionError, match="recall"):
        bench.check_enough(reader, 1e-3, search(data, recall=0.9), [(data.scores(worse), worse)])


def test_files_for_seismic(data, tmp_path, monkeypatch):
    monkeypatch.setattr(load("sparse_data"), "BLOCK", 3)
    path = load("sparse_engines").write_rows(tmp_path / "rows", data.docs[:8])
    words = np.fromfile(path, np.uint32)
    assert words[0] == 8
    for row, part in enumerate(words[1:].reshape(8, 241)):
        assert part[0] == 120
        np.testing.assert_array_equal(part[1:121], data.docs[[row]].indices)
        np.testing.assert_array_equal(part[121:].view(np.float32), data.docs[[row]].data)


def test_peers_find_what_they_should(data):
    pytest.importorskip("seismic")
    pytest.importorskip("bmp")
    bench, engines = load("sparse_search"), load("sparse_engines")
    whole = load("sparse_data").whole_numbers(700).first(8)
    bench.check_bmp(search(whole), bench.Searching(engines.Bmp(), search(whole))())
    engine = engines.Seismic()
    inputs = search(data, recall=0.9, whole=data)
    call = bench.Tuned(engine, inputs)
    bench.check_enough(engine, 4e-3, inputs, call())
    assert call.quality()["recall@10"] >= 0.9
    least, most = (bench.recall_of(engine, data, 40, engine.inner[i]) for i in (0, -1))
    assert least < most  # settings stand in the order of what they find


def test_settings_are_chosen(data, monkeypatch):
    bench, engines = load("sparse_search"), load("sparse_engines")
    clock = [0]
    monkeypatch.setattr(bench, "timeit", timed_by(clock))
    best = data.answer(10)

    class Fake(engines.Engine):
        """Outer 1 never finds enough; 2 from 5 on, in 2.5 s; 3 from 7 on, in 2.3 s, or in 4.3 s for
        one query.
        """

        outer, inner = (1, 2, 3), tuple(range(10))

        def build(self, docs):
            return None

        def size(self, index, path):
            return 0

        def find(self, index, asked, k, outer, inner):
            clock[0] += inner / outer + 2 * (outer == 3 and asked.shape[0] == 1)
            enough = (outer, inner) >= (2, 5) if outer == 2 else outer == 3 and inner >= 7
            return best if enough else (best[0], best[1] * 0 - 1)

    fake = Fake()
    assert bench.Tuned(fake, search(data, recall=0.9, whole=data)).settings == (3, 7)
    one = search(data.first(1), recall=0.9, whole=data, single=True)
    assert bench.Tuned(fake, one).settings == (2, 5)
    assert bench.recall_of(fake, data, 2, 4) == 0
    Fake.outer = (1,)
    with pytest.raises(ValueError, match="no setting finds"):
        bench.Tuned(Fake(), search(data, recall=0.9, whole=data))


def test_bm25_is_checked(monkeypatch):
    pytest.importorskip("bm25s")
    pytest.importorskip("numba")
    bench, rng = load("sparse_search"), np.random.default_rng(1)
    documents = [rng.integers(0, 50, rng.integers(1, 30)).tolist() for _ in range(40)]
    vocabulary = {str(word): word for word in range(50)}
    monkeypatch.setattr(
        bench.sparse_data, "words", lambda quick: (documents, documents[:5], vocabulary)
    )
    inputs = bench.words_setup(False, True, 1)
    bench.check_words(inputs, bench.pentad_words(inputs)())
    found = bench.Bm25s(inputs)()
    bench.check_bm25s(inputs, found)
    part = found[0]
    wrong = SimpleNamespace(scores=part.scores + 1, documents=part.documents)
    with pytest.raises(AssertionError):
        bench.check_bm25s(inputs, [wrong])


def test_wrong_gradients_are_found():
    training = load("sparse_training")
    inputs = training.head_setup(128, True, 1)
    for head in training.HEADS.values():
        result = training.training(head, inputs)()
        training.check_head(inputs, result)
    for part in range(4):
        wrong = [x + 0.01 if i == part else x for i, x in enumerate(result)]
        with pytest.raises(AssertionError):
            training.check_head(inputs, wrong)
    inputs = training.scores_setup(True, 1)
    for scores, layout in (
        (training.pentad_scores, "parts"),
        (training.pentad_scores, "coo"),
        (training.sparse_product, "coo"),
        (training.dense_product, "coo"),
    ):
        result = training.score_gradients(scores, layout, inputs)()
        training.check_scores(inputs, result)
    for part in range(3):
        wrong = [x + 0.01 if i == part else x for i, x in enumerate(result)]
        with pytest.raises(AssertionError):
            training.check_scores(inputs, wrong)


def test_memory_of_a_head():
    case = load("sparse_training").MEMORY[0]
    record = case.measure("pentad", (1, 128, 30_522))
    assert record["status"] == "ok", record.get("detail")
    assert record["extra_bytes"] >= 0
    assert case.measure("pentad", (-1, 128, 30_522))["status"] == "error"
