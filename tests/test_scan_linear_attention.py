# SPDX-License-Identifier: Apache-2.0
"""The values and gradients of linear attention, with and without decay, and its one-token step."""

import itertools
import random

import pytest

torch = pytest.importorskip("torch")

from matrix_cases import (  # noqa: E402
    DECAYS,
    LAYOUTS,
    LENGTH,
    LINEAR_OPTIONS,
    MAPS,
    assert_bad_number_stays,
    assert_past_is_forgotten,
    assert_rows_are_used,
    assert_updates_in_any_memory,
    decays_by_pairs,
    flipped,
    halves_of,
    in_pieces,
    linear_possible,
    linear_problem,
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
    for pair in itertools.combinations(LINEAR_OPTIONS, 2)
    if len(linear_possible(pair)) == 2 and "log_space" not in pair
]
ALL = ("decay_step", "elu", "normalize", "scale", "initial", "grouped")
BY_KEY = ("decay_key_step", "log_space", "initial", "grouped")
PACKED_BACKWARDS = ("packed", "reverse", "decay_key_step", "initial", "grouped")


# --- Sizes ----------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 127, 200])
def test_lengths(dtype, length):
    several = (ALL, BY_KEY, PACKED_BACKWARDS, ("initial",))
    for names in several if dtype == torch.float32 else sampled(several, 2, str(dtype), length):
        n, p = (sampled(of, 1, dtype_name(dtype), length, names)[0] for of in ((3, 16), (1, 8)))
        check(linear_problem(dtype, names, l=length, h=2, p=p, n=n))


@pytest.mark.parametrize("n", [1, 2, 7, 16, 17, 33, 64, 130])
@pytest.mark.parametrize("decay", ["decay_step", "decay_key_step"])
def test_sizes(n, decay):
    for p in sampled([1, 3, 8, 16, 31, 64], 3, n, decay):
        dtype = sampled(DTYPES, 1, n, p, decay)[0]
        several = [(1, 2, 1), (2, 3, 3), (1, 4, 2)] if n < 40 else [(1, 1, 1), (1, 2, 2)]
        b, h, groups = sampled(several, 1, n, p, decay)[0]
        check(linear_problem(dtype, (decay, "initial", "grouped"), b, 66, h, p, n, groups))


@pytest.mark.parametrize("decay", ["decay_head", "decay_key"])
def test_a_long_sequence(decay):
    check(linear_problem(torch.float32, (decay, "initial"), 1, 600, 1, 3, 4, 1))


@pytest.mark.parametrize("sizes", [(0, 3, 2, 5), (2, 0, 2, 5), (2, 3, 0, 5)])
def test_empty_sizes(sizes):
    b, length, h, p = sizes
    check(linear_problem(torch.float32, BY_KEY, b, length, h, p, groups=1))


@pytest.mark.parametrize("ends", [[0], [0, 0, 0]])
def test_packed_sequences_without_steps(ends):
    problem = linear_problem(torch.float32, ("packed",), l=0)
    problem.inputs["cu_seqlens"] = torch.tensor(ends, dtype=torch.int64)
    out, last = scan.linear_attention(**problem.inputs)
    assert out.shape == (1, 0, 4, 5)
    assert torch.equal(last, torch.zeros(len(ends) - 1, 4, 6, 5))


# --- Options --------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("name", ["", "no_last", *LINEAR_OPTIONS])
def test_each_option(dtype, name):
    problem = linear_problem(dtype, [name])
    check(problem)
    check(problem, gradients=False)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_option_pairs(pair):
    names = pair
    if PAIRS.index(pair) % 3 == 0 and set(pair) & set(DECAYS):
        names = (*pair, "log_space")
    half = halves_of(PAIRS.index(pair))
    check(linear_problem(torch.float32, names, h=2))
    check(linear_problem(half, ("no_last", *names), 1, 33, 4, 3, seed=1))


