# SPDX-License-Identifier: Apache-2.0
"""The SPLADE head against the plain form with a matrix per token, and its operators and errors."""

import itertools

import numpy as np
import pytest
from cases import LAYOUTS, cpu_kernels_only, laid_out, run_python

import pentad
from pentad import _C
from pentad._arrays import on_device
from pentad.sparse import splade_head, splade_reference

torch = pytest.importorskip("torch")

POOLINGS = ("max", "sum")
ACTIVATIONS = ("log1p_relu", "log1p_log1p_relu")
each_pooling = pytest.mark.parametrize("pooling", POOLINGS)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def draw(rng, b, length, dim, vocab, dtype=np.float32):
    """hidden, weight, bias, mask; the first sequence has no token and the last has all."""
    mask = rng.random((b, length)) < 0.6
    mask[0], mask[-1] = False, True
    hidden = rng.standard_normal((b, length, dim)).astype(dtype)
    weight = (rng.standard_normal((vocab, dim)) / np.sqrt(max(dim, 1))).astype(dtype)
    return hidden, weight, (rng.standard_normal(vocab) * 0.3).astype(dtype), mask


def tensors(arrays, dtype=None, grad=False):
    out = [torch.from_numpy(a) for a in arrays[:3]]
    out = [t.to(dtype or t.dtype).requires_grad_(grad) for t in out]
    return *out, torch.from_numpy(arrays[3])


def plain(hidden, weight, bias, mask, pooling, activation):
    x = torch.nn.functional.linear(hidden, weight, bias)
    if mask is not None:
        x = x * mask.unsqueeze(-1).to(x.dtype)
    x = torch.log1p(torch.relu(x))
    if activation == "log1p_log1p_relu":
        x = torch.log1p(x)
    return x.sum(1) if pooling == "sum" else x.max(1)[0]


def gradients(function, given, d_out, *more):
    leaves = [t.detach().requires_grad_() for t in given[:3]]
    out = function(*leaves, given[3], *more)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))


def ours(hidden, weight, bias, mask, pooling, activation):
    return splade_head(hidden, weight, bias, mask, pooling=pooling, activation=activation)


def distinct(hidden, weight, bias, mask):
    """Whether no maximum is so nearly attained twice that float32 might take the other token."""
    x = splade_reference.logits(hidden, weight, bias)
    x = np.where(mask[..., None], x, -np.inf)
    two = np.sort(np.concatenate([x, np.zeros_like(x[:, :1])], 1), 1)[:, -2:]
    return bool((two[:, 1] - two[:, 0] > 1e-5).all() or (two[:, 1] == 0).all())


# --- Against the plain form -----------------------------------------------------------------------


@each_pooling
@each_activation
@pytest.mark.parametrize("masked", [False, True])
def test_float64_is_the_plain_form(rng, pooling, activation, masked):
    given = list(tensors(draw(rng, 4, 7, 9, 33, np.float64)))
    if not masked:
        given[3] = None
    d_out = torch.from_numpy(rng.standard_normal((4, 33)))
    got = gradients(ours, given, d_out, pooling, activation)
    want = gradients(plain, given, d_out, pooling, activation)
    for one, other in zip(got, want, strict=True):
        # Sums of 9 and of 33 terms of order 1, in another order.
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_the_plain_form(rng, pooling, activation):
    arrays = draw(rng, 4, 7, 9, 33, np.float64)
    d_out = rng.standard_normal((4, 33))
    want = gradients(plain, tensors(arrays), torch.from_numpy(d_out), pooling, activation)
    got = splade_reference.splade_head(*arrays, pooling, activation)
    backward = splade_reference.splade_head_backward(d_out, *arrays, pooling, activation)
    for one, other in zip((got, *backward), want, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-13, atol=1e-13)


SIZES = [
    *((1, 1, 1, 1), (2, 3, 5, 7), (3, 13, 16, 64), (2, 97, 33, 65), (3, 5, 100, 129)),
    *((2, 7, 600, 70), (2, 4, 1040, 20), (70, 40, 17, 9)),
]


