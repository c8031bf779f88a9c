# SPDX-License-Identifier: Apache-2.0
"""The functions of `pentad.scan` as torch sees them: tracing, layouts, steps in place."""

import pytest

torch = pytest.importorskip("torch")

from scan_api_cases import (  # noqa: E402
    CASES,
    B,
    D,
    L,
    N,
    S,
    W,
    grown,
    is_number,
    made,
    total,
    value_and_gradients,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from pentad.scan.autograd import few_rows_linear  # noqa: E402

each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The problems here are smaller than the waking of a thread."""
    threads(1)


# --- Tracing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@each_case
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

    @torch.compile(fullgraph=True, backend=count)
    def function(x, weight, delta, A, B, C):
        x = S.causal_conv1d(x, weight, activation="silu")
        return S.selective_scan(x, delta, A, B, C, delta_softplus=True)

    A, weight = -torch.rand(D, N), torch.randn(D, W)
    for batch, length in ((2, 5), (3, 40), (4, 33), (5, 64)):
        x, delta = grown(batch, D, length), grown(batch, D, length)
        Bs, Cs = grown(batch, N, length), grown(batch, N, length)
        got = function(x, weight, delta, A, Bs, Cs)
        want = S.causal_conv1d(x, weight, activation="silu")
        want = S.selective_scan(want, delta, A, Bs, Cs, delta_softplus=True)
        torch.testing.assert_close(got, want)
        got.sum().backward()
    assert count.frame_count <= 3


def test_compiles_under_autocast():
    torch._dynamo.reset()
    for case in ("scan all", "step", "recurrence", "matrix"):
        function, arguments = made(case, grad=False)
        mixed = {
            n: t.bfloat16() if n in ("delta", "dt", "B", "a") else t for n, t in arguments.items()
        }

        def call(**arguments):
            with torch.autocast("cpu", torch.bfloat16):
                return function(**arguments)  # noqa: B023

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**mixed), call(**mixed))


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, x, weight, delta, A):
            x = S.causal_conv1d(x, weight)
            return S.selective_scan(x, delta, A, A, A) + S.linear_recurrence(delta, x)

    arguments = (torch.randn(B, D, L), torch.randn(D, W), torch.rand(B, D, L), -torch.rand(D, N))
    program = torch.export.export(Model(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Model()(*arguments))


class _Caught(TorchDispatchMode):
    """Keeps the calls of the family's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pentad":
            self.calls.append(
                (function, tuple(a.detach().clone() if torch.is_tensor(a) else a for a in args))
            )
        return function(*args, **kwargs or {})


@each_case
def test_opcheck(case):
    function, arguments = made(case)
    with _Caught() as caught:
        total(function(**arguments)).backward()
        with torch.no_grad():
            function(**arguments)
    names = {str(operator) for operator, _ in caught.calls}
    assert any("backward" in name for name in names)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    if case != "scan packed":  # whose stored states have gaps that nobody writes or reads
        checks += ("test_aot_dispatch_dynamic",)
    for operator, given in {str(o): (o, given) for o, given in caught.calls}.values():
        torch.library.opcheck(operator, given, test_utils=checks)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_a_projection(rows, dtype):
    weight, bias = torch.randn(5, 2 * D, dtype=dtype)[:, :D], torch.randn(5, dtype=dtype)
    for x in (torch.randn(rows, D, dtype=dtype), torch.randn(D, rows, dtype=dtype).T):
        torch.library.opcheck(few_rows_linear, (x, weight, bias))
        torch.library.opcheck(few_rows_linear, (x, weight, None))


@each_case
def test_fake_and_meta_tensors_give_what_real_ones_give(case):
    from torch._subclasses import FakeTensorMode

    function, arguments = made(case, grad=False)
    real = function(**arguments)
    real = real if isinstance(real, tuple) else (real,)
    results = []
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(t) if torch.is_tensor(t) else t for n, t in arguments.items()}
        results.append(function(**fake))
    meta = {n: t.to("meta") if torch.is_tensor(t) else t for n, t in arguments.items()}
    results.append(function(**meta))
    for result in results:
        result = result if isinstance(result, tuple) else (result,)
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


def _strided(t):
    roomy = torch.full([n * 3 for n in t.shape], 1.0, dtype=t.dtype)
    return roomy[tuple(slice(1, None, 3) for _ in t.shape)].copy_(t)


def _reversed_dims(t):
    order = tuple(reversed(range(t.ndim)))
    return t.permute(order).contiguous().permute(order)