@pytest.mark.parametrize("seed", range(12))
def test_many_options(seed):
    rng = random.Random(seed)
    names = rng.sample(LINEAR_OPTIONS, len(LINEAR_OPTIONS))
    names = linear_possible([name for name in names if rng.random() < 0.6])
    sizes = {
        "b": rng.randint(1, 3),
        "h": rng.choice([2, 4, 6]),
        "p": rng.choice([1, 5, 16, 20]),
        "n": rng.choice([1, 4, 8]),
        "l": rng.choice([1, 7, 64, 66]),
        "layout": rng.choice(list(LAYOUTS)),
    }
    for dtype in DTYPES:
        check(linear_problem(dtype, names, seed=seed, **sizes))


@dtypes
@pytest.mark.parametrize("names", [ALL, BY_KEY, ("reverse", "decay_head")])
def test_every_level(isa, dtype, names):
    check(linear_problem(dtype, names, 1, 66, 1, 21, 19, 1))
    if dtype == torch.float32:
        check(linear_problem(dtype, names, 1, 66, 2, 16, 32, layout="columns"))


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout):
    several = (ALL, BY_KEY, ("decay_head", "reverse"), ("not_causal", "prefix"))
    for names in several if dtype == torch.float32 else sampled(several, 1, str(dtype), layout):
        check(linear_problem(dtype, names, l=67, layout=layout))


@pytest.mark.parametrize("names", [(), ALL, BY_KEY, PACKED_BACKWARDS, ("not_causal", "taylor")])
def test_double(names):
    check(linear_problem(torch.float64, names))


@pytest.mark.parametrize("decay", DECAYS)
def test_decays_and_states_are_converted(decay):
    problem = linear_problem(torch.float32, (decay, "initial"))
    for name in ("decay", "initial_state"):
        problem.inputs[name] = problem.inputs[name].bfloat16()
    results = check(problem)
    assert results["ddecay"].dtype == results["dinitial_state"].dtype == torch.bfloat16


# --- The same in another way ----------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, *DECAYS])
def test_the_definition_against_the_quadratic_form(decay):
    def by_pairs(q, k, v, decay=None, log_space=False):
        q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], 2) for t in (q, k))
        weights = torch.einsum("btHn,bsHn,bHtsn->bHts", q, k, decays_by_pairs(decay, q, v))
        return torch.einsum("bhts,bshp->bthp", weights, v)

    problem = linear_problem(torch.float32, ("no_last", "grouped", decay), l=70)
    check(problem, by_pairs)
    check(problem)


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("decay", [None, *DECAYS])
def test_steps_equal_the_whole(dtype, gradients, decay):
    by_steps = steps_of(scan.linear_attention_update)
    for names in (("scale", "grouped"), ("elu", "normalize")):
        problem = linear_problem(dtype, ("initial", decay, *names), l=11)
        check(problem, by_steps, gradients=gradients)


@pytest.mark.parametrize("cuts", [[20, 40], [1, 2, 63, 64, 65], [64], [0, 75]])
@pytest.mark.parametrize("names", [ALL, BY_KEY, ("reverse", "decay_head", "initial")])
def test_pieces_with_a_carried_state_equal_the_whole(names, cuts):
    def by_pieces(**given):
        return in_pieces(scan.linear_attention, given, cuts)

    check(linear_problem(torch.float32, names), by_pieces)


@pytest.mark.parametrize("names", [ALL, ("reverse", *BY_KEY)])
@pytest.mark.parametrize("ends", [None, [0, 0, 70, 70, 75], [0, 64, 75], [0, 1, 2, 3, 75]])
def test_packed_sequences_equal_separate_calls(names, ends):
    problem = linear_problem(torch.float32, (*names, "packed"))
    if ends is not None:
        problem.inputs["cu_seqlens"] = torch.tensor(ends, dtype=torch.int64)
        shape = problem.inputs["initial_state"].shape[1:]
        problem.inputs["initial_state"] = torch.rand(len(ends) - 1, *shape)
    results = check(problem)
    check(problem, lambda **given: one_by_one(scan.linear_attention, given))
    for s, (begin, end) in enumerate(itertools.pairwise(ends or [])):
        if begin == end:
            assert torch.equal(results["out1"][s], problem.inputs["initial_state"][s])