@pytest.mark.parametrize("size", SIZES)
@each_pooling
def test_sizes_at_every_level(rng, isa, size, pooling):
    activation = ACTIVATIONS[size[0] % 2]
    arrays = draw(rng, *size)
    while pooling == "max" and not distinct(*arrays):
        arrays = draw(rng, *size)
    d_out = rng.standard_normal((size[0], size[3])).astype(np.float32)
    want = splade_reference.splade_head(*arrays, pooling, activation)
    backward = splade_reference.splade_head_backward(d_out, *arrays, pooling, activation)
    got = gradients(ours, tensors(arrays), torch.from_numpy(d_out), pooling, activation)
    assert all(t.dtype == torch.float32 for t in got)
    # A logit of H terms of size 1 / sqrt(H) is off by about 2^-24 sqrt(H); gradients are sums of up
    # to B * L * V such terms, of both signs.
    for one, other in zip(got, (want, *backward), strict=True):
        scale = max(1.0, np.abs(other).max())
        np.testing.assert_allclose(one.numpy(), other, rtol=0, atol=3e-6 * scale)
    np.testing.assert_array_equal(ours(*arrays, pooling, activation), got[0].numpy())


@each_pooling
@each_activation
def test_saturation_is_accurate_over_its_range(isa, pooling, activation):
    """Logits from the least to the greatest floats: 1 ulp each of both log1p, and a rounding."""
    x = np.concatenate([[0, -0.0, -1, -np.inf, 3e38], 10.0 ** np.linspace(-38, 38, 5000)])
    x = x.astype(np.float32)
    hidden, weight = np.ones((1, 1, 1), np.float32), x[:, None]
    got = splade_head(hidden, weight, pooling=pooling, activation=activation)[0]
    want = splade_reference.activate(x.astype(np.float64), activation)
    np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-44)
    assert not np.signbit(got).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_pooling
@each_activation
def test_halves_are_as_accurate_as_the_plain_form(rng, isa, dtype, pooling, activation):
    """The family's rule: at most twice the error of torch in that dtype, three times backward."""
    given = [t.to(dtype) if t.is_floating_point() else t for t in tensors(draw(rng, 3, 9, 40, 70))]
    d_out = torch.from_numpy(rng.standard_normal((3, 70))).to(dtype)
    exact = gradients(plain, [t.double() for t in given], d_out, pooling, activation)
    torchs = gradients(plain, given, d_out, pooling, activation)
    got = gradients(ours, given, d_out, pooling, activation)
    for n, (a, b, c) in enumerate(zip(got, torchs, exact, strict=True)):
        assert a.dtype == dtype
        error, allowed = (a - c).abs().max(), (b - c).abs().max()
        assert error <= (3 if n else 2) * allowed


@each_pooling
def test_layouts(rng, pooling):
    arrays = draw(rng, 3, 6, 20, 37)
    want = ours(*arrays, pooling, "log1p_relu")
    for layout in LAYOUTS:
        got = ours(*(laid_out(a, layout) for a in arrays), pooling, "log1p_relu")
        np.testing.assert_array_equal(got, want)
    given, d_out = tensors(arrays), torch.randn(3, 37)
    want = gradients(ours, given, d_out, pooling, "log1p_relu")
    turned = [t.mT.contiguous().mT if t.ndim > 1 else t for t in given]
    got = gradients(ours, turned, d_out.mT.contiguous().mT, pooling, "log1p_relu")
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    spread = torch.randn(1, 1).expand(3, 37)  # as the gradient of a sum
    got = gradients(ours, given, spread, pooling, "log1p_relu")
    for one, other in zip(
        got, gradients(ours, given, spread.clone(), pooling, "log1p_relu"), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
)
def test_masks_of_every_dtype(rng, dtype):
    hidden, weight, bias, mask = draw(rng, 3, 6, 20, 37)
    want = splade_head(hidden, weight, bias, mask)
    for layout in ("plain", "fortran", "strided"):
        given = laid_out(mask.astype(dtype), layout)
        np.testing.assert_array_equal(splade_head(hidden, weight, bias, given), want)
    got = splade_head(*tensors((hidden, weight, bias, mask))[:3], torch.from_numpy(mask).bfloat16())
    np.testing.assert_array_equal(got.numpy(), want)


