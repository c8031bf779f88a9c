# SPDX-License-Identifier: Apache-2.0
"""`SparseIndex.to`: the index on a device against the one that it copies.

Its tensors are on the CPU here, where the build for it executes the kernels (make test-cuda-host);
tests/test_gpu_sparse.py has real devices.
"""

import numpy as np
import pytest

import pentad
from pentad import _C
from pentad.sparse import SparseIndex

torch = pytest.importorskip("torch")
from pentad.sparse.device_index import DeviceSparseIndex  # noqa: E402

pytestmark = pytest.mark.skipif(
    not _C.cuda_on_host, reason="needs the CUDA kernels executed on the CPU"
)
VOCAB = 300


def rows(rng, n, most=12, signed=False):
    """Few distinct values, so that there are ties."""
    terms = [np.sort(rng.choice(VOCAB, rng.integers(0, most), replace=False)) for _ in range(n)]
    indptr = np.cumsum([0, *map(len, terms)])
    values = rng.integers(-3 if signed else 1, 4, indptr[-1]).astype(np.float32)
    return indptr, np.concatenate([np.zeros(0, np.int64), *terms]), values


def there(given):
    return tuple(torch.from_numpy(a) for a in given)


def same(got, want):
    np.testing.assert_array_equal(got.scores.cpu(), want.scores)
    np.testing.assert_array_equal(got.ids.cpu(), want.ids)


@pytest.mark.parametrize("values", ["exact", "float16", "uint8"])
@pytest.mark.parametrize("n", [0, 1, 500])
def test_results_are_the_index_own(rng, values, n):
    index = SparseIndex(VOCAB, values=values)
    index.add(rows(rng, n), ids=np.sort(rng.choice(10_000, n, replace=False)))
    queries = rows(rng, 5, signed=True)
    moved = DeviceSparseIndex(index, "cpu")
    assert len(moved) == n
    for k in (0, 1, 7, 600):
        same(moved.search(there(queries), k), index.search(queries, k))
    mask = rng.random(n) < 0.4
    found = moved.search(there(queries), 9, filter=torch.from_numpy(mask))
    same(found, index.search(queries, 9, filter=mask))
    chosen = np.concatenate([index.ids[mask], [10**6]])
    same(moved.search(there(queries), 9, filter=chosen), index.search(queries, 9, filter=chosen))


def test_several_windows(rng):
    index = SparseIndex(VOCAB)
    index.add(rows(rng, 9000, most=4))
    queries = rows(rng, 2)
    same(DeviceSparseIndex(index, "cpu").search(there(queries), 20), index.search(queries, 20))


def test_terms_in_any_order_and_sparse_tensors(rng):
    index = SparseIndex(VOCAB)
    index.add(rows(rng, 100))
    queries = np.array([0, 3]), np.array([9, 4, 9]), np.array([1.0, 2.0, 0.5], np.float32)
    want = index.search(queries, 10)
    same(DeviceSparseIndex(index, "cpu").search(there(queries), 10), want)
    dense = torch.zeros(1, VOCAB)
    dense[0, 4], dense[0, 9] = 2, 1.5
    for sparse in (dense.to_sparse_csr(), dense.to_sparse_coo()):
        same(DeviceSparseIndex(index, "cpu").search(sparse, 10), want)


def test_what_is_refused(rng):
    index = SparseIndex(VOCAB)
    index.add(rows(rng, 10))
    moved, queries = DeviceSparseIndex(index, "cpu"), rows(rng, 2)
    with pytest.raises(ValueError, match="at most 2048"):
        moved.search(there(queries), 3000)
    with pytest.raises(ValueError, match="queries"):
        moved.search((*there(queries)[:2], there(queries)[2] * np.nan), 3)
    with pytest.raises(ValueError, match="filter has"):
        moved.search(there(queries), 3, filter=torch.ones(9, dtype=torch.bool))
    with pytest.raises(pentad.DeviceError, match="numpy"):
        moved.search(queries, 3)
    for call in (moved.range_search, moved.rescore):
        with pytest.raises(pentad.DeviceError, match="no CUDA kernel"):
            call(there(queries), torch.zeros(2, 3, dtype=torch.int64))
