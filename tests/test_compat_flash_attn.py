# SPDX-License-Identifier: Apache-2.0
"""pentad.compat.flash_attn by flash-attention's own rule, on a seeded sample of its test grid.

The rule: the error against a reference in higher precision is at most twice (gradients: three
times) that of plain PyTorch in the inputs' precision.
"""

import inspect
import random

import pytest

torch = pytest.importorskip("torch")

from flash_attn_cases import reference, turned  # noqa: E402

from pentad.compat import flash_attn as F  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = (
    (113, 203),
    (128, 217),
    (113, 211),
    (108, 256),
    (256, 128),
    (64, 63),
    (1, 147),
    (3, 199),
    (127, 127),
    (33, 40),
)
HEADS = ((6, 6), (6, 1), (6, 2))


# --- The rule --------------------------------------------------------------------------------


def close(ours, ref, low, times):
    """flash-attention's rule."""
    assert ours.shape == ref.shape
    error, bound = (float((x - ref).detach().abs().max()) for x in (ours, low))
    assert error <= times * bound + 1e-5, (error, bound)


class Case:
    """Everything of one case, drawn from its seed."""

    def __init__(self, seed, max_length=None):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.dtype = DTYPES[seed % 3]
        self.dim = DIMS[seed % len(DIMS)]
        self.sq, self.sk = LENGTHS[seed % len(LENGTHS)]
        self.heads, self.kv_heads = draw.choice(HEADS)
        self.batch = 2
        self.causal = draw.random() < 0.5
        self.window = (-1, -1)
        if draw.random() < 0.5:
            self.window = tuple(torch.randint(0, self.sk, (2,)).tolist())
        self.softcap = draw.choice((0.0, 0.0, 5.0))
        self.alibi = None
        if draw.random() < 0.5:
            shape = draw.choice(((self.heads,), (self.batch, self.heads)))
            self.alibi = torch.rand(shape) * 0.3
        self.dropout_p = 0.0 if self.softcap else draw.choice((0.0, 0.17))
        self.scale = draw.choice((None, 0.2))

    def tensor(self, *shape):
        return torch.randn(*shape).to(self.dtype).requires_grad_()

    @property
    def options(self):
        """Those of flash-attention."""
        return {
            "softmax_scale": self.scale,
            "causal": self.causal,
            "window_size": self.window,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi,
        }

    @property
    def reference(self):
        return {
            "scale": self.scale,
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "alibi": self.alibi,
            "dropout_p": self.dropout_p,
        }


def check(
    case, call, inputs, split, q_mask=None, k_mask=None, put=lambda x: x, batched=lambda x: x
):
    """`call` against the reference, with gradients.

    `split` makes padded (q, k, v) of the inputs, `put` a padded output of a packed one, `batched`
    the same of a packed lse.
    """
    out, lse, mask = call(*inputs, return_attn_probs=True, dropout_p=case.dropout_p, **case.options)
    assert out.is_contiguous()
    assert out.dtype == case.dtype
    keep = None
    if case.dropout_p:
        keep = mask >= 0
    else:
        assert mask is None
    ref, low = (
        reference(
            *split(*inputs), q_mask=q_mask, k_mask=k_mask, keep=keep, upcast=upcast,
            **case.reference,
        )
        for upcast in (True, False)
    )  # fmt: skip
    close(put(out), ref[0], low[0], 2)
    # lse, and the probabilities of S_dmask
    lse, rows = batched(lse), torch.ones_like(ref[1], dtype=torch.bool)
    if q_mask is not None:
        rows &= q_mask[:, None]
    assert lse.dtype == torch.float32
    torch.testing.assert_close(
        lse[rows], ref[1].float()[rows], rtol=1e-4, atol=1e-2 if case.scale else 2e-3
    )
    if keep is not None:
        expected = ref[2].masked_fill(~rows[..., None], 0.0).to(mask.dtype)
        torch.testing.assert_close(mask.abs(), expected, rtol=2e-2, atol=1e-4)
        many = ref[2].masked_fill(~rows[..., None], 0.0) > 1e-6
        if many.sum() > 10000:
            dropped = float((many & ~keep).sum() / many.sum())
            assert abs(dropped - case.dropout_p) < 0.01
    grad = torch.randn_like(ref[0])
    if q_mask is not None:
        grad = grad * q_mask[:, :, None, None]
    ours = torch.autograd.grad(put(out), inputs, grad)
    theirs = torch.autograd.grad(ref[0], inputs, grad)
    lower = torch.autograd.grad(low[0], inputs, grad)
    for a, b, c in zip(ours, theirs, lower, strict=True):
        close(a, b, c, 3)


