# SPDX-License-Identifier: Apache-2.0
"""The recurrences whose state is a matrix as their callers and torch see them."""

import inspect

import pytest

torch = pytest.importorskip("torch")

from matrix_api_cases import (  # noqa: E402
    CASES,
    NAMES,
    attention_step,
    delta_step,
    made,
    parts_of,
)
from matrix_cases import is_float, ssd_problem  # noqa: E402
from scan_api_cases import leaves, total, value_and_gradients  # noqa: E402
from scan_cases import gaps, reversed_dims  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from pentad import scan  # noqa: E402
from pentad.scan import reference  # noqa: E402

SUMS = ("ssd sums", "attention sums")  # plain torch functions, which torch differentiates
each_case = pytest.mark.parametrize("case", CASES)
each_kernel = pytest.mark.parametrize("case", [case for case in CASES if case not in SUMS])


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The problems here are smaller than the waking of a thread."""
    threads(1)


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_case
def test_results_and_gradients_have_the_dtypes_of_the_inputs(case, dtype):
    function, arguments = made(case, dtype)
    result = function(**arguments)
    given = leaves(arguments)
    grads = torch.autograd.grad(total(result), list(given.values()))
    for leaf, grad in zip(given.values(), grads, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
    out, *states = parts_of(result)
    assert out.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(state.dtype == wide for state in states)


@each_case
def test_only_the_wanted_gradients(case):
    function, arguments = made(case)
    given = leaves(arguments)
    want = dict(zip(given, value_and_gradients(function, arguments)[1:], strict=True))
    for name in given:
        alone = {
            n: t.detach().requires_grad_(n == name) if n in given else t
            for n, t in arguments.items()
        }
        (got,) = torch.autograd.grad(total(function(**alone)), alone[name])
        torch.testing.assert_close(got, want[name])


@pytest.mark.parametrize("case", ["ssd all", "attention heads", "delta keys", "delta step"])
def test_a_gradient_through_one_result_alone(case):
    function, arguments = made(case, torch.float64)
    given = list(leaves(arguments).values())
    both = value_and_gradients(function, arguments)[1:]
    parts = []
    for n in range(2):
        loss = ((n + 2) * function(**arguments)[n]).sin().sum()
        grads = torch.autograd.grad(loss, given, allow_unused=True)
        parts.append([0 if g is None else g for g in grads])
    torch.testing.assert_close([a + b for a, b in zip(*parts, strict=True)], list(both))


@each_kernel
def test_a_second_derivative_is_refused_and_never_silently_zero(case):
    function, arguments = made(case)
    given = list(leaves(arguments).values())
    first = torch.autograd.grad(total(function(**arguments)), given, create_graph=True)
    loss = sum(g.pow(2).sum() for g in first)
    for leaf in given:
        with pytest.raises(RuntimeError, match="cannot be differentiated a second time") as caught:
            torch.autograd.grad(loss, leaf, retain_graph=True, allow_unused=True)
        assert NAMES[function] in str(caught.value)


@pytest.mark.parametrize("case", SUMS)
def test_second_derivatives_of_plain_sums(case):
    function, arguments = made(case, torch.float64)
    names, tensors = zip(*leaves(arguments).items(), strict=True)

    def call(*given):
        return function(**arguments | dict(zip(names, given, strict=True)))

    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True, atol=1e-4)


@each_kernel
def test_forward_mode_is_refused_and_never_silently_zero(case):
    function, arguments = made(case, grad=False)
    for name, leaf in leaves(made(case)[1]).items():
        if name == "z":
            continue  # a factor outside of the kernels
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(arguments[name], torch.ones_like(leaf))
            with pytest.raises(NotImplementedError, match="forward mode AD"):
                function(**arguments | {name: dual})


@each_case
def test_no_graph_where_none_is_wanted(case):
    function, arguments = made(case)
    want = parts_of(function(**arguments))
    assert all(part.requires_grad for part in want)
    with torch.no_grad():
        got = parts_of(function(**arguments))
        assert not any(part.requires_grad for part in got)
        torch.testing.assert_close(got, tuple(part.detach() for part in want))
    with torch.inference_mode():
        assert all(part.is_inference() for part in parts_of(function(**arguments)))


def test_inputs_changed_after_the_forward_are_noticed():
    for case, name in (("ssd", "x"), ("attention", "k"), ("delta", "beta")):
        function, arguments = made(case)
        changed = arguments[name] * 1
        out = function(**arguments | {name: changed})
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("case", ["ssd all", "attention heads", "delta keys"])
def test_torch_func_grad(case):
    function, arguments = made(case, torch.float64)
    names, tensors = zip(*leaves(arguments).items(), strict=True)

    def loss(*given):
        return total(function(**arguments | dict(zip(names, given, strict=True))))

    got = torch.func.grad(loss, tuple(range(len(names))))(*(t.detach() for t in tensors))
    torch.testing.assert_close(got, value_and_gradients(function, arguments)[1:])


def test_gradients_of_constant_decays_are_summed_in_float32():
    """A sum of 4096 ones in bfloat16 would stop at 256."""
    decay = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    ones = torch.ones(64, 64, 1, 1, dtype=torch.bfloat16)
    out = scan.linear_attention(ones, ones, ones, decay=decay)
    (grad,) = torch.autograd.grad(out.sum(), decay)
    assert grad.item() == 64 * 63


# --- Autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "narrow"),
    [
        ("ssd all", ("B", "z")),
        ("ssd sums", ("x", "C")),
        ("attention heads", ("q", "v", "prefix_k")),
        ("attention sums", ("k", "prefix_v")),
        ("delta keys", ("q", "k")),
        ("attention step", ("q",)),
        ("delta step", ("v",)),
    ],
)
def test_autocast_takes_the_widest_dtype(case, narrow):
    function, arguments = made(case, grad=False)
    mixed = arguments | {n: arguments[n].bfloat16() for n in narrow}
    rounded = arguments | {n: mixed[n].float() for n in narrow}
    with pytest.raises(TypeError, match="expected one dtype"):
        function(**mixed)
    with torch.autocast("cpu", torch.bfloat16):
        got = parts_of(function(**mixed))
        assert got[0].dtype == torch.float32
        half = {n: t.bfloat16() if is_float(t) else t for n, t in arguments.items()}
        assert parts_of(function(**half))[0].dtype == torch.bfloat16
    torch.testing.assert_close(got, parts_of(function(**rounded)), rtol=0, atol=0)


# --- Tracing --------------------------------------------------------------------------------------


DYNAMIC = ("ssd seq_idx", "attention keys", "delta packed", "delta step")


@pytest.mark.parametrize(
    ("case", "dynamic"), [*((case, False) for case in CASES), *((case, True) for case in DYNAMIC)]
)
def test_compiles_without_a_break(case, dynamic):
    torch._dynamo.reset()
    function, arguments = made(case)

    def call(**arguments):
        return function(**arguments)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want = value_and_gradients(function, arguments)
    torch.testing.assert_close(value_and_gradients(compiled, arguments), want)
    with torch.no_grad():
        torch.testing.assert_close(total(compiled(**arguments)), want[0])


def test_compiled_code_takes_other_sizes():
    import torch._dynamo.testing

    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x, dt, A, B, C, beta):
        x = scan.ssd(x, dt, A, B, C, dt_softplus=True)
        x = scan.linear_attention(B, C, x, feature_map="elu", normalize=True)
        return scan.delta_rule(B, C, x, beta, decay=1 - beta)

    compiled = torch.compile(function, fullgraph=True, backend=count)
    for batch, length in ((2, 5), (3, 70), (4, 33), (5, 64)):
        given = ssd_problem(torch.float32, ("no_last",), batch, length).inputs
        given["x"].requires_grad_()
        beta = torch.rand(batch, length, 4)
        got = compiled(**given, beta=beta)
        torch.testing.assert_close(got, function(**given, beta=beta))
        got.sum().backward()
    assert count.frame_count <= 3


@pytest.mark.parametrize("case", ["ssd all", "attention heads", "delta keys", "attention step"])
def test_compiles_under_autocast(case):
    torch._dynamo.reset()
    function, arguments = made(case, grad=False)
    mixed = {n: t.bfloat16() if n in ("B", "q") else t for n, t in arguments.items()}

    def call(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return function(**arguments)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**mixed), call(**mixed))


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, x, dt, A, B, C):
            x = scan.ssd(x, dt, A, B, C, dt_softplus=True)
            x = scan.linear_attention(B, C, x, decay=A.exp(), prefix_k=B, prefix_v=x)
            return scan.delta_rule(B, C, x, dt, decay=A, log_space=True)

    arguments = tuple(ssd_problem(torch.float32, ("no_last",), l=7).inputs.values())
    program = torch.export.export(Model(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Model()(*arguments))


class _Caught(TorchDispatchMode):
    """Keeps the calls of the family's operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pentad":
            given = tuple(a.detach().clone() if torch.is_tensor(a) else a for a in args)
            self.calls[str(function)] = function, given
        return function(*args, **kwargs or {})