@pytest.mark.parametrize("names", [ALL, BY_KEY, ("decay_key", "initial"), ("prefix",)])
def test_reverse_equals_flipped(names):
    problem = linear_problem(torch.float32, ("reverse", *names))
    check(problem, lambda **given: flipped(scan.linear_attention, given))


def test_both_directions_are_the_form_that_is_not_causal():
    def both(q, k, v, causal):
        out = scan.linear_attention(q, k, v) + scan.linear_attention(q, k, v, reverse=True)
        return out - (q * k).sum(-1, keepdim=True) * v  # which has counted each step twice

    check(linear_problem(torch.float32, ("not_causal", "no_last")), both)


def test_the_feature_maps():
    q, k = torch.randn(2, 2, 9, 1, 6).unbind()
    v = torch.eye(9)[None, :, None].expand(2, 9, 1, 9)  # the results are the weights

    def weights(feature_map):
        out = scan.linear_attention(q, k, v, feature_map=feature_map, causal=False)
        return out[:, :, 0]

    product = torch.einsum("btn,bsn->bts", q[:, :, 0], k[:, :, 0])
    u = product / 6**0.5
    lengths = q.norm(dim=-1) * k.norm(dim=-1).transpose(1, 2)
    close = torch.testing.assert_close
    close(weights(None), product)
    close(weights("taylor"), 1 + u + u**2 / 2)
    close(weights("cosine"), product / lengths)
    positive = torch.einsum("btn,bsn->bts", q[:, :, 0].clamp(min=0), k[:, :, 0].clamp(min=0))
    close(weights("relu"), positive)
    ones = [torch.where(t > 0, t + 1, t.exp())[:, :, 0] for t in (q, k)]
    close(weights("elu"), torch.einsum("btn,bsn->bts", *ones))
    close(weights(torch.cos), torch.einsum("btn,bsn->bts", q[:, :, 0].cos(), k[:, :, 0].cos()))


def test_cosine_of_zero_keys():
    problem = linear_problem(torch.float32, ("cosine", "initial"))
    problem.inputs["k"][:, 3] = 0
    problem.inputs["q"][:, 5] = 0
    results = check(problem, gradients=False)
    assert not results["out0"][:, 5].any()


# --- Systems --------------------------------------------------------------------------------------


def draw_heads(*sizes):
    return torch.randn(3, *sizes).unbind()


