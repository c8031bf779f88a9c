# SPDX-License-Identifier: Apache-2.0
"""Long convolutions, and the kernels of linear state space models."""

import math
import re

import pytest

import pentad

torch = pytest.importorskip("torch")

from scan_cases import error, gaps, reversed_dims, transposed  # noqa: E402

from pentad.scan import kernels, long_conv  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The problems here are smaller than the waking of a thread."""
    threads(1)
    torch.manual_seed(0)


def direct(u, kernel, D=None, causal=True):
    """The sum itself, in float64."""
    u, kernel = u.double(), kernel.double()
    center = 0 if causal else kernel.shape[1] // 2
    out = torch.zeros_like(u)
    for k in range(kernel.shape[1]):
        for t in range(u.shape[2]):
            if 0 <= t - (k - center) < u.shape[2]:
                out[:, :, t] += kernel[:, k] * u[:, :, t - (k - center)]
    return out if D is None else out + D.double()[:, None] * u


def drawn(dtype=torch.float32, b=2, d=3, length=7, taps=7):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(b, d, length).to(dtype), torch.randn(d, taps, dtype=wide), torch.randn(d)


# A transform's error is a few roundings of the largest value per doubling of the length; a result
# is rounded once more to its dtype.
def assert_close(got, exact, roundings=8):
    eps = torch.finfo(got.dtype).eps
    wide = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    size = float(exact.abs().max()) if exact.numel() else 0.0
    assert error(got, exact) <= size * (eps + roundings * wide)


# --- The convolution ------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (1, 4), (7, 7), (9, 2), (5, 20), (31, 30)])
def test_values(dtype, length, taps, causal):
    u, kernel, D = drawn(dtype, length=length, taps=taps)
    D = D.to(kernel.dtype)
    got = long_conv(u, kernel, D=D, causal=causal)
    assert (got.dtype, got.shape) == (dtype, u.shape)
    assert_close(got, direct(u, kernel, D, causal))
    assert_close(long_conv(u, kernel, causal=causal), direct(u, kernel, causal=causal))


def test_a_kernel_in_the_dtype_of_u():
    u, kernel, _ = drawn(torch.bfloat16)
    kernel = kernel.bfloat16()
    assert_close(long_conv(u, kernel), direct(u, kernel))


def test_nothing_wraps_around():
    u, kernel = torch.zeros(1, 1, 40), torch.zeros(1, 1000)
    u[..., -1] = 1
    kernel[..., 1:] = 1
    assert long_conv(u, kernel).abs().max() < 1e-6
    u = u.flip(-1)
    torch.testing.assert_close(long_conv(u, kernel)[0, 0, 1:], torch.ones(39))


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty_sizes(sizes):
    b, d, length = sizes
    u, kernel, D = drawn(b=b, d=d, length=length)
    assert long_conv(u, kernel, D=D).shape == sizes


@pytest.mark.parametrize("layout", [transposed, reversed_dims, gaps])
def test_strides(layout):
    u, kernel, D = drawn()
    want = long_conv(u, kernel, D=D)
    torch.testing.assert_close(long_conv(layout(u), layout(kernel), D=layout(D)), want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "taps"), [(5, 3), (4, 9)])
def test_gradients(causal, length, taps):
    u, kernel, D = drawn(torch.float64, length=length, taps=taps)
    given = [t.double().requires_grad_() for t in (u, kernel, D)]

    def call(u, kernel, D):
        return long_conv(u, kernel, D=D, causal=causal)

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_dtypes_of_the_inputs(dtype):
    given = [t.requires_grad_() for t in drawn(dtype)]
    u, kernel, D = given
    if dtype == torch.float64:
        D = D.double()
    grads = torch.autograd.grad(long_conv(u, kernel, D=D).sum(), given)
    assert [g.dtype for g in grads] == [t.dtype for t in given]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()
    given = [t.requires_grad_() for t in drawn()]

    def call(u, kernel, D):
        return long_conv(u, kernel, D=D, causal=False)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for results in ((call(*given), compiled(*given)),):
        torch.testing.assert_close(*results)
        torch.testing.assert_close(
            *(torch.autograd.grad(result.sin().sum(), given) for result in results)
        )


def test_autocast_takes_the_wider_dtype():
    u, kernel, _ = drawn(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = long_conv(u, kernel)
    assert got.dtype == torch.float32
    assert_close(got, direct(u, kernel))


def test_both_have_gradients_where_there_are_no_steps():
    u, kernel = torch.ones(2, 3, 0, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    grads = torch.autograd.grad(long_conv(u, kernel).sum(), (u, kernel))
    assert_close(grads[1], torch.zeros(3, 4))


def test_other_devices():
    """Torch's functions run on any: there is no kernel whose absence would be an error."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 0)

    moved = (torch.ones(size).as_subclass(Elsewhere) for size in ((2, 3, 4), (3, 5)))
    assert_close(long_conv(*moved).as_subclass(torch.Tensor), torch.arange(1.0, 5).expand(2, 3, 4))


