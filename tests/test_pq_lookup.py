# SPDX-License-Identifier: Apache-2.0
"""Lookups against their definition bit for bit, and against torch; their operators and errors."""

import itertools

import numpy as np
import pytest
from cases import LAYOUTS, laid_out

import pentad
from pentad import _C
from pentad.pq import lookup, lookup_reference

torch = pytest.importorskip("torch")

COMBINATIONS = ("concat", "sum", "mean", "product")
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
each_combination = pytest.mark.parametrize("combine", COMBINATIONS)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def draw(rng, n, sizes, width, dtype=np.float32):
    """codes, tables, weights."""
    codes = np.stack([rng.integers(0, k, n) for k in sizes], 1)
    tables = [rng.standard_normal((k, width)).astype(dtype) for k in sizes]
    return codes, tables, rng.standard_normal((n, len(sizes))).astype(dtype)


def bags_of(rng, n):
    """Offsets with empty bags in the middle and at the end."""
    inner = np.sort(rng.integers(0, n + 1, 5))
    return np.concatenate([[0], inner, inner[-1:], [n]])


def raw_backward(d_out, codes, tables, combine, weights=None, offsets=None):
    wide = np.float64 if tables[0].dtype == np.float64 else np.float32
    width = tables[0].shape[1]
    d_tables = np.full((sum(map(len, tables)), width), 7, wide)
    d_weights = np.full(codes.shape, 7, wide)
    _C.pq_lookup_backward(d_out, codes, tables, weights, offsets, combine, d_tables, d_weights)
    return np.split(d_tables, np.cumsum([len(t) for t in tables])[:-1]), d_weights


def check(rng, codes, tables, combine, weights=None, offsets=None):
    """Forward and backward have the bits of the definition."""
    dtype = tables[0].dtype
    wide = np.float64 if dtype == np.float64 else np.float32
    want = lookup_reference.lookup(codes, tables, combine, weights, offsets, wide)
    got = lookup(codes, tables, combine=combine, weights=weights, offsets=offsets)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want.astype(dtype))
    d_out = rng.standard_normal(want.shape).astype(dtype)
    want = lookup_reference.lookup_backward(d_out, codes, tables, combine, weights, offsets, wide)
    got = raw_backward(d_out, codes, tables, combine, weights, offsets)
    for one, other in zip((*got[0], got[1]), (*want[0], want[1]), strict=True):
        np.testing.assert_array_equal(one, other)


# --- Against the definition -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 16, 17, 33, 100])
@each_combination
def test_widths_at_every_level(rng, isa, combine, width, dtype):
    codes, tables, weights = draw(rng, 9, (5, 3, 7), width, dtype)
    for w, offsets in itertools.product((None, weights), (None, bags_of(rng, 9))):
        check(rng, codes, tables, combine, w, offsets)


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (300, 2, 1, 70000), (4,) * 37, (2,) * 128])
@each_combination
def test_numbers_and_sizes_of_tables(rng, combine, sizes):
    codes, tables, weights = draw(rng, 11, sizes, 6)
    check(rng, codes, tables, combine)
    check(rng, codes, tables, combine, weights, bags_of(rng, 11))


@each_combination
def test_many_rows(rng, isa, combine):
    """Several pieces of rows, large tables, and copies that go past the caches."""
    codes, tables, _ = draw(rng, 9000, (3000, 9), 130)
    got = lookup(codes, tables, combine=combine)
    rows = [tables[m][codes[:, m]] for m in range(2)]
    want = {
        "concat": np.concatenate(rows, 1),
        "sum": rows[0] + rows[1],
        "mean": (rows[0] + rows[1]) / np.float32(2),
        "product": rows[0] * rows[1],
    }
    np.testing.assert_array_equal(got, want[combine])