# --- Dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_func(seed):
    case = Case(seed)
    q = case.tensor(case.batch, case.sq, case.heads, case.dim)
    k = case.tensor(case.batch, case.sk, case.kv_heads, case.dim)
    v = case.tensor(case.batch, case.sk, case.kv_heads, case.dim)
    check(case, F.flash_attn_func, (q, k, v), lambda q, k, v: (q, k, v))


@pytest.mark.parametrize("seed", range(1000, 1006))
def test_kvpacked(seed):
    case = Case(seed)
    q = case.tensor(case.batch, case.sq, case.heads, case.dim)
    kv = case.tensor(case.batch, case.sk, 2, case.kv_heads, case.dim)
    split = lambda q, kv: (q, kv[:, :, 0], kv[:, :, 1])  # noqa: E731
    check(case, F.flash_attn_kvpacked_func, (q, kv), split)


@pytest.mark.parametrize("seed", range(2000, 2006))
def test_qkvpacked(seed):
    case = Case(seed)
    qkv = case.tensor(case.batch, case.sk, 3, case.heads, case.dim)
    check(case, F.flash_attn_qkvpacked_func, (qkv,), lambda qkv: qkv.unbind(2))


# --- Packed sequences -----------------------------------------------------------------------------


def padding(case, length):
    """Lengths from 0 to `length`, one of which is all of it."""
    lengths = torch.randint(0, length + 1, (case.batch,))
    lengths[random.Random(length).randrange(case.batch)] = length
    return torch.arange(length) < lengths[:, None]


def packed(x, mask):
    """(total, ...) and cu_seqlens of (B, S, ...), by a way of its own."""
    rows = [row[: int(n)] for row, n in zip(x, mask.sum(-1), strict=True)]
    lengths = [0, *(len(row) for row in rows)]
    return torch.cat(rows), torch.tensor(lengths).cumsum(0).int()


def padded(x, mask):
    out = x.new_zeros(*mask.shape, *x.shape[1:])
    out[mask] = x
    return out


def varlen(seed):
    case = Case(seed)
    return case, padding(case, case.sq), padding(case, case.sk)


def check_varlen(case, function, inputs, split, q_mask, k_mask, arguments):
    """`function` on the packed inputs, whose masks are in `arguments`."""

    def call(*tensors, **options):
        flat = [packed(x, m)[0] for x, m in zip(tensors, arguments, strict=True)]
        lengths = [packed(m[..., None], m)[1] for m in (q_mask, k_mask)]
        longest = [int(m.sum(-1).max()) for m in (q_mask, k_mask)]
        if len(arguments) == 1:
            lengths, longest = lengths[:1], longest[:1]
        return function(*flat, *lengths, *longest, **options)

    check(
        case, call, inputs, split, q_mask, k_mask,
        put=lambda out: padded(out, q_mask),
        batched=lambda lse: padded(lse.T, q_mask).transpose(1, 2),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3000, 3024))
def test_varlen(seed):
    case, q_mask, k_mask = varlen(seed)
    q = case.tensor(case.batch, case.sq, case.heads, case.dim)
    k = case.tensor(case.batch, case.sk, case.kv_heads, case.dim)
    v = case.tensor(case.batch, case.sk, case.kv_heads, case.dim)
    masks = q_mask, k_mask, k_mask
    split = lambda q, k, v: (q, k, v)  # noqa: E731
    check_varlen(case, F.flash_attn_varlen_func, (q, k, v), split, q_mask, k_mask, masks)