@each_kernel
def test_opcheck(case):
    function, arguments = made(case)
    with _Caught() as caught:
        total(function(**arguments)).backward()
        with torch.no_grad():
            function(**arguments)
    names = caught.calls.keys()
    assert any("matrix_scan_backward" in name for name in names)
    assert function not in (attention_step, delta_step) or any("update" in name for name in names)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    if "packed" not in case:  # whose stored states have gaps that nobody writes or reads
        checks += ("test_aot_dispatch_dynamic",)
    for operator, given in caught.calls.values():
        torch.library.opcheck(operator, given, test_utils=checks)


@each_case
def test_fake_and_meta_tensors_give_what_real_ones_give(case):
    from torch._subclasses import FakeTensorMode

    function, arguments = made(case, grad=False)
    real = parts_of(function(**arguments))
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(t) if torch.is_tensor(t) else t for n, t in arguments.items()}
        results = [parts_of(function(**fake))]
    meta = {n: t.to("meta") if torch.is_tensor(t) else t for n, t in arguments.items()}
    results.append(parts_of(function(**meta)))
    for result in results:
        for got, want in zip(result, real, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@each_case
def test_defaults_of_dtype_and_device_change_nothing(case):
    function, arguments = made(case, grad=False)
    want = function(**arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        got = function(**arguments)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# --- Kinds of tensors -----------------------------------------------------------------------------

VIEWS = {
    "reversed dims": reversed_dims,
    "gaps": gaps,
    "offset": lambda t: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape),
    "negated": lambda t: (-t)._neg_view(),
    "parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("view", VIEWS)
@each_case
def test_tensors_of_every_make(case, view):
    function, arguments = made(case, torch.float64, grad=False)
    viewed = {n: VIEWS[view](t) if is_float(t) else t for n, t in arguments.items()}
    results = []
    for given in (arguments, viewed):
        given = {n: t.detach().requires_grad_() if is_float(t) else t for n, t in given.items()}
        results.append(value_and_gradients(function, given))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@each_case
def test_expanded_inputs_and_gradients(case):
    function, arguments = made(case, torch.float64, grad=False)
    base = {
        n: t.narrow(0, 0, 1).clone().requires_grad_()
        for n, t in arguments.items()
        if is_float(t) and n != "state"
    }
    views = {n: t.expand(arguments[n].shape) for n, t in base.items()}
    copies = {n: t.contiguous() for n, t in views.items()}
    results = []
    for given in (views, copies):
        loss = parts_of(function(**arguments | given))[0].sum()  # a gradient of zero strides
        results.append((loss, *torch.autograd.grad(loss, list(base.values()))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["linear_attention_update", "delta_rule_update"])
def test_steps_change_the_cache_in_place(name):
    """Compiled or not, and torch knows of it."""
    torch._dynamo.reset()
    update = getattr(scan, name)
    _, given = made("attention step" if name[0] == "l" else "delta step", grad=False)
    state = given.pop("state")

    def call(state, **given):
        return update(state, **given)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    states = [state.clone(), state.clone()]
    for _ in range(3):
        torch.testing.assert_close(compiled(states[0], **given), call(states[1], **given))
        torch.testing.assert_close(*states)
    assert not torch.equal(states[0], state)

    out = (torch.ones_like(state, requires_grad=True) * state).sum()
    version = state._version
    update(state, **given)
    assert state._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


# --- Signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES.values())
def test_the_definitions_have_the_signatures_of_the_functions(name):
    assert name in scan.__all__
    signatures = [inspect.signature(getattr(module, name)) for module in (scan, reference)]
    assert signatures[0] == signatures[1]
