# SPDX-License-Identifier: Apache-2.0
"""pentad.pq.kmeans: deterministic, as good as the peers, and sound at the edges."""

import threading

import numpy as np
import pytest
from cases import assert_same

import pentad
from pentad import _C, pq
from pentad.pq import assign_reference as reference


def blobs(rng, n, k, dim, spread=0.1):
    centres = rng.standard_normal((k, dim)) * 3
    return (centres[rng.integers(0, k, n)] + spread * rng.standard_normal((n, dim))).astype("f4")


def objective(x, centroids):
    return reference.costs(x[:, None], centroids[None])[:, 0].min(1).sum()


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_the_result_is_consistent(rng, metric):
    x = blobs(rng, 500, 12, 7)
    got = pq.kmeans(x, 12, metric=metric, iterations=8)
    assert got.centroids.shape == (12, 7)
    assert got.centroids.dtype == np.float32
    rows = x
    if metric == "cosine":
        rows = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        np.testing.assert_allclose(np.linalg.norm(got.centroids, axis=1), 1, rtol=1e-6)
    assert_same(got.assignment, reference.assign(rows, got.centroids[None], metric)[:, 0])
    costs = reference.costs(rows[:, None], got.centroids[None], metric).min(-1)[:, 0]
    costs += metric == "cosine"
    # 1 - cosine: the cosine is rounded to float32 first
    np.testing.assert_allclose(got.distances, costs, rtol=1e-6, atol=2e-7)
    assert got.objective == pytest.approx(costs.sum(), rel=1e-5, abs=1e-4)


def test_lloyd_by_hand(rng):
    """Three steps from given centroids equal the plain loops."""
    x = blobs(rng, 300, 9, 5, 1.0)
    centroids = x[:9].copy()[None]
    want = centroids[0].copy()
    codes = np.full((1, 300), -1, np.int32)
    for _ in range(3):
        assert not _C.pq_kmeans_steps(x[:, None], "l2", 1, centroids, codes)
        own = reference.assign(x, want[None])[:, 0]
        assert_same(codes[0], own.astype(np.int32))
        for k in range(9):
            want[k] = x[own == k].astype(np.float64).sum(0) / (own == k).sum()
        np.testing.assert_allclose(centroids[0], want, rtol=1e-6)


def test_bits_do_not_depend_on_levels_or_threads(rng, threads):
    x, big = blobs(rng, 3000, 40, 8, 1.0), blobs(rng, 900, 300, 33, 1.0)
    before, results = pentad.isa(), []
    try:
        for level in pentad.isa_available():
            _C.set_isa(level)
            for n in (1, 2, 3):
                threads(n)
                results.append([
                    *pq.kmeans(x, 50, seed=3)[:3], *pq.kmeans(big, 300, metric="cosine")[:3],
                    pq.train_codebooks(x, 4, 4)[0], *pq.kmeans(x, 9, iterations=3, seed=4)[:3],
                ])  # fmt: skip
    finally:
        _C.set_isa(before)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert got.tobytes() == want.tobytes()
    assert pq.kmeans(x, 50, seed=4).centroids.tobytes() != results[0][0].tobytes()


def test_steps_one_by_one_are_the_same_steps(rng):
    x = blobs(rng, 800, 20, 6, 1.0)
    seen = []
    got = pq.kmeans(x, 20, progress=lambda *args: seen.append(args))
    for a, b in zip(got[:3], pq.kmeans(x, 20)[:3], strict=True):
        assert_same(a, b)
    assert seen[0] == ("k-means", 0, 10)
    assert seen[-1] == ("k-means", 10, 10)


@pytest.mark.parametrize("kind", ["gauss", "blobs", "skewed"])
@pytest.mark.parametrize(("k", "dim"), [(16, 4), (64, 32), (200, 8)])
def test_no_worse_than_faiss(rng, kind, k, dim):
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(1)  # its threads wait by spinning
    x = {
        "gauss": lambda: rng.standard_normal((8000, dim)),
        "blobs": lambda: blobs(rng, 8000, k, dim, 0.5),
        "skewed": lambda: rng.standard_normal((8000, dim)) * np.exp(-np.arange(dim) / 3),
    }[kind]().astype(np.float32)
    peer = faiss.Kmeans(dim, k, niter=25, max_points_per_centroid=10**9, seed=1)
    peer.train(x)
    for iterations in (10, 25):
        got = pq.kmeans(x, k, iterations=iterations)
        assert objective(x, got.centroids) <= 1.01 * objective(x, peer.centroids)


def lloyd(x, centroids, iterations):
    """Plain iterations, which the acceleration is to beat."""
    for _ in range(iterations):
        codes = pq.assign(x, centroids[None])[:, 0]
        centroids = np.stack([x[codes == k].mean(0) for k in range(len(centroids))])
    return centroids


