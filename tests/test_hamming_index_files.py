# SPDX-License-Identifier: Apache-2.0
"""Indexes in files: round trips, damage, and parts that do not fit."""

import numpy as np
import pytest
from cases import METRICS, assert_same
from index_cases import CLASSES, STORES, make, whole_vectors

import pentad
from pentad.hamming import BinaryIndex, BinaryIVFIndex


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