@pytest.mark.parametrize("width", [1, 2, 4, 8, 12, 16, 31])
def test_streamed_copies(rng, isa, width):
    codes, tables, _ = draw(rng, (1 << 21) // (3 * width) + 5, (9, 5, 3), width)
    got = lookup(codes.astype(np.uint8), tables)
    assert got.nbytes > 1 << 23
    want = np.concatenate([tables[m][codes[:, m]] for m in range(3)], 1)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_codes_of_every_dtype_and_layout(rng, dtype):
    codes, tables, _ = draw(rng, 50, (100, 50, 127), 5)
    want = lookup(codes, tables)
    for layout in LAYOUTS:
        np.testing.assert_array_equal(lookup(laid_out(codes.astype(dtype), layout), tables), want)
    same = np.stack([t[:50] for t in tables])
    few = codes % 50
    want = lookup(few, same)
    for layout in LAYOUTS:
        np.testing.assert_array_equal(lookup(laid_out(few.astype(dtype), layout), same), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_combination
def test_tables_and_weights_of_every_layout(rng, combine, layout):
    codes, tables, weights = draw(rng, 20, (6, 6, 6), 10)
    codebooks = np.stack(tables)
    want = lookup(codes, codebooks, combine=combine, weights=weights)
    got = lookup(
        codes, laid_out(codebooks, layout), combine=combine, weights=laid_out(weights, layout)
    )
    np.testing.assert_array_equal(got, want)
    turned = torch.from_numpy(codebooks).transpose(1, 2).contiguous().transpose(1, 2)
    got = lookup(
        torch.from_numpy(codes), turned, combine=combine, weights=torch.from_numpy(weights)
    )
    np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_combination
def test_half_precision_is_rounded_once(rng, isa, combine, dtype):
    codes, tables, weights = draw(rng, 30, (6, 9), 21)
    halves = [torch.from_numpy(t).to(dtype) for t in tables]
    wide = [t.float().numpy() for t in halves]
    got = lookup(
        torch.from_numpy(codes), halves, combine=combine, weights=torch.from_numpy(weights)
    )
    want = lookup_reference.lookup(codes, wide, combine, weights)
    assert torch.equal(got, torch.from_numpy(want).to(dtype))


@each_combination
def test_every_number_of_threads_has_the_same_bits(rng, threads, combine):
    for sizes, width in (((5,), 8), ((3,), 130), ((2000, 3), 33), ((4,) * 40, 8)):
        codes, tables, weights = draw(rng, 5000, sizes, width)
        offsets = np.sort(rng.integers(0, 5000, 300))
        offsets[0] = 0
        results = []
        for n in (1, 2, 3, 7):
            threads(n)
            out = lookup(codes, tables, combine=combine, weights=weights, offsets=offsets)
            grads, d_weights = raw_backward(out, codes, tables, combine, weights, offsets)
            plain = raw_backward(lookup(codes, tables, combine=combine), codes, tables, combine)
            results.append([x.tobytes() for x in (out, *grads, d_weights, *plain[0])])
        assert all(r == results[0] for r in results)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@each_combination
def test_levels_have_the_same_bits(rng, combine, dtype):
    codes, tables, weights = draw(rng, 300, (7, 200), 45, dtype)
    before, results = pentad.isa(), []
    try:
        for level in pentad.isa_available():
            _C.set_isa(level)
            out = lookup(codes, tables, combine=combine, weights=weights)
            grads, d_weights = raw_backward(out, codes, tables, combine, weights)
            results.append([x.tobytes() for x in (out, *grads, d_weights)])
    finally:
        _C.set_isa(before)
    assert all(r == results[0] for r in results)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@each_combination
def test_nothing(dtype, combine):
    tables = np.ones((2, 3, 4), dtype)
    columns = 8 if combine == "concat" else 4
    none = np.zeros((0, 2), np.uint8)
    assert lookup(none, tables, combine=combine).shape == (0, columns)
    out = lookup(none, tables, combine=combine, offsets=np.zeros(3, np.int64))
    np.testing.assert_array_equal(out, np.zeros((3, columns)))
    assert lookup(none, tables, offsets=np.zeros(0, np.int32)).shape == (0, 8)
    assert lookup(np.zeros((5, 0, 2), np.int8), tables).shape == (5, 0, 8)
    assert lookup(np.zeros((5, 2), np.int8), tables[..., :0], combine=combine).shape == (5, 0)
    grads, d_weights = raw_backward(out[:0], none, list(tables), combine)
    assert not np.concatenate(grads).any()
    assert d_weights.shape == (0, 2)


# --- Against torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_are_those_of_embedding_bag(rng, mode, weighted):
    if weighted and mode == "mean":
        pytest.skip("embedding_bag has no weighted mean")
    ids, offsets = rng.integers(0, 50, 200), bags_of(rng, 200)
    table = torch.randn(50, 24, requires_grad=True)
    weights = torch.rand(200, requires_grad=weighted) if weighted else None
    want = torch.nn.functional.embedding_bag(
        torch.from_numpy(ids), table, torch.from_numpy(offsets), mode=mode,
        per_sample_weights=weights,
    )  # fmt: skip
    got = lookup(
        torch.from_numpy(ids)[:, None], [table], combine=mode, offsets=torch.from_numpy(offsets),
        weights=None if weights is None else weights[:, None],
    )  # fmt: skip
    torch.testing.assert_close(got, want)  # the orders of the sums may differ
    leaves = [table, weights] if weighted else [table]
    grad = torch.randn(want.shape)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad)
    )