def test_retention():
    """(Q K^T o D) V, D_ts = gamma^(t - s) with gamma = 1 - 2^(-5 - h) per head
    (RetNet: arXiv 2307.08621, equations 5 and 8)."""
    q, k, v = draw_heads(2, 70, 4, 8)
    gamma = 1 - 2.0 ** (-5 - torch.arange(4))
    distance = torch.arange(70)[:, None] - torch.arange(70)
    D = (gamma[:, None, None] ** distance).tril()
    want = torch.einsum("bthn,bshn,hts,bshp->bthp", q, k * 8**-0.5, D, v)
    got = scan.linear_attention(q, k, v, decay=gamma, scale=8**-0.5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gated_linear_attention():
    """((Q o b)(K / b)^T o M) V with b the products of the gates (GLA: arXiv 2312.06635, section
    4), whose gates are sigmoid(.)^(1/16) per step and key."""
    q, k, v = draw_heads(2, 70, 3, 8)
    log_gates = torch.nn.functional.logsigmoid(torch.randn(2, 70, 3, 8)) / 16
    b = log_gates.double().cumsum(1).exp()
    weights = torch.einsum("bthn,bshn->bhts", q * b, k / b).tril()
    want = torch.einsum("bhts,bshp->bthp", weights, v.double()).float()
    got = scan.linear_attention(q, k, v, decay=log_gates, log_space=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_additive_recurrence():
    """Values weighted by the softmax over the past of each key channel (LightNet: arXiv
    2405.21022): decay exp(z_{t-1} - z_t), key exp(k_t - z_t), z the running logsumexp of k."""
    q, k, v = (t.requires_grad_() for t in draw_heads(2, 70, 3, 8))
    z = k.logcumsumexp(1)
    before = torch.cat([torch.full_like(z[:, :1], -torch.inf), z[:, :-1]], 1)
    got = scan.linear_attention(q, (k - z).exp(), v, decay=before - z, log_space=True)
    past = torch.ones(70, 70).tril().bool()[None, :, :, None, None]
    weights = k[:, None].where(past, -torch.inf).softmax(2)
    want = torch.einsum("bthn,btshn,bshp->bthp", q, weights, v)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(want)
    grads = [torch.autograd.grad(out, (q, k, v), upstream) for out in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_prefix_of_keys_that_are_seen_by_all():
    """Numerator and denominator over the causal steps and the whole prefix, with the Taylor map
    of width 16 (JRT: arXiv 2407.05483, section 4)."""
    q, k, v = draw_heads(2, 70, 2, 16)
    prefix_k, prefix_v = torch.randn(2, 2, 30, 2, 16).unbind()

    def weights(keys):
        u = torch.einsum("bthn,bshn->bhts", q, keys) / 4
        return 1 + u + u**2 / 2

    here, there = weights(k).tril(), weights(prefix_k)
    sums = torch.einsum("bhts,bshp->bthp", here, v)
    sums = sums + torch.einsum("bhts,bshp->bthp", there, prefix_v)
    want = sums / (here.sum(-1) + there.sum(-1)).transpose(1, 2)[..., None]
    got = scan.linear_attention(
        q, k, v, feature_map="taylor", normalize=True, prefix_k=prefix_k, prefix_v=prefix_v
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_cosine_attention(causal):
    """Cosines of queries and keys, values divided by (visible steps)^sigmoid(m) (Cottention:
    arXiv 2409.18747)."""
    q, k, v = draw_heads(2, 70, 3, 8)
    m = torch.randn(3)
    visible = torch.arange(1.0, 71) if causal else torch.full((70,), 70.0)
    power = visible[:, None] ** -torch.sigmoid(m)
    weights = torch.nn.functional.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
    weights = (weights.permute(0, 3, 1, 2)).tril() if causal else weights.permute(0, 3, 1, 2)
    want = torch.einsum("bhts,bshp->bthp", weights, v) * power[..., None]
    got = scan.linear_attention(q, k, v, feature_map="cosine", causal=causal) * power[..., None]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_linear_transformers(causal):
    """phi(x) = elu(x) + 1 and a normaliser (arXiv 2006.16236, equations 5, 7 and 9)."""
    q, k, v = draw_heads(2, 70, 3, 8)
    phi_q, phi_k = (torch.nn.functional.elu(t) + 1 for t in (q, k))
    weights = torch.einsum("bthn,bshn->bhts", phi_q, phi_k)
    weights = weights.tril() if causal else weights
    weights = weights / weights.sum(-1, keepdim=True)
    want = torch.einsum("bhts,bshp->bthp", weights, v)
    got = scan.linear_attention(q, k, v, feature_map="elu", normalize=True, causal=causal)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# --- Extreme numbers ------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [5, LENGTH])
def test_decays_of_zero_and_one(dtype, decay, length):
    problem = linear_problem(dtype, (decay, "initial", "grouped"), l=length, n=7)
    check(with_decays(problem, [0.0, 1.0]))


@pytest.mark.parametrize("decay", DECAYS)
def test_negative_decays_and_growing_ones(decay):
    problem = linear_problem(torch.float32, (decay, "initial"), n=7)
    check(with_decays(problem, [-0.9, -1.0, 1.05, -1.02], 1))
    check(with_decays(problem, [-0.9, 0.0, 1.0, 1e-30], 2))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [40, 150])
def test_strong_decays_beside_mild_ones(decay, length):
    problem = linear_problem(torch.float32, (decay, "log_space", "initial"), l=length, n=7)
    check(with_decays(problem, [-100.0, -1e-6, -40.0], 5))
    check(with_decays(problem, [-torch.inf, -100.0, 0.0], 7))


@dtypes
@pytest.mark.parametrize("decay", [None, *DECAYS])
def test_decays_of_one_and_zero_are_exact(isa, dtype, decay):
    given = linear_problem(dtype, ("no_last", decay), h=2, n=4).inputs
    v = torch.randint(-3, 4, given["v"].shape).to(dtype)  # sums that each dtype can hold
    k = torch.ones_like(given["k"])
    for number, want in ((1.0, v.cumsum(1)), (0.0, v)):
        if decay is None and number == 0:
            continue
        decays = torch.full_like(given["decay"], number) if decay else None
        assert torch.equal(scan.linear_attention(k / 4, k, v, decay=decays), want)


@dtypes
@pytest.mark.parametrize("decay", ["decay_step", "decay_key_step"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_forgotten_past_changes_no_bit(isa, dtype, decay, reverse):
    """Neither in the values after it, nor in its own gradients, which are 0."""
    problem = linear_problem(dtype, (decay, "initial", *["reverse"] * reverse), h=2)
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
        ("decay", (1, 66, 3)),
        ("initial_state", (1, 3, 1, 2)),
    ],
)
def test_nan_reaches_what_depends_on_it_and_nothing_else(isa, decay, name, where, bad):
    problem = linear_problem(torch.float32, (decay, "initial", "grouped"))
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
        (torch.float32, ("decay_head",), (1, 700, 1, 8, 16)),
    ],
)
def test_the_bits_do_not_depend_on_the_threads(threads, dtype, gradients, names, sizes):
    assert_same_bits(linear_problem(dtype, names, *sizes), threads, gradients)


@pytest.mark.parametrize(
    "names",
    [
        (),
        ALL,
        BY_KEY,
        PACKED_BACKWARDS,
        ("decay_head", "prefix", "taylor"),
        ("decay_key", "cosine"),
        ("not_causal", "normalize", "initial", "prefix"),
    ],
)
def test_gradcheck(names):
    assert_gradcheck(linear_problem(torch.float64, names, b=1, l=5, h=2, p=2, n=2))


# --- One token ------------------------------------------------------------------------------------


def update(dtype, names=(), **sizes):
    return update_problem("linear_attention", dtype, names, **sizes)


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("decay", [None, *DECAYS])
def test_update(dtype, gradients, decay):
    for n, p in ((6, 5), (33, 40)) if gradients else ((1, 1), (16, 16), (33, 40)):
        check(update(dtype, (decay, "scale"), n=n, p=p), gradients=gradients)
    for names in (("grouped", "normalize"), ("normalize", "elu"), *[(name,) for name in MAPS]):
        check(update(dtype, (decay, *names)), gradients=gradients)


@dtypes
@pytest.mark.parametrize("state_dtype", [torch.float32, *HALVES], ids=dtype_name)
def test_update_of_state_dtypes(isa, dtype, state_dtype):
    for decay, n, p in (("decay_step", 18, 21), ("decay_key_step", 16, 19)):
        problem = update(dtype, (decay, "grouped"), n=n, p=p, state_dtype=state_dtype)
        check(problem, gradients=False)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows", [[4, 0, 2], [-1, 6, -1], [-1, -1, -1], [0, 1, 2]])
@pytest.mark.parametrize(
    "names", [("decay_step",), ("decay_key_step", "normalize"), ("decay_key",)]
)
def test_update_of_rows(gradients, rows, names):
    problem = update(torch.float32, names, rows=rows)
    assert_rows_are_used(problem, check(problem, gradients=gradients))


@dtypes
@pytest.mark.parametrize("names", [("decay_step", "normalize"), ("decay_key_step", "grouped")])
def test_update_in_any_memory(dtype, names):
    assert_updates_in_any_memory(update(dtype, names, rows=[5, -1, 0]))


def test_update_gives_the_same_bits_for_any_number_of_threads(threads):
    problem = update(torch.float32, ("decay_key_step", "grouped"), b=5, n=40, p=33)
    assert_same_bits(problem, threads, gradients=False)


def test_gradcheck_of_the_update():
    for names in (("decay_step", "normalize"), ("decay_key_step", "grouped", "log_space")):
        assert_gradcheck(update(torch.float64, names, h=2, n=2, p=2, rows=[3, -1, 0]))
