# SPDX-License-Identifier: Apache-2.0
"""pentad.pq.train_codebooks: every form, the rotations, and the distortion against faiss."""

import numpy as np
import pytest
from cases import assert_same

from pentad import pq
from pentad.pq.train import _opq, random_hadamard


def correlated(rng, n, dim):
    """Unequal variances, in directions of no axis."""
    mixing = rng.standard_normal((dim, dim)) * np.exp(-np.arange(dim) / 5)
    return (rng.standard_normal((n, dim)) @ mixing.T).astype(np.float32)


def distortion(x, trained, form="product"):
    codebooks, rotation = trained
    y = x if rotation is None else x @ rotation.T
    codes = pq.assign(y, codebooks, form=form)
    parts = codebooks[np.arange(len(codebooks)), codes]
    if form == "product":
        decoded = parts.reshape(y.shape)
    else:
        decoded = parts.sum(1) if form == "residual" else parts.mean(1)
    return ((y - decoded) ** 2).sum(dtype=np.float64)


@pytest.mark.parametrize(("M", "nbits"), [(1, 5), (4, 4), (8, 6), (24, 1)])
def test_product_is_no_worse_than_faiss(rng, M, nbits):
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(1)  # its threads wait by spinning
    x = correlated(rng, 5000, 24)
    peer = faiss.ProductQuantizer(24, M, nbits)
    peer.train(x)
    theirs = ((x - peer.decode(peer.compute_codes(x))) ** 2).sum(dtype=np.float64)
    assert distortion(x, pq.train_codebooks(x, M, nbits)) <= 1.01 * theirs


def test_opq_is_better_and_no_worse_than_faiss(rng):
    x = correlated(rng, 4000, 16)
    plain = distortion(x, pq.train_codebooks(x, 4, 5))
    got = pq.train_codebooks(x, 4, 5, rotation="opq")
    ours = distortion(x, got)
    assert ours < 0.7 * plain
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(1)
    peer = faiss.OPQMatrix(16, 4)
    peer.pq = faiss.ProductQuantizer(16, 4, 5)
    peer.train(x)
    y = peer.apply_py(x)
    quantizer = faiss.ProductQuantizer(16, 4, 5)
    quantizer.train(y)
    theirs = ((y - quantizer.decode(quantizer.compute_codes(y))) ** 2).sum(dtype=np.float64)
    assert ours <= 1.01 * theirs


