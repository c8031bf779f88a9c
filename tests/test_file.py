# SPDX-License-Identifier: Apache-2.0
"""The file format: what goes in comes out, damage is refused, saves are all or nothing."""

import json
import os
import signal
import stat
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from cases import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

import pentad
from pentad import _file

DTYPES = ["bool", "float16", "float32", "float64"] + [
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
]


def sample(rng=None):
    rng = rng or np.random.default_rng(3)
    return {
        "ids": rng.integers(0, 2**60, 13),
        "codes": rng.integers(0, 256, (5, 7)).astype(np.uint8),
        "nothing": np.zeros((0, 4), np.float32),
        "scale": rng.standard_normal(3).astype(np.float32),
    }


META = {"dim": 7, "store": None, "text": "αβγ \n", "list": [1, 2.5, True], "nested": {"a": {}}}


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (64,), (5, 3, 2)])
def test_every_type_and_shape_comes_back(tmp_path, rng, mmap, dtype, shape):
    array = np.asarray(rng.standard_normal(shape) * 100).astype(np.int64).astype(dtype)
    big = array.astype(array.dtype.newbyteorder(">"))
    cut = np.repeat(array, 2, axis=-1)[..., ::2] if shape else array
    arrays = {"plain": array, "big": big, "cut": cut, "fortran": np.copy(array, order="F")}
    _file.write(tmp_path / "x", "kind", META, arrays)
    meta, back = _file.read(tmp_path / "x", "kind", mmap=mmap)
    assert meta == META
    assert list(back) == list(arrays)
    for name in arrays:
        assert_same(back[name], array)


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=4)), max_size=6
    ),
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=4),
    st.booleans(),
)
def test_any_sections_come_back(tmp_path_factory, sections, meta, mmap):
    rng = np.random.default_rng(0)
    arrays = {
        f"s{i}/∂": rng.integers(0, 2, shape).astype(dtype)
        for i, (dtype, shape) in enumerate(sections)
    }
    path = tmp_path_factory.mktemp("any") / "x"
    _file.write(path, "kind", meta, arrays)
    got, back = _file.read(path, "kind", mmap=mmap)
    assert got == meta
    assert list(back) == list(arrays)
    assert_same(tuple(back.values()), tuple(arrays.values()))


@pytest.mark.parametrize("mmap", [True, False])
def test_sections_are_aligned_and_read_only(tmp_path, mmap):
    _file.write(tmp_path / "x", "kind", {}, sample())
    _, arrays = _file.read(tmp_path / "x", "kind", mmap=mmap)
    for array in arrays.values():
        assert not array.flags.writeable
        assert array.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1
        if array.size:
            with pytest.raises(ValueError, match=r"writeable|WRITEABLE"):
                array.flags.writeable = True
            assert array.ctypes.data % 64 == 0 or not mmap


def test_a_mapped_file_is_not_copied(tmp_path):
    def mapped():
        with open("/proc/self/smaps") as maps:
            return "section_of_megabytes" in maps.read()

    path = tmp_path / "section_of_megabytes"
    _file.write(path, "kind", {}, {"a": np.ones(1 << 20)})
    _, arrays = _file.read(path, "kind")
    if sys.platform == "linux":
        assert mapped()
    os.unlink(path)  # the mapping keeps the data
    assert arrays["a"].sum() == 1 << 20
    del arrays
    if sys.platform == "linux":
        assert not mapped()


def test_the_bytes_are_the_documented_ones(tmp_path):
    array = np.arange(10, dtype=np.int32)
    _file.write(tmp_path / "x", "some kind", {"a": 1}, {"first": array, "second": array[:1]})
    data = (tmp_path / "x").read_bytes()
    magic, version, checksum, length = struct.unpack_from("<8sIIQ", data)
    assert (magic, version) == (b"PENTAD\r\n", 1)
    text = data[24 : 24 + length]
    assert zlib.crc32(text) == checksum
    header = json.loads(text)
    start = -(-(24 + length) // 64) * 64
    assert header == {
        "kind": "some kind",
        "meta": {"a": 1},
        "sections": [
            {"name": "first", "dtype": "int32", "shape": [10], "offset": 0,
             "crc32": zlib.crc32(array.tobytes())},
            {"name": "second", "dtype": "int32", "shape": [1], "offset": 64,
             "crc32": zlib.crc32(array[:1].tobytes())},
        ],
        "size": 128,
    }  # fmt: skip
    assert len(data) == start + 128
    assert data[start : start + 40] == array.astype("<i4").tobytes()
    assert not any(data[24 + length : start])
    assert not any(data[start + 40 : start + 64])


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        _file.write(tmp_path / name, "kind", META, sample())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.array([object()]),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.zeros(2, [("a", "i4")]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, np.complex64),
        np.zeros(2, np.longdouble),
    ],
    ids=lambda a: a.dtype.name,
)
def test_other_types_are_refused_before_anything_is_written(tmp_path, array):
    with pytest.raises(TypeError, match="section odd"):
        _file.write(tmp_path / "x", "kind", {}, sample() | {"odd": array})
    with pytest.raises(TypeError):
        _file.write(tmp_path / "x", "kind", {"odd": {1, 2}}, sample())
    assert list(tmp_path.iterdir()) == []


