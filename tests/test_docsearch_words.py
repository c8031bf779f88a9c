# SPDX-License-Identifier: Apache-2.0
"""Documentation search by words, ranked by BM25, and merged with the ranking of vectors."""

import importlib.util
import math

import numpy as np
import pytest
from docsearch_cases import ABOUT, check_light, read_library

from pentad import FormatError, _file
from pentad.docsearch import DocIndex, LsaEncoder, engine, recall
from pentad.docsearch.fusion import reciprocal_rank_fusion
from pentad.docsearch.passages import Strings
from pentad.docsearch.words import weighted_words, words


@pytest.fixture(scope="module")
def library():
    return read_library()


@pytest.fixture(scope="module")
def fitted(library):
    return LsaEncoder.fit(library)


@pytest.fixture(scope="module")
def docs(library, fitted):
    return DocIndex.of(library, *fitted, ABOUT)


@pytest.fixture(scope="module")
def by_words(library):
    return DocIndex.of(library, None, None, ABOUT, "sparse")


@pytest.fixture(scope="module")
def hybrid(library, fitted):
    return DocIndex.of(library, *fitted, ABOUT, "hybrid")


def bm25_of(library, question):
    """Lucene's BM25 of each passage, word by word."""
    corpus = [weighted_words(passage) for passage in library]
    mean = sum(map(len, corpus)) / len(corpus)
    scores = np.zeros(len(corpus))
    for word in words(question):
        n = sum(word in document for document in corpus)
        idf = math.log(1 + (len(corpus) - n + 0.5) / (n + 0.5))
        for i, document in enumerate(corpus):
            f = document.count(word)
            scores[i] += idf * f / (f + 1.5 * (0.25 + 0.75 * len(document) / mean))
    return scores


@pytest.mark.parametrize("question", ["open a gzip file", "json json decoder", "zyzzyva of paths"])
def test_words_are_ranked_by_bm25(by_words, library, question):
    expected = bm25_of(library, question)
    order = [i for i in np.argsort(-expected, kind="stable") if expected[i] > 0]
    answer = by_words.search(question, len(library))
    assert len(answer.hits) == len(order) < len(library), "those that have a word of it"
    scores = [hit.score for hit in answer.hits]
    np.testing.assert_allclose(scores, expected[order], rtol=1e-6)
    named = {(p.name, p.line): score for p, score in zip(library, expected, strict=True)}
    for score, passage in answer.hits:
        assert score == pytest.approx(named[passage.name, passage.line], rel=1e-6)
    assert list(answer.seconds) == ["encode", "sparse search"]
    assert by_words.search(question, 3).hits == answer.hits[:3]


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("open a gzip compressed file", "gzip.open"),
        ("deserialize json from a string", "json.loads"),
        ("add a command line argument", "argparse.ArgumentParser"),
        ("decompress data in one shot", "gzip.decompress"),
    ],
)
def test_words_and_both_find_right_answers(by_words, hybrid, question, name):
    for docs in (by_words, hybrid):
        assert name in [hit.passage.name for hit in docs.search(question, 5).hits]


@pytest.mark.parametrize("rescore", ["store", "bits", "none"])
@pytest.mark.parametrize("k", [3, 120])
def test_hybrid_merges_the_rankings_of_its_parts(hybrid, by_words, docs, rescore, k):
    for question in ("open a gzip file", "parse a string", "path"):
        depth = max(k, engine.MERGED)
        rankings = [
            [(hit.passage.name, hit.passage.line) for hit in part.hits]
            for part in (
                docs.search(question, depth, rescore=rescore),
                by_words.search(question, depth),
            )
        ]
        scores = {}
        for ranking in rankings:
            for rank, place in enumerate(ranking, 1):
                scores[place] = scores.get(place, 0) + 1 / (60 + rank)
        answer = hybrid.search(question, k, rescore=rescore)
        assert [hit.score for hit in answer.hits] == sorted(scores.values(), reverse=True)[:k]
        for score, passage in answer.hits:
            assert scores[passage.name, passage.line] == score
        stages = ["rescore"] * (rescore != "none")
        assert list(answer.seconds) == [
            "encode",
            "binary search",
            *stages,
            "sparse search",
            "merge",
        ]