U, K = torch.ones(2, 3, 4), torch.ones(3, 4)
REFUSED = [
    ({"u": [1.0]}, TypeError, "u is list, expected a torch tensor"),
    ({"u": U.int()}, TypeError, "u has dtype int32"),
    ({"kernel": K.double()}, TypeError, "kernel has dtype float64 but u has float32"),
    ({"D": torch.ones(3).double()}, TypeError, "D has dtype float64, expected it only where u"),
    ({"u": U[0]}, ValueError, "u has shape (3, 4), expected (B, D, L)"),
    ({"kernel": K[:2]}, ValueError, "kernel has shape (2, 4), expected (3, K), K at least 1"),
    ({"kernel": K[:, :0]}, ValueError, "kernel has shape (3, 0), expected (3, K)"),
    ({"D": torch.ones(4)}, ValueError, "D has shape (4,), expected (3,)"),
    ({"kernel": K.to("meta")}, pentad.DeviceError, "kernel is on meta but u is on cpu"),
]


@pytest.mark.parametrize(("changed", "kind", "text"), REFUSED)
def test_errors(changed, kind, text):
    with pytest.raises(kind, match=re.escape(f"[long_conv] {text}")):
        long_conv(**{"u": U, "kernel": K} | changed)


# --- Diagonal kernels -----------------------------------------------------------------------------


def complex_drawn(*shape, dtype=torch.complex128):
    return torch.randn(shape, dtype=dtype)


def stable(d, n, dtype=torch.complex128):
    return torch.complex(-torch.rand(d, n).double(), 4 * torch.randn(d, n).double()).to(dtype)


def run(A, B, C, length):
    """The response to an impulse."""
    state, ys = B.new_zeros(1, *B.shape), []
    u = torch.ones(1, B.shape[0], dtype=B.real.dtype if B.is_complex() else B.dtype)
    for _ in range(length):
        y = kernels.step(state, u, A, B, C)
        u = torch.zeros_like(u)
        ys.append(y[0])
    return torch.stack(ys, -1)


@pytest.mark.parametrize("length", [1, 2, 17, 100])
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("real", [False, True])
def test_s4d_is_its_recurrence(length, rule, real):
    A, B, C, dt = stable(3, 4), complex_drawn(3, 4), complex_drawn(3, 4), torch.rand(3).double()
    if real:
        A, B, C = A.real, B.real, C.real
    kernel = kernels.s4d(A, C, dt, length, B=B, discretization=rule)
    Abar, Bbar = kernels.s4d_discretize(A, dt, B=B, discretization=rule)
    torch.testing.assert_close(kernel, run(Abar, Bbar, C, length))


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_discretisation(rule):
    """Of zoh: the exact solution of h' = A h + B u under constant u; of both: A = 0."""
    A, dt = stable(2, 3), torch.tensor([0.3, 1e-9], dtype=torch.float64)
    A = torch.cat([A, torch.zeros(2, 1)], 1)
    Abar, Bbar = kernels.s4d_discretize(A, dt, discretization=rule)
    torch.testing.assert_close(Bbar[:, -1], dt.to(Bbar.dtype), rtol=1e-14, atol=0)
    torch.testing.assert_close(Bbar[1], dt[1].to(Bbar.dtype).expand(4), rtol=1e-8, atol=0)
    assert (Abar[:, -1] == 1).all()
    if rule == "zoh":
        z = dt[0] * A[0, :-1]
        torch.testing.assert_close(Abar[0, :-1], z.exp())
        torch.testing.assert_close(Bbar[0, :-1], (z.exp() - 1) / A[0, :-1])
    else:
        half = dt[:, None] / 2 * A
        torch.testing.assert_close(Abar * (1 - half), 1 + half)
        torch.testing.assert_close(Bbar * (1 - half), dt[:, None].to(A.dtype).expand(A.shape))