@pytest.mark.parametrize("dim", [4, 16])
def test_ten_iterations_come_as_far_as_25_plain_ones(rng, dim):
    x = rng.standard_normal((20_000, dim)).astype(np.float32)
    start = pq.kmeans(x, 128, iterations=0).centroids
    got = [pq.kmeans(x, 128, iterations=i).objective for i in range(1, 26)]
    assert got[0] == pytest.approx(objective(x, lloyd(x, start, 1)), rel=1e-6)
    assert got[9] < objective(x, lloyd(x, start, 25))
    # Another number of iterations ends on the means one step earlier: the path is the same.
    assert (np.diff(got) <= 1e-3 * got[-1]).all()


def test_momentum_settles_where_nothing_changes(rng):
    """The end is a fixed point of Lloyd's iteration, by single steps and by many."""
    x = blobs(rng, 600, 20, 3, 0.3)
    x = x.astype(np.float32)
    got = pq.kmeans(x, 12, iterations=300)
    codes = pq.assign(x, got.centroids[None])[:, 0]
    means = [x[codes == k].mean(0, dtype=np.float64) for k in range(12)]
    np.testing.assert_array_equal(got.centroids, np.float32(means))
    told = pq.kmeans(x, 12, iterations=300, progress=lambda *_: None)
    np.testing.assert_array_equal(got.centroids, told.centroids)


def test_momentum_does_not_leave_the_range_of_floats():
    """A step beyond the means would overflow."""
    x = np.float32([[-3e38], [3e38], [-2.5e38], [3.2e38], [0]])
    got = pq.kmeans(x, 3, iterations=20)
    assert np.isfinite(got.centroids).all()


def test_separate_blobs_are_all_found(rng):
    """What k-means++ is for: a uniform start leaves some blob without a centroid."""
    x = blobs(rng, 2000, 25, 6, 0.01)
    got = pq.kmeans(x, 25, iterations=10)
    assert got.objective < 2000 * 6 * 0.01**2 * 1.1


# --- Edges ----------------------------------------------------------------------------------------


def test_every_row_its_own_centroid(rng):
    x = rng.standard_normal((30, 4)).astype(np.float32)
    got = pq.kmeans(x, 30)
    assert got.objective == 0
    assert sorted(got.assignment.tolist()) == list(range(30))


def test_empty_clusters_take_far_rows(rng):
    """Five centroids far from everything: every one of them ends with rows."""
    x = rng.standard_normal((200, 3)).astype(np.float32)
    centroids = np.concatenate([x[:5], np.full((5, 3), 1e4, np.float32)])[None].copy()
    codes = np.full((1, 200), -1, np.int32)
    first = reference.assign(x, centroids)[:, 0]
    assert first.max() < 5
    costs = reference.costs(x[:, None], centroids)[:, 0].min(1)
    _C.pq_kmeans_steps(x[:, None], "l2", 1, centroids, codes)
    far = np.argsort(-costs, kind="stable")[:5]
    assert codes[0, far].tolist() == [5, 6, 7, 8, 9]
    np.testing.assert_array_equal(centroids[0, 5:], x[far])
    assert np.bincount(pq.assign(x, centroids)[:, 0], minlength=10).min() > 0


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("balanced", [False, True])
def test_fewer_distinct_rows_than_centroids(metric, balanced):
    x = np.repeat(np.eye(3, dtype=np.float32), 7, axis=0)
    got = pq.kmeans(x, 8, metric=metric, balanced=balanced)
    assert np.isfinite(got.centroids).all()
    if not balanced:  # which must mix rows: 7 is no sum of its sizes in 8 clusters
        assert got.distances.max() < 1e-6
    zero = pq.kmeans(np.zeros((9, 2), np.float32), 4, metric=metric, balanced=balanced)
    assert np.isfinite(zero.centroids).all()


def test_huge_and_tiny_rows(rng):
    x = rng.standard_normal((60, 3)).astype(np.float32)
    for scale in (1e30, 1e-40):
        got = pq.kmeans(x * np.float32(scale), 5)
        assert np.isfinite(got.centroids).all()
        assert len(np.unique(got.assignment)) == 5


def test_more_than_256_clusters(rng):
    got = pq.kmeans(rng.standard_normal((600, 2)), 257, iterations=2)
    assert got.assignment.dtype == np.int32


@pytest.mark.parametrize("balanced", [False, True])
def test_no_iterations_leave_the_start(rng, balanced):
    x = blobs(rng, 100, 4, 3)
    got = pq.kmeans(x, 4, iterations=0, balanced=balanced)
    rows = {row.tobytes() for row in x}
    assert all(c.tobytes() in rows for c in got.centroids)


