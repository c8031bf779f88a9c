# SPDX-License-Identifier: Apache-2.0
"""Sliced vectors and their gated products against plain loops."""

import numpy as np
import pytest
from cases import LAYOUTS, laid_out

from pentad.sparse import gated_inner_product, score, sliced_densify

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def lexical(rng, n, columns, dtype=np.float64):
    """Weights of few levels, so that there are ties."""
    x = np.round(rng.random((n, columns)) * 3, 1)
    return np.where(rng.random((n, columns)) < 0.3, x, 0).astype(dtype)


def plain(x, slices, stride=False):
    n, columns = x.shape
    width = -(-columns // slices)
    values, ids = np.zeros((n, slices), x.dtype), np.full((n, slices), -1, np.int32)
    for i in range(n):
        for j in range(columns):
            m = j % slices if stride else j // width
            if x[i, j] > values[i, m]:
                values[i, m], ids[i, m] = x[i, j], j
    return values, ids


def sparse_forms(x):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    csr = scipy_sparse.csr_array(x)
    parts = csr.indptr, csr.indices, csr.data, x.shape[1]
    torch_parts = (*map(torch.from_numpy, parts[:3]), x.shape[1])
    t = torch.from_numpy(x)
    return csr, parts, torch_parts, t.to_sparse_csr(), t.to_sparse()


@pytest.mark.parametrize("stride", [False, True])
@pytest.mark.parametrize(("columns", "slices"), [(12, 3), (13, 4), (5, 4), (7, 7), (9, 1), (30, 8)])
def test_every_form(rng, columns, slices, stride):
    x = lexical(rng, 9, columns)
    x[4] = 0
    want = plain(x, slices, stride)
    for given in (x, torch.from_numpy(x), *sparse_forms(x)):
        got = sliced_densify(given, slices, stride=stride)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
            assert str(a.dtype).removeprefix("torch.") == str(b.dtype)


def test_values_of_zero_and_below_do_not_count():
    x = np.array([[-1.0, -2.0, 0.0, -3.0, 5.0, -1.0]])
    for given in (x, torch.from_numpy(x), *sparse_forms(x)):
        values, ids = sliced_densify(given, 3)
        np.testing.assert_array_equal(values, [[0, 0, 5]])
        np.testing.assert_array_equal(ids, [[-1, -1, 4]])
    explicit = np.array([0, 2]), np.array([1, 3]), np.array([0.0, -1.0]), 4
    np.testing.assert_array_equal(sliced_densify(explicit, 2).ids, [[-1, -1]])


def test_a_nan_stays():
    x = np.array([[1.0, np.nan, 3.0, 0.0]])
    for given in (x, torch.from_numpy(x)):
        values, ids = sliced_densify(given, 2)
        np.testing.assert_array_equal(values, [[np.nan, 3]])
        np.testing.assert_array_equal(ids, [[1, 2]])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(rng, layout, dtype):
    x = lexical(rng, 6, 20, dtype)
    values, ids = sliced_densify(laid_out(x, layout), 4)
    want = plain(x, 4)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, want[0])
    np.testing.assert_array_equal(ids, want[1])
    t = torch.from_numpy(np.ascontiguousarray(x)).T.contiguous().T
    np.testing.assert_array_equal(sliced_densify(t, 4).values, want[0])