@pytest.mark.parametrize("seed", range(4000, 4006))
def test_varlen_kvpacked(seed):
    case, q_mask, k_mask = varlen(seed)
    q = case.tensor(case.batch, case.sq, case.heads, case.dim)
    kv = case.tensor(case.batch, case.sk, 2, case.kv_heads, case.dim)
    split = lambda q, kv: (q, kv[:, :, 0], kv[:, :, 1])  # noqa: E731
    function = F.flash_attn_varlen_kvpacked_func
    check_varlen(case, function, (q, kv), split, q_mask, k_mask, (q_mask, k_mask))


@pytest.mark.parametrize("seed", range(5000, 5006))
def test_varlen_qkvpacked(seed):
    case, _, mask = varlen(seed)
    qkv = case.tensor(case.batch, case.sk, 3, case.heads, case.dim)
    function = F.flash_attn_varlen_qkvpacked_func
    check_varlen(case, function, (qkv,), lambda qkv: qkv.unbind(2), mask, mask, (mask,))


@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_varlen_pages(page_size):
    torch.manual_seed(page_size)
    lengths = torch.tensor([37, 0, 300])
    cu_k = torch.tensor([0, 37, 37, 337], dtype=torch.int32)
    cu_q = torch.tensor([0, 5, 9, 20], dtype=torch.int32)
    q, k, v = torch.randn(20, 4, 32), torch.randn(337, 2, 32), torch.randn(337, 2, 32)
    per_sequence = -(-300 // page_size)
    table = torch.randperm(3 * per_sequence).view(3, -1).int()
    pages = torch.full((2, 3 * per_sequence, page_size, 2, 32), torch.nan)
    for b, n in enumerate(lengths.tolist()):
        for j in range(n):
            row = int(cu_k[b]) + j
            page = pages[:, int(table[b, j // page_size]), j % page_size]
            page[0], page[1] = k[row], v[row]
    options = {"causal": True, "return_attn_probs": True}
    ours = F.flash_attn_varlen_func(q, *pages, cu_q, cu_k, 11, 300, block_table=table, **options)
    theirs = F.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 11, 300, **options)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    above, below = table.clone(), table.clone()
    above[2, 0], below[2, 0] = table.numel(), -1
    for bad, cu in (
        (above, cu_k),
        (below, cu_k),
        (table[:2], cu_k),
        (table[0], cu_k),
        (table[:, :1], cu_k * (page_size + 1)),
        (table, cu_k.flip(0)),
    ):
        with pytest.raises(ValueError, match=r"block_table|cu_seqlens_k"):
            F.flash_attn_varlen_func(q, *pages, cu_q, cu, 11, 300, block_table=bad)


# --- Caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6000, 6048))
def test_kvcache(seed):
    """Appending, rotary, pages, batch indices and left padding, against a plain update."""
    case = Case(seed)
    draw = random.Random(seed)
    capacity, new, sq = 160, draw.choice((0, 1, 5)), draw.choice((1, 5, 30))
    paged = draw.choice((0, 0, 16, 17))
    indexed = not paged and draw.random() < 0.5
    left_padded = not paged and draw.random() < 0.4
    rotary_dim = draw.choice((0, 16, 32)) if new else 0
    interleaved = draw.random() < 0.5
    per_token = case.causal or case.window != (-1, -1)
    b, heads, dim = case.batch, case.kv_heads, case.dim
    with torch.no_grad():
        q = case.tensor(b, sq, case.heads, dim).detach()
        rows = b + 2 if indexed else b
        k_cache, v_cache = (case.tensor(rows, capacity, heads, dim).detach() for _ in "kv")
        k_new, v_new = (case.tensor(b, new, heads, dim).detach() for _ in "kv")
    lengths = torch.randint(int(new == 0), capacity - new + 1, (b,), dtype=torch.int32)
    index = torch.randperm(rows)[:b].int() if indexed else None
    left = (torch.rand(b) * lengths).int() if left_padded else None
    chosen = torch.arange(b) if index is None else index.long()
    cos = sin = None
    k_turned, q_turned = k_new, q
    if rotary_dim:
        angles = torch.rand(capacity + 64, rotary_dim // 2) * 6
        cos, sin = angles.cos().to(case.dtype), angles.sin().to(case.dtype)
        steps = lengths[:, None] + torch.arange(new)
        k_turned = turned(k_new, cos, sin, steps, interleaved)
        steps = lengths[:, None] + torch.arange(sq) * per_token
        q_turned = turned(q, cos, sin, steps, interleaved)
    # The reference: write, then mask.
    positions = torch.arange(capacity)
    k_ref, v_ref = k_cache.clone(), v_cache.clone()
    for row, n, kn, vn in zip(chosen, lengths.tolist(), k_turned, v_new, strict=True):
        k_ref[row, n : n + new], v_ref[row, n : n + new] = kn, vn
    keys = positions < (lengths + new)[:, None]
    # `visible` wants the keys from the first column on.
    k_used, v_used = k_ref[chosen], v_ref[chosen]
    if left_padded:
        keys = positions < (lengths + new - left)[:, None]
        shift = (positions + left[:, None].long()).clamp(max=capacity - 1)
        k_used, v_used = (x[torch.arange(b)[:, None], shift] for x in (k_used, v_used))
    arguments = {**case.reference, "k_mask": keys, "dropout_p": 0.0}
    ref = reference(q_turned, k_used, v_used, **arguments)
    low = reference(q_turned, k_used, v_used, upcast=False, **arguments)

    table, caches = None, (k_cache, v_cache)
    if paged:
        per_sequence = -(-capacity // paged)
        table = torch.randperm(b * per_sequence).view(b, -1).int()
        caches = tuple(to_pages(x, table, paged) for x in caches)
    out, lse = F.flash_attn_with_kvcache(
        q,
        *caches,
        k_new if new else None,
        v_new if new else None,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=lengths,
        cache_batch_idx=index,
        cache_leftpad=left,
        block_table=table,
        rotary_interleaved=interleaved,
        num_splits=3,
        return_softmax_lse=True,
        **case.options,
    )
    assert out.is_contiguous()
    close(out, ref[0], low[0], 3)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, ref[1].float(), rtol=1e-4, atol=1e-2)
    if paged:
        caches = tuple(from_pages(x, table, capacity) for x in caches)
    torch.testing.assert_close(caches[0], k_ref, rtol=1e-3, atol=1e-3)
    assert torch.equal(caches[1], v_ref)


def to_pages(cache, table, page_size):
    b, capacity = cache.shape[:2]
    pages = cache.new_full((table.numel(), page_size, *cache.shape[2:]), torch.nan)
    for i in range(b):
        for j in range(capacity):
            pages[int(table[i, j // page_size]), j % page_size] = cache[i, j]
    return pages


def from_pages(pages, table, capacity):
    return torch.stack([pages[row.long()].flatten(0, 1)[:capacity] for row in table])


def test_kvcache_lengths():
    torch.manual_seed(0)
    q, cache = torch.randn(2, 3, 4, 16), torch.randn(2, 2, 9, 2, 16)
    k, v = cache.clone()
    whole = F.flash_attn_with_kvcache(q, k, v)
    assert torch.equal(whole, F.flash_attn_with_kvcache(q, k, v, cache_seqlens=9))
    torch.testing.assert_close(whole, reference(q, k, v)[0])
    new = torch.randn(2, 3, 2, 16)
    F.flash_attn_with_kvcache(q, k, v, new, 2 * new, cache_seqlens=5)
    assert torch.equal(k[:, 5:8], new)
    assert torch.equal(v[:, 5:8], 2 * new)
    assert torch.equal(k[:, :5], cache[0][:, :5])
    with pytest.raises(ValueError, match="cache_seqlens is None"):
        F.flash_attn_with_kvcache(q, k, v, new, new)
    before = k.clone()
    with pytest.raises(ValueError, match="cache has"):
        F.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=7)
    assert torch.equal(k, before)


def test_kvcache_records_no_gradient():
    q, cache = torch.randn(1, 1, 2, 16, requires_grad=True), torch.randn(1, 4, 2, 16)
    new = torch.randn(1, 1, 2, 16, requires_grad=True)
    out = F.flash_attn_with_kvcache(q, cache, cache.clone(), new, new, cache_seqlens=1)
    assert not out.requires_grad
    assert not cache.requires_grad


def test_kvcache_full_pages():
    """Without lengths, all of the pages are read."""
    torch.manual_seed(1)
    q, pages = torch.randn(2, 1, 2, 8), torch.randn(4, 5, 2, 8)
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    k = torch.stack([torch.cat((pages[2], pages[0])), torch.cat((pages[1], pages[3]))])
    out = F.flash_attn_with_kvcache(q, pages, pages, block_table=table)
    torch.testing.assert_close(out, reference(q, k, k)[0])


# --- Options --------------------------------------------------------------------------------------

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
LENGTH_ARGUMENTS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {COMMON})",
    "flash_attn_kvpacked_func": f"(q, kv, {COMMON})",
    "flash_attn_qkvpacked_func": f"(qkv, {COMMON})",
    "flash_attn_varlen_func": f"(q, k, v, {LENGTH_ARGUMENTS}, {COMMON}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {LENGTH_ARGUMENTS}, {COMMON})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {COMMON})",
    "flash_attn_with_kvcache": "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, "
    "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    assert str(inspect.signature(getattr(F, name))) == SIGNATURES[name]


def test_all_is_complete():
    assert sorted(F.__all__) == sorted(SIGNATURES)


@pytest.mark.parametrize("window", [(5, 2), (-1, 2), (5, -1), (-7, -1)])
def test_window_as_a_tensor(window):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 20, 2, 16).unbind()
    out = F.flash_attn_func(q, k, v, window_size=torch.tensor(window))
    assert torch.equal(out, F.flash_attn_func(q, k, v, window_size=window))
    torch.testing.assert_close(out, reference(q, k, v, window=window)[0])


def test_softcap_with_dropout():
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="softcap"):
        F.flash_attn_func(q, q, q, dropout_p=0.1, softcap=3.0)


@pytest.mark.parametrize(
    ("function", "rank"),
    [
        (F.flash_attn_qkvpacked_func, (1, 4, 2, 2, 8)),
        (F.flash_attn_qkvpacked_func, (4, 3, 2, 8)),
    ],
)
def test_a_packed_tensor_of_another_shape(function, rank):
    with pytest.raises(ValueError, match="qkv has shape"):
        function(torch.zeros(rank))


def test_one_key():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = F.flash_attn_func(*inputs, causal=True)
    expected = (torch.arange(5) == 4)[:, None, None] * v.repeat_interleave(2, 2)
    torch.testing.assert_close(out, expected)
    dq, dk, dv = torch.autograd.grad(out.sum(), inputs)
    assert dq.abs().max() < 1e-5
    assert dk.abs().max() < 1e-5
    torch.testing.assert_close(dv, torch.full_like(v, 2.0))


def test_rows_that_see_nothing():
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 3, 2, 8)
    out, lse, _ = F.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert torch.equal(out[:, :2], torch.zeros(1, 2, 2, 8))
    assert torch.isposinf(lse[:, :, :2]).all()
    assert torch.isfinite(lse[:, :, 2:]).all()


def test_deterministic_is_accepted():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 70, 2, 16, requires_grad=True).unbind()
    results = []
    for deterministic in (False, True):
        out = F.flash_attn_func(q, k, v, deterministic=deterministic)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_follows_the_seed():
    q, k, v = torch.randn(3, 2, 70, 2, 16).unbind()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(F.flash_attn_func(q, k, v, 0.3))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_lse_has_a_gradient():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))
    _, lse, _ = F.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    ours = torch.autograd.grad(lse.square().sum(), (q, k))
    theirs = torch.autograd.grad(reference(q, k, v, causal=True)[1].square().sum(), (q, k))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_values_of_another_size():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 9, 4, 24), torch.randn(2, 9, 2, 24), torch.randn(2, 9, 2, 10)
    torch.testing.assert_close(F.flash_attn_func(q, k, v), reference(q, k, v)[0])