@each_pooling
def test_masked_tokens_are_not_read(rng, pooling):
    hidden, weight, bias, mask = draw(rng, 3, 6, 20, 37)
    spoiled = np.where(mask[..., None], hidden, np.nan)
    want = splade_head(hidden, weight, bias, mask, pooling=pooling)
    np.testing.assert_array_equal(splade_head(spoiled, weight, bias, mask, pooling=pooling), want)
    assert not want[0].any()
    d_out = torch.ones(3, 37)
    got = gradients(ours, tensors((spoiled, weight, bias, mask)), d_out, pooling, "log1p_relu")
    assert all(torch.isfinite(t).all() for t in got)
    assert not got[1][~torch.from_numpy(mask)].any()


@each_pooling
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nothing_swallows_a_nan(rng, isa, pooling, bad):
    """NaN of either sign in one token; infinities as the plain form has them."""
    arrays = draw(rng, 2, 5, 6, 40)
    arrays[0][1, 3, 2] = bad
    want = plain(*tensors(arrays), pooling, "log1p_relu").numpy()
    got = ours(*arrays, pooling, "log1p_relu")
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    if np.isnan(bad):
        grads = gradients(ours, tensors(arrays), torch.ones(2, 40), pooling, "log1p_relu")
        assert all(torch.isnan(t).any() for t in grads[1:])


def test_the_first_of_equal_tokens_has_the_gradient(rng, isa):
    hidden = np.repeat(rng.standard_normal((1, 1, 8)), 20, 1).astype(np.float32)
    weight = rng.standard_normal((70, 8)).astype(np.float32)
    mask = np.ones((1, 20), np.int64)
    mask[0, :3] = 0
    leaf = torch.from_numpy(hidden).requires_grad_()
    splade_head(
        leaf, torch.from_numpy(weight), attention_mask=torch.from_numpy(mask)
    ).sum().backward()
    touched = leaf.grad[0].abs().sum(1).nonzero().flatten()
    assert touched.tolist() == [3]


@each_pooling
def test_every_number_of_threads_has_the_same_bits(rng, threads, pooling):
    for size in ((5, 50, 40, 1500), (40, 60, 130, 300)):
        arrays = draw(rng, *size)
        d_out = torch.from_numpy(rng.standard_normal((size[0], size[3]))).float()
        results = []
        for n in (1, 2, 3, 7):
            threads(n)
            got = gradients(ours, tensors(arrays), d_out, pooling, "log1p_relu")
            results.append([t.numpy().tobytes() for t in got])
        assert all(r == results[0] for r in results)


@each_pooling
def test_a_batch_is_its_sequences(rng, isa, pooling):
    arrays = draw(rng, 6, 30, 40, 200)
    got = ours(*arrays, pooling, "log1p_relu")
    for b in range(6):
        one = ours(arrays[0][b : b + 1], *arrays[1:3], arrays[3][b : b + 1], pooling, "log1p_relu")
        np.testing.assert_array_equal(one[0], got[b])


@each_pooling
@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_axes(pooling, size, dtype):
    b, length, dim, vocab = size
    leaves = [torch.randn(*s, dtype=dtype) for s in ((b, length, dim), (vocab, dim), (vocab,))]
    for leaf in leaves:
        leaf.requires_grad_()
    out = splade_head(*leaves, pooling=pooling)
    count = {"max": min(length, 1), "sum": length}[pooling]
    want = torch.log1p(torch.relu(leaves[2])) * count if dim == 0 else torch.zeros(b, vocab)
    torch.testing.assert_close(out, want.to(dtype).expand(b, vocab))
    out.sum().backward()
    assert [tuple(leaf.grad.shape) for leaf in leaves] == [(b, length, dim), (vocab, dim), (vocab,)]
    assert not leaves[1].grad.any()


