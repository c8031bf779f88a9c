# SPDX-License-Identifier: Apache-2.0
"""What PQIndex and IVFPQIndex refuse, and that a refused call changes nothing."""

import copy

import numpy as np
import pytest
from cases import assert_same
from pq_index_cases import CLASSES, make, whole_vectors

import pentad
from pentad.pq import IVFPQIndex, PQIndex

V = np.ones((2, 20), np.float32)
NAN = np.where(np.eye(2, 20), np.nan, 1).astype(np.float32)

REFUSED = {
    "add columns": (lambda i: i.add(V[:, :19]), ValueError, r"add\].*19 columns, expected 20"),
    "add rank": (lambda i: i.add(V[0]), ValueError, "shape"),
    "add dtype": (lambda i: i.add(V.astype(np.int32)), TypeError, "dtype int32"),
    "add objects": (lambda i: i.add(V.astype(object)), TypeError, "dtype object"),
    "add structures": (lambda i: i.add(np.zeros((2, 20), [("a", "f4")])), TypeError, "dtype"),
    "add big-endian": (lambda i: i.add(V.astype(">f4")), TypeError, "dtype >f4"),
    "add a list": (lambda i: i.add([[1.0] * 20]), TypeError, "is list"),
    "add None": (lambda i: i.add(None), TypeError, "vectors is NoneType"),
    "add NaN": (lambda i: i.add(NAN), ValueError, "NaN"),
    "add infinity": (lambda i: i.add(V * np.inf), ValueError, "infinity"),
    "add doubles": (lambda i: i.add(V.astype(np.float64) * 1e39), ValueError, "infinity"),
    "add ids length": (lambda i: i.add(V, [90]), ValueError, "1 ids for 2 rows"),
    "add ids twice": (lambda i: i.add(V, [90, 90]), ValueError, "90 is given twice"),
    "add ids taken": (lambda i: i.add(V, [90, 4]), ValueError, "id 4 is already"),
    "add ids negative": (lambda i: i.add(V, [90, -1]), ValueError, "-1 is negative"),
    "add ids float": (lambda i: i.add(V, [90.0, 91.0]), TypeError, "dtype float64"),
    "add ids huge": (lambda i: i.add(V, np.array([90, 2**63], "u8")), ValueError, "exceeds"),
    "search k": (lambda i: i.search(V, -1), ValueError, "k is -1"),
    "search float k": (lambda i: i.search(V, 1.0), TypeError, "k is 1.0"),
    "search columns": (lambda i: i.search(V[:, :5], 1), ValueError, "5 columns, expected 20"),
    "search rank": (lambda i: i.search(V[0], 1), ValueError, "shape"),
    "search NaN": (lambda i: i.search(NAN, 1), ValueError, "NaN"),
    "search infinity": (lambda i: i.search(V * np.inf, 1), ValueError, "infinity"),
    "search codes": (lambda i: i.search(V.astype(np.uint8), 1), TypeError, "dtype uint8"),
    "search list": (lambda i: i.search([[0, 0, 0]], 1), TypeError, "is list"),
    "search rescore": (lambda i: i.search(V, 1, rescore="all"), ValueError, "rescore is 'all'"),
    "search bits": (lambda i: i.search(V, 1, rescore="bits"), ValueError, "rescore is 'bits'"),
    "search float16": (
        lambda i: i.search(V, 1, rescore="float16"),
        ValueError,
        "store=None|stores int8",
    ),
    "search oversample": (lambda i: i.search(V, 1, oversample=0), ValueError, "oversample is 0"),
    "search oversample type": (lambda i: i.search(V, 1, oversample=1.5), TypeError, "oversample"),
    "search dims": (lambda i: i.search(V, 1, dims=6), ValueError, "dims is 6, expected a multiple"),
    "search no dims": (lambda i: i.search(V, 1, dims=0), ValueError, "dims is 0"),
    "search more dims": (lambda i: i.search(V, 1, dims=24), ValueError, "dims is 24.*at most 20"),
    "search dims columns": (
        lambda i: i.search(V[:, :12], 1, dims=8),
        ValueError,
        "12 columns, expected 20 or 8",
    ),
    "search filter length": (
        lambda i: i.search(V, 1, filter=np.ones(3, bool)),
        ValueError,
        "filter",
    ),
    "search filter rank": (
        lambda i: i.search(V, 1, filter=np.ones((10, 1), bool)),
        ValueError,
        "filter",
    ),
    "search filter float": (lambda i: i.search(V, 1, filter=[1.5]), TypeError, "dtype float64"),
    "search filter negative": (lambda i: i.search(V, 1, filter=[-2]), ValueError, "negative"),
    "search beyond memory": (lambda i: i.search(V, 2**42), MemoryError, None),
    "range NaN": (lambda i: i.range_search(V, np.nan), ValueError, "radius is NaN"),
    "range queries": (lambda i: i.range_search(V[:, :5], 1), ValueError, "5 columns"),
    "range text": (lambda i: i.range_search(V, "x"), TypeError, "radius is 'x'"),
    "remove twice": (lambda i: i.remove([1, 1]), ValueError, "1 is given twice"),
    "remove negative": (lambda i: i.remove([-1]), ValueError, "negative"),
    "remove scalar": (lambda i: i.remove(1), ValueError, "one dimension"),
    "update unknown": (lambda i: i.update([1, 99], V), ValueError, "99 is not in the index"),
    "update length": (lambda i: i.update([1], V), ValueError, r"update\] 1 ids for 2 rows"),
    "update twice": (lambda i: i.update([1, 1], V), ValueError, "given twice"),
    "update columns": (lambda i: i.update([1, 2], V[:, :3]), ValueError, r"update\].*3 columns"),
    "update NaN": (lambda i: i.update([1, 2], NAN), ValueError, "NaN"),
    "update dtype": (lambda i: i.update([1, 2], V.astype(int)), TypeError, "dtype int64"),
    "reconstruct unknown": (lambda i: i.reconstruct([99]), ValueError, "99 is not in the index"),
    "reconstruct scalar": (lambda i: i.reconstruct(1), ValueError, "one dimension"),
    "codes unknown": (lambda i: i.codes([99]), ValueError, "99 is not in the index"),
    "rescore by": (lambda i: i.rescore(V, [[1]], by="bits"), ValueError, "by is 'bits'"),
    "train": (lambda i: i.train(np.ones((20, 20))), ValueError, "already holds 10 rows"),
    "train few": (lambda i: i.train(V), ValueError, "2 vectors, at least 16 are needed"),
    "save nowhere": (lambda i: i.save("/nonexistent/folder/x"), FileNotFoundError, None),
}


