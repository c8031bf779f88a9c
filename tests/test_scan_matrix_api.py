# SPDX-License-Identifier: Apache-2.0
"""The recurrences whose state is a matrix as their callers and torch see them."""

import inspect
import re

import pytest

import pentad

torch = pytest.importorskip("torch")

from matrix_cases import (  # noqa: E402
    SSD_ALL,
    delta_problem,
    is_float,
    linear_problem,
    ssd_problem,
    update_problem,
)
from scan_api_cases import leaves, total, value_and_gradients  # noqa: E402
from scan_cases import gaps, reversed_dims  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from pentad import scan  # noqa: E402
from pentad.scan import reference  # noqa: E402

B, L, H, P, N, G = 2, 5, 4, 3, 2, 2


def attention_step(state, **given):
    """A step on a copy of the state, which is a result too."""
    state = state * 1
    out = scan.linear_attention_update(state, **given)
    return out, state


def delta_step(state, **given):
    state = state * 1
    return scan.delta_rule_update(state, **given), state


def case(make, *names):
    function = {ssd_problem: scan.ssd, linear_problem: scan.linear_attention}
    return (
        function.get(make, scan.delta_rule),
        lambda t: make(t, names, B, L, H, P, N, G).inputs,
    )


def step(op, *names, **options):
    function = attention_step if op == "linear_attention" else delta_step
    return function, lambda t: update_problem(op, t, names, B, H, P, N, G, **options).inputs


ROWS = [2, -1]
CASES = {
    "ssd": case(ssd_problem, "no_last"),
    "ssd all": case(ssd_problem, "dt_float", "dt_limit", "chunk_size", *SSD_ALL),
    "ssd seq_idx": case(ssd_problem, "seq_idx", "D_per_value", "reverse"),
    "ssd packed": case(ssd_problem, "packed", "initial"),
    "ssd sums": case(ssd_problem, "not_causal", "D", "z", "grouped"),
    "attention": case(linear_problem, "no_last"),
    "attention heads": case(
        linear_problem, "decay_head", "elu", "normalize", "initial", "scale", "prefix"
    ),
    "attention keys": case(
        linear_problem, "decay_key_step", "log_space", "reverse", "grouped", "initial"
    ),
    "attention packed": case(linear_problem, "packed", "decay_step"),
    "attention sums": case(linear_problem, "not_causal", "prefix", "taylor", "normalize"),
    "delta": case(delta_problem, "initial", "no_last"),
    "delta keys": case(delta_problem, "decay_key", "grouped", "initial", "scale"),
    "delta packed": case(delta_problem, "packed", "decay_step", "reverse", "initial"),
    "attention step": step("linear_attention", "decay_step"),
    "attention step rows": step("linear_attention", "decay_key", "normalize", "elu", rows=ROWS),
    "delta step": step("delta_rule"),
    "delta step rows": step("delta_rule", "decay_key_step", "log_space", "grouped", rows=ROWS),
}
NAMES = {
    scan.ssd: "ssd",
    scan.linear_attention: "linear_attention",
    scan.delta_rule: "delta_rule",
    attention_step: "linear_attention_update",
    delta_step: "delta_rule_update",
}
SUMS = ("ssd sums", "attention sums")  # plain torch functions, which torch differentiates
each_case = pytest.mark.parametrize("case", CASES)
each_kernel = pytest.mark.parametrize("case", [case for case in CASES if case not in SUMS])


def made(case, dtype=torch.float32, grad=True):
    function, make = CASES[case]
    arguments = {
        n: t.detach().requires_grad_(grad) if is_float(t) else t for n, t in make(dtype).items()
    }
    return function, arguments


def parts_of(result):
    return result if isinstance(result, tuple) else (result,)


def first_of(arguments):
    return next(n for n in ("v", "x") if n in arguments)


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


# --- Errors ---------------------------------------------------------------------------------------


def as_double(t):
    return t.double()