def torch_lookup(codes, tables, combine, weights):
    terms = torch.stack([t[codes[..., m]] for m, t in enumerate(tables)], -2)
    if weights is not None:
        terms = terms * weights[..., None]
    if combine == "concat":
        return terms.flatten(-2)
    return getattr(terms, {"product": "prod"}.get(combine, combine))(-2)


@pytest.mark.parametrize("weighted", [False, True])
@each_combination
def test_gradients_are_those_of_gathering(rng, combine, weighted):
    codes, tables, weights = draw(rng, 12, (4, 3, 5), 6, np.float64)
    codes = torch.from_numpy(codes).view(2, 6, 3)
    leaves = [torch.from_numpy(t).requires_grad_() for t in tables]
    leaves[0].data[1] = 0  # the product's gradient is exact there
    w = torch.from_numpy(weights).view(2, 6, 3).requires_grad_() if weighted else None
    got, want = (
        lookup(codes, leaves, combine=combine, weights=w),
        torch_lookup(codes, leaves, combine, w),
    )
    torch.testing.assert_close(got, want)
    grad = torch.randn(want.shape, dtype=torch.float64)
    wanted = [*leaves, w] if weighted else leaves
    torch.testing.assert_close(
        torch.autograd.grad(got, wanted, grad), torch.autograd.grad(want, wanted, grad)
    )


@pytest.mark.parametrize("offsets", [None, [0, 2, 2]])
@each_combination
def test_gradcheck(rng, combine, offsets):
    codes, tables, weights = draw(rng, 5, (3, 3), 2, np.float64)
    codes = torch.from_numpy(codes)
    offsets = None if offsets is None else torch.tensor(offsets)
    given = (
        torch.from_numpy(np.stack(tables)).requires_grad_(),
        torch.from_numpy(weights).requires_grad_(),
    )
    assert torch.autograd.gradcheck(
        lambda c, w: lookup(codes, c, combine=combine, weights=w, offsets=offsets), given
    )


# --- As torch sees it -----------------------------------------------------------------------------


def case(weighted=True, ragged=False, offsets=True, dtype=torch.float32, grad=True):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 3, (6, 2), generator=g)
    if ragged:
        books = [torch.randn(k, 4, generator=g).to(dtype).requires_grad_(grad) for k in (3, 5)]
    else:
        books = torch.randn(2, 3, 4, generator=g).to(dtype).requires_grad_(grad)
    weights = torch.rand(6, 2, generator=g).to(dtype).requires_grad_(grad) if weighted else None
    bags = torch.tensor([0, 1, 4]) if offsets else None
    return codes, books, weights, bags


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_and_gradients_have_the_dtypes_of_the_inputs(dtype, ragged):
    codes, books, weights, bags = case(dtype=dtype, ragged=ragged)
    out = lookup(codes, books, combine="product", weights=weights, offsets=bags)
    assert out.dtype == dtype
    leaves = [*(books if ragged else [books]), weights]
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)


def test_only_the_wanted_gradients():
    codes, books, weights, _ = case(ragged=True)
    want = torch.autograd.grad(
        lookup(codes, books, combine="sum", weights=weights).sum(), [*books, weights]
    )
    leaves = [*books, weights]
    for n, leaf in enumerate(leaves):
        alone = [t.detach() if i != n else t for i, t in enumerate(leaves)]
        out = lookup(codes, alone[:2], combine="sum", weights=alone[2])
        torch.testing.assert_close(torch.autograd.grad(out.sum(), leaf)[0], want[n])
    with torch.no_grad():
        assert not lookup(codes, books).requires_grad


