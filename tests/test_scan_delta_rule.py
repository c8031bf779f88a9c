# SPDX-License-Identifier: Apache-2.0
"""The values and gradients of the delta rule, with and without decay, and its one-token step."""

import itertools
import random

import pytest

torch = pytest.importorskip("torch")

from matrix_cases import (  # noqa: E402
    DECAYS,
    DELTA_OPTIONS,
    LAYOUTS,
    LENGTH,
    assert_bad_number_stays,
    assert_past_is_forgotten,
    assert_rows_are_used,
    assert_updates_in_any_memory,
    delta_problem,
    flipped,
    halves_of,
    in_pieces,
    linear_possible,
    one_by_one,
    past_and_present,
    sampled,
    steps_of,
    update_problem,
    with_decays,
)
from scan_cases import (  # noqa: E402
    DTYPES,
    HALVES,
    assert_gradcheck,
    assert_same_bits,
    check,
    dtype_name,
)

from pentad import scan  # noqa: E402

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
PAIRS = [
    pair
    for pair in itertools.combinations(DELTA_OPTIONS, 2)
    if len(linear_possible(pair)) == 2 and "log_space" not in pair
]
ALL = ("decay_step", "log_space", "scale", "initial", "grouped")
BY_KEY = ("decay_key_step", "scale", "initial", "grouped")
PACKED_BACKWARDS = ("packed", "reverse", "decay_step", "initial", "grouped")


# --- Sizes ----------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 127, 200])
def test_lengths(dtype, length):
    several = (ALL, BY_KEY, PACKED_BACKWARDS, ("initial",))
    for names in several if dtype == torch.float32 else sampled(several, 2, str(dtype), length):
        n, p = (sampled(of, 1, dtype_name(dtype), length, names)[0] for of in ((3, 16), (1, 8)))
        check(delta_problem(dtype, names, l=length, h=2, p=p, n=n))


@pytest.mark.parametrize("n", [1, 2, 7, 16, 17, 33, 64, 130])
@pytest.mark.parametrize("decay", ["decay_step", "decay_key_step"])
def test_sizes(n, decay):
    for p in sampled([1, 3, 8, 16, 31, 64], 3, n, decay):
        dtype = sampled(DTYPES, 1, n, p, decay)[0]
        several = [(1, 2, 1), (2, 3, 3), (1, 4, 2)] if n < 40 else [(1, 1, 1), (1, 2, 2)]
        b, h, groups = sampled(several, 1, n, p, decay)[0]
        check(delta_problem(dtype, (decay, "initial", "grouped"), b, 66, h, p, n, groups))


@pytest.mark.parametrize("decay", [None, "decay_head", "decay_key"])
def test_a_long_sequence(decay):
    check(delta_problem(torch.float32, (decay, "initial"), 1, 600, 1, 3, 4, 1))


@pytest.mark.parametrize("sizes", [(0, 3, 2, 5), (2, 0, 2, 5), (2, 3, 0, 5)])
def test_empty_sizes(sizes):
    b, length, h, p = sizes
    check(delta_problem(torch.float32, BY_KEY, b, length, h, p, groups=1))


@pytest.mark.parametrize("ends", [[0], [0, 0, 0]])
def test_packed_sequences_without_steps(ends):
    problem = delta_problem(torch.float32, ("packed",), l=0)
    problem.inputs["cu_seqlens"] = torch.tensor(ends, dtype=torch.int64)
    out, last = scan.delta_rule(**problem.inputs)
    assert out.shape == (1, 0, 4, 5)
    assert torch.equal(last, torch.zeros(len(ends) - 1, 4, 6, 5))


# --- Options --------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("name", ["", "no_last", *DELTA_OPTIONS])
def test_each_option(dtype, name):
    problem = delta_problem(dtype, [name])
    check(problem)
    check(problem, gradients=False)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_option_pairs(pair):
    names = pair
    if PAIRS.index(pair) % 3 == 0 and set(pair) & set(DECAYS):
        names = (*pair, "log_space")
    half = halves_of(PAIRS.index(pair))
    check(delta_problem(torch.float32, names, h=2))
    check(delta_problem(half, ("no_last", *names), 1, 33, 4, 3, seed=1))


