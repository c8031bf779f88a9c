# SPDX-License-Identifier: Apache-2.0
"""Sparse scores and their gradients against the definition; operators, torch, and errors."""

import numpy as np
import pytest

import pentad
from pentad import _C
from pentad.sparse import reference, score
from pentad.sparse._csr import rows_of

sparse = pytest.importorskip("scipy.sparse")
torch = pytest.importorskip("torch")

MOST = 2**31 - 1


def draw(rng, n, V, most, *, duplicates=False, dtype=np.float32):
    """(indptr, indices, values) of rows of 0 to `most` entries, in no order."""
    lengths = np.minimum(rng.integers(0, most + 1, n), most if duplicates else V)
    few = V if V < 10**6 else 50  # of a huge vocabulary, few terms, or no row would share one
    terms = np.arange(V) if few == V else np.sort(rng.integers(0, V, few))
    if few != V:
        terms[0], terms[-1] = 0, V - 1
        terms = np.unique(terms)
        lengths = np.minimum(lengths, len(terms))
    rows = [rng.choice(terms, k) if duplicates else rng.permutation(terms)[:k] for k in lengths]
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.concatenate([*rows, np.zeros(0)]).astype(np.int64)
    return indptr, indices, rng.standard_normal(len(indices)).astype(dtype)


def as_torch(parts):
    return tuple(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in parts)


def drawn_pairs(rng, nq, n, count=40):
    return np.stack([rng.integers(0, nq, count), rng.integers(0, n, count)], 1)


def raw_backward(d_out, q, d, pairs=None, *, wanted=(True, True)):
    wide = np.float64 if np.float64 in (q[2].dtype, d[2].dtype) else np.float32
    grads = [
        np.full(len(side[2]), 7, wide) if want else None
        for side, want in zip((q, d), wanted, strict=True)
    ]
    _C.sparse_score_backward(d_out.astype(wide), *q[:3], *d[:3], pairs, MOST, *grads)
    return grads


def check(rng, q, d, pairs=None):
    """Scores have the bits of the definition; gradients are its sums but for their order."""
    queries, docs = rows_of("op", "q", q), rows_of("op", "d", d)
    dtype = np.result_type(q[2], d[2])
    wide = np.float64 if dtype == np.float64 else np.float32
    want = reference.score(queries, docs, pairs).astype(wide).astype(dtype)
    got = score(q, d, pairs=pairs)
    assert got.dtype == dtype
    assert not np.signbit(got[got == 0]).any()
    np.testing.assert_array_equal(got, want)
    d_out = rng.standard_normal(want.shape).astype(wide)
    got = raw_backward(d_out, q, d, pairs)
    want = reference.score_backward(queries, docs, d_out, pairs)
    # Double sums in another order, then one rounding: at most half an ulp and a little.
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-13} if wide == np.float64 else {"rtol": 1e-7, "atol": 1e-9}
    )
    for side, one, other in zip((queries, docs), got, want, strict=True):
        np.testing.assert_allclose(one, side.to_caller(other), **tolerance)
    for side, both in enumerate(got):
        alone = raw_backward(d_out, q, d, pairs, wanted=(side == 0, side == 1))
        np.testing.assert_array_equal(alone[side], both)


# --- Against the definition -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize(
    ("nq", "n", "V", "of_query", "of_doc"),
    [
        (1, 1, 1, 1, 1),
        (1, 40, 30, 9, 12),
        (40, 1, 30, 9, 12),
        (5, 37, 60, 12, 30),
        (37, 5, 60, 30, 12),
        (17, 16, 20, 20, 20),
        (9, 33, MOST, 20, 30),
        (33, 9, 10**5, 20, 3000),
        (3, 4, 50, 0, 10),
        (3, 4, 50, 10, 0),
        (0, 4, 50, 5, 5),
        (4, 0, 50, 5, 5),
        (0, 0, 50, 5, 5),
    ],
)
def test_shapes(rng, nq, n, V, of_query, of_doc, duplicates, dtype):
    if of_doc == 3000:  # rows that share no more than their first and last terms
        n = min(n, 3)
    q = draw(rng, nq, V, of_query, duplicates=duplicates, dtype=dtype)
    d = draw(rng, n, V, of_doc, duplicates=duplicates, dtype=dtype)
    check(rng, (*q, V), (*d, V))
    if nq and n:
        check(rng, (*q, V), (*d, V), drawn_pairs(rng, nq, n))
    check(rng, (*q, V), (*d, V), np.zeros((0, 2), np.int64))


