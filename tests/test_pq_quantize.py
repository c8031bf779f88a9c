# SPDX-License-Identifier: Apache-2.0
"""quantize and usage: values, and gradients against plain PyTorch formulas."""

import subprocess
import sys

import numpy as np
import pytest

import pentad

torch = pytest.importorskip("torch")
F = torch.nn.functional
pq = pentad.pq

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FORMS = ["product", "residual", "grouped"]
ESTIMATORS = ["ste", "rotation", "none"]
COMBINE = {"product": "concat", "residual": "sum", "grouped": "mean"}


def problem(rng, n, M, K, width, form="product", dtype=torch.float32, lead=()):
    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype).requires_grad_()

    dim = M * width if form == "product" else width
    return draw(*(lead or (n,)), dim), draw(M, K, width)


def nearest(x, codebooks, form, metric="l2"):
    """(n, M) codes by the definition, in float64."""
    x, codebooks = x.detach().double(), codebooks.detach().double()
    found = []
    for m, book in enumerate(codebooks):
        width = book.shape[1]
        part = x[:, m * width : (m + 1) * width] if form == "product" else x
        if metric == "l2":
            cost = (part[:, None] - book).square().sum(-1)
        else:
            cost = -(part @ (F.normalize(book, dim=-1) if metric == "cosine" else book).T)
        found.append(cost.argmin(-1))
        if form == "residual":
            x = x - book[found[-1]]
    return torch.stack(found, -1)


def words(codes, codebooks, form):
    """(n, d): the value and its gradient to the codebooks in plain PyTorch."""
    each = [F.embedding(codes[:, m], book) for m, book in enumerate(codebooks)]
    if form == "product":
        return torch.cat(each, -1)
    return sum(each) if form == "residual" else sum(each) / len(each)


def turn(x, q):
    """The matrix that the rotation trick multiplies x by: |q|/|x| (I - 2 r r' + 2 q^ x^')."""
    a, b = x / x.norm(), q / q.norm()
    r = (a + b) / (a + b).norm()
    eye = torch.eye(len(x), dtype=x.dtype)
    return q.norm() / x.norm() * (eye - 2 * torch.outer(r, r) + 2 * torch.outer(b, a))


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize(("n", "M", "K", "width"), [(33, 3, 17, 5), (7, 1, 300, 1), (50, 5, 2, 3)])
def test_values_are_codewords_of_the_nearest(rng, n, M, K, width, metric, form):
    x, codebooks = problem(rng, n, M, K, width, form)
    for estimator in ESTIMATORS:
        out = pq.quantize(x, codebooks, metric=metric, form=form, estimator=estimator)
        assert isinstance(out, pq.Quantized)
        codes = nearest(x, codebooks, form, metric)
        assert out.codes.dtype == (torch.uint8 if K <= 256 else torch.int32)
        assert torch.equal(out.codes.long(), codes)
        exact = pq.lookup(pq.assign(x, codebooks, metric=metric, form=form), codebooks,
                          combine=COMBINE[form])  # fmt: skip
        assert torch.equal(out.quantized, exact)
        torch.testing.assert_close(out.quantized, words(codes, codebooks, form))
        torch.testing.assert_close(out.commitment, F.mse_loss(x, exact))
        with torch.no_grad():
            plain = pq.quantize(x, codebooks, metric=metric, form=form, estimator=estimator)
        assert torch.equal(plain.quantized, exact)
        assert not plain.quantized.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(rng, dtype):
    x, codebooks = problem(rng, 40, 4, 20, 3, dtype=dtype)
    out = pq.quantize(x, codebooks)
    assert out.quantized.dtype == dtype
    assert out.commitment.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = pq.quantize(x.detach().double(), codebooks.detach().double())
    assert torch.equal(out.codes, wide.codes)
    torch.testing.assert_close(out.commitment.double(), wide.commitment, rtol=1e-5, atol=0)
    (out.quantized.float().square().sum() + out.commitment).backward()
    assert x.grad.dtype == codebooks.grad.dtype == dtype


