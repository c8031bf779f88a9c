# SPDX-License-Identifier: Apache-2.0
"""Matching pursuit against plain loops; gradients along the path; when it ends."""

import numpy as np
import pytest

from pentad.sparse import _largest_product, matching_pursuit, sparse_decode

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def unit(rng, count, dim):
    rows = rng.standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def plain(x, dictionary, steps, absolute=False, tolerance=0.0):
    """Dense codes and the residual, row by row."""
    codes, rest = np.zeros((len(x), len(dictionary))), x.copy()
    for i, r in enumerate(rest):
        for _ in range(steps):
            if np.linalg.norm(r) <= tolerance * np.linalg.norm(x[i]):
                break
            products = dictionary @ r
            j = np.argmax(np.abs(products) if absolute else products)
            c = products[j]
            if c == 0 or (c < 0 and not absolute):
                break
            codes[i, j] += c
            r -= c * dictionary[j]
    return codes, rest


@pytest.mark.parametrize("torch_too", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.4])
@pytest.mark.parametrize("absolute", [False, True])
def test_against_plain_loops(rng, absolute, tolerance, torch_too):
    x, dictionary = rng.standard_normal((20, 8)), unit(rng, 30, 8)
    x[3] = 0
    x[4] = 2 * dictionary[7]  # done after one step
    for steps in (1, 2, 12):
        given = tuple(map(torch.from_numpy, (x, dictionary))) if torch_too else (x, dictionary)
        got = matching_pursuit(*given, steps, absolute=absolute, tolerance=tolerance)
        codes, residual = plain(x, dictionary, steps, absolute, tolerance)
        # Sums of eight products in double, in another order, over a dozen steps; the row that is
        # done goes on with what a rounding left.
        np.testing.assert_allclose(got.codes.dense(), codes, rtol=0, atol=1e-12)
        np.testing.assert_allclose(got.residual, residual, rtol=0, atol=1e-12)
        counts = np.diff(got.codes.indptr)
        assert counts[3] == 0
        assert counts.max() <= steps
        back = sparse_decode(got.codes, given[1]) + got.residual
        np.testing.assert_allclose(back, x, rtol=0, atol=1e-12)
        if tolerance:
            assert counts[4] == 1


def test_rows_end_where_no_product_is_positive():
    x = np.array([[-1.0, 0.0], [3.0, -1.0]])
    codes, residual = matching_pursuit(x, np.eye(2), 5)
    np.testing.assert_array_equal(codes.dense(), [[0, 0], [3, 0]])
    np.testing.assert_array_equal(residual, [[-1, 0], [0, -1]])
    codes, residual = matching_pursuit(x, np.eye(2), 5, absolute=True)
    np.testing.assert_array_equal(codes.dense(), x)
    assert not residual.any()


