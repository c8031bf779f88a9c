# SPDX-License-Identifier: Apache-2.0
"""The functions of `pentad.scan` as their callers see them: errors, gradients, autocast."""

import re

import numpy as np
import pytest

import pentad

torch = pytest.importorskip("torch")

from scan_api_cases import (  # noqa: E402
    CASES,
    HALF,
    SEQ_IDX,
    B,
    D,
    G,
    L,
    N,
    S,
    W,
    complex_of,
    conv_step,
    leaves,
    made,
    state_step,
    total,
    value_and_gradients,
    wide_of,
)

from pentad.scan import _kernels  # noqa: E402

each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The problems here are smaller than the waking of a thread."""
    threads(1)


# --- Gradients ------------------------------------------------------------------------------------


@each_case
def test_gradcheck(case):
    function, arguments = made(case, torch.float64)
    names, tensors = zip(*leaves(arguments).items(), strict=True)

    def call(*given):
        return function(**arguments | dict(zip(names, given, strict=True)))

    assert torch.autograd.gradcheck(call, tensors, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64])
@each_case
def test_results_and_gradients_have_the_dtypes_of_the_inputs(case, dtype):
    if dtype in HALF and case in ("recurrence complex", "scan complex matrices"):
        pytest.skip("complex numbers are float32 or float64")
    function, arguments = made(case, dtype)
    result = function(**arguments)
    given = leaves(arguments)
    for leaf, grad in zip(
        given.values(), torch.autograd.grad(total(result), list(given.values())), strict=True
    ):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
    out = result[0] if isinstance(result, tuple) else result
    like = next(arguments[n] for n in ("before", "x", "u", "delta") if n in arguments)
    assert out.dtype == like.dtype
    if function in (state_step, conv_step):
        assert result[1].dtype == next(iter(arguments.values())).dtype
    elif isinstance(result, tuple) and function is S.selective_scan:
        is_complex = arguments["A"].is_complex()
        assert result[1].dtype == (complex_of if is_complex else wide_of)(dtype)


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


@pytest.mark.parametrize("case", ["scan all", "scan packed", "conv states", "step", "conv step"])
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


@each_case
def test_a_second_derivative_is_refused_and_never_silently_zero(case):
    function, arguments = made(case)
    given = list(leaves(arguments).values())
    first = torch.autograd.grad(total(function(**arguments)), given, create_graph=True)
    loss = sum(torch.view_as_real(g).pow(2).sum() if g.is_complex() else g.pow(2).sum()
               for g in first)  # fmt: skip
    for leaf in given:
        with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
            torch.autograd.grad(loss, leaf, retain_graph=True, allow_unused=True)


@each_case
def test_no_graph_where_none_is_wanted(case):
    function, arguments = made(case)

    def results():
        result = function(**arguments)
        return result if isinstance(result, tuple) else (result,)

    assert all(part.requires_grad for part in results())
    with torch.no_grad():
        without = results()
        assert not any(part.requires_grad for part in without)
    with torch.inference_mode():
        assert all(part.is_inference() for part in results())
    rough = 1e-5
    torch.testing.assert_close(
        without, tuple(part.detach() for part in results()), rtol=rough, atol=rough
    )


def test_inputs_changed_after_the_forward_are_noticed():
    for case, name in (("scan", "delta"), ("recurrence", "a"), ("conv", "x")):
        function, arguments = made(case)
        changed = arguments[name] * 1
        out = function(**arguments | {name: changed})
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_torch_func_grad():
    for case in ("scan all", "recurrence", "conv states"):
        function, arguments = made(case, torch.float64)
        names, tensors = zip(*leaves(arguments).items(), strict=True)

        def loss(*given):
            return total(function(**arguments | dict(zip(names, given, strict=True))))  # noqa: B023

        got = torch.func.grad(loss, tuple(range(len(names))))(*(t.detach() for t in tensors))
        torch.testing.assert_close(got, value_and_gradients(function, arguments)[1:])


@each_case
def test_forward_mode_is_refused_and_never_silently_zero(case):
    function, arguments = made(case, grad=False)
    for name, leaf in leaves(made(case)[1]).items():
        if (function, name) == (S.attention_matrix, "u"):
            continue  # a factor outside of the kernels
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(arguments[name], torch.ones_like(leaf))
            with pytest.raises(NotImplementedError, match="forward mode AD"):
                function(**arguments | {name: dual})


def test_gradients_of_gates_are_summed_in_float32():
    """A sum of 4096 ones in bfloat16 would stop at 256."""
    a, h0 = (torch.zeros(1, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    out = S.linear_recurrence(a, ones, h0)
    da, dh0 = torch.autograd.grad(out.sum(), (a, h0))
    assert da.item() == 64 * 63
    assert dh0.item() == 0
    (dh0,) = torch.autograd.grad(S.linear_recurrence(a + 1, ones[:, :1], h0).sum(), h0)
    assert dh0.item() == 64


def test_the_gradient_of_a_constant_gate_takes_no_memory_over_time():
    a, x, h0 = torch.rand(1, 3, 1), torch.randn(2, 3, 50), torch.randn(1, 3)
    written = _kernels.empty_recurrence_gradients(a, x, h0, (True, False, True))
    assert [None if t is None else t.shape for t in written] == [(2, 3, 1), None, (2, 3)]
    summed = _kernels.recurrence_gradients(written, a, h0)
    assert [t.shape for t in summed] == [a.shape, h0.shape]


# --- Autocast -------------------------------------------------------------------------------------


def test_autocast_takes_the_widest_dtype():
    function, arguments = made("scan all", grad=False)
    want = function(**arguments)
    mixed = arguments | {n: arguments[n].bfloat16() for n in ("delta", "B", "z")}
    with pytest.raises(TypeError, match=r"delta has dtype bfloat16 but u has float32"):
        function(**mixed)
    with torch.autocast("cpu", torch.bfloat16):
        got = function(**mixed)
        assert got[0].dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
        assert torch.equal(function(**arguments)[0], want[0])
        half = {n: t.bfloat16() if torch.is_tensor(t) else t for n, t in arguments.items()}
        assert function(**half)[0].dtype == torch.bfloat16
    rounded = arguments | {n: mixed[n].float() for n in ("delta", "B", "z")}
    torch.testing.assert_close(got, function(**rounded), rtol=0, atol=0)


def test_autocast_of_constant_matrices_and_complex_ones():
    with torch.autocast("cpu", torch.bfloat16):
        function, arguments = made("scan constants", torch.bfloat16)
        assert function(**arguments).dtype == torch.bfloat16
        function, arguments = made("scan complex", torch.bfloat16)
        matrices = {n: torch.randn(B, N, L, dtype=torch.complex64) for n in ("B", "C")}
        assert function(**arguments | matrices).dtype == torch.float32


def test_autocast_of_the_steps_and_of_the_recurrence():
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        function, arguments = made("step")
        mixed = arguments | {n: arguments[n].bfloat16() for n in ("dt", "B", "C")}
        torch.testing.assert_close(
            function(**mixed),
            function(**arguments | {n: mixed[n].float() for n in ("dt", "B", "C")}),
        )
        function, arguments = made("conv step")
        out, _ = function(**arguments | {"x": arguments["x"].bfloat16()})
        assert out.dtype == torch.bfloat16
        want, _ = function(**arguments | {"x": arguments["x"].bfloat16().float()})
        assert torch.equal(out, want.bfloat16())
        a, x = torch.rand(D, L).bfloat16(), torch.randn(D, L)
        assert torch.equal(S.linear_recurrence(a, x), S.linear_recurrence(a.float(), x))
        initial = torch.randn(B, D, W - 1)
        x = torch.randn(B, D, L).bfloat16()
        weight = torch.randn(D, W)
        assert torch.equal(
            S.causal_conv1d(x, weight, initial_states=initial),
            S.causal_conv1d(x, weight, initial_states=initial.bfloat16()),
        )


# --- Errors ---------------------------------------------------------------------------------------


def changed(case, grad=False, **changes):
    """A call of `case` with some arguments replaced: a shape is a tensor of zeros."""

    def call():
        function, arguments = made(case, grad=grad)
        for name, value in changes.items():
            value = torch.zeros(value) if isinstance(value, tuple) else value
            arguments[name] = value(arguments[name]) if callable(value) else value
        return function(**arguments)

    return call


def as_double(t):
    return t.double()


def as_array(t):
    return t.detach().numpy()


BAD = {
    "u array": ("scan", {"u": as_array}, TypeError, "u is ndarray, expected a torch tensor"),
    "u integer": ("scan", {"u": lambda t: t.int()}, TypeError, "u has dtype int32"),
    "u rank": ("scan", {"u": (D, L)}, ValueError, "u has shape (4, 5), expected (B, D, L)"),
    "delta dtype": ("scan", {"delta": as_double}, TypeError, "delta has dtype float64 but u has"),
    "delta shape": ("scan", {"delta": (B, D, 4)}, ValueError, "delta has shape (2, 4, 4)"),
    "z shape": ("scan all", {"z": (B, 3, L)}, ValueError, "z has shape (2, 3, 5)"),
    "A shape": ("scan", {"A": (3, N)}, ValueError, "A has shape (3, 3), expected (4, N)"),
    "A without states": ("scan", {"A": (D, 0)}, ValueError, "N at least 1"),
    "A double": ("scan", {"A": as_double}, TypeError, "A has dtype float64"),
    "B groups": (
        "scan", {"B": (B, 3, N, L)}, ValueError,
        "B has 3 groups but D = 4 channels are not a multiple of 3",
    ),
    "C groups": ("scan", {"C": (B, G, N, L)}, ValueError, "C has 2 groups but B has 1"),
    "B shape": ("scan", {"B": (B, N, 4)}, ValueError, "B has shape (2, 3, 4), expected (2, 3, 5)"),
    "B rank": ("scan", {"B": (B,)}, ValueError, "expected (4, 3), (2, 3, 5) or (2, G, 3, 5)"),
    "B dtype": ("scan", {"B": lambda t: t.half()}, TypeError, "B has dtype float16 but u has"),
    "B constant shape": ("scan", {"B": (N, D)}, ValueError, "B has shape (3, 4), expected (4, 3)"),
    "B complex": (
        "scan", {"B": lambda t: t.to(torch.complex64)}, TypeError, "B has dtype complex64 but A is"
    ),
    "B not in pairs": ("scan complex", {"B": (B, N, L)}, ValueError, "expected (2, 3, 10)"),
    "D shape": ("scan all", {"D": (3,)}, ValueError, "D has shape (3,), expected (4,)"),
    "D double": ("scan all", {"D": as_double}, TypeError, "D has dtype float64"),
    "bias None-like": ("scan all", {"delta_bias": 0.5}, TypeError, "delta_bias is float"),
    "state shape": ("scan all", {"initial_state": (1, D, N)}, ValueError, "initial_state has"),
    "state double": ("scan all", {"initial_state": as_double}, TypeError, "initial_state has"),
    "cu dtype": ("scan packed", {"cu_seqlens": (4,)}, TypeError, "cu_seqlens has dtype float32"),
    "cu batch": ("scan", {"cu_seqlens": torch.tensor([0, 5])}, ValueError, "u has batch 2"),
    "cu end": ("scan packed", {"cu_seqlens": torch.tensor([0, 3, 3, 4])}, ValueError, "cu_seqlens"),
    "cu descends": (
        "scan packed", {"cu_seqlens": torch.tensor([0, 4, 3, 5])}, ValueError, "cu_seqlens"
    ),
    "x integer": ("recurrence", {"x": lambda t: t.long()}, TypeError, "x has dtype int64"),
    "a dtype": ("recurrence", {"a": as_double}, TypeError, "a has dtype float64 but x has float32"),
    "a complex": (
        "recurrence", {"a": lambda t: t.to(torch.complex64)}, TypeError, "a has dtype complex64"
    ),
    "a shape": ("recurrence", {"a": (3, 1)}, ValueError, "a has shape (3, 1), expected one that"),
    "a too long": ("recurrence", {"x": (D, L)}, ValueError, "a has shape (2, 4, 5)"),
    "h0 shape": ("recurrence all", {"h0": (5,)}, ValueError, "h0 has shape (5,)"),
    "h0 list": ("recurrence all", {"h0": [0.0]}, TypeError, "h0 is list"),
    "dim": ("recurrence", {"dim": 3}, ValueError, "dim is 3, expected -3 to 2"),
    "dim type": ("recurrence", {"dim": "time"}, TypeError, "dim is str"),
    "x number": ("recurrence", {"x": torch.tensor(1.0)}, ValueError, "x has shape ()"),
    "conv rank": ("conv", {"x": (D, L)}, ValueError, "x has shape (4, 5)"),
    "weight shape": ("conv", {"weight": (3, W)}, ValueError, "weight has shape (3, 3)"),
    "weight rank": ("conv", {"weight": (D, 1, W)}, ValueError, "weight has shape (4, 1, 3)"),
    "weight wide": ("conv", {"weight": (D, 65)}, ValueError, "width 65, expected 1 to 64"),
    "weight double": ("conv", {"weight": as_double}, TypeError, "weight has dtype float64"),
    "bias shape": ("conv silu", {"bias": (3,)}, ValueError, "bias has shape (3,)"),
    "activation": ("conv", {"activation": "relu"}, ValueError, "activation is 'relu'"),
    "initial shape": ("conv states", {"initial_states": (B, D, W)}, ValueError, "initial_states"),
    "initial dtype": ("conv states", {"initial_states": as_double}, TypeError, "initial_states"),
    "seq_idx dtype": ("conv", {"seq_idx": SEQ_IDX.long()}, TypeError, "seq_idx has dtype int64"),
    "seq_idx shape": ("conv", {"seq_idx": SEQ_IDX[:1]}, ValueError, "seq_idx has shape (1, 5)"),
    "seq_idx descends": (
        "conv", {"seq_idx": torch.tensor([[0, 1, -1, 0, 2]] * B, dtype=torch.int32)}, ValueError,
        "seq_idx descends",
    ),
    "seq_idx and states": (
        "conv states", {"seq_idx": SEQ_IDX}, ValueError, "initial_states cannot be used"
    ),
    "conv cu": ("conv", {"cu_seqlens": torch.tensor([0, 5])}, ValueError, "x has batch 2"),
    "conv cu end": ("conv packed", {"cu_seqlens": torch.tensor([0, 3, 3, 9])}, ValueError, "cu_"),
    "step state": ("step", {"state": lambda t: t[0]}, ValueError, "state has shape (4, 3)"),
    "step state batch": (
        "step", {"state": lambda t: t[:1]}, ValueError, "which needs state_batch_indices"
    ),
    "step x": ("step", {"before": (B, 3)}, ValueError, "x has shape (2, 3), expected (2, 4)"),
    "step x None": ("step", {"before": None}, TypeError, "x is NoneType"),
    "step dt": ("step", {"dt": as_double}, TypeError, "dt has dtype float64 but x has float32"),
    "step dt None": ("step", {"dt": None}, TypeError, "dt is NoneType"),
    "step A": ("step", {"A": (D, 2)}, ValueError, "A has shape (4, 2), expected (4, 3)"),
    "step A double": ("step", {"A": as_double}, TypeError, "A has dtype float64"),
    "step B": ("step", {"B": (B, 2)}, ValueError, "B has shape (2, 2), expected"),
    "step C dtype": ("step", {"C": as_double}, TypeError, "C has dtype float64"),
    "step groups": (
        "step", {"B": (B, 3, N), "C": (B, 3, N)}, ValueError,
        "B has 3 groups but 4 channels are not a multiple of 3",
    ),
    "step heads": (
        "step heads", {"B": (B, 3, N), "C": (B, 3, N)}, ValueError,
        "B has 3 groups but 2 heads are not a multiple of 3",
    ),
    "step D": ("step heads", {"D": (D,)}, ValueError, "D has shape (4,), expected (2, 2)"),
    "step rows": (
        "step groups", {"state_batch_indices": torch.tensor([3, 0])}, ValueError,
        "state_batch_indices holds 3",
    ),
    "step rows twice": (
        "step groups", {"state_batch_indices": torch.tensor([1, 1])}, ValueError, "row 1 twice"
    ),
    "step rows shape": (
        "step groups", {"state_batch_indices": torch.tensor([1])}, ValueError, "has shape (1,)"
    ),
    "conv step state": (
        "conv step", {"conv_state": (B, D, 1)}, ValueError, "conv_state has shape (2, 4, 1)"
    ),
    "conv step dtype": (
        "conv step", {"conv_state": as_double}, TypeError, "conv_state has dtype float64 but x has"
    ),
    "conv step x": ("conv step", {"x": (D,)}, ValueError, "x has shape (4,), expected (B, D) or"),
    "conv step weight": ("conv step", {"weight": (3, W)}, ValueError, "weight has shape (3, 3)"),
    "conv step width": ("conv step", {"weight": (D, 0)}, ValueError, "width 0, expected 1 to 64"),
    "conv step positions": (
        "conv ring", {"cache_seqlens": torch.tensor([-1, 0])}, ValueError, "cache_seqlens holds -1"
    ),
    "conv step rows": (
        "conv steps", {"conv_state_indices": torch.tensor([5, 0])}, ValueError,
        "conv_state_indices holds 5",
    ),
    "matrix reduce": ("matrix", {"reduce": "max"}, ValueError, "reduce is 'max'"),
    "matrix delta": ("matrix", {"delta": (D, L)}, ValueError, "delta has shape (4, 5)"),
    "matrix A": ("matrix", {"A": as_double}, TypeError, "expected it only where delta has"),
    "matrix B dtype": ("matrix", {"B": as_double}, TypeError, "float64 but delta has float32"),
    "matrix D": ("matrix all", {"D": as_double}, TypeError, "expected it only where delta has"),
    "matrix u": ("matrix all", {"u": (B, D, 3)}, ValueError, "u has shape (2, 4, 3)"),
    "matrix B": ("matrix", {"B": (B, 3, N, L)}, ValueError, "B has 3 groups"),
}  # fmt: skip
NAMES = {
    S.selective_scan: "selective_scan",
    S.linear_recurrence: "linear_recurrence",
    S.causal_conv1d: "causal_conv1d",
    state_step: "selective_state_update",
    conv_step: "causal_conv1d_update",
    S.attention_matrix: "attention_matrix",
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused_by_name(what):
    case, changes, error, message = BAD[what]
    with pytest.raises(error, match=re.escape(message)) as caught:
        changed(case, **changes)()
    assert str(caught.value).startswith(f"[{NAMES[made(case)[0]]}]")


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused_where_gradients_are_needed(what):
    case, changes, error, message = BAD[what]
    with pytest.raises(error, match=re.escape(message)) as caught:
        changed(case, grad=True, **changes)()
    assert str(caught.value).startswith(f"[{NAMES[made(case)[0]]}]")


def test_nothing_is_written_where_a_step_is_refused():
    state = torch.ones(3, D, N)
    _, arguments = made("step groups", grad=False)
    arguments |= {"state": state, "state_batch_indices": torch.tensor([0, 3])}
    x = arguments.pop("before")
    with pytest.raises(ValueError, match="holds 3"):
        S.selective_state_update(arguments.pop("state"), x, **arguments)
    assert torch.equal(state, torch.ones(3, D, N))


def test_numpy_arrays_are_no_tensors():
    with pytest.raises(TypeError, match="expected a torch tensor"):
        S.linear_recurrence(np.zeros(3), np.zeros(3))


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
    first = next(n for n in ("before", "x", "u", "delta") if n in arguments)
    moved = {n: t.as_subclass(Elsewhere) if torch.is_tensor(t) else t for n, t in arguments.items()}
    with pytest.raises(pentad.DeviceError, match="there is no cuda kernel"):
        function(**moved)
    with pytest.raises(pentad.DeviceError, match="but"):
        function(**arguments | {first: moved[first]})


@each_case
def test_one_tensor_without_data_is_refused(case):
    function, arguments = made(case, grad=False)
    for name in leaves(made(case)[1]):
        with pytest.raises(pentad.DeviceError, match="meta") as caught:
            function(**arguments | {name: arguments[name].to("meta")})
        assert str(caught.value).startswith(f"[{NAMES[function]}]")


def test_the_public_names():
    assert S.__all__ == [
        "attention_matrix", "causal_conv1d", "causal_conv1d_update", "delta_rule",
        "delta_rule_update", "kernels", "linear_attention", "linear_attention_update",
        "linear_recurrence", "long_conv", "scan2d", "scan2d_wavefront", "selective_scan",
        "selective_state_update", "ssd", "ssd_attention_matrix",
    ]  # fmt: skip
    assert "scan" in pentad.__all__
    assert "scan" in dir(pentad)