@pytest.mark.parametrize("stride", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_gated_products(rng, dtype, stride):
    q, d = lexical(rng, 4, 22, dtype), lexical(rng, 11, 22, dtype)
    q[1] = 0
    pairs = [sliced_densify(x, 5, stride=stride) for x in (q, d)]
    (qv, qi), (dv, di) = pairs
    same = (qi[:, None] == di) & (qi[:, None] >= 0)
    want = (qv[:, None].astype(float) * dv * same).sum(-1)
    got = gated_inner_product(*pairs)
    assert got.dtype == dtype
    # Five products in double, in another order, rounded once; to float16 by way of float32.
    rtol = {np.float16: 2.0**-10, np.float32: 1e-7, np.float64: 1e-15}[dtype]
    np.testing.assert_allclose(got, want, rtol=rtol)
    assert (want > 0).any()
    tensors = [tuple(map(torch.from_numpy, p)) for p in pairs]
    np.testing.assert_array_equal(gated_inner_product(*tensors), got)


def test_one_slice_for_each_term_is_the_sparse_product(rng):
    q, d = lexical(rng, 4, 12), lexical(rng, 6, 12)
    got = gated_inner_product(sliced_densify(q, 12), sliced_densify(d, 12))
    np.testing.assert_array_equal(got, score(sparse_forms(q)[0], sparse_forms(d)[0]))


@pytest.mark.parametrize("stride", [False, True])
@pytest.mark.parametrize("form", ["dense", "csr", "tuple"])
def test_gradients(rng, form, stride):
    x = torch.rand(5, 10, dtype=torch.float64) + 0.1
    docs = sliced_densify(torch.rand(3, 10, dtype=torch.float64), 3, stride=stride)
    csr = x.to_sparse_csr()
    leaf = x.requires_grad_() if form == "dense" else csr.values().clone().requires_grad_()

    def call(leaf):
        given = leaf
        if form == "csr":
            parts = csr.crow_indices(), csr.col_indices(), leaf
            given = torch.sparse_csr_tensor(*parts, size=(5, 10), check_invariants=False)
        elif form == "tuple":
            given = csr.crow_indices(), csr.col_indices(), leaf, 10
        short = sliced_densify(given, 3, stride=stride)
        return short.values, gated_inner_product(short, docs)

    assert torch.autograd.gradcheck(call, (leaf,))
    with torch.no_grad():
        assert not call(leaf)[1].requires_grad


def test_gradients_reach_both_sides_of_a_product():
    pairs = [
        (torch.rand(n, 4, dtype=torch.float64, requires_grad=True), torch.randint(-1, 3, (n, 4)))
        for n in (3, 5)
    ]
    ids = [p[1] + 3 * torch.arange(4) * (p[1] >= 0) for p in pairs]  # of four slices

    def call(q, d):
        return gated_inner_product((q, ids[0]), (d, ids[1]))

    assert torch.autograd.gradcheck(call, (pairs[0][0], pairs[1][0]))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stride", [False, True])
def test_dense_slicing_compiles_without_a_break(stride, dynamic):
    torch._dynamo.reset()

    def call(x):
        return sliced_densify(x * 2, 4, stride=stride)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = torch.rand(5, 18, requires_grad=True)
    got, want = compiled(x), call(x)
    assert torch.equal(got.values, want.values)
    assert torch.equal(got.ids, want.ids)
    grads = (torch.autograd.grad(r.values.square().sum(), x)[0] for r in (got, want))
    assert torch.equal(*grads)
    assert sliced_densify(torch.zeros(5, 18, device="meta"), 4).ids.shape == (5, 4)


X = np.zeros((2, 6), np.float32)
PAIR = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sliced_densify(X, 7), ValueError, "slices are 7, but x has only 6 columns"),
        (lambda: sliced_densify(X, 0), ValueError, "slices is 0"),
        (lambda: sliced_densify(X[0], 1), ValueError, r"shape \(6,\), expected \(n, V\)"),
        (lambda: sliced_densify(X.astype(int), 1), TypeError, "x has dtype int64"),
        (lambda: sliced_densify("x", 1), TypeError, "x is str"),
        (lambda: sliced_densify((np.zeros(1, int),) * 2 + (X[0, :1],), 1), ValueError, "no width"),
        (lambda: gated_inner_product(PAIR, X), TypeError, "docs is ndarray"),
        (lambda: gated_inner_product(PAIR[::-1], PAIR), TypeError, "values has dtype int32"),
        (lambda: gated_inner_product(PAIR, (PAIR[0], PAIR[1][:1])), ValueError, "docs has shapes"),
        (lambda: gated_inner_product(PAIR, (PAIR[0], PAIR[1] - 2)), ValueError, "id below -1"),
        (
            lambda: gated_inner_product(PAIR, (PAIR[0][:, :2], PAIR[1][:, :2])),
            ValueError,
            "queries have 3 slices but docs 2",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=rf"\[sparse\.\w+\] .*{message}"):
        call()