@pytest.mark.parametrize("store", [None, "int8"])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_refused_calls_change_nothing(rng, cls, store, metric):
    index = make(cls, 20, 5, store=store, metric=metric)
    index.add(whole_vectors(rng, 10, 20))
    queries = whole_vectors(rng, 4, 20)

    def state():
        _, arrays = index.to_sections()
        found = tuple(index.search(queries, 12)) + tuple(index.range_search(queries, 8))
        return (*found, index.ids, *(a.copy() for a in arrays.values()))

    before = state()
    for call, error, message in REFUSED.values():
        with pytest.raises(error, match=message):
            call(index)
        assert_same(state(), before)


def test_components_too_large_to_square():
    for cls in CLASSES:
        for metric in ("l2", "ip"):
            index = make(cls, 20, metric=metric)
            index.add(V * 2.0**50)
            assert np.isfinite(index.search(-V * 2.0**50, 2).scores).all()
            for call in (index.add, lambda v, i=index: i.search(v, 1)):
                with pytest.raises(ValueError, match=r"beyond 2\*\*50"):
                    call(V * np.float32(1.2e15))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_rotation_leaves_no_prefix(cls):
    index = make(cls, 20, rotation=True)
    with pytest.raises(ValueError, match="rotation leaves no prefix"):
        index.search(V, 1, dims=8)