@pytest.mark.parametrize("rotation", ["opq", "random_hadamard"])
@pytest.mark.parametrize("dim", [1, 2, 6, 16, 21])
def test_rotations_are_orthogonal(rng, rotation, dim):
    M = 1 if dim < 2 else 2 if dim % 2 == 0 else 3
    x = correlated(rng, 300, dim)
    codebooks, matrix = pq.train_codebooks(x, M, 3, rotation=rotation, iterations=3)
    assert codebooks.shape == (M, 8, dim // M)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=2e-6)


@pytest.mark.parametrize("dim", [8, 12, 100])
def test_random_hadamard_spreads_an_axis(dim):
    """No entry carries more than half of a row, and the seed matters."""
    matrix = random_hadamard(dim, 1)
    assert (matrix**2).max() < 0.75
    assert (matrix != random_hadamard(dim, 2)).any()
    assert_same(matrix, random_hadamard(dim, 1))


def test_opq_finds_the_parts_where_variances_tell_nothing(rng):
    """Points of a product of three codebooks, rotated: all directions vary much alike."""
    points = rng.choice([-1.0, 1.0], (3, 16, 4)) * rng.uniform(0.5, 1.5, (3, 16, 4))
    x = points[np.arange(3), rng.integers(0, 16, (2000, 3))].reshape(2000, 12)
    x = (x @ np.linalg.qr(rng.standard_normal((12, 12)))[0]).astype(np.float32)

    def error(rounds):
        matrix = _opq(x, 3, 16, rounds, 0, None)
        y = x @ matrix.T
        return distortion(y, pq.train_codebooks(y, 3, 4))

    assert error(40) < 0.8 * error(0)


def test_residual_levels_lower_the_error(rng):
    x = correlated(rng, 3000, 6)
    errors = [
        distortion(x, pq.train_codebooks(x, M, 4, form="residual"), "residual") for M in (1, 2, 4)
    ]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_grouped_codebooks_differ_and_average_better(rng):
    x = correlated(rng, 3000, 6)
    one = pq.train_codebooks(x, 1, 4, form="grouped")
    four = pq.train_codebooks(x, 4, 4, form="grouped")
    assert four.codebooks.shape == (4, 16, 6)
    assert (four.codebooks[0] != four.codebooks[1]).any()
    assert distortion(x, four, "grouped") < distortion(x, one, "grouped")


def test_many_rows_are_sampled(rng):
    """At most 256 per centroid, the same ones each time."""
    x = rng.standard_normal((3000, 4)).astype(np.float32)
    one, two = (pq.train_codebooks(x, 2, 2, seed=5).codebooks for _ in range(2))
    assert_same(one, two)
    far = x.copy()
    chosen = np.random.default_rng(5).permutation(3000)[:1024]
    far[np.setdiff1d(np.arange(3000), chosen)] = 1e6
    assert_same(
        pq.train_codebooks(far, 2, 2, seed=5).codebooks,
        pq.train_codebooks(x, 2, 2, seed=5).codebooks,
    )


def test_cosine_trains_on_directions(rng):
    x = rng.standard_normal((400, 4)).astype(np.float32)
    scaled = x * rng.uniform(0.5, 2, (400, 1)).astype(np.float32)
    a = pq.train_codebooks(x, 2, 3, metric="cosine").codebooks
    b = pq.train_codebooks(scaled, 2, 3, metric="cosine").codebooks
    np.testing.assert_allclose(a, b, atol=1e-4)  # unit rows agree to a rounding
    assert np.abs(a).max() <= 1


def test_progress(rng):
    x = rng.standard_normal((64, 4)).astype(np.float32)
    for form in ("product", "residual", "grouped"):
        seen = []
        got = pq.train_codebooks(x, 2, 2, form=form, progress=lambda *a: seen.append(a))  # noqa: B023
        assert_same(got.codebooks, pq.train_codebooks(x, 2, 2, form=form).codebooks)
        assert {stage for stage, _, _ in seen} == {"training codebooks"}
        assert seen[-1][1] == seen[-1][2]
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    seen = []
    pq.train_codebooks(x, 2, 2, rotation="opq", progress=lambda *a: seen.append(a))
    assert ("finding the rotation", 50, 50) in seen


def test_errors_name_what_came(rng):
    x = rng.standard_normal((20, 6)).astype(np.float32)
    worse = x.copy()
    worse[0, 0] = np.inf
    for call, error, text in [
        (lambda: pq.train_codebooks(x, 4, 2), ValueError,
         r"\[pq.train_codebooks\] x has 6 columns, which 4 codebooks do not divide"),
        (lambda: pq.train_codebooks(x, 2, 5), ValueError, "20 rows, but 32 centroids"),
        (lambda: pq.train_codebooks(x, 2, 17), ValueError, "nbits is 17"),
        (lambda: pq.train_codebooks(x, 0, 2), ValueError, "M is 0"),
        (lambda: pq.train_codebooks(x, 2, 2, rotation="pca"), ValueError, "rotation is 'pca'"),
        (lambda: pq.train_codebooks(x, 2, 2, form="sum"), ValueError, "form is 'sum'"),
        (lambda: pq.train_codebooks(x, 2, 2, metric="l1"), ValueError, "metric is 'l1'"),
        (lambda: pq.train_codebooks(x, 2, 2, form="residual", rotation="opq"), ValueError, "opq"),
        (lambda: pq.train_codebooks(x[0], 2, 2), ValueError, r"shape \(6,\)"),
        (lambda: pq.train_codebooks(x.astype(int), 2, 2), TypeError, "dtype int64"),
        (lambda: pq.train_codebooks(worse, 2, 2), ValueError, "NaN or infinity"),
    ]:  # fmt: skip
        with pytest.raises(error, match=text):
            call()


def test_tensors(rng):
    torch = pytest.importorskip("torch")
    x = rng.standard_normal((300, 6)).astype(np.float16)
    want = pq.train_codebooks(x, 2, 3, rotation="opq", iterations=3)
    got = pq.train_codebooks(torch.tensor(x), 2, 3, rotation="opq", iterations=3)
    assert all(isinstance(a, torch.Tensor) for a in got)
    assert_same(tuple(a.numpy() for a in got), tuple(want))
    sampled = pq.train_codebooks(torch.tensor(x), 2, 1, iterations=3)
    assert_same(sampled.codebooks.numpy(), pq.train_codebooks(x, 2, 1, iterations=3).codebooks)