def test_weights_of_another_precision():
    codes, books, weights, _ = case(dtype=torch.float64)
    out = lookup(codes, books.float(), combine="sum", weights=weights)
    assert out.dtype == torch.float32
    assert torch.autograd.grad(out.sum(), weights)[0].dtype == torch.float64
    out = lookup(codes, books, combine="sum", weights=weights.bfloat16())
    assert out.dtype == torch.float64


def test_a_second_derivative_is_refused():
    codes, books, weights, _ = case()
    out = lookup(codes, books, weights=weights)
    for leaf in (books, weights):
        (grad,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"pq.lookup.* a second time"):
            grad.sum().backward()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(ragged, dynamic):
    torch._dynamo.reset()
    codes, books, weights, bags = case(ragged=ragged)
    leaves = [*(books if ragged else [books]), weights]

    def call(codes, books, weights, bags):
        return lookup(codes, books, combine="sum", weights=weights, offsets=bags) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got, want = compiled(codes, books, weights, bags), call(codes, books, weights, bags)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
    )


def test_opcheck():
    from pentad.pq import lookup_autograd

    for ragged, offsets, combine in itertools.product((0, 1), (0, 1), ("concat", "product")):
        codes, books, weights, bags = case(ragged=ragged, offsets=offsets, grad=False)
        tables = books if ragged else [books]
        given = (codes, tables, weights, bags, combine)
        torch.library.opcheck(lookup_autograd.forward, given)
        d_out = lookup_autograd.forward(*given)
        for wanted in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(lookup_autograd.backward, (d_out, *given, wanted))


def test_fake_and_meta():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        codes, books, bags = torch.zeros(5, 2).int(), torch.zeros(2, 3, 4), torch.zeros(3).long()
        assert lookup(codes, books).shape == (5, 8)
        assert lookup(codes, books, combine="sum", offsets=bags).shape == (3, 4)
    codes, books = torch.zeros(5, 2, device="meta").int(), torch.zeros(2, 3, 4, device="meta")
    assert lookup(codes, books, combine="mean").shape == (5, 4)


