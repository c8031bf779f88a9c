# SPDX-License-Identifier: Apache-2.0
"""Top-k selection and decoding of sparse codes against plain numpy; gradients, tracing, errors."""

import numpy as np
import pytest
from cases import LAYOUTS, laid_out

import pentad
from pentad import _C
from pentad.sparse import SparseCodes, sparse_decode, topk_codes, topk_sparsify

torch = pytest.importorskip("torch")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def kept_columns(x, k, absolute=False):
    """The definition: a stable sort by falling value; a NaN first."""
    key = np.abs(x) if absolute else x
    key = np.where(np.isnan(key), np.inf, key.astype(np.float64))
    tie = np.where(np.isnan(x), 0, 1)  # before infinity
    order = np.stack([np.lexsort((np.arange(x.shape[1]), t, -r)) for r, t in zip(key, tie)])  # noqa: B905
    return np.sort(order[:, :k], axis=1)


def sparsified(x, k, absolute=False):
    kept = kept_columns(x, k, absolute)
    out = np.zeros_like(x)
    np.put_along_axis(out, kept, np.take_along_axis(x, kept, 1), 1)
    return out


def rows(rng, kind, n, d, dtype):
    x = rng.standard_normal((n, d))
    if kind == "ties":
        x = np.round(x * 2) / 2
    elif kind == "relu":  # more ties at 0 than a sample brackets
        x = np.maximum(x, 0)
    elif kind == "rising":  # which a sample at even steps represents
        x = np.sort(x, 1)
    elif kind == "aligned":  # which misleads it: the columns that are looked at are the largest
        x[:, :: max(1, d // 64)] += 100
    elif kind == "constant":
        x = np.full((n, d), -1.5)
    elif kind == "zeros":
        x = np.where(x > 0, 0.0, -0.0)
    elif kind == "special":
        x[:, ::7], x[:, 1::9], x[:, 2::11] = np.nan, np.inf, -np.inf
    return x.astype(dtype)


# --- Against the definition -----------------------------------------------------------------------

KINDS = ("normal", "ties", "relu", "rising", "aligned", "constant", "zeros", "special")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept(rng, kind, dtype):
    for d in (1, 2, 7, 31, 32, 33, 100, 255, 256, 257, 1000, 4100):
        x = rows(rng, kind, 3, d, dtype)
        for k in sorted({1, 2, d // 50, d // 3, d // 2, d - 1, d, d + 5} - {0}):
            for absolute in (False, True):
                want = sparsified(x, min(k, d), absolute)
                got = topk_sparsify(x, k, absolute=absolute)
                assert got.dtype == dtype
                assert got.tobytes() == want.tobytes(), (d, k, absolute)
                codes = topk_codes(x, k, absolute=absolute)
                kept = kept_columns(x, min(k, d), absolute)
                np.testing.assert_array_equal(codes.indices.reshape(kept.shape), kept)
                values = np.take_along_axis(x, kept, 1)
                assert codes.values.tobytes() == values.tobytes()


@pytest.mark.parametrize("k", [1, 50, 64, 3000, 30000, 65535])
def test_long_rows(rng, k):
    x = rng.standard_normal((2, 70_001)).astype(np.float32)
    np.testing.assert_array_equal(topk_sparsify(x, k), sparsified(x, k))
    coarse = np.round(x, 1)
    np.testing.assert_array_equal(topk_sparsify(coarse, k), sparsified(coarse, k))


def test_bfloat16(rng):
    x = torch.from_numpy(rows(rng, "special", 5, 600, np.float32)).bfloat16()
    x[2] = torch.randn(600).bfloat16()
    for absolute in (False, True):
        want = torch.from_numpy(sparsified(x.float().numpy(), 70, absolute)).bfloat16()
        got = topk_sparsify(x, 70, absolute=absolute)
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))
        values = topk_codes(x, 70, absolute=absolute).values
        assert values.dtype == torch.bfloat16


def test_every_number_of_threads_has_the_same_bits(rng, threads):
    x = rows(rng, "ties", 200, 700, np.float32)
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append((topk_sparsify(x, 90).tobytes(), topk_codes(x, 90).indices.tobytes()))
    assert results == [results[0]] * 3
    assert results[0][0] == sparsified(x, 90).tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_layouts(rng, layout, dtype):
    x = rng.standard_normal((7, 300)).astype(dtype)
    view = laid_out(x, layout)
    np.testing.assert_array_equal(topk_sparsify(view, 20), sparsified(x, 20))
    np.testing.assert_array_equal(topk_codes(view, 20).dense(), sparsified(x, 20))
    if layout not in ("unaligned", "reversed"):  # which torch has not
        got = topk_sparsify(torch.from_numpy(view), 20)
        np.testing.assert_array_equal(got.numpy(), sparsified(x, 20))


def test_more_and_fewer_dimensions(rng):
    x = rng.standard_normal((2, 3, 40)).astype(np.float32)
    want = sparsified(x.reshape(6, 40), 5)
    for given in (x, torch.from_numpy(x)):
        np.testing.assert_array_equal(topk_sparsify(given, 5), want.reshape(x.shape))
        np.testing.assert_array_equal(topk_sparsify(given[0, 0], 5), want[0])
        assert topk_codes(given, 5).dense().shape == (6, 40)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (2, 0, 3)])
