# SPDX-License-Identifier: Apache-2.0
"""BM25 weights: every variant against its formula, word by word, and against bm25s."""

import importlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentad.sparse import bm25
from pentad.sparse.bm25 import VARIANTS
from pentad.sparse.index import SparseIndex

SHIFTING = ("bm25l", "bm25+")
CORPUS = [
    text.split()
    for text in (
        "the cat sat on the mat the cat",
        "a dog sat on a log in the dog house",
        "",
        "the cat the dog and the house",
        "the the the the the the the",
        "one two three four five six seven eight nine ten the eleven",
    )
]
QUERIES = [["cat"], ["the", "dog", "the", "house"], ["unheard", "of"], [], ["ten", "mat", "the"]]


def idf(variant, n, df):
    return {
        "lucene": lambda: math.log(1 + (n - df + 0.5) / (df + 0.5)),
        "robertson": lambda: max(math.log((n - df + 0.5) / (df + 0.5)), 0.0),
        "atire": lambda: math.log(n / df),
        "bm25l": lambda: math.log((n + 1) / (df + 0.5)),
        "bm25+": lambda: math.log((n + 1) / df),
    }[variant]()


def tf_part(variant, f, length, mean, k1, b, delta):
    norm = 1 - b + b * length / mean
    if variant in ("lucene", "robertson"):
        return f / (f + k1 * norm)
    if variant == "bm25l":
        return (k1 + 1) * (f / norm + delta) / (k1 + f / norm + delta)
    return (k1 + 1) * f / (f + k1 * norm) + (delta if variant == "bm25+" else 0)


def defined(corpus, query, variant, k1=1.5, b=0.75, delta=None, shifted=False):
    """The score of each document, term by term as the papers write it."""
    delta = {"bm25l": 0.5, "bm25+": 1.0}.get(variant) if delta is None else delta
    mean = sum(map(len, corpus)) / len(corpus)
    scores = []
    for document in corpus:
        score = 0.0
        for term in query:
            df = sum(term in other for other in corpus)
            f = document.count(term)
            if df and (f or (shifted and variant in SHIFTING)):
                part = tf_part(variant, f, len(document), mean, k1, b, delta)
                score += idf(variant, len(corpus), df) * part
        scores.append(score)
    return np.array(scores)


def dense(rows):
    indptr, indices, values, columns = rows
    result = np.zeros((len(indptr) - 1, columns))
    result[np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), indices] = values
    return result


def scores(weights, queries):
    return dense(weights.encode(queries)) @ dense(weights.docs).T


# Impacts are rounded to float32, 6e-8 of each; a sum of terms that are not negative keeps that.
CLOSE = {"rtol": 2e-7, "atol": 0}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (0.0, 0.75), (2.0, 0.0), (1.2, 1.0)]
)
def test_scores_are_those_of_the_formula(variant, k1, b):
    weights = bm25(CORPUS, k1=k1, b=b, variant=variant)
    expected = [defined(CORPUS, query, variant, k1, b) for query in QUERIES]
    np.testing.assert_allclose(scores(weights, QUERIES), expected, **CLOSE)
    assert np.max(expected) > 0