@cpu_kernels_only
def test_without_a_matrix_per_token():
    """(B, L, V) would be 250 MB; what is needed beyond arguments and gradients is some 20."""
    grown = run_python(
        """
        import resource, torch, pentad
        torch.set_num_threads(1)
        hidden, weight = torch.randn(16, 128, 8), torch.randn(30522, 8)
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def step(pooling, n):
            leaves = [hidden[:n].requires_grad_(), weight.requires_grad_()]
            out = pentad.sparse.splade_head(*leaves, pooling=pooling)
            torch.autograd.grad(out.sum(), leaves)
        step("max", 1), step("sum", 1)
        before = peak()
        step("max", 16), step("sum", 16)
        print(peak() - before)
        """
    )
    assert float(grown) < 60


# --- Peers ----------------------------------------------------------------------------------------


@each_pooling
@pytest.mark.parametrize(
    ("theirs", "activation"), [("relu", "log1p_relu"), ("log1p_relu", "log1p_log1p_relu")]
)
def test_names_of_sentence_transformers(rng, pooling, theirs, activation):
    modules = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
    layer = modules.SpladePooling(pooling_strategy=pooling, activation_function=theirs)
    hidden, weight, bias, mask = tensors(draw(rng, 4, 7, 9, 33, np.float64))
    logits = torch.nn.functional.linear(hidden, weight, bias)
    want = layer({"token_embeddings": logits, "attention_mask": mask.long()})["sentence_embedding"]
    got = ours(hidden, weight, bias, mask, pooling, activation)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


# --- Few values -----------------------------------------------------------------------------------


def kept(dense, k):
    out = np.zeros_like(dense)
    for row, to in zip(dense, out, strict=True):
        order = sorted(np.flatnonzero(row), key=lambda v: (-row[v], v))[:k]
        to[order] = row[order]
    return out