def test_mixed_dtypes_and_strides(rng):
    x, codebooks = problem(rng, 30, 3, 9, 4)
    half = x.detach().half().requires_grad_()
    out = pq.quantize(half, codebooks)
    assert out.quantized.dtype == torch.float32
    out.quantized.sum().backward()
    assert half.grad.dtype == torch.float16
    turned = x.detach().T.contiguous().T
    split = torch.stack([codebooks.detach()] * 2, -1)[..., 0]
    assert not turned.is_contiguous()
    assert not split.is_contiguous()
    for a, b in zip(pq.quantize(turned, split), pq.quantize(x, codebooks), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_numpy(rng, form):
    x, codebooks = problem(rng, 21, 3, 8, 4, form)
    want = pq.quantize(x, codebooks, form=form)
    got = pq.quantize(x.detach().numpy(), codebooks.detach().numpy(), form=form)
    assert isinstance(got.quantized, np.ndarray)
    np.testing.assert_array_equal(got.quantized, want.quantized.detach().numpy())
    np.testing.assert_array_equal(got.codes, want.codes.numpy())
    assert got.commitment.dtype == np.float32
    np.testing.assert_allclose(got.commitment, want.commitment.item(), rtol=1e-6)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3), (1, 2, 3)])
def test_leading_shapes(rng, lead):
    codebooks = torch.randn(2, 5, 3, requires_grad=True)
    x = torch.randn(*lead, 6, requires_grad=True)
    out = pq.quantize(x, codebooks)
    assert out.quantized.shape == (*lead, 6)
    assert out.codes.shape == (*lead, 2)
    assert out.commitment.shape == ()
    assert out.commitment.isfinite()
    (out.quantized.sum() + out.commitment).backward()
    assert x.grad.shape == x.shape
    assert codebooks.grad.shape == codebooks.shape


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_through_and_scatter_add(rng, form, dtype):
    x, codebooks = problem(rng, 200, 3, 7, 4, form, dtype)
    weight = torch.randn_like(x)
    value = words(nearest(x, codebooks, form), codebooks, form)
    straight = x + value - x.detach()  # values of both, gradients of both
    commitment = F.mse_loss(x, value.detach())
    want = torch.autograd.grad((straight * weight).sum() + 3 * commitment, (x, codebooks))

    out = pq.quantize(x, codebooks, form=form)
    got = torch.autograd.grad((out.quantized * weight).sum() + 3 * out.commitment, (x, codebooks))
    torch.testing.assert_close(got, want)

    out = pq.quantize(x, codebooks, form=form, estimator="none")
    to_x, to_codebooks = torch.autograd.grad(
        (out.quantized * weight).sum() + 0 * x.sum(), (x, codebooks)
    )
    assert torch.equal(to_x, torch.zeros_like(x))
    torch.testing.assert_close(to_codebooks, want[1])

    out = pq.quantize(x, codebooks.detach(), form=form)  # straight through alone
    (to_x,) = torch.autograd.grad((out.quantized * weight).sum(), x)
    assert torch.equal(to_x, weight)


@pytest.mark.parametrize("form", FORMS)
def test_the_rotation_trick_is_its_formula(rng, form):
    x, codebooks = problem(rng, 40, 3, 6, 5, form, torch.float64)
    weight = torch.randn_like(x)
    out = pq.quantize(x, codebooks, form=form, estimator="rotation")
    got, none = torch.autograd.grad(
        (out.quantized * weight).sum(), (x, codebooks), allow_unused=True
    )
    assert none is None
    parts = (t.detach().reshape(-1, 5) for t in (x, out.quantized, weight))
    for a, q, g, found in zip(*parts, got.reshape(-1, 5), strict=True):
        matrix = turn(a, q)
        torch.testing.assert_close(matrix @ a, q)  # it does take x to its codeword
        torch.testing.assert_close(found, matrix.T @ g)


def test_the_rotation_trick_where_there_is_no_rotation():
    codebooks = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    weight = torch.tensor([3.0, 5.0])
    cases = [  # x, codewords, gradient
        ([0.0, 0.0], [[2.0, 0.0]], [3.0, 5.0]),  # no direction: straight
        ([0.5, 0.5], [[0.0, 0.0]], [0.0, 0.0]),  # scaled to nothing
        ([-1.0, 0.0], [[2.0, 0.0]], [-6.0, 10.0]),  # opposite: reflected, and twice as long
    ]
    for x, codebook, want in cases:
        x = torch.tensor([x], requires_grad=True)
        codebooks = torch.tensor([codebook])
        (pq.quantize(x, codebooks, estimator="rotation").quantized * weight).sum().backward()
        torch.testing.assert_close(x.grad[0], torch.tensor(want))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_halves_add_up_in_float32(rng, dtype):
    """3000 rows of one code: a sum in float16 would stick at 2048, in bfloat16 at 256."""
    x = torch.ones(3000, 2, dtype=dtype)
    codebooks = torch.ones(1, 2, 2, dtype=dtype, requires_grad=True)
    pq.quantize(x, codebooks).quantized.sum().backward()
    want = torch.tensor(3000.0).to(dtype).item()
    assert codebooks.grad[0].tolist() == [[want] * 2, [0.0] * 2]


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(rng, form):
    x, codebooks = problem(rng, 6, 2, 5, 3, form, torch.float64)

    def value(codebooks):  # codes do not change within the step of 1e-6
        return pq.quantize(x.detach(), codebooks, form=form, estimator="none").quantized

    def commitment(x):
        return pq.quantize(x, codebooks.detach(), form=form).commitment

    assert torch.autograd.gradcheck(value, codebooks)
    assert torch.autograd.gradcheck(commitment, x)


