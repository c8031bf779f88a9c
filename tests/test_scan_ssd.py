# SPDX-License-Identifier: Apache-2.0
"""The values and gradients of SSD, the recurrence of Mamba-2."""

import itertools
import random

import pytest

torch = pytest.importorskip("torch")

from matrix_cases import (  # noqa: E402
    LAYOUTS,
    LENGTH,
    SSD_ALL,
    SSD_OPTIONS,
    assert_bad_number_stays,
    assert_past_is_forgotten,
    cut,
    flipped,
    halves_of,
    in_pieces,
    one_by_one,
    past_and_present,
    sampled,
    ssd_possible,
    ssd_problem,
)
from scan_cases import (  # noqa: E402
    DTYPES,
    assert_gradcheck,
    assert_same_bits,
    check,
    dtype_name,
)

from pentad import scan  # noqa: E402
from pentad.scan import reference  # noqa: E402

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
PAIRS = list(itertools.combinations(SSD_OPTIONS, 2))
PACKED_BACKWARDS = ("packed", "reverse", *SSD_ALL)


# --- Sizes ----------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 127, 200])
def test_lengths(dtype, length):
    for names in (SSD_ALL, PACKED_BACKWARDS):
        n, p = (sampled(of, 1, dtype_name(dtype), length)[0] for of in ((3, 16), (1, 8)))
        check(ssd_problem(dtype, names, l=length, h=2, p=p, n=n))


@pytest.mark.parametrize("n", [1, 2, 7, 16, 17, 33, 64, 130])
def test_sizes(n):
    for p in sampled([1, 3, 8, 16, 31, 64], 4, n):
        dtype = sampled(DTYPES, 1, n, p)[0]
        several = [(1, 2, 1), (2, 3, 3), (1, 4, 2)] if n < 40 else [(1, 1, 1), (1, 2, 2)]
        b, h, groups = sampled(several, 1, n, p)[0]
        check(ssd_problem(dtype, SSD_ALL, b, 66, h, p, n, groups))


def test_a_long_sequence():
    check(ssd_problem(torch.float32, SSD_ALL, 1, 600, 1, 3, 4, 1))


@pytest.mark.parametrize("sizes", [(0, 3, 2, 5), (2, 0, 2, 5), (2, 3, 0, 5)])
def test_empty_sizes(sizes):
    b, length, h, p = sizes
    check(ssd_problem(torch.float32, SSD_ALL, b, length, h, p, groups=1))


@pytest.mark.parametrize("ends", [[0], [0, 0, 0]])
def test_packed_sequences_without_steps(ends):
    problem = ssd_problem(torch.float32, ("packed",), l=0)
    problem.inputs["cu_seqlens"] = torch.tensor(ends, dtype=torch.int64)
    out, last = scan.ssd(**problem.inputs)
    assert out.shape == (1, 0, 4, 5)
    assert torch.equal(last, torch.zeros(len(ends) - 1, 4, 5, 6))


# --- Options --------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("name", ["", "no_last", *SSD_OPTIONS])
def test_each_option(dtype, name):
    problem = ssd_problem(dtype, [name])
    check(problem)
    check(problem, gradients=False)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_option_pairs(pair):
    names = ssd_possible(pair)
    check(ssd_problem(torch.float32, names, h=2))
    check(ssd_problem(halves_of(PAIRS.index(pair)), ("no_last", *names), 1, 33, 4, 3, seed=1))


@pytest.mark.parametrize("seed", range(12))
def test_many_options(seed):
    rng = random.Random(seed)
    names = ssd_possible([name for name in SSD_OPTIONS if rng.random() < 0.6])
    sizes = {
        "b": rng.randint(1, 3),
        "h": rng.choice([2, 4, 6]),
        "p": rng.choice([1, 5, 16, 20]),
        "n": rng.choice([1, 6, 16, 19]),
        "l": rng.choice([1, 7, 64, 66]),
        "layout": rng.choice(list(LAYOUTS)),
    }
    for dtype in DTYPES:
        check(ssd_problem(dtype, names, seed=seed, **sizes))