def saved(tmp_path):
    path = tmp_path / "x"
    _file.write(path, "kind", META, sample())
    return path, path.read_bytes()


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_cut_at_any_length_is_refused(tmp_path, mmap):
    path, data = saved(tmp_path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        for verify in (True, False):
            with pytest.raises(pentad.FormatError, match=str(path)):
                _file.read(path, "kind", mmap=mmap, verify=verify)
    for more in (b"\0", b"\0" * 64):
        path.write_bytes(data + more)
        with pytest.raises(pentad.FormatError):
            _file.read(path, "kind", mmap=mmap)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_bent_byte_is_refused_or_harmless(tmp_path, mmap):
    path, data = saved(tmp_path)
    length = struct.unpack_from("<Q", data, 16)[0]
    start = -(-(24 + length) // 64) * 64
    used = set(range(24 + length))
    for section in json.loads(data[24 : 24 + length])["sections"]:
        array = sample()[section["name"]]
        used |= set(range(start + section["offset"], start + section["offset"] + array.nbytes))
    for at in range(len(data)):
        for bit in (0, 7) if at in used else (3,):
            bent = bytearray(data)
            bent[at] ^= 1 << bit
            path.write_bytes(bent)
            if at in used:
                with pytest.raises(pentad.FormatError):
                    _file.read(path, "kind", mmap=mmap)
            else:  # a gap between sections, which nobody reads
                meta, arrays = _file.read(path, "kind", mmap=mmap)
                assert meta == META
                assert_same(tuple(arrays.values()), tuple(sample().values()))


def test_unverified_sections_are_still_bounded(tmp_path):
    path, data = saved(tmp_path)
    rng = np.random.default_rng(0)
    for at in range(0, len(data), 3):
        bent = bytearray(data)
        bent[at] ^= int(rng.integers(1, 256))
        path.write_bytes(bent)
        try:
            _, arrays = _file.read(path, "kind", verify=False)
        except pentad.FormatError:
            continue
        for name, array in sample().items():
            assert arrays[name].shape == array.shape
            arrays[name].sum()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"PENTAD", b"PENTAD\r\n", b"PENTAD\n" + b"\0" * 100, b"%PDF-1.4" + b" " * 100,
     b"PENTAD\r\n" + b"\xff" * 16, b"PENTAD\r\n" + b"\xff" * 1000],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    for mmap in (True, False):
        with pytest.raises(pentad.FormatError):
            _file.read(tmp_path / "x", "kind", mmap=mmap)


def test_another_kind_or_version_is_named(tmp_path):
    path, data = saved(tmp_path)
    with pytest.raises(pentad.FormatError, match="holds 'kind', expected 'other'"):
        _file.read(path, "other")
    path.write_bytes(data[:8] + struct.pack("<I", 2) + data[12:])
    with pytest.raises(pentad.FormatError, match="format version 2, this release reads 1"):
        _file.read(path, "kind")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        _file.read(tmp_path / "none", "kind")
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on the system
        _file.read(tmp_path, "kind")
    with pytest.raises(FileNotFoundError):
        _file.write(tmp_path / "no" / "x", "kind", {}, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # noqa: PT011
        _file.write(tmp_path / "folder", "kind", {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def forged(path, header, payload=b""):
    """A file with this header and true checksums of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<8sIIQ", b"PENTAD\r\n", 1, zlib.crc32(text), len(text))
    padding = b"\0" * (-(24 + len(text)) % 64)
    path.write_bytes(prefix + text + padding + payload)


def one_section(**changes):
    section = {"name": "a", "dtype": "int32", "shape": [2], "offset": 0, "crc32": 0}
    return {"kind": "kind", "meta": {}, "sections": [section | changes], "size": 64}


FORGED = {
    "no json": b"{",
    "no text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "a list": [],
    "a number": 5,
    "empty": {},
    "no sections": {"kind": "kind", "meta": {}, "size": 64},
    "no meta": {"kind": "kind", "sections": [], "size": 64},
    "sections of numbers": {"kind": "kind", "meta": {}, "sections": [1], "size": 64},
    "sections a number": {"kind": "kind", "meta": {}, "sections": 1, "size": 64},
    "size text": {"kind": "kind", "meta": {}, "sections": [], "size": "64"},
    "size wrong": {"kind": "kind", "meta": {}, "sections": [], "size": 65},
    "size huge": {"kind": "kind", "meta": {}, "sections": [], "size": 10**40},
    "dtype object": one_section(dtype="object"),
    "dtype list": one_section(dtype=[]),
    "dtype none": one_section(dtype=None),
    "shape negative": one_section(shape=[-1]),
    "shape text": one_section(shape="2"),
    "shape float": one_section(shape=[2.0]),
    "shape huge": one_section(shape=[2**62]),
    "shape product": one_section(shape=[2**32, 2**32]),
    "shape wrapping": one_section(shape=[2**31, 2**33 + 1]),
    "shape ranks": one_section(shape=[1] * 70),
    "shape empty huge": one_section(shape=[0, 2**70]),
    "shape number": one_section(shape=2),
    "offset negative": one_section(offset=-8),
    "offset far negative": one_section(offset=-(10**30)),
    "offset past": one_section(offset=64),
    "offset huge": one_section(offset=10**30),
    "offset float": one_section(offset=0.0),
    "offset none": one_section(offset=None),
    "name list": one_section(name=[]),
    "checksum": one_section(crc32=1),
    "checksum none": one_section(crc32=None),
}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", FORGED)
def test_forged_headers_are_refused(tmp_path, name, mmap):
    path = tmp_path / "x"
    forged(path, one_section(crc32=zlib.crc32(b"\0" * 8)), b"\0" * 64)
    _file.read(path, "kind", mmap=mmap)  # the forger knows the trade
    forged(path, FORGED[name], b"\0" * 64)
    with pytest.raises(pentad.FormatError):
        _file.read(path, "kind", mmap=mmap)
    if "checksum" not in name:
        with pytest.raises(pentad.FormatError):
            _file.read(path, "kind", mmap=mmap, verify=False)


# --- Atomicity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "existing"),
    [(c, e) for c in ("replace", "fsync", "fdopen") for e in (True, False)] + [("chmod", True)],
)  # only a file that is replaced hands its mode on
@pytest.mark.parametrize("error", [OSError("disk on fire"), KeyboardInterrupt()])
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, call, error, existing):
    path = tmp_path / "x"
    if existing:
        _file.write(path, "kind", {}, sample())
        before = path.read_bytes()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(_file.os, call, fail)
    with pytest.raises(type(error)):
        _file.write(path, "kind", {"new": 1}, {"a": np.zeros(100_000)})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["x"] if existing else [])
    if existing:
        assert path.read_bytes() == before


def test_a_failing_write_leaves_the_old_file(tmp_path):
    """The disk is full half-way: a limit on the size of files stands in for it."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "x"
    _file.write(path, "kind", {}, sample())
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            _file.write(path, "kind", {}, {"a": np.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("moment", ["fsync", "replace", "write"])
def test_a_killed_save_leaves_the_old_file(tmp_path, moment):
    path = tmp_path / "x"
    _file.write(path, "kind", {}, sample())
    before = path.read_bytes()
    script = f"""
import os, signal
import numpy as np
from pentad import _file

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if {moment!r} == "write":
    whole = _file._bytes
    calls = []
    def bytes_then_die(array):
        calls.append(1)
        if len(calls) == 4:  # two checksums, then the first of two sections
            die()
        return whole(array)
    _file._bytes = bytes_then_die
else:
    setattr(_file.os, {moment!r}, die)
_file.write({str(path)!r}, "kind", {{"new": 1}}, {{"a": np.zeros(300_000), "b": np.ones(9)}})
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    _file.read(path, "kind")
    # What is left over does not disturb the next save.
    _file.write(path, "kind", {"new": 2}, sample())
    assert _file.read(path, "kind")[0] == {"new": 2}


def test_a_reader_keeps_the_file_that_it_opened(tmp_path):
    path = tmp_path / "x"
    _file.write(path, "kind", {}, {"a": np.arange(1000)})
    _, old = _file.read(path, "kind")
    _file.write(path, "kind", {}, {"a": np.zeros(5)})
    assert_same(old["a"], np.arange(1000))
    assert_same(_file.read(path, "kind")[1]["a"], np.zeros(5))


def test_two_writers_never_mix(tmp_path):
    import threading

    path = tmp_path / "x"
    contents = [{"a": np.full(20_000, i)} for i in range(3)]

    def save(content):
        for _ in range(10):
            _file.write(path, "kind", {}, content)

    threads = [threading.Thread(target=save, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = np.unique(_file.read(path, "kind")[1]["a"])
    assert len(values) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# --- Permissions and paths ------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_modes_of_new_and_replaced_files(tmp_path):
    before = os.umask(0o027)
    try:
        path = tmp_path / "x"
        _file.write(path, "kind", {}, sample())
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        _file.write(path, "kind", {}, sample())
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
        assert os.umask(0o027) == 0o027  # which saving left alone
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            _file.write(tmp_path / "x", "kind", {}, {})
    finally:
        tmp_path.chmod(0o700)


def test_paths_of_every_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["x", "with space", "ünï.pentad", ".hidden", "a" * 200]
    for name in names:
        _file.write(name, "kind", {}, sample())
        assert_same(_file.read(tmp_path / name, "kind")[1]["ids"], sample()["ids"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
