# SPDX-License-Identifier: Apache-2.0
"""The values and gradients of the selective scan, its one-token step and its matrix."""

import itertools
import random

import pytest

torch = pytest.importorskip("torch")

from scan_cases import (  # noqa: E402
    ALL,
    DTYPES,
    HALVES,
    LAYOUTS,
    SCAN_OPTIONS,
    Problem,
    assert_gradcheck,
    assert_same_bits,
    check,
    dtype_name,
    possible,
    scan_problem,
)

from pentad import scan  # noqa: E402
from pentad.scan import reference  # noqa: E402

LENGTHS = [0, 1, 2, 31, 32, 33, 63, 64, 65]
DIMS = [1, 3, 16, 17, 40]
STATES = [1, 2, 3, 4, 5, 8, 16, 18, 33]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
PAIRS = list(itertools.combinations(SCAN_OPTIONS, 2))


def sampled(what, count, *key):
    return random.Random(repr(key)).sample(what, count)


# --- Sizes ----------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(dtype, length):
    for names in (ALL, ("complex", *ALL), ("packed", "reverse", *ALL)):
        d, n = (sampled(of, 1, dtype_name(dtype), length, names)[0] for of in (DIMS, STATES))
        check(scan_problem(dtype, names, d=d, n=n, l=length))


@dtypes
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("states", STATES)
def test_sizes(dtype, dim, states):
    (length,) = sampled([1, 5, 31, 33], 1, dtype_name(dtype), dim, states)
    names = sampled([ALL, (), ("z", "complex")], 1, dtype_name(dtype), dim, states)[0]
    check(scan_problem(dtype, names, d=dim, n=states, l=length))


@dtypes
@pytest.mark.parametrize(("b", "dim"), [(1, 1), (1, 3), (2, 17)])
def test_long(dtype, b, dim):
    """Little else to run in parallel but time."""
    names = ("delta_softplus", "z", "initial_state", "last_state")
    check(scan_problem(dtype, names, b=b, d=dim, n=4, l=1000))


@pytest.mark.parametrize("names", [("complex", "last_state"), ("packed", *ALL), ("reverse", *ALL)])
def test_long_with_options(names):
    check(scan_problem(torch.float32, names, b=1, d=3, n=5, l=1000))


@pytest.mark.parametrize("sizes", [(0, 3, 2, 5), (2, 0, 2, 5), (2, 3, 2, 0)])
def test_empty_sizes(sizes):
    b, d, n, length = sizes
    check(scan_problem(torch.float32, ALL, b, d, n, length))


def test_no_sequences():
    problem = scan_problem(torch.float32, ("packed", "initial_state"), l=0, d=3)
    problem.inputs |= {
        "cu_seqlens": torch.zeros(1, dtype=torch.int64),
        "initial_state": torch.zeros(0, 3, 5),
        "return_last_state": True,
    }
    out, last = scan.selective_scan(**problem.inputs)
    assert out.shape == (1, 3, 0)
    assert last.shape == (0, 3, 5)


# --- Options --------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("name", ["", *SCAN_OPTIONS])
def test_each_option(dtype, name):
    problem = scan_problem(dtype, possible([name], dtype))
    check(problem)
    check(problem, gradients=False)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_option_pairs(pair):
    half = HALVES[PAIRS.index(pair) % 2]
    check(scan_problem(torch.float32, possible(pair, torch.float32)))
    check(scan_problem(half, (*possible(pair, half), "last_state"), d=3, l=33, seed=1))


@pytest.mark.parametrize("seed", range(24))
def test_many_options(seed):
    rng = random.Random(seed)
    names = [name for name in SCAN_OPTIONS if rng.random() < 0.6]
    sizes = {
        "b": rng.randint(1, 3),
        "d": 3 * rng.choice([1, 2, 6, 7, 11]),
        "n": rng.choice(STATES),
        "l": rng.choice([1, 7, 32, 33, 65]),
        "layout": rng.choice(LAYOUTS),
    }
    for dtype in DTYPES:
        check(scan_problem(dtype, possible(names, dtype), seed=seed, **sizes))


@dtypes
@pytest.mark.parametrize(
    "names",
    [(), ("grouped", *ALL), ("complex", *ALL), ("constant_B", "packed", "reverse")],
)
def test_every_level(isa, dtype, names):
    check(scan_problem(dtype, names, d=21, n=5, l=35))
    check(scan_problem(dtype, names, d=48, n=16, l=34, layout="transformers"))


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [("grouped"), ("complex",), ("reverse",)])
def test_layouts(dtype, layout, names):
    check(scan_problem(dtype, (*names, *ALL), b=2, d=18, l=37, layout=layout))