@each_pooling
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_the_largest_of_each_row(rng, pooling, dtype):
    hidden, weight, bias, mask = draw(rng, 4, 7, 9, 60, dtype)
    weight[30:45], bias[30:45] = weight[:15], bias[:15]  # equal weights
    dense = ours(hidden, weight, bias, mask, pooling, "log1p_relu")
    for k in (1, 2, 5, 17, 59, 60, 1000):
        got = splade_head(hidden, weight, bias, mask, pooling=pooling, top_k=k)
        np.testing.assert_array_equal(got, kept(dense, k))
    assert len(np.unique(dense[3][dense[3] > 0])) < np.count_nonzero(dense[3])


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sparse_output_is_the_dense_one(rng, top_k, dtype):
    arrays = draw(rng, 4, 7, 9, 60)
    given = tensors(arrays, dtype)
    d_out = torch.randn(4, 60).to(dtype)
    dense = gradients(lambda *a: splade_head(*a, top_k=top_k), given, d_out)
    leaves = [t.detach().requires_grad_() for t in given[:3]]
    out = splade_head(*leaves, given[3], sparse_output=True, top_k=top_k)
    assert out.layout == torch.sparse_csr
    assert torch.equal(out.detach().to_dense(), dense[0])
    assert (out.values() != 0).all()
    rows = torch.repeat_interleave(torch.arange(4), out.crow_indices().diff())
    d_values = d_out[rows, out.col_indices()]
    grads = torch.autograd.grad(out.values(), leaves, d_values)
    for one, other in zip(grads, dense[1:], strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert not splade_head(*leaves, given[3], sparse_output=True).requires_grad
    numpy = splade_head(*arrays, sparse_output=True)
    full = splade_head(*arrays)
    np.testing.assert_array_equal(numpy[0], np.concatenate([[0], np.cumsum((full != 0).sum(1))]))
    np.testing.assert_array_equal(numpy[1], np.nonzero(full)[1])
    np.testing.assert_array_equal(numpy[2], full[full != 0])
    assert numpy[3] == 60


def test_sparse_output_goes_into_scores(rng):
    given = tensors(draw(rng, 4, 7, 9, 60), grad=True)
    out = splade_head(*given, sparse_output=True, top_k=10)
    dense = splade_head(*given, top_k=10)
    got, want = pentad.sparse.score(out, out), dense @ dense.mT
    torch.testing.assert_close(got, want)
    for one, other in zip(
        torch.autograd.grad(got.sum(), given[:3]),
        torch.autograd.grad(want.sum(), given[:3]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


# --- As an operator of torch ----------------------------------------------------------------------


@each_pooling
@each_activation
@pytest.mark.parametrize("top_k", [None, 4])
def test_gradcheck(rng, pooling, activation, top_k):
    given = tensors(draw(rng, 3, 4, 5, 8, np.float64), grad=True)

    def call(*leaves):
        return splade_head(*leaves, given[3], pooling=pooling, activation=activation, top_k=top_k)

    assert torch.autograd.gradcheck(call, given[:3])


@each_pooling
def test_gradients_of_some_arguments(rng, pooling):
    given = tensors(draw(rng, 3, 4, 5, 8))
    want = gradients(ours, given, torch.ones(3, 8), pooling, "log1p_relu")[1:]
    for chosen in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(c) for t, c in zip(given[:3], chosen, strict=True)]
        out = ours(*leaves, given[3], pooling, "log1p_relu")
        assert out.requires_grad == any(chosen)
        if any(chosen):
            out.sum().backward()
        for leaf, grad, c in zip(leaves, want, chosen, strict=True):
            assert torch.equal(leaf.grad, grad) if c else leaf.grad is None
    leaves = [t.detach().requires_grad_() for t in given[:2]]
    ours(*leaves, None, given[3], pooling, "log1p_relu").sum().backward()
    without = [*given[:2], torch.zeros(8), given[3]]
    again = gradients(ours, without, torch.ones(3, 8), pooling, "log1p_relu")
    assert torch.equal(leaves[1].grad, again[2])


@each_pooling
def test_a_second_derivative_is_refused(rng, pooling):
    given = tensors(draw(rng, 3, 4, 5, 8), grad=True)
    (grad,) = torch.autograd.grad(
        ours(*given, pooling, "log1p_relu").sum(), given[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"sparse.splade_head.* a second time"):
        grad.sum().backward()


@each_pooling
@pytest.mark.parametrize("top_k", [None, 3])
def test_compiles_without_a_break(rng, pooling, top_k):
    torch._dynamo.reset()
    given = tensors(draw(rng, 3, 4, 5, 8), grad=True)

    def call(*arguments):
        return splade_head(*arguments, pooling=pooling, top_k=top_k) * 2

    got, want = torch.compile(call, fullgraph=True, backend="aot_eager")(*given), call(*given)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), given[:3]), torch.autograd.grad(want.sum(), given[:3])
    )


@each_pooling
def test_opcheck(rng, pooling):
    from pentad.sparse import splade_autograd

    given = (*tensors(draw(rng, 3, 4, 5, 8)), pooling, "log1p_relu")
    for saved in {False, pooling == "max"}:  # a sum writes nothing more
        torch.library.opcheck(splade_autograd.forward, (*given, saved))
    out, top, place = splade_autograd.forward(*given, pooling == "max")
    arguments = (out, *given[:4], top, place, *given[4:])
    for wanted in ([True, True, True], [False, True, False]):
        torch.library.opcheck(splade_autograd.backward, (*arguments, wanted))
    torch.library.opcheck(splade_autograd.keep, (out, 2))