@pytest.mark.parametrize("seed", range(12))
def test_many_options(seed):
    rng = random.Random(seed)
    names = rng.sample(DELTA_OPTIONS, len(DELTA_OPTIONS))
    names = linear_possible([name for name in names if rng.random() < 0.6])
    sizes = {
        "b": rng.randint(1, 3),
        "h": rng.choice([2, 4, 6]),
        "p": rng.choice([1, 5, 16, 20]),
        "n": rng.choice([1, 6, 16, 19]),
        "l": rng.choice([1, 7, 64, 66]),
        "layout": rng.choice(list(LAYOUTS)),
    }
    for dtype in DTYPES:
        check(delta_problem(dtype, names, seed=seed, **sizes))


@dtypes
@pytest.mark.parametrize("names", [ALL, BY_KEY, ("reverse",)])
def test_every_level(isa, dtype, names):
    check(delta_problem(dtype, names, 1, 66, 1, 21, 19, 1))
    if dtype == torch.float32:
        check(delta_problem(dtype, names, 1, 66, 2, 16, 32, layout="columns"))


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout):
    several = (ALL, BY_KEY, ("decay_head", "reverse"))
    for names in several if dtype == torch.float32 else sampled(several, 1, str(dtype), layout):
        check(delta_problem(dtype, names, l=67, layout=layout))


@pytest.mark.parametrize("names", [(), ALL, BY_KEY, PACKED_BACKWARDS])
def test_double(names):
    check(delta_problem(torch.float64, names))


@pytest.mark.parametrize("decay", DECAYS)
def test_gates_and_states_are_converted(decay):
    problem = delta_problem(torch.float32, (decay, "initial"))
    for name in ("beta", "decay", "initial_state"):
        problem.inputs[name] = problem.inputs[name].bfloat16()
    results = check(problem)
    for name in ("beta", "decay", "initial_state"):
        assert results[f"d{name}"].dtype == torch.bfloat16


# --- The same in another way ----------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, "decay_step"])
def test_the_definition_against_the_triangular_system(decay):
    """u = (I + tril(beta (Gamma o K K^T), -1))^-1 beta V, out = tril(Gamma o Q K^T) u, with
    Gamma_ts the decays after step s up to t (arXiv 2406.06484, section 3.2; 2412.06464, section
    3.3)."""

    def solved(q, k, v, beta, decay=None, log_space=False):
        q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], 2).double() for t in (q, k))
        decay = torch.ones_like(beta) if decay is None else decay
        sums = decay.double().log().cumsum(1).transpose(1, 2)
        decays = (sums[..., :, None] - sums[..., None, :]).exp().tril()
        keys = torch.einsum("bthn,bshn->bhts", k, k) * decays * beta.mT[..., None]
        rows = torch.eye(v.shape[1]) + keys.tril(-1)
        values = (beta[..., None] * v).double().transpose(1, 2)
        u = torch.linalg.solve_triangular(rows, values, upper=False, unitriangular=True)
        return torch.einsum("bthn,bshn,bhts,bhsp->bthp", q, k, decays, u).to(v.dtype)

    problem = delta_problem(torch.float32, ("no_last", "grouped", decay), l=70)
    check(problem, solved)
    check(problem)


def test_what_was_written_is_read():
    """With beta 1 and keys of length 1, the value of a key is what it was last written to be."""
    basis = torch.linalg.qr(torch.randn(8, 8))[0]
    order = torch.randint(8, (70,))
    k = basis[order][None, :, None]
    v = torch.randn(1, 70, 1, 5)
    out, last = scan.delta_rule(k, k, v, torch.ones(1, 70, 1), return_final_state=True)
    torch.testing.assert_close(out, v, rtol=1e-4, atol=1e-5)
    newest = torch.stack([torch.nonzero(order == i)[-1, 0] for i in range(8)])
    torch.testing.assert_close(basis @ last[0, 0], v[0, newest, 0], rtol=1e-4, atol=1e-5)


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("decay", [None, *DECAYS])
def test_steps_equal_the_whole(dtype, gradients, decay):
    problem = delta_problem(dtype, ("initial", "scale", "grouped", decay), l=11)
    check(problem, steps_of(scan.delta_rule_update), gradients=gradients)


