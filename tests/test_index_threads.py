# SPDX-License-Identifier: Apache-2.0
"""Every kind of index, used by several threads at once: each answer is that of one state."""

import threading

import numpy as np
import pytest
from cases import assert_same
from index_cases import KINDS, bits, each_kind
from thread_cases import interrupted, run_beside

import pentad

FILTER = [31, 45, 60, 69, 101, 3]

# What may be asked of an index, of queries and their kind.
CALLS = {
    "search": lambda index, q, kind: tuple(index.search(q, 9)),
    "filter": lambda index, q, kind: tuple(index.search(q, 5, filter=FILTER)),
    "mask": lambda index, q, kind: tuple(index.search(q, 5, filter=np.arange(40) % 3 == 0)),
    "range": lambda index, q, kind: index.range_search(q, kind.radius),
    "rescore": lambda index, q, kind: tuple(index.rescore(q, np.array([[31, 60, 101, 2]] * 2))),
    "reconstruct": lambda index, q, kind: index.reconstruct([60, 31, 45, 69]),
    "ids": lambda index, q, kind: index.ids + 0,
}
RESCORED = {"rescored": lambda index, q, kind: tuple(index.search(q, 9, rescore="store"))}
CODES = {"codes": lambda index, q, kind: index.codes()}
PRUNED = {"pruned": lambda index, q, kind: tuple(index.search(q, 9, exact=False, alpha=1.0))}


def calls(kind):
    return CALLS | (RESCORED | CODES if kind.stores else PRUNED)


