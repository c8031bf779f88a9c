# SPDX-License-Identifier: Apache-2.0
"""A sparse index that several threads use: every answer is that of one state."""

import threading

import numpy as np
import pytest
from cases import assert_same
from sparse_index_cases import Model, draw, one_each, part
from thread_cases import interrupted, run_beside

import pentad
from pentad.sparse import SparseIndex

VOCAB = 30


@pytest.mark.parametrize("rising", [True, False])
def test_searches_beside_adds_see_one_state(rng, rising):
    batch, batches, k = 7, 25, 6
    n = batch * batches
    vectors, queries = one_each(rng, n, VOCAB), one_each(rng, 5, VOCAB)
    ids = np.arange(n) if rising else rng.permutation(n)
    pieces = [part(vectors, range(first, first + batch)) for first in range(0, n, batch)]
    index, model, wants = SparseIndex(VOCAB), Model(), set()
    whole = Model(csr=vectors, ids=ids)

    def bits(result):
        return b"".join(array.tobytes() for array in result)

    wants.add(bits(model.search(queries, k)))
    for first, piece in zip(range(0, n, batch), pieces, strict=True):
        model.put(ids[first : first + batch], piece)
        wants.add(bits(model.search(queries, k)))
    every = np.arange(n)[None].repeat(5, 0)
    exact = whole.scores(queries)

    def add():
        for first, piece in zip(range(0, n, batch), pieces, strict=True):
            index.add(piece, ids[first : first + batch])

    def search():
        return "search", bits(index.search(queries, k))

    def rescore():
        scores, found = index.rescore(queries, every)
        there = np.take_along_axis(exact, np.maximum(found, 0), axis=1)
        return "rescore", np.where(found >= 0, there == scores, True).all()

    def reconstruct():
        known = index.ids
        got = index.reconstruct(known)[:3]
        return "vectors", bits(got) == bits(whole.content(known))

    def count():
        known = index.ids
        return "ids", len(known) % batch == 0 and len(np.unique(known)) == len(known)

    for kind, result in run_beside(add, [search, search, rescore, reconstruct, count]):
        assert result in wants if kind == "search" else result
    assert len(index) == n


@pytest.mark.parametrize("change", ["append", "insert", "remove", "update"])
@pytest.mark.parametrize(
    "call", ["search", "pruned", "filter", "mask", "range", "rescore", "reconstruct", "ids"]
)
def test_a_change_at_any_moment(rng, threads, call, change):
    """Each result is that of the state before or of the one after, never of a mixture."""
    threads(1)
    vectors, new = one_each(rng, 40, VOCAB), one_each(rng, 40, VOCAB)
    queries = part(vectors, [0, 1])
    other = part(new, range(30))

    changes = {
        "append": lambda index: index.add(other, np.arange(100, 130)),
        "insert": lambda index: index.add(other, np.arange(30)),
        "remove": lambda index: index.remove(np.arange(30, 50)),
        "update": lambda index: index.update(np.arange(30, 60), other),
    }
    chosen = [31, 45, 60, 69, 101, 3]
    calls = {
        "search": lambda index: tuple(index.search(queries, 9)),
        "pruned": lambda index: tuple(index.search(queries, 9, exact=False, alpha=1.0)),
        "rescore": lambda index: tuple(index.rescore(queries, np.array([[31, 60, 101, 2]] * 2))),
        "filter": lambda index: tuple(index.search(queries, 5, filter=chosen)),
        "mask": lambda index: tuple(index.search(queries, 5, filter=np.arange(40) % 3 == 0)),
        "range": lambda index: index.range_search(queries, 0.01),
        "reconstruct": lambda index: index.reconstruct([60, 31, 45, 69])[:3],
        "ids": lambda index: (index.ids + 0,),
    }

    def fresh():
        index = SparseIndex(VOCAB)
        index.add(vectors, np.arange(30, 70))
        return index

    def bits(result):
        return result if isinstance(result, str) else [part.tobytes() for part in result]

    states = [fresh(), fresh()]
    changes[change](states[1])
    wants = [bits(interrupted(lambda s=s: calls[call](s), None, -1)[0]) for s in states]
    assert wants[0] != wants[1] or call in ("ids", "reconstruct")
    at, lasted, rounds = 1, True, 0
    while lasted:
        index = fresh()
        result, lasted = interrupted(
            lambda i=index: calls[call](i), lambda i=index: changes[change](i), at
        )
        assert bits(result) in wants, at
        at += 1 if call in ("ids", "reconstruct") else 7
        rounds += 1
    assert rounds > 3


def test_adds_from_several_threads_all_arrive(rng):
    vectors = draw(rng, 400, VOCAB)
    pieces = [part(vectors, range(i, i + 20)) for i in range(0, 400, 20)]
    index = SparseIndex(VOCAB)

    def add(first):
        for i in range(first, first + 5):
            index.add(pieces[i], np.arange(i * 20, i * 20 + 20))

    threads = [threading.Thread(target=add, args=(first,)) for first in (0, 5, 10, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.ids.tolist() == list(range(400))
    queries = part(vectors, range(9))
    assert_same(tuple(index.search(queries, 5)), Model(csr=vectors).search(queries, 5))


def test_automatic_ids_from_several_threads_are_unique(rng):
    vectors = draw(rng, 5, VOCAB)
    index = SparseIndex(VOCAB)
    threads = [
        threading.Thread(target=lambda: [index.add(vectors) for _ in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.ids.tolist() == list(range(200))


def test_a_save_beside_adds_is_one_state(rng, tmp_path, monkeypatch):
    vectors = draw(rng, 41, VOCAB)
    index = SparseIndex(VOCAB)
    index.add(part(vectors, range(30)))
    index.add(part(vectors, range(30, 40)))  # there is room for another behind it
    checksum, adders = pentad._file.zlib.crc32, []

    def checksum_and_add(data):
        value = checksum(data)
        if not adders:
            adders.append(threading.Thread(target=index.add, args=(part(vectors, [40]),)))
            adders[0].start()
            adders[0].join(timeout=0.3)  # either it waits for the save or it is done
        return value

    monkeypatch.setattr(pentad._file.zlib, "crc32", checksum_and_add)
    index.save(tmp_path / "x")
    monkeypatch.undo()
    adders[0].join()
    loaded = SparseIndex.load(tmp_path / "x")
    assert len(loaded) == 40
    want = Model(csr=part(vectors, range(40))).search(vectors, 5)
    assert_same(tuple(loaded.search(vectors, 5)), want)
    assert len(index) == 41
