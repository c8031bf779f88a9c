# SPDX-License-Identifier: Apache-2.0
"""Decoding with a cache: appending in place, pages, padding, rotary embedding, refusals."""

import re

import pytest

import pentad

torch = pytest.importorskip("torch")

A = pentad.attention
B, HQ, HK, D, DV, CAPACITY = 3, 4, 2, 16, 12, 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def caches(dtype=torch.float32, rows=B, capacity=CAPACITY):
    return torch.randn(rows, HK, capacity, D).to(dtype), torch.randn(rows, HK, capacity, DV).to(
        dtype
    )


def new_tokens(t, dtype=torch.float32, sq=None):
    shapes = (HQ, sq or t, D), (HK, t, D), (HK, t, DV)
    return [torch.randn(B, *shape).to(dtype) for shape in shapes]


def paged(cache, page_size, pages=None):
    """(pages, H, page_size, D) and the table, in a random order; unused pages hold NaN."""
    b, h, capacity, d = cache.shape
    per_sequence = -(-capacity // page_size)
    pages = pages or b * per_sequence + 3
    generator = torch.Generator().manual_seed(3)
    table = torch.randperm(pages, generator=generator)[: b * per_sequence].view(b, per_sequence)
    store = torch.full((pages, h, page_size, d), torch.nan, dtype=cache.dtype)
    roomy = torch.full((b, h, per_sequence * page_size, d), torch.nan, dtype=cache.dtype)
    roomy[:, :, :capacity] = cache
    store[table] = roomy.unflatten(2, (per_sequence, page_size)).transpose(1, 2)
    return store, table.int()


def gathered(store, table):
    """The pages of each sequence in a row: (B, H, pages * page_size, D)."""
    return store[table.long()].transpose(1, 2).flatten(2, 3)


def by_attention(q, k_cache, v_cache, lengths, start=None, rows=None, **options):
    """Each sequence alone, with the keys cut out."""
    results = []
    for b, n in enumerate(lengths.tolist()):
        row = b if rows is None else rows[b].item()
        first = 0 if start is None else start[b].item()
        keys = slice(first, first + n)
        own = {k: v[b : b + 1, ..., :n] if k == "bias" else v for k, v in options.items()}
        own["causal"] = own.get("causal", True)
        k, v = k_cache[row : row + 1, :, keys], v_cache[row : row + 1, :, keys]
        results.append(A.attention(q[b : b + 1], k, v, return_lse=True, **own))
    return [torch.cat(part) for part in zip(*results, strict=True)]


def assert_close(got, want, dtype):
    rough = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-12}
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=rough[dtype], atol=rough[dtype])


LENGTHS = torch.tensor([7, 0, 33])

OPTIONS = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"window": (5, 0)},
    "window both ways": {"window": (4, 1), "causal": False},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "sink": {"sink": torch.tensor([0.0, 2.0, -3.0, 5.0])},
    "bias": {"bias": torch.randn(B, HQ, 1, CAPACITY)},
    "bias bool": {"bias": torch.rand(B, 1, 1, CAPACITY) > 0.3},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize("option", OPTIONS)
def test_decode_is_attention_to_the_tokens_so_far(option, t, dtype):
    k_cache, v_cache = caches(dtype)
    q, k_new, v_new = new_tokens(t, dtype)
    k_want, v_want = k_cache.clone(), v_cache.clone()
    for b, n in enumerate(LENGTHS.tolist()):
        k_want[b, :, n : n + t], v_want[b, :, n : n + t] = k_new[b], v_new[b]
    options = OPTIONS[option]
    got = A.decode(
        q, k_cache, v_cache, LENGTHS, k_new=k_new, v_new=v_new, return_lse=True, **options
    )
    assert torch.equal(k_cache, k_want)
    assert torch.equal(v_cache, v_want)
    assert_close(got, by_attention(q, k_want, v_want, LENGTHS + t, **options), dtype)
    again = A.decode(q, k_cache, v_cache, LENGTHS + t, **options)
    assert torch.equal(again, got[0])


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 40, 64])
@pytest.mark.parametrize("t", [1, 4])
def test_shuffled_pages_give_the_same_bits(t, page_size, dtype):
    k_cache, v_cache = caches(dtype)
    q, k_new, v_new = new_tokens(t, dtype)
    k_pages, table = paged(k_cache, page_size)
    v_pages, _ = paged(v_cache, page_size)
    new = {"k_new": k_new, "v_new": v_new}
    got = A.decode(q, k_pages, v_pages, LENGTHS, block_table=table, return_lse=True, **new)
    want = A.decode(q, k_cache, v_cache, LENGTHS, return_lse=True, **new)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    for b, n in enumerate((LENGTHS + t).tolist()):
        for pages, cache in ((k_pages, k_cache), (v_pages, v_cache)):
            assert torch.equal(gathered(pages, table)[b, :, :n], cache[b, :, :n])
    used = torch.zeros(len(k_pages), dtype=torch.bool)
    used[table.long()] = True
    assert k_pages[~used].isnan().all()


