# SPDX-License-Identifier: Apache-2.0
"""One-token steps on caches: the state of a selective scan, the latest inputs of a convolution."""

import pytest

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
    reversed_dims,
    transposed,
)

from pentad import scan  # noqa: E402
from pentad.scan import reference  # noqa: E402

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


# --- State of a scan ------------------------------------------------------------------------------


def update_problem(dtype, shape, n=5, groups=0, rows=None, names=(), state_dtype=None, seed=0):
    """Arguments of selective_state_update; `shape` is (batch, channels) or (batch, heads, P)."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    batch, *channels = shape
    inputs = {
        "state": draw(batch if rows is None else 2 * batch + 1, *channels, n),
        "x": draw(*shape).to(dtype),
        "dt": draw(*shape).abs().to(dtype),
        "A": -draw(*channels, n).exp().to(wide),
        "B": draw(*shape[:1], *([groups] if groups else []), n).to(dtype),
        "C": draw(*shape[:1], *([groups] if groups else []), n).to(dtype),
    }
    inputs["state"] = inputs["state"].to(state_dtype or wide)
    if "D" in names:
        inputs["D"] = draw(*channels).to(wide)
    if "z" in names:
        inputs["z"] = draw(*shape).to(dtype)
    if "dt_bias" in names:
        inputs["dt_bias"] = draw(*channels).abs().to(wide)
    if "dt_softplus" in names:
        inputs["dt_softplus"] = True
    if rows is not None:
        inputs["state_batch_indices"] = torch.tensor(rows, dtype=torch.int32)
    return Problem("selective_state_update", dtype, inputs, seed)


def assert_gaps_untouched(view):
    memory = view.new_empty(0).set_(view.untyped_storage())
    assert memory.isnan().sum() == memory.numel() - view.numel()


UPDATE_NAMES = ("D", "z", "dt_bias", "dt_softplus")


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("shape", [(3, 17), (1, 40), (2, 3, 8), (2, 6, 5), (2, 1, 1)])
@pytest.mark.parametrize("n", [1, 5, 16, 33])
def test_state_update(dtype, gradients, shape, n):
    for names in ((), UPDATE_NAMES, *[(name,) for name in UPDATE_NAMES]):
        check(update_problem(dtype, shape, n, names=names), gradients=gradients)


@dtypes
@pytest.mark.parametrize("state_dtype", [torch.float32, *HALVES], ids=dtype_name)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_state_update_of_groups_and_state_dtypes(isa, dtype, state_dtype, groups):
    for shape in ((2, 6, 16), (2, 6, 3)):
        problem = update_problem(
            dtype, shape, 18, groups, names=UPDATE_NAMES, state_dtype=state_dtype
        )
        check(problem, gradients=False)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows", [[4, 0, 2], [-1, 6, -1], [-1, -1, -1], [0, 1, 2]])
@pytest.mark.parametrize("shape", [(3, 17), (3, 2, 8)])
def test_state_update_of_rows(gradients, rows, shape):
    problem = update_problem(torch.float32, shape, rows=rows, names=UPDATE_NAMES)
    results = check(problem, gradients=gradients)
    for b, row in enumerate(rows):
        if row < 0:
            assert not results["out0"][b].any()
    for row in set(range(7)) - set(rows):
        assert torch.equal(results["out1"][row], problem.inputs["state"][row])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("groups", [0, 1])
@pytest.mark.parametrize("shape", [(0, 17), (0, 2, 8), (3, 2, 0)])
def test_state_update_of_nothing(gradients, groups, shape):
    check(update_problem(torch.float32, shape, groups=groups), gradients=gradients)


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
def test_state_update_of_tied_heads(dtype, gradients):
    """A, dt, dt_bias and D have one number per head, expanded with stride 0."""
    problem = update_problem(dtype, (2, 3, 8), 16, 1, names=UPDATE_NAMES)
    inputs = problem.inputs
    inputs["A"] = inputs["A"][:, :1, :1].expand(3, 8, 16)
    for name in ("dt", "dt_bias", "D"):
        inputs[name] = inputs[name][..., :1].expand_as(inputs[name])
    check(problem, gradients=gradients)


@dtypes
def test_state_update_in_any_memory(dtype):
    problem = update_problem(dtype, (3, 4, 9), 5, 2, rows=[5, -1, 0], names=UPDATE_NAMES)
    tensors = {n: t for n, t in problem.inputs.items() if isinstance(t, torch.Tensor)}
    state = problem.inputs["state"].clone()
    want = scan.selective_state_update(**problem.inputs | {"state": state})
    for view in (transposed, reversed_dims, gaps):
        views = {n: view(t) for n, t in tensors.items() if t.is_floating_point()}
        got = scan.selective_state_update(**problem.inputs | views)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(views["state"], state)
    assert_gaps_untouched(views["state"])


def test_state_update_gives_the_same_bits_for_any_number_of_threads(threads):
    problem = update_problem(torch.float32, (5, 7, 24), 18, names=UPDATE_NAMES)
    assert_same_bits(problem, threads, gradients=False)


def test_gradcheck_of_the_state_update():
    problem = update_problem(torch.float64, (2, 2, 2), 2, 2, rows=[3, -1], names=UPDATE_NAMES)
    assert_gradcheck(problem)


# --- Latest inputs of a convolution ---------------------------------------------------------------


def conv_problem(
    dtype, width=4, d=17, l=1, state_length=None, rows=None, ring=None, bias=True,  # noqa: E741
    activation="silu", weight_dtype=None, rank=3, batch=3, seed=0,
):  # fmt: skip
    """Arguments of causal_conv1d_update; `ring` are cache_seqlens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    state_length = width - 1 if state_length is None else state_length
    inputs = {
        "x": draw(*(batch, d, l)[:rank]).to(dtype),
        "conv_state": draw(batch if rows is None else 2 * batch + 1, d, state_length).to(dtype),
        "weight": draw(d, width).to(weight_dtype or dtype),
        "bias": draw(d).to(weight_dtype or dtype) if bias else None,
        "activation": activation,
    }
    if rows is not None:
        inputs["conv_state_indices"] = torch.tensor(rows, dtype=torch.int32)
    if ring is not None:
        inputs["cache_seqlens"] = torch.tensor(ring, dtype=torch.int32)
    return Problem("causal_conv1d_update", dtype, inputs, seed)


