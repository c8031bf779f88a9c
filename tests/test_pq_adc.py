# SPDX-License-Identifier: Apache-2.0
"""Asymmetric distance computation against its definition bit for bit, and against torch."""

import numpy as np
import pytest
from cases import LAYOUTS, laid_out

from pentad import _C
from pentad.pq import adc, lookup, lookup_reference

torch = pytest.importorskip("torch")

from pentad.pq import adc_autograd  # noqa: E402

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
METRICS = ("l2", "ip", "cosine")
each_metric = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def draw(rng, nq, n, count, levels, width, dtype=np.float32):
    """queries, codes, codebooks."""
    return (
        rng.standard_normal((nq, count * width)).astype(dtype),
        rng.integers(0, levels, (n, count)).astype(np.uint8 if levels <= 256 else np.int32),
        rng.standard_normal((count, levels, width)).astype(dtype),
    )


def definition(queries, codes, codebooks, metric):
    tables = lookup_reference.score_tables(queries, codebooks, "l2" if metric == "l2" else "ip")
    sums = lookup_reference.table_sum(tables, codes)
    if metric != "cosine":
        return sums
    zero = np.zeros_like(queries[:1])
    squares = lookup_reference.score_tables(zero, codebooks, "l2")
    in_order = np.add.accumulate(queries.astype(np.float64) ** 2, axis=1)[:, -1]
    lengths = np.sqrt(in_order).astype(queries.dtype)
    both = lengths[:, None] * np.sqrt(lookup_reference.table_sum(squares, codes))
    return np.where(both > 0, sums / np.where(both > 0, both, 1), 0)


# --- Against the definition -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("nq", "n", "count", "levels", "width"),
    [
        (1, 1, 1, 1, 1),
        (3, 9, 1, 256, 5),
        (2, 7, 5, 16, 3),
        (4, 11, 16, 64, 8),
        (2, 6, 128, 4, 1),
        (2, 5000, 3, 256, 2),
        (2, 13, 3, 300, 4),
    ],
)
@each_metric
def test_scores_have_the_bits_of_the_definition(rng, metric, nq, n, count, levels, width, dtype):
    queries, codes, codebooks = draw(rng, nq, n, count, levels, width, dtype)
    got = adc(queries, codes, codebooks, metric=metric)
    want = definition(queries, codes, codebooks, metric)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want)
    tensor = adc(*map(torch.from_numpy, (queries, codes, codebooks)), metric=metric)
    if metric != "cosine" or dtype == np.float32:
        np.testing.assert_array_equal(tensor.numpy(), want)
    else:  # roots of float64 numbers are not always rounded correctly by torch
        np.testing.assert_allclose(tensor.numpy(), want, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("levels", "count"), [(1, 3), (16, 7), (256, 4), (300, 2)])
def test_gradient_of_the_sums(rng, levels, count, dtype):
    _, codes, _ = draw(rng, 1, 700, count, levels, 1)
    d_out = rng.standard_normal((3, 700)).astype(dtype)
    d_tables = np.full((3, count, levels), 7, dtype)
    _C.pq_table_sum_backward(d_out, codes, d_tables)
    np.testing.assert_array_equal(
        d_tables, lookup_reference.table_sum_backward(d_out, codes, levels)
    )


