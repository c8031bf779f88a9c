# SPDX-License-Identifier: Apache-2.0
"""pentad._C called with anything: foreign arrays, impostors, hostile arguments, scarce memory."""

import gc
import sys
import weakref

import numpy as np
import pytest
from cases import (
    CALLS,
    LAYOUTS,
    WITHOUT_TORCH,
    assert_same,
    codes,
    laid_out,
    run_python,
)

from pentad import _C
from pentad import hamming as H

torch = pytest.importorskip("torch")


class Lender:
    """An array of a third library: only __dlpack__."""

    def __init__(self, array, **options):
        self.array, self.options = array, options

    def __dlpack__(self, **_):
        return self.array.__dlpack__(**self.options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("options", [{}, {"max_version": (1, 0)}], ids=["legacy", "versioned"])
@pytest.mark.parametrize("maker", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_any_dlpack_object(inputs, maker, options):
    q, db, mask = (Lender(maker(inputs[k].copy()), **options) for k in ("q", "db", "mask"))
    values, ids = np.zeros((6, 5), np.int32), np.zeros((6, 5), np.int64)
    none = [None] * 4
    _C.hamming_topk(q, db, -1, None, mask, *none, "hamming", values, Lender(ids, **options))
    assert_same((values, ids), H.topk(inputs["q"], inputs["db"], 5, mask=inputs["mask"]))
    strided = Lender(maker(inputs["x"].copy())[::2, :: -1 if maker is np.asarray else 1], **options)
    out = np.zeros((3, 10), np.uint8)
    _C.hamming_pack(strided, 0.0, out)
    assert_same(out, H.pack(inputs["x"][::2, :: -1 if maker is np.asarray else 1]))


def test_buffers_of_the_standard_library():
    out = np.zeros(24, np.float32)
    for buffer in (b"\x80\0\1", bytearray(b"\x80\0\1"), memoryview(b"\x80\0\1")):
        _C.hamming_unpack(buffer, 24, out)
        assert np.flatnonzero(out > 0).tolist() == [0, 23]
    assert _C.stream_read(memoryview(b"\1" + b"\0" * 15)) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_read_where_they_lie(inputs, layout):
    out = np.zeros((6, 60), np.int32)
    _C.hamming_distance(laid_out(inputs["q"], layout), laid_out(inputs["db"], layout), "and", out)
    assert_same(out, H.intersection(inputs["q"], inputs["db"]))


def test_a_call_lets_go_of_its_arguments():
    memory = bytearray(64)
    _C.stream_read(memory)
    with pytest.raises((TypeError, ValueError)):
        _C.hamming_pack(memory, 0.0, np.zeros(8, np.uint8))
    with pytest.raises((TypeError, ValueError)):
        _C.hamming_unpack(memory, 3, np.zeros(8, np.float32))
    memory.append(1)  # refused while a buffer is out

    class Array(np.ndarray):
        pass

    array = np.zeros((4, 8), np.float32).view(Array)
    gone = weakref.ref(array)
    _C.hamming_pack(array, 0.0, np.zeros((4, 1), np.uint8))
    with pytest.raises(ValueError, match="out"):
        _C.hamming_pack(array, 0.0, np.zeros((4, 2), np.uint8))
    lender = Lender(array)
    _C.hamming_pack(lender, 0.0, np.zeros((4, 1), np.uint8))
    before = sys.getrefcount(None)
    for _ in range(1000):
        H.pack(array)
    assert abs(sys.getrefcount(None) - before) < 500
    del array, lender
    gc.collect()
    assert gone() is None


class Liar:
    """An object whose __dlpack__ is no such thing."""

    def __init__(self, value):
        self.value = value

    def __dlpack__(self, **_):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def capsule(name):
    import ctypes

    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    return new(1, name, None)


CAPSULE_NAME = b"something else"


def test_impostors_are_refused():
    out = np.zeros((1, 1), np.uint8)
    exchange = type("Exchange", (), {"__dlpack_c_exchange_api__": capsule(CAPSULE_NAME)})()
    empty = type("Exchange", (), {"__dlpack_c_exchange_api__": 5})()
    for impostor, error in (
        (5, TypeError),
        ("text", TypeError),
        ([[1.0]], TypeError),
        (None, TypeError),
        (object(), TypeError),
        (np.ndarray, TypeError),
        (torch.Tensor, TypeError),
        (Liar(5), TypeError),
        (Liar(None), TypeError),
        (Liar(capsule(CAPSULE_NAME)), TypeError),
        (Liar(KeyError("x")), KeyError),
        (exchange, ValueError),
        (empty, TypeError),
        (np.zeros((1, 1), "M8[s]"), TypeError),
        (np.zeros((1, 1), object), TypeError),
        (np.zeros((1, 1), "S4"), TypeError),
        (np.zeros((1, 1), "U4"), TypeError),
        (np.zeros((1, 1), "V8"), TypeError),
        (np.zeros((1, 1), np.longdouble), TypeError),
        (np.zeros((1, 1), np.complex64), TypeError),
        (np.zeros((1, 1), ">f4"), TypeError),
        (np.zeros((1, 1), [("a", "f4"), ("b", "i1")]), TypeError),
        (np.zeros((3, 1), [("a", "f4"), ("b", "i1")])["a"], TypeError),
        (torch.zeros(1, 1, dtype=torch.complex64), TypeError),
        (np.zeros((1,) * 9, np.float32), TypeError),
        (torch.zeros((1,) * 9), TypeError),
        (np.zeros((), np.float32), ValueError),
        (torch.zeros(()), ValueError),
    ):
        with pytest.raises(error):
            _C.hamming_pack(impostor, 0.0, out)
        if impostor is not None:
            with pytest.raises((TypeError, ValueError, KeyError)):
                _C.hamming_pack(np.zeros((1, 8), np.float32), 0.0, impostor)


def read_only(array):
    array.flags.writeable = False
    return array


def blocks_of(rows):
    """(blocks, ones) as an index keeps them."""
    n, width = rows.shape
    blocks = np.zeros((-(-n // 32), _C.hamming_words(width), 32), np.uint16)
    ones = np.zeros(n, np.uint16)
    _C.hamming_to_blocks(rows, 0, blocks, ones)
    return blocks, ones


def hostile_calls():
    rng = np.random.default_rng(0)
    z = np.zeros
    q, db = codes(rng, 3, 64), codes(rng, 70, 64)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    blocks, ones = blocks_of(db)
    values, ids = z((3, 4), np.int32), z((3, 4), np.int64)
    none = [None] * 4
    i64 = lambda *v: np.array(v, np.int64)  # noqa: E731
    offsets, begin, end = i64(0, 1, 2, 3), i64(0, 32, 64), i64(20, 64, 70)
    at = i64([0, 69], [-1, 5], [3, 3])
    vectors, scale, scores = z((70, 64), np.int8), z(70, np.float32), z((3, 2), np.float32)

    def topk(database=db, rows=-1, ones=None, mask=None, ids_in=None, ranges=(None,) * 3, q=q,
             metric="hamming", values=values, ids=ids):  # fmt: skip
        return lambda: _C.hamming_topk(
            q, database, rows, ones, mask, ids_in, *ranges, metric, values, ids
        )

    def ranged(offsets=offsets, begin=begin, end=end):
        return topk(blocks, 70, ranges=(offsets, begin, end))

    def from_blocks(positions, rows=70, out=None, blocks=blocks):
        out = z((len(positions), 8), np.uint8) if out is None else out
        return lambda: _C.hamming_from_blocks(blocks, rows, positions, out)

    def candidates(at=at, rows=70, blocks=blocks, out=scores, x=x):
        return lambda: _C.hamming_score_candidates(x, blocks, rows, at, out)

    def dots(vectors=vectors, scale=scale, at=at, out=scores, x=x):
        return lambda: _C.hamming_dot_candidates(x, vectors, scale, at, out)

    def found(indptr=None, values=None, ids=None):
        indptr = z(4, np.int64) if indptr is None else indptr
        hits = _C.hamming_range(q, db, -1, None, None, *none, "hamming", 64.0)
        v = z(hits.total, np.int32) if values is None else values
        return lambda: hits.write(indptr, v, z(hits.total, np.int64) if ids is None else ids)

    good = {
        "topk": topk(),
        "topk blocks": topk(blocks, 70, metric="hamming"),
        "topk ranges": ranged(),
        "from_blocks": from_blocks(i64(0, 69)),
        "candidates": candidates(),
        "dots": dots(),
        "found": found(),
        "to_blocks": lambda: _C.hamming_to_blocks(db, 0, blocks, ones),
    }
    bad = {
        "topk outputs of another shape": topk(values=z((3, 5), np.int32)),
        "topk ids of another shape": topk(ids=z((4, 4), np.int64)),
        "topk values of another type": topk(values=z((3, 4), np.float32)),
        "topk ids of another type": topk(ids=z((3, 4), np.int32)),
        "topk jaccard into ints": topk(metric="jaccard"),
        "topk read-only": topk(values=read_only(z((3, 4), np.int32))),
        "topk read-only ids": topk(ids=read_only(z((3, 4), np.int64))),
        "topk strided outputs": topk(values=z((3, 8), np.int32)[:, ::2]),
        "topk transposed outputs": topk(values=z((4, 3), np.int32).T),
        "topk outputs of rank 0": topk(values=z((), np.int32), ids=z((), np.int64)),
        "topk outputs of rank 1": topk(values=z(12, np.int32), ids=z(12, np.int64)),
        "topk zero-stride outputs": topk(
            values=np.lib.stride_tricks.as_strided(z(1, np.int32), (3, 4), (0, 0))
        ),
        "topk metric": topk(metric="x"),
        "topk widths": topk(db[:, :7]),
        "topk no width": topk(db[:, :0], q=q[:, :0]),
        "topk rank": topk(db[0]),
        "topk rank 0": topk(np.uint8(1)),
        "topk too many rows": topk(blocks, 97),
        "topk negative rows": topk(blocks, -1),
        "topk huge rows": topk(blocks, 2**62),
        "topk blocks width": topk(blocks[:, :3], 70),
        "topk blocks slice": topk(blocks[:, ::2], 70),
        "topk blocks lanes": topk(blocks[:, :, ::-1], 70),
        "topk blocks reversed": topk(blocks[::-1], 70),
        "topk blocks no words": topk(blocks[:, :0], 70),
        "topk blocks type": topk(blocks.view(np.int16), 70),
        "topk mask length": topk(mask=z(69, bool)),
        "topk mask type": topk(mask=z(70, np.uint8)),
        "topk mask strided": topk(mask=z(140, bool)[::2]),
        "topk mask rank": topk(mask=z((70, 1), bool)),
        "topk ids length": topk(ids_in=z(69, np.int64)),
        "topk ids type": topk(ids_in=z(70, np.int32)),
        "topk jaccard without ones": topk(
            blocks, 70, metric="jaccard", values=z((3, 4), np.float32)
        ),
        "topk jaccard short ones": topk(
            blocks, 70, ones[:69], metric="jaccard", values=z((3, 4), np.float32)
        ),
        "ranges short offsets": ranged(offsets=i64(0, 3)),
        "ranges offsets past the end": ranged(offsets=i64(0, 1, 2, 4)),
        "ranges falling offsets": ranged(offsets=i64(0, 2, 1, 3)),
        "ranges negative offsets": ranged(offsets=i64(-1, 1, 2, 3)),
        "ranges negative begin": ranged(begin=i64(-32, 32, 64)),
        "ranges odd begin": ranged(begin=i64(1, 32, 64)),
        "ranges end past the rows": ranged(end=i64(20, 64, 71)),
        "ranges end before begin": ranged(end=i64(20, 31, 70)),
        "ranges huge": ranged(begin=i64(2**62, 32, 64), end=i64(2**62 + 32, 64, 70)),
        "ranges unequal": ranged(end=i64(20, 64)),
        "ranges incomplete": ranged(end=None),
        "ranges without begin": ranged(begin=None),
        "ranges of rank 0": ranged(begin=np.int64(0)),
        "ranges of rank 2": ranged(begin=begin[None], end=end[None]),
        "ranges strided": ranged(offsets=np.repeat(offsets, 2)[::2]),
        "positions past the rows": from_blocks(i64(70)),
        "positions negative": from_blocks(i64(-1)),
        "positions lowest": from_blocks(i64(-(2**63))),
        "positions strided": from_blocks(i64(1, 2, 3, 4)[::2]),
        "positions rank": from_blocks(i64([1], [2])),
        "positions out": from_blocks(i64(1, 2), out=z((3, 8), np.uint8)),
        "positions out width": from_blocks(i64(1, 2), out=z((2, 9), np.uint8)),
        "positions out read-only": from_blocks(i64(1, 2), out=read_only(z((2, 8), np.uint8))),
        "positions rows": from_blocks(i64(1, 2), rows=97),
        "candidates past the rows": candidates(i64([0, 70], [0, 0], [0, 0])),
        "candidates queries": candidates(at[:2]),
        "candidates strided": candidates(np.repeat(at, 2, 1)[:, ::2]),
        "candidates out": candidates(out=z((3, 3), np.float32)),
        "candidates width": candidates(x=z((3, 65), np.float32)),
        "candidates double": candidates(x=x.astype(np.float64)),
        "dots past the rows": dots(at=i64([0, 70], [0, 0], [0, 0])),
        "dots without a scale": dots(scale=None),
        "dots short scale": dots(scale=scale[:69]),
        "dots width": dots(vectors=vectors[:, :63]),
        "dots strided": dots(vectors=z((70, 128), np.int8)[:, ::2]),
        "dots type": dots(vectors=vectors.view(np.uint8)),
        "dots out": dots(out=read_only(z((3, 2), np.float32))),
        "to_blocks no room": lambda: _C.hamming_to_blocks(db, 27, blocks, None),
        "to_blocks negative": lambda: _C.hamming_to_blocks(db, -1, blocks, None),
        "to_blocks huge": lambda: _C.hamming_to_blocks(db, 2**63 - 1, blocks, None),
        "to_blocks width": lambda: _C.hamming_to_blocks(codes(rng, 3, 65), 0, blocks, None),
        "to_blocks ones": lambda: _C.hamming_to_blocks(db, 0, blocks, ones[:69]),
        "to_blocks ones type": lambda: _C.hamming_to_blocks(db, 0, blocks, ones.view(np.int16)),
        "to_blocks ones read-only": lambda: _C.hamming_to_blocks(
            db, 0, blocks, read_only(ones.copy())
        ),
        "to_blocks read-only": lambda: _C.hamming_to_blocks(db, 0, read_only(blocks.copy()), None),
        "found indptr": found(indptr=z(3, np.int64)),
        "found values": found(values=z(5, np.int32)),
        "found ids": found(ids=z(5, np.int64)),
        "found float values": found(values=z(3 * 70, np.float32)),
        "found read-only": found(indptr=read_only(z(4, np.int64))),
        "distance out": lambda: _C.hamming_distance(q, db, "hamming", z((3, 69), np.int32)),
        "distance rank": lambda: _C.hamming_distance(q[0], db, "hamming", z((1, 70), np.int32)),
        "score out": lambda: _C.hamming_score(x, db, z((70, 3), np.float32)),
        "score width": lambda: _C.hamming_score(x, db[:, :7], z((3, 70), np.float32)),
        "score half": lambda: _C.hamming_score(x.astype("f2"), db, z((3, 70), np.float32)),
        "topk_score NaN": lambda: _C.hamming_topk_score(
            x * np.nan, db, -1, None, None, z((3, 4), np.float32), ids
        ),
        "topk_score out": lambda: _C.hamming_topk_score(
            x, db, -1, None, None, z((3, 4), np.float32), ids[:2]
        ),
        "weighted_sum ranks": lambda: _C.hamming_weighted_sum(
            z((3, 70), np.float32), db, 64, z((3, 64), np.float32)
        ),
        "weighted_sum batch": lambda: _C.hamming_weighted_sum(
            z((2, 3, 70), np.float32), db[None], 64, z((2, 3, 64), np.float32)
        ),
        "weighted_sum rows": lambda: _C.hamming_weighted_sum(
            z((1, 3, 71), np.float32), db[None], 64, z((1, 3, 64), np.float32)
        ),
        "weighted_sum dim": lambda: _C.hamming_weighted_sum(
            z((1, 3, 70), np.float32), db[None], 65, z((1, 3, 65), np.float32)
        ),
        "weighted_sum dim 0": lambda: _C.hamming_weighted_sum(
            z((1, 3, 70), np.float32), db[None, :, :0], 0, z((1, 3, 0), np.float32)
        ),
        "pack out": lambda: _C.hamming_pack(x, 0.0, z((3, 7), np.uint8)),
        "pack out rank": lambda: _C.hamming_pack(x, 0.0, z(24, np.uint8)),
        "pack out strided": lambda: _C.hamming_pack(x, 0.0, z((3, 16), np.uint8)[:, ::2]),
        "pack out read-only": lambda: _C.hamming_pack(x, 0.0, b"24 bytes"),
        "unpack dim": lambda: _C.hamming_unpack(q, 65, z((3, 65), np.float32)),
        "unpack negative dim": lambda: _C.hamming_unpack(q, -7, z((3, 0), np.float32)),
        "unpack huge dim": lambda: _C.hamming_unpack(q, 2**63 - 1, z((3, 64), np.float32)),
        "unpack type": lambda: _C.hamming_unpack(q, 64, z((3, 64), np.int64)),
        "permute dim": lambda: _C.hamming_permute(q, 57 - 1, 1, z((3, 8), np.uint8)),
        "permute out": lambda: _C.hamming_permute(q, 64, 1, z((3, 9), np.uint8)),
        "stream_read strided": lambda: _C.stream_read(z(64, np.uint8)[::2]),
        "stream_read rank": lambda: _C.stream_read(z((8, 8), np.uint8)),
        "result without a search": _C.HammingRange,
    }
    return good, bad


GOOD, BAD = hostile_calls()


@pytest.mark.parametrize("name", GOOD)
def test_the_calls_that_the_hostile_ones_vary_are_fine(name):
    GOOD[name]()


@pytest.mark.parametrize("name", BAD)
def test_hostile_calls_raise(name):
    with pytest.raises((TypeError, ValueError)):
        BAD[name]()


def test_operators_called_directly_with_nonsense():
    CALLS["pack"]({"x": torch.zeros(1, 8)})  # registers them
    ops, u8, f32 = torch.ops.pentad, torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, 32)
    for call in (
        lambda: ops.hamming_topk(u8, u8, -1, "hamming", None),
        lambda: ops.hamming_topk(u8, u8[:, :3], 1, "hamming", None),
        lambda: ops.hamming_topk(u8, u8, 1, "", None),
        lambda: ops.hamming_topk(u8, u8, 1, "hamming", torch.zeros(2).bool()),
        lambda: ops.hamming_topk(u8[0], u8, 1, "hamming", None),
        lambda: ops.hamming_range_search(u8, u8[0], 1.0, "hamming", None),
        lambda: ops.hamming_distance(u8, f32, "hamming"),
        lambda: ops.hamming_distance(u8, u8, "x"),
        lambda: ops.hamming_score(f32.double(), u8),
        lambda: ops.hamming_score(f32, u8[:, :2]),
        lambda: ops.hamming_topk_score(f32, u8, -5, None),
        lambda: ops.hamming_weighted_sum(f32, u8, 32),
        lambda: ops.hamming_weighted_sum(f32[None, :, :3], u8[None], 99),
        lambda: ops.hamming_pack(u8, 0.0),
        lambda: ops.hamming_pack(torch.tensor(1.0), 0.0),
        lambda: ops.hamming_unpack(u8, 99, torch.float32),
        lambda: ops.hamming_unpack(u8, 32, torch.complex64),
        lambda: ops.hamming_permute(u8, -1, 0),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            call()


def test_a_tensor_without_memory_is_refused():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError(func)

    with pytest.raises((ValueError, RuntimeError, TypeError, BufferError, NotImplementedError)):
        _C.hamming_pack(Wrapper(torch.zeros(4, 8)), 0.0, np.zeros((4, 1), np.uint8))


def test_channels_last(rng):
    x = torch.from_numpy(rng.standard_normal((2, 5, 3, 9)).astype(np.float32))
    last = x.contiguous(memory_format=torch.channels_last)
    assert last.stride() != x.stride()
    assert torch.equal(H.pack(last), H.pack(x))
    packed = H.pack(x)
    assert torch.equal(H.unpack(packed.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), 9),
                       H.unpack(packed, 9))  # fmt: skip


# --- Memory ---------------------------------------------------------------------------------------


def bytes_in_use():
    """What the C heap holds; numpy's and the kernels' memory is in it, most of Python's is not."""
    import ctypes

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost")]  # fmt: skip

    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        pytest.skip("needs glibc 2.33")
    mallinfo2.restype = Info
    gc.collect()
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def test_no_call_keeps_memory(inputs):
    nan = inputs["x"] * np.nan

    def round_():
        for call in CALLS.values():
            call(inputs)
        for refused in (
            lambda: H.pack(nan),
            lambda: H.topk_score(nan, inputs["db"], 3),
            lambda: _C.hamming_score(inputs["x"], inputs["db"], np.zeros((1, 1), np.float32)),
            lambda: _C.hamming_pack(Lender(inputs["x"]), 0.0, np.zeros((6, 9), np.uint8)),
        ):
            with pytest.raises(ValueError):  # noqa: PT011
                refused()

    for _ in range(20):
        round_()
    before = bytes_in_use()
    for _ in range(100):
        round_()
    assert bytes_in_use() - before < 100 * 300  # bytes per round; one lost buffer is more


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.parametrize("torch_too", [False, True])
def test_a_kernel_that_runs_out_of_memory_raises(torch_too):
    """In worker threads, too, where an exception that escapes would end the process."""
    start = "import torch\n" if torch_too else WITHOUT_TORCH
    run_python(
        start
        + """
import resource
import numpy as np
import pentad
pentad.set_num_threads(2)
n = 1 << 19
codes = np.zeros((n, 8), np.uint8)
queries = np.zeros((64, 8), np.uint8)
pentad.hamming.topk(queries[:2], codes, 3)  # the threads have their stacks

def pages(column):  # of 0 the addresses, of which threads reserve some; 1 what is in memory
    return int(open("/proc/self/statm").read().split()[column]) * resource.getpagesize()

def limited(room, call):
    size = pages(0)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + room, limits[1]))
    try:
        call()
    except MemoryError:
        pass
    else:
        raise AssertionError("there was enough memory")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)

# The outputs fit (400 MB), the hits of 64 queries beside them do not (1 GB).
before = pages(1)
for _ in range(3):
    limited(600 << 20, lambda: pentad.hamming.topk(queries, codes, n))
    limited(200 << 20, lambda: pentad.hamming.range_search(queries, codes, 1))
assert pages(1) - before < 200 << 20, "what a failed search had is lost"
found = pentad.hamming.topk(queries[:2], codes, 3)[1]
assert found.tolist() == [[0, 1, 2]] * 2
"""
    )


# --- Ranges of rows -------------------------------------------------------------------------------


def test_overlapping_ranges_visit_rows_twice(rng):
    db, q = codes(rng, 64, 64), codes(rng, 1, 64)
    blocks, _ = blocks_of(db)
    values, ids = np.zeros((1, 128), np.int32), np.zeros((1, 128), np.int64)
    ranges = [np.array(v, np.int64) for v in ([0, 2], [0, 0], [64, 64])]
    _C.hamming_topk(q, blocks, 64, None, None, None, *ranges, "hamming", values, ids)
    want = H.topk(q, db, 64)
    # At most as many results as there are rows: each of the best appears twice.
    assert_same(values[:, :64], np.repeat(want[0], 2, 1)[:, :64])
    assert_same(ids[:, :64], np.repeat(want[1], 2, 1)[:, :64])
    assert (ids[:, 64:] == -1).all()


def test_ranges_over_row_major_codes(rng):
    db, q = codes(rng, 96, 40), codes(rng, 2, 40)
    ranges = [np.array(v, np.int64) for v in ([0, 1, 3], [32, 0, 64], [90, 10, 96])]
    hits = _C.hamming_range(q, db, -1, None, None, None, *ranges, "hamming", 99.0)
    indptr, values, ids = np.zeros(3, np.int64), np.zeros(hits.total, np.int32), None
    ids = np.zeros(hits.total, np.int64)
    hits.write(indptr, values, ids)
    assert_same(ids, np.concatenate([np.arange(32, 90), np.arange(10), np.arange(64, 96)]))
    d = H.distance(q, db)
    assert_same(values, np.concatenate([d[0, 32:90], d[1, :10], d[1, 64:96]]))
    assert indptr.tolist() == [0, 58, 100]