def test_table_entries_past_the_length_may_hold_anything():
    k_cache, v_cache = caches()
    q, k_new, v_new = new_tokens(1)
    k_pages, table = paged(k_cache, 8)
    v_pages, _ = paged(v_cache, 8)
    lengths = torch.tensor([7, 0, 15])
    want = A.decode(
        q, k_pages.clone(), v_pages.clone(), lengths, block_table=table, k_new=k_new, v_new=v_new
    )
    table[:, 2:] = torch.tensor([-1, 10**6, 2**31 - 1]).int()
    got = A.decode(q, k_pages, v_pages, lengths, block_table=table, k_new=k_new, v_new=v_new)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_rows_of_a_larger_cache(dtype):
    k_cache, v_cache = caches(dtype, rows=6)
    q, k_new, v_new = new_tokens(2, dtype)
    rows = torch.tensor([4, 0, 5], dtype=torch.int32)
    before = k_cache.clone()
    got = A.decode(
        q,
        k_cache,
        v_cache,
        LENGTHS,
        k_new=k_new,
        v_new=v_new,
        cache_batch_idx=rows,
        return_lse=True,
    )
    for b, n in enumerate(LENGTHS.tolist()):
        assert torch.equal(k_cache[rows[b], :, n : n + 2], k_new[b])
        before[rows[b], :, n : n + 2] = k_new[b]
    assert torch.equal(k_cache, before)
    assert_close(got, by_attention(q, k_cache, v_cache, LENGTHS + 2, rows=rows), dtype)
    # Without an index, the first rows.
    got = A.decode(q, k_cache, v_cache, LENGTHS + 2)
    assert torch.equal(got, A.decode(q, k_cache[:B], v_cache[:B], LENGTHS + 2))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_left_padding(dtype):
    k_cache, v_cache = caches(dtype)
    q, k_new, v_new = new_tokens(2, dtype)
    start = torch.tensor([3, 38, 0])
    before = v_cache.clone()
    got = A.decode(
        q, k_cache, v_cache, LENGTHS, k_new=k_new, v_new=v_new, cache_leftpad=start, return_lse=True
    )
    for b, n in enumerate((LENGTHS + start).tolist()):
        before[b, :, n : n + 2] = v_new[b]
    assert torch.equal(v_cache, before)
    assert_close(got, by_attention(q, k_cache, v_cache, LENGTHS + 2, start=start), dtype)


def test_caches_of_any_strides():
    k_cache, v_cache = caches()
    q, k_new, v_new = new_tokens(3)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k_cache, v_cache)]
    roomy = torch.zeros(B, HK, CAPACITY, 2 * D)
    views.append(roomy[..., ::2].copy_(k_cache))
    want = A.decode(q, k_cache, v_cache, LENGTHS, k_new=k_new, v_new=v_new)
    for k_view in (views[0], views[2]):
        v_view = views[1].clone(memory_format=torch.preserve_format)
        got = A.decode(q, k_view, v_view, LENGTHS, k_new=k_new, v_new=v_new)
        torch.testing.assert_close(got, want)
        assert torch.equal(k_view, k_cache)
        assert torch.equal(v_view, v_cache)
    assert not roomy[..., 1::2].any()
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = A.decode(strided, k_cache, v_cache, LENGTHS + 3)
    assert torch.equal(out, want)
    assert out.transpose(1, 2).is_contiguous()


