# SPDX-License-Identifier: Apache-2.0
"""Product-key memory: selection to the last bit, gradients, what is refused."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from cases import LAYOUTS, assert_same, laid_out
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pentad
from pentad import _C
from pentad.pq import product_key_lookup, product_keys_reference

EPS = float(np.finfo(np.float32).eps)
KINDS = ("normal", "ties", "zeros", "large")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # tasks of microseconds would wait for each other; some tests set another number


def draw(rng, rows, heads, n, half, dv, kind="normal"):
    """(q, subkeys, values) float32; "ties": of few distinct scores; "large": of many sizes."""
    shapes = (rows, heads, 2 * half), (heads, 2, n, half), (n * n, dv)
    if kind == "ties":
        arrays = [rng.integers(-1, 2, shape) for shape in shapes[:2]]
    elif kind == "zeros":
        arrays = [np.zeros(shape) for shape in shapes[:2]]
    elif kind == "large":
        arrays = [
            rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 7, shape) for shape in shapes[:2]
        ]
    else:
        arrays = [rng.standard_normal(shape) for shape in shapes[:2]]
    return [x.astype(np.float32) for x in (*arrays, rng.standard_normal(shapes[2]))]


def check(got, q, subkeys, values, k, **options):
    """A result with indices against the definition."""
    want = product_keys_reference.product_key_lookup(
        q, subkeys, values, k, return_indices=True, **options
    )
    out, indices, weights = want
    assert_same(np.asarray(got.indices), indices)
    # One rounding of doubles; exp and the sum err by a few units of 2**-53.
    np.testing.assert_allclose(got.weights, weights, rtol=EPS, atol=1e-45)
    # A chain of that many sums and products, each off by EPS / 2, of rounded weights.
    terms = abs(weights)[..., None] * abs(values.astype(np.float64))[indices]
    terms = terms.sum(2).sum(1) if options.get("combine", "sum") == "sum" else terms.sum(2)
    steps = q.shape[1] * k + 2
    assert (abs(np.asarray(got.out, np.float64) - out) <= EPS * steps * terms + 1e-45).all()


# --- The definition -------------------------------------------------------------------------------


def test_the_reference_says_what_the_definition_says(rng):
    q, subkeys, values = draw(rng, 3, 2, 4, 2, 3, "ties")
    out, indices, weights = product_keys_reference.product_key_lookup(
        q, subkeys, values, 5, scale=0.5, combine="none", return_indices=True
    )
    for row, head in itertools.product(range(3), range(2)):
        scores = {}
        for i, j in itertools.product(range(4), range(4)):
            key = [*subkeys[head, 0, i], *subkeys[head, 1, j]]
            products = (
                Fraction(float(a)) * Fraction(float(b))
                for a, b in zip(q[row, head], key, strict=True)
            )
            scores[i * 4 + j] = sum(products)
        best = sorted(scores, key=lambda index: (-scores[index], index))[:5]
        assert indices[row, head].tolist() == best
        exponentials = np.exp([0.5 * float(scores[index]) for index in best])
        want = exponentials / exponentials.sum()
        np.testing.assert_allclose(weights[row, head], want, rtol=1e-14)
        np.testing.assert_allclose(out[row, head], want @ values[best], rtol=1e-12)


# --- Selection ------------------------------------------------------------------------------------


@st.composite
def lookups(draw_):
    n = draw_(st.integers(1, 40) | st.integers(1, 70))
    return {
        "rows": draw_(st.integers(0, 9) | st.integers(0, 30)),
        "heads": draw_(st.integers(1, 4)),
        "n": n,
        "half": draw_(st.integers(1, 40)),
        "dv": draw_(st.integers(0, 5) | st.integers(1, 70)),
        "k": min(n * n, draw_(st.sampled_from([1, 2, 3, 8, 31, 32, n, n * n]))),
        "kind": draw_(st.sampled_from(KINDS)),
        "layouts": draw_(st.tuples(*[st.sampled_from(LAYOUTS)] * 3)),
        "threads": draw_(st.integers(1, 3)),
        "softmax": draw_(st.booleans()),
        "combine": draw_(st.sampled_from(["sum", "none"])),
        "seed": draw_(st.integers(0, 2**32 - 1)),
    }


def case(**changes):
    plain = {"rows": 5, "heads": 2, "n": 20, "half": 8, "dv": 6, "k": 4, "kind": "normal"}
    plain |= {"layouts": ("plain",) * 3, "threads": 2, "softmax": True, "combine": "sum", "seed": 1}
    return plain | changes


@settings(max_examples=25)
@given(lookups())
@example(case(rows=0))
@example(case(dv=0))
@example(case(n=1, k=1, half=1))
@example(case(n=20, k=400))
@example(case(n=33, k=32, kind="ties", rows=70))
@example(case(n=64, k=32, kind="zeros"))
@example(case(n=65, k=40, kind="large", softmax=False))
def test_selection_is_that_of_brute_force(isa, threads, c):
    threads(c["threads"])
    rng = np.random.default_rng(c["seed"])
    arrays = draw(rng, c["rows"], c["heads"], c["n"], c["half"], c["dv"], c["kind"])
    given_arrays = [laid_out(x, how) for x, how in zip(arrays, c["layouts"], strict=True)]
    options = {"softmax": c["softmax"], "combine": c["combine"], "scale": 0.7}
    got = product_key_lookup(*given_arrays, c["k"], return_indices=True, **options)
    check(got, *arrays, c["k"], **options)


@pytest.mark.parametrize(
    ("k", "kind"),
    [
        *((1, "ties"), (100, "normal"), (560, "zeros"), (560, "normal")),
        *((700, "ties"), (1500, "ties"), (1500, "normal")),
    ],
)
def test_large_k(rng, isa, k, kind):
    """More candidates than are ranked by counting, and more than there are sub-keys."""
    arrays = draw(rng, 2, 1, 640, 4, 3, kind)
    check(product_key_lookup(*arrays, k, return_indices=True), *arrays, k)


def test_sums_that_round_alike_are_told_apart(isa):
    """2**24 + j / 8 is 2**24 in float32 for each of these j; the exact sums differ."""
    subkeys = np.zeros((1, 2, 8, 1), np.float32)
    subkeys[0, 0, :, 0] = 2.0**24
    subkeys[0, 1, :, 0] = np.arange(8) / 8
    q = np.ones((1, 1, 2), np.float32)
    values = np.zeros((64, 1), np.float32)
    got = product_key_lookup(q, subkeys, values, 20, return_indices=True)
    want = [i * 8 + j for j in (7, 6, 5) for i in range(8)][:20]
    assert got.indices[0, 0].tolist() == want


def test_halves_of_very_different_size_are_added_exactly(isa):
    """1 + 2**-60 is 1 in float64 too."""
    subkeys = np.zeros((1, 2, 4, 1), np.float32)
    subkeys[0, 0, :, 0] = 1
    subkeys[0, 1, :, 0] = [0, 2.0**-60, -(2.0**-60), 2.0**-61]
    q = np.ones((1, 1, 2), np.float32)
    got = product_key_lookup(q, subkeys, np.zeros((16, 1), np.float32), 7, return_indices=True)
    assert got.indices[0, 0].tolist() == [1, 5, 9, 13, 3, 7, 11]


def test_half_scores_are_chains_in_float32(isa):
    """A fused or reordered sum would give 1e-8 or 0.5 where the chain gives 0."""
    subkeys = np.ones((1, 2, 2, 4), np.float32)
    subkeys[0, 0, 1] = [1e8, 1, -1e8, 0]  # ((1e8 + 1) - 1e8) = 0
    subkeys[0, 0, 0] = [0, 0, 0, 0.25]
    q = np.ones((1, 1, 8), np.float32)
    got = product_key_lookup(q, subkeys, np.eye(4, dtype=np.float32), 4, softmax=False,
                             return_indices=True)  # fmt: skip
    assert got.weights[0, 0].tolist() == [4.25, 4.25, 4.0, 4.0]
    assert got.indices[0, 0].tolist() == [0, 1, 2, 3]
    third = np.float32(1 / 3)
    subkeys = np.zeros((1, 2, 1, 2), np.float32)
    subkeys[0, 0, 0] = [third, -1]
    q = np.array([[[third, third * third, 0, 0]]], np.float32)
    got = product_key_lookup(q, subkeys, np.ones((1, 1), np.float32), 1, softmax=False)
    assert got[0, 0] == 0  # fused, the rounding error of the square would remain


def test_nan_is_not_swallowed(rng, isa):
    q, subkeys, values = draw(rng, 6, 2, 40, 5, 7)
    plain = product_key_lookup(q, subkeys, values, 4)
    q[2, 1, 3] = np.nan
    got = product_key_lookup(q, subkeys, values, 4)
    assert np.isnan(got[2]).all()
    assert_same(np.delete(got, 2, 0), np.delete(plain, 2, 0))
    q[2] = 0
    subkeys[1, 0, 17, 2] = -np.nan
    result = product_key_lookup(q, subkeys, values, 4, return_indices=True)
    assert np.isnan(result.out).all()
    assert (result.indices[:, 1] // 40 == 17).all()
    assert (result.indices[:, 0] // 40 != 17).any()
    subkeys[1, 0, 17, 2] = np.inf
    q[:, 1, 2] = 1
    result = product_key_lookup(q, subkeys, values, 4, return_indices=True)
    assert (result.indices[:, 1] // 40 == 17).all()


def test_bits_do_not_depend_on_level_threads_or_batch(rng, threads):
    torch = pytest.importorskip("torch")
    arrays = draw(rng, 200, 3, 50, 37, 41)

    def run():
        leaves = [torch.from_numpy(x).requires_grad_() for x in arrays]
        result = product_key_lookup(*leaves, 13, return_indices=True)
        loss = (result.out * torch.linspace(-1, 1, 41)).sum() + result.weights.square().sum()
        return [*result, *torch.autograd.grad(loss, leaves)]

    before = pentad.isa()
    try:
        want = None
        for level, count in itertools.product(pentad.isa_available(), (1, 2, 3)):
            _C.set_isa(level)
            threads(count)
            got = run()
            want = want or got
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b), (level, count)
    finally:
        _C.set_isa(before)
    q, subkeys, values = arrays
    for rows in (slice(0, 1), slice(7, 12), slice(3, 150)):
        part = product_key_lookup(q[rows], subkeys, values, 13)
        assert_same(part, want[0].detach().numpy()[rows])


# --- Gradients ------------------------------------------------------------------------------------


def plain(torch, q, subkeys, values, indices, scale, softmax, combine):
    """The function at a fixed selection, for autograd."""
    n, half = subkeys.shape[2:]
    heads = torch.arange(q.shape[1])[None, :, None]
    first, second = subkeys[heads, 0, indices // n], subkeys[heads, 1, indices % n]
    scores = (q[:, :, None, :half] * first).sum(-1) + (q[:, :, None, half:] * second).sum(-1)
    weights = (scale * scores).softmax(-1) if softmax else scale * scores
    out = (weights[..., None] * values[indices]).sum(2)
    return (out.sum(1) if combine == "sum" else out), weights


@pytest.mark.parametrize(
    ("rows", "heads", "n", "half", "dv", "k", "layout", "softmax", "combine"),
    [
        (1, 1, 1, 1, 1, 1, "plain", True, "sum"),
        (9, 2, 12, 5, 3, 7, "strided", True, "none"),
        (9, 2, 12, 5, 3, 7, "strided", False, "sum"),
        (130, 3, 40, 67, 33, 32, "plain", True, "sum"),
        (66, 2, 20, 70, 17, 9, "fortran", True, "none"),
        (66, 2, 20, 70, 17, 9, "fortran", False, "none"),
        (70, 1, 9, 16, 80, 81, "unaligned", False, "sum"),
        (70, 1, 9, 16, 80, 81, "unaligned", True, "sum"),
    ],
)
def test_gradients_are_those_of_autograd_in_float64(
    rng, isa, rows, heads, n, half, dv, k, layout, softmax, combine
):
    torch = pytest.importorskip("torch")
    arrays = [
        torch.from_numpy(laid_out(x, layout)).requires_grad_()
        for x in draw(rng, rows, heads, n, half, dv)
    ]
    options = {"scale": 0.6, "softmax": softmax, "combine": combine}
    out, indices, weights = product_key_lookup(*arrays, k, return_indices=True, **options)
    d_out = torch.from_numpy(rng.standard_normal(tuple(out.shape)).astype(np.float32))
    d_weights = torch.from_numpy(rng.standard_normal(tuple(weights.shape)).astype(np.float32))
    got = torch.autograd.grad((out, weights), arrays, (d_out, d_weights))
    doubles = [x.detach().double().requires_grad_() for x in arrays]
    want_out, want_weights = plain(torch, *doubles, indices, *options.values())
    want = torch.autograd.grad(
        (want_out, want_weights), doubles, (d_out.double(), d_weights.double())
    )
    for a, b in zip(got, want, strict=True):
        # Sums of up to rows * heads * k float32 products, of errors that mostly cancel.
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    alone = torch.autograd.grad(  # of each argument without the others
        product_key_lookup(*arrays, k, **options), arrays, d_out
    )
    for i, leaf in enumerate(arrays):
        others = [x if x is leaf else x.detach() for x in arrays]
        one = torch.autograd.grad(product_key_lookup(*others, k, **options), leaf, d_out)
        assert torch.equal(one[0], alone[i])


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("combine", ["sum", "none"])
def test_gradcheck(softmax, combine):
    torch = pytest.importorskip("torch")
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 2, 2, 4), (2, 2, 3, 2), (9, 2))
    ]

    def function(q, subkeys, values):
        result = product_key_lookup(
            q, subkeys, values, 4, scale=0.8, softmax=softmax, combine=combine, return_indices=True
        )
        return result.out, result.weights

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_those_of_float32_rounded_once(rng, isa, dtype):
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, dtype)
    halves = [torch.from_numpy(x).to(dtype) for x in draw(rng, 40, 2, 30, 19, 21)]
    d_out = torch.from_numpy(rng.standard_normal((40, 21)).astype(np.float32)).to(dtype)
    for mixed in itertools.product([False, True], repeat=3):
        leaves = [
            (x if keep else x.float()).requires_grad_()
            for x, keep in zip(halves, mixed, strict=True)
        ]
        wide = [x.detach().float().requires_grad_() for x in leaves]
        out = product_key_lookup(*leaves, 9)
        wide_out = product_key_lookup(*wide, 9)
        assert torch.equal(out, wide_out.to(leaves[2].dtype))
        got = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
        want = torch.autograd.grad(wide_out, wide, d_out.float())
        for a, b, leaf in zip(got, want, leaves, strict=True):
            assert a.dtype == leaf.dtype
            assert torch.equal(a, b.to(leaf.dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_the_sparse_gradient_is_the_dense_one(rng, isa, dtype, rows):
    torch = pytest.importorskip("torch")
    leaves = [
        torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_()
        for x in draw(rng, rows, 2, 30, 4, 17)
    ]
    grads = []
    for sparse in (False, True):
        result = product_key_lookup(*leaves, 3, sparse_grad=sparse, return_indices=True)
        grads.append(torch.autograd.grad(result.out.square().sum(), leaves))
    dense, sparse = grads
    assert torch.equal(sparse[0], dense[0])
    assert torch.equal(sparse[1], dense[1])
    assert sparse[2].is_sparse
    assert sparse[2].is_coalesced()
    assert sparse[2].indices()[0].tolist() == result.indices.unique().tolist()
    assert torch.equal(sparse[2].to_dense(), dense[2])


def test_only_selected_rows_are_touched_by_a_sparse_step(rng):
    torch = pytest.importorskip("torch")
    q, subkeys, values = (torch.from_numpy(x) for x in draw(rng, 5, 2, 30, 4, 6))
    parameter = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.SparseAdam([parameter], lr=0.1)
    result = product_key_lookup(q, subkeys, parameter, 3, sparse_grad=True, return_indices=True)
    result.out.sum().backward()
    optimizer.step()
    changed = (parameter != values).any(1).nonzero()[:, 0]
    assert changed.tolist() == result.indices.unique().tolist()


@pytest.mark.parametrize("wide", [False, True])
def test_unused_results_have_no_gradient(rng, wide):
    torch = pytest.importorskip("torch")
    leaves = [torch.from_numpy(x) for x in draw(rng, 5, 2, 8, 4, 6)]
    leaves = [(x.double() if wide else x).requires_grad_() for x in leaves]
    result = product_key_lookup(*leaves, 3, return_indices=True)
    assert not result.indices.requires_grad
    result.weights.square().sum().backward()
    assert leaves[0].grad.abs().sum() > 0
    assert leaves[2].grad is None or not leaves[2].grad.any()
    out = product_key_lookup(*leaves, 3)
    grad = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        grad.sum().backward()


# --- The doors of torch ---------------------------------------------------------------------------


def tensors(rng, *sizes, dtype=None):
    torch = pytest.importorskip("torch")
    return [torch.from_numpy(x).to(dtype or torch.float32) for x in draw(rng, *sizes)]


def test_any_leading_shape_and_numpy_are_alike(rng):
    q, subkeys, values = draw(rng, 24, 2, 9, 3, 5)
    want = product_key_lookup(q, subkeys, values, 4, return_indices=True)
    torch = pytest.importorskip("torch")
    for lead in ((24,), (2, 3, 4), (24, 1), (1, 4, 6)):
        got = product_key_lookup(
            torch.from_numpy(q).reshape(*lead, 2, 6), torch.from_numpy(subkeys),
            torch.from_numpy(values), 4, return_indices=True,
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            assert tuple(a.shape) == (*lead, *b.shape[1:])
            assert_same(a.numpy().reshape(b.shape), b)
    one = product_key_lookup(q[3], subkeys, values, 4)
    assert_same(one, want.out[3])
    doubles = product_key_lookup(q, subkeys.astype(np.float64), values, 4)
    assert doubles.dtype == np.float64
    np.testing.assert_allclose(doubles, want.out, rtol=1e-4, atol=1e-5)


def test_opcheck(rng):
    torch = pytest.importorskip("torch")
    q, subkeys, values = tensors(rng, 5, 2, 9, 3, 5)
    ops = torch.ops.pentad
    given = {False: ((True, True), (False, True)), True: ((True, False),)}
    for per_head, kinds in given.items():
        arguments = (q, subkeys, values, 4, 1.0, True, per_head)
        torch.library.opcheck(ops.pq_product_keys.default, arguments)
        out, indices, weights = ops.pq_product_keys(*arguments)
        common = (q, subkeys, values, indices, weights, 1.0, True, per_head)
        for d_out, d_weights in kinds:
            arguments = (out if d_out else None, weights if d_weights else None, *common)
            torch.library.opcheck(
                ops.pq_product_keys_backward.default, (*arguments, [True, False, True])
            )
            torch.library.opcheck(
                ops.pq_product_keys_backward_sparse.default, (*arguments, [True, True])
            )


def test_meta_tensors_have_the_shapes(rng):
    torch = pytest.importorskip("torch")
    leaves = [x.to("meta").requires_grad_() for x in tensors(rng, 5, 2, 9, 3, 6)]
    result = product_key_lookup(*leaves, 4, combine="none", return_indices=True)
    assert [tuple(x.shape) for x in result] == [(5, 2, 6), (5, 2, 4), (5, 2, 4)]
    for leaf, grad in zip(leaves, torch.autograd.grad(result.out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert grad.device.type == "meta"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_breaks(rng, dynamic):
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in tensors(rng, 6, 2, 9, 3, 5)]

    def function(q, subkeys, values):
        result = product_key_lookup(q, subkeys, values, 4, return_indices=True)
        return result.out.tanh(), result.weights

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (6, 4):
        part = [leaves[0][:rows], *leaves[1:]]
        got, want = compiled(*part), function(*part)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        grads = [torch.autograd.grad(x[0].sum() + x[1].max(), leaves) for x in (got, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_and_no_grad(rng):
    torch = pytest.importorskip("torch")
    q, subkeys, values = (x.requires_grad_() for x in tensors(rng, 6, 2, 9, 3, 5))
    want = product_key_lookup(q, subkeys, values, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product_key_lookup(q, subkeys, values, 4), want)
        mixed = product_key_lookup(q.bfloat16(), subkeys, values, 4)
    assert mixed.dtype == torch.float32
    with torch.no_grad():
        out = product_key_lookup(q, subkeys, values, 4)
    assert not out.requires_grad
    assert torch.equal(out, want)


# --- What is refused ------------------------------------------------------------------------------

ERRORS = {
    "dtype": ({"q": lambda x: x.astype(np.int32)}, TypeError, "q has dtype int32, expected"),
    "kind": ({"values": lambda x: x.tolist()}, TypeError, "values is list"),
    "subkeys": ({"subkeys": lambda x: x[0]}, ValueError, r"subkeys have shape \(2, 9, 3\)"),
    "halves": ({"subkeys": lambda x: x[:, :1]}, ValueError, r"expected \(heads, 2, n_keys, half\)"),
    "no_keys": ({"subkeys": lambda x: x[:, :, :0]}, ValueError, "none of them 0"),
    "heads": ({"q": lambda x: x[:, :1]}, ValueError, r"expected \(..., 2, 6\)"),
    "width": ({"q": lambda x: x[..., :5]}, ValueError, r"q has shape \(4, 2, 5\) but subkeys"),
    "rank": ({"q": lambda x: x[0, 0]}, ValueError, r"q has shape \(6,\)"),
    "values": ({"values": lambda x: x[:80]}, ValueError, r"shape \(80, 5\), expected \(81, dim\)"),
    "k_zero": ({"k": lambda k: 0}, ValueError, "k is 0, expected at least 1"),
    "k_large": ({"k": lambda k: 82}, ValueError, "k is 82, expected 1 to 81"),
    "k_float": ({"k": lambda k: 2.5}, TypeError, "k is 2.5, expected an integer"),
    "scale": ({"scale": lambda s: -1}, ValueError, "scale is -1.0, expected a positive number"),
    "scale_nan": ({"scale": lambda s: float("nan")}, ValueError, "scale is nan"),
    "combine": ({"combine": lambda c: "mean"}, ValueError, "combine is 'mean', expected one of"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(rng, name):
    q, subkeys, values = draw(rng, 4, 2, 9, 3, 5)
    arguments = {"q": q, "subkeys": subkeys, "values": values, "k": 3, "scale": 1, "combine": "sum"}
    product_key_lookup(**arguments)
    changes, error, text = ERRORS[name]
    for argument, change in changes.items():
        arguments[argument] = change(arguments[argument])
    with pytest.raises(error, match=r"\[pq.product_key_lookup\].*" + text):
        product_key_lookup(**arguments)


def raw(rng):
    q, subkeys, values = draw(rng, 4, 2, 9, 3, 5)
    indices = np.zeros((4, 2, 3), np.int64)
    weights = np.zeros((4, 2, 3), np.float32)
    forward = {"q": q, "subkeys": subkeys, "values": values, "k": 3, "scale": 1.0, "softmax": True,
               "per_head": False, "out": np.zeros((4, 5), np.float32), "indices": indices,
               "weights": weights}  # fmt: skip
    backward = {n: forward[n] for n in ("q", "subkeys", "values", "scale", "softmax", "per_head")}
    backward |= {"indices": indices, "weights": weights, "d_out": np.zeros((4, 5), np.float32),
                 "d_weights": np.zeros((4, 2, 3), np.float32), "d_q": np.zeros_like(q),
                 "d_subkeys": np.zeros_like(subkeys), "d_values": np.zeros((1, 5), np.float32),
                 "touched": np.zeros(1, np.int64)}  # fmt: skip
    return {_C.pq_product_keys: forward, _C.pq_product_keys_backward: backward}


@pytest.mark.parametrize(
    ("entry", "name", "change"),
    [
        (_C.pq_product_keys, "q", lambda x: x[:, :1]),
        (_C.pq_product_keys, "q", lambda x: x.astype(np.float64)),
        (_C.pq_product_keys, "subkeys", lambda x: x[:, :, :8]),
        (_C.pq_product_keys, "subkeys", lambda x: x[..., :2]),
        (_C.pq_product_keys, "values", lambda x: x[1:]),
        (_C.pq_product_keys, "k", lambda x: 4),
        (_C.pq_product_keys, "k", lambda x: 2**62),
        (_C.pq_product_keys, "out", lambda x: x[:, :4]),
        (_C.pq_product_keys, "per_head", lambda x: True),
        (_C.pq_product_keys, "indices", lambda x: x[:3]),
        (_C.pq_product_keys, "weights", lambda x: x[..., ::-1]),
        (_C.pq_product_keys_backward, "indices", lambda x: x - 1),
        (_C.pq_product_keys_backward, "indices", lambda x: x + 81),
        (_C.pq_product_keys_backward, "indices", lambda x: np.arange(24).reshape(4, 2, 3)),
        (_C.pq_product_keys_backward, "weights", lambda x: x[:3]),
        (_C.pq_product_keys_backward, "d_out", lambda x: x[:3]),
        (_C.pq_product_keys_backward, "d_weights", lambda x: x[:, :1]),
        (_C.pq_product_keys_backward, "d_q", lambda x: x[:3]),
        (_C.pq_product_keys_backward, "d_subkeys", lambda x: x[:1]),
        (_C.pq_product_keys_backward, "d_values", lambda x: None),
        (_C.pq_product_keys_backward, "touched", lambda x: None),
    ],
)
def test_the_raw_entries_refuse_what_could_harm_memory(rng, entry, name, change):
    arguments = raw(rng)[entry]
    entry(*arguments.values())
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=r"\[pq.product_key_lookup\]"):
        entry(*arguments.values())


def test_raw_outputs_may_not_share_memory(rng):
    forward, backward = raw(rng).values()
    floats = forward["indices"].view(np.float32).reshape(-1)
    forward["out"] = floats[:20].reshape(
        4, 5
    )  # rows that would be overwritten before they are read
    with pytest.raises(ValueError, match="shares memory"):
        _C.pq_product_keys(*forward.values())
    backward["d_q"] = backward["q"]
    with pytest.raises(ValueError, match="shares memory"):
        _C.pq_product_keys_backward(*backward.values())


def test_raw_shapes_beyond_memory_are_refused():
    huge = np.lib.stride_tricks.as_strided
    zero = np.zeros((), np.float16)
    q, subkeys = huge(zero, (1, 1, 2**61), (0,) * 3), huge(zero, (1, 2, 1, 2**60), (0,) * 4)
    values, weights = np.zeros((1, 1), np.float16), np.zeros((1, 1, 1), np.float32)
    indices = np.zeros((1, 1, 1), np.int64)
    with pytest.raises(ValueError, match="expected at most"):
        _C.pq_product_keys(q, subkeys, values, 1, 1.0, True, False, values.copy(), indices, weights)


def test_raw_indices_are_checked_when_counted():
    assert _C.pq_count_distinct(np.array([[3, 3], [0, 8]]), 9) == 3
    for bad in (-1, 9):
        with pytest.raises(ValueError, match=f"indices hold {bad}"):
            _C.pq_count_distinct(np.array([0, bad]), 9)