@pytest.mark.parametrize("cuts", [[20, 40], [1, 2, 63, 64, 65], [64], [0, 75]])
@pytest.mark.parametrize("names", [ALL, BY_KEY, ("reverse", "initial")])
def test_pieces_with_a_carried_state_equal_the_whole(names, cuts):
    def by_pieces(**given):
        return in_pieces(scan.delta_rule, given, cuts)

    check(delta_problem(torch.float32, names), by_pieces)


@pytest.mark.parametrize("names", [ALL, ("reverse", *BY_KEY)])
@pytest.mark.parametrize("ends", [None, [0, 0, 70, 70, 75], [0, 64, 75], [0, 1, 2, 3, 75]])
def test_packed_sequences_equal_separate_calls(names, ends):
    problem = delta_problem(torch.float32, (*names, "packed"))
    if ends is not None:
        problem.inputs["cu_seqlens"] = torch.tensor(ends, dtype=torch.int64)
        problem.inputs["initial_state"] = torch.randn(len(ends) - 1, 4, 6, 5)
    results = check(problem)
    check(problem, lambda **given: one_by_one(scan.delta_rule, given))
    for s, (begin, end) in enumerate(itertools.pairwise(ends or [])):
        if begin == end:
            assert torch.equal(results["out1"][s], problem.inputs["initial_state"][s])


@pytest.mark.parametrize("names", [ALL, BY_KEY, ("decay_key", "initial"), ()])
def test_reverse_equals_flipped(names):
    problem = delta_problem(torch.float32, ("reverse", *names))
    check(problem, lambda **given: flipped(scan.delta_rule, given))


# --- Extreme numbers ------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [5, LENGTH])
def test_decays_of_zero_and_one(dtype, decay, length):
    problem = delta_problem(dtype, (decay, "initial", "grouped"), l=length, n=7)
    check(with_decays(problem, [0.0, 1.0]))


@pytest.mark.parametrize("decay", DECAYS)
def test_negative_decays(decay):
    problem = delta_problem(torch.float32, (decay, "initial"), n=7)
    check(with_decays(problem, [-0.9, -1.0, 0.95, -0.3], 1))
    check(with_decays(problem, [-0.9, 0.0, 1.0, 1e-30], 2))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [40, 150])
def test_strong_decays_beside_mild_ones(decay, length):
    problem = delta_problem(torch.float32, (decay, "log_space", "initial"), l=length, n=7)
    check(with_decays(problem, [-100.0, -1e-6, -40.0], 5))
    check(with_decays(problem, [-torch.inf, -100.0, 0.0], 7))


@pytest.mark.parametrize("decay", [None, "decay_step", "decay_key_step"])
def test_reflections(decay):
    """beta up to 2: eigenvalues of I - beta k k^T down to -1 (arXiv 2411.12537)."""
    problem = delta_problem(torch.float32, (decay, "initial"))
    problem.inputs["beta"].mul_(2)
    problem.inputs["beta"][:, ::5] = 2.0
    check(problem)


@dtypes
@pytest.mark.parametrize("decay", [None, "decay_step", "decay_key_step"])
def test_nothing_is_written_with_beta_0(isa, dtype, decay):
    given = delta_problem(dtype, ("initial", decay)).inputs
    if decay:
        given["decay"] = torch.ones_like(given["decay"])
    _, last = scan.delta_rule(**given | {"beta": torch.zeros_like(given["beta"])})
    assert torch.equal(last, given["initial_state"])


@dtypes
@pytest.mark.parametrize("decay", [None, *DECAYS])
def test_keys_side_by_side_are_kept_exactly(isa, dtype, decay):
    """With beta 1 and decay 1, keys of one 1 keep the newest of their values, bit by bit."""
    given = delta_problem(dtype, ("initial", decay), 2, 70, 2, 5, 8).inputs
    slots = torch.randint(8, (2, 70))
    given["k"] = torch.eye(8, dtype=dtype)[slots][:, :, None]
    given["v"] = torch.randint(-3, 4, given["v"].shape).to(dtype)
    given["initial_state"] = torch.randint(-3, 4, given["initial_state"].shape).float()
    given["beta"] = torch.ones_like(given["beta"])
    if decay:
        given["decay"] = torch.ones_like(given["decay"])
    out, last = scan.delta_rule(**given | {"q": given["k"]})
    assert torch.equal(out, given["v"])
    state = given["initial_state"].clone()
    for t in range(70):
        state[torch.arange(2), :, slots[:, t]] = given["v"][:, t].float()
    assert torch.equal(last, state)