@dtypes
@pytest.mark.parametrize("names", [SSD_ALL, ("reverse", "seq_idx", "D")])
def test_every_level(isa, dtype, names):
    check(ssd_problem(dtype, names, 1, 66, 1, 21, 19, 1))
    if dtype == torch.float32:
        check(ssd_problem(dtype, names, 1, 66, 2, 16, 32, layout="columns"))


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout):
    several = (SSD_ALL, ("seq_idx", "D_per_value", "reverse"), ("not_causal", "D"))
    for names in several if dtype == torch.float32 else sampled(several, 1, str(dtype), layout):
        check(ssd_problem(dtype, names, l=67, layout=layout))


@pytest.mark.parametrize("names", [(), SSD_ALL, PACKED_BACKWARDS, ("not_causal", "D")])
def test_double(names):
    check(ssd_problem(torch.float64, names))


def test_parameters_are_converted():
    problem = ssd_problem(torch.float32, SSD_ALL)
    names = ("A", "D", "dt_bias", "initial_states")
    for name in names:
        problem.inputs[name] = problem.inputs[name].bfloat16()
    results = check(problem)
    for name in names:
        assert results[f"d{name}"].dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1, 7, 64, 256, 100000])
def test_the_chunk_size_changes_no_bit(size):
    given = ssd_problem(torch.float32, SSD_ALL).inputs
    for got, want in zip(scan.ssd(**given, chunk_size=size), scan.ssd(**given), strict=True):
        assert torch.equal(got, want)


# --- The same in another way ----------------------------------------------------------------------


def by_matrix(x, dt, A, B, C):
    """out = (L o C B^T) dt x with L_ts = exp(A (dt_{s+1} + ... + dt_t)), 0 for s > t
    (Dao & Gu, arXiv 2405.21060, equation 16)."""
    sums = (dt * A).double().cumsum(1).transpose(1, 2)
    L = (sums[..., :, None] - sums[..., None, :]).exp().tril().to(x.dtype)
    groups = x.shape[2] // B.shape[2]
    scores = torch.einsum("btgn,bsgn->bgts", C, B).repeat_interleave(groups, 1)
    return torch.einsum("bhts,bsh,bshp->bthp", L * scores, dt, x)


@pytest.mark.parametrize("names", [(), ("grouped",)])
def test_the_definition_against_the_quadratic_form(names):
    problem = ssd_problem(torch.float32, ("no_last", *names))
    problem.inputs["dt"].abs_()
    check(problem, by_matrix)
    check(problem)


def by_steps(x, dt, A, B, C, initial_states, return_final_states=True, D=None, z=None, **options):
    """A loop of one-token steps of the selective scan, which are those of SSD with heads."""
    state, p = initial_states.clone(), x.shape[-1]

    def of_values(t):
        return None if t is None else t[..., None].expand(*t.shape, p)

    A = of_values(A)[..., None].expand(*A.shape, p, B.shape[-1])
    outs = [
        scan.selective_state_update(
            state, x[:, t], of_values(dt[:, t]), A, B[:, t], C[:, t], of_values(D),
            None if z is None else z[:, t], of_values(options["dt_bias"]), True,
        )
        for t in range(x.shape[1])
    ]  # fmt: skip
    return torch.stack(outs, 1), state


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
def test_steps_equal_the_scan(dtype, gradients):
    check(ssd_problem(dtype, SSD_ALL, l=13), by_steps, gradients=gradients)


@pytest.mark.parametrize("cuts", [[20, 40], [1, 2, 63, 64, 65], [64], [0, 75]])
@pytest.mark.parametrize("names", [SSD_ALL, ("reverse", *SSD_ALL)])
def test_pieces_with_a_carried_state_equal_the_whole(names, cuts):
    def by_pieces(**given):
        return in_pieces(scan.ssd, given, cuts)

    check(ssd_problem(torch.float32, names), by_pieces)