def test_sides_of_different_dtypes(rng):
    one = draw(rng, 5, 30, 9, dtype=np.float64)
    for dtype, duplicates in ((np.float32, False), (np.float16, False), (np.float32, True)):
        other = draw(rng, 6, 30, 12, duplicates=duplicates, dtype=dtype)
        check(rng, one, other)
        check(rng, other, one)
    check(rng, draw(rng, 5, 30, 9, dtype=np.float16), draw(rng, 6, 30, 12))


@pytest.mark.parametrize("V", [300, 10**9])
def test_more_rows_than_are_listed_at_a_time(rng, V):
    """Lists of 1024 rows and the rest, whichever side is listed; against scipy's products."""
    sides = [draw(rng, n, V, most) for n, most in ((2300, 12), (2500, 14))]
    if V > 300:
        sides = [(p, i % 40 * (V // 40), v) for p, i, v in sides]  # what is hashed
    for q, d in (sides, sides[::-1]):
        rows = [rows_of("op", "x", (*side, V)) for side in (q, d)]
        narrow = [r.indices // (V // 40) if V > 300 else r.indices for r in rows]
        x, y = (
            sparse.csr_array((r.values.astype(float), c, r.indptr), (r.shape[0], 300))
            for r, c in zip(rows, narrow, strict=True)
        )
        got = score((*q, V), (*d, V))
        np.testing.assert_allclose(got, (x @ y.T).toarray(), rtol=1e-7, atol=1e-12)
        d_out = rng.standard_normal(got.shape).astype(np.float32)
        dx, dy = raw_backward(d_out, q, d)
        dense = (d_out @ y.toarray(), d_out.T @ x.toarray())
        for side, terms, dense_one, one in zip(rows, narrow, dense, (dx, dy), strict=True):
            row = np.repeat(np.arange(side.shape[0]), np.diff(side.indptr))
            want = side.to_caller(dense_one[row, terms])
            np.testing.assert_allclose(one, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sizes", [(6, 700, 40, 120), (300, 40, 30, 200)])
def test_the_same_bits_for_any_number_of_threads_and_batch(rng, threads, sizes):
    nq, n, of_query, of_doc = sizes
    q, d = draw(rng, nq, 900, of_query), draw(rng, n, 900, of_doc)
    pairs = drawn_pairs(rng, nq, n, 3000)
    d_out = rng.standard_normal((nq, n)).astype(np.float32)
    threads(1)
    want = score(q, d), score(q, d, pairs=pairs)
    gradients = *raw_backward(d_out, q, d), *raw_backward(d_out.reshape(-1)[:3000], q, d, pairs)
    np.testing.assert_array_equal(want[1], want[0][pairs[:, 0], pairs[:, 1]])
    for b in (0, nq - 1):
        alone = q[0][b : b + 2] - q[0][b], *(a[q[0][b] : q[0][b + 1]] for a in q[1:])
        np.testing.assert_array_equal(score(alone, d)[0], want[0][b])
    for count in (2, 3, 7):
        threads(count)
        np.testing.assert_array_equal(score(q, d), want[0])
        np.testing.assert_array_equal(score(q, d, pairs=pairs), want[1])
        got = *raw_backward(d_out, q, d), *raw_backward(d_out.reshape(-1)[:3000], q, d, pairs)
        for one, other in zip(got, gradients, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_order_of_addition_is_that_of_the_terms():
    """1e16 + 1 - 1e16 is 0 from left to right in double, and 1 in another order."""

    def side(*values):
        return np.array([0, 3]), np.array([5, 9, 7]), np.array(values)

    one = side(1.0, 1.0, 1.0)
    assert score(side(1e16, -1e16, 1.0), one).item() == 0
    assert score(side(1e16, 1.0, -1e16), one).item() == 1
    for pairs in (None, np.array([[0, 0]])):
        large = [a.astype(np.float32) if a.dtype == float else a for a in side(1e8, -1e8, 1.0)]
        same = [a.astype(np.float32) if a.dtype == float else a for a in one]
        assert score(tuple(large), tuple(same), pairs=pairs).item() == 1  # no float32 sum has it


def test_overflow_is_infinite():
    big = np.array([0, 1]), np.array([0]), np.array([3e38], np.float32)
    assert score(big, big).item() == np.inf
    half = np.array([0, 1]), np.array([0]), np.array([6e4], np.float16)
    assert score(half, half).item() == np.inf
    assert score(half, big).dtype == np.float32


# --- Kinds of inputs ------------------------------------------------------------------------------


def test_every_kind_of_input_has_the_same_scores(rng):
    q, d = draw(rng, 6, 30, 12), draw(rng, 9, 30, 20)
    want = score(q, d)

    def kinds(parts, n):
        csr = torch.sparse_csr_tensor(*as_torch(parts), (n, 30))
        return [(*as_torch(parts), 30), csr, csr.to_sparse_coo()]

    for x in kinds(q, 6):
        for y in kinds(d, 9):
            got = score(x, y)
            assert isinstance(got, torch.Tensor)
            np.testing.assert_array_equal(got.numpy(), want)
    x, y = (sparse.csr_array(p[::-1], (len(p[0]) - 1, 30)) for p in (q, d))
    for form in ("csr", "csc", "coo"):
        got = score(x.asformat(form), y.asformat(form))
        np.testing.assert_array_equal(got, want)


def test_pairs_of_every_kind(rng):
    q, d = draw(rng, 6, 30, 12), draw(rng, 9, 30, 20)
    pairs = drawn_pairs(rng, 6, 9)
    want = score(q, d)[pairs[:, 0], pairs[:, 1]]
    for given in (
        pairs,
        pairs.astype(np.uint8),
        np.asfortranarray(pairs),
        (pairs[:, 0], pairs[:, 1].astype(np.int32)),
    ):
        np.testing.assert_array_equal(score(q, d, pairs=given), want)
    q, d, pairs = as_torch(q), as_torch(d), torch.from_numpy(pairs)
    for given in (pairs, pairs.int(), tuple(pairs.T), pairs.T.contiguous().T):
        np.testing.assert_array_equal(score(q, d, pairs=given).numpy(), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(rng, dtype):
    q, d = as_torch(draw(rng, 6, 30, 12)), as_torch(draw(rng, 9, 30, 20))
    half = [(*side[:2], side[2].to(dtype).requires_grad_()) for side in (q, d)]
    wide = [(*side[:2], side[2].detach().float().requires_grad_()) for side in half]
    got, want = score(*half), score(*wide)
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))
    assert score(half[0], wide[1]).dtype == torch.float32
    g = torch.randn(6, 9).to(dtype)
    got.backward(g)
    want.backward(g.float())
    for one, other in zip(half, wide, strict=True):
        assert one[2].grad.dtype == dtype
        assert torch.equal(one[2].grad, other[2].grad.to(dtype))


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_gradcheck(rng, paired, duplicates):
    q = as_torch(draw(rng, 3, 12, 8, duplicates=duplicates, dtype=np.float64))
    d = as_torch(draw(rng, 5, 12, 9, duplicates=duplicates, dtype=np.float64))
    pairs = torch.from_numpy(drawn_pairs(rng, 3, 5, 9)) if paired else None

    def scores(q_values, d_values):
        return score((*q[:2], q_values), (*d[:2], d_values), pairs=pairs)

    values = q[2].requires_grad_(), d[2].requires_grad_()
    assert torch.autograd.gradcheck(scores, values)
    for value in values:  # one side alone
        value.requires_grad_(False)
        assert torch.autograd.gradcheck(scores, values)
        value.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_sparse_tensors_have_gradients_of_their_own_sparsity(rng, dtype):
    q, d = as_torch(draw(rng, 4, 15, 9)), as_torch(draw(rng, 6, 15, 9))
    g = torch.randn(4, 6).to(dtype)
    values = [side[2].to(dtype).requires_grad_() for side in (q, d)]
    score((*q[:2], values[0]), (*d[:2], values[1])).backward(g)
    x, y = (
        torch.sparse_csr_tensor(*side[:2], side[2].detach().to(dtype), (len(side[0]) - 1, 15))
        for side in (q, d)
    )
    x.requires_grad_(), y.requires_grad_()
    score(x, y).backward(g)
    for one, side, want in zip((x, y), (q, d), values, strict=True):
        assert one.grad.layout == torch.sparse_csr
        assert torch.equal(one.grad.crow_indices(), side[0])
        assert torch.equal(one.grad.col_indices(), side[1])
        assert torch.equal(one.grad.values(), want.grad)


def test_coo_tensors_have_gradients_coalesced_or_not(rng):
    indices = torch.from_numpy(rng.integers(0, 5, (2, 30)))
    d = as_torch(draw(rng, 6, 5, 5, dtype=np.float64))
    for coalesced in (False, True):
        x = torch.sparse_coo_tensor(indices, torch.from_numpy(rng.standard_normal(30)), (5, 5))
        x = (x.coalesce() if coalesced else x).requires_grad_()
        g = torch.randn(5, 6, dtype=torch.float64)
        score(x, d).backward(g)
        dense = torch.sparse_csr_tensor(*d, (6, 5)).to_dense()
        want = torch.where(x.detach().to_dense() != 0, g @ dense, 0)
        assert x.grad.layout == torch.sparse_coo
        assert x.grad._nnz() == x.detach().coalesce()._nnz()
        torch.testing.assert_close(x.grad.to_dense(), want)
    # Through the tensor to the numbers that it was made of: duplicates have the same gradient.
    values = torch.ones(30, dtype=torch.float64, requires_grad=True)
    score(torch.sparse_coo_tensor(indices, values, (5, 5)), d).backward(g)
    torch.testing.assert_close(values.grad, (g @ dense)[tuple(indices)])


def test_explicit_zeros_have_gradients():
    zero = torch.tensor([0, 1]), torch.tensor([2]), torch.zeros(1, requires_grad=True)
    one = torch.tensor([0, 1]), torch.tensor([2]), torch.full((1,), 3.0)
    out = score(zero, one)
    assert out.item() == 0
    out.backward()
    assert zero[2].grad.item() == 3


def test_a_graph_is_made_only_where_it_is_needed(rng):
    q, d = as_torch(draw(rng, 3, 15, 9)), as_torch(draw(rng, 4, 15, 9))
    assert score(q, d).grad_fn is None
    q[2].requires_grad_()
    assert score(q, d).requires_grad
    with torch.no_grad():
        assert not score(q, d).requires_grad
    with torch.inference_mode():
        assert not score(q, d).requires_grad
    out = score(q, d)
    (first,) = torch.autograd.grad(out.sum(), q[2], create_graph=True)
    with pytest.raises(RuntimeError, match=r"\[sparse.score\] the gradient cannot be"):
        first.sum().backward()


def test_gradients_of_any_strides(rng):
    """An expanded one, as a sum has it, a transposed and a negated one."""
    q, d = as_torch(draw(rng, 3, 15, 9)), as_torch(draw(rng, 4, 15, 9))
    q[2].requires_grad_()
    for g in (
        torch.ones(()).expand(3, 4),
        torch.randn(4, 3).T,
        torch.randn(3, 8)[:, ::2],
        torch._neg_view(torch.randn(3, 4)),
    ):
        (got,) = torch.autograd.grad(score(q, d), q[2], g)
        (want,) = torch.autograd.grad(score(q, d), q[2], g.clone().contiguous())
        assert torch.equal(got, want)


def test_autocast(rng):
    q, d = as_torch(draw(rng, 3, 15, 9)), as_torch(draw(rng, 4, 15, 9))
    q[2].requires_grad_()
    want = score(q, d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = score(q, d)
    assert torch.equal(got, want)
    got.sum().backward()
    assert q[2].grad.dtype == torch.float32


# --- Operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True])
def test_operators(rng, paired):
    q, d = as_torch(draw(rng, 3, 15, 9)), as_torch(draw(rng, 4, 15, 9, dtype=np.float64))
    pairs = torch.from_numpy(drawn_pairs(rng, 3, 4, 9)) if paired else None
    args = (*q, *d, pairs, 15)
    ops = torch.ops.pentad
    torch.library.opcheck(ops.sparse_score.default, args)
    d_out = ops.sparse_score(*args)
    for wanted in ((True, True), (True, False), (False, True)):
        backward = (d_out, *args, list(wanted))
        torch.library.opcheck(ops.sparse_score_backward.default, backward)


def test_compiled(rng):
    torch._dynamo.reset()
    q, d = as_torch(draw(rng, 3, 15, 9)), as_torch(draw(rng, 4, 15, 9))
    pairs = torch.from_numpy(drawn_pairs(rng, 3, 4, 9))
    values = q[2].requires_grad_(), d[2].requires_grad_()

    def loss(q_values, d_values, pairs):
        x, y = (*q[:2], q_values, 15), (*d[:2], d_values)
        return (score(x, y) ** 2).sum() + score(x, y, pairs=pairs).sum()

    want = torch.autograd.grad(loss(*values, pairs), values)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*values, pairs), values)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_fake_and_meta_tensors(rng):
    from torch._subclasses import FakeTensorMode

    q, d = as_torch(draw(rng, 3, 15, 9)), as_torch(draw(rng, 4, 15, 9))
    meta = [tuple(a.to("meta") for a in side) for side in (q, d)]
    assert score(*meta).shape == (3, 4)
    with FakeTensorMode() as mode:
        fake = [tuple(mode.from_tensor(a) for a in side) for side in (q, d)]
        assert score(*fake).shape == (3, 4)


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_contents_that_are_refused(kind, side):
    fine = np.array([0, 2]), np.array([1, 3]), np.ones(2, np.float32)
    name = ("queries", "docs")[side]
    for i, part, message in (
        (0, [1, 2], "begins with 1"),
        (0, [0, 1], "ends with 1, expected 2"),
        (1, [1, 12], "an index 12 past its 10 columns"),
        (1, [1, -1], "the index -1"),
        (2, [1, np.nan], "the value NaN"),
        (2, [np.inf, 1], "the value infinity"),
    ):
        bad = list(fine)
        bad[i] = np.array(part, fine[i].dtype)
        sides = [(*fine, 10), (*fine, 10)]
        sides[side] = (*bad, 10)
        if kind == "torch":
            sides = [as_torch(x) for x in sides]
        with pytest.raises(ValueError, match=rf"\[sparse.score\] {name} has .*{message}"):
            score(*sides)


def test_arguments_that_are_refused(rng):
    q, d = draw(rng, 3, 15, 9), draw(rng, 4, 15, 9)
    with pytest.raises(ValueError, match="queries have 15 columns but docs 16"):
        score((*q, 15), (*d, 16))
    with pytest.raises(ValueError, match=r"queries has an index \d+ past its 2 columns"):
        score(q, (*draw(rng, 4, 2, 2), 2))
    with pytest.raises(TypeError, match="mix numpy arrays and torch tensors"):
        score(q, as_torch(d))
    with pytest.raises(TypeError, match="mix numpy arrays and torch tensors"):
        score(q, d, pairs=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="pairs has dtype float64"):
        score(q, d, pairs=np.zeros((1, 2)))
    for bad, message in (
        (np.zeros((1, 3), int), r"pairs have shape \(1, 3\), expected \(p, 2\)"),
        (np.array([[0, 4]]), "pairs have a doc 4, expected 0 to 3, of 4 rows"),
        (np.array([[3, 0]]), "pairs have a query 3, expected 0 to 2, of 3 rows"),
        (np.array([[0, 0], [-1, 0]]), "pairs have a query -1"),
        ((np.zeros(2, int),), "pairs are a tuple of 1"),
        ((np.zeros(2, int), np.zeros(3, int)), r"pairs have shapes \(2,\) and \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            score(q, d, pairs=bad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_other_devices_are_refused(rng):
    q = as_torch(draw(rng, 3, 15, 9))
    with pytest.raises(pentad.DeviceError):
        score(tuple(a.cuda() for a in q), tuple(a.cuda() for a in q))


def test_outputs_of_another_size_are_refused(rng):
    """The entries themselves: nothing may write past an output."""
    q, d = draw(rng, 3, 15, 9), draw(rng, 4, 15, 9)
    with pytest.raises(ValueError, match="out"):
        _C.sparse_score(*q, *d, None, 15, np.empty((3, 3), np.float32))
    g, short = np.ones((3, 4), np.float32), np.empty(len(d[2]) - 1, np.float32)
    with pytest.raises(ValueError, match="d_out"):
        _C.sparse_score_backward(g[:2], *q, *d, None, 15, None, None)
    with pytest.raises(ValueError, match="d_docs"):
        _C.sparse_score_backward(g, *q, *d, None, 15, None, short)