def start(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@each_kind
@pytest.mark.parametrize("rising", [True, False])
def test_searches_beside_adds_see_one_state(rng, kind, rising):
    batch, n = 7, 175
    vectors, queries = kind.draw(rng, n), kind.draw(rng, 5)
    ids = np.arange(n) if rising else rng.permutation(n)
    firsts = range(0, n, batch)
    pieces = [kind.part(vectors, range(first, first + batch)) for first in firsts]
    ways = [{}, {"rescore": "store"}] if kind.stores else [{}]
    wants = [set() for _ in ways]
    for size in (0, *(first + batch for first in firsts)):
        state = kind.filled(kind.part(vectors, range(size)), ids[:size])
        for want, way in zip(wants, ways, strict=True):
            want.add(bits(state.search(queries, 6, **way)))
    index = kind.full()

    def add():
        for first, piece in zip(firsts, pieces, strict=True):
            index.add(piece, ids[first : first + batch])

    def search(way):
        return lambda: bits(index.search(queries, 6, **ways[way])) in wants[way]

    def reconstruct():
        known = index.ids
        return bits(index.reconstruct(known)) == bits(state.reconstruct(known))

    def count():
        known = index.ids
        return len(known) % batch == 0 and len(np.unique(known)) == len(known)

    helpers = [search(0), search(len(ways) - 1), search(0), reconstruct, count]
    assert all(run_beside(add, helpers))
    assert len(index) == n


@each_kind
def test_searches_beside_removals_and_updates_see_one_state(rng, kind):
    n, step = 120, 10
    old, new = kind.draw(rng, n), kind.draw(rng, n)
    queries = kind.part(old, [0, 1])

    def changes(index):
        for i in range(0, n, step):
            index.update(np.arange(i, i + step), kind.part(new, range(i, i + step)))
            yield
            index.remove(np.arange(i, i + step // 2))
            yield

    index, alone = (kind.filled(old, np.arange(n)) for _ in range(2))
    wants = {bits(alone.search(queries, n))}
    wants |= {bits(alone.search(queries, n)) for _ in changes(alone)}
    assert len(wants) > n / step
    results = run_beside(
        lambda: list(changes(index)), [lambda: bits(index.search(queries, n)) in wants] * 3
    )
    assert all(results)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param(kind, change, id=f"{name} {change}")
        for name, kind in KINDS.items()
        for change in ("append", "insert", "remove", "update", "train")
        if change != "train" or hasattr(kind.cls, "train")
    ],
)
def test_a_change_at_any_moment(rng, threads, kind, change):
    """Each result is that of the state before or of the one after, never of a mixture."""
    threads(1)
    vectors, new = kind.draw(rng, 40), kind.draw(rng, 70)
    queries, other = kind.part(vectors, [0, 1]), kind.part(new, range(30))

    def retrain(index):
        index.remove(index.ids)
        index.train(new + 1, **kind.quickly)
        index.add(new[:40], np.arange(30, 70))

    changes = {
        "append": lambda index: index.add(other, np.arange(100, 130)),
        "insert": lambda index: index.add(other, np.arange(30)),
        "remove": lambda index: index.remove(np.arange(30, 50)),
        "update": lambda index: index.update(np.arange(30, 60), other),
        "train": retrain,
    }

    def fresh():
        return kind.filled(vectors, np.arange(30, 70))

    before, after = fresh(), fresh()
    changes[change](after)
    for name, call in calls(kind).items():

        def at_moment(at, index, call=call):
            ask, make = (lambda: call(index, queries, kind)), (lambda: changes[change](index))
            result, lasted = interrupted(ask, make, at)
            return bits(result), lasted

        wants = [at_moment(-1, index)[0] for index in (before, after)]
        assert wants[0] != wants[1] or name in ("ids", "reconstruct")
        step = 1 if name in ("ids", "codes") else 19
        at, lasted, rounds = 1 + step // 5 * list(changes).index(change), True, 0
        while lasted:
            result, lasted = at_moment(at, fresh())
            assert result in wants, (name, at)
            at += step
            rounds += 1
        assert rounds > 3, name


@each_kind
def test_adds_from_several_threads_all_arrive(rng, kind):
    vectors = kind.draw(rng, 400)
    pieces = [kind.part(vectors, range(i, i + 20)) for i in range(0, 400, 20)]
    index = kind.full()

    def add(first):
        for i in range(first, first + 5):
            index.add(pieces[i], np.arange(i * 20, i * 20 + 20))

    start(*(lambda first=first: add(first) for first in (0, 5, 10, 15)))
    assert index.ids.tolist() == list(range(400))
    want = kind.filled(vectors, np.arange(400)).search(pieces[0], 5)
    assert_same(tuple(index.search(pieces[0], 5)), tuple(want))


@each_kind
def test_automatic_ids_from_several_threads_are_unique(rng, kind):
    vectors, index = kind.draw(rng, 5), kind.full()
    start(*[lambda: [index.add(vectors) for _ in range(10)]] * 4)
    assert index.ids.tolist() == list(range(200))


@each_kind
def test_a_save_beside_adds_is_one_state(rng, tmp_path, monkeypatch, kind):
    """An add fills up the last block in place; it must not do so between checksum and write."""
    vectors = kind.draw(rng, 41)
    index = kind.filled(kind.part(vectors, range(30)), np.arange(30))
    index.add(kind.part(vectors, range(30, 40)))  # there is room for another behind it
    checksum, adders = pentad._file.zlib.crc32, []
    one_more = kind.part(vectors, [40])

    def checksum_and_add(data):
        value = checksum(data)
        if not adders:
            adders.append(threading.Thread(target=index.add, args=(one_more,)))
            adders[0].start()
            adders[0].join(timeout=0.3)  # either it waits for the save or it is done
        return value

    monkeypatch.setattr(pentad._file.zlib, "crc32", checksum_and_add)
    index.save(tmp_path / "x")
    monkeypatch.undo()
    adders[0].join()
    loaded = kind.cls.load(tmp_path / "x")
    assert (len(loaded), len(index)) == (40, 41)
    want = kind.filled(kind.part(vectors, range(40)), np.arange(40)).search(vectors, 5)
    assert_same(tuple(loaded.search(vectors, 5)), tuple(want))
