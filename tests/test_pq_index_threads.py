# SPDX-License-Identifier: Apache-2.0
"""Product-quantized indexes that several threads use: every answer is that of one state."""

import threading

import numpy as np
import pytest
from cases import assert_same
from pq_index_cases import CLASSES, Model, make, whole_vectors
from thread_cases import interrupted, run_beside

import pentad
from pentad.pq import PQIndex


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("rising", [True, False])
def test_searches_beside_adds_see_one_state(rng, cls, rising):
    dim, batch, batches, k = 12, 7, 50 if cls is PQIndex else 25, 6
    n = batch * batches
    vectors = whole_vectors(rng, n, dim)
    ids = np.arange(n) if rising else rng.permutation(n)
    queries = whole_vectors(rng, 5, dim)
    index = make(cls, dim, 4, 6, store="int8", spread=20)

    wants = set()
    for size in range(0, n + 1, batch):
        want = Model(index, vectors[:size], ids[:size]).search(queries, k)
        wants.add(b"".join(part.tobytes() for part in want))

    def add():
        for first in range(0, n, batch):
            index.add(vectors[first : first + batch], ids[first : first + batch])

    def search():
        return "search", b"".join(part.tobytes() for part in index.search(queries, k))

    def rescore():
        scores, found = index.search(queries, k, rescore="store")
        there = vectors[np.argsort(ids)[np.maximum(found, 0)]].astype(np.float64)
        exact = ((queries[:, None] - there) ** 2).sum(2)
        return "rescore", np.where(found >= 0, exact == scores, True).all()

    def reconstruct():
        known = index.ids
        return "vectors", (index.reconstruct(known) == vectors[np.argsort(ids)[known]]).all()

    def count():
        known = index.ids
        return "ids", len(known) % batch == 0 and len(np.unique(known)) == len(known)

    results = run_beside(add, [search, search, rescore, reconstruct, count])
    for kind, result in results:
        assert result in wants if kind == "search" else result
    assert len(index) == n


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("change", ["append", "insert", "remove", "update", "train"])
@pytest.mark.parametrize(
    "call", ["search", "rescored", "filter", "range", "rescore", "reconstruct", "codes", "ids"]
)
def test_a_change_at_any_moment(rng, threads, cls, call, change):
    """Each result is that of the state before or of the one after, never of a mixture."""
    threads(1)
    vectors, new = whole_vectors(rng, 40, 12), whole_vectors(rng, 40, 12)
    queries = vectors[:2] + 0
    sample = rng.integers(-20, 21, (64, 12)).astype(np.float32)

    def retrain(index):
        index.remove(index.ids)
        index.train(sample, iterations=0)
        index.add(new, np.arange(30, 70))

    changes = {
        "append": lambda index: index.add(new[:30], np.arange(100, 130)),
        "insert": lambda index: index.add(new[:30], np.arange(30)),
        "remove": lambda index: index.remove(np.arange(30, 50)),
        "update": lambda index: index.update(np.arange(30, 60), new[:30]),
        "train": retrain,
    }
    calls = {
        "search": lambda index: tuple(index.search(queries, 9)),
        "rescored": lambda index: tuple(index.search(queries, 9, rescore="store")),
        "rescore": lambda index: tuple(index.rescore(queries, np.array([[31, 60, 101, 2]] * 2))),
        "filter": lambda index: tuple(index.search(queries, 5, filter=[31, 45, 60, 69, 101, 3])),
        "range": lambda index: tuple(index.range_search(queries, 3e4)),
        "reconstruct": lambda index: (index.reconstruct([60, 31, 45, 69]),),
        "codes": lambda index: (index.codes(),),
        "ids": lambda index: (index.ids + 0,),
    }

    def fresh():
        index = make(cls, 12, 4, 4, store="int8", spread=20)
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
        at += 1 if call in ("ids", "reconstruct", "codes") else 11
        rounds += 1
    assert rounds > 3


@pytest.mark.parametrize("cls", CLASSES)
def test_adds_from_several_threads_all_arrive(rng, cls):
    vectors = whole_vectors(rng, 400, 10)
    index = make(cls, 10, 5)

    def add(part):
        for i in range(part * 100, part * 100 + 100, 20):
            index.add(vectors[i : i + 20], np.arange(i, i + 20))

    threads = [threading.Thread(target=add, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.ids.tolist() == list(range(400))
    want = Model(index, vectors).search(vectors[:9], 5)
    assert_same(tuple(index.search(vectors[:9], 5)), want)


@pytest.mark.parametrize("cls", CLASSES)
def test_automatic_ids_from_several_threads_are_unique(rng, cls):
    vectors = whole_vectors(rng, 5, 10)
    index = make(cls, 10, 5)
    threads = [
        threading.Thread(target=lambda: [index.add(vectors) for _ in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.ids.tolist() == list(range(200))


def test_a_save_beside_adds_is_one_state(rng, tmp_path, monkeypatch):
    """An add fills up the last block in place; it must not do so between checksum and write."""
    vectors = whole_vectors(rng, 100, 10)
    index = make(PQIndex, 10, 5)
    index.add(vectors[:40])
    checksum, adders = pentad._file.zlib.crc32, []

    def checksum_and_add(data):
        value = checksum(data)
        if not adders:
            adders.append(threading.Thread(target=index.add, args=(vectors[40:41],)))
            adders[0].start()
            adders[0].join(timeout=0.3)  # either it waits for the save or it is done
        return value

    monkeypatch.setattr(pentad._file.zlib, "crc32", checksum_and_add)
    index.save(tmp_path / "x")
    monkeypatch.undo()
    adders[0].join()
    loaded = PQIndex.load(tmp_path / "x")
    assert len(loaded) == 40
    want = Model(index, vectors[:40]).search(vectors[:9], 5)
    assert_same(tuple(loaded.search(vectors[:9], 5)), want)
    assert len(index) == 41