def as_array(t):
    return t.detach().numpy()


def shaped(*shape):
    return lambda t: torch.zeros(shape, dtype=t.dtype if torch.is_tensor(t) else torch.float32)


def refused_inputs(case, q, k, v, letters):
    """What all that take queries, keys and values refuse."""
    lead = (B, L) if "L" in letters else (B,)
    return [
        (case, {v: as_array}, TypeError, f"{v} is ndarray, expected a torch tensor"),
        (case, {k: None}, TypeError, f"{k} is NoneType, expected a torch tensor"),
        (case, {v: torch.Tensor.int}, TypeError, f"{v} has dtype int32, expected float32, "),
        (case, {v: shaped(3, 3)}, ValueError, f"{v} has shape (3, 3), expected {letters}"),
        (case, {k: as_double}, TypeError, f"{k} has dtype float64 but {v} has float32"),
        (case, {q: torch.Tensor.half}, TypeError, f"{q} has dtype float16 but {v} has float32"),
        (case, {k: shaped(*lead, N)}, ValueError, f"{k} has shape {(*lead, N)}, expected ("),
        (case, {k: shaped(9, *lead[1:], 1, N)}, ValueError, f"expected {(*lead, 1, N)}"),
        (case, {q: shaped(*lead, 1, 7)}, ValueError, f"{q} has shape {(*lead, 1, 7)}, expected"),
        (
            case, {q: shaped(*lead, 3, N), k: shaped(*lead, 3, N)}, ValueError,
            f"{k} has 3 groups but {v} has 4 heads, which are not a multiple of 3",
        ),
        (
            case, {q: shaped(*lead, 0, N), k: shaped(*lead, 0, N)}, ValueError,
            f"{k} has 0 groups but {v} has 4 heads",
        ),
    ]  # fmt: skip


def cu(*ends):
    return torch.tensor(ends, dtype=torch.int32)


