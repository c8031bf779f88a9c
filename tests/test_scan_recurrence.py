# SPDX-License-Identifier: Apache-2.0
"""The values and gradients of elementwise linear recurrences."""

import itertools
import random

import pytest

torch = pytest.importorskip("torch")

from scan_cases import (  # noqa: E402
    DTYPES,
    LAYOUTS,
    SPREADS,
    Problem,
    assert_gradcheck,
    assert_same_bits,
    check,
    dtype_name,
    views_of,
)

from pentad import scan  # noqa: E402
from pentad.scan import reference  # noqa: E402

LENGTHS = [0, 1, 2, 31, 32, 33, 63, 64, 65]
KINDS = [*DTYPES, torch.complex64]
kinds = pytest.mark.parametrize("dtype", KINDS, ids=dtype_name)


def recurrence_problem(
    dtype, shape=(2, 17, 40), a_shape=None, h0_shape=None, dim=-1, layout="contiguous", seed=0,
    a_dtype=None, **options,
):  # fmt: skip
    """Arguments of linear_recurrence: `h0_shape` is () for x's without `dim`, None for no h0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape, dtype):
        if not dtype.is_complex:
            return torch.randn(shape, generator=generator).to(dtype)
        parts = torch.randn(*shape, 2, generator=generator)
        return torch.view_as_complex(parts).to(dtype)

    a_dtype = a_dtype or dtype
    a = torch.rand(shape if a_shape is None else a_shape, generator=generator) * 1.02
    if a_dtype.is_complex:
        a = a * torch.exp(1j * 2 * draw(a.shape, torch.float32))
    if options.get("log_space"):
        a = a.log()
    inputs = {"a": a.to(a_dtype), "x": draw(shape, dtype)}
    if h0_shape is not None:
        rest = list(shape)
        del rest[dim]
        inputs["h0"] = draw(h0_shape or rest, dtype)
    inputs = views_of(inputs, layout) | {"dim": dim} | options
    return Problem("linear_recurrence", dtype, inputs, seed, SPREADS[layout])


# --- Sizes and options ----------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", [-1, 1])
def test_lengths(dtype, length, dim):
    for channels in (1, 3, 16, 40):
        shape = (2, channels, length) if dim == -1 else (2, length, channels)
        check(recurrence_problem(dtype, shape, h0_shape=(), dim=dim))
        check(recurrence_problem(dtype, shape, dim=dim), gradients=False)


@kinds
@pytest.mark.parametrize(("shape", "dim"), [((3, 1000), -1), ((1, 1000, 17), 1), ((1000,), 0)])
@pytest.mark.parametrize("constant", [False, True])
def test_long(dtype, shape, dim, constant):
    a_shape = [1 if i == dim % len(shape) and constant else s for i, s in enumerate(shape)]
    check(recurrence_problem(dtype, shape, a_shape, dim=dim, h0_shape=()))


@kinds
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("log_space", [False, True])
@pytest.mark.parametrize("h0_shape", [None, ()])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_options(dtype, reverse, log_space, h0_shape, layout):
    check(
        recurrence_problem(
            dtype, h0_shape=h0_shape, layout=layout, reverse=reverse, log_space=log_space
        )
    )


@kinds
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("log_space", [False, True])
@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize(
    "a_shape",
    [(1,), (9,), (1, 9), (12, 1), (3, 1, 1), (3, 12, 1), (1, 12, 9), (3, 1, 9), (3, 12, 9)],
)
def test_gates_are_broadcast(dtype, reverse, log_space, dim, a_shape):
    check(
        recurrence_problem(
            dtype, (3, 12, 9), a_shape, (), dim, reverse=reverse, log_space=log_space
        )
    )


@kinds
@pytest.mark.parametrize("h0_shape", [(1,), (9,), (12, 1), (3, 1, 1), (1, 12, 9), (3, 12, 9)])
def test_initial_states_are_broadcast(dtype, h0_shape):
    for dim, shape in ((-1, (3, 12, 9, 20)), (1, (3, 20, 12, 9))):
        check(recurrence_problem(dtype, shape, h0_shape=h0_shape, dim=dim))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_layout_is_that_of_the_input(rank):
    for order in itertools.permutations(range(rank)):
        x = torch.randn([2, 3, 4][:rank]).permute(order)
        for dim in range(rank):
            h = scan.linear_recurrence(torch.rand(()), x, dim=dim)
            assert h.stride() == x.stride()


@kinds
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -4, -3, -2, -1])
@pytest.mark.parametrize("layout", ["contiguous", "reversed_dims", "transposed", "repeated"])
def test_dims(dtype, dim, layout):
    check(recurrence_problem(dtype, (4, 5, 6, 7), h0_shape=(), dim=dim, layout=layout))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3)])
@pytest.mark.parametrize("dim", [0, -1])
def test_empty_sizes(shape, dim):
    check(recurrence_problem(torch.float32, shape, h0_shape=(), dim=dim))


@pytest.mark.parametrize("log_space", [False, True])
@pytest.mark.parametrize("a_shape", [None, (17, 1), (1,)])
def test_real_gates_of_complex_states(log_space, a_shape):
    check(
        recurrence_problem(
            torch.complex64, a_shape=a_shape, a_dtype=torch.float32, h0_shape=(),
            log_space=log_space,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=dtype_name)
@pytest.mark.parametrize("log_space", [False, True])
def test_double(dtype, log_space):
    check(recurrence_problem(dtype, h0_shape=(), log_space=log_space))


@kinds
@pytest.mark.parametrize("seed", range(12))
def test_every_level(isa, dtype, seed):
    rng = random.Random(seed)
    shape = [rng.randint(1, 3), rng.choice([3, 16, 33, 40]), rng.choice([1, 7, 16, 33, 70])]
    dim = rng.choice([-1, -2])
    a_shape = [s if rng.random() < 0.7 else 1 for s in shape]
    h0_shape = rng.choice([None, ()])
    options = {"reverse": rng.random() < 0.5, "log_space": rng.random() < 0.5}
    layout = rng.choice(LAYOUTS)
    check(recurrence_problem(dtype, shape, a_shape, h0_shape, dim, layout, seed, **options))


# --- The same in another way ----------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cuts", [[20], [1, 2, 33], [31, 32, 33], [0, 40]])
def test_pieces_with_a_carried_state_equal_the_whole(dtype, reverse, cuts):
    def by_pieces(a, x, h0, reverse, **options):
        pieces = list(itertools.pairwise([0, *cuts, x.shape[-1]]))
        hs, h = {}, h0
        for begin, end in pieces[::-1] if reverse else pieces:
            if begin == end:
                hs[begin, end] = x[..., :0]
                continue
            hs[begin, end] = scan.linear_recurrence(
                a[..., begin:end], x[..., begin:end], h, reverse=reverse, **options
            )
            h = hs[begin, end][..., 0 if reverse else -1]
        return torch.cat([hs[piece] for piece in pieces], -1)

    problem = recurrence_problem(dtype, (2, 5, 45), h0_shape=(), reverse=reverse)
    if dtype in (torch.bfloat16, torch.float16):  # what is carried is rounded
        check(problem, by_pieces, factor=2 * len(cuts) + 4)
    else:
        check(problem, by_pieces)


@kinds
def test_reverse_equals_flipped(dtype):
    def flipped(a, x, h0, dim, reverse):
        return scan.linear_recurrence(a.flip(dim), x.flip(dim), h0, dim=dim).flip(dim)

    for dim in (-1, 1):
        check(recurrence_problem(dtype, h0_shape=(), dim=dim, reverse=True), flipped)


@pytest.mark.parametrize("constant", [False, True])
def test_log_space_equals_the_exponential(constant):
    def exponential(a, x, h0, log_space, **options):
        return scan.linear_recurrence(a.exp(), x, h0, **options)

    for dtype in (torch.float32, torch.complex64):
        a_shape = (17, 1) if constant else None
        problem = recurrence_problem(dtype, a_shape=a_shape, h0_shape=(), log_space=True)
        check(problem, exponential, factor=3)


# --- Extreme numbers ------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("log_space", [False, True])
@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("constant", [False, True])
def test_gates_of_one_and_zero_are_exact(isa, dtype, log_space, dim, constant):
    x = torch.randint(-3, 4, (2, 33, 36)).to(dtype)  # sums that each dtype can hold
    a_shape = [1 if constant and i == dim % 3 else s for i, s in enumerate(x.shape)]
    one, zero = (0.0, -torch.inf) if log_space else (1.0, 0.0)
    for gate, want in ((one, x.cumsum(dim)), (zero, x)):
        a = torch.full(a_shape, gate).to(dtype)
        assert torch.equal(scan.linear_recurrence(a, x, dim=dim, log_space=log_space), want)


@kinds
@pytest.mark.parametrize("log_space", [False, True])
def test_gates_of_one_and_zero(dtype, log_space):
    """Among others, and their gradients: nothing is divided by a gate."""
    for a_shape in (None, (17, 1)):
        problem = recurrence_problem(dtype, a_shape=a_shape, h0_shape=(), log_space=log_space)
        a = problem.inputs["a"]
        a[..., 3, :] = -torch.inf if log_space else 0
        a[..., 5, :] = 0 if log_space else 1
        a[..., 7, 0] = -torch.inf if log_space else 0
        check(problem)


def test_gates_above_one():
    problem = recurrence_problem(torch.float32, (2, 17, 200), h0_shape=())
    problem.inputs["a"][0, 3] = 3.0
    results = check(problem, gradients=False)
    assert results["out0"][0, 3].isinf().any()
    assert results["out0"][0, 4].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("name", ["a", "x", "h0"])
def test_nan_reaches_what_depends_on_it_and_nothing_else(isa, dtype, dim, name):
    shape = (2, 21, 37) if dim == -1 else (2, 37, 21)
    problem = recurrence_problem(dtype, shape, h0_shape=(), dim=dim)
    problem.inputs[name][(1, 12, 20)[: problem.inputs[name].ndim]] = torch.nan
    ours = problem.results()
    plain = problem.results(reference.linear_recurrence)
    for key, got in ours.items():
        assert torch.equal(got.isnan(), plain[key].isnan()), key
    assert ours["out0"].isnan().any()


# --- Bits, derivatives ----------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("shape", "a_shape", "dim"),
    [
        ((2, 40, 70), None, -1),
        ((2, 70, 40), None, 1),
        ((2, 70, 90), (1, 90), 1),
        ((3, 17, 100), (17, 1), -1),
        ((1, 1, 1000), None, -1),
        ((1000, 2), (1,), 0),
    ],
)
def test_the_bits_do_not_depend_on_the_threads(threads, dtype, gradients, shape, a_shape, dim):
    problem = recurrence_problem(dtype, shape, a_shape, (), dim, log_space=True)
    assert_same_bits(problem, threads, gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=dtype_name)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("log_space", [False, True])
@pytest.mark.parametrize("a_shape", [None, (3, 1), (1,)])
def test_gradcheck(dtype, reverse, log_space, a_shape):
    options = {"reverse": reverse, "log_space": log_space}
    assert_gradcheck(recurrence_problem(dtype, (2, 3, 4), a_shape, (), **options))
    a_shape = a_shape and a_shape[::-1]
    assert_gradcheck(recurrence_problem(dtype, (2, 4, 3), a_shape, (3,), dim=1, **options))