def test_rescore_refuses():
    index = make(PQIndex, 20)
    index.add(V)
    ids = np.zeros((2, 1), np.int64)
    with pytest.raises(ValueError, match="store=None"):
        index.rescore(V, ids)
    index = make(PQIndex, 20, store="int8")
    with pytest.raises(TypeError, match="int32"):
        index.rescore(V, ids.astype(np.int32))
    with pytest.raises(ValueError, match=r"expected \(2, c\)"):
        index.rescore(V, ids[:1])


def untrained(cls=PQIndex, *args, **options):
    options = {"lists": 4} | options if cls is IVFPQIndex else options
    return cls(*(args or (20, 4, 4)), **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PQIndex(0, 1), ValueError, "dim is 0"),
        (lambda: PQIndex(8.0, 1), TypeError, "dim is 8.0"),
        (lambda: PQIndex(8, 0), ValueError, "M is 0"),
        (lambda: PQIndex(10, 3), ValueError, "dim is 10, which M = 3 subspaces do not divide"),
        (lambda: PQIndex(8, 16), ValueError, "do not divide"),
        (lambda: PQIndex(8, 4, 5), ValueError, "nbits is 5, expected 4, 6 or 8"),
        (lambda: PQIndex(8, 4, "8"), TypeError, "nbits is '8'"),
        (lambda: PQIndex(8, 4, metric="hamming"), ValueError, "metric is 'hamming'"),
        (lambda: PQIndex(8, 4, rotation="pca"), ValueError, "rotation is 'pca'"),
        (lambda: PQIndex(8, 4, store="int4"), ValueError, "store is 'int4'"),
        (lambda: IVFPQIndex(8, 4, lists=0), ValueError, "lists is 0"),
        (lambda: IVFPQIndex(8, 4, lists=2.5), TypeError, "lists is 2.5"),
        (lambda: IVFPQIndex(8, 4, lists=10**6), ValueError, "at most 65536"),
        (lambda: IVFPQIndex(8, 4, lists=4, nprobe=0), ValueError, "nprobe is 0"),
        (lambda: IVFPQIndex(8, 4, lists=4, residual=1), TypeError, "residual is 1"),
        (lambda: IVFPQIndex(8, 4, lists=4, coarse_dims=9), ValueError, "coarse_dims is 9"),
        (
            lambda: IVFPQIndex(8, 4, lists=4, coarse_dims=4, rotation="opq"),
            ValueError,
            "none with a rotation",
        ),
        (lambda: untrained().train(V), ValueError, "2 vectors, at least 16 are needed"),
        (lambda: untrained(IVFPQIndex).train(V), ValueError, "2 vectors, at least 16"),
        (lambda: untrained(IVFPQIndex, lists=40).train(V), ValueError, "at least 40"),
        (lambda: untrained().train(V[:, :9]), ValueError, "9 columns"),
        (lambda: untrained().train(NAN), ValueError, "NaN"),
        (lambda: untrained().train(V.repeat(9, 0), iterations=-1), ValueError, "iterations is -1"),
    ],
)
def test_bad_construction_and_training(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("cls", CLASSES)
def test_an_untrained_index_says_so(cls, tmp_path):
    index = untrained(cls)
    index.save(tmp_path / "x")
    for made in (index, cls.load(tmp_path / "x"), copy.copy(index)):
        for call in (
            lambda i: i.search(V, 1),
            lambda i: i.range_search(V, 1),
            lambda i: i.add(V),
            lambda i: i.add(V[:0]),
            lambda i: i.update([], V[:0]),
            lambda i: i.rescore(V, np.zeros((len(V), 1), np.int64)),
        ):
            with pytest.raises(ValueError, match=r"not trained; call train\(\) first"):
                call(made)
        assert made.codebooks is None
        assert len(made) == 0
        assert made.remove([1]) == 0


def test_no_dimension_is_padded():
    assert pentad.pq.PQIndex(12, 4).dsub == 3
    assert pentad.pq.IVFPQIndex(12, 12, lists=2).dsub == 1
