# SPDX-License-Identifier: Apache-2.0
"""The functions of pentad.hamming on numpy arrays: exact, and clear when they refuse."""

import itertools
import math

import numpy as np
import pytest
from cases import KINDS, LAYOUTS, MASKS, METRICS, assert_same, codes, laid_out, mask
from device_array import DeviceArray
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pentad
from pentad.hamming import _kernels, reference

EPS = float(np.finfo(np.float32).eps)

sizes = st.integers(0, 70) | st.integers(0, 500)
dims = st.integers(1, 140) | st.integers(1, 2100)
seeds = st.integers(0, 2**32 - 1)


# --- The reference itself -------------------------------------------------------------------------


def test_reference_says_what_the_definitions_say(rng):
    a, b = codes(rng, 4, 19, "sparse"), codes(rng, 5, 19)
    a[0] = 0
    b[0] = 0
    for metric in METRICS:
        got = reference.distance(a, b, metric)
        for i, j in itertools.product(range(len(a)), range(len(b))):
            x = int.from_bytes(a[i].tobytes(), "big")
            y = int.from_bytes(b[j].tobytes(), "big")
            both, union = (x & y).bit_count(), (x | y).bit_count()
            want = {
                "hamming": (x ^ y).bit_count(),
                "and": both,
                "jaccard": np.float32((union - both) / union) if union else 0,
            }[metric]
            assert got[i, j] == want


def test_reference_orders_by_value_then_id():
    values = np.array([[3, 1, 2, 1, 3]])
    assert reference.best(values, 6, largest=False)[1].tolist() == [[1, 3, 2, 0, 4, -1]]
    assert reference.best(values, 3, largest=True)[1].tolist() == [[0, 4, 2]]
    keep = np.array([False, False, True, True, False])
    assert reference.best(values, 3, largest=False, mask=keep)[1].tolist() == [[3, 2, -1]]


# --- Exactness of distances and search ------------------------------------------------------------


@st.composite
def searches(draw):
    n = draw(sizes)
    return {
        "dim": draw(dims),
        "n": n,
        "nq": draw(st.integers(0, 21)),
        "k": draw(st.sampled_from([0, 1, 2, 10, n, n + 3]) | st.integers(0, 600)),
        "metric": draw(st.sampled_from(METRICS)),
        "kind": draw(st.sampled_from(KINDS)),
        "mask": draw(st.sampled_from(MASKS)),
        "layouts": draw(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))),
        "threads": draw(st.integers(1, 4)),
        "seed": draw(seeds),
    }


def case(**changes):
    plain = {"dim": 64, "n": 50, "nq": 3, "k": 5, "metric": "hamming", "kind": "ties"}
    plain |= {"mask": None, "layouts": ("plain", "plain"), "threads": 2, "seed": 1}
    return plain | changes


@settings(max_examples=200)
@given(searches())
@example(case(n=0))
@example(case(n=0, metric="jaccard", mask="none"))
@example(case(nq=0))
@example(case(k=0))
@example(case(k=80, metric="and"))
@example(case(k=80, metric="jaccard", mask="one"))
@example(case(n=500, k=500, metric="jaccard"))
@example(case(dim=1, n=300, k=300, nq=21))
@example(case(n=33, k=40, mask="none", metric="and"))
def test_search_equals_brute_force(isa, threads, c):
    rng = np.random.default_rng(c["seed"])
    threads(c["threads"])
    plain_q = codes(rng, c["nq"], c["dim"], c["kind"])
    plain_c = codes(rng, c["n"], c["dim"], c["kind"])
    if c["n"] and c["nq"]:
        plain_q[0] = plain_c[-1]  # one exact hit
    q, db = (laid_out(x, how) for x, how in zip((plain_q, plain_c), c["layouts"], strict=True))
    keep = mask(rng, c["n"], c["mask"])
    metric = c["metric"]

    values = reference.distance(plain_q, plain_c, metric)
    assert_same(pentad.hamming.distance(q, db, metric=metric), values)
    assert_same(
        pentad.hamming.topk(q, db, c["k"], metric=metric, mask=keep),
        reference.topk(plain_q, plain_c, c["k"], metric, keep),
    )
    radius = float(rng.choice(values.reshape(-1))) if values.size else 1.0
    for r in (radius, float(np.nextafter(radius, -np.inf)), radius + 0.5):
        assert_same(
            pentad.hamming.range_search(q, db, r, metric=metric, mask=keep),
            reference.range_search(plain_q, plain_c, r, metric, keep),
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 65, 2100])
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_ten_thousand_codes(rng, isa, metric, dim, kind):
    db, q = codes(rng, 10_000, dim, kind), codes(rng, 3, dim)
    values = reference.distance(q, db, metric)
    for k in (1, 100, 10_007):
        best, ids = reference.best(values, min(k, 10_000), metric == "and")
        got_values, got_ids = pentad.hamming.topk(q, db, k, metric=metric)
        assert_same(got_ids[:, :10_000], ids)
        assert_same(got_values[:, :10_000], best)
        assert (got_ids[:, 10_000:] == -1).all()