@pytest.mark.parametrize("variant", SHIFTING)
@pytest.mark.parametrize("delta", [None, 0.0, 0.25, 2.0])
def test_documents_without_a_term(variant, delta):
    """Nothing by default; with `shifted` what the formula gives at a count of 0."""
    plain = bm25(CORPUS, variant=variant, delta=delta)
    shifted = bm25(CORPUS, variant=variant, delta=delta, shifted=True)
    expected = [defined(CORPUS, query, variant, delta=delta) for query in QUERIES]
    np.testing.assert_allclose(scores(plain, QUERIES), expected, **CLOSE)
    assert not plain.offsets(QUERIES).any()
    assert not plain.floor.any()
    expected = [defined(CORPUS, q, variant, delta=delta, shifted=True) for q in QUERIES]
    offsets = shifted.offsets(QUERIES)
    np.testing.assert_allclose(scores(shifted, QUERIES) + offsets[:, None], expected, **CLOSE)
    assert (dense(shifted.docs) >= 0).all()
    assert (delta == 0) == (not offsets.any())
    np.testing.assert_allclose(dense(shifted.encode(QUERIES)) @ shifted.floor, offsets)


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=12), min_size=1, max_size=9),
    st.lists(st.sampled_from("abcdefghij"), max_size=6),
    st.sampled_from(VARIANTS),
)
def test_any_corpus(corpus, query, variant):
    if not any(corpus):
        assert bm25(corpus, variant=variant).vocabulary == []
        return
    weights = bm25(corpus, variant=variant)
    expected = defined(corpus, query, variant)
    np.testing.assert_allclose(scores(weights, [query])[0], expected, **CLOSE)
    indptr, indices, values, columns = weights.docs
    assert (indptr.dtype, indices.dtype, values.dtype) == (np.int64, np.int32, np.float32)
    assert columns == weights.vocab_size == len(weights.vocabulary)
    for first, last in itertools.pairwise(indptr):
        assert (np.diff(indices[first:last]) > 0).all()
    assert (values > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_index_ranks_as_the_formula(variant):
    random = np.random.default_rng(0)
    corpus = [
        [f"w{i}" for i in random.zipf(1.3, random.integers(0, 40)) if i < 300] for _ in range(200)
    ]
    queries = [[f"w{i}" for i in random.integers(1, 60, 5)] for _ in range(8)]
    weights = bm25(corpus, variant=variant)
    found = weights.index().search(weights.encode(queries), 200)
    for query, best, ids in zip(queries, *found, strict=True):
        expected = defined(corpus, query, variant)
        np.testing.assert_allclose(best, expected[ids], **CLOSE)
        assert (np.diff(best) <= 0).all()
        assert sorted(ids) == list(range(200))
    assert isinstance(weights.index(values="uint8"), SparseIndex)
    assert weights.index(values="uint8").values == "uint8"


def test_robertson_takes_no_account_of_terms_of_most_documents():
    weights = bm25(CORPUS, variant="robertson")
    at = weights.vocabulary.index("the")
    assert weights.idf[at] == 0
    assert not dense(weights.docs)[:, at].any()
    assert weights.encode([["the"]])[1].tolist() == [at], "known, though of no weight"
    assert weights.idf[weights.vocabulary.index("ten")] > 0
    assert bm25(CORPUS).idf[at] > 0


def test_ids_are_columns():
    number = {word: 3 * i + 2 for i, word in enumerate(sorted({w for d in CORPUS for w in d}))}
    numbered = [[number[word] for word in document] for document in CORPUS]
    words, ids = bm25(CORPUS), bm25(numbered)
    assert ids.vocabulary == range(max(number.values()) + 1)
    places = [number[word] for word in words.vocabulary]
    np.testing.assert_array_equal(dense(ids.docs)[:, places], dense(words.docs))
    np.testing.assert_array_equal(ids.idf[places], words.idf)
    assert ids.idf.sum() == pytest.approx(words.idf.sum()), "0 for ids of no document"
    asked = [[number["cat"], 0, 3, 10**9, -4, number["the"], number["cat"]]]
    _, indices, values, _ = ids.encode(asked)
    assert dict(zip(indices.tolist(), values.tolist(), strict=True)) == {
        number["cat"]: 2,
        number["the"]: 1,
    }
    arrays = [np.array(document, np.uint16) for document in numbered]
    for form in (arrays, iter(numbered), tuple(map(tuple, numbered))):
        for a, b in zip(bm25(form).docs, ids.docs, strict=True):
            np.testing.assert_array_equal(a, b)
    # Shifted offsets look terms up among those that occur.
    one, other = (bm25(c, variant="bm25+", shifted=True) for c in (CORPUS, numbered))
    query = ["cat", "ten", "cat"]
    assert one.offsets([query]) == pytest.approx(other.offsets([[number[w] for w in query]]))


def test_the_largest_id():
    weights = bm25([[2**31 - 2, 2**31 - 2, 4], [4]])
    _, indices, _, columns = weights.docs
    assert columns == 2**31 - 1
    assert indices.tolist() == [4, 2**31 - 2, 4]
    found = weights.index().search(weights.encode([[2**31 - 2]]), 2)
    assert found.ids.tolist() == [[0, 1]]
    assert found.scores[0, 1] == 0


def test_counts_are_as_good_as_tokens():
    sparse = pytest.importorskip("scipy.sparse")
    words = bm25(CORPUS)
    number = {word: i for i, word in enumerate(words.vocabulary)}
    counts = np.zeros((len(CORPUS), len(number)), np.int64)
    for row, document in zip(counts, CORPUS, strict=True):
        for word, count in Counter(document).items():
            row[number[word]] = count
    csr = sparse.csr_array(counts)
    forms = [csr, csr.tocoo(), (csr.indptr, csr.indices, csr.data)]
    forms += [(csr.indptr, csr.indices, csr.data.astype(np.float32), len(number))]
    split = sparse.coo_array(
        (np.ones(counts.sum()), np.repeat(np.argwhere(counts), counts[counts > 0], 0).T)
    )
    forms.append(split)  # each occurrence by itself
    if importlib.util.find_spec("torch"):
        import torch

        forms += [torch.from_numpy(counts).to_sparse(), torch.from_numpy(counts).to_sparse_csr()]
    for form in forms:
        weights = bm25(form)
        assert weights.vocabulary == range(len(number))
        for a, b in zip(weights.docs, words.docs, strict=True):
            np.testing.assert_array_equal(a, b)
    csr.data[3] = 0  # an explicit zero is no occurrence
    cleaned = csr.copy()
    cleaned.eliminate_zeros()
    for a, b in zip(bm25(csr).docs, bm25(cleaned).docs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_documents_are_weighed_by_the_corpus(variant):
    weights = bm25(CORPUS, variant=variant)
    for a, b in zip(weights.weigh(CORPUS), weights.docs, strict=True):
        np.testing.assert_array_equal(a, b)
    known, longer = dense(weights.weigh([["cat"], ["cat", "unheard", "of"]]))
    at = weights.vocabulary.index("cat")
    assert known[at] > longer[at] > 0, "unknown words make a document longer"
    assert np.count_nonzero(longer) == 1
    index = weights.index()
    index.add(weights.weigh([["ten", "ten"]]))
    assert index.search(weights.encode([["ten"]]), 1).ids.tolist() == [[len(CORPUS)]]


@pytest.mark.parametrize("corpus", [[], [[]], [[], []]])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_to_weigh(corpus, variant):
    weights = bm25(corpus, variant=variant)
    indptr, indices, values, columns = weights.docs
    assert indptr.tolist() == [0] * (len(corpus) + 1)
    assert len(indices) == len(values) == 0
    assert columns == 1
    assert [part.tolist() for part in weights.encode([["a"], []])[:3]] == [[0, 0, 0], [], []]
    assert len(weights.index()) == len(corpus)


@pytest.mark.parametrize(
    ("corpus", "error", "complaint"),
    [
        ("a b", TypeError, "corpus_tokens is one string, expected"),
        (["a b", "c"], TypeError, r"corpus_tokens\[0\] is one string, expected"),
        ([["a"], "c d"], TypeError, r"corpus_tokens\[1\] is one string"),
        ([["a", 3]], TypeError, "a token of type int, expected str alone"),
        ([[3, "a"]], TypeError, "tokens of other kinds than int"),
        ([[1.5]], TypeError, "tokens of other kinds than int"),
        ([[True]], TypeError, "tokens of other kinds than int"),
        ([[b"a"]], TypeError, "a token of type bytes"),
        ([["a", None]], TypeError, "a token of type NoneType"),
        ([["a", ["b"]]], TypeError, "a token that is no word"),
        ([[1, [2]]], TypeError, "tokens of other kinds than int"),
        ([[2**80]], TypeError, "tokens of other kinds than int"),
        (7, TypeError, "corpus_tokens is int"),
        ([[-1]], ValueError, "the id -1, expected 0 to 2147483646"),
        ([[2**31 - 1]], ValueError, "the id 2147483647, expected 0 to 2147483646"),
        ([[2**63]], ValueError, "the id 9223372036854775808"),
    ],
)
def test_what_is_no_corpus(corpus, error, complaint):
    with pytest.raises(error, match=rf"\[sparse.bm25\] .*{complaint}"):
        bm25(corpus)


@pytest.mark.parametrize("counts", [[-1.0, 1.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_counts_that_are_none(counts):
    with pytest.raises(ValueError, match=r"\[sparse.bm25\] corpus_tokens"):
        bm25((np.array([0, 2]), np.array([0, 1]), np.array(counts)))


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"variant": "bm42"}, ValueError, "variant is 'bm42', expected one of lucene, robertson"),
        ({"k1": -0.1}, ValueError, "k1 is -0.1, expected finite and at least 0"),
        ({"k1": math.inf}, ValueError, "k1 is inf"),
        ({"k1": math.nan}, ValueError, "k1 is nan"),
        ({"k1": "x"}, TypeError, "k1 is 'x', expected a number"),
        ({"b": 1.1}, ValueError, "b is 1.1, expected from 0 to 1"),
        ({"b": math.nan}, ValueError, "b is nan"),
        ({"delta": 0.5}, ValueError, "delta is 0.5, but the variant 'lucene' has none"),
        ({"delta": -1, "variant": "bm25l"}, ValueError, "delta is -1, expected finite"),
        ({"shifted": True, "variant": "atire"}, ValueError, "shifted is True, but the variant"),
    ],
)
def test_options_that_make_no_sense(options, error, complaint):
    with pytest.raises(error, match=rf"\[sparse.bm25\] {complaint}"):
        bm25(CORPUS, **options)


def test_questions_of_the_wrong_kind():
    words, ids = bm25(CORPUS), bm25([[1, 2], [3]])
    for weights, query in [
        (words, [["cat", 3]]),
        (words, ["cat"]),
        (ids, [["cat"]]),
        (words, "cat"),
    ]:
        with pytest.raises(TypeError, match=r"\[Bm25.encode\] queries"):
            weights.encode(query)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bm25s_agrees(variant):
    bm25s = pytest.importorskip("bm25s")
    random = np.random.default_rng(1)
    corpus = [
        [f"w{i}" for i in random.zipf(1.2, random.integers(1, 60)) if i < 400] for _ in range(150)
    ]
    peer = bm25s.BM25(method=variant, k1=1.2, b=0.6, delta=0.7)
    peer.index(corpus, show_progress=False)
    shifting = {"delta": 0.7, "shifted": True} if variant in SHIFTING else {}
    weights = bm25(corpus, k1=1.2, b=0.6, variant=variant, **shifting)
    for _ in range(5):
        query = [f"w{i}" for i in random.integers(1, 40, 6)]
        query = [word for word in query if word in weights.vocabulary]
        ours = scores(weights, [query])[0] + weights.offsets([query])[0]
        # Its sums are of float32 throughout.
        np.testing.assert_allclose(ours, peer.get_scores(query), rtol=2e-6, atol=2e-6)