BAD = [
    *refused_inputs("ssd", "C", "B", "x", "(B, L, H, P)"),
    *refused_inputs("attention", "q", "k", "v", "(B, L, H, P)"),
    *refused_inputs("delta", "q", "k", "v", "(B, L, H, P)"),
    *refused_inputs("attention step", "q", "k", "v", "(B, H, P)"),
    *refused_inputs("delta step", "q", "k", "v", "(B, H, P)"),
    # Sizes that the kernels do not have.
    (
        "ssd", {"C": shaped(B, L, 1, 0), "B": shaped(B, L, 1, 0)}, ValueError,
        "B has 0 keys, expected 1 to 1024",
    ),
    ("ssd", {"x": shaped(B, L, H, 1025)}, ValueError, "x has 1025 values, expected 1 to 1024"),
    ("delta", {"v": shaped(B, L, H, 0)}, ValueError, "v has 0 values, expected 1 to 1024"),
    (
        "attention", {n: shaped(B, L, 1, 1025) for n in "qk"}, ValueError,
        "k has 1025 keys, expected 1 to 1024",
    ),
    (
        "attention", {n: shaped(B, L, 1, 32) for n in "qk"} | {"feature_map": "taylor"},
        ValueError, "k has 1057 keys, expected 1 to 1024",
    ),
    # SSD.
    ("ssd", {"dt": as_array}, TypeError, "dt is ndarray"),
    ("ssd", {"dt": as_double}, TypeError, "dt has dtype float64, expected it only where x has"),
    ("ssd", {"dt": shaped(B, L)}, ValueError, "dt has shape (2, 5), expected (2, 5, 4)"),
    ("ssd", {"A": shaped(H, N)}, ValueError, "A has shape (4, 2), expected (4,)"),
    ("ssd", {"A": as_double}, TypeError, "A has dtype float64, expected it only where x has it"),
    ("ssd", {"A": torch.Tensor.int}, TypeError, "A has dtype int32"),
    ("ssd all", {"D": shaped(3)}, ValueError, "D has shape (3,), expected (4,) or (4, 3)"),
    ("ssd all", {"D": as_double}, TypeError, "D has dtype float64"),
    ("ssd all", {"D": 1.0}, TypeError, "D is float, expected a torch tensor"),
    ("ssd all", {"z": shaped(B, L, H)}, ValueError, "z has shape (2, 5, 4), expected (2, 5, 4, 3)"),
    ("ssd all", {"z": torch.Tensor.half}, TypeError, "z has dtype float16 but x has float32"),
    ("ssd all", {"dt_bias": shaped(1)}, ValueError, "dt_bias has shape (1,), expected (4,)"),
    ("ssd all", {"dt_bias": as_double}, TypeError, "dt_bias has dtype float64"),
    ("ssd all", {"dt_limit": 0.1}, ValueError, "dt_limit is 0.1, expected (low, high)"),
    ("ssd all", {"dt_limit": (1.0, 0.0)}, ValueError, "dt_limit is (1.0, 0.0), expected a low end"),
    ("ssd", {"chunk_size": 0}, ValueError, "chunk_size is 0, expected at least 1"),
    ("ssd", {"chunk_size": 2.5}, TypeError, "chunk_size is float, expected an int or None"),
    (
        "ssd all", {"initial_states": shaped(B, H, N, P)}, ValueError,
        "initial_states has shape (2, 4, 2, 3), expected (2, 4, 3, 2)",
    ),
    ("ssd all", {"initial_states": as_double}, TypeError, "initial_states has dtype float64"),
    ("ssd seq_idx", {"seq_idx": shaped(B, L, 1)}, ValueError, "seq_idx has shape (2, 5, 1)"),
    ("ssd seq_idx", {"seq_idx": torch.Tensor.float}, TypeError, "seq_idx has dtype float32"),
    ("ssd seq_idx", {"seq_idx": [[0] * L] * B}, TypeError, "seq_idx is list"),
    ("ssd seq_idx", {"causal": False}, ValueError, "seq_idx cannot be used without causal"),
    ("ssd packed", {"causal": False}, ValueError, "cannot be used without causal"),
    (
        "ssd packed", {"seq_idx": torch.zeros(1, L, dtype=torch.int32)}, ValueError,
        "seq_idx cannot be used with cu_seqlens",
    ),
    ("ssd", {"cu_seqlens": cu(0, L)}, ValueError, "x has batch 2, expected 1 with cu_seqlens"),
    ("ssd packed", {"cu_seqlens": torch.Tensor.float}, TypeError, "cu_seqlens has dtype float32"),
    ("ssd packed", {"cu_seqlens": cu(0, 2, 2, 3, 4)}, ValueError, "cu_seqlens"),
    ("ssd packed", {"cu_seqlens": cu(0, 3, 2, 3, L)}, ValueError, "cu_seqlens"),
    ("ssd packed", {"cu_seqlens": cu(1, 3, 3, 3, L)}, ValueError, "cu_seqlens"),
    ("ssd packed", {"cu_seqlens": cu(0, L)}, ValueError, "initial_states has shape (4, 4, 3, 2)"),
    # Linear attention.
    (
        "attention keys", {"decay": shaped(B, H)}, ValueError,
        "decay has shape (2, 4), expected (4,) or (2, 5, 4) or (4, 2) or (2, 5, 4, 2)",
    ),
    ("attention keys", {"decay": 0.5}, TypeError, "decay is float, expected a torch tensor"),
    ("attention keys", {"decay": as_double}, TypeError, "decay has dtype float64"),
    ("attention keys", {"decay": torch.Tensor.int}, TypeError, "decay has dtype int32"),
    ("attention keys", {"causal": False}, ValueError, "decay cannot be used without causal"),
    ("attention", {"feature_map": "exp"}, ValueError, "feature_map is 'exp', expected 'elu'"),
    ("attention", {"feature_map": 3}, ValueError, "feature_map is 3, expected 'elu'"),
    ("attention", {"feature_map": as_array}, TypeError, "feature_map(x) is ndarray"),
    (
        "attention", {"feature_map": lambda x: x.mean(-1)}, ValueError,
        "feature_map(x) has shape (2, 5, 1)",
    ),
    (
        "attention heads", {"initial_state": shaped(B, H, N, P)}, ValueError,
        "initial_state has shape (2, 4, 2, 3), expected (2, 4, 2, 4)",
    ),
    ("attention keys", {"initial_state": as_double}, TypeError, "initial_state has dtype float64"),
    ("attention heads", {"prefix_k": None}, ValueError, "prefix_k is None, expected prefix_k and"),
    ("attention heads", {"prefix_v": None}, ValueError, "prefix_v is None, expected prefix_k and"),
    (
        "attention heads", {"prefix_k": shaped(B, 7, 1, 3)}, ValueError,
        "prefix_k has shape (2, 7, 1, 3), expected (2, 7, 1, 2)",
    ),
    (
        "attention heads", {"prefix_v": shaped(B, 6, H, P)}, ValueError,
        "prefix_v has shape (2, 6, 4, 3), expected (2, 7, 4, 3)",
    ),
    ("attention heads", {"prefix_k": torch.Tensor.half}, TypeError, "prefix_k has dtype float16"),
    ("attention packed", {"cu_seqlens": cu(0, 2)}, ValueError, "cu_seqlens"),
    ("attention", {"cu_seqlens": cu(0, L)}, ValueError, "v has batch 2, expected 1"),
    ("attention packed", {"causal": False, "decay": None}, ValueError, "cu_seqlens cannot be used"),
    # The delta rule.
    ("delta", {"beta": None}, TypeError, "beta is NoneType, expected a torch tensor"),
    ("delta", {"beta": shaped(B, L)}, ValueError, "beta has shape (2, 5), expected (2, 5, 4)"),
    ("delta", {"beta": as_double}, TypeError, "beta has dtype float64, expected it only where v"),
    ("delta", {"initial_state": shaped(1, H, N, P)}, ValueError, "initial_state has shape (1, 4"),
    ("delta keys", {"decay": shaped(N, H)}, ValueError, "decay has shape (2, 4)"),
    ("delta packed", {"cu_seqlens": cu(0)}, ValueError, "initial_state has shape (4, 4, 2, 3)"),
    # One token.
    ("attention step", {"state": as_array}, TypeError, "state is ndarray"),
    ("attention step", {"state": as_double}, TypeError, "state has dtype float64 but v has"),
    ("attention step", {"state": shaped(B, H, P, N)}, ValueError, "state has shape (2, 4, 3, 2)"),
    ("attention step", {"state": shaped(B, H, N)}, ValueError, "expected (S, H, N, P)"),
    (
        "attention step", {"state": shaped(3, H, N, P)}, ValueError,
        "state has 3 rows for a batch of 2, which needs state_batch_indices",
    ),
    ("attention step", {"decay": shaped(B, 3)}, ValueError, "decay has shape (2, 3), expected"),
    ("attention step", {"decay": as_double}, TypeError, "decay has dtype float64"),
    ("attention step", {"feature_map": "exp"}, ValueError, "feature_map is 'exp'"),
    ("attention step rows", {"state_batch_indices": cu(0)}, ValueError, "state_batch_indices has"),
    ("attention step rows", {"state_batch_indices": cu(5, 0)}, ValueError, "holds 5"),
    ("attention step rows", {"state_batch_indices": cu(1, 1)}, ValueError, "has row 1 twice"),
    (
        "attention step rows", {"state_batch_indices": torch.Tensor.float}, TypeError,
        "state_batch_indices has dtype float32",
    ),
    ("delta step", {"beta": shaped(B)}, ValueError, "beta has shape (2,), expected (2, 4)"),
    ("delta step", {"beta": 1.0}, TypeError, "beta is float, expected a torch tensor"),
    ("delta step", {"beta": as_double}, TypeError, "beta has dtype float64"),
    ("delta step rows", {"state_batch_indices": cu(-1, 5)}, ValueError, "holds 5"),
]  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad[0]}-{'-'.join(bad[1])}")
def test_bad_arguments_are_refused_by_name(bad, grad):
    case, changes, error, message = bad
    function, arguments = made(case, grad=grad)
    for name, value in changes.items():
        change = callable(value) and name != "feature_map"
        arguments[name] = value(arguments[name]) if change else value
    with pytest.raises(error, match=re.escape(message)) as caught:
        getattr(scan, NAMES[function])(**arguments)
    assert str(caught.value).startswith(f"[{NAMES[function]}]")