def test_fewer_and_more_queries_than_new_tokens():
    for sq, t in ((1, 4), (4, 1), (3, 0)):
        k_cache, v_cache = caches()
        q, k_new, v_new = new_tokens(t, sq=sq)
        got = A.decode(q, k_cache, v_cache, LENGTHS, k_new=k_new, v_new=v_new, return_lse=True)
        want = by_attention(q, k_cache, v_cache, LENGTHS + t)
        assert_close(got, want, torch.float32)


def test_one_length_for_all():
    k_cache, v_cache = caches()
    q, _, _ = new_tokens(2)
    want = A.decode(q, k_cache, v_cache, torch.tensor([9, 9, 9]))
    assert torch.equal(A.decode(q, k_cache, v_cache, 9), want)
    assert torch.equal(A.decode(q, k_cache, v_cache, torch.tensor([9] * 3).int()), want)


def test_an_empty_cache_gives_zeros():
    k_cache, v_cache = caches()
    out, lse = A.decode(new_tokens(1)[0], k_cache, v_cache, 0, return_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_what_lies_past_the_length_is_never_read():
    k_cache, v_cache = caches()
    q, k_new, v_new = new_tokens(1)
    for b, n in enumerate(LENGTHS.tolist()):
        k_cache[b, :, n:], v_cache[b, :, n:] = torch.nan, torch.inf
    assert A.decode(q, k_cache, v_cache, LENGTHS, k_new=k_new, v_new=v_new).isfinite().all()


def test_the_same_bits_for_any_number_of_threads(threads):
    k_cache, v_cache = (torch.randn(1, 1, 3000, d) for d in (64, 64))
    q = torch.randn(1, 4, 1, 64)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(A.decode(q, k_cache, v_cache, 2990))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"window": (6, 0)}, {"sink": torch.randn(HQ)}], ids=["", "window", "sink"]
)
@pytest.mark.parametrize("pages", [None, 5])
def test_step_by_step_is_causal_attention(pages, options, dtype):
    q, k, v = new_tokens(24, dtype)
    want = A.attention(q, k, v, causal=True, **options)
    k_cache, v_cache = (torch.full_like(t, torch.nan) for t in caches(dtype))
    table = None
    if pages:
        k_cache, table = paged(k_cache, pages)
        v_cache, _ = paged(v_cache, pages)
    n, outs = 0, []
    for t in (10, 1, 1, 3, 1, 8):  # a prompt, then a token or a few at a time
        now = slice(n, n + t)
        outs.append(
            A.decode(
                q[:, :, now],
                k_cache,
                v_cache,
                n,
                k_new=k[:, :, now],
                v_new=v[:, :, now],
                block_table=table,
                **options,
            )
        )
        n += t
    assert_close([torch.cat(outs, 2)], [want], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "mode", [{"causal": True}, {"causal": False}, {"window": (9, 9), "causal": False}]
)
@pytest.mark.parametrize("dim", [D, 8])
def test_rotary_embedding_at_the_positions(dim, mode, interleaved, dtype):
    k_cache, v_cache = caches(dtype)
    q, k_new, v_new = new_tokens(3, dtype)
    cos, sin = (t.to(dtype) for t in A.rotary_tables(CAPACITY, dim, dtype=torch.float64))
    k_want, v_want = k_cache.clone(), v_cache.clone()
    turn = {"interleaved": interleaved}
    k_turned = A.apply_rotary(k_new, cos, sin, offsets=LENGTHS, **turn)
    if mode == {"causal": False}:  # all queries at the first new position
        positions = LENGTHS[:, None].expand(B, 3)
        q_turned = A.apply_rotary(q, cos, sin, positions=positions, **turn)
    else:
        q_turned = A.apply_rotary(q, cos, sin, offsets=LENGTHS, **turn)
    want = A.decode(q_turned, k_want, v_want, LENGTHS, k_new=k_turned, v_new=v_new, **mode)
    got = A.decode(
        q, k_cache, v_cache, LENGTHS, k_new=k_new, v_new=v_new, rotary_cos=cos, rotary_sin=sin,
        rotary_interleaved=interleaved, **mode,
    )  # fmt: skip
    assert torch.equal(got, want)
    assert torch.equal(k_cache, k_want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_decoding_is_rotary_attention(interleaved):
    q, k, v = new_tokens(20, torch.float64)
    cos, sin = A.rotary_tables(20, D, dtype=torch.float64)
    turned = [A.apply_rotary(t, cos, sin, interleaved=interleaved) for t in (q, k)]
    want = A.attention(*turned, v, causal=True)
    k_cache, v_cache = caches(torch.float64)
    outs = [
        A.decode(
            q[:, :, n : n + 1],
            k_cache,
            v_cache,
            n,
            k_new=k[:, :, n : n + 1],
            v_new=v[:, :, n : n + 1],
            rotary_cos=cos,
            rotary_sin=sin,
            rotary_interleaved=interleaved,
        )
        for n in range(20)
    ]
    torch.testing.assert_close(torch.cat(outs, 2), want)


# --- torch around it ------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("pages", [None, 8])
def test_compiles_and_appends_in_place(pages, dynamic):
    torch._dynamo.reset()
    stored, table = caches(), None
    if pages:
        (k_pages, table), (v_pages, _) = paged(stored[0], pages), paged(stored[1], pages)
        stored = k_pages, v_pages
    cos, sin = A.rotary_tables(CAPACITY, D)

    def step(q, k_cache, v_cache, lengths, k_new, v_new):
        out = A.decode(
            q, k_cache, v_cache, lengths, k_new=k_new, v_new=v_new, block_table=table,
            rotary_cos=cos, rotary_sin=sin, window=(20, 0),
        )  # fmt: skip
        return out + 1, lengths + k_new.shape[2]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (step, compiled):
        k_cache, v_cache, lengths, outs = stored[0].clone(), stored[1].clone(), LENGTHS, []
        torch.manual_seed(2)
        for t in (1, 3, 2):
            q, k_new, v_new = new_tokens(t)
            out, lengths = function(q, k_cache, v_cache, lengths, k_new, v_new)
            outs.append(out)
        results.append((*outs, k_cache, v_cache))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_opcheck():
    from pentad.attention import autograd

    for dtype in (torch.float32, torch.bfloat16):
        k_cache, v_cache = caches(dtype)
        q, k_new, v_new = new_tokens(2, dtype)
        pages, table = paged(torch.nan_to_num(k_cache), 8)
        pages.nan_to_num_()
        pad = torch.tensor([0, 3, 1])
        torch.library.opcheck(
            autograd.append,
            (k_new, v_new, k_cache, v_cache, LENGTHS, torch.tensor([1, 2, 0]), pad, None),
        )
        torch.library.opcheck(
            autograd.append, (k_new, k_new, pages, pages.clone(), LENGTHS, None, None, table)
        )
        rest = (None, torch.randn(HQ), torch.rand(HQ), None, 0.0, 4, 0)
        torch.library.opcheck(
            autograd.decode, (q, k_cache, v_cache, LENGTHS, None, pad, None, *rest)
        )
        torch.library.opcheck(autograd.decode, (q, pages, pages, LENGTHS, None, None, table, *rest))


def test_appending_counts_as_a_change():
    k_cache, v_cache = caches()
    _, k_new, v_new = new_tokens(1)
    weight = torch.ones((), requires_grad=True)
    out = (k_cache * weight).sum()
    A.decode(new_tokens(1)[0], k_cache, v_cache, LENGTHS, k_new=k_new, v_new=v_new)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    with torch.inference_mode():
        k_cache, v_cache = caches()
        A.decode(new_tokens(1)[0], k_cache, v_cache, LENGTHS, k_new=k_new, v_new=v_new)
        assert torch.equal(k_cache[0, :, 7], k_new[0, :, 0])


@pytest.mark.parametrize("name", ["q", "k_new", "v_cache", "sink"])
def test_gradients_are_refused(name):
    given = dict(zip(("q", "k_new", "v_new"), new_tokens(1), strict=True))
    given |= dict(zip(("k_cache", "v_cache"), caches(), strict=True))
    given |= {"cache_seqlens": LENGTHS, "sink": torch.zeros(HQ)}
    before = given["k_cache"].clone()
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match="requires a gradient, which is not computed"):
        A.decode(**given)
    assert torch.equal(given["k_cache"], before)
    with torch.no_grad():
        A.decode(**given)