@pytest.mark.parametrize("names", [(), ALL, ("complex",), ("complex_BC", "packed", *ALL)])
def test_double(names):
    check(scan_problem(torch.float64, names))


def test_parameters_are_converted():
    problem = scan_problem(torch.float32, ALL)
    for name in ("A", "D", "delta_bias"):
        problem.inputs[name] = problem.inputs[name].bfloat16()
    results = check(problem)
    for name in ("A", "D", "delta_bias"):
        assert results[f"d{name}"].dtype == torch.bfloat16


# --- The same in another way ----------------------------------------------------------------------


def by_steps(**given):
    """The scan as a loop of one-token steps."""
    u, A = given["u"], given["A"]
    B, C = given["B"], given["C"]
    state = given["initial_state"].clone()
    D, z, bias = (given.get(name) for name in ("D", "z", "delta_bias"))
    outs = [
        scan.selective_state_update(
            state, u[..., t], given["delta"][..., t], A, B[..., t], C[..., t], D,
            None if z is None else z[..., t], bias, given["delta_softplus"],
        )
        for t in range(u.shape[2])
    ]  # fmt: skip
    return torch.stack(outs, -1), state


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
def test_steps_equal_the_scan(dtype, gradients):
    check(scan_problem(dtype, ALL, d=17, l=13), by_steps, gradients=gradients)
    if dtype == torch.float32:
        check(scan_problem(dtype, (*ALL, "complex_BC"), d=3, l=7), by_steps, gradients=gradients)


@pytest.mark.parametrize("cuts", [[20, 40], [1, 2, 33, 40], [31, 32, 33], [0, 40]])
@pytest.mark.parametrize("names", [ALL, ("complex_BC", "reverse", *ALL)])
def test_pieces_with_a_carried_state_equal_the_whole(names, cuts):
    def by_pieces(u, delta, A, B, C, z, initial_state, reverse=False, **options):
        ends = [0, *cuts, u.shape[2]]
        outs, state = {}, initial_state
        pieces = list(itertools.pairwise(ends))
        for begin, end in pieces[::-1] if reverse else pieces:
            u_, delta_, B_, C_, z_ = (t[..., begin:end] for t in (u, delta, B, C, z))
            outs[begin, end], state = scan.selective_scan(
                u_, delta_, A, B_, C_, z=z_, initial_state=state, reverse=reverse, **options
            )
        return torch.cat([outs[piece] for piece in pieces], -1), state

    check(scan_problem(torch.float32, names, l=45), by_pieces)


@pytest.mark.parametrize("names", [("grouped"), ("complex_BC",), ("reverse",)])
def test_packed_sequences_equal_separate_calls(names):
    def one_by_one(u, delta, A, B, C, z, initial_state, cu_seqlens, **options):
        outs, states = [], []
        for s, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            u_, delta_, B_, C_, z_ = (t[..., begin:end] for t in (u, delta, B, C, z))
            out, state = scan.selective_scan(
                u_, delta_, A, B_, C_, z=z_, initial_state=initial_state[s : s + 1], **options
            )
            outs.append(out)
            states.append(state)
        return torch.cat(outs, -1), torch.cat(states)

    problem = scan_problem(torch.float32, (*names, "packed", *ALL), l=70)
    check(problem)
    check(problem, one_by_one)


@pytest.mark.parametrize("ends", [[0, 0, 50, 50, 50], [0, 32, 50], [0, 1, 2, 3, 50], [0, 31, 50]])
def test_empty_and_short_sequences(ends):
    problem = scan_problem(torch.float32, ("packed", "complex", *ALL), l=50)
    problem.inputs["cu_seqlens"] = torch.tensor(ends, dtype=torch.int64)
    shape = len(ends) - 1, *problem.inputs["A"].shape
    problem.inputs["initial_state"] = torch.randn(shape, dtype=torch.complex64)
    results = check(problem)
    for s, (begin, end) in enumerate(itertools.pairwise(ends)):
        if begin == end:
            assert torch.equal(results["out1"][s], problem.inputs["initial_state"][s])


