# SPDX-License-Identifier: Apache-2.0
"""Product-quantized indexes in files: round trips, damage, and parts that do not fit."""

import numpy as np
import pytest
from cases import assert_same
from pq_index_cases import CLASSES, METRICS, STORES, make, whole_vectors

import pentad
from pentad.pq import IVFPQIndex, PQIndex


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("metric", "nbits"), [("l2", 4), ("ip", 6), ("cosine", 8)])
@pytest.mark.parametrize("rotation", [False, True])
def test_round_trip(rng, tmp_path, cls, store, metric, nbits, rotation):
    path = tmp_path / "x.pentad"
    for n, mmap in [(0, True), (1, True), (64, False), (77, True), (77, False)]:
        index = make(cls, 10, 5, nbits, metric=metric, store=store, rotation=rotation)
        vectors = whole_vectors(rng, n + 5, 10)
        index.add(vectors[:n], rng.permutation(1000)[:n])
        index.save(path)
        loaded = cls.load(path, mmap=mmap)
        for name in cls._options:
            assert getattr(loaded, name) == getattr(index, name)
        assert len(loaded) == n
        for options in ({}, {"rescore": store}, {"filter": index.ids[::2]}):
            assert_same(
                tuple(loaded.search(vectors[:3], 4, **options)),
                tuple(index.search(vectors[:3], 4, **options)),
            )
        assert_same(loaded.reconstruct(loaded.ids), index.reconstruct(index.ids))
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
    make(IVFPQIndex, 8).save(tmp_path / "x")
    with pytest.raises(pentad.FormatError, match=r"holds 'pq\.IVFPQIndex', expected 'pq\.PQIndex'"):
        PQIndex.load(tmp_path / "x")


def full(rng, cls, n=40):
    """An index with every section that there may be."""
    index = make(cls, 12, 3, 6, metric="l2", store="int8", rotation=True)
    index.add(whole_vectors(rng, n, 12))
    return index


@pytest.mark.parametrize("cls", CLASSES)
def test_damaged_files_are_refused(rng, tmp_path, cls):
    index, path, queries = full(rng, cls), tmp_path / "x", np.ones((2, 12), np.float32)
    index.save(path)
    data = path.read_bytes()

    def answers(index):
        return (
            *index.search(queries, 40),
            *index.search(queries, 40, rescore="store"),
            *index.range_search(queries, 2e4),
        )

    want = answers(index)
    for at in rng.integers(0, len(data), 150):
        bent = bytearray(data)
        bent[at] ^= 1 << rng.integers(8)
        path.write_bytes(bent)
        try:
            loaded = cls.load(path)
        except pentad.FormatError:
            continue
        assert_same(answers(loaded), want)  # only the gaps between the sections may change
    for length in rng.integers(0, len(data), 50):
        path.write_bytes(data[:length])
        with pytest.raises(pentad.FormatError):
            cls.load(path)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_section_is_verified(rng, tmp_path, cls):
    """A byte in the middle of each section; a file cut within each."""
    index, path = full(rng, cls), tmp_path / "x"
    index.save(path)
    data = path.read_bytes()
    _, arrays = pentad._file.read(path, cls._kind, mmap=False)
    assert set(arrays) >= {"blocks", "ids", "vectors", "scale", "codebooks", "rotation"}
    for name, array in arrays.items():
        at = data.index(array.tobytes()) + array.nbytes // 2
        bent = bytearray(data)
        bent[at] ^= 0xFF
        path.write_bytes(bent)
        with pytest.raises(pentad.FormatError, match=f"section {name} does not match its checksum"):
            cls.load(path)
        path.write_bytes(data[:at])
        with pytest.raises(pentad.FormatError):
            cls.load(path, verify=False)