def test_ties_go_to_the_smaller_row():
    dictionary = np.array([[0.0, -1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = np.array([[2.0, 0.0], [1.0, 1.0]])
    for absolute, second in ((False, 1), (True, 0)):
        codes, _ = matching_pursuit(x, dictionary, 1, absolute=absolute)
        np.testing.assert_array_equal(codes.indices, [1, second])


def test_rows_taken_twice_have_one_entry(rng):
    # Two rows that are nearly one: the residual comes back to the first.
    dictionary = np.array([[1.0, 0.0], [0.6, 0.8]])
    x = np.array([[1.0, 2.0]])
    codes, _ = matching_pursuit(x, dictionary, 4)
    want, _ = plain(x, dictionary, 4)
    np.testing.assert_array_equal(codes.indices, np.flatnonzero(want[0]))
    np.testing.assert_allclose(codes.dense(), want, rtol=1e-14)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("copies", [1, 2, 100])  # the last beyond what is settled one by one
def test_the_batch_does_not_matter(rng, copies, absolute):
    """Whole numbers, so that sums are exact: many rows at once, few, and plain loops agree."""
    rows = np.repeat(np.eye(6)[[2, 0, 1, 5]] * np.array([[1], [-1], [1], [-1]]), copies, axis=0)
    x = rng.integers(-3, 4, (600, 6)).astype(np.float32)
    want, rest = plain(x, rows.astype(np.float32), 3, absolute)
    for make in (np.asarray, torch.from_numpy):
        parts = [
            matching_pursuit(make(part), make(rows.astype(np.float32)), 3, absolute=absolute)
            for part in (x, x[:5], x[:0], x[5:])
        ]
        np.testing.assert_array_equal(parts[0].codes.dense(), want)
        np.testing.assert_array_equal(parts[0].residual, rest)
        few = [p.codes.dense() for p in parts[1:]]
        np.testing.assert_array_equal(np.concatenate(few), want)


def test_near_ties_are_settled_in_double(rng):
    """Rows so close that float32 sums in another order would choose among them by chance."""
    x = rng.standard_normal((40, 64)).astype(np.float32)
    rows = unit(rng, 5, 64)
    rows = np.repeat(np.concatenate([rows, -rows]), 40, axis=0).astype(np.float32)
    rows += rng.integers(-1, 2, rows.shape) * np.spacing(rows)
    products = (x[:, None].astype(np.float64) * rows).cumsum(-1)[..., -1]
    for n in (1, 40):
        picks = [matching_pursuit(x[i : i + n], rows, 1).codes.indices for i in range(0, 40, n)]
        np.testing.assert_array_equal(np.concatenate(picks), products.argmax(1))
    try:
        torch.set_float32_matmul_precision("medium")
        codes, _ = matching_pursuit(torch.from_numpy(x), torch.from_numpy(rows), 1)
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(codes.indices, products.argmax(1))
    float32 = (x @ rows.T).argmax(1)
    assert (float32 != products.argmax(1)).any()  # or nothing was tested


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_small_and_large_numbers(rng, scale):
    x = (rng.standard_normal((5, 6)) * scale).astype(np.float32)
    rows = unit(rng, 9, 6).astype(np.float32)
    got = matching_pursuit(x, rows, 1).codes.indices
    want = (x[:, None].astype(np.float64) * rows).sum(-1).argmax(1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("few", [0, 512])
def test_dictionaries_beyond_the_kernels_width(rng, monkeypatch, few):
    monkeypatch.setattr(_largest_product, "_FEW", few)
    dictionary = unit(rng, 70_000, 4)
    x = dictionary[[69_999, 3, 65_536]] * 2
    codes, residual = matching_pursuit(x, dictionary, 1)
    np.testing.assert_array_equal(codes.indices, [69_999, 3, 65_536])
    assert np.abs(residual).max() < 1e-14


@pytest.mark.parametrize("absolute", [False, True])
def test_gradients_follow_the_path(rng, absolute):
    x = torch.from_numpy(rng.standard_normal((5, 4))).requires_grad_()
    rows = torch.from_numpy(unit(rng, 9, 4)).requires_grad_()

    def call(x, rows):
        codes, residual = matching_pursuit(x, rows, 3, absolute=absolute)
        return codes.values, residual

    # Steps of 1e-6 change no choice here, and lengths by less than is let pass.
    assert torch.autograd.gradcheck(call, (x, rows))
    with torch.no_grad():
        assert not matching_pursuit(x, rows, 3).residual.requires_grad
    want, got = matching_pursuit(x.detach(), rows.detach(), 3), matching_pursuit(x, rows, 3)
    assert torch.equal(got.residual, want.residual)
    assert torch.equal(got.codes.values, want.codes.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_computed_in_float32(rng, dtype):
    x = torch.from_numpy(rng.standard_normal((6, 16))).to(dtype).requires_grad_()
    rows = torch.nn.functional.normalize(torch.from_numpy(unit(rng, 40, 16)).to(dtype), dim=-1)
    want = matching_pursuit(x.detach().float(), rows.float(), 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = matching_pursuit(x, rows, 4)
    assert got.residual.dtype == torch.float32
    assert torch.equal(got.residual, want.residual)
    assert torch.equal(got.codes.indices, want.codes.indices)
    assert torch.autograd.grad(got.residual.sum(), x)[0].dtype == dtype


def test_strides_and_nothing(rng):
    x, rows = rng.standard_normal((6, 8)), unit(rng, 10, 8)
    want = matching_pursuit(x, rows, 3)
    got = matching_pursuit(np.asfortranarray(x)[::-1], np.asfortranarray(rows), 3)
    np.testing.assert_allclose(got.residual[::-1], want.residual, rtol=0, atol=1e-14)
    for none in (x[:0], torch.from_numpy(x[:0])):
        d = rows if isinstance(none, np.ndarray) else torch.from_numpy(rows)
        codes, residual = matching_pursuit(none, d, 3)
        assert codes.dense().shape == (0, 10)
        assert residual.shape == (0, 8)


X, D = np.zeros((2, 3)), np.eye(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: matching_pursuit(X, 2 * D, 1), ValueError, "row 0 of length 2, expected"),
        (lambda: matching_pursuit(X, D * np.nan, 1), ValueError, "row 0 of length nan"),
        (
            lambda: matching_pursuit(X + np.inf, D, 1),
            ValueError,
            "x has numbers that are not finite",
        ),
        (
            lambda: matching_pursuit(X * np.nan, D, 1),
            ValueError,
            "x has numbers that are not finite",
        ),
        (lambda: matching_pursuit(X, torch.eye(3), 1), TypeError, "mix numpy"),
        (lambda: matching_pursuit(X, D[:, :2], 1), ValueError, r"dictionary \(3, 2\)"),
        (lambda: matching_pursuit(X, D[:0], 1), ValueError, r"dictionary \(0, 3\)"),
        (lambda: matching_pursuit(X[0], D, 1), ValueError, r"x has shape \(3,\)"),
        (lambda: matching_pursuit(X, D, 0), ValueError, "steps is 0"),
        (lambda: matching_pursuit(X, D, 1, tolerance=1), ValueError, "tolerance is 1"),
        (lambda: matching_pursuit(X, D, 1, tolerance="a"), TypeError, "tolerance is 'a'"),
        (lambda: matching_pursuit(X.astype(int), D, 1), TypeError, "x has dtype int64"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=rf"\[sparse.matching_pursuit\].*{message}"):
        call()
    with pytest.raises(ValueError, match="row 1 of length 0,"):
        matching_pursuit(torch.zeros(2, 3), torch.diag(torch.tensor([1.0, 0, 1])), 1)