def test_the_losses_of_vq_vae(rng):
    """Equation 3 of van den Oord et al. with `lookup`, as the docstring says."""
    x, codebooks = problem(rng, 64, 2, 6, 4)
    weight = torch.randn_like(x)
    out = pq.quantize(x, codebooks.detach())
    found = pq.lookup(out.codes, codebooks)
    loss = (out.quantized * weight).sum() + ((found - x.detach()) ** 2).mean()
    got = torch.autograd.grad(loss + 0.25 * out.commitment, (x, codebooks))

    value = words(nearest(x, codebooks, "product"), codebooks, "product")
    plain = ((x + (value - x).detach()) * weight).sum()
    plain = plain + F.mse_loss(value, x.detach()) + 0.25 * F.mse_loss(x, value.detach())
    torch.testing.assert_close(got, torch.autograd.grad(plain, (x, codebooks)))


def test_unitok_quantizes_on_the_sphere(rng):
    """Chunks and codewords at unit length, largest inner product, straight through."""
    x, codebooks = problem(rng, 30, 4, 9, 3)
    weight = torch.randn_like(x)
    chunks = F.normalize(x.unflatten(-1, (4, 3)), dim=-1)
    sphere = F.normalize(codebooks, dim=-1)
    codes = torch.einsum("nmd,mkd->nmk", chunks, sphere).argmax(-1)
    value = torch.stack([sphere[m, codes[:, m]] for m in range(4)], 1)
    straight = (chunks + (value - chunks).detach()).flatten(1)
    (want,) = torch.autograd.grad((straight * weight).sum(), x, retain_graph=True)

    out = pq.quantize(chunks.flatten(1), sphere.detach(), metric="cosine")
    assert torch.equal(out.codes.long(), codes)
    torch.testing.assert_close(out.quantized, straight)
    (got,) = torch.autograd.grad((out.quantized * weight).sum(), x)
    torch.testing.assert_close(got, want)


