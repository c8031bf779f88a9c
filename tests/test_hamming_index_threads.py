# SPDX-License-Identifier: Apache-2.0
"""Indexes that several threads use at once: every answer is that of one state."""

import threading

import numpy as np
import pytest
from cases import assert_same, codes
from hamming_index_cases import CLASSES, expected_search, make, whole_vectors
from thread_cases import interrupted, run_beside

import pentad
from pentad.hamming import BinaryIndex, reference


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
        "rescore": lambda index: tuple(index.rescore(queries, np.array([[31, 60, 101, 2]] * 2))),
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
