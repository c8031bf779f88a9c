# SPDX-License-Identifier: Apache-2.0
"""Finite scalar quantization and signs: values, indices, gradients, and what each refuses."""

import numpy as np
import pytest

from pentad import pq

torch = pytest.importorskip("torch")

LEVELS = [[8, 5, 5, 5], [2], [3], [2, 3, 4, 7, 16], [5000, 4999]]


def kinds(x):
    return x, torch.from_numpy(x)


@pytest.mark.parametrize("levels", LEVELS)
def test_every_level_is_reached_and_none_beyond(levels):
    x = np.arctanh(np.linspace(-1, 1, 40_001)[1:-1])  # as the bound spreads them
    x = np.concatenate([[-20], x, [20]])[:, None].repeat(len(levels), 1)
    for kind in kinds(x):
        quantized, codes, index = (np.asarray(a) for a in pq.fsq(kind, levels))
        assert (quantized.shape, codes.shape, index.shape) == (x.shape, x.shape, x.shape[:1])
        for j, n in enumerate(levels):
            reached = np.unique(codes[:, j])
            np.testing.assert_array_equal(reached, np.arange(n))
            np.testing.assert_array_equal(quantized[:, j], (codes[:, j] - n // 2) / (n // 2))
            assert (np.diff(codes[:, j]) >= 0).all()
            assert np.abs(quantized[:, j]).max() <= 1
        np.testing.assert_array_equal(index, np.ravel_multi_index(codes.T, levels, order="F"))


@pytest.mark.parametrize("levels", LEVELS)
def test_zero_goes_to_zero(levels):
    for kind in kinds(np.zeros((2, 3, len(levels)), np.float32)):
        result = pq.fsq(kind, levels)
        assert not np.asarray(result.quantized).any()
        assert tuple(result.index.shape) == (2, 3)


@pytest.mark.parametrize("levels", LEVELS)
def test_indices_decode_to_what_was_quantized(rng, levels):
    x = rng.standard_normal((50, len(levels))).astype(np.float32)
    for kind in kinds(x):
        result = pq.fsq(kind, levels)
        decoded = pq.fsq_decode(result.index, levels)
        assert type(decoded) is type(kind)
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(result.quantized))
    every = np.arange(min(np.prod(levels), 5000))
    words = pq.fsq_decode(every, levels)
    assert len(np.unique(words, axis=0)) == len(every)


def test_the_gradient_is_that_of_the_bound():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    levels = [8, 5, 2]
    grad = torch.randn(7, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad(pq.fsq(x, levels).quantized, x, grad)
    counts = torch.tensor(levels, dtype=torch.float64)
    reach = (counts - 1) * 1.001 / 2
    shift = torch.atanh((1 - counts % 2) / 2 / reach)
    want = grad * (1 - torch.tanh(x + shift) ** 2) * reach / (counts // 2)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    x = torch.randn(5, 4).to(dtype).requires_grad_()
    for result in (pq.fsq(x, [4, 4, 3, 3]), pq.lfq(x)):
        assert result.quantized.dtype == dtype
        assert result.codes.dtype == result.index.dtype == torch.int64
        (grad,) = torch.autograd.grad(result.quantized.sum(), x)
        assert grad.dtype == dtype
        assert grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pq.fsq(x, [4, 4, 3, 3]).index, pq.fsq(x, [4, 4, 3, 3]).index)


def test_signs(rng):
    x = rng.standard_normal((4, 5, 13))
    x[0, 0] = 0
    for kind in kinds(x):
        result = pq.lfq(kind)
        np.testing.assert_array_equal(np.asarray(result.quantized), np.where(x > 0, 1, -1))
        bits = np.asarray(result.codes)
        np.testing.assert_array_equal(np.asarray(result.index), (bits << np.arange(13)).sum(-1))
        decoded = pq.lfq_decode(result.index, 13)
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(result.quantized))
    assert pq.lfq(np.ones((1, 62))).index[0] == 2**62 - 1


def test_what_is_not_finite(recwarn):
    x = np.array([[np.nan, np.inf, -np.inf, 0, 3]], np.float32)
    results = [pq.fsq(kind, [4, 4, 5, 5, 5]) for kind in (*kinds(x), kinds(x)[1].requires_grad_())]
    for quantized, codes, index in results:
        np.testing.assert_allclose(quantized.tolist(), [[np.nan, 0.5, -1, 0, 1]])
        assert codes.tolist() == [[0, 3, 0, 2, 4]]
        assert index.tolist() == [3 * 4 + 2 * 16 * 5 + 4 * 16 * 25]
    results = [pq.lfq(kind) for kind in (*kinds(x), kinds(x)[1].requires_grad_())]
    for quantized, codes, index in results:
        np.testing.assert_allclose(quantized.tolist(), [[np.nan, 1, -1, -1, 1]])
        assert (codes.tolist(), index.tolist()) == ([[0, 1, 0, 0, 1]], [18])
    assert not [w for w in recwarn if w.category is RuntimeWarning]


def test_the_gradient_of_signs_is_straight():
    x = torch.randn(5, 3, requires_grad=True)
    grad = torch.randn(5, 3)
    signs = pq.lfq(x).quantized
    assert torch.equal(signs.abs(), torch.ones(5, 3))
    assert torch.equal(torch.autograd.grad(signs, x, grad)[0], grad)


def test_entropy_is_that_of_all_the_codes(rng):
    """Over all 2^d sign vectors, with probabilities by a softmax of squared distances."""
    x, t = rng.standard_normal((6, 3)), 0.7
    words = pq.lfq_decode(np.arange(8), 3).astype(np.float64)
    logits = -((x[:, None] - words) ** 2).sum(-1) / t
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    vectors = -(p * np.log(p)).sum(1).mean()
    bits = p @ (words > 0)  # of the mean code, independent bits
    mean = bits.mean(0)
    batch = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)).sum()
    for kind in kinds(x):
        np.testing.assert_allclose(
            np.asarray(pq.lfq_entropy(kind, temperature=t, reduction="none")), [vectors, batch]
        )
        assert np.isclose(float(pq.lfq_entropy(kind, temperature=t)), vectors - batch)