def test_nothing(shape):
    for x in (np.zeros(shape, np.float32), torch.zeros(shape, requires_grad=True)):
        assert topk_sparsify(x, 3).shape == shape
        codes = topk_codes(x, 3)
        assert codes.dense().shape == (np.prod(shape[:-1]), shape[-1])


# --- As torch sees it -----------------------------------------------------------------------------


@pytest.mark.parametrize("absolute", [False, True])
def test_gradients(absolute):
    x = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    assert torch.equal(
        topk_sparsify(x, 7, absolute=absolute), topk_sparsify(x.detach(), 7, absolute=absolute)
    )
    for function in (
        lambda x: topk_sparsify(x, 7, absolute=absolute),
        lambda x: topk_codes(x, 7, absolute=absolute).values,
        lambda x: topk_codes(x, 7, absolute=absolute).dense(),
    ):
        assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, (x,))


def test_a_kept_zero_has_a_gradient():
    x = torch.tensor([[-1.0, 0.0, -3.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(topk_sparsify(x, 1).sum(), x)
    assert torch.equal(grad, torch.tensor([[0.0, 1.0, 0.0]]))


def test_straight_through():
    x = torch.randn(4, 30, requires_grad=True)
    out = topk_sparsify(x, 7, straight_through=True)
    assert torch.equal(out, topk_sparsify(x, 7))
    grad = torch.randn(4, 30)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], grad)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_with_and_without_a_gradient(dtype):
    x = torch.randn(5, 90).to(dtype).requires_grad_()
    with torch.no_grad():
        want = topk_sparsify(x, 9)
        assert not want.requires_grad
    got = topk_sparsify(x, 9)
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert torch.autograd.grad(got.sum(), x)[0].dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(topk_sparsify(x, 9), want)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("straight_through", [False, True])
def test_compiles_without_a_break(straight_through, dynamic):
    torch._dynamo.reset()

    def call(x, dictionary):
        kept = topk_sparsify(x * 2, 6, straight_through=straight_through)
        codes = topk_codes(x, 6)
        pair = codes.indices.view(-1, 6), codes.values.view(-1, 6)
        return kept, sparse_decode(pair, dictionary)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x, dictionary = torch.randn(4, 50, requires_grad=True), torch.randn(50, 3, requires_grad=True)
    results = []
    for f in (compiled, call):
        kept, decoded = f(x, dictionary)
        grads = torch.autograd.grad(kept.square().sum() + decoded.sum(), (x, dictionary))
        results.append((kept, decoded, *grads))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_operators():
    from pentad.sparse import topk_autograd

    for x in (torch.randn(4, 50), torch.randn(50, 4).T, torch.randn(4, 50).half()):
        torch.library.opcheck(topk_autograd.indices_op, (x, 6, True))
        torch.library.opcheck(topk_autograd.sparsify_op, (x, 6, False))
    meta = torch.zeros(4, 50, device="meta")
    assert topk_sparsify(meta, 3).shape == (4, 50)
    assert topk_codes(meta, 3).indices.shape == (12,)


# --- Decoding -------------------------------------------------------------------------------------


def sparse_forms(dense):
    """The rows of a dense matrix in each form that is taken, as numpy and as torch."""
    scipy_sparse = pytest.importorskip("scipy.sparse")
    csr = scipy_sparse.csr_array(dense)
    parts = csr.indptr, csr.indices, csr.data
    t = torch.from_numpy(dense)
    return {
        "codes": SparseCodes(*parts, dense.shape[1]),
        "tuple": parts,
        "scipy": csr.tocoo(),
        "torch codes": SparseCodes(*map(torch.from_numpy, parts), dense.shape[1]),
        "csr": t.to_sparse_csr(),
        "coo": t.to_sparse(),
    }


def codes_of(rng, n, columns):
    return np.where(rng.random((n, columns)) < 0.2, rng.standard_normal((n, columns)), 0)


def test_every_form_of_codes(rng):
    dense, dictionary = codes_of(rng, 6, 30), rng.standard_normal((30, 5))
    bias = rng.standard_normal(5)
    for name, codes in sparse_forms(dense).items():
        numpy = name in ("codes", "tuple", "scipy")
        d, b = (dictionary, bias) if numpy else map(torch.from_numpy, (dictionary, bias))
        got = sparse_decode(codes, d, bias=b)
        assert isinstance(got, np.ndarray) == numpy
        # Sums of 30 products in double, in another order.
        np.testing.assert_allclose(got, dense @ dictionary + bias, rtol=0, atol=1e-13)


def test_duplicates_and_unsorted_rows_add(rng):
    indptr, indices = np.array([0, 4, 4, 6]), np.array([7, 2, 7, 0, 5, 1])
    values, dictionary = rng.standard_normal(6), rng.standard_normal((8, 3))
    dense = np.zeros((3, 8))
    np.add.at(dense, (np.array([0, 0, 0, 0, 2, 2]), indices), values)
    got = sparse_decode((indptr, indices, values), dictionary)
    np.testing.assert_allclose(got, dense @ dictionary, rtol=0, atol=1e-14)
    v, d = torch.from_numpy(values).requires_grad_(), torch.from_numpy(dictionary).requires_grad_()
    indptr, indices = torch.from_numpy(indptr), torch.from_numpy(indices)
    assert torch.autograd.gradcheck(lambda v, d: sparse_decode((indptr, indices, v), d), (v, d))


@pytest.mark.parametrize("form", ["csr", "coo", "torch codes", "pair"])
def test_gradients_of_decoding(rng, form):
    dense = torch.from_numpy(codes_of(rng, 4, 12))
    dictionary = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    csr = dense.to_sparse_csr()
    values = csr.values().clone().requires_grad_()
    if form == "pair":
        values = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    row = torch.repeat_interleave(csr.crow_indices().diff())

    def call(values, dictionary, bias):
        if form == "csr":
            parts = csr.crow_indices(), csr.col_indices(), values
            codes = torch.sparse_csr_tensor(*parts, size=(4, 12), check_invariants=False)
        elif form == "coo":
            place = torch.stack([row, csr.col_indices()])
            codes = torch.sparse_coo_tensor(place, values, (4, 12), check_invariants=False)
        elif form == "pair":
            codes = torch.tensor([[0, 5, 5], [1, 2, 3], [11, 0, 4], [9, 8, 7]]), values
        else:
            codes = csr.crow_indices(), csr.col_indices(), values, 12
        return sparse_decode(codes, dictionary, bias)

    assert torch.autograd.gradcheck(call, (values, dictionary, bias))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_of_decoding(dtype):
    dictionary = torch.randn(40, 8).to(dtype)
    codes = topk_codes(torch.randn(5, 40), 6)
    got = sparse_decode(codes, dictionary)
    assert got.dtype == dtype
    want = codes.dense().double() @ dictionary.double()
    # One rounding to the dtype, besides those of six float32 products.
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_codes_go_into_scores_and_indexes(rng):
    x = np.abs(rng.standard_normal((9, 50))).astype(np.float32)
    codes = topk_codes(x, 8)
    index = pentad.sparse.SparseIndex(50)
    index.add(codes)
    scores, ids = index.search(codes, 1)
    np.testing.assert_array_equal(ids[:, 0], np.arange(9))
    got = pentad.sparse.score(codes, codes)
    np.testing.assert_allclose(scores[:, 0], got.diagonal(), rtol=1e-6)
    dense = sparsified(x, 8).astype(np.float64)
    np.testing.assert_allclose(got, dense @ dense.T, rtol=1e-6)  # one rounding to float32


# --- What is refused ------------------------------------------------------------------------------

X = np.zeros((3, 5), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: topk_sparsify(X, 0), ValueError, r"\[sparse.topk_sparsify\] k is 0"),
        (lambda: topk_sparsify(X, 1.5), TypeError, "k is 1.5, expected an integer"),
        (lambda: topk_codes(X.astype(int), 2), TypeError, r"\[sparse.topk_codes\] x has dtype"),
        (lambda: topk_codes([[1.0]], 2), TypeError, "x is list"),
        (lambda: topk_sparsify(X[0, 0:1].reshape(()), 1), ValueError, "x has no dimension"),
        (lambda: sparse_decode(X, X), TypeError, "codes is a dense array"),
        (lambda: sparse_decode(topk_codes(X, 2), X), ValueError, "5 columns, expected 3"),
        (lambda: sparse_decode(topk_codes(X, 2), X[0]), ValueError, r"shape \(5,\), expected"),
        (lambda: sparse_decode(topk_codes(X, 2), X.T, X[0]), ValueError, "bias has shape"),
        (lambda: sparse_decode((np.array([[5]]), X[:1, :1]), X.T), ValueError, "an index 5, "),
        (lambda: sparse_decode((np.array([[-1]]), X[:1, :1]), X.T), ValueError, "an index -1"),
        (lambda: sparse_decode((np.array([[1]]), X), X.T), ValueError, "codes have shapes"),
        (lambda: sparse_decode((X, X), X.T), TypeError, r"codes\[0\] has dtype float32"),
        (lambda: sparse_decode(topk_codes(X, 2), torch.zeros(5, 2)), TypeError, "mix numpy"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_kernel_refuses_too():
    out, indices = np.empty_like(X), np.empty((3, 6), np.int32)
    with pytest.raises(ValueError, match="k is 6, expected 0 to 5"):
        _C.sparse_topk(X, 6, False, indices, None)
    with pytest.raises(ValueError, match="indices has the wrong shape"):
        _C.sparse_topk(X, 5, False, indices, None)
    with pytest.raises(ValueError, match="k is -1"):
        _C.sparse_topk_sparsify(X, -1, False, out)
    with pytest.raises(ValueError, match="share"):
        _C.sparse_topk_sparsify(X, 2, False, X)


def test_decoding_of_rows_compiles():
    codes = torch.tensor([0, 2, 4]), torch.tensor([3, 1, 0, 9])
    values = torch.rand(4, requires_grad=True)
    dictionary = torch.randn(10, 6, requires_grad=True)

    def decode(values, dictionary):
        return sparse_decode((*codes, values, 10), dictionary)

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    results = [f(values, dictionary) for f in (decode, compiled)]
    assert torch.equal(*results)
    grads = [torch.autograd.grad(r.square().sum(), (values, dictionary)) for r in results]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
