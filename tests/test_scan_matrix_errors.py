# SPDX-License-Identifier: Apache-2.0
"""What the recurrences whose state is a matrix refuse, and how they say so."""

import re

import pytest

import pentad

torch = pytest.importorskip("torch")

from matrix_api_cases import CASES, NAMES, B, H, L, N, P, first_of, made  # noqa: E402
from scan_api_cases import leaves  # noqa: E402

from pentad import scan  # noqa: E402

each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The problems here are smaller than the waking of a thread."""
    threads(1)


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
    ("attention", {"scale": None}, TypeError, "scale is NoneType, expected a number"),
    # The delta rule.
    ("delta", {"scale": "big"}, TypeError, "scale is str, expected a number"),
    ("delta", {"beta": None}, TypeError, "beta is NoneType, expected a torch tensor"),
    ("delta", {"beta": shaped(B, L)}, ValueError, "beta has shape (2, 5), expected (2, 5, 4)"),
    ("delta", {"beta": as_double}, TypeError, "beta has dtype float64, expected it only where v"),
    ("delta", {"initial_state": shaped(1, H, N, P)}, ValueError, "initial_state has shape (1, 4"),
    ("delta keys", {"decay": shaped(N, H)}, ValueError, "decay has shape (2, 4)"),
    ("delta packed", {"cu_seqlens": cu(0)}, ValueError, "initial_state has shape (4, 4, 2, 3)"),
    # One token.
    ("attention step", {"scale": None}, TypeError, "scale is NoneType, expected a number"),
    ("delta step", {"scale": None}, TypeError, "scale is NoneType, expected a number"),
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
