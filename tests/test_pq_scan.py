# SPDX-License-Identifier: Apache-2.0
"""The search over product codes: the native scan against its definition, and `topk_adc`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pentad
from pentad import _C
from pentad.pq import _scan, scan_reference

BLOCK = _C.pq_block_rows


def blocks_of(codes, nbits, module=_scan):
    n, M = codes.shape
    blocks = np.zeros((-(-n // BLOCK), *module.block_shape(M, nbits)), np.uint8)
    module.to_blocks(codes, nbits, 0, blocks)
    return blocks


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@st.composite
def searches(draw):
    """The arguments of `topk` up to `ids`, and lists or None; some with many equal costs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nbits, M = draw(st.sampled_from([4, 6, 8])), draw(st.integers(1, 40) | st.just(128))
    n, nq = draw(st.integers(0, 300) | st.just(2500)), draw(st.integers(1, 9))
    used = draw(st.integers(1, M))
    shape = (nq, used, 1 << nbits)
    tables = rng.integers(0, 3, shape) if draw(st.booleans()) else rng.standard_normal(shape)
    tables = (tables * 10.0 ** draw(st.integers(-6, 6))).astype(np.float32)
    codes = rng.integers(0, 1 << nbits, (n, M), np.uint8)
    offsets = rng.standard_normal(nq).astype(np.float32) if draw(st.booleans()) else None
    factors = None
    if draw(st.booleans()):
        factors = np.stack([rng.random(n), rng.standard_normal(n)]).astype(np.float32)
    mask = rng.random(n) < draw(st.sampled_from([0.0, 0.01, 0.5])) if draw(st.booleans()) else None
    ids = rng.permutation(3 * n)[:n].astype(np.int64) if draw(st.booleans()) else None
    lists = None
    if draw(st.booleans()):
        offsets = None
        cuts = np.sort(rng.integers(0, -(-n // BLOCK) + 1, 4))
        begin = np.minimum(np.tile(cuts[:-1], nq) * BLOCK, n // BLOCK * BLOCK)
        end = np.minimum(n, np.tile(cuts[1:], nq) * BLOCK - rng.integers(0, 60, 3 * nq))
        end = np.where(np.tile(cuts[1:] > cuts[:-1], nq), np.maximum(begin, end), begin)
        table = rng.integers(0, nq, 3 * nq) if draw(st.booleans()) else None
        offset = rng.standard_normal(3 * nq).astype(np.float32) if draw(st.booleans()) else None
        lists = _scan.Ranges(3 * np.arange(nq + 1), begin, end, table, offset)
    return (tables, offsets, blocks_of(codes, nbits), nbits, M, n, factors, mask, ids), lists


@settings(max_examples=60)
@given(search=searches(), k=st.sampled_from([0, 1, 10, 400]), threads=st.integers(1, 3))
def test_search_is_the_definition(search, k, threads, isa):
    where, lists = search
    before = pentad.num_threads()
    pentad.set_num_threads(threads)
    try:
        expected = scan_reference.topk(*where, k, lists)
        assert_equal(_scan.topk(*where, k, lists), expected)
        costs = expected[0][np.isfinite(expected[0])]
        radius = float(np.median(costs)) if len(costs) else 0.0
        found = _scan.range_search(*where, radius, lists)
        assert_equal(found, scan_reference.range_search(*where, radius, lists))
    finally:
        pentad.set_num_threads(before)


@pytest.mark.parametrize("nbits", [4, 6, 8])
@pytest.mark.parametrize("M", [1, 7, 8, 9, 33])
def test_blocks_are_the_definition_and_come_back(nbits, M, rng):
    codes = rng.integers(0, 1 << nbits, (200, M), np.uint8)
    blocks = blocks_of(codes[:70], nbits)
    blocks = np.concatenate([blocks, np.zeros_like(blocks)])
    _scan.to_blocks(codes[70:], nbits, 70, blocks)  # into the middle of a block
    np.testing.assert_array_equal(blocks, blocks_of(codes, nbits, scan_reference))
    at = rng.permutation(200)
    np.testing.assert_array_equal(_scan.from_blocks(blocks, nbits, M, 200, at), codes[at])


def test_many_rows_and_every_size_of_k(rng, isa):
    # More rows than one chunk of blocks, so that limits and byte tables are renewed on the way.
    n, M = 60_000, 8
    codes = rng.integers(0, 256, (n, M), np.uint8)
    tables = rng.standard_normal((3, M, 256)).astype(np.float32)
    where = (tables, None, blocks_of(codes, 8), 8, M, n, None, None, None)
    costs = scan_reference.costs(tables, codes)
    for k in (1, 10, 5000, n + 7):
        values, ids = _scan.topk(*where, k)
        for q in range(3):
            order = np.lexsort((np.arange(n), costs[q]))[:k]
            np.testing.assert_array_equal(ids[q, : len(order)], order)
            np.testing.assert_array_equal(values[q, : len(order)], costs[q, order])
        assert (ids[:, n:] == -1).all()
        assert np.isinf(values[:, n:]).all()


def test_an_offset_far_above_the_tables_costs_no_row(rng, isa):
    # The float32 sums round at the offset's size: all of these costs are equal, the first rows win.
    codes = rng.integers(0, 16, (500, 2), np.uint8)
    tables = (1e-9 * rng.standard_normal((1, 2, 16))).astype(np.float32)
    offset = np.array([3.0], np.float32)
    where = (tables, offset, blocks_of(codes, 4), 4, 2, 500, None, None, None)
    assert_equal(_scan.topk(*where, 20), scan_reference.topk(*where, 20))


# --- topk_adc -------------------------------------------------------------------------------------


def brute(queries, codes, codebooks, k, metric, mask):
    scores = pentad.pq.adc(queries, codes, codebooks, metric=metric)
    costs = scores if metric == "l2" else -scores
    allowed = np.arange(len(codes)) if mask is None else np.flatnonzero(mask)
    values = np.full((len(queries), k), np.inf if metric == "l2" else -np.inf, np.float32)
    ids = np.full((len(queries), k), -1)
    for q in range(len(queries)):
        order = allowed[np.lexsort((allowed, costs[q, allowed]))][:k]
        values[q, : len(order)], ids[q, : len(order)] = scores[q, order], order
    return values, ids


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("entries", [1, 5, 16, 17, 64, 100, 256, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_topk_adc_is_brute_force(metric, entries, masked, rng):
    codebooks = rng.standard_normal((5, entries, 3)).astype(np.float32)
    codebooks[:, entries // 2] = codebooks[:, 0]  # equal rows, so ties
    codes = rng.integers(0, entries, (700, 5)).astype(np.int32)
    queries = rng.standard_normal((4, 15)).astype(np.float32)
    mask = rng.random(700) < 0.1 if masked else None
    for k in (0, 1, 13, 800):
        found = pentad.pq.topk_adc(queries, codes, codebooks, k, metric=metric, mask=mask)
        assert_equal(found, brute(queries, codes, codebooks, k, metric, mask))


def test_topk_adc_of_tensors(rng):
    torch = pytest.importorskip("torch")
    codebooks = torch.randn(6, 2, 40).transpose(1, 2)
    codes = torch.randint(0, 40, (2, 300), dtype=torch.int64).T.repeat(1, 3)
    queries = torch.randn(12, 5).T.requires_grad_()
    mask = torch.rand(300) < 0.5
    arrays = queries.detach().numpy(), codes.numpy(), codebooks.numpy()
    expected = brute(*arrays, 7, "ip", mask.numpy())
    call = pentad.pq.topk_adc
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        scores, ids = function(queries, codes, codebooks, 7, metric="ip", mask=mask)
        assert not scores.requires_grad
        assert_equal((scores.numpy(), ids.numpy()), expected)
    half = call(queries.bfloat16(), codes, codebooks.half(), 7)
    rounded = queries.detach().bfloat16().float().numpy(), codes.numpy()
    assert_equal(
        [part.numpy() for part in half],
        brute(*rounded, codebooks.half().float().numpy(), 7, "l2", None),
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"queries": np.zeros((2, 5), np.float32)}, ValueError, r"expected \(nq, 6\)"),
        ({"queries": np.full((2, 6), np.nan, np.float32)}, ValueError, "a score is a NaN"),
        ({"queries": np.zeros((2, 6), np.int32)}, TypeError, "queries has dtype int32"),
        ({"codes": np.zeros((4, 2), np.uint8)}, ValueError, r"expected \(n, 3\)"),
        ({"codes": np.full((4, 3), 9, np.int64)}, ValueError, "codes hold 9, expected 0 to 3"),
        ({"codes": np.full((4, 3), -1, np.int64)}, ValueError, "codes hold -1"),
        ({"codes": np.zeros((4, 3), np.float32)}, TypeError, "codes has dtype float32"),
        ({"codebooks": np.zeros((3, 0, 2), np.float32)}, ValueError, "codebooks have shape"),
        ({"k": -1}, ValueError, "k is -1"),
        ({"k": 1.5}, TypeError, "k is 1.5"),
        ({"metric": "dot"}, ValueError, "metric is 'dot'"),
        ({"mask": np.ones(3, bool)}, ValueError, r"mask has shape \(3,\)"),
        ({"mask": np.ones(4, np.uint8)}, TypeError, "mask has dtype uint8"),
    ],
)
def test_topk_adc_refuses(change, error, text):
    good = {
        "queries": np.zeros((2, 6), np.float32),
        "codes": np.zeros((4, 3), np.uint8),
        "codebooks": np.zeros((3, 4, 2), np.float32),
        "k": 1,
        "metric": "l2",
        "mask": None,
    }
    pentad.pq.topk_adc(**good)
    with pytest.raises(error, match=rf"^\[pq.topk_adc\] .*{text}"):
        pentad.pq.topk_adc(**good | change)


# --- The extension's own checks -------------------------------------------------------------------

F, I = np.float32, np.int64  # noqa: E741
GOOD = {
    "tables": np.zeros((2, 3, 16), F),
    "offset": None,
    "blocks": np.zeros((2, 1, 64, 4), np.uint8),
    "nbits": 4,
    "M": 5,
    "rows": 100,
    "scale": None,
    "bias": None,
    "mask": None,
    "ids": None,
    "range_offsets": None,
    "range_begin": None,
    "range_end": None,
    "range_table": None,
    "range_offset": None,
    "values": np.zeros((2, 4), F),
    "found": np.zeros((2, 4), I),
}
LISTS = {
    "range_offsets": np.array([0, 1, 2]),
    "range_begin": np.array([0, 64]),
    "range_end": np.array([64, 100]),
}


@pytest.mark.parametrize(
    "change",
    [
        {"tables": np.zeros((2, 3, 17), F)},
        {"tables": np.zeros((2, 6, 16), F)},
        {"tables": np.zeros((2, 0, 16), F)},
        {"tables": np.full((2, 3, 16), np.inf, F)},
        {"tables": np.zeros((2, 3, 32), F)[:, :, ::2]},
        {"tables": np.zeros((2, 3, 16), np.float64)},
        {"offset": np.zeros(3, F)},
        {"offset": np.full(2, np.nan, F)},
        {"blocks": np.zeros((2, 2, 64, 4), np.uint8)},
        {"blocks": np.zeros((2, 1, 64, 8), np.uint8)[..., ::2]},
        {"blocks": np.zeros((1, 1, 64, 4), np.uint8)},
        {"nbits": 5},
        {"M": 0},
        {"M": 9},
        {"rows": -1},
        {"rows": 129},
        {"scale": np.ones(100, F)},
        {"scale": np.ones(100, F), "bias": np.zeros(99, F)},
        {"scale": -np.ones(100, F), "bias": np.zeros(100, F)},
        {"scale": np.ones(100, F), "bias": np.full(100, np.nan, F)},
        {"mask": np.ones(99, bool)},
        {"mask": np.ones(200, bool)[::2]},
        {"ids": np.zeros(101, I)},
        {"values": np.zeros((3, 4), F)},
        {"found": np.zeros((2, 5), I)},
        {"found": np.zeros((2, 4), np.int32)},
        LISTS | {"range_begin": np.array([0, 63])},
        LISTS | {"range_begin": np.array([0, -64])},
        LISTS | {"range_end": np.array([64, 101])},
        LISTS | {"range_end": np.array([64])},
        LISTS | {"range_offsets": np.array([0, 2, 1])},
        LISTS | {"range_offsets": np.array([1, 1, 2])},
        LISTS | {"range_table": np.array([0, 2])},
        LISTS | {"range_table": np.array([0, -1])},
        LISTS | {"range_offset": np.zeros(3, F)},
        LISTS | {"tables": np.zeros((3, 3, 16), F)},
    ],
    ids=lambda change: "-".join(change),
)
def test_raw_search_refuses(change):
    _C.pq_topk(*GOOD.values())
    _C.pq_topk(*(GOOD | LISTS).values())
    with pytest.raises((ValueError, TypeError), match=r"^\[pq.topk\] "):
        _C.pq_topk(*(GOOD | change).values())


def test_raw_blocks_refuse():
    blocks = np.zeros((1, 1, 64, 4), np.uint8)
    with pytest.raises(ValueError, match="takes more than 4 bits"):
        _C.pq_to_blocks(np.full((2, 5), 16, np.uint8), 4, 0, blocks)
    with pytest.raises(ValueError, match="more than the blocks hold"):
        _C.pq_to_blocks(np.zeros((2, 5), np.uint8), 4, 63, blocks)
    with pytest.raises(ValueError, match="positions hold 7"):
        _C.pq_from_blocks(blocks, 4, 5, 7, np.array([7]), np.zeros((1, 5), np.uint8))
    blocks.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _C.pq_to_blocks(np.zeros((2, 5), np.uint8), 4, 0, blocks)