@pytest.mark.parametrize("dim", [9, 700, 2100])
def test_ten_thousand_codes_by_the_other_functions(rng, isa, dim):
    db, q = codes(rng, 10_000, dim, "ties"), codes(rng, 2, dim)
    for metric in METRICS:
        values = reference.distance(q, db, metric)
        assert_same(pentad.hamming.distance(q, db, metric=metric), values)
        radius = float(values[0, 0])
        assert_same(
            pentad.hamming.range_search(q, db, radius, metric=metric),
            reference.range_search(q, db, radius, metric),
        )
    x = rng.integers(-3, 4, (2, dim)).astype(np.float32)
    scores = reference.score(x, db).astype(np.float32)
    assert_same(pentad.hamming.score(x, db), scores)
    want = reference.best(scores, 9000, largest=True)
    assert_same(pentad.hamming.topk_score(x, db, 9000), want)
    w = rng.integers(-3, 4, (2, 10_000)).astype(np.float32)
    want = reference.weighted_sum(w, db, dim).astype(np.float32)
    assert_same(pentad.hamming.weighted_sum(w, db, dim), want)


@pytest.mark.parametrize("nq", [1, 2, 9])
@pytest.mark.parametrize("metric", METRICS)
def test_large_k_over_many_threads(rng, threads, metric, nq):
    db, q = codes(rng, 9_999, 256, "ties"), codes(rng, nq, 256)
    keep = rng.random(9_999) < 0.9
    values = reference.distance(q, db, metric)
    for n in (1, 2, 3, 8):
        threads(n)
        for k in (2, 3000, 8000):
            want = reference.best(values, k, metric == "and", keep)
            got = pentad.hamming.topk(q, db, k, metric=metric, mask=keep)
            assert_same(got[1], want[1])
            assert_same(got[0], want[0])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [1, 7, 8, 255, 256, 257, 600])
def test_every_split_of_the_queries(rng, threads, metric, nq):
    db, q = codes(rng, 300, 90, "ties"), codes(rng, nq, 90)
    want = reference.topk(q, db, 20, metric)
    for n in (1, 2, 5):
        threads(n)
        assert_same(pentad.hamming.topk(q, db, 20, metric=metric), want)
        assert_same(
            pentad.hamming.range_search(q, db, 40, metric=metric),
            reference.range_search(q, db, 40, metric),
        )


