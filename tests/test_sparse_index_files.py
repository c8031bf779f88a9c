# SPDX-License-Identifier: Apache-2.0
"""Sparse indexes in files: round trips, damage, and parts that do not fit."""

import numpy as np
import pytest
from cases import assert_same
from sparse_index_cases import VALUES, draw, one_each, part

import pentad
from pentad.sparse import SparseIndex

VOCAB = 40


@pytest.mark.parametrize("values", VALUES)
def test_round_trip(rng, tmp_path, values):
    path = tmp_path / "x.pentad"
    for n, mmap in [(0, True), (1, True), (64, False), (77, True), (77, False)]:
        index = SparseIndex(VOCAB, values=values)
        vectors = draw(rng, n + 5, VOCAB)
        queries = part(vectors, range(3))
        index.add(part(vectors, range(n)), rng.permutation(1000)[:n])
        index.save(path)
        loaded = SparseIndex.load(path, mmap=mmap)
        assert (loaded.vocab_size, loaded.values, len(loaded)) == (VOCAB, values, n)
        for options in ({}, {"exact": False}, {"filter": index.ids[::2]}):
            assert_same(
                tuple(loaded.search(queries, 4, **options)),
                tuple(index.search(queries, 4, **options)),
            )
        assert_same(loaded.reconstruct(loaded.ids), index.reconstruct(index.ids))
        before = path.read_bytes()
        first = index.ids[:2].tolist()
        for changed in (index, loaded):  # a loaded index can be changed; its file cannot
            changed.add(part(vectors, range(n, n + 5)))
            changed.remove(first)
            changed.update(changed.ids[:1], part(vectors, [0]))
        assert_same(tuple(loaded.search(vectors, 9)), tuple(index.search(vectors, 9)))
        assert path.read_bytes() == before
        loaded.save(path)  # over the file that it is mapped from
        again = SparseIndex.load(path)
        assert_same(tuple(again.search(vectors, 9)), tuple(index.search(vectors, 9)))