def test_autocast():
    codes, books, weights, _ = case(grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        got = lookup(codes, books, combine="sum", weights=weights.bfloat16())
    want = lookup(codes, books, combine="sum", weights=weights.bfloat16().float())
    assert torch.equal(got, want)


# --- What is refused ------------------------------------------------------------------------------

CODES, BOOKS = np.zeros((4, 2), np.uint8), np.zeros((2, 3, 5), np.float32)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("float_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [4, 70_000])
def test_a_code_without_a_row_is_named(dtype, float_dtype, rows):
    codes = np.zeros((rows, 2), dtype)
    codes[rows - 2, 1] = 3
    books = BOOKS.astype(float_dtype)
    message = f"codes hold 3 in row {rows - 2}, column 1, expected 0 to 2"
    for combine in ("concat", "sum"):
        with pytest.raises(ValueError, match=message):
            lookup(codes, books, combine=combine)
    with pytest.raises(ValueError, match=message):
        raw_backward(np.zeros((rows, 5), float_dtype), codes, list(books), "product")
    largest = np.iinfo(dtype).max
    codes[1, 0] = largest
    with pytest.raises(ValueError, match=f"codes hold {largest} in row 1, column 0"):
        lookup(codes, books)
    if np.iinfo(dtype).min < 0:
        codes[1, 0] = np.iinfo(dtype).min
        with pytest.raises(ValueError, match=f"codes hold {np.iinfo(dtype).min} in row 1"):
            lookup(codes, [books[0], books[1, :2]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"combine": "max"}, ValueError, "combine is 'max', expected one of concat"),
        ({"codes": CODES.astype(np.float32)}, TypeError, "codes has dtype float32"),
        ({"codes": CODES[:, :1]}, ValueError, r"codes have shape \(4, 1\), expected 2 columns"),
        ({"codes": CODES.tolist()}, TypeError, "codes is list"),
        ({"codebooks": BOOKS[0]}, ValueError, r"shape \(3, 5\), expected \(M, K, width\)"),
        ({"codebooks": [BOOKS]}, ValueError, r"expected a list of \(K_m, width\)"),
        ({"codebooks": []}, ValueError, "an empty list"),
        ({"codebooks": BOOKS[:0]}, ValueError, "expected at least one"),
        ({"codebooks": BOOKS.astype(int)}, TypeError, "codebooks has dtype int64"),
        ({"codebooks": [BOOKS[0], BOOKS[1, :, :4]]}, ValueError, "rows of 5 and 4 numbers"),
        ({"codebooks": [BOOKS[0], BOOKS[1].astype(np.float16)]}, TypeError, "float32 and float16"),
        ({"weights": np.zeros((4, 3), np.float32)}, ValueError, r"weights have shape \(4, 3\)"),
        ({"weights": np.zeros((4, 2), int)}, TypeError, "weights has dtype int64"),
        ({"weights": torch.zeros(4, 2)}, TypeError, "mix numpy arrays and torch tensors"),
        ({"offsets": np.zeros(2)}, TypeError, "offsets has dtype float64"),
        ({"offsets": np.zeros((1, 1), int)}, ValueError, r"offsets have shape \(1, 1\)"),
        ({"offsets": np.array([1, 2])}, ValueError, "offsets begin with 1, expected 0 first"),
        ({"offsets": np.array([], int)}, ValueError, "offsets are empty, expected 0 first"),
        ({"offsets": np.array([0, 3, 2])}, ValueError, "offsets descend from 3 to 2"),
        ({"offsets": np.array([0, 5])}, ValueError, "offsets descend from 5 to 4"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"codes": CODES, "codebooks": BOOKS} | change
    with pytest.raises(error, match=message) as caught:
        lookup(**arguments)
    assert str(caught.value).startswith("[pq.lookup] ")


OUT = np.zeros((4, 10), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": CODES[:, :1]}, ValueError, "codes have 1 columns but there are 2 codebooks"),
        ({"codebooks": [BOOKS[0], BOOKS[1, :, :4]]}, ValueError, "expected one width"),
        ({"codebooks": [BOOKS[0], BOOKS[1].astype(np.float16)]}, TypeError, "dtype float16"),
        ({"codebooks": []}, ValueError, "there is no table"),
        ({"codebooks": [BOOKS[0, 0]]}, ValueError, "expected 2 or 3 dimensions"),
        ({"weights": np.zeros((4, 2))}, TypeError, "weights has dtype float64"),
        ({"weights": np.zeros((5, 2), np.float32)}, ValueError, "weights has shape"),
        ({"offsets": np.array([0, 9])}, ValueError, "offsets descend"),
        ({"combine": "other"}, ValueError, "combine is 'other'"),
        ({"out": np.zeros((4, 9), np.float32)}, ValueError, "out has the wrong shape"),
        ({"out": np.zeros((4, 10))}, TypeError, "out has dtype float64"),
        ({"out": np.broadcast_to(OUT[:1], (4, 10))}, ValueError, "out is read-only"),
    ],
)
def test_the_entry_refuses(change, error, message):
    """Whoever calls: what the Python side has checked is checked again where memory is at stake."""
    arguments = {
        "codes": CODES, "codebooks": [BOOKS], "weights": None, "offsets": None,
        "combine": "concat", "out": OUT,
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        _C.pq_lookup(*arguments.values())


def test_the_backward_entry_refuses():
    tables, weights = np.zeros((6, 5), np.float32), np.zeros((4, 2), np.float32)
    given = (CODES, [BOOKS], None, None, "concat")
    _C.pq_lookup_backward(OUT, *given, tables, weights)
    for d_out, d_tables, d_weights, message in (
        (OUT[:3], tables, weights, "d_out has shape"),
        (np.asfortranarray(OUT), tables, weights, "columns apart"),
        (OUT, tables[:5], weights, "d_tables has the wrong shape"),
        (OUT, tables, weights[:3], "d_weights has the wrong shape"),
        (OUT, tables, OUT.reshape(-1)[:8].reshape(4, 2), "shares memory"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.pq_lookup_backward(d_out, *given, d_tables, d_weights)