def test_s4d_convolves_as_linear_recurrence_runs():
    A, C, dt = kernels.s4d_lin(8).to(torch.complex64), complex_drawn(3, 4), torch.rand(3)
    C = C.to(torch.complex64)
    u = torch.randn(2, 3, 200)
    out = long_conv(u, kernels.s4d(A, C, dt, 200))
    Abar, Bbar = kernels.s4d_discretize(A, dt)
    x = Bbar[None, :, :, None] * u[:, :, None]
    h = pentad.scan.linear_recurrence(Abar[None, :, :, None], x)
    torch.testing.assert_close(out, 2 * (C[..., None] * h).sum(2).real, rtol=1e-4, atol=1e-4)


def test_long_kernels_keep_their_phase():
    """At step 16000 a float32 product of A and the step is off by radians / 1000."""
    A = torch.complex(torch.full((1, 1), -1e-4), torch.full((1, 1), 100.0))
    dt, C = torch.tensor([0.1]), torch.ones(1, 1, dtype=torch.complex64)
    got = kernels.s4d(A, C, dt, 16000)
    exact = kernels.s4d(A.to(torch.complex128), C.to(torch.complex128), dt.double(), 16000)
    assert error(got, exact) <= 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())


@pytest.mark.parametrize("variant", ["softmax", "exp"])
@pytest.mark.parametrize("length", [1, 6, 50])
def test_dss_is_its_recurrence(variant, length):
    Lambda, W, dt = stable(3, 4), complex_drawn(3, 4), torch.rand(3).double()
    if variant == "softmax":  # which takes those that grow
        Lambda = torch.where(torch.rand(3, 4) < 0.5, Lambda, -Lambda)
    kernel = kernels.dss(Lambda, W, dt, length, variant=variant)
    a, c = kernels.dss_discretize(Lambda, W, dt, length, variant=variant)
    h = run(a, torch.ones_like(c), c, length) / 2  # the real part once
    torch.testing.assert_close(kernel, h)


def test_dss_as_the_paper_writes_it():
    Lambda, W, dt = stable(3, 4), complex_drawn(3, 4), torch.rand(3).double()
    powers = torch.exp((dt[:, None] * Lambda)[..., None] * torch.arange(20))
    of_exp = W / Lambda * ((dt[:, None] * Lambda).exp() - 1)
    want = (of_exp[..., None] * powers).sum(1).real
    torch.testing.assert_close(kernels.dss(Lambda, W, dt, 20, variant="exp"), want)
    rows = powers / powers.sum(-1, keepdim=True)
    want = ((W / Lambda)[..., None] * rows).sum(1).real
    torch.testing.assert_close(kernels.dss(Lambda, W, dt, 20, eps=0.0), want)


def test_dss_of_states_that_grow_stays_finite():
    Lambda = torch.tensor([5 + 1j, -5 + 1j], dtype=torch.complex64)
    W = torch.ones(1, 2, dtype=torch.complex64, requires_grad=True)
    kernel = kernels.dss(Lambda.requires_grad_(), W, torch.ones(1), 1000)
    assert kernel.isfinite().all()
    assert kernel[0, 0].abs() > 0.1
    assert kernel[0, -1].abs() > 0.1
    assert all(g.isfinite().all() for g in torch.autograd.grad(kernel.sum(), [Lambda, W]))


# --- S4 -------------------------------------------------------------------------------------------


def s4_problem(d=2, pairs=3, own_q=False):
    Lambda, P, B, _ = kernels.legs_nplr(2 * pairs)
    Q = P + 0.1 * complex_drawn(pairs) if own_q else None
    return Lambda, P, B, complex_drawn(d, pairs), 0.05 + torch.rand(d).double() / 5, Q


def dense_s4(Lambda, P, B, C, dt, length, Q=None):
    """C A^k B over whole conjugate pairs, from the definition."""
    Q = P if Q is None else Q

    def whole(x):
        return torch.cat([x, x.conj()])

    A = whole(Lambda).diag() - torch.outer(whole(P), whole(Q).conj())
    rows = []
    one = torch.eye(len(A), dtype=A.dtype)
    for c, step in zip(C, dt, strict=True):
        left = torch.linalg.inv(one - step / 2 * A)
        Abar, h = left @ (one + step / 2 * A), left @ (step * whole(B))
        row = []
        for _ in range(length):
            row.append((whole(c) @ h).real)
            h = Abar @ h
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 33])
@pytest.mark.parametrize("own_q", [False, True])
def test_s4_is_the_dense_state_space_model(length, own_q):
    *system, Q = s4_problem(own_q=own_q)
    want = dense_s4(*system, length, Q)
    torch.testing.assert_close(kernels.s4(*system, length, Q=Q), want)
    A, B, C = kernels.s4_discretize(*system, Q=Q)
    torch.testing.assert_close(run(A, B, C, length), want)