@pytest.mark.parametrize("name", ["linear_attention_update", "delta_rule_update"])
def test_decays_of_a_step_that_could_be_read_in_two_ways(name):
    def step(decay, b, h, n):
        q, v = torch.ones(b, 1, n), torch.ones(b, h, 1)
        state = torch.ones(b, h, n, 1)
        beta = [torch.zeros(b, h)] if name[0] == "d" else []
        getattr(scan, name)(state, q, 0 * q, v, *beta, decay=decay)
        return state[..., 0]

    by_head, by_key = torch.rand(2, 3), torch.rand(3, 4)
    assert torch.equal(step(by_head, 2, 3, 4), by_head[..., None].expand(2, 3, 4))
    assert torch.equal(step(by_key, 2, 3, 4), by_key.expand(2, 3, 4))
    with pytest.raises(ValueError, match=r"both \(B, H\) and \(H, N\)") as caught:
        step(torch.rand(3, 3), 3, 3, 3)
    assert str(caught.value).startswith(f"[{name}]")
    assert torch.equal(step(torch.full((1, 1), 0.5), 1, 1, 1), torch.full((1, 1, 1), 0.5))


@pytest.mark.parametrize("case", ["attention step rows", "delta step rows"])
def test_nothing_is_written_where_a_step_is_refused(case):
    function, arguments = made(case, grad=False)
    state = arguments["state"]
    before = state.clone()
    for rows in (cu(0, 9), cu(1, 1)):
        with pytest.raises(ValueError, match="state_batch_indices"):
            getattr(scan, NAMES[function])(**arguments | {"state_batch_indices": rows})
        assert torch.equal(state, before)


