# SPDX-License-Identifier: Apache-2.0
"""`BinaryIndex.to`: the index on a device against the one that it copies.

Its tensors are on the CPU here, whose kernels take the place of the device's, or execute them
(make test-cuda-host); tests/test_gpu_hamming.py has real devices.
"""

import numpy as np
import pytest
from cases import METRICS, assert_same, codes
from hamming_index_cases import STORES, whole_vectors

import pentad
from pentad import _C
from pentad.hamming import BinaryIndex, BinaryIVFIndex
from pentad.pq import ScalarIndex

torch = pytest.importorskip("torch")
from pentad.hamming.device_index import DeviceBinaryIndex, DeviceBinaryIVFIndex  # noqa: E402

# Candidates are scored, and lists visited, by CUDA kernels alone.
needs_kernels = pytest.mark.skipif(
    not _C.cuda_on_host, reason="needs the CUDA kernels, or their execution on the CPU"
)


def filled(rng, n, dim, **options):
    index = BinaryIndex(dim, **options)
    vectors = whole_vectors(rng, n, dim)
    vectors[n // 2 :] = vectors[: n - n // 2]  # ties
    index.add(vectors, rng.permutation(3 * n)[:n])
    return index, DeviceBinaryIndex(index, "cpu")


def tensors(result):
    return tuple(part.numpy() for part in result)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "dim"), [(0, 20), (1, 1), (300, 100), (500, 128)])
def test_search_equals_the_index(rng, metric, n, dim):
    index, there = filled(rng, n, dim, metric=metric)
    assert len(there) == n
    floats, packed = rng.standard_normal((5, dim)).astype(np.float32), codes(rng, 5, dim)
    keep = rng.random(n) < 0.5
    chosen = np.concatenate([index.ids[keep], [10**9]])
    for queries in (floats, packed):
        for k in (0, 1, 7, n + 2):
            for keep_these in (None, keep, chosen):
                got = there.search(torch.from_numpy(queries), k, filter=keep_these)
                assert_same(tensors(got), tuple(index.search(queries, k, filter=keep_these)))
        for radius in (0, 0.4 if metric == "jaccard" else dim * 0.3):
            for keep_these in (None, keep, chosen):
                got = there.range_search(torch.from_numpy(queries), radius, filter=keep_these)
                assert_same(tensors(got), index.range_search(queries, radius, filter=keep_these))
    if n:
        got = there.search(torch.from_numpy(packed), 3, filter=torch.from_numpy(chosen))
        assert_same(tensors(got), tuple(index.search(packed, 3, filter=chosen)))


@needs_kernels
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("n", "dim"), [(0, 20), (300, 100)])
def test_rescoring_equals_the_index(rng, store, n, dim):
    index, there = filled(rng, n, dim, store=store)
    queries = whole_vectors(rng, 4, dim)
    asked = torch.from_numpy(queries)
    for by in ("bits",) if store is None else ("bits", "store"):
        for k in (0, 1, 6, n + 3):
            got = there.search(asked, k, rescore=by, oversample=3)
            assert_same(tensors(got), tuple(index.search(queries, k, rescore=by, oversample=3)))
        ids = rng.integers(-1, 3 * n + 2, (4, 30))
        ids[:, :5] = index.ids[: min(n, 5)].mean() if n else -1
        ids = np.stack([rng.permutation(np.unique(row))[:9] for row in ids])
        got = there.rescore(asked, torch.from_numpy(ids), by=by)
        assert_same(tensors(got), tuple(index.rescore(queries, ids, by=by)))