def test_s4_of_a_truncated_row():
    Lambda, P, B, C, dt, _ = s4_problem()
    A, _, row = kernels.s4_discretize(Lambda, P, B, C, dt)
    row = row - (row[:, None] @ torch.linalg.matrix_power(A, 24))[:, 0]
    cut = torch.complex(row[:, :3], -row[:, 3:]) / 2
    torch.testing.assert_close(
        kernels.s4(Lambda, P, B, cut, dt, 24, truncated=True), kernels.s4(Lambda, P, B, C, dt, 24)
    )


def test_s4_in_float32():
    Lambda, P, B, C, dt, _ = s4_problem(pairs=8)
    exact = kernels.s4(Lambda, P, B, C, dt, 300)
    small = [t.to(torch.complex64) for t in (Lambda, P, B, C)]
    got = kernels.s4(*small, dt.float(), 300)
    assert got.dtype == torch.float32
    # The inputs' own roundings move the kernel, by their size times the time that it lasts.
    assert error(got, exact) <= 1e-4 * float(exact.abs().max())


def test_s4_in_pieces(monkeypatch):
    system = s4_problem()[:-1]
    want = kernels.s4(*system, 40)
    monkeypatch.setattr(kernels, "_NODES", 20)
    torch.testing.assert_close(kernels.s4(*system, 40), want, rtol=1e-14, atol=1e-14)


def test_hippo():
    """nplr is HiPPO-LegS: over whole pairs the unitary V brings back A and B."""
    A, B = kernels.hippo_legs(6)
    assert A[3, 1] == pytest.approx(-math.sqrt(7 * 3))
    assert (A[2, 2], A[1, 3], B[2]) == (-3, 0, math.sqrt(5))
    Lambda, P, B_half, V = kernels.legs_nplr(6)
    back = V @ (Lambda.diag() @ V.mH - torch.outer(P, P.conj()) @ V.mH)
    # Twice the real part of each pair, less the products across halves.
    cross = torch.outer(V @ P, (V.conj() @ P.conj()).conj())
    torch.testing.assert_close((2 * back - 2 * cross).real, A)
    torch.testing.assert_close(2 * (V @ B_half).real, B)
    torch.testing.assert_close(kernels.s4d_legs(6), Lambda)
    assert (Lambda.imag > 0).all()


def test_initial_diagonals():
    n = torch.arange(3)
    torch.testing.assert_close(kernels.s4d_lin(6).imag, math.pi * n.double())
    torch.testing.assert_close(
        kernels.s4d_inv(6).imag, 6 / math.pi * (6 / (2 * n + 1.0) - 1).double()
    )
    assert (kernels.s4d_lin(6).real == -0.5).all()
    assert (kernels.s4d_inv(6).real == -0.5).all()


# --- All kernels ----------------------------------------------------------------------------------


def made(name, dtype=torch.complex128):
    """(function, tensors) of a kernel of 9 steps."""
    A, B, C = (
        stable(2, 3, dtype),
        complex_drawn(2, 3, dtype=dtype),
        complex_drawn(2, 3, dtype=dtype),
    )
    dt = torch.rand(2, dtype=dtype.to_real())
    if name in ("zoh", "bilinear"):
        return lambda A, B, C, dt: kernels.s4d(A, C, dt, 9, B=B, discretization=name), (A, B, C, dt)
    if name == "s4":
        return lambda *given: kernels.s4(*given, 9), (A, B / 4, B, C, dt)
    return lambda A, C, dt: kernels.dss(A, C, dt, 9, variant=name), (A, C, dt)


each = pytest.mark.parametrize("name", ["zoh", "bilinear", "softmax", "exp", "s4"])


@each
def test_kernels_gradcheck(name):
    function, given = made(name)
    assert torch.autograd.gradcheck(function, [t.detach().requires_grad_() for t in given])


@each
def test_kernels_compile_without_a_break(name):
    torch._dynamo.reset()
    function, given = made(name)
    given = [t.detach().requires_grad_() for t in given]
    results = function(*given), torch.compile(function, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(r.sin().sum(), given) for r in results))


@each
def test_kernels_in_single_precision(name):
    function, given = made(name, torch.complex64)
    kernel = function(*(t.requires_grad_() for t in given))
    assert kernel.dtype == torch.float32
    grads = torch.autograd.grad(kernel.sum(), given)
    assert [g.dtype for g in grads] == [t.dtype for t in given]
    exact = function(*(t.detach().to(torch.promote_types(t.dtype, torch.float64)) for t in given))
    torch.testing.assert_close(kernel.double(), exact, rtol=1e-4, atol=1e-4)