def test_reciprocal_rank_fusion():
    scores, ids = reciprocal_rank_fusion([np.array([7, 3, 5]), np.array([5, 9]), np.array([], int)])
    assert ids.tolist() == [5, 7, 3, 9], "3 and 9 are second once: the smaller first"
    assert scores.tolist() == [1 / 63 + 1 / 61, 1 / 61, 1 / 62, 1 / 62]
    assert [part.tolist() for part in reciprocal_rank_fusion([])] == [[], []]
    scores, ids = reciprocal_rank_fusion([np.array([1, 2])], constant=0)
    assert scores.tolist() == [1, 0.5]


@pytest.mark.parametrize("kind", ["sparse", "hybrid"])
def test_kinds_with_words_are_stored(kind, request, tmp_path):
    asked = request.getfixturevalue({"sparse": "by_words", "hybrid": "hybrid"}[kind])
    path = tmp_path / "docs.pentad"
    asked.save(path)
    loaded = DocIndex.load(path)
    assert loaded.kind == kind
    for question in ("open a gzip file", "zyzzyva"):
        assert loaded.search(question).hits == asked.search(question).hits
        some = loaded.search(question, 500, packages=["gzip"]).hits
        assert some == asked.search(question, 500, packages=["gzip"]).hits
        assert all(hit.passage.name.split(".")[0] == "gzip" for hit in some)
    assert len(asked.search("open", packages=["gzip"]).hits) > 0
    assert asked.search("zyzzyva").hits == []
    again = tmp_path / "again.pentad"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()

    about, arrays = _file.read(path, engine.KIND)
    parts = {name: array for name, array in arrays.items() if not name.startswith("words/")}
    _file.write(path, engine.KIND, about, parts)
    with pytest.raises(FormatError):
        DocIndex.load(path)
    fewer = Strings.of(["a", "b"])
    broken = {"words/vocabulary": fewer.blob, "words/vocabulary.offsets": fewer.offsets}
    _file.write(path, engine.KIND, about, {**arrays, **broken})
    with pytest.raises(FormatError, match="2 words for"):
        DocIndex.load(path)


def test_words_need_no_encoder(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = []
    docs = DocIndex.build(
        ["json"], index="sparse", progress=lambda stage, *counts: done.append(stage)
    )
    assert docs.search("parse a json string").hits
    assert list(dict.fromkeys(done)) == ["reading files", "weighing words"]
    with pytest.raises(ModuleNotFoundError, match="the encoder 'lsa' needs sklearn"):
        DocIndex.build(["json"], index="hybrid")
    with pytest.raises(ValueError, match="kind 'sparse' has no vectors"):
        recall(docs, np.zeros((1, 512), np.float32), ["open"])
    with pytest.raises(ValueError, match="store, none for an index of kind 'sparse', got 'bits'"):
        docs.search("open", rescore="bits")


def test_hybrid_answers_with_one_ranking(hybrid, library, monkeypatch):
    """Where only the words, or only the vectors, know anything of the question."""
    merged = hybrid.search("open a gzip file", 5)
    monkeypatch.setattr(hybrid.encoder, "encode", lambda texts: np.zeros((1, 512), np.float32))
    words_alone = hybrid.search("open a gzip file", 5)
    assert [hit.score for hit in words_alone.hits] == [1 / (60 + rank) for rank in range(1, 6)]
    assert list(words_alone.seconds) == ["encode", "sparse search", "merge"]
    monkeypatch.undo()
    monkeypatch.setattr(hybrid.words, "vocabulary", Strings.of([]))
    vectors_alone = hybrid.search("open a gzip file", 5)
    assert [hit.score for hit in vectors_alone.hits] == [1 / (60 + rank) for rank in range(1, 6)]
    assert merged.hits[0].score > 1 / 61
    assert vectors_alone.hits != words_alone.hits
    assert hybrid.search("zyzzyva").hits == []


@pytest.mark.parametrize("kind", ["by_words", "hybrid"])
def test_searching_imports_nothing_heavy(kind, request, tmp_path):
    check_light(request.getfixturevalue(kind), tmp_path / "docs.pentad")