@pytest.mark.parametrize("names", [(), ("reverse",)])
@pytest.mark.parametrize("ends", [None, [0, 0, 70, 70, 75], [0, 64, 75], [0, 1, 2, 3, 75]])
def test_packed_sequences_equal_separate_calls(names, ends):
    problem = ssd_problem(torch.float32, (*names, "packed", *SSD_ALL))
    if ends is not None:
        problem.inputs["cu_seqlens"] = torch.tensor(ends, dtype=torch.int64)
        problem.inputs["initial_states"] = torch.randn(len(ends) - 1, 4, 5, 6)
    results = check(problem)
    check(problem, lambda **given: one_by_one(scan.ssd, given))
    for s, (begin, end) in enumerate(itertools.pairwise(ends or [])):
        if begin == end:
            assert torch.equal(results["out1"][s], problem.inputs["initial_states"][s])


@pytest.mark.parametrize("reverse", [False, True])
def test_seq_idx_equals_separate_calls(reverse):
    """The first sequence that the scan meets continues the initial states, the others nothing."""
    names = ("seq_idx", *(("reverse",) if reverse else ()), *SSD_ALL)
    problem = ssd_problem(torch.float32, names, b=1)
    seq_idx = problem.inputs["seq_idx"]
    assert (seq_idx[:, 1:] != seq_idx[:, :-1]).sum() >= 3

    def separate(seq_idx, initial_states, **given):
        changes = torch.nonzero(seq_idx[0, 1:] != seq_idx[0, :-1])[:, 0] + 1
        pieces = list(itertools.pairwise([0, *changes.tolist(), seq_idx.shape[1]]))
        state, outs = initial_states, {}
        for begin, end in pieces[::-1] if reverse else pieces:
            out, last = scan.ssd(**cut(given, begin, end), initial_states=state)
            outs[begin, end], state = out, torch.zeros_like(initial_states)
        return torch.cat([outs[piece] for piece in pieces], 1), last

    check(problem)
    check(problem, separate)
    long = dict(problem.inputs, seq_idx=seq_idx.long())
    assert torch.equal(scan.ssd(**long)[0], scan.ssd(**problem.inputs)[0])


@pytest.mark.parametrize("names", [SSD_ALL, ("seq_idx", "D_per_value")])
def test_reverse_equals_flipped(names):
    problem = ssd_problem(torch.float32, ("reverse", *names))
    check(problem, lambda **given: flipped(scan.ssd, given))