def test_a_second_derivative_is_refused(rng):
    x, codebooks = problem(rng, 10, 2, 4, 3)
    for estimator in ("ste", "rotation"):
        out = pq.quantize(x, codebooks, estimator=estimator)
        (first,) = torch.autograd.grad(out.quantized.pow(2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"\[pq.quantize\] the gradient cannot"):
            first.sum().backward()


def test_gradients_do_not_depend_on_threads(rng, threads):
    x, codebooks = problem(rng, 3000, 4, 30, 8)
    results = []
    for n in (1, 2, 3):
        threads(n)
        out = pq.quantize(x, codebooks)
        loss = out.quantized.pow(2).sum() + out.commitment
        results.append((*out, *torch.autograd.grad(loss, (x, codebooks))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# --- Ways to run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiled(rng, estimator):
    torch._dynamo.reset()

    def run(x, codebooks):
        out = pq.quantize(x, codebooks, estimator=estimator)
        return out.quantized.pow(2).sum() + out.commitment, out.codes

    x, codebooks = problem(rng, 20, 3, 8, 4)
    compiled = torch.compile(run, fullgraph=True)
    for _ in range(2):
        want, got = run(x, codebooks), compiled(x, codebooks)
        assert torch.equal(want[1], got[1])
        torch.testing.assert_close(want[0], got[0])
        grads = [
            torch.autograd.grad(out[0], (x, codebooks), allow_unused=True) for out in (want, got)
        ]
        assert (grads[0][1] is None) == (estimator == "rotation")
        for a, b in zip(*grads, strict=True):
            assert a is None or torch.allclose(a, b, atol=1e-5)


def test_autocast_runs_in_float32(rng):
    x, codebooks = problem(rng, 50, 3, 16, 4)
    want = pq.quantize(x, codebooks)
    with torch.autocast("cpu", torch.bfloat16):
        got = pq.quantize(x, codebooks)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_the_operator_passes_opcheck():
    codes = torch.randint(0, 7, (20, 3), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.pentad.pq_usage.default, (codes, 7))


MEMORY = """
import resource, sys
import torch, pentad
torch.set_num_threads(1)
n, M, K, width = 40000, 2, 1024, 8
x = torch.randn(n, M * width, requires_grad=True)
codebooks = torch.randn(M, K, width, requires_grad=True)
def step(rows):
    out = pentad.pq.quantize(x[:rows], codebooks, estimator=sys.argv[1], form=sys.argv[2])
    (out.quantized.sum() + out.commitment).backward()
if sys.argv[2] != "product":
    x = torch.randn(n, width, requires_grad=True)
step(100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize(("estimator", "form"), [("ste", "product"), ("rotation", "residual")])
def test_memory_grows_with_vectors_not_with_codewords(estimator, form):
    command = [sys.executable, "-c", MEMORY, estimator, form]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    vectors = 40000 * 16 * 4
    distances = 40000 * 1024 * 4  # of one codebook
    assert taken < 25 * vectors < distances / 2  # outputs, gradients and their temporaries


# --- Errors ---------------------------------------------------------------------------------------


def test_errors():
    x, codebooks = torch.zeros(4, 6), torch.zeros(2, 5, 3)
    with pytest.raises(
        ValueError, match=r"\[pq.quantize\] x has 7 columns, which 2 codebooks do not divide"
    ):
        pq.quantize(torch.zeros(4, 7), codebooks)
    with pytest.raises(ValueError, match="x has 6 columns, but the codebooks have 3"):
        pq.quantize(x, codebooks, form="residual")
    with pytest.raises(ValueError, match=r"\(5, 3\), expected \(M, K, dsub\)"):
        pq.quantize(x, codebooks[0])
    with pytest.raises(ValueError, match="which is empty"):
        pq.quantize(x, codebooks[:, :0])
    with pytest.raises(ValueError, match="x has no dimension"):
        pq.quantize(torch.tensor(1.0), codebooks)
    for name in ("metric", "form", "estimator"):
        with pytest.raises(ValueError, match=rf"\[pq.quantize\] {name} is 'L2', expected one of"):
            pq.quantize(x, codebooks, **{name: "L2"})
    with pytest.raises(TypeError, match=r"x has dtype int64, expected float32"):
        pq.quantize(x.long(), codebooks)
    with pytest.raises(TypeError, match=r"codebooks has dtype int64"):
        pq.quantize(x, codebooks.long())
    with pytest.raises(TypeError, match="mix numpy"):
        pq.quantize(x, codebooks.numpy())
    for bad in (float("nan"), float("inf")):
        for which in (x, codebooks):
            spoiled = which.clone()
            spoiled[1, 2] = bad
            with pytest.raises(ValueError, match=r"NaN|finite"):
                pq.quantize(*(spoiled if which is t else t for t in (x, codebooks)))


# --- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "int64", "uint64"])
@pytest.mark.parametrize("shape", [(50, 3), (3,), (2, 4, 5), (0, 3), (4, 0)])
def test_usage_counts(rng, dtype, shape):
    codes = rng.integers(0, 7, shape).astype(dtype)
    want = np.zeros((shape[-1], 7), np.int64)
    for at in np.ndindex(shape):
        want[at[-1], codes[at]] += 1
    got = pq.usage(codes, 7)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, want)
    torch_got = pq.usage(torch.from_numpy(codes), 7)
    assert torch_got.dtype == torch.int64
    np.testing.assert_array_equal(torch_got.numpy(), want)


def test_usage_of_wide_codebooks_and_compiled(rng):
    codes = torch.from_numpy(rng.integers(0, 65536, (1000, 2)).astype(np.int32))
    counts = torch.compile(lambda c: pq.usage(c, 65536), fullgraph=True)(codes)
    assert counts.shape == (2, 65536)
    assert torch.equal(counts[1], torch.bincount(codes[:, 1], minlength=65536))


def test_usage_errors():
    for codes in (np.array([[0, 4]]), np.array([[-1, 0]])):
        for kind in (codes, torch.from_numpy(codes)):
            with pytest.raises(ValueError, match=r"codes span -?\d to \d, expected 0 to 3"):
                pq.usage(kind, 4)
    with pytest.raises(TypeError, match="float64"):
        pq.usage(np.zeros((2, 2)), 4)
    with pytest.raises(ValueError, match="K is 0"):
        pq.usage(np.array([[0]]), 0)
    with pytest.raises(ValueError, match="no dimension"):
        pq.usage(np.array(1), 4)