@dtypes
@pytest.mark.parametrize("decay", ["decay_step", "decay_key_step"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_forgotten_past_changes_no_bit(isa, dtype, decay, reverse):
    """Neither in the values after it, nor in its own gradients, which are 0."""
    problem = delta_problem(dtype, (decay, "initial", *["reverse"] * reverse), h=2)
    problem.inputs["decay"][:, 37] = 0
    assert_past_is_forgotten(problem, *past_and_present(37, reverse))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("decay", ["decay_step", "decay_key_step"])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("v", (1, 40, 2, 3)),
        ("k", (1, 33, 0, 4)),
        ("q", (0, 70, 1, 0)),
        ("beta", (0, 20, 1)),
        ("decay", (1, 66, 3)),
        ("initial_state", (1, 3, 1, 2)),
    ],
)
def test_nan_reaches_what_depends_on_it_and_nothing_else(isa, decay, name, where, bad):
    problem = delta_problem(torch.float32, (decay, "initial", "grouped"))
    assert_bad_number_stays(problem, name, where, bad)


# --- Bits, derivatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("dtype", "names", "sizes"),
    [
        (torch.float32, ALL, (2, 130, 4, 20, 17)),
        (torch.float32, BY_KEY, (1, 200, 3, 16, 16, 3)),
        (torch.bfloat16, ("reverse", *BY_KEY), (1, 200, 2, 16, 16)),
        (torch.float16, PACKED_BACKWARDS, (1, 200, 2, 3, 33)),
        (torch.float32, (), (1, 700, 1, 8, 16)),
    ],
)
def test_the_bits_do_not_depend_on_the_threads(threads, dtype, gradients, names, sizes):
    assert_same_bits(delta_problem(dtype, names, *sizes), threads, gradients)


@pytest.mark.parametrize(
    "names", [(), ALL, BY_KEY, PACKED_BACKWARDS, ("decay_head", "initial"), ("decay_key",)]
)
def test_gradcheck(names):
    assert_gradcheck(delta_problem(torch.float64, names, b=1, l=5, h=2, p=2, n=2))


# --- One token ------------------------------------------------------------------------------------


def update(dtype, names=(), **sizes):
    return update_problem("delta_rule", dtype, names, **sizes)


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("decay", [None, *DECAYS])
def test_update(dtype, gradients, decay):
    for n, p in ((6, 5), (33, 40)) if gradients else ((1, 1), (16, 16), (33, 40)):
        check(update(dtype, (decay, "scale", "grouped"), n=n, p=p), gradients=gradients)


@dtypes
@pytest.mark.parametrize("state_dtype", [torch.float32, *HALVES], ids=dtype_name)
def test_update_of_state_dtypes(isa, dtype, state_dtype):
    for decay, n, p in (("decay_step", 18, 21), ("decay_key_step", 16, 19)):
        problem = update(dtype, (decay, "grouped"), n=n, p=p, state_dtype=state_dtype)
        check(problem, gradients=False)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows", [[4, 0, 2], [-1, 6, -1], [-1, -1, -1], [0, 1, 2]])
@pytest.mark.parametrize("names", [("decay_step",), ("decay_key_step",), ("decay_key",), ()])
def test_update_of_rows(gradients, rows, names):
    problem = update(torch.float32, names, rows=rows)
    assert_rows_are_used(problem, check(problem, gradients=gradients))


@dtypes
@pytest.mark.parametrize("names", [("decay_step",), ("decay_key_step", "grouped")])
def test_update_in_any_memory(dtype, names):
    assert_updates_in_any_memory(update(dtype, names, rows=[5, -1, 0]))


def test_update_gives_the_same_bits_for_any_number_of_threads(threads):
    problem = update(torch.float32, ("decay_key_step", "grouped"), b=5, n=40, p=33)
    assert_same_bits(problem, threads, gradients=False)


def test_gradcheck_of_the_update():
    for names in (("decay_step",), ("decay_key_step", "grouped", "log_space")):
        assert_gradcheck(update(torch.float64, names, h=2, n=2, p=2, rows=[3, -1, 0]))