@pytest.mark.parametrize("names", [ALL, ("complex_BC", *ALL), ("grouped", "constant_C", *ALL)])
def test_reverse_equals_flipped(names):
    def flipped(u, delta, A, B, C, z, reverse, **options):
        u, delta, z = (t.flip(-1) for t in (u, delta, z))
        B, C = (m.flip(-1) if m.ndim > 2 else m for m in (B, C))
        out, state = scan.selective_scan(u, delta, A, B, C, z=z, **options)
        return out.flip(-1), state

    check(scan_problem(torch.float32, ("reverse", *names), l=45), flipped)


# --- Extreme numbers ------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("names", [(), ("complex",)])
@pytest.mark.parametrize("length", [5, 70])
def test_decays_of_one_and_zero(dtype, names, length):
    problem = scan_problem(dtype, (*names, "initial_state", "last_state"), d=17, l=length)
    A = problem.inputs["A"]
    A[:, 0] = 0
    A[3] = 0
    A[4] = -1e30
    A[:, 1] = -1e30  # exp gives 0, and so are the gradients
    results = check(problem)
    assert not results["dA"][:, 1].any()
    assert not results["dA"][4].any()
    assert not results["dinitial_state"][:, :, 1].any()


@dtypes
@pytest.mark.parametrize("names", [(), ("complex",)])
@pytest.mark.parametrize("length", [5, 70])
def test_decays_of_one_and_zero_are_exact(isa, dtype, names, length):
    problem = scan_problem(dtype, names, d=17, n=4, l=length)
    u, A = (problem.inputs[name] for name in "uA")
    u = torch.randint(-3, 4, u.shape).to(dtype)  # sums that each dtype can hold
    delta, ones = torch.ones_like(u), torch.ones_like(A)
    C = ones / (8 if names else 4)
    assert torch.equal(scan.selective_scan(u, delta, 0 * ones, ones, C), u.cumsum(-1))
    assert torch.equal(scan.selective_scan(u, delta, -1e30 * ones, ones, C), u)


@dtypes
def test_infinite_decay_rates(dtype):
    problem = scan_problem(dtype, ("initial_state", "last_state"), d=17, n=3)
    problem.inputs["A"][:, 1] = -torch.inf
    problem.inputs["delta"].add_(0.01)
    check(problem, gradients=False)


@dtypes
@pytest.mark.parametrize("names", [(), ("complex",)])
@pytest.mark.parametrize("value", [1000.0, 3e4, 20.0, 21.0, 89.0, -30.0, -1000.0])
def test_large_steps(dtype, names, value):
    """softplus is the identity where exp overflows, and forgets everything at once (A < 0)."""
    problem = scan_problem(dtype, (*names, *ALL), d=17, l=40)
    before = problem.results(gradients=False)
    delta = problem.inputs["delta"]
    delta[:, 3, 7] = value
    delta[:, 5, 20:] = value
    delta[:, 16] = value
    after = check(problem)
    rest = [c for c in range(17) if c not in (3, 5, 16)]
    for name, was in before.items():
        assert torch.equal(after[name][:, rest], was[:, rest])


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize("length", [3, 40])
def test_growth_without_bound(value, length):
    """A > 0: the states overflow to what the definition gives."""
    problem = scan_problem(torch.float32, ("initial_state", "last_state"), d=17, n=1, l=length)
    problem.inputs["A"].fill_(0.01)
    problem.inputs["A"][4] = 1.0
    problem.inputs["delta"].fill_(0.1)
    problem.inputs["delta"][:, 4, 1] = 1000.0
    problem.inputs["initial_state"][:, 4] = value
    results = check(problem, gradients=False)
    assert (results["out1"][:, 4] == value * torch.inf).all()
    del problem.inputs["initial_state"]
    problem.inputs["delta"][:, 4, 0] = 1000.0
    results = check(problem, gradients=False)  # inf times the state 0
    assert results["out0"][:, 4].isnan().all()
    rest = [c for c in range(17) if c != 4]
    assert results["out0"][:, rest].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("u", (1, 4, 20)),
        ("delta", (0, 20, 33)),
        ("A", (4, 2)),
        ("B", (1, 2, 4, 31)),
        ("C", (0, 1, 3, 7)),
        ("D", (6,)),
        ("z", (1, 6, 32)),
        ("delta_bias", (20,)),
        ("initial_state", (1, 9, 1)),
    ],
)
def test_nan_reaches_what_depends_on_it_and_nothing_else(isa, name, where, bad):
    names = ("grouped", *ALL)
    problem = scan_problem(torch.float32, names, b=2, d=21, n=5, l=45)
    problem.inputs[name][where] = bad
    for gradients in (False, True):
        ours = problem.results(gradients=gradients)
        plain = problem.results(reference.selective_scan, gradients=gradients)
        for key, got in ours.items():
            if gradients and bad == torch.inf and key[0] == "d":
                continue  # infinities cancel to nan in either, and not at the same places
            assert torch.equal(got.isfinite(), plain[key].isfinite()), key
    assert not ours["out0"].isfinite().all()
    assert ours["out0"][0, 3].isfinite().all()