@pytest.mark.parametrize("dtype", INTEGERS)
def test_codes_of_every_dtype_and_layout(rng, dtype):
    queries, codes, codebooks = draw(rng, 3, 60, 5, 100, 4)
    want = adc(queries, codes, codebooks)
    large = np.concatenate([codebooks, codebooks, codebooks], 1)
    for layout in LAYOUTS:
        other = laid_out(codes.astype(dtype), layout)
        np.testing.assert_array_equal(adc(queries, other, codebooks), want)
        np.testing.assert_array_equal(adc(queries, other, large), want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_floats_of_every_layout(rng, layout):
    queries, codes, codebooks = draw(rng, 3, 60, 5, 17, 4)
    got = adc(laid_out(queries, layout), codes, laid_out(codebooks, layout))
    np.testing.assert_array_equal(got, adc(queries, codes, codebooks))


def test_every_number_of_threads_has_the_same_bits(rng, threads):
    queries, codes, codebooks = draw(rng, 3, 9000, 8, 64, 4)
    d_out, results = rng.standard_normal((3, 9000)).astype(np.float32), []
    for n in (1, 2, 3):
        threads(n)
        d_tables = np.empty((3, 8, 64), np.float32)
        _C.pq_table_sum_backward(d_out, codes, d_tables)
        results.append((adc(queries, codes, codebooks).tobytes(), d_tables.tobytes()))
    assert results[0] == results[1] == results[2]


@each_metric
def test_nothing(metric):
    codebooks = np.ones((2, 3, 4), np.float32)
    for nq, n in ((0, 0), (0, 5), (5, 0)):
        queries, codes = np.ones((nq, 8), np.float32), np.zeros((n, 2), np.uint8)
        assert adc(queries, codes, codebooks, metric=metric).shape == (nq, n)
        given = [torch.from_numpy(a) for a in (queries, codes, codebooks)]
        given[0].requires_grad_()
        out = adc(*given, metric=metric)
        assert out.shape == (nq, n)
        assert not torch.autograd.grad(out.sum(), given[0])[0].any()


# --- Against torch --------------------------------------------------------------------------------


def plain(queries, codes, codebooks, metric):
    decoded = lookup(codes, codebooks)
    if metric == "l2":
        return (queries[..., None, :] - decoded).square().sum(-1)
    if metric == "ip":
        return queries @ decoded.T
    return torch.nn.functional.cosine_similarity(queries[..., None, :], decoded, dim=-1)


@each_metric
def test_scores_and_gradients_are_those_of_decoded_vectors(rng, metric):
    queries, codes, codebooks = map(torch.from_numpy, draw(rng, 6, 40, 3, 8, 4, np.float64))
    queries = queries.view(2, 3, -1).requires_grad_()
    codebooks.requires_grad_()
    got, want = (f(queries, codes, codebooks, metric=metric) for f in (adc, plain))
    torch.testing.assert_close(got, want)
    grad = torch.randn(want.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got, (queries, codebooks), grad),
        torch.autograd.grad(want, (queries, codebooks), grad),
    )


@each_metric
def test_gradcheck(rng, metric):
    queries, codes, codebooks = map(torch.from_numpy, draw(rng, 2, 5, 2, 3, 2, np.float64))
    given = (queries.requires_grad_(), codebooks.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, c: adc(q, codes, c, metric=metric), given)


@pytest.mark.parametrize("numpy", [False, True])
def test_the_cosine_with_a_zero_vector_is_zero(rng, numpy):
    queries, codes, codebooks = draw(rng, 3, 9, 2, 4, 3)
    queries[1], codebooks[:, 2] = 0, 0
    codes[codes == 2] = 1
    codes[4] = 2
    if numpy:
        got = adc(queries, codes, codebooks, metric="cosine")
    else:
        given = [torch.from_numpy(a) for a in (queries, codes, codebooks)]
        given[0].requires_grad_()
        given[2].requires_grad_()
        out = adc(*given, metric="cosine")
        for grad in torch.autograd.grad(out.sum(), (given[0], given[2])):
            assert grad.isfinite().all()
        got = out.detach().numpy()
    assert not got[1].any()
    assert not got[:, 4].any()
    rest = np.delete(np.delete(got, 1, 0), 4, 1)
    assert (rest != 0).all()
    assert (np.abs(rest) <= 1 + 1e-6).all()


@pytest.mark.parametrize("numpy", [False, True])
def test_a_nan_in_the_cosine_stays_where_it_is(rng, numpy):
    queries, codes, codebooks = draw(rng, 4, 9, 2, 4, 3)
    codes[4, 1], codes[5:, 1] = 3, 0

    def scores(*given):
        if numpy:
            return adc(*given, metric="cosine")
        return adc(*(torch.from_numpy(a) for a in given), metric="cosine").numpy()

    want = scores(queries, codes, codebooks)
    queries[0, 1], queries[2, 5], queries[3] = np.nan, np.inf, 0
    got = scores(queries, codes, codebooks)
    assert np.isnan(got[[0, 2]]).all()
    np.testing.assert_array_equal(got[1], want[1])
    assert not got[3].any()
    codebooks[1, 3, 0] = np.nan
    assert np.isnan(scores(queries, codes, codebooks)[1]).tolist() == (codes[:, 1] == 3).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_metric
def test_dtypes(rng, metric, dtype):
    queries, codes, codebooks = map(torch.from_numpy, draw(rng, 3, 9, 2, 4, 3))
    queries, codebooks = (t.to(dtype).requires_grad_() for t in (queries, codebooks))
    out = adc(queries, codes, codebooks, metric=metric)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == wide
    want = adc(queries.to(wide), codes, codebooks.to(wide), metric=metric)
    assert torch.equal(out, want)
    for grad in torch.autograd.grad(out.sum(), (queries, codebooks)):
        assert grad.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adc(queries, codes, codebooks, metric=metric), want)