@pytest.mark.parametrize("metric", METRICS)
def test_the_widest_codes_count_to_their_last_bit(isa, metric):
    dim = pentad._C.hamming_max_bytes * 8
    assert dim == 65_472
    db = np.stack([np.full(dim // 8, byte, np.uint8) for byte in (0, 255, 1, 254)])
    want = reference.distance(db, db, metric)
    assert_same(pentad.hamming.distance(db, db, metric=metric), want)
    assert_same(pentad.hamming.topk(db, db, 5, metric=metric), reference.topk(db, db, 5, metric))
    for radius in (0, dim - 1, dim, dim + 1, 1e9):
        assert_same(
            pentad.hamming.range_search(db, db, radius, metric=metric),
            reference.range_search(db, db, radius, metric),
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("radius", [-math.inf, -1, -0.5, -0.0, 0, 0.25, 1, 1.5, 2, 7, math.inf])
def test_radius_of_every_sign_and_size(rng, isa, metric, radius):
    db = codes(rng, 200, 12, "sparse")
    assert_same(
        pentad.hamming.range_search(db[:9], db, radius, metric=metric),
        reference.range_search(db[:9], db, radius, metric),
    )


def test_one_row_repeated_by_a_zero_stride(rng, isa):
    row = codes(rng, 1, 77)
    db = np.broadcast_to(row, (1000, row.shape[1]))
    q = np.broadcast_to(codes(rng, 1, 77), (20, row.shape[1]))
    for metric in METRICS:
        assert_same(
            pentad.hamming.topk(q, db, 7, metric=metric),
            reference.topk(q.copy(), db.copy(), 7, metric),
        )
    assert_same(pentad.hamming.distance(q, db), reference.distance(q.copy(), db.copy()))


def test_byte_broadcast_along_the_row(isa):
    q = np.broadcast_to(np.array([[0b1010_1010]], np.uint8), (3, 9))
    assert pentad.hamming.distance(q, ~q).tolist() == [[72] * 3] * 3


def test_intersection_is_the_and_distance(rng):
    a, b = codes(rng, 5, 50), codes(rng, 6, 50)
    assert_same(pentad.hamming.intersection(a, b), reference.distance(a, b, "and"))


# --- Packing --------------------------------------------------------------------------------------

FLOATS = (np.float32, np.float64, np.float16)
PACKED = (*FLOATS, np.int8, np.bool_)


@settings(max_examples=80)
@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 200),
    st.sampled_from(PACKED),
    st.sampled_from(LAYOUTS),
    st.sampled_from([0.0, 1.0, -1.0, 0.5]),
    seeds,
)
def test_pack_equals_packbits(isa, lead, dim, dtype, layout, threshold, seed):
    rng = np.random.default_rng(seed)
    x = (rng.integers(-3, 4, (*lead, dim)) / 2).astype(dtype)
    if np.issubdtype(dtype, np.floating) and x.size:
        x.reshape(-1)[:: max(1, x.size // 3)] = rng.choice([0.0, -0.0, np.inf, -np.inf, 6e-8])
    assert_same(pentad.hamming.pack(laid_out(x, layout), threshold), reference.pack(x, threshold))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.1, 0.3, -0.7, 1e-30, 70000.0, -1e300])
def test_pack_compares_as_numpy_does(isa, dtype, threshold):
    with np.errstate(over="ignore"):
        at = np.array(threshold).astype(dtype)
        x = np.array([at, np.nextafter(at, dtype(1)), np.nextafter(at, dtype(-1)), 0, -at], dtype)
        want = reference.pack(x, threshold)
    assert_same(pentad.hamming.pack(x, threshold), want)


def test_pack_of_doubles_does_not_round_onto_the_threshold(isa):
    x = np.array([1 + 1e-12, 1, 1 - 1e-12, 1e-300, -1e-300, 1e300])
    assert pentad.hamming.pack(x, 1.0).tolist() == [0b1000_0100]
    assert pentad.hamming.pack(x).tolist() == [0b1111_0100]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("at", [0, 7, 8, 63, 64, 99])
def test_pack_refuses_nan_anywhere(isa, dtype, at):
    x = np.zeros((3, 100), dtype)
    pentad.hamming.pack(x)
    x[2, at] = np.nan
    for layout in LAYOUTS:
        with pytest.raises(ValueError, match="NaN"):
            pentad.hamming.pack(laid_out(x, layout))


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(1, 150),
    st.sampled_from(["float32", "float64", "float16", "int8"]),
    st.sampled_from(LAYOUTS),
    seeds,
)
def test_unpack_gives_signs_and_packs_back(isa, lead, dim, dtype, layout, seed):
    rows = codes(np.random.default_rng(seed), math.prod(lead), dim).reshape(*lead, -(-dim // 8))
    signs = pentad.hamming.unpack(laid_out(rows, layout), dim, dtype)
    assert_same(signs, reference.unpack(rows, dim).astype(dtype))
    assert_same(pentad.hamming.pack(signs), rows)


def test_unpack_is_float32_by_default(rng):
    assert pentad.hamming.unpack(codes(rng, 2, 9), 9).dtype == np.float32


# --- Float queries --------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    st.integers(1, 70) | st.integers(1, 2100),
    st.integers(0, 300),
    st.integers(0, 19),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.integers(1, 4),
    seeds,
)
def test_score_is_within_its_error_budget(isa, threads, dim, n, nq, q_layout, c_layout, t, seed):
    rng = np.random.default_rng(seed)
    threads(t)
    x, db = rng.standard_normal((nq, dim)).astype(np.float32), codes(rng, n, dim)
    got = pentad.hamming.score(laid_out(x, q_layout), laid_out(db, c_layout))
    assert got.dtype == np.float32
    assert got.shape == (nq, n)
    budget = (dim / 4 + 3) * EPS * np.abs(x.astype(np.float64)).sum(1, keepdims=True)
    assert (np.abs(got - reference.score(x, db)) <= budget).all()

    whole = np.round(x * 8)  # sums of small integers have no rounding
    assert_same(pentad.hamming.score(whole, db), reference.score(whole, db).astype(np.float32))


@settings(max_examples=80)
@given(
    st.integers(1, 300),
    st.integers(0, 400),
    st.integers(0, 19),
    st.integers(0, 30) | st.integers(380, 420),
    st.sampled_from(MASKS),
    st.sampled_from(["random", "ties"]),
    st.sampled_from(LAYOUTS),
    st.integers(1, 4),
    seeds,
)
def test_topk_score_is_the_order_of_score(isa, threads, dim, n, nq, k, keep, kind, layout, t, seed):
    rng = np.random.default_rng(seed)
    threads(t)
    x, db = rng.standard_normal((nq, dim)).astype(np.float32), codes(rng, n, dim, kind)
    keep = mask(rng, n, keep)
    scores = pentad.hamming.score(x, db)
    best, ids = reference.best(scores, k, largest=True, mask=keep)
    want = np.full((nq, k), -np.inf, np.float32)
    if n:
        want[ids >= 0] = best[ids >= 0]
    got = pentad.hamming.topk_score(laid_out(x, layout), laid_out(db, layout), k, mask=keep)
    assert_same(got, (want, ids))


def test_score_has_the_same_bits_for_any_batch(rng, isa, threads):
    x, db = rng.standard_normal((37, 333)).astype(np.float32), codes(rng, 1000, 333)
    whole = pentad.hamming.score(x, db)
    for n in (1, 3):
        threads(n)
        rows = np.concatenate([pentad.hamming.score(x[i : i + 1], db) for i in range(len(x))])
        assert_same(rows, whole)
        columns = [pentad.hamming.score(x, db[i : i + 111]) for i in range(0, 1000, 111)]
        assert_same(np.concatenate(columns, axis=1), whole)


def test_topk_score_returns_every_row_of_finite_queries(isa):
    x = np.array([[3e38, 3e38, 0, 0, 0]], np.float32)  # finite, but its sums leave float32
    db = np.array([[0b1100_0000], [0b0000_0000], [0b1000_0000]], np.uint8)
    scores, ids = pentad.hamming.topk_score(x, db, 3)
    assert ids.tolist() == [[0, 2, 1]]
    assert_same(scores, np.array([[np.inf, 0, -np.inf]], np.float32))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0, 3), (1, 1, 1, 1)])