VIEWS = {
    "reversed dims": _reversed_dims,
    "strided": _strided,
    "offset": lambda t: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape),
    "negated": lambda t: (-t)._neg_view(),
    "conjugated": lambda t: t.conj().clone().conj() if t.is_complex() else t,
    "parameter": lambda t: torch.nn.Parameter(t),
}


@pytest.mark.parametrize("view", VIEWS)
@each_case
def test_tensors_of_every_make(case, view):
    function, arguments = made(case, torch.float64, grad=False)
    viewed = {n: VIEWS[view](t) if is_number(t) else t for n, t in arguments.items()}
    results = []
    for given in (arguments, viewed):
        given = {n: t.detach().requires_grad_() if is_number(t) else t for n, t in given.items()}
        results.append(value_and_gradients(function, given))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@each_case
def test_expanded_inputs_and_gradients(case):
    function, arguments = made(case, torch.float64, grad=False)
    base = {
        n: t.narrow(0, 0, 1).clone().requires_grad_()
        for n, t in arguments.items()
        if is_number(t) and t.ndim and n not in ("state", "conv_state")
    }
    views = {n: t.expand(arguments[n].shape) for n, t in base.items()}
    copies = {n: t.contiguous() for n, t in views.items()}
    results = []
    for given in (views, copies):
        result = function(**arguments | given)
        loss = result[0] if isinstance(result, tuple) else result
        loss = loss.real.sum() if loss.is_complex() else loss.sum()  # a gradient of zero strides
        results.append((loss, *torch.autograd.grad(loss, list(base.values()))))
    torch.testing.assert_close(*results)


def test_the_layout_of_the_results_follows_the_input():
    channels_last = torch.randn(B, L, D).transpose(1, 2)
    half = torch.randn(B, L, 2 * D).transpose(1, 2).chunk(2, 1)[1]
    A, matrix, weight = -torch.rand(D, N), torch.randn(B, N, L), torch.randn(D, W)
    delta = torch.rand(B, D, L)
    for function in (
        lambda x: S.selective_scan(x, delta, A, matrix, matrix),
        lambda x: S.causal_conv1d(x, weight, activation="silu"),
    ):
        for x in (channels_last, half):
            x = x.detach().requires_grad_()
            out = function(x)
            assert out.transpose(1, 2).is_contiguous()
            torch.testing.assert_close(out, function(x.contiguous()))
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert grad.transpose(1, 2).is_contiguous()
        assert function(torch.randn(B, D, L)).is_contiguous()
        assert function(_strided(torch.randn(B, D, L))).is_contiguous()
    out = S.linear_recurrence(channels_last, channels_last)
    assert out.transpose(1, 2).is_contiguous()


def test_gradients_of_matrices_have_their_states_side_by_side():
    function, arguments = made("scan groups")
    grads = torch.autograd.grad(total(function(**arguments)), [arguments["B"], arguments["C"]])
    assert all(grad.transpose(2, 3).is_contiguous() for grad in grads)


def test_empty_sizes():
    for b, length in ((0, 3), (2, 0), (0, 0)):
        u = grown(b, D, length)
        matrix = torch.randn(b, N, length)
        state = grown(b, D, N)
        out, last = S.selective_scan(
            u, u, -torch.rand(D, N), matrix, matrix, initial_state=state, return_last_state=True
        )
        assert out.shape == (b, D, length)
        if not length:
            assert torch.equal(last, state)
        (out.sum() + last.sum()).backward()
        assert state.grad.shape == state.shape
        assert S.attention_matrix(u, -torch.rand(D, N), matrix, matrix).shape == (b, length, length)
        assert S.linear_recurrence(u, u, torch.randn(b, D)).shape == u.shape
        before = torch.randn(b, D, W - 1)
        out, final = S.causal_conv1d(
            u, torch.randn(D, W), initial_states=before, return_final_states=True
        )
        assert out.shape == u.shape
        if not length:
            assert torch.equal(final, before)


def test_packed_sequences_that_are_empty():
    u = torch.randn(1, D, 0)
    out, last = S.selective_scan(
        u, u, -torch.rand(D, N), u.new_zeros(1, N, 0), u.new_zeros(1, N, 0),
        cu_seqlens=torch.tensor([0, 0, 0]), return_last_state=True,
    )  # fmt: skip
    assert out.shape == u.shape
    assert torch.equal(last, torch.zeros(2, D, N))
    out, last = S.selective_scan(
        u, u, -torch.rand(D, N), u.new_zeros(1, N, 0), u.new_zeros(1, N, 0),
        cu_seqlens=torch.tensor([0]), return_last_state=True,
    )  # fmt: skip
    assert last.shape == (0, D, N)


