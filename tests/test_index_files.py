# SPDX-License-Identifier: Apache-2.0
"""Every kind of index in files: round trips, damage, and parts that do not fit."""

import numpy as np
import pytest
from cases import assert_same
from index_cases import KINDS, arrays_of, each_file, each_kind

import pentad
from pentad.hamming import BinaryIndex
from pentad.pq import PQIndex


def ways(kind, index):
    """Options of `search` that between them read every section."""
    if not kind.stores:
        return {}, {"exact": False}, {"filter": index.ids[::2]}
    rescored = [{"rescore": "store"}] if index.store else []
    return ({}, {"filter": index.ids[::2]}, *rescored)


def answers(kind, index, queries):
    found = [part for options in ways(kind, index) for part in index.search(queries, 40, **options)]
    rows = arrays_of(index.reconstruct(index.ids))
    return (*found, *index.range_search(queries, kind.radius), *rows)


@each_file
def test_round_trip(rng, tmp_path, kind, options):
    path = tmp_path / "x.pentad"
    for n, mmap in [(0, True), (1, True), (64, False), (77, True)]:
        vectors = kind.draw(rng, n + 5)
        queries, more = kind.part(vectors, range(3)), kind.part(vectors, range(n, n + 5))
        some, ids = kind.part(vectors, range(n)), rng.permutation(1000)[:n]
        index = kind.filled(some, ids, **options)
        index.save(path)
        loaded = kind.cls.load(path, mmap=mmap)
        assert len(loaded) == n
        for name in index._options:
            assert getattr(loaded, name) == getattr(index, name)
        assert_same(answers(kind, loaded, queries), answers(kind, index, queries))
        before = path.read_bytes()
        first = index.ids[:2].tolist()
        for changed in (index, loaded):  # a loaded index can be changed; its file cannot
            changed.add(more)
            changed.remove(first)
            changed.update(changed.ids[:1], kind.part(vectors, [0]))
        assert_same(answers(kind, loaded, queries), answers(kind, index, queries))
        assert path.read_bytes() == before
        loaded.save(path)  # over the file that it is mapped from
        again = kind.cls.load(path)
        assert_same(answers(kind, again, queries), answers(kind, index, queries))


@each_kind
def test_loading_another_kind(tmp_path, kind):
    other = PQIndex if kind.cls is BinaryIndex else BinaryIndex
    kind.full().save(tmp_path / "x")
    with pytest.raises(pentad.FormatError, match=f"holds '{kind.cls._kind}', expected '"):
        other.load(tmp_path / "x")


@each_kind
def test_damaged_files_are_refused(rng, tmp_path, kind):
    vectors, path = kind.draw(rng, 40), tmp_path / "x"
    index, queries = kind.filled(vectors, np.arange(40)), kind.part(vectors, [0, 1])
    index.save(path)
    data, want = path.read_bytes(), answers(kind, index, queries)
    for at in rng.integers(0, len(data), 150):
        bent = bytearray(data)
        bent[at] ^= 1 << rng.integers(8)
        path.write_bytes(bent)
        try:
            loaded = kind.cls.load(path)
        except pentad.FormatError:
            continue
        # Only the gaps between the sections are free to change.
        assert_same(answers(kind, loaded, queries), want)
    for length in rng.integers(0, len(data), 50):
        path.write_bytes(data[:length])
        with pytest.raises(pentad.FormatError):
            kind.cls.load(path)


@each_kind
def test_every_section_is_verified(rng, tmp_path, kind):
    """A byte in the middle of each section; a file cut within each."""
    index, path = kind.filled(kind.draw(rng, 150), np.arange(150)), tmp_path / "x"
    index.save(path)
    data = path.read_bytes()
    _, arrays = pentad._file.read(path, kind.cls._kind, mmap=False)
    assert arrays.keys() == index.to_sections()[1].keys()
    for name, array in arrays.items():
        if not array.size:
            continue
        at = data.index(array.tobytes()) + array.nbytes // 2
        bent = bytearray(data)
        bent[at] ^= 0xFF
        path.write_bytes(bent)
        with pytest.raises(pentad.FormatError, match=f"section {name} does not match its checksum"):
            kind.cls.load(path)
        path.write_bytes(data[:at])
        with pytest.raises(pentad.FormatError):
            kind.cls.load(path, verify=False)


@each_file
def test_unverified_damage_never_crashes(rng, tmp_path, kind, options):
    vectors, path, refused = kind.draw(rng, 90), tmp_path / "x", 0
    kind.filled(vectors, np.arange(90), **options).save(path)
    data, queries = path.read_bytes(), kind.part(vectors, [0, 1])
    for at in rng.integers(0, len(data), 120):
        bent = bytearray(data)
        bent[at : at + 8] = rng.bytes(len(bent[at : at + 8]))
        path.write_bytes(bent)
        try:
            loaded = kind.cls.load(path, verify=False)
            for way in ways(kind, loaded):
                loaded.search(queries, 5, **way)
            loaded.range_search(queries, kind.radius)
            loaded.reconstruct(loaded.ids[:9])
            loaded.remove(loaded.ids[:1])
            loaded.add(queries)
        except ValueError:
            refused += 1
    assert refused > 5