def test_score_and_weighted_sum_take_any_leading_shape(rng, lead):
    db = codes(rng, 11, 50)
    x = rng.standard_normal((*lead, 50)).astype(np.float32)
    scores = pentad.hamming.score(x, db)
    assert scores.shape == (*lead, 11)
    np.testing.assert_allclose(scores, reference.score(x, db), atol=1e-4)
    sums = pentad.hamming.weighted_sum(scores, db, 50)
    assert sums.shape == (*lead, 50)
    np.testing.assert_allclose(sums, reference.weighted_sum(scores, db, 50), atol=1e-3)


@settings(max_examples=80)
@given(
    st.integers(1, 300),
    st.integers(0, 400),
    st.integers(0, 9),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.integers(1, 4),
    seeds,
)
def test_weighted_sum_equals_the_product(isa, threads, dim, n, nq, w_layout, c_layout, t, seed):
    rng = np.random.default_rng(seed)
    threads(t)
    w, db = rng.standard_normal((nq, n)).astype(np.float32), codes(rng, n, dim)
    got = pentad.hamming.weighted_sum(laid_out(w, w_layout), laid_out(db, c_layout), dim)
    assert got.dtype == np.float32
    assert got.shape == (nq, dim)
    budget = (64 + n / 64 + 1) * EPS * np.abs(w.astype(np.float64)).sum(1, keepdims=True)
    assert (np.abs(got - reference.weighted_sum(w, db, dim)) <= budget).all()
    whole = np.round(w * 8)
    want = reference.weighted_sum(whole, db, dim).astype(np.float32)
    assert_same(pentad.hamming.weighted_sum(whole, db, dim), want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_queries_of_every_dtype(rng, dtype):
    x, db = rng.standard_normal((3, 40)).astype(dtype), codes(rng, 7, 40)
    narrow = x.astype(np.float32)
    assert_same(pentad.hamming.score(x, db), pentad.hamming.score(narrow, db))
    assert_same(pentad.hamming.topk_score(x, db, 3), pentad.hamming.topk_score(narrow, db, 3))
    w = rng.standard_normal((3, 7)).astype(dtype)
    assert_same(
        pentad.hamming.weighted_sum(w, db, 40),
        pentad.hamming.weighted_sum(w.astype(np.float32), db, 40),
    )


def test_scores_have_no_limit_on_the_width(rng):
    dim = 70_001
    db, x = codes(rng, 3, dim), rng.integers(-9, 9, (2, dim)).astype(np.float32)
    assert_same(pentad.hamming.score(x, db), reference.score(x, db).astype(np.float32))
    assert_same(pentad.hamming.pack(pentad.hamming.unpack(db, dim)), db)


# --- Hyperdimensional arithmetic ------------------------------------------------------------------


@settings(max_examples=80)
@given(st.integers(1, 200), st.integers(-500, 500), st.sampled_from(LAYOUTS), seeds)
@example(5, 10**30, "plain", 0)
@example(5, -(10**30), "plain", 0)
@example(64, 64, "reversed", 0)
def test_permute_rotates_and_back(isa, dim, shift, layout, seed):
    rows = codes(np.random.default_rng(seed), 6, dim).reshape(2, 3, -1)
    turned = pentad.hamming.permute(laid_out(rows, layout), dim, shift)
    assert_same(turned, reference.permute(rows, dim, shift % dim))
    assert_same(pentad.hamming.permute(turned, dim, -shift), rows)


def test_permute_ignores_set_padding_bits():
    assert pentad.hamming.permute(np.array([0b1000_0111], np.uint8), 5, 1).tolist() == [0b0100_0000]


@settings(max_examples=80)
@given(
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(1, 8) | st.integers(1, 200),
    st.integers(1, 150),
    st.sampled_from(["first", "zero", "one"]),
    st.sampled_from(["none", "shared", "own"]),
    st.sampled_from(LAYOUTS),
    seeds,
)
def test_bundle_is_the_majority(isa, lead, m, dim, ties, weighting, layout, seed):
    rng = np.random.default_rng(seed)
    rows = codes(rng, math.prod(lead) * m, dim).reshape(*lead, m, -(-dim // 8))
    shape = {"none": None, "shared": (m,), "own": (*lead, m)}[weighting]
    # Small integers, some negative: ties are frequent and sums exact.
    weights = None if shape is None else rng.integers(-2, 3, shape).astype(np.float32)
    got = pentad.hamming.bundle(laid_out(rows, layout), dim, weights=weights, ties=ties)
    assert_same(got, reference.bundle(rows, dim, weights, ties))


def test_bind_broadcasts_and_undoes_itself(rng):
    a, b = codes(rng, 5, 33)[:, None], codes(rng, 4, 33)
    bound = pentad.hamming.bind(a, b)
    assert_same(bound, a ^ b)
    assert_same(pentad.hamming.bind(bound, b), np.broadcast_to(a, bound.shape))


# --- Binarize -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("estimator", ["ste", "tanh"])
def test_binarize_takes_the_sign(dtype, estimator):
    x = np.array([[2, 0, -0.0], [-3, np.inf, np.nan]], dtype)
    want = np.array([[1, -1, -1], [-1, 1, np.nan]], dtype)
    assert_same(pentad.hamming.binarize(x, estimator), want)


def test_bernoulli_samples_the_sigmoid(rng):
    x = np.repeat(np.array([[-2.0, 0.0, 1.0]], np.float32), 20_000, 0)
    for temperature in (0.5, 2.0):
        draw = pentad.hamming.binarize(x, "bernoulli", temperature, rng)
        assert set(np.unique(draw)) == {-1.0, 1.0}
        share = (draw > 0).mean(0)
        want = 1 / (1 + np.exp(-np.array([-2.0, 0.0, 1.0]) / temperature))
        np.testing.assert_allclose(share, want, atol=0.02)


def test_bernoulli_is_a_function_of_the_generator():
    x = np.zeros((50, 50), np.float32)
    draws = [
        pentad.hamming.binarize(x, "bernoulli", generator=np.random.default_rng(seed))
        for seed in (1, 1, 2)
    ]
    assert_same(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


@pytest.mark.filterwarnings("error")
def test_bernoulli_of_extremes_is_certain_and_quiet():
    x = np.array([1e30, -1e30, np.inf, -np.inf, np.nan], np.float32)
    want = np.array([1, -1, 1, -1, np.nan], np.float32)
    assert_same(pentad.hamming.binarize(x, "bernoulli"), want)


# --- Refusals -------------------------------------------------------------------------------------

U8 = np.zeros((3, 4), np.uint8)
F32 = np.zeros((3, 32), np.float32)
H = pentad.hamming
STRUCTURED = np.zeros((3, 4), [("a", "u1")])

REFUSED = {
    "distance of floats": (lambda: H.distance(F32, F32), TypeError, "a has dtype float32"),
    "distance of int8": (lambda: H.distance(U8, U8.view(np.int8)), TypeError, "b has dtype int8"),
    "distance of objects": (lambda: H.distance(U8.astype(object), U8), TypeError, "dtype object"),
    "distance of structures": (lambda: H.distance(STRUCTURED, U8), TypeError, "dtype"),
    "distance of a list": (lambda: H.distance([[1]], U8), TypeError, "a is list"),
    "distance of None": (lambda: H.distance(None, U8), TypeError, "a is NoneType"),
    "distance of widths": (lambda: H.distance(U8, U8[:, :3]), ValueError, "4 bytes.*have 3"),
    "distance of no width": (lambda: H.distance(U8[:, :0], U8[:, :0]), ValueError, "0 bytes"),
    "distance of rank 1": (lambda: H.distance(U8[0], U8), ValueError, "a has shape"),
    "distance of rank 3": (lambda: H.distance(U8, U8[None]), ValueError, "b has shape"),
    "distance too wide": (
        lambda: H.distance(np.zeros((1, 8185), np.uint8), np.zeros((1, 8185), np.uint8)),
        ValueError,
        "at most 8184",
    ),
    "distance metric": (lambda: H.distance(U8, U8, metric="cosine"), ValueError, "metric is 'cos"),
    "topk metric": (lambda: H.topk(U8, U8, 1, metric=None), ValueError, "metric is None"),
    "topk negative k": (lambda: H.topk(U8, U8, -1), ValueError, "k is -1"),
    "topk float k": (lambda: H.topk(U8, U8, 2.0), TypeError, "k is 2.0"),
    "topk text k": (lambda: H.topk(U8, U8, "2"), TypeError, "k is '2'"),
    "topk no k": (lambda: H.topk(U8, U8, None), TypeError, "k is None"),
    "topk widths": (
        lambda: H.topk(U8[:, :2], U8, 1),
        ValueError,
        r"\[hamming.topk\] queries have 2",
    ),
    "topk mask length": (lambda: H.topk(U8, U8, 1, mask=np.ones(4, bool)), ValueError, "mask has"),
    "topk mask rank": (lambda: H.topk(U8, U8, 1, mask=np.ones((3, 1), bool)), ValueError, "mask"),
    "topk mask dtype": (lambda: H.topk(U8, U8, 1, mask=np.ones(3)), TypeError, "mask has dtype"),
    "topk mask list": (lambda: H.topk(U8, U8, 1, mask=[True] * 3), TypeError, "mask is list"),
    "range NaN": (lambda: H.range_search(U8, U8, math.nan), ValueError, "radius is NaN"),
    "range text": (lambda: H.range_search(U8, U8, "far"), ValueError, "far"),
    "range metric": (lambda: H.range_search(U8, U8, 1, metric=""), ValueError, "metric"),
    "score widths": (lambda: H.score(F32, U8[:, :3]), ValueError, "32 columns"),
    "score no columns": (lambda: H.score(F32[:, :0], U8), ValueError, "0 columns"),
    "score rank 0": (lambda: H.score(F32[0, 0:1].reshape(()), U8), ValueError, "no dimension"),
    "score ints": (lambda: H.score(F32.astype(np.int32), U8), TypeError, "x has dtype int32"),
    "score codes swapped": (lambda: H.score(U8, F32), TypeError, "codes has dtype float32"),
    "score big-endian": (lambda: H.score(F32.astype(">f4"), U8), TypeError, "dtype >f4"),
    "topk_score NaN": (lambda: H.topk_score(F32 * np.nan, U8, 1), ValueError, "NaN or an inf"),
    "topk_score infinity": (lambda: H.topk_score(F32 - np.inf, U8, 1), ValueError, "NaN or an inf"),
    "topk_score rank": (lambda: H.topk_score(F32[0], U8, 1), ValueError, "x has shape"),
    "topk_score k": (lambda: H.topk_score(F32, U8, -2), ValueError, "k is -2"),
    "weights of another length": (lambda: H.weighted_sum(F32, U8, 32), ValueError, "for 3 codes"),
    "weights of rank 0": (
        lambda: H.weighted_sum(np.array(1, np.float32), U8, 32),
        ValueError,
        "weights",
    ),
    "weighted_sum dim": (lambda: H.weighted_sum(F32[:, :3], U8, 33), ValueError, "dim 33 takes 5"),
    "weighted_sum dim 0": (lambda: H.weighted_sum(F32[:, :3], U8, 0), ValueError, "dim is 0"),
    "pack ints": (lambda: H.pack(F32.astype(np.int64)), TypeError, "x has dtype int64"),
    "pack complex": (lambda: H.pack(F32.astype(complex)), TypeError, "x has dtype complex128"),
    "pack big-endian": (lambda: H.pack(F32.astype(">f4")), TypeError, "x has dtype >f4"),
    "pack objects": (lambda: H.pack(F32.astype(object)), TypeError, "x has dtype object"),
    "pack rank 0": (lambda: H.pack(np.array(1.0)), ValueError, "no dimension"),
    "pack rank 9": (lambda: H.pack(np.ones((1,) * 9)), TypeError, "more than 8 dimensions"),
    "pack NaN threshold": (lambda: H.pack(F32, math.nan), ValueError, "threshold is NaN"),
    "unpack widths": (lambda: H.unpack(U8, 33), ValueError, "dim 33 takes 5"),
    "unpack dim": (lambda: H.unpack(U8, -32), ValueError, "dim is -32"),
    "unpack float dim": (lambda: H.unpack(U8, 32.0), TypeError, "dim is 32.0"),
    "unpack dtype": (lambda: H.unpack(U8, 32, np.int32), ValueError, "dtype is 'int32'"),
    "unpack rank 0": (lambda: H.unpack(U8[0, 0:1].reshape(()), 1), ValueError, "no dimension"),
    "permute shift": (lambda: H.permute(U8, 32, 1.5), TypeError, None),
    "permute widths": (lambda: H.permute(U8, 40, 1), ValueError, "dim 40 takes 5"),
    "bind widths": (lambda: H.bind(U8, U8[:, :1]), ValueError, "4 bytes"),
    "bind shapes": (lambda: H.bind(U8, U8[:2]), ValueError, "broadcast"),
    "bind dtype": (lambda: H.bind(U8, F32), TypeError, "b has dtype float32"),
    "bundle of none": (lambda: H.bundle(U8[:0], 32), ValueError, "m >= 1"),
    "bundle of a row": (lambda: H.bundle(U8[0], 32), ValueError, "m >= 1"),
    "bundle ties": (lambda: H.bundle(U8, 32, ties="last"), ValueError, "ties is 'last'"),
    "bundle weights": (
        lambda: H.bundle(U8, 32, weights=np.ones(2, np.float32)),
        ValueError,
        "weights have shape",
    ),
    "bundle weights dtype": (
        lambda: H.bundle(U8, 32, weights=np.ones(3)),
        TypeError,
        "weights has dtype float64",
    ),
    "bundle NaN": (
        lambda: H.bundle(U8, 32, weights=np.full(3, np.nan, np.float32)),
        ValueError,
        "NaN",
    ),
    "binarize ints": (lambda: H.binarize(U8), TypeError, "x has dtype uint8"),
    "binarize estimator": (lambda: H.binarize(F32, "relu"), ValueError, "estimator is 'relu'"),
    "binarize temperature 0": (lambda: H.binarize(F32, temperature=0), ValueError, "temperature"),
    "binarize temperature NaN": (
        lambda: H.binarize(F32, temperature=math.nan),
        ValueError,
        "temperature is nan",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_arguments_are_refused_by_name(what):
    call, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("function", [pentad.hamming.topk, pentad.hamming.topk_score])
def test_results_beyond_memory_are_refused(function):
    queries = F32 if function is pentad.hamming.topk_score else U8
    with pytest.raises(MemoryError):
        function(queries, U8, 2**41)
    with pytest.raises((ValueError, MemoryError, OverflowError)):
        function(queries, U8, 2**63)


def test_intermediate_memory_that_cannot_be_had_is_an_error():
    endless = np.broadcast_to(U8[:1], (2**43, 4))  # a zero stride: no memory behind it
    with pytest.raises(MemoryError):
        pentad.hamming.distance(U8, endless)


def test_arguments_are_never_written(rng):
    db, x = codes(rng, 40, 50), rng.standard_normal((4, 50)).astype(np.float32)
    weights = rng.standard_normal((4, 40)).astype(np.float32)
    kept = [a.copy() for a in (db, x, weights)]
    for a in (db, x, weights):
        a.flags.writeable = False
    H.distance(db, db)
    H.topk(db, db, 3, mask=np.ones(40, bool))
    H.range_search(db, db, 9)
    H.score(x, db)
    H.topk_score(x, db, 3)
    H.weighted_sum(weights, db, 50)
    H.pack(x)
    H.unpack(db, 50)
    H.permute(db, 50, 3)
    H.bundle(db, 50)
    H.bind(db, db)
    assert_same((db, x, weights), tuple(kept))


# --- CUDA: what can be checked on any machine -----------------------------------------------------


def test_arguments_of_cuda_kernels_are_checked(rng):
    a, b = codes(rng, 3, 40), codes(rng, 5, 40)
    out = np.zeros((3, 5), np.int32)
    there = [DeviceArray(x) for x in (a, b, out)]
    elsewhere = DeviceArray(b, device=1)
    scratch = DeviceArray(np.zeros(64, np.uint8))
    refused = [
        (pentad.DeviceError, "b is not on cuda:0", (there[0], b, "hamming", there[2])),
        (pentad.DeviceError, "b is not on cuda:0", (there[0], elsewhere, "hamming", there[2])),
        (pentad.DeviceError, "out is not on cuda:0", (there[0], there[1], "hamming", out)),
        (pentad.DeviceError, "b is on an accelerator", (a, there[1], "hamming", out)),
        (TypeError, "out has dtype int32", (there[0], there[1], "jaccard", there[2])),
    ]
    if pentad._C.cuda_built() or pentad._C.cuda_on_host:
        small = DeviceArray(np.zeros(31, np.uint8))
        arguments = (*there[:2], "hamming", there[2])
        refused += [
            (ValueError, "needs scratch memory", arguments),
            (ValueError, r"scratch has shape \(31,\), expected 32", (*arguments, small)),
            (pentad.DeviceError, "scratch is not on cuda:0", (*arguments, small.array)),
        ]
    for error, message, arguments in refused:
        with pytest.raises(error, match=message):
            pentad._C.hamming_distance(*arguments)
    if (
        not pentad._C.cuda_on_host and not pentad._C.cuda_devices()
    ):  # the kernels themselves would read this memory
        with pytest.raises(pentad.DeviceError, match="no CUDA"):
            pentad._C.hamming_distance(*there[:2], "hamming", there[2], scratch)
    assert not out.any()


def test_topk_by_sorting(rng):
    """The way of a k that no list on a device holds; it is the same for tensors on the CPU."""
    torch = pytest.importorskip("torch")
    q, db = (torch.from_numpy(codes(rng, n, 30, "ties")) for n in (5, 90))
    some = torch.from_numpy(mask(rng, 90, "random"))
    for metric in METRICS:
        for chosen in (None, some):
            for k in (4, 100):
                got = _kernels.sorted_topk(q, db, k, metric, chosen)
                for x, y in zip(got, H.topk(q, db, k, metric=metric, mask=chosen), strict=True):
                    assert torch.equal(x, y)
    x = torch.from_numpy(rng.integers(-2, 3, (5, 30))).float()
    x[0, :2] = 3e38  # whose sums are infinite
    for chosen in (None, some):
        for k in (4, 100):
            got = _kernels.sorted_topk_score(x, db, k, chosen)
            for a, b in zip(got, H.topk_score(x, db, k, mask=chosen), strict=True):
                assert torch.equal(a, b)