def many(rng, n, values="exact", vocab=3000):
    """An index of n documents of four terms."""
    terms = np.sort(rng.integers(0, vocab // 4, (n, 4)) + np.arange(4) * (vocab // 4), axis=1)
    weights = rng.random((n, 4)).astype(np.float32) + 0.1
    index = SparseIndex(vocab, values=values)
    index.add((np.arange(n + 1) * 4, terms.reshape(-1), weights.reshape(-1)))
    return index


@pytest.mark.parametrize(
    ("values", "n"), [("exact", 140_000), ("float16", 140_000), ("uint8", 1_000_000)]
)
def test_a_file_of_several_windows(rng, tmp_path, values, n):
    path, index = tmp_path / "x", many(rng, n, values)
    index.save(path)
    queries = index.reconstruct([5, 70_000, n - 1])
    want = index.search(queries, 20)
    for mmap in (True, False):
        loaded = SparseIndex.load(path, mmap=mmap)
        assert_same(tuple(loaded.search(queries, 20)), tuple(want))
        loaded.add(index.reconstruct([n - 1]))  # builds the last window anew
        assert loaded.search(queries, 2, filter=[n - 1, n]).ids[2].tolist() == [n - 1, n]
    meta, arrays = index.to_sections()
    for name in [name for name in arrays if name.startswith("window")]:
        with pytest.raises(pentad.FormatError):
            SparseIndex.from_sections(meta, {k: v for k, v in arrays.items() if k != name})
    last = (n - 1) // 65536
    spare = {name: arrays[f"window{last}.{name}"] for name in ("terms", "starts", "scales")}
    for name, array in spare.items():  # of a window of documents that are not there
        with pytest.raises(pentad.FormatError, match=f"window{last + 1}.{name} is none of such"):
            SparseIndex.from_sections(meta, arrays | {f"window{last + 1}.{name}": array})


def test_loading_another_kind(tmp_path):
    pentad.pq.ScalarIndex(8).save(tmp_path / "x")
    with pytest.raises(pentad.FormatError, match=r"expected 'sparse\.SparseIndex'"):
        SparseIndex.load(tmp_path / "x")


def full(rng, n=40):
    index = SparseIndex(VOCAB, values="uint8")  # with every section that there may be
    index.add(one_each(rng, n, VOCAB))
    return index


def test_damaged_files_are_refused(rng, tmp_path):
    index, path, queries = full(rng), tmp_path / "x", one_each(rng, 3, VOCAB)
    index.save(path)
    data = path.read_bytes()

    def answers(index):
        return (*index.search(queries, 40), *index.range_search(queries, 0.1))

    want = answers(index)
    for at in rng.integers(0, len(data), 200):
        bent = bytearray(data)
        bent[at] ^= 1 << rng.integers(8)
        path.write_bytes(bent)
        try:
            loaded = SparseIndex.load(path)
        except pentad.FormatError:
            continue
        assert_same(answers(loaded), want)  # only the gaps between the sections may change
    for length in rng.integers(0, len(data), 50):
        path.write_bytes(data[:length])
        with pytest.raises(pentad.FormatError):
            SparseIndex.load(path)


def test_every_section_is_verified(rng, tmp_path):
    """A byte in the middle of each section; a file cut within each."""
    index, path = full(rng, 150), tmp_path / "x"
    index.save(path)
    data = path.read_bytes()
    _, arrays = pentad._file.read(path, SparseIndex._kind, mmap=False)
    assert set(arrays) >= {"ids", "indptr", "terms", "values", "scale", "window0.terms"}
    for name, array in arrays.items():
        if not array.size:
            continue
        at = data.index(array.tobytes()) + array.nbytes // 2
        bent = bytearray(data)
        bent[at] ^= 0xFF
        path.write_bytes(bent)
        with pytest.raises(pentad.FormatError, match=f"section {name} does not match its checksum"):
            SparseIndex.load(path)
        path.write_bytes(data[:at])
        with pytest.raises(pentad.FormatError):
            SparseIndex.load(path, verify=False)


@pytest.mark.parametrize("values", VALUES)
def test_unverified_damage_never_crashes(rng, tmp_path, values):
    index, path = SparseIndex(VOCAB, values=values), tmp_path / "x"
    vectors = one_each(rng, 90, VOCAB)
    index.add(vectors)
    index.save(path)
    data = path.read_bytes()
    queries, refused = part(vectors, range(2)), 0
    for at in rng.integers(0, len(data), 250):
        bent = bytearray(data)
        bent[at : at + 8] = rng.bytes(len(bent[at : at + 8]))
        path.write_bytes(bent)
        try:
            loaded = SparseIndex.load(path, verify=False)
            loaded.search(queries, 5, filter=loaded.ids[:5])
            loaded.search(queries, 5)
            loaded.search(queries, 5, exact=False)
            loaded.range_search(queries, 0.5)
            loaded.reconstruct(loaded.ids[:9])
            loaded.remove(loaded.ids[:1])
            loaded.add(queries)
        except ValueError:
            refused += 1
    assert refused > 50


def test_sections_that_do_not_fit_are_refused(rng):
    index = full(rng)
    meta, arrays = index.to_sections()
    SparseIndex.from_sections(meta, arrays)
    for name, array in arrays.items():
        missing = {k: v for k, v in arrays.items() if k != name}
        wrong = [array[None], array.astype(np.complex64), np.zeros((), array.dtype)]
        wrong += [array[:-1], np.append(array, array[-1:])] if array.size else []
        for other in (missing, *(arrays | {name: w} for w in wrong)):
            with pytest.raises(pentad.FormatError):
                SparseIndex.from_sections(meta, other)
    with pytest.raises(pentad.FormatError, match="section ones is none"):
        SparseIndex.from_sections(meta, arrays | {"ones": arrays["ids"]})

    first = int(np.flatnonzero(np.diff(arrays["indptr"]) > 1)[0])  # a row of two terms or more
    two = slice(arrays["indptr"][first], arrays["indptr"][first] + 2)
    window = arrays["window0.terms"]
    for name, change in (
        *(("ids", lambda a: a.__setitem__(1, a[0])), ("ids", lambda a: a.__setitem__(0, -5))),
        ("indptr", lambda a: a.__setitem__(0, 1)),
        ("indptr", lambda a: a.__setitem__(-1, a[-1] - 1)),
        ("indptr", lambda a: a.__setitem__(5, a[6] + 1)),
        ("indptr", lambda a: a.__setitem__(5, 2**40)),
        ("indptr", lambda a: a.__setitem__(5, -1)),
        ("terms", lambda a: a.__setitem__(two, a[two][::-1].copy())),
        ("terms", lambda a: a.__setitem__(two, a[two.start])),
        *(("terms", lambda a: a.__setitem__(-1, VOCAB)), ("terms", lambda a: a.__setitem__(0, -1))),
        *(("scale", lambda a: a.__setitem__(3, -1)), ("scale", lambda a: a.__setitem__(3, np.nan))),
        *(("scale", lambda a: a.__setitem__(3, 1e13)),),
        ("window0.terms", lambda a: a.__setitem__(-1, VOCAB)),
        ("window0.terms", lambda a: a.__setitem__(1, window[0])),
        ("window0.terms", lambda a: a.__setitem__(0, -1)),
        ("window0.starts", lambda a: a.__setitem__(0, 1)),
        ("window0.starts", lambda a: a.__setitem__(1, -1)),
        ("window0.starts", lambda a: a.__setitem__(-1, 2**40)),
        ("window0.scales", lambda a: a.__setitem__(0, np.nan)),
    ):
        bent = arrays[name].copy()
        change(bent)
        with pytest.raises(pentad.FormatError):
            SparseIndex.from_sections(meta, arrays | {name: bent})


@pytest.mark.parametrize("values", ["exact", "float16"])
def test_values_that_do_not_fit_are_refused(rng, values):
    index = SparseIndex(VOCAB, values=values)
    index.add(one_each(rng, 20, VOCAB))
    meta, arrays = index.to_sections()
    for value in (-1, np.nan, np.inf, *([3e14] if values == "exact" else [])):
        bent = arrays["values"].copy()
        bent[7] = value
        with pytest.raises(pentad.FormatError, match="section values"):
            SparseIndex.from_sections(meta, arrays | {"values": bent})
    scale = np.ones(20, np.float32)
    with pytest.raises(pentad.FormatError, match="section scale is none"):
        SparseIndex.from_sections(meta, arrays | {"scale": scale})


def test_descriptions_that_do_not_fit_are_refused(rng):
    meta, arrays = full(rng).to_sections()
    for key in meta:
        with pytest.raises(pentad.FormatError):
            SparseIndex.from_sections({k: v for k, v in meta.items() if k != key}, arrays)
        for value in (None, -1, "x", [1], {}, 1.5, 10**30, 0, 2**31):
            with pytest.raises(pentad.FormatError):
                SparseIndex.from_sections(meta | {key: value}, arrays)
    for change in ({"vocab_size": VOCAB - 1}, {"values": "exact"}, {"values": "float16"}):
        with pytest.raises(pentad.FormatError):
            SparseIndex.from_sections(meta | change, arrays)
    SparseIndex.from_sections(meta | {"vocab_size": 2**31 - 1}, arrays)


def test_an_index_within_a_file(rng, tmp_path):
    """`to_sections` describes all of an index, beside other things in one file."""
    index = full(rng)
    meta, arrays = index.to_sections()
    pentad._file.write(
        tmp_path / "x", "test", {"index": meta}, {f"a/{k}": v for k, v in arrays.items()}
    )
    about, parts = pentad._file.read(tmp_path / "x", "test")
    other = SparseIndex.from_sections(about["index"], {k[2:]: v for k, v in parts.items()})
    queries = one_each(rng, 4, VOCAB)
    assert_same(tuple(other.search(queries, 40)), tuple(index.search(queries, 40)))