@each_case
def test_devices_without_a_kernel(case):
    class Elsewhere(torch.Tensor):
        """Says it is on another device, for which the dispatcher finds no kernel."""

        is_cpu = False
        device = torch.device("cuda", 0)

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, "namespace", "") == "pentad":
                raise NotImplementedError
            return super().__torch_function__(function, types, args, kwargs)

    function, arguments = made(case, grad=False)
    moved = {n: t.as_subclass(Elsewhere) if torch.is_tensor(t) else t for n, t in arguments.items()}
    with pytest.raises(pentad.DeviceError, match="there is no cuda kernel"):
        function(**moved)
    first = first_of(arguments)
    with pytest.raises(pentad.DeviceError, match="but"):
        function(**arguments | {first: moved[first]})


@each_case
def test_one_tensor_without_data_is_refused(case):
    function, arguments = made(case, grad=False)
    for name in leaves(made(case)[1]):
        with pytest.raises(pentad.DeviceError, match="meta") as caught:
            function(**arguments | {name: arguments[name].to("meta")})
        assert str(caught.value).startswith(f"[{NAMES[function]}]")


@pytest.mark.parametrize("name", NAMES.values())
def test_the_definitions_have_the_signatures_of_the_functions(name):
    assert name in scan.__all__
    signatures = [inspect.signature(getattr(module, name)) for module in (scan, reference)]
    assert signatures[0] == signatures[1]
