# SPDX-License-Identifier: Apache-2.0
"""Gradients against float64 formulas, and the modules on top of them."""

import copy
import math

import numpy as np
import pytest
from cases import assert_same, codes
from hypothesis import given, settings
from hypothesis import strategies as st

import pentad
from pentad.hamming import reference

torch = pytest.importorskip("torch")
H = pentad.hamming

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def tensors(rng, nq, n, dim):
    x = torch.from_numpy(rng.standard_normal((nq, dim)).astype(np.float32)).requires_grad_()
    w = torch.from_numpy(rng.standard_normal((nq, n)).astype(np.float32)).requires_grad_()
    return x, w, torch.from_numpy(codes(rng, n, dim))


def signs(db, dim):
    return torch.from_numpy(reference.unpack(db.numpy(), dim))  # float64


# --- score and weighted_sum -----------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.integers(1, 150),
    st.integers(0, 100),
    st.integers(0, 9),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_gradients_equal_the_analytic_ones(dim, n, nq, expanded, seed):
    rng = np.random.default_rng(seed)
    x, w, db = tensors(rng, nq, n, dim)
    s = signs(db, dim)
    grad = torch.from_numpy(rng.standard_normal((nq, n)).astype(np.float32))
    if expanded:  # what sum() hands down: a zero stride
        grad = torch.ones(1).expand(nq, n)
    H.score(x, db).backward(grad)
    torch.testing.assert_close(x.grad.double(), grad.double() @ s, rtol=1e-4, atol=1e-4)

    grad = torch.from_numpy(rng.standard_normal((nq, dim)).astype(np.float32))
    if expanded:
        grad = torch.ones(1).expand(nq, dim)
    H.weighted_sum(w, db, dim).backward(grad)
    torch.testing.assert_close(w.grad.double(), grad.double() @ s.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_gradients_keep_leading_shapes(rng, lead):
    _, _, db = tensors(rng, 1, 30, 40)
    x = torch.randn(*lead, 40, requires_grad=True)
    w = torch.randn(*lead, 30, requires_grad=True)
    H.score(x, db).sum().backward()
    H.weighted_sum(w, db, 40).sum().backward()
    s = signs(db, 40)
    want = s.sum(0).expand(*lead, 40), s.sum(1).expand(*lead, 30)
    torch.testing.assert_close((x.grad.double(), w.grad.double()), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_come_in_the_dtype_of_the_input(rng, dtype):
    x, w, db = tensors(rng, 3, 20, 40)
    for leaf, call in ((x, lambda t: H.score(t, db)), (w, lambda t: H.weighted_sum(t, db, 40))):
        cast = leaf.detach().to(dtype).requires_grad_()
        out = call(cast)
        assert out.dtype == torch.float32
        out.pow(2).sum().backward()
        assert cast.grad.dtype == dtype
        wide = cast.detach().float().requires_grad_()
        call(wide).pow(2).sum().backward()
        torch.testing.assert_close(cast.grad, wide.grad.to(dtype))


def test_a_finite_difference_of_the_reference(rng):
    """The analytic gradient itself, checked in float64."""
    x, w, db = tensors(rng, 2, 9, 20)

    def loss(x, w):
        first = torch.from_numpy(reference.score(x.numpy(), db.numpy()))
        second = torch.from_numpy(reference.weighted_sum(w.numpy(), db.numpy(), 20))
        return (first.tanh().sum() + second.tanh().sum()).item()

    (H.score(x, db).tanh().sum() + H.weighted_sum(w, db, 20).tanh().sum()).backward()
    x64, w64 = x.detach().double(), w.detach().double()
    for leaf, wide in ((x, x64), (w, w64)):
        flat = wide.view(-1)
        for at in range(0, flat.numel(), 5):
            base = flat[at].item()
            flat[at] = base + 1e-6
            up = loss(x64, w64)
            flat[at] = base - 1e-6
            down = loss(x64, w64)
            flat[at] = base
            assert leaf.grad.view(-1)[at].item() == pytest.approx((up - down) / 2e-6, abs=1e-3)


def test_second_derivatives(rng):
    x, w, db = tensors(rng, 3, 20, 40)
    s = signs(db, 40)
    (first,) = torch.autograd.grad(H.score(x, db).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    x64 = x.detach().double().requires_grad_()
    (f64,) = torch.autograd.grad((x64 @ s.T).pow(3).sum(), x64, create_graph=True)
    (s64,) = torch.autograd.grad(f64.pow(2).sum(), x64)
    torch.testing.assert_close(second.double(), s64, rtol=1e-3, atol=1e-1)
    (first,) = torch.autograd.grad(H.weighted_sum(w, db, 40).pow(3).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w)
    w64 = w.detach().double().requires_grad_()
    (f64,) = torch.autograd.grad((w64 @ s).pow(3).sum(), w64, create_graph=True)
    (s64,) = torch.autograd.grad(f64.sum(), w64)
    torch.testing.assert_close(second.double(), s64, rtol=1e-3, atol=1e-1)


def test_gradients_do_not_depend_on_threads(rng, threads):
    x, w, db = tensors(rng, 33, 700, 300)
    results = []
    for n in (1, 2, 3):
        threads(n)
        loss = H.score(x, db).pow(2).sum() + H.weighted_sum(w, db, 300).pow(2).sum()
        results.append(torch.autograd.grad(loss, (x, w)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_no_graph_where_none_is_wanted(rng):
    x, w, db = tensors(rng, 2, 9, 20)
    assert H.score(x, db).requires_grad
    assert H.weighted_sum(w, db, 20).requires_grad
    assert H.binarize(x).requires_grad
    with torch.no_grad():
        for out in (H.score(x, db), H.weighted_sum(w, db, 20), H.binarize(x)):
            assert not out.requires_grad
    for out in (H.score(x.detach(), db), H.pack(x), *H.topk_score(x, db, 2)):
        assert not out.requires_grad


def test_codes_changed_after_the_forward_are_noticed(rng):
    x, _, db = tensors(rng, 2, 9, 20)
    out = H.score(x, db).sum()
    db.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_search_in_a_model_learns(rng):
    """Retrieval with gathered scores: the gradient goes through `score`, the ids come from topk."""
    x, _, db = tensors(rng, 4, 50, 64)
    target = torch.tensor([3, 1, 4, 15])
    optimizer = torch.optim.SGD([x], lr=0.1)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(H.score(x, db), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert H.topk_score(x, db, 1)[1][:, 0].tolist() == target.tolist()


# --- binarize -------------------------------------------------------------------------------------


def slope(x, estimator, t):
    """The derivative that each estimator's documentation promises, in float64."""
    x = x.double()
    if estimator == "ste":
        return (x.abs() <= t).double()
    if estimator == "tanh":
        return (1 - torch.tanh(x / t) ** 2) / t
    p = torch.sigmoid(x / t)
    return 2 * p * (1 - p) / t


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("estimator", ["ste", "tanh", "bernoulli"])
def test_binarize_has_the_gradient_of_its_formula(rng, estimator, temperature, dtype):
    special = torch.tensor([0.0, -0.0, 0.25, -0.25, 1.0, -1.0, 3.0, 50.0, -50.0])
    x = torch.cat([torch.randn(200) * 2, special]).to(dtype).requires_grad_()
    out = H.binarize(x, estimator, temperature)
    assert out.dtype == dtype
    assert set(out.detach().float().unique().tolist()) == {-1.0, 1.0}
    grad = torch.randn(len(x)).to(dtype)
    out.backward(grad)
    want = grad.double() * slope(x.detach(), estimator, temperature)
    rough = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 4e-2}
    torch.testing.assert_close(
        x.grad.double(), want, rtol=rough[dtype], atol=rough[dtype] * float(grad.abs().max())
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["ste", "tanh"])
def test_binarize_is_the_sign(estimator, dtype):
    x = torch.tensor([2.0, 0.0, -0.0, -3.0, math.inf, -math.inf], dtype=dtype)
    assert H.binarize(x, estimator).tolist() == [1, -1, -1, -1, 1, -1]
    assert torch.equal(H.pack(H.binarize(x, estimator)), H.pack(x))


@pytest.mark.parametrize("estimator", ["ste", "tanh", "bernoulli"])
def test_nan_stays_nan(estimator):
    x = torch.tensor([1.0, math.nan], requires_grad=True)
    out = H.binarize(x, estimator)
    assert out.isnan().tolist() == [False, True]
    assert H.binarize(torch.tensor(math.nan), estimator).isnan()


def test_bernoulli_samples_the_sigmoid():
    x = torch.tensor([-2.0, 0.0, 1.0]).repeat(20_000, 1)
    for temperature in (0.5, 2.0):
        out = H.binarize(x, "bernoulli", temperature, torch.Generator().manual_seed(0))
        want = torch.sigmoid(x[0] / temperature)
        torch.testing.assert_close((out > 0).float().mean(0), want, atol=0.02, rtol=0)


def test_bernoulli_is_a_function_of_the_generator():
    x = torch.zeros(50, 50)
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    first = H.binarize(x, "bernoulli", generator=generator)
    second = H.binarize(x, "bernoulli", generator=generator)
    generator.set_state(state)
    assert torch.equal(H.binarize(x, "bernoulli", generator=generator), first)
    assert not torch.equal(first, second)
    # Without one, torch's global generator.
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(H.binarize(x, "bernoulli"))
    assert torch.equal(*draws)
    state = torch.get_rng_state()
    H.binarize(x, "bernoulli", generator=generator)
    assert torch.equal(torch.get_rng_state(), state)


def test_bernoulli_with_and_without_gradient_draws_the_same():
    draws = [
        H.binarize(x, "bernoulli", generator=torch.Generator().manual_seed(1)).detach()
        for x in (torch.zeros(99), torch.zeros(99, requires_grad=True))
    ]
    assert torch.equal(*draws)


# --- Modules --------------------------------------------------------------------------------------


def test_binarize_layer_follows_its_mode():
    layer = pentad.nn.Binarize("bernoulli", temperature=2.0)
    x = torch.zeros(2000)
    assert layer(x).unique().tolist() == [-1.0, 1.0]
    layer.eval()
    assert layer(x).unique().tolist() == [-1.0]
    layer.train()
    layer.temperature = 1e-6
    assert layer(x + 1).unique().tolist() == [1.0]
    assert "bernoulli" in repr(layer)
    assert list(layer.parameters()) == []


@pytest.mark.parametrize("estimator", ["ste", "tanh"])
def test_binarize_layer_has_the_function_s_gradient(estimator):
    x = torch.randn(30, requires_grad=True)
    layer = pentad.nn.Binarize(estimator, 0.7)
    for mode in (True, False):
        layer.train(mode)
        (grad,) = torch.autograd.grad(layer(x).sum(), x)
        want = slope(x.detach(), estimator, 0.7)
        torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-6)


def test_binarize_layer_refuses_an_unknown_estimator():
    with pytest.raises(ValueError, match="estimator is 'relu'"):
        pentad.nn.Binarize("relu")


def memory_formula(x, db, dim, beta):
    s = signs(db, dim)
    return torch.softmax(beta * (x.double() @ s.T), -1) @ s


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("beta", [None, 0.3])
def test_binary_memory_is_its_formula(rng, lead, beta):
    db = torch.from_numpy(codes(rng, 30, 45))
    memory = pentad.nn.BinaryMemory(db, 45, beta=beta)
    x = torch.randn(*lead, 45, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    want = memory_formula(x64, db, 45, 45**-0.5 if beta is None else beta)
    got = memory(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    got.pow(2).sum().backward()
    want.pow(2).sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-3, atol=1e-3)


def test_binary_memory_cleans_up(rng):
    dim = 512
    db = torch.from_numpy(codes(rng, 40, dim))
    memory = pentad.nn.BinaryMemory(db, dim, beta=1.0)
    patterns = H.unpack(db, dim)
    noisy = patterns * torch.where(torch.rand(40, dim) < 0.25, -1.0, 1.0)
    assert torch.equal(memory(noisy).sign(), patterns)


def test_binary_memory_is_a_module(rng):
    db = torch.from_numpy(codes(rng, 10, 20))
    memory = pentad.nn.BinaryMemory(db, 20)
    assert list(memory.parameters()) == []
    other = pentad.nn.BinaryMemory(torch.zeros_like(db), 20)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.codes, db)
    x = torch.randn(3, 20)
    assert torch.equal(other(x), memory(x))
    assert torch.equal(copy.deepcopy(memory)(x), memory(x))
    assert torch.equal(memory.double()(x), other(x))
    assert memory.codes.dtype == torch.uint8
    assert memory.to("meta")(x.to("meta")).shape == (3, 20)
    assert "codes=10, dim=20" in repr(memory)


@pytest.mark.parametrize(
    ("codes", "dim", "error"),
    [
        (torch.zeros(3, 2), 16, TypeError),
        (torch.zeros(3, 2, dtype=torch.uint8), 17, ValueError),
        (torch.zeros(2, dtype=torch.uint8), 16, ValueError),
        (torch.zeros(3, 2, dtype=torch.uint8), 16.0, TypeError),
        (np.zeros((3, 2), np.uint8), 16, TypeError),
    ],
)
def test_binary_memory_refuses(codes, dim, error):
    with pytest.raises(error):
        pentad.nn.BinaryMemory(codes, dim)


def test_modules_compile_and_train(rng):
    torch._dynamo.reset()
    db = torch.from_numpy(codes(rng, 16, 24))
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 24), pentad.nn.Binarize("tanh"), pentad.nn.BinaryMemory(db, 24)
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).pow(2).sum().backward()
    grad = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).pow(2).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, grad)
    assert grad.abs().sum() > 0


def test_the_public_names():
    assert pentad.nn.__all__ == [
        "Attention", "Binarize", "BinaryMemory", "CompressedEmbedding", "GatedDeltaNet", "Mamba",
        "Mamba2", "MultiScaleRetention", "ProductKeyMemory", "SparseAutoencoder", "VectorQuantizer",
    ]  # fmt: skip
    assert set(pentad.__all__) >= {"hamming", "nn", "isa", "SearchResult"}
    assert {"hamming", "nn"} <= set(dir(pentad))
    with pytest.raises(AttributeError, match="no attribute 'attention_'"):
        _ = pentad.attention_
    assert_same(np.array(pentad.SearchResult(1, 2)), np.array([1, 2]))
    assert pentad.SearchResult._fields == ("scores", "ids")