def test_gradient_of_entropy():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pq.lfq_entropy, x)
    sure = torch.full((4, 3), 1e4, requires_grad=True)
    assert torch.autograd.grad(pq.lfq_entropy(sure), sure)[0].isfinite().all()


def test_nothing():
    for kind in kinds(np.zeros((0, 2))):
        assert tuple(pq.fsq(kind, [3, 4]).index.shape) == (0,)
        assert tuple(pq.lfq(kind).quantized.shape) == (0, 2)
        assert tuple(pq.fsq_decode(pq.fsq(kind, [3, 4]).index, [3, 4]).shape) == (0, 2)


def test_compiles_without_a_break():
    torch._dynamo.reset()

    def call(x):
        first, second = pq.fsq(x, [8, 5, 5]), pq.lfq(x)
        return (
            first.quantized + second.quantized,
            pq.fsq_decode(first.index, [8, 5, 5]) + pq.lfq_decode(second.index, 3),
        )

    x = torch.randn(6, 3, requires_grad=True)
    got, want = torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x)
    torch.testing.assert_close(got, want)
    (one,), (other,) = (torch.autograd.grad(out[0].sum(), x) for out in (got, want))
    torch.testing.assert_close(one, other)
    assert pq.fsq(x.to("meta"), [8, 5, 5]).index.shape == (6,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pq.fsq(np.zeros((2, 3)), [4, 4]), ValueError, r"\(2, 3\) but there are 2 levels"),
        (lambda: pq.fsq(np.zeros(2, int), [4, 4]), TypeError, "x has dtype int64"),
        (lambda: pq.fsq(np.zeros(1), [1]), ValueError, "levels is 1, expected at least 2"),
        (lambda: pq.fsq(np.zeros(1), 4), TypeError, "levels is 4, expected a sequence"),
        (lambda: pq.fsq(np.zeros(0), []), ValueError, "expected at least one"),
        (lambda: pq.fsq(np.zeros(3), [2**30] * 3), ValueError, r"at most 2\*\*62 multiplied"),
        (lambda: pq.fsq_decode(np.zeros(3), [4]), TypeError, "index has dtype float64"),
        (lambda: pq.lfq(np.zeros((1, 63))), ValueError, "expected 1 to 62 columns"),
        (lambda: pq.lfq_decode(np.zeros(3, int), 63), ValueError, "dim is 63, expected 1 to 62"),
        (lambda: pq.lfq_entropy(np.zeros((0, 3))), ValueError, "expected at least one vector"),
        (lambda: pq.lfq_entropy(np.zeros(3), temperature=0), ValueError, "temperature is 0"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