@pytest.mark.parametrize("cls", CLASSES)
def test_unverified_damage_never_crashes(rng, tmp_path, cls):
    index, path = full(rng, cls, 90), tmp_path / "x"
    index.save(path)
    data = path.read_bytes()
    queries = np.ones((2, 12), np.float32)
    for at in rng.integers(0, len(data), 200):
        bent = bytearray(data)
        bent[at : at + 8] = rng.bytes(len(bent[at : at + 8]))
        path.write_bytes(bent)
        try:
            loaded = cls.load(path, verify=False)
            loaded.search(queries, 5, rescore="store", filter=loaded.ids[:5])
            loaded.range_search(queries, 0.5)
            loaded.reconstruct(loaded.ids[:9])
            loaded.add(queries)
        except ValueError:
            pass


@pytest.mark.parametrize("cls", CLASSES)
def test_sections_that_do_not_fit_are_refused(rng, cls):
    index = full(rng, cls)
    meta, arrays = index.to_sections()
    cls.from_sections(meta, arrays)
    for name, array in arrays.items():
        missing = {k: v for k, v in arrays.items() if k != name}
        wrong = (array[:-1], array[None], array.astype(np.float64), np.zeros((), array.dtype))
        for other in (missing, *(arrays | {name: w} for w in wrong), arrays | {"ones": array}):
            with pytest.raises(pentad.FormatError):
                cls.from_sections(meta, other)
    for name in {"codebooks", "rotation", "centroids"} & arrays.keys():
        for value in (np.nan, np.inf, 1e30):
            bent = arrays[name].copy()
            bent.flat[5] = value
            with pytest.raises(pentad.FormatError, match=f"section {name}"):
                cls.from_sections(meta, arrays | {name: bent})
    beyond = arrays["blocks"].copy()
    beyond.flat[3] = 64
    with pytest.raises(pentad.FormatError, match="exceed 6 bits"):
        cls.from_sections(meta, arrays | {"blocks": beyond})
    for bad in (arrays["ids"][0], -5):
        swapped = arrays["ids"].copy()
        swapped[swapped == arrays["ids"][1]] = bad
        with pytest.raises(pentad.FormatError):
            cls.from_sections(meta, arrays | {"ids": swapped})


FINE = [("coarse_dims", None), ("nprobe", 10**30)]


@pytest.mark.parametrize("cls", CLASSES)
def test_descriptions_that_do_not_fit_are_refused(rng, cls):
    meta, arrays = full(rng, cls).to_sections()
    for key in meta:
        with pytest.raises(pentad.FormatError):
            cls.from_sections({k: v for k, v in meta.items() if k != key}, arrays)
        for value in (None, -1, "x", [1], {}, 1.5, 10**30, 0):
            if (key, value) not in FINE:
                with pytest.raises(pentad.FormatError):
                    cls.from_sections(meta | {key: value}, arrays)
    changes = [{"dim": 99}, {"dim": 24}, {"M": 4}, {"nbits": 8}, {"nbits": 4}, {"store": None}]
    changes += [{"store": "float16"}, {"rotation": None}, {"metric": "hamming"}]
    changes += [{"lists": 4}, {"coarse_dims": 6}] if cls is IVFPQIndex else []
    for change in changes:
        with pytest.raises(pentad.FormatError):
            cls.from_sections(meta | change, arrays)


@pytest.mark.parametrize("metric", METRICS)
def test_an_index_within_a_file(rng, tmp_path, metric):
    """`to_sections` describes all of an index, beside other things in one file."""
    index = make(PQIndex, 12, 3, 6, metric=metric)
    index.add(whole_vectors(rng, 30, 12))
    meta, arrays = index.to_sections()
    pentad._file.write(
        tmp_path / "x", "test", {"index": meta}, {f"a/{k}": v for k, v in arrays.items()}
    )
    about, parts = pentad._file.read(tmp_path / "x", "test")
    other = PQIndex.from_sections(about["index"], {k[2:]: v for k, v in parts.items()})
    queries = whole_vectors(rng, 4, 12)
    assert_same(tuple(other.search(queries, 40)), tuple(index.search(queries, 40)))