# --- Bits, derivatives ----------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (ALL, (2, 40, 5, 130)),
        (("grouped", "reverse", *ALL), (1, 66, 16, 70)),
        (("packed", *ALL), (1, 17, 3, 200)),
        (("complex", *ALL), (2, 18, 4, 70)),
        (ALL, (1, 1, 2, 1000)),
    ],
)
def test_the_bits_do_not_depend_on_the_threads(threads, dtype, gradients, names, sizes):
    problem = scan_problem(dtype, names, *sizes)
    assert_same_bits(problem, threads, gradients)


@pytest.mark.parametrize(
    "names",
    [
        (),
        ALL,
        ("reverse", "grouped", *ALL),
        ("packed", *ALL),
        ("complex", *ALL),
        ("complex_BC", "packed", *ALL),
        ("constant_B", "constant_C", "complex", "last_state"),
        ("constant_C", "grouped", *ALL),
    ],
)
def test_gradcheck(names):
    assert_gradcheck(scan_problem(torch.float64, names, b=1, d=3, n=2, l=4))


# (rtol, atol) that mamba_ssm accepts of its own scan against its float32 reference.
PUBLISHED = {
    torch.float32: (6e-4, 2e-3),
    torch.bfloat16: (3e-2, 5e-2),
    torch.float16: (3e-3, 5e-3),
}


@dtypes
@pytest.mark.parametrize("names", [("grouped"), ("complex",), ("initial_state",)])
def test_published_tolerances(dtype, names):
    names = (*names, "D", "z", "delta_bias", "delta_softplus", "last_state")
    problem = scan_problem(dtype, names, b=2, d=6, n=8, l=372)
    for name in ("delta", "delta_bias"):
        problem.inputs[name].uniform_(0, 0.5)
    if not problem.inputs["A"].is_complex():
        problem.inputs["A"].uniform_(-0.5, 0)
    ours = problem.results()
    want = problem.results(reference.selective_scan, double=True)
    rtol, atol = PUBLISHED[dtype]
    weights = max(rtol, 1e-3), max(atol, 1e-3)
    limits = {
        "out0": (rtol, atol),
        "out1": (rtol, atol),
        "du": (2 * rtol, 2 * atol),
        "dz": (rtol, atol),
        "ddelta": (5 * rtol, 10 * atol),
        "dA": (weights[0], 5 * weights[1]),
        "dB": (rtol, atol),
        "dC": (rtol, atol),
        "dD": weights,
        "ddelta_bias": weights,
        "dinitial_state": (rtol, atol),
    }
    for name, got in ours.items():
        torch.testing.assert_close(
            got.to(want[name].dtype), want[name], rtol=limits[name][0], atol=limits[name][1],
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


# --- The matrix -----------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("reduce", [None, "mean", "sum", "abs", "norm"])
@pytest.mark.parametrize(
    "names", [(), ("D", "z", "delta_bias", "delta_softplus"), ("complex", "reverse", "grouped")]
)
@pytest.mark.parametrize("with_u", [False, True])
def test_attention_matrix(dtype, reduce, names, with_u):
    given = dict(scan_problem(dtype, names, d=6, n=3, l=11).inputs)
    u = given.pop("u")
    inputs = {**given, "reduce": reduce, **({"u": u} if with_u else {})}
    check(Problem("attention_matrix", dtype, inputs))


@pytest.mark.parametrize("names", [("D", "z"), ("complex", "reverse"), ("constant_B",)])
def test_attention_matrix_gives_the_scan(names):
    given = dict(scan_problem(torch.float32, names, d=6, n=3, l=70).inputs)
    want = scan.selective_scan(**given)
    u = given.pop("u")
    alpha = scan.attention_matrix(**given, reduce=None)
    assert alpha.shape == (2, 6, 70, 70)
    torch.testing.assert_close(torch.einsum("bdts,bds->bdt", alpha, u), want)
    future = torch.ones(70, 70).triu(1).bool()
    assert not alpha[..., future.T if "reverse" in names else future].any()
    shares = scan.attention_matrix(**given, u=u, reduce="sum")
    torch.testing.assert_close(shares.sum(-1), want.sum(1))