# --- Refusals -------------------------------------------------------------------------------------

TABLE = torch.arange(15).view(3, 5).int()


def with_entry(tensor, at, value):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


COS, SIN = A.rotary_tables(40, D)
Z = torch.zeros
PAGED = {"k_cache": Z(15, HK, 8, D), "v_cache": Z(15, HK, 8, DV), "block_table": TABLE}

BAD = {
    "q list": ({"q": [1.0]}, TypeError, "q is list"),
    "q dtype": ({"q": Z(B, HQ, 1, D).int()}, TypeError, "q has dtype int32"),
    "cache dtype": ({"k_cache": Z(B, HK, 40, D).half()}, TypeError, "k_cache has dtype float16"),
    "cache rank": ({"v_cache": Z(HK, 40, DV)}, ValueError, "v_cache has shape (2, 40, 12)"),
    "cache dim": ({"k_cache": Z(B, HK, 40, 8)}, ValueError, "k_cache has head_dim 8 but q has 16"),
    "cache heads": ({"v_cache": Z(B, 1, 40, DV)}, ValueError, "v_cache has 1 heads but k_cache"),
    "groups": ({"q": Z(B, 3, 1, D)}, ValueError, "q has 3 heads and k_cache has 2"),
    "capacities": ({"v_cache": Z(B, HK, 41, DV)}, ValueError, "v_cache has shape (3, 2, 41, 12)"),
    "cache rows": (
        {"k_cache": Z(2, HK, 40, D), "v_cache": Z(2, HK, 40, DV)},
        ValueError,
        "k_cache has batch 2, expected at least q's 3",
    ),
    "meta cache": (
        {"k_cache": Z(B, HK, 40, D, device="meta")},
        pentad.DeviceError,
        "k_cache is on meta but q is on cpu",
    ),
    "lengths": ({"cache_seqlens": Z(2).int()}, ValueError, "cache_seqlens has shape (2,)"),
    "lengths float": ({"cache_seqlens": Z(B)}, TypeError, "cache_seqlens has dtype float32"),
    "lengths list": ({"cache_seqlens": [1, 2, 3]}, TypeError, "cache_seqlens is list"),
    "scale": ({"scale": float("nan")}, ValueError, "scale is not finite"),
    "scale of float64": ({"scale": 1e39}, ValueError, "scale is not finite"),
    "infinite softcap": ({"softcap": float("inf")}, ValueError, "softcap is inf"),
    "full": ({"cache_seqlens": torch.tensor([0, 40, 1])}, ValueError, "needs 41 positions"),
    "full int": ({"cache_seqlens": 40}, ValueError, "needs 41 positions"),
    "negative length": ({"cache_seqlens": torch.tensor([0, -1, 1])}, ValueError, "-1"),
    "huge length": ({"cache_seqlens": torch.tensor([0, 2**63 - 1, 1])}, ValueError, f"{2**63 - 1}"),
    "new alone": ({"v_new": None}, ValueError, "v_new is None, expected k_new and v_new"),
    "new alone 2": ({"k_new": None}, ValueError, "k_new is None, expected k_new and v_new"),
    "new dtype": ({"k_new": Z(B, HK, 1, D).double()}, TypeError, "k_new has dtype float64"),
    "new heads": ({"k_new": Z(B, HQ, 1, D)}, ValueError, "k_new has shape (3, 4, 1, 16), expected"),
    "new tokens": (
        {"v_new": Z(B, HK, 2, DV)},
        ValueError,
        "v_new has shape (3, 2, 2, 12), expected",
    ),
    "new dim": ({"v_new": Z(B, HK, 1, D)}, ValueError, "expected (3, 2, 1, 12)"),
    "leftpad": ({"cache_leftpad": torch.tensor([0, 40, 0])}, ValueError, "needs 41 positions"),
    "leftpad beyond": (
        {"cache_leftpad": torch.tensor([0, 0, 7])},
        ValueError,
        "needs 41 positions",
    ),
    "leftpad negative": ({"cache_leftpad": torch.tensor([0, -1, 0])}, ValueError, "holds -1"),
    "leftpad dtype": ({"cache_leftpad": Z(B)}, TypeError, "cache_leftpad has dtype float32"),
    "row": ({"cache_batch_idx": torch.tensor([0, 3, 1])}, ValueError, "holds 3, expected 0 to 2"),
    "row negative": ({"cache_batch_idx": torch.tensor([0, -1, 1])}, ValueError, "holds -1"),
    "row twice": ({"cache_batch_idx": torch.tensor([0, 1, 1])}, ValueError, "twice"),
    "rows": ({"cache_batch_idx": torch.tensor([0, 1])}, ValueError, "cache_batch_idx has shape"),
    "page": ({**PAGED, "block_table": with_entry(TABLE, (2, 4), 15)}, ValueError, "page 15"),
    "page read": ({**PAGED, "block_table": with_entry(TABLE, (2, 0), 15)}, ValueError, "page 15"),
    "page negative": (
        {**PAGED, "block_table": with_entry(TABLE, (0, 0), -1)},
        ValueError,
        "page -1",
    ),
    "page twice": ({**PAGED, "block_table": with_entry(TABLE, (0, 0), 5)}, ValueError, "twice"),
    "pages full": (
        {**PAGED, "cache_seqlens": torch.tensor([40, 0, 0])},
        ValueError,
        "needs 41 positions",
    ),
    "table dtype": (
        {**PAGED, "block_table": TABLE.long()},
        TypeError,
        "block_table has dtype int64",
    ),
    "table shape": (
        {**PAGED, "block_table": TABLE[:2]},
        ValueError,
        "block_table has shape (2, 5)",
    ),
    "table and rows": (
        {**PAGED, "cache_batch_idx": torch.arange(3)},
        ValueError,
        "cache_batch_idx cannot be used with block_table",
    ),
    "table and pad": (
        {**PAGED, "cache_leftpad": torch.arange(3)},
        ValueError,
        "cache_leftpad cannot be used with block_table",
    ),
    "one table": ({"rotary_cos": COS}, ValueError, "rotary_sin is None"),
    "rotary alone": (
        {"rotary_cos": COS, "rotary_sin": SIN, "k_new": None, "v_new": None},
        ValueError,
        "only used with k_new",
    ),
    "rotary wide": (
        {"rotary_cos": Z(40, 9), "rotary_sin": Z(40, 9)},
        ValueError,
        "rotate 18 dimensions but q has head_dim 16",
    ),
    "rotary short": (
        {"rotary_cos": COS[:33], "rotary_sin": SIN[:33]},
        ValueError,
        "positions are 0 to 33, expected 0 to 32",
    ),
    "causal": ({"causal": "top_left"}, ValueError, "causal is 'top_left', expected False or True"),
    "window": ({"window": (-3, 0)}, ValueError, "window is (-3, 0)"),
    "softcap": ({"softcap": -2}, ValueError, "softcap is -2.0"),
    "alibi": ({"alibi_slopes": Z(2)}, ValueError, "alibi_slopes has shape (2,)"),
    "sink": ({"sink": Z(HK)}, ValueError, "sink has shape (2,)"),
    "bias": ({"bias": Z(B, HQ, 1, 39)}, ValueError, "broadcasts to (3, 4, 1, 40)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused_before_anything_is_written(what):
    change, error, message = BAD[what]
    given = dict(zip(("q", "k_new", "v_new"), new_tokens(1), strict=True))
    given |= dict(zip(("k_cache", "v_cache"), caches(), strict=True))
    given |= {"cache_seqlens": LENGTHS}
    given |= change
    before = [given[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(error, match=re.escape(message)):
        A.decode(**given)
    for name, tensor in zip(("k_cache", "v_cache"), before, strict=True):
        if given[name].device.type == "cpu":
            assert torch.equal(given[name], tensor)