def test_fake_and_meta():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        leaf = torch.zeros(2, 3, 4, requires_grad=True)
        out = splade_head(leaf, torch.zeros(5, 4), top_k=2)
        assert out.shape == (2, 5)
        out.sum().backward()
        assert leaf.grad.shape == (2, 3, 4)
    meta = splade_head(torch.zeros(2, 3, 4, device="meta"), torch.zeros(5, 4, device="meta"))
    assert meta.shape == (2, 5)


def test_negated_views(rng):
    hidden, weight, _, _ = tensors(draw(rng, 2, 3, 4, 5))
    lazy = torch._neg_view(hidden)
    assert torch.equal(splade_head(lazy, weight), splade_head(-hidden, weight))


def test_autocast(rng):
    given = tensors(draw(rng, 3, 4, 5, 8), grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = splade_head(*given)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, splade_head(*(t.bfloat16() for t in given[:3]), given[3]))
    got.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in given[:3])
    double = tensors(draw(rng, 3, 4, 5, 8, np.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert splade_head(*double).dtype == torch.float64


# --- What is refused ------------------------------------------------------------------------------

HIDDEN, WEIGHT = np.ones((2, 3, 4), np.float32), np.ones((5, 4), np.float32)
BIAS, MASK = np.ones(5, np.float32), np.ones((2, 3), np.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pooling": "mean"}, ValueError, "pooling is 'mean', expected one of max, sum"),
        ({"activation": "relu"}, ValueError, "sentence-transformers calls 'relu'"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu', expected one of log1p_relu"),
        ({"top_k": 0}, ValueError, "top_k is 0, expected at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k is 1.5, expected an integer"),
        ({"hidden": HIDDEN.tolist()}, TypeError, "hidden is list"),
        ({"hidden": torch.ones(2, 3, 4)}, TypeError, "mix numpy arrays and torch tensors"),
        ({"hidden": HIDDEN.astype(int)}, TypeError, "hidden has dtype int64"),
        ({"hidden": HIDDEN[0]}, ValueError, r"hidden has shape \(3, 4\), expected \(B, L, H\)"),
        ({"weight": WEIGHT.astype(float)}, TypeError, "weight has dtype float64 but hidden float3"),
        ({"weight": WEIGHT[:, :3]}, ValueError, r"weight has shape \(5, 3\), expected \(V, 4\)"),
        ({"weight": BIAS}, ValueError, r"weight has shape \(5,\)"),
        ({"bias": BIAS[:4]}, ValueError, r"bias has shape \(4,\), expected \(5,\)"),
        ({"bias": BIAS.astype(int)}, TypeError, "bias has dtype int64"),
        ({"attention_mask": MASK[:1]}, ValueError, r"attention_mask has shape \(1, 3\)"),
        ({"attention_mask": MASK.astype("c8")}, TypeError, "attention_mask has dtype complex64"),
        ({"attention_mask": MASK * 2}, ValueError, r"holds 2.* at \(0, 0\), expected 0 or 1"),
        ({"attention_mask": MASK * 0.5}, ValueError, "attention_mask holds 0.5"),
        ({"attention_mask": MASK * np.nan}, ValueError, "attention_mask holds nan"),
    ],
)
def test_refusals(change, error, message):
    given = {"hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS, "attention_mask": MASK}
    splade_head(**given)
    with pytest.raises(error, match=message) as caught:
        splade_head(**given | change)
    assert str(caught.value).startswith("[sparse.splade_head] ")


OUT, PLACE = np.zeros((2, 5), np.float32), np.zeros((2, 5), np.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": HIDDEN[0]}, ValueError, "hidden"),
        ({"weight": WEIGHT[:, :3]}, ValueError, "weight has shape"),
        ({"weight": WEIGHT.astype(float)}, TypeError, "weight has dtype float64"),
        ({"bias": BIAS[:4]}, ValueError, "bias has shape"),
        ({"mask": MASK[:1]}, ValueError, "attention_mask has shape"),
        ({"mask": MASK.astype(np.uint16)}, TypeError, "attention_mask has dtype uint16"),
        ({"pooling": "mean"}, ValueError, "pooling is 'mean'"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'"),
        ({"out": OUT[:1]}, ValueError, "out has the wrong shape"),
        ({"out": OUT.astype(float)}, TypeError, "out has dtype float64"),
        ({"top": OUT[:1]}, ValueError, "top has the wrong shape"),
        ({"place": OUT}, TypeError, "place has dtype float32"),
        ({"top": OUT}, ValueError, "shares memory"),
    ],
)
def test_the_entry_refuses(change, error, message):
    given = {
        "hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS, "mask": MASK, "pooling": "max",
        "activation": "log1p_relu", "out": OUT, "top": OUT.copy(), "place": PLACE,
    }  # fmt: skip
    scratch = on_device(HIDDEN, _C.sparse_splade_scratch, 2, 3)
    _C.sparse_splade_head(*given.values(), *scratch)
    with pytest.raises(error, match=message):
        _C.sparse_splade_head(*(given | change).values())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"d_out": OUT[:1]}, ValueError, "d_out has shape"),
        ({"top": None}, ValueError, "max pooling needs top and place"),
        ({"place": PLACE - 2}, ValueError, "place is no token with mask 1"),
        ({"place": PLACE + 1}, ValueError, "place is no token with mask 1"),
        ({"place": PLACE + 3}, ValueError, "place is no token with mask 1"),
        ({"place": np.asfortranarray(PLACE)}, ValueError, "not contiguous"),
        ({"d_hidden": HIDDEN[:1]}, ValueError, "d_hidden has the wrong shape"),
        ({"d_weight": WEIGHT[:1]}, ValueError, "d_weight has the wrong shape"),
        ({"d_bias": BIAS[:1]}, ValueError, "d_bias has the wrong shape"),
    ],
)
def test_the_backward_entry_refuses(change, error, message, dtype):
    mask = np.array([[1, 0, 1], [1, 0, 1]])
    ones = {"d_out": OUT + 1, "hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS}
    rest = {"d_hidden": HIDDEN * 0, "d_weight": WEIGHT * 0, "d_bias": BIAS * 0}
    given = (
        ones | {"mask": mask, "top": OUT + 1, "place": PLACE, "pooling": "max"}
        | {"activation": "log1p_relu"} | rest
    )  # fmt: skip
    as_dtype = {
        k: v.astype(dtype) if getattr(v, "dtype", None) == np.float32 else v
        for k, v in (given | change).items()
    }
    if not change:
        _C.sparse_splade_head_backward(*as_dtype.values())
    with pytest.raises(error, match=message):
        _C.sparse_splade_head_backward(*as_dtype.values())


def test_the_entries_of_rows_refuse():
    x = np.array([[1, 0, 2], [0, 0, 3]], np.float32)
    indptr, indices, *_ = splade_head(
        np.ones((1, 1, 1), np.float32), x[:1].T.copy(), sparse_output=True
    )
    assert indptr.tolist() == indices.tolist() == [0, 2]
    starts, where, some = np.array([0, 2, 3]), np.zeros(3, np.int64), np.zeros(3, np.float32)
    _C.sparse_splade_compress(x, starts, where, some)
    assert where.tolist() == [0, 2, 2]
    assert some.tolist() == [1, 2, 3]
    for given, message in (
        ((x, starts[:2], where, some), "indptr has the wrong shape"),
        ((x, np.array([0, 3, 2]), where, some), "indptr descends"),
        ((x, np.array([1, 2, 3]), where, some), "indptr descends"),
        ((x, starts, where[:2], some), "indices has the wrong shape"),
        ((x, starts, where, some[:2]), "values has the wrong shape"),
        ((np.asfortranarray(x), starts, where, some), "x is not contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.sparse_splade_compress(*given)
    with pytest.raises(ValueError, match="top_k is 0"):
        _C.sparse_splade_keep(x, 0)
    with pytest.raises(ValueError, match="read-only"):
        _C.sparse_splade_keep(np.broadcast_to(x, x.shape), 1)