# --- Steps in place -------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", ["step", "step heads", "step groups", "conv step", "conv steps"])
def test_compiled_steps_change_the_cache_in_place(case, dynamic):
    torch._dynamo.reset()
    _, arguments = made(case, grad=False)
    state, x, *rest = arguments.values()
    names = list(arguments)[2:]
    rest = dict(zip(names, rest, strict=True))

    def call(state, x, **rest):
        if case.startswith("conv"):
            return S.causal_conv1d_update(x, state, **rest)
        return S.selective_state_update(state, x, **rest)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    states = [state.clone(), state.clone()]
    for _ in range(3):
        got, want = compiled(states[0], x, **rest), call(states[1], x, **rest)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*states)
    assert not torch.equal(states[0], state)


def test_a_step_counts_as_a_change():
    for case in ("step", "conv step"):
        _, arguments = made(case, grad=False)
        first, second, *rest = arguments.values()
        rest = dict(zip(list(arguments)[2:], rest, strict=True))
        leaf = torch.ones_like(first, requires_grad=True)
        out = (leaf * first).sum()
        version = first._version
        if case == "step":
            S.selective_state_update(first, second, **rest)
        else:
            S.causal_conv1d_update(second, first, **rest)
        assert first._version == version + 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_steps_work_in_inference_mode():
    with torch.inference_mode():
        for case in ("step", "conv step"):
            function, arguments = made(case)
            assert function(**arguments)[0].is_inference()


def test_parameters_of_half_precision_are_converted():
    function, arguments = made("step", grad=False)
    small = {n: arguments[n].bfloat16() for n in ("A", "D", "dt_bias")}
    torch.testing.assert_close(
        function(**arguments | small),
        function(**arguments | {n: t.float() for n, t in small.items()}),
    )
    function, arguments = made("scan all", grad=False)
    small = {n: arguments[n].bfloat16() for n in ("A", "D", "delta_bias", "initial_state")}
    torch.testing.assert_close(
        function(**arguments | small),
        function(**arguments | {n: t.float() for n, t in small.items()}),
    )


# --- Steps of microseconds, which do without the dispatcher where nobody looks --------------------


def _token():
    torch.manual_seed(0)
    shapes = (2, 3, 4, 5), (2, 3, 4), (2, 3, 4), (2, 3, 5)
    return [torch.randn(shape) for shape in shapes]


def _same_step(arguments, expected_out, expected_state):
    torch.testing.assert_close(S.linear_attention_update(*arguments), expected_out)
    torch.testing.assert_close(arguments[0], expected_state)


@pytest.fixture
def stepped():
    """(out, state) of the step of `_token`."""
    state, *others = _token()
    return S.linear_attention_update(state, *others), state


def test_a_step_shows_itself_to_modes(stepped):
    with _Caught() as caught:
        _same_step(_token(), *stepped)
    assert [f.name() for f, _ in caught.calls] == ["pentad::matrix_update"]


def test_a_step_shows_itself_to_function_modes(stepped):
    class Seen(torch.overrides.TorchFunctionMode):
        names = ()

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names += (str(function),)
            return function(*args, **kwargs or {})

    with Seen() as seen:
        _same_step(_token(), *stepped)
    assert any("matrix_update" in name for name in seen.names)


def test_a_step_shows_itself_to_the_profiler(stepped):
    with torch.profiler.profile() as profile:
        _same_step(_token(), *stepped)
    assert "pentad::matrix_update" in [event.name for event in profile.events()]


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_step_is_traced(stepped, pre_dispatch):
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(state, q, k, v):
        return S.linear_attention_update(state, q, k, v)

    graph = make_fx(step, pre_dispatch=pre_dispatch)(*_token())
    assert "matrix_update" in graph.code
    arguments = _token()
    torch.testing.assert_close(graph(*arguments), stepped[0])
    torch.testing.assert_close(arguments[0], stepped[1])


def test_a_step_reads_what_is_lazily_negated(stepped):
    for i in range(1, 4):
        arguments = _token()
        arguments[i] = (-arguments[i])._neg_view()
        _same_step(arguments, *stepped)


def test_a_step_changes_the_version_of_its_state():
    for mode in (torch.no_grad, torch.enable_grad):
        arguments = _token()
        with mode():
            S.linear_attention_update(*arguments)
        assert arguments[0]._version == 1
    with torch.inference_mode():
        assert S.linear_attention_update(*_token()).is_inference()


def test_a_step_has_no_batching_rule():
    state, q, k, v = _token()
    with pytest.raises(RuntimeError, match="matrix_update"):
        torch.func.vmap(S.linear_attention_update)(*(t[:, None] for t in (state, q, k, v)))