# --- Parts that do not fit ------------------------------------------------------------------------


def put(at, value):
    """Puts a value, or what it makes of the section, at a position."""

    def change(section):
        flat = section.reshape(-1)
        flat[at] = value(flat) if callable(value) else value

    return change


NOT_FINITE = tuple(put(5, value) for value in (np.nan, np.inf))
TOO_LARGE = (*NOT_FINITE, put(5, 1e30))

# By name of a section, for the kinds that have it: what may not stand there. Codes may be any.
CHANGES = {
    "ids": (put(0, -5), put(1, lambda ids: ids[0])),
    "sizes": (put(0, -1), put(0, 2**40), put(0, lambda s: s[0] + 1)),
    **dict.fromkeys(("codebooks", "rotation", "centroids", "centre", "spread"), TOO_LARGE),
    "code_scale": (*NOT_FINITE, put(3, -1)),
    "code_bias": NOT_FINITE,
    "indptr": (
        *(put(0, 1), put(-1, lambda a: a[-1] - 1), put(5, lambda a: a[6] + 1)),
        *(put(5, 2**40), put(5, -1)),
    ),
    "terms": (put(-1, 40), put(0, -1)),
    "scale": (put(3, -1), put(3, np.nan), put(3, 3e38)),
    "window0.terms": (put(-1, 40), put(1, lambda a: a[0]), put(0, -1)),
    "window0.starts": (put(0, 1), put(1, -1), put(-1, 2**40)),
    "window0.scales": (put(0, np.nan),),
}


@each_kind
def test_sections_that_do_not_fit_are_refused(rng, kind):
    index = kind.filled(kind.draw(rng, 40), rng.permutation(40))
    meta, arrays = index.to_sections()
    kind.cls.from_sections(meta, arrays)
    for name, array in arrays.items():
        missing = {k: v for k, v in arrays.items() if k != name}
        wrong = [array[None], array.astype(np.complex64), np.zeros((), array.dtype)]
        wrong += [array[:-1], np.concatenate([array, array[-1:]])] if array.size else []
        sets = [arrays | {name: other} for other in wrong] + [arrays | {"spare": array}]
        for other in (missing, *sets):
            with pytest.raises(pentad.FormatError):
                kind.cls.from_sections(meta, other)
        for change in CHANGES.get(name, ()) if array.dtype != np.uint8 else ():
            bent = array.copy()
            change(bent)
            with pytest.raises(pentad.FormatError):
                kind.cls.from_sections(meta, arrays | {name: bent})


@pytest.mark.parametrize("kind", [KINDS["pq"], KINDS["pq lists"]])
def test_codes_beyond_the_codebooks_are_refused(rng, kind):
    meta, arrays = kind.filled(kind.draw(rng, 40), np.arange(40)).to_sections()
    beyond = arrays["blocks"].copy()
    beyond.flat[3] = 64
    with pytest.raises(pentad.FormatError, match="exceed 6 bits"):
        kind.cls.from_sections(meta, arrays | {"blocks": beyond})


# Descriptions that mean something else and fit all the same.
FINE = [("coarse_dims", None), ("seed", 0)]
FINE += [(name, large) for name in ("nprobe", "seed") for large in (10**30, 2**31)]

# By name of an option: values of it that do not fit the sections of `Kind.full`.
OTHERS = {
    "dim": (99, 24, 11),
    "metric": ("hamming", "l1"),
    "store": ("float16",),
    "M": (4, 3),
    "nbits": (8, 4),
    "lists": (4,),
    "coarse_dims": (6,),
    "vocab_size": (39,),
    "values": ("exact", "float16"),
}


@each_kind
def test_descriptions_that_do_not_fit_are_refused(rng, kind):
    index = kind.filled(kind.draw(rng, 40), np.arange(40))
    meta, arrays = index.to_sections()
    for name in meta:
        with pytest.raises(pentad.FormatError):
            kind.cls.from_sections({k: v for k, v in meta.items() if k != name}, arrays)
        wrong = (None, -1, "x", [1], {}, 1.5, 10**30, 0, 2**31, *OTHERS.get(name, ()))
        for value in wrong:
            if (name, value) not in FINE and value != meta[name]:
                with pytest.raises(pentad.FormatError):
                    kind.cls.from_sections(meta | {name: value}, arrays)


@each_kind
def test_an_index_within_a_file(rng, tmp_path, kind):
    """`to_sections` describes all of an index, beside other things in one file."""
    vectors = kind.draw(rng, 30)
    index = kind.filled(vectors, np.arange(30))
    meta, arrays = index.to_sections()
    pentad._file.write(
        tmp_path / "x", "test", {"index": meta}, {f"a/{k}": v for k, v in arrays.items()}
    )
    about, parts = pentad._file.read(tmp_path / "x", "test")
    other = kind.cls.from_sections(about["index"], {k[2:]: v for k, v in parts.items()})
    assert_same(answers(kind, other, vectors), answers(kind, index, vectors))
