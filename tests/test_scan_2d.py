# SPDX-License-Identifier: Apache-2.0
"""Scans over images: in several orders, and along both axes at once."""

import re

import pytest

import pentad

torch = pytest.importorskip("torch")

from scan_cases import (  # noqa: E402
    DTYPES,
    HALVES,
    Problem,
    assert_gradcheck,
    assert_same_bits,
    check,
    dtype_name,
    gaps,
    repeated,
    reversed_dims,
)

from pentad import _C, scan  # noqa: E402
from pentad.scan import scan2d_autograd, scan2d_reference  # noqa: E402
from pentad.scan.scan2d import cross_order, snake_order  # noqa: E402

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
# From a place alone over single rows and columns to several bands and tiles.
SIZES = [(1, 1), (1, 5), (7, 1), (2, 3), (8, 4), (9, 33), (17, 3)]
ALL = ("D", "delta_bias", "delta_softplus")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The problems here are smaller than the waking of a thread."""
    threads(1)


class Image(Problem):
    def function_of(self, module):
        return getattr(module if module is scan else scan2d_reference, self.op)


def draw(*shape, dtype, generator):
    return torch.randn(shape, generator=generator).to(dtype)


def cross_problem(dtype, size=(3, 5), names=ALL, b=2, d=5, n=3, k=4, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    h, w = size
    inputs = {
        "u": draw(b, d, h, w, dtype=dtype, generator=g),
        "delta": draw(b, k, d, h, w, dtype=dtype, generator=g),
        "A": -torch.rand(k, d, n, generator=g).to(wide),
        "B": draw(b, k, n, h, w, dtype=dtype, generator=g),
        "C": draw(b, k, n, h, w, dtype=dtype, generator=g),
    }
    for name in ("D", "delta_bias"):
        if name in names:
            inputs[name] = draw(k, d, dtype=wide, generator=g)
    if "delta_softplus" in names:
        inputs["delta_softplus"] = True
    else:
        inputs["delta"] = inputs["delta"].abs()
    if options.get("order") == "random":
        options["order"] = torch.stack([torch.randperm(h * w, generator=g) for _ in range(k)])
    return Image("scan2d", dtype, inputs | options, seed)


def wavefront_problem(dtype, size=(3, 5), skip=True, b=2, d=5, n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    h, w = size
    inputs = {
        "u": draw(b, d, h, w, dtype=dtype, generator=g),
        "delta": draw(b, 2, d, h, w, dtype=dtype, generator=g).abs(),
        "A": -torch.rand(2, d, n, generator=g).to(wide),
        "B": draw(b, 2, n, h, w, dtype=dtype, generator=g),
        "C": draw(b, n, h, w, dtype=dtype, generator=g),
    }
    if skip:
        inputs["D"] = draw(d, dtype=wide, generator=g)
    return Image("scan2d_wavefront", dtype, inputs, seed)


PROBLEMS = [cross_problem, wavefront_problem]
each = pytest.mark.parametrize("problem", PROBLEMS)


# --- Values and gradients -------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("size", SIZES)
@each
def test_sizes(problem, dtype, size):
    check(problem(dtype, size))


@each
@pytest.mark.parametrize(("d", "n"), [(1, 1), (16, 4), (17, 16), (70, 5), (130, 2)])
def test_channels_and_states(problem, d, n):
    check(problem(torch.float32, (3, 11), b=1, d=d, n=n))


@each
@pytest.mark.parametrize("b", [1, 3, 9, 17])
def test_batches(problem, b):
    """Above eight the sums over the batch are cut into pieces of several rows."""
    check(problem(torch.float32, (2, 3), b=b, d=3))


@each
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_sizes(problem, sizes):
    b, d, *size = sizes
    results = check(problem(torch.float32, tuple(size), b=b, d=d))
    assert results["out0"].shape == (b, d, *size)


@each
def test_double(problem):
    check(problem(torch.float64))


@each
@dtypes
def test_every_level(isa, problem, dtype):
    check(problem(dtype, (9, 5), d=21, n=5))


@each
def test_gradients(problem):
    assert_gradcheck(problem(torch.float64, (2, 3), b=1, d=2, n=2))


@each
def test_threads(threads, problem):
    for dtype in (torch.float32, HALVES[0]):
        assert_same_bits(problem(dtype, (33, 17), b=3, d=80, n=4), threads, gradients=True)
    assert_same_bits(problem(torch.float32, (33, 17), b=1, d=80, n=4), threads, gradients=False)


@each
@dtypes
def test_without_gradients(problem, dtype):
    check(problem(dtype, (17, 5)), gradients=False)


@pytest.mark.parametrize("names", [(), ("D",), ("delta_bias",), ("delta_softplus",)])
def test_options(names):
    check(cross_problem(torch.float32, names=names))
    check(wavefront_problem(torch.float32, skip="D" in names))


@each
@pytest.mark.parametrize("layout", [reversed_dims, gaps, lambda x: x.contiguous(
    memory_format=torch.channels_last) if x.ndim == 4 else x, lambda x: repeated(x, 0)],
    ids=["reversed", "gaps", "channels_last", "repeated"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, HALVES[0]], ids=dtype_name)
def test_layouts(problem, layout, dtype):
    made = problem(dtype, (5, 9), d=18)
    made.inputs |= {n: layout(t) for n, t in made.inputs.items() if torch.is_tensor(t)}
    check(made)


@each
def test_channels_stay_next_to_each_other(problem):
    inputs = problem(torch.float32).inputs
    channels_last = inputs["u"].contiguous(memory_format=torch.channels_last)
    function = getattr(scan, problem(torch.float32).op)
    out = function(**inputs | {"u": channels_last})
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, function(**inputs))


@each
def test_what_is_not_finite_stays_where_it_is_seen(problem):
    made = problem(torch.float32, (3, 4))
    made.inputs["u"][0, 1, 1, 2] = float("nan")
    out = made.results(gradients=False)["out0"]
    assert out[0, 1, 1, 2].isnan()
    assert out[1].isfinite().all()
    assert out[0, [0, 2, 3, 4]].isfinite().all()


@each
def test_decays_of_zero_are_exact(problem):
    made = problem(torch.float32, (3, 5), b=1)
    made.inputs["A"].fill_(-1e30)
    made.inputs["delta"] = made.inputs["delta"].abs() + 1
    results = check(made)
    assert all(t.isfinite().all() for t in results.values())


# --- Orders ---------------------------------------------------------------------------------------


def test_cross_order_by_hand():
    assert cross_order(2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0],
    ]  # fmt: skip


def test_snake_order_by_hand():
    assert snake_order(2, 3).tolist() == [
        [0, 1, 2, 5, 4, 3], [0, 3, 4, 1, 2, 5], [3, 4, 5, 2, 1, 0], [5, 2, 1, 4, 3, 0],
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(1, 4), (3, 3), (4, 5)])
def test_a_snake_moves_by_one_place(size):
    width = size[1]
    for path in snake_order(*size):
        rows, columns = path // width, path % width
        assert (rows.diff().abs() + columns.diff().abs() == 1).all()


@dtypes
@pytest.mark.parametrize("order", ["cross", "snake", "random"])
def test_orders(dtype, order):
    check(cross_problem(dtype, (4, 9), order=order))


@pytest.mark.parametrize("k", [1, 2, 7])
def test_directions(k):
    check(cross_problem(torch.float32, k=k, order="random"))


def test_an_order_of_32_bits_and_any_strides():
    made = cross_problem(torch.float32, order="random")
    want = made.results()
    order = made.inputs["order"]
    made.inputs["order"] = order.int().T.contiguous().T
    for name, got in made.results().items():
        assert torch.equal(got, want[name])


@pytest.mark.parametrize(
    "by_step", [("delta",), ("B",), ("C",), ("B", "C"), ("delta", "B", "C")], ids="-".join
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_by_step(by_step, dtype):
    made = cross_problem(dtype, order="snake", by_step=by_step)
    results = check(made)
    made.inputs["by_step"] = ()
    assert not torch.allclose(results["out0"], made.results()["out0"])


def test_as_vmamba_calls_it():
    """Flat parameters, and steps of tensors computed from the image in scan order."""
    made = cross_problem(torch.float32, (4, 6))
    want = made.results(gradients=False)["out0"]
    order = cross_order(4, 6)
    for name in ("delta", "B", "C"):
        t = made.inputs[name].flatten(3)
        made.inputs[name] = t.gather(3, order[None, :, None].expand(t.shape))
    for name in ("A", "D", "delta_bias"):
        made.inputs[name] = made.inputs[name].flatten(0, 1)
    made.inputs["by_step"] = ("delta", "B", "C")
    assert torch.equal(made.results(gradients=False)["out0"], want)


def test_four_scans_of_permuted_images():
    made = cross_problem(torch.float32, (5, 7))
    given, order = made.inputs, cross_order(5, 7)
    out = torch.zeros(2, 5, 35)
    for k in range(4):
        u, delta, B, C = (
            t.reshape(*t.shape[:2], 35)[..., order[k]]
            for t in (given["u"], given["delta"][:, k], given["B"][:, k], given["C"][:, k])
        )
        y = scan.selective_scan(
            u, delta, given["A"][k], B, C, given["D"][k], None, given["delta_bias"][k], True
        )
        out[..., order[k]] += y
    torch.testing.assert_close(made.results(gradients=False)["out0"].flatten(2), out)


# --- Along both axes ------------------------------------------------------------------------------


def test_wavefront_by_hand():
    """No decay, and every input 1: the first row counts up, the first column too, and what is
    inside is the mean of its neighbours, plus 1."""
    ones = torch.ones(1, 2, 1, 3, 3)
    out = scan.scan2d_wavefront(ones[:, 0], ones, torch.zeros(2, 1, 1), ones, ones[:, 0])
    want = [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert out[0, 0].tolist() == want


def test_a_single_row_is_a_selective_scan():
    given = wavefront_problem(torch.float32, (1, 40)).inputs
    u, delta, B, C = (
        t.squeeze(-2) for t in (given["u"], given["delta"][:, 0], given["B"][:, 0], given["C"])
    )
    want = scan.selective_scan(u, delta, given["A"][0], B, C, given["D"])
    torch.testing.assert_close(scan.scan2d_wavefront(**given)[:, :, 0], want)


# --- As torch sees them ---------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(problem, dynamic):
    torch._dynamo.reset()
    made = problem(torch.float32, (3, 5))
    function = getattr(scan, made.op)

    def call(**given):
        return function(**given)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want = made.results()
    for name, got in made.results(compiled).items():
        torch.testing.assert_close(got, want[name])
    torch.testing.assert_close(made.results(compiled, gradients=False)["out0"], want["out0"])


def arguments(problem):
    """Of the operator that a function calls, and of that of its gradient."""
    given = problem(torch.float32, (9, 3)).inputs
    flat = {n: t.flatten(-2) for n, t in given.items() if n in ("u", "delta", "B", "C")}
    tensors = [flat["u"], flat["delta"], given["A"], flat["B"], flat["C"], given["D"]]
    if problem is cross_problem:
        rest = [given["delta_bias"], cross_order(9, 3), True, [False, True, False]]
        ops = scan2d_autograd.cross_forward, scan2d_autograd.cross_backward
        wanted = [True, False, True, True, False, True, False]
    else:
        rest, wanted = [3], [True, False, True, True, False, True]
        ops = scan2d_autograd.wavefront_forward, scan2d_autograd.wavefront_backward
    return ops, [*tensors, *rest], wanted


@each
def test_opcheck(problem):
    (forward, backward), given, wanted = arguments(problem)
    # No gradient is registered with the operators: autograd.Functions around them have it.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (*given, True), test_utils=tests)
    torch.library.opcheck(forward, (*given, False), test_utils=tests)
    out, stored = forward(*given, True)
    torch.library.opcheck(backward, (out, stored, *given, wanted), test_utils=tests)


@each
def test_on_meta_tensors(problem):
    made = problem(torch.float32)
    given = {n: t.to("meta") if torch.is_tensor(t) else t for n, t in made.inputs.items()}
    assert getattr(scan, made.op)(**given).shape == made.inputs["u"].shape


@each
def test_only_the_wanted_gradients(problem):
    made = problem(torch.float32, (9, 4))
    want, function = made.results(), getattr(scan, made.op)
    upstream = made.upstream([want["out0"]])
    for name, value in made.inputs.items():
        if torch.is_tensor(value):
            leaf = value.detach().clone().requires_grad_()
            (got,) = torch.autograd.grad(function(**made.inputs | {name: leaf}), leaf, upstream)
            torch.testing.assert_close(got, want[f"d{name}"])


@each
def test_a_second_derivative_is_refused(problem):
    made = problem(torch.float32)
    u = made.inputs["u"].requires_grad_()
    out = getattr(scan, made.op)(**made.inputs)
    (first,) = torch.autograd.grad(out.sin().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        first.sum().backward()


@each
def test_forward_mode_is_refused(problem):
    made = problem(torch.float32)
    with torch.autograd.forward_ad.dual_level():
        u = torch.autograd.forward_ad.make_dual(made.inputs["u"], made.inputs["u"])
        with pytest.raises((RuntimeError, NotImplementedError)):
            getattr(scan, made.op)(**made.inputs | {"u": u})


@each
def test_autocast_takes_the_widest_dtype(problem):
    made = problem(torch.float32)
    want = made.results(gradients=False)["out0"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = getattr(scan, made.op)(**made.inputs | {"u": made.inputs["u"].bfloat16()})
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.3)


# --- Errors ---------------------------------------------------------------------------------------

REFUSED = [
    ({"u": 1.0}, TypeError, "u is float, expected a torch tensor"),
    ({"u": torch.ones(2, 5, 15)}, ValueError, "u has shape (2, 5, 15), expected (B, D, H, W)"),
    ({"delta": torch.ones(2, 4, 5, 15).half()}, TypeError, "delta has dtype float16 but u has"),
    ({"delta": torch.ones(2, 4, 4, 15)}, ValueError, "delta has shape (2, 4, 4, 15), expected"),
    ({"A": torch.ones(4, 4, 3)}, ValueError, "A has shape (4, 4, 3), expected (K, 5, N) or"),
    ({"A": torch.ones(19, 3)}, ValueError, "A has shape (19, 3), expected (K, 5, N) or"),
    ({"A": torch.ones(4, 5, 3).double()}, TypeError, "A has dtype float64, expected it only"),
    ({"A": torch.ones(3, 5, 3)}, ValueError, 'A has 3 directions but order "cross" has 4'),
    ({"B": torch.ones(2, 4, 2, 15)}, ValueError, "B has shape (2, 4, 2, 15), expected (2, 4, 3,"),
    ({"C": torch.ones(2, 1, 3, 15)}, ValueError, "C has shape (2, 1, 3, 15), expected (2, 4, 3,"),
    ({"D": torch.ones(5)}, ValueError, "D has shape (5,), expected (4, 5) or (20,)"),
    ({"order": "spiral"}, ValueError, "order is 'spiral', expected"),
    ({"order": torch.zeros(4, 15)}, TypeError, "order has dtype float32, expected int32 or int64"),
    ({"order": torch.zeros(4, 14).int()}, ValueError, "order has shape (4, 14), expected (4, 15)"),
    ({"order": torch.zeros(4, 15).int()}, ValueError, "order holds 0 twice in row 0, expected"),
    ({"order": cross_order(3, 5) + 1}, ValueError, "order holds 15 in row 0, expected each of 0"),
    ({"order": cross_order(3, 5) - 1}, ValueError, "order holds -1 in row 0, expected each of 0"),
    ({"by_step": ("u",)}, ValueError, "by_step has 'u', expected"),
    ({"by_step": "delta"}, TypeError, "by_step is 'delta', expected a tuple of names"),
    ({"C": torch.ones(2, 4, 3, 15).to("meta")}, pentad.DeviceError, "C is on meta but u is on cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "kind", "text"), REFUSED)
def test_scan2d_refuses(changed, kind, text):
    with pytest.raises(kind, match=re.escape(f"[scan2d] {text}")):
        scan.scan2d(**cross_problem(torch.float32).inputs | changed)


REFUSED_WAVEFRONT = [
    ({"u": torch.ones(5, 3, 5)}, ValueError, "u has shape (5, 3, 5), expected (B, D, H, W)"),
    ({"A": torch.ones(2, 4, 3)}, ValueError, "A has shape (2, 4, 3), expected (2, 5, N), N at"),
    ({"A": torch.ones(2, 5, 3).double()}, TypeError, "A has dtype float64, expected it only"),
    ({"delta": torch.ones(2, 1, 5, 3, 5)}, ValueError, "delta has shape (2, 1, 5, 3, 5), expect"),
    ({"B": torch.ones(2, 3, 3, 5)}, ValueError, "B has shape (2, 3, 3, 5), expected (2, 2, 3, 3,"),
    ({"C": torch.ones(2, 3, 3, 5).half()}, TypeError, "C has dtype float16 but u has float32"),
    ({"D": torch.ones(2, 5)}, ValueError, "D has shape (2, 5), expected (5,)"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "kind", "text"), REFUSED_WAVEFRONT)
def test_wavefront_refuses(changed, kind, text):
    with pytest.raises(kind, match=re.escape(f"[scan2d_wavefront] {text}")):
        scan.scan2d_wavefront(**wavefront_problem(torch.float32).inputs | changed)


def raw(problem):
    """The entry of the forward pass and its arguments, which end with out and stored."""
    (forward, _), given, _ = arguments(problem)
    out, stored = forward(*given, True)
    if problem is cross_problem:
        given[-1:] = given[-1]
        return _C.cross_scan_forward, [*given, out, stored]
    return _C.wavefront_forward, [*given, out, stored]


@each
def test_the_extension_refuses_what_could_harm_memory(problem):
    entry, given = raw(problem)
    entry(*given)
    for position, changed, text in (
        (0, given[0][:, :-1], "has shape"),
        (1, given[1][..., :-1], "delta has shape"),
        (2, given[2].double(), "A has dtype"),
        (2, given[2][..., :0], "expected 1 to 65536 states"),
        (3, given[3][:1], "B has shape"),
        (-2, given[0], "out"),
        (-1, given[-1][:1], "stored has shape"),
        (-1, given[-1].mT.contiguous().mT, "stored is not contiguous"),
    ):
        arguments = list(given)
        arguments[position] = changed
        with pytest.raises((ValueError, TypeError), match=text):
            entry(*arguments)


def test_the_extension_refuses_a_width_that_does_not_divide():
    entry, given = raw(wavefront_problem)
    for width in (0, -3, 4):
        with pytest.raises(ValueError, match=f"width is {width}, but there are 27 places"):
            entry(*given[:6], width, *given[7:])