@each
def test_autocast_leaves_kernels_in_single_precision(name):
    function, given = made(name, torch.complex64)
    with torch.autocast("cpu", torch.bfloat16):
        got = function(*given)
    torch.testing.assert_close(got, function(*given), rtol=0, atol=0)


@each
def test_kernels_on_other_devices(name):
    function, given = made(name, torch.complex64)
    got = function(*(t.to("meta") for t in given))
    want = function(*given)
    assert (got.device.type, got.dtype, got.shape) == ("meta", want.dtype, want.shape)


@pytest.mark.parametrize("dense", [False, True])
def test_steps_change_the_state_in_place_and_have_gradients(dense):
    A, B, C = torch.randn(2, 3, 3).double(), torch.randn(2, 3).double(), torch.randn(2, 3).double()
    A = A if dense else A[..., 0]
    inputs = torch.randn(4, 1, 2).double()
    leaves = [t.requires_grad_() for t in (A, B, C, inputs)]

    def stepped(A, B, C, inputs):
        state = torch.zeros(1, 2, 3, dtype=torch.float64)
        ys = [kernels.step(state, u, A, B, C) for u in inputs]
        return torch.stack(ys), state

    ys, state = stepped(*leaves)
    h, want = torch.zeros(1, 2, 3, dtype=torch.float64), []
    for u in inputs:
        h = (torch.einsum("dnm,bdm->bdn", A, h) if dense else A * h) + B * u[..., None]
        want.append((C * h).sum(-1))
    torch.testing.assert_close((ys, state), (torch.stack(want), h))
    assert torch.autograd.gradcheck(stepped, leaves)


@each
def test_kernels_of_no_length(name):
    A, C, dt = stable(2, 3), complex_drawn(2, 3), torch.rand(2).double()
    if name == "s4":
        got = kernels.s4(A, C, C, C, dt, 0)
    elif name in ("softmax", "exp"):
        got = kernels.dss(A, C, dt, 0, variant=name)
    else:
        got = kernels.s4d(A, C, dt, 0, discretization=name)
    assert got.shape == (2, 0)


A, C, DT = torch.ones(2, 3) + 0j, torch.ones(2, 3) + 0j, torch.ones(2)
REFUSED_KERNELS = [
    (kernels.s4d, (A, C.real, DT, 4), TypeError, "[s4d] C has dtype float32, expected complex64"),
    (kernels.s4d, (A, C, DT[:1], 4), ValueError, "[s4d] dt has shape (1,), expected (2,)"),
    (kernels.s4d, (A, C[0], DT, 4), ValueError, "[s4d] C has shape (3,), expected (D, N)"),
    (kernels.s4d, (A[:, :2], C, DT, 4), ValueError, "[s4d] A has shape (2, 2), expected (3,) or"),
    (kernels.s4d, (A, C, DT, -1), ValueError, "[s4d] length is -1, expected 0 or more"),
    (kernels.dss, (A.real, C, DT, 4), TypeError, "[dss] Lambda has dtype float32"),
    (kernels.s4, (A, A, A, C, DT.int(), 4), TypeError, "[s4] dt has dtype int32"),
    (kernels.s4, (A, A[:1], A, C, DT, 4), ValueError, "[s4] P has shape (1, 3)"),
    (kernels.step, (A, DT, A, A, C), ValueError, "[step] state has shape (2, 3), expected (B,"),
    (
        kernels.step, (DT.expand(1, 2, 2), DT[None], A[:, :2], A[:, :2], C[:, :2]), TypeError,
        "[step] state has dtype float32, expected a complex one",
    ),
    (kernels.s4d, (A, C, DT, 4.0), TypeError, "[s4d] length is float, expected an int"),
    (kernels.s4d_inv, (4.0,), TypeError, "[s4d_inv] states is float, expected an int"),
    (kernels.s4d_lin, (3,), ValueError, "[s4d_lin] states is 3, expected an even number"),
    (kernels.hippo_legs, (0,), ValueError, "[hippo_legs] states is 0, expected 1 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "given", "kind", "text"), REFUSED_KERNELS)
def test_kernels_refuse(function, given, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        function(*given)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"\[s4d\] discretization is 'euler'"):
        kernels.s4d(A, C, DT, 4, discretization="euler")
    with pytest.raises(ValueError, match=r"\[dss\] variant is 'max'"):
        kernels.dss(A, C, DT, 4, variant="max")
