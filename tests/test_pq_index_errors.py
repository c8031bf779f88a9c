# SPDX-License-Identifier: Apache-2.0
"""What PQIndex and IVFPQIndex alone refuse; test_index_errors.py has the rest."""

import numpy as np
import pytest
from index_cases import assert_unchanged_by_refusals
from pq_index_cases import CLASSES, make, whole_vectors

import pentad
from pentad.pq import IVFPQIndex, PQIndex

V = np.ones((2, 20), np.float32)
NAN = np.where(np.eye(2, 20), np.nan, 1).astype(np.float32)

REFUSED = {
    "add infinity": (lambda i: i.add(V * np.inf), ValueError, "infinity"),
    "add doubles": (lambda i: i.add(V.astype(np.float64) * 1e39), ValueError, "infinity"),
    "search codes": (lambda i: i.search(V.astype(np.uint8), 1), TypeError, "dtype uint8"),
    "search bits": (lambda i: i.search(V, 1, rescore="bits"), ValueError, "rescore is 'bits'"),
    "search float16": (
        lambda i: i.search(V, 1, rescore="float16"),
        ValueError,
        "store=None|stores int8",
    ),
    "search dims": (lambda i: i.search(V, 1, dims=6), ValueError, "dims is 6, expected a multiple"),
    "search no dims": (lambda i: i.search(V, 1, dims=0), ValueError, "dims is 0"),
    "search more dims": (lambda i: i.search(V, 1, dims=24), ValueError, "dims is 24.*at most 20"),
    "search dims columns": (
        lambda i: i.search(V[:, :12], 1, dims=8),
        ValueError,
        "12 columns, expected 20 or 8",
    ),
    "train": (lambda i: i.train(np.ones((20, 20))), ValueError, "already holds 10 rows"),
    "train few": (lambda i: i.train(V), ValueError, "2 vectors, at least 16 are needed"),
}


@pytest.mark.parametrize("store", [None, "int8"])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_refused_calls_change_nothing(rng, cls, store, metric):
    index = make(cls, 20, 5, store=store, metric=metric)
    index.add(whole_vectors(rng, 10, 20))
    assert_unchanged_by_refusals(index, REFUSED.values(), whole_vectors(rng, 4, 20), 8)


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


def test_no_dimension_is_padded():
    assert pentad.pq.PQIndex(12, 4).dsub == 3
    assert pentad.pq.IVFPQIndex(12, 12, lists=2).dsub == 1