@needs_kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "dim", "lists"), [(0, 20, 3), (40, 64, 40), (3000, 100, 7)])
def test_lists_equal_the_index(rng, metric, n, dim, lists):
    index = BinaryIVFIndex(dim, lists, metric=metric, store="int8", nprobe=2)
    vectors = whole_vectors(rng, n + lists, dim)
    vectors[n // 2 : n] = vectors[: n - n // 2]  # ties
    index.train(vectors)
    index.add(vectors[:n], rng.permutation(3 * n)[:n])
    there = DeviceBinaryIVFIndex(index, "cpu")
    queries = whole_vectors(rng, 5, dim)
    asked = torch.from_numpy(queries)
    for chosen in (None, rng.random(n) < 0.5):
        for options in ({}, {"nprobe": lists}, {"rescore": "bits"}, {"rescore": "store"}):
            for k in (0, 5, n // 10 + 7):
                want = index.search(queries, k, filter=chosen, **options)
                assert_same(tensors(there.search(asked, k, filter=chosen, **options)), tuple(want))
    with pytest.raises(pentad.DeviceError, match="no CUDA kernel"):
        there.range_search(asked, 3)
    with pytest.raises(pentad.DeviceError, match="at most 2048"):
        there.search(asked, 2049)


def test_it_is_a_copy(rng):
    index, there = filled(rng, 50, 30)
    queries = codes(rng, 3, 30)
    before = tensors(there.search(torch.from_numpy(queries), 60))
    index.remove(index.ids[:20])
    index.update(index.ids[:3], codes(rng, 3, 30))
    assert_same(tensors(there.search(torch.from_numpy(queries), 60)), before)


def test_padding_bits_of_queries_are_taken_as_zero(rng):
    index, there = filled(rng, 50, 30)
    queries = codes(rng, 3, 30)
    got = there.search(torch.from_numpy(queries | np.uint8([0, 0, 0, 3])), 5)
    assert_same(tensors(got), tuple(index.search(queries, 5)))


def test_refusals(rng):
    _, there = filled(rng, 10, 30, store="int8")
    floats, packed = torch.zeros(2, 30), torch.zeros((2, 4), dtype=torch.uint8)
    ids = torch.zeros((2, 3), dtype=torch.int64)
    for error, message, call in (
        (pentad.DeviceError, "numpy array", lambda: there.search(packed.numpy(), 1)),
        (pentad.DeviceError, "is on meta", lambda: there.search(packed.to("meta"), 1)),
        (pentad.DeviceError, "ids is a numpy", lambda: there.rescore(floats, ids.numpy())),
        (TypeError, "queries", lambda: there.search([[1]], 1)),
        (TypeError, "dtype int64", lambda: there.search(packed.long(), 1)),
        (TypeError, "not codes", lambda: there.search(packed, 1, rescore="bits")),
        (TypeError, "not codes", lambda: there.rescore(packed, ids)),
        (TypeError, "k is 1.5", lambda: there.search(packed, 1.5)),
        (TypeError, "expected integers", lambda: there.search(packed, 1, filter=floats[0])),
        (TypeError, "ids have dtype", lambda: there.rescore(floats, ids.int())),
        (ValueError, "29 columns", lambda: there.search(floats[:, :29], 1)),
        (ValueError, "3 bytes", lambda: there.search(packed[:, :3], 1)),
        (ValueError, "filter has shape", lambda: there.search(packed, 1, filter=packed[0] > 0)),
        (ValueError, "one dimension", lambda: there.search(packed, 1, filter=ids)),
        (ValueError, "index stores int8", lambda: there.search(floats, 1, rescore="float16")),
        (ValueError, "radius is NaN", lambda: there.range_search(packed, np.nan)),
        (ValueError, "by is 'x'", lambda: there.rescore(floats, ids, by="x")),
        (ValueError, "ids have shape", lambda: there.rescore(floats, ids[:1])),
    ):
        with pytest.raises(error, match=message):
            call()


def test_what_has_no_kernels_says_so(monkeypatch):
    index = BinaryIndex(8)
    assert index.to("cpu") is index
    with pytest.raises(pentad.DeviceError, match=r"\[BinaryIndex.to\] there are no mps kernels"):
        index.to("mps")
    if not torch.cuda.is_available():
        with pytest.raises(pentad.DeviceError, match="no CUDA"):
            index.to("cuda")
    monkeypatch.setattr(_C, "cuda_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(pentad.DeviceError, match="no CUDA kernels for this kind of index"):
        ScalarIndex(8).to("cuda:0")
    with pytest.raises(ValueError, match="not trained"):
        BinaryIVFIndex(8, 2).to("cuda:0")