RINGS = [None, [0, 1, 5], [7, 64, 2]]


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 16, 31, 64])
@pytest.mark.parametrize("ring", RINGS)
def test_conv_update(dtype, gradients, width, ring):
    for spare, length in ((0, 1), (1, 1), (4, 3), (1, 9)):
        problem = conv_problem(dtype, width, l=length, state_length=width - 1 + spare, ring=ring)
        results = check(problem, gradients=gradients)
        if width + spare > 1:
            exact = problem.results(problem.function_of(reference), gradients=False)["out1"]
            assert torch.equal(results["out1"], exact)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows", [[4, 0, 2], [-1, 6, -1], [-1, -1, -1], [0, 1, 2]])
@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("rank", [2, 3])
def test_conv_update_of_rows(gradients, rows, ring, rank):
    problem = conv_problem(torch.float32, rows=rows, ring=ring, state_length=5, rank=rank)
    results = check(problem, gradients=gradients)
    for b, row in enumerate(rows):
        if row < 0:
            assert not results["out0"][b].any()
    for row in set(range(7)) - set(rows):
        assert torch.equal(results["out1"][row], problem.inputs["conv_state"][row])


@dtypes
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_conv_update_options(isa, dtype, weight_dtype, bias, activation):
    for d in (1, 8, 40):
        check(
            conv_problem(
                dtype, d=d, weight_dtype=weight_dtype, bias=bias, activation=activation, rank=2
            ),
            gradients=False,
        )


@dtypes
@pytest.mark.parametrize("ring", RINGS)
def test_conv_update_in_any_memory(dtype, ring):
    problem = conv_problem(dtype, l=2, state_length=6, rows=[5, -1, 0], ring=ring)
    tensors = {n: t for n, t in problem.inputs.items() if isinstance(t, torch.Tensor)}
    state = problem.inputs["conv_state"].clone()
    want = scan.causal_conv1d_update(**problem.inputs | {"conv_state": state})
    for view in (transposed, reversed_dims, gaps):
        views = {n: view(t) for n, t in tensors.items() if t.is_floating_point()}
        got = scan.causal_conv1d_update(**problem.inputs | views)
        torch.testing.assert_close(got, want)
        assert torch.equal(views["conv_state"], state)
    assert_gaps_untouched(views["conv_state"])


@dtypes
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("state_length", [3, 4, 6])
def test_conv_steps_equal_the_convolution(dtype, ring, state_length):
    """Pieces of several lengths, from an empty cache."""

    def by_steps(x, weight, bias, activation):
        state, outs, begin = x.new_zeros(*x.shape[:2], state_length), [], 0
        for length in (1, 1, 3, 1, 7, 2):
            piece = x[..., begin : begin + length]
            positions = torch.full((x.shape[0],), begin, dtype=torch.int32) if ring else None
            outs.append(
                scan.causal_conv1d_update(
                    piece, state, weight, bias, activation=activation, cache_seqlens=positions
                )
            )
            begin += length
        return torch.cat(outs, -1)

    inputs = conv_problem(dtype, l=15).inputs
    del inputs["conv_state"]
    check(Problem("causal_conv1d", dtype, inputs), by_steps)


def test_conv_update_gives_the_same_bits_for_any_number_of_threads(threads):
    assert_same_bits(conv_problem(torch.float32, d=70, l=3), threads, gradients=False)


def test_gradcheck_of_the_conv_update():
    assert_gradcheck(conv_problem(torch.float64, d=2, l=2, state_length=4, rows=[3, -1, 1]))
    assert_gradcheck(conv_problem(torch.float64, d=2, l=1, state_length=4, ring=[0, 5, 7]))