@each_metric
def test_a_second_derivative_is_refused(rng, metric):
    queries, codes, codebooks = map(torch.from_numpy, draw(rng, 3, 9, 2, 4, 3))
    queries.requires_grad_()
    out = adc(queries, codes, codebooks, metric=metric)
    (grad,) = torch.autograd.grad(out.square().sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match=r"pq.adc.* a second time"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
@each_metric
def test_compiles_without_a_break(rng, metric, dynamic):
    torch._dynamo.reset()
    queries, codes, codebooks = map(torch.from_numpy, draw(rng, 3, 9, 2, 4, 3))
    leaves = (queries.requires_grad_(), codebooks.requires_grad_())

    def call(q, codes, c):
        return adc(q, codes, c, metric=metric) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got, want = compiled(queries, codes, codebooks), call(queries, codes, codebooks)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
    )


def test_opcheck(rng):
    queries, codes, codebooks = map(torch.from_numpy, draw(rng, 3, 9, 2, 4, 3))
    for metric in ("l2", "ip"):
        torch.library.opcheck(adc_autograd.tables_op, (queries, codebooks, metric))
    tables = adc_autograd.tables_op(queries, codebooks, "l2")
    torch.library.opcheck(adc_autograd.sums_op, (tables, codes))
    torch.library.opcheck(adc_autograd.sums_op, (tables.mT.contiguous().mT, codes))
    torch.library.opcheck(adc_autograd.sums_backward, (torch.randn(3, 9), codes, 4))
    assert adc(queries.to("meta"), codes.to("meta"), codebooks.to("meta")).shape == (3, 9)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64"])
def test_a_code_without_a_row_is_named(rng, dtype):
    queries, codes, codebooks = draw(rng, 3, 4000, 2, 5, 3)
    codes = codes.astype(dtype)
    codes[3998, 1] = 5
    message = "codes hold 5 in row 3998, column 1, expected 0 to 4"
    with pytest.raises(ValueError, match=message):
        adc(queries, codes, codebooks)
    with pytest.raises(ValueError, match=message):
        _C.pq_table_sum_backward(
            np.zeros((1, 4000), np.float32), codes, np.zeros((1, 2, 5), np.float32)
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metric": "dot"}, ValueError, "metric is 'dot', expected one of l2"),
        ({"queries": np.zeros((3, 7), np.float32)}, ValueError, "expected 8 columns"),
        ({"queries": np.zeros((3, 8), int)}, TypeError, "queries has dtype int64"),
        ({"codes": np.zeros((5, 3), int)}, ValueError, r"codes have shape \(5, 3\)"),
        ({"codes": np.zeros((5, 2))}, TypeError, "codes has dtype float64"),
        ({"codebooks": np.zeros((2, 4), np.float32)}, ValueError, r"expected \(M, K, width\)"),
        ({"codebooks": torch.zeros(2, 3, 4)}, TypeError, "mix numpy arrays and torch"),
    ],
)
def test_refusals(change, error, message):
    arguments = {
        "queries": np.zeros((3, 8), np.float32),
        "codes": np.zeros((5, 2), np.uint8),
        "codebooks": np.zeros((2, 3, 4), np.float32),
        "metric": "l2",
    } | change
    with pytest.raises(error, match=message) as caught:
        adc(**arguments)
    assert str(caught.value).startswith("[pq.adc] ")


def test_the_entries_refuse():
    tables, codes = np.zeros((3, 2, 4), np.float32), np.zeros((5, 2), np.uint8)
    out = np.zeros((3, 5), np.float32)
    _C.pq_table_sum(tables, codes, out)
    for one, other, to, message in (
        (tables[:, :1], codes, out, "not contiguous"),
        (tables[:, :1].copy(), codes, out, "tables has shape"),
        (tables, codes, out[:2], "out has the wrong shape"),
        (tables, codes, tables.reshape(-1)[:15].reshape(3, 5), "shares memory"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.pq_table_sum(one, other, to)
    with pytest.raises(ValueError, match="d_out has shape"):
        _C.pq_table_sum_backward(out[:, :4], codes, tables)
    queries, codebooks = np.zeros((3, 8), np.float32), np.zeros((2, 4, 4), np.float32)
    with pytest.raises(ValueError, match="queries has shape"):
        _C.pq_score_tables(queries[:, :7], codebooks, "l2", tables)
    with pytest.raises(ValueError, match="metric is 'cosine'"):
        _C.pq_score_tables(queries, codebooks, "cosine", tables)
    # Without queries nothing is looped over, whatever the shape.
    none = np.zeros((2**40, 1, 0), np.float32)
    _C.pq_score_tables(
        np.zeros((0, 0), np.float32), none, "l2", np.zeros((0, 2**40, 1), np.float32)
    )
    with pytest.raises(TypeError, match="codebooks has dtype float64"):
        _C.pq_score_tables(queries, codebooks.astype(np.float64), "l2", tables)