def test_not_causal_is_the_mask_free_form():
    """y = C (sum_s B_s^T (dt_s A) x_s) + D x (VSSD, arXiv 2407.18559), all pairs written out."""

    def by_pairs(x, dt, A, B, C, D, causal):
        B, C = (m.repeat_interleave(x.shape[2] // m.shape[2], 2) for m in (B, C))
        weights = torch.einsum("bthn,bshn->bhts", C, B)
        return torch.einsum("bhts,bsh,h,bshp->bthp", weights, dt, A, x) + D[:, None] * x

    problem = ssd_problem(torch.float32, ("not_causal", "D", "grouped", "no_last"))
    problem.inputs["dt"].abs_()
    check(problem)
    check(problem, by_pairs)


# --- Extreme numbers ------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("length", [5, LENGTH])
def test_decays_of_one_and_zero(dtype, length):
    problem = ssd_problem(dtype, ("initial", "grouped"), l=length)
    problem.inputs["dt"].abs_().add_(0.01)
    A = problem.inputs["A"]
    A[0], A[1] = 0, -1e30  # exp gives 1, and 0, whose gradient is 0
    results = check(problem)
    assert results["dA"][0] != 0
    assert results["dA"][1] == 0
    assert not results["dinitial_states"][:, 1].any()
    assert results["dinitial_states"][:, 0].all()


@dtypes
def test_decays_of_one_and_zero_are_exact(isa, dtype):
    given = ssd_problem(dtype, ("no_last",), h=2, n=4).inputs
    x = torch.randint(-3, 4, given["x"].shape).to(dtype)  # sums that each dtype can hold
    dt, B = torch.ones_like(given["dt"]), torch.ones_like(given["B"])
    out = scan.ssd(x, dt, torch.tensor([0.0, -1e30]), B, B / 4)
    assert torch.equal(out[:, :, 0], x[:, :, 0].cumsum(1))
    assert torch.equal(out[:, :, 1], x[:, :, 1])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [40, 150])
def test_strong_decays_beside_mild_ones(reverse, length):
    problem = ssd_problem(torch.float32, ("initial", "dt_float"), l=length, n=4)
    problem.inputs["A"].fill_(-1)
    dt = problem.inputs["dt"].uniform_(1e-4, 0.1)
    dt[:, ::7] = 100.0
    dt[0, :, 1] = 100.0
    dt[1, :, 1] = 50.0
    dt[:, :, 2] = 1e-6
    problem.inputs["reverse"] = reverse
    check(problem)


@dtypes
@pytest.mark.parametrize("what", ["seq_idx", "dt"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_forgotten_past_changes_no_bit(isa, dtype, what, reverse):
    """Neither in the values after it, nor in its own gradients, which are 0."""
    begin = 37
    problem = ssd_problem(dtype, ("initial", "dt_float", *["reverse"] * reverse), h=2)
    given = problem.inputs
    past, present = past_and_present(begin, reverse)
    if what == "dt":
        given["A"].fill_(-1.0)
        given["dt"].abs_()
        given["dt"][:, begin] = 1000.0
    else:
        given["seq_idx"] = torch.zeros(2, LENGTH, dtype=torch.int32)
        given["seq_idx"][:, past] = 3
    assert_past_is_forgotten(problem, past, present, also=("dt",))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("x", (1, 40, 2, 3)),
        ("dt", (0, 66, 3)),
        ("A", (2,)),
        ("B", (1, 33, 0, 4)),
        ("C", (0, 70, 1, 0)),
        ("D", (1,)),
        ("z", (1, 6, 3, 2)),
        ("dt_bias", (2,)),
        ("initial_states", (1, 3, 1, 2)),
    ],
)
def test_nan_reaches_what_depends_on_it_and_nothing_else(isa, name, where, bad):
    problem = ssd_problem(torch.float32, SSD_ALL)
    assert_bad_number_stays(problem, name, where, bad)


# --- Bits, derivatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("dtype", "names", "sizes"),
    [
        (torch.float32, SSD_ALL, (2, 130, 4, 20, 17)),
        (torch.bfloat16, ("reverse", *SSD_ALL), (1, 200, 3, 16, 16, 3)),
        (torch.float16, ("packed", *SSD_ALL), (1, 200, 2, 3, 33)),
        (torch.float32, ("seq_idx", "D"), (1, 700, 1, 8, 16)),
        (torch.float64, SSD_ALL, (2, 70, 2, 5, 6)),
    ],
)
def test_the_bits_do_not_depend_on_the_threads(threads, dtype, gradients, names, sizes):
    assert_same_bits(ssd_problem(dtype, names, *sizes), threads, gradients)


@pytest.mark.parametrize(
    "names",
    [
        (),
        SSD_ALL,
        ("D_per_value", "seq_idx", "initial", "reverse"),
        ("packed", "dt_softplus", "initial"),
        ("not_causal", "D", "grouped"),
    ],
)
def test_gradcheck(names):
    problem = ssd_problem(torch.float64, names, b=1, l=5, h=2, p=2, n=2)
    problem.inputs["dt"].abs_().add_(0.01)  # away from the bound 0, which has no derivative
    assert_gradcheck(problem)


# (rtol, atol) that mamba_ssm accepts of its kernels against its reference.
PUBLISHED = {
    torch.float32: (6e-4, 2e-3),
    torch.bfloat16: (3e-2, 5e-2),
    torch.float16: (3e-3, 5e-3),
}


@dtypes
def test_published_tolerances(dtype):
    problem = ssd_problem(dtype, SSD_ALL, l=300, h=2, p=8, n=16, groups=1)
    ours = problem.results(gradients=False)
    want = problem.results(reference.ssd, double=True, gradients=False)
    rtol, atol = PUBLISHED[dtype]
    for name, got in ours.items():
        torch.testing.assert_close(got.double(), want[name], rtol=rtol, atol=atol)