# --- Balanced -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize(("n", "k"), [(1000, 10), (1003, 10), (300, 7), (40, 40), (7, 1)])
def test_balanced_sizes(rng, metric, n, k):
    x = (rng.standard_normal((n, 6)) * np.exp(-np.arange(6)) + 1).astype(np.float32)
    got = pq.kmeans(x, k, metric=metric, balanced=True, iterations=6)
    sizes = np.bincount(got.assignment, minlength=k)
    assert sizes.min() == n // k
    assert sizes.max() == -(-n // k)
    again = pq.kmeans(x, k, metric=metric, balanced=True, iterations=6)
    assert_same(again.assignment, got.assignment)


def test_balanced_finds_what_is_balanced(rng):
    x = np.repeat(rng.standard_normal((6, 4)) * 5, 50, axis=0) + 0.1 * rng.standard_normal((300, 4))
    got = pq.kmeans(x, 6, balanced=True)
    assert got.objective < 300 * 4 * 0.1**2 * 1.1


def test_balanced_costs_little(rng):
    """Within a factor of the free objective; a random split would be 6 times worse here."""
    x = rng.standard_normal((2000, 2)).astype(np.float32)
    assert pq.kmeans(x, 16, balanced=True).objective < 1.5 * pq.kmeans(x, 16).objective


# --- Arguments ------------------------------------------------------------------------------------


def test_errors_name_what_came(rng):
    x = rng.standard_normal((10, 3)).astype(np.float32)
    worse = x.copy()
    worse[3, 1] = np.nan
    for call, error, text in [
        (lambda: pq.kmeans(x, 11), ValueError, r"\[pq.kmeans\] k is 11, but there are 10 rows"),
        (lambda: pq.kmeans(x, 0), ValueError, "k is 0"),
        (lambda: pq.kmeans(x, 2.5), TypeError, "k is 2.5"),
        (lambda: pq.kmeans(x[0], 1), ValueError, r"shape \(3,\)"),
        (lambda: pq.kmeans(x, 2, metric="dot"), ValueError, "metric is 'dot'"),
        (lambda: pq.kmeans(x, 2, iterations=-1), ValueError, "iterations is -1"),
        (lambda: pq.kmeans(x, 2, seed=-1), ValueError, "seed is -1"),
        (lambda: pq.kmeans(x.astype(int), 2), TypeError, "dtype int64"),
        (lambda: pq.kmeans(worse, 2), ValueError, r"\[pq.kmeans\] x contains NaN or infinity"),
        (lambda: pq.kmeans(worse, 2, balanced=True), ValueError, "NaN or infinity"),
        (lambda: pq.kmeans(np.full((4, 2), 1e300), 2), ValueError, "NaN or infinity"),
    ]:
        with pytest.raises(error, match=text):
            call()


def test_the_extension_refuses_what_would_harm_memory(rng):
    x = rng.standard_normal((10, 2, 3)).astype(np.float32)
    centroids, codes = np.zeros((2, 4, 3), np.float32), np.full((2, 10), -1, np.int32)
    for bad in (
        (x, "l2", 1, centroids[:1], codes),
        (x, "l2", 1, centroids[:, ::2], codes),
        (x, "l2", 1, centroids, codes[:, :9].copy()),
        (x, "l2", 1, np.zeros((2, 11, 3), np.float32), codes),
        (x.astype(np.float64), "l2", 1, centroids, codes),
        (x, "l2", 1, centroids, codes.astype(np.int64)),
        (x, "l2", 1, centroids, codes, centroids[:1]),
        (x, "l2", 1, centroids, codes, centroids.astype(np.float64)),
        (x, "ip", 1, centroids, codes, centroids.copy()),
    ):
        with pytest.raises((ValueError, TypeError)):
            _C.pq_kmeans_steps(*bad)


def test_codes_that_change_meanwhile_index_nothing(rng):
    x = rng.standard_normal((20000, 2, 4)).astype(np.float32)
    codes, done = np.full((2, 20000), -1, np.int32), threading.Event()

    def spoil():
        while not done.is_set():
            codes.fill(2**30)

    thread = threading.Thread(target=spoil)
    thread.start()
    try:
        for _ in range(10):  # codes that were read again would be indices out of bounds
            _C.pq_kmeans_steps(x, "l2", 5, x[:16].transpose(1, 0, 2).copy(), codes)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_tensors(rng, dtype):
    torch = pytest.importorskip("torch")
    x = torch.tensor(blobs(rng, 200, 5, 4)).to(getattr(torch, dtype))
    got = pq.kmeans(x.requires_grad_(), 5)
    want = pq.kmeans(x.detach().float().numpy(), 5)
    for a, b in zip(got[:3], want[:3], strict=True):
        assert isinstance(a, torch.Tensor)
        assert_same(a.numpy(), b)
    assert got.objective == want.objective


def test_balanced_costs_that_would_overflow_are_refused(rng):
    x = rng.standard_normal((50, 4)).astype(np.float32)
    for large in (x * 2.0**50, -(2.0**49) * (x + 8)):
        with pytest.raises(ValueError, match=r"\[pq.kmeans\] x holds a component beyond 2\*\*50"):
            pq.kmeans(large, 5, balanced=True)
    parts = [pq.kmeans(part, 5, metric="cosine", balanced=True) for part in (x, x * 2.0**100)]
    np.testing.assert_array_equal(parts[0].assignment, parts[1].assignment)
