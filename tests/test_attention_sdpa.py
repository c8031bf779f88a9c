# SPDX-License-Identifier: Apache-2.0
"""torch's `scaled_dot_product_attention` by name, the module, and rotary embedding."""

import re

import pytest

import pentad

torch = pytest.importorskip("torch")

A = pentad.attention
Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The problems here are smaller than the waking of a thread."""
    threads(1)


def total(result):
    return result.sin().sum()


def leaves(*arguments):
    return [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]


# --- scaled_dot_product_attention -----------------------------------------------------------------

T = torch.nn.functional.scaled_dot_product_attention
SHAPES = {
    "rank 4": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "rank 3": ((4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "rank 2": ((5, 8), (7, 8), (7, 6)),
    "rank 5": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)),
    "broadcast heads": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "broadcast queries": ((1, 1, 5, 8), (3, 2, 7, 8), (3, 2, 7, 6)),
    "broadcast ranks": ((5, 8), (2, 3, 7, 8), (3, 7, 6)),
}


def same_as_torch(shapes, dtype=torch.float64, **options):
    inputs = [torch.randn(*s, dtype=dtype, requires_grad=True) for s in shapes]
    given = leaves(*inputs, *options.values())
    got = A.scaled_dot_product_attention(*inputs, **options)
    want = T(*inputs, **options)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, given, weights), torch.autograd.grad(want, given, weights)
    )


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.2}], ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
def test_sdpa_is_torch_s(shapes, options):
    same_as_torch(SHAPES[shapes], **options)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (5, 1), (4, 5, 7), (2, 1, 5, 7), (2, 4, 1, 7)])
def test_sdpa_masks_are_torch_s(shape, kind):
    mask = torch.randn(*shape, dtype=torch.float64)
    mask = mask.requires_grad_() if kind == "float" else mask > -0.5
    same_as_torch(SHAPES["rank 4"], attn_mask=mask)


def test_sdpa_masks_of_other_ranks_are_torch_s():
    mask = torch.randn(2, 1, 4, 1, 7, dtype=torch.float64, requires_grad=True)
    same_as_torch(SHAPES["rank 5"], attn_mask=mask)
    same_as_torch(SHAPES["rank 3"], attn_mask=torch.rand(4, 5, 7) > 0.3)
    same_as_torch(SHAPES["rank 2"], attn_mask=torch.randn(5, 7, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_sdpa_rows_that_see_nothing_are_torch_s(kind):
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    if kind == "float":
        mask = torch.zeros(5, 7, dtype=torch.float64).masked_fill_(~mask, -torch.inf)
    q, k, v = (torch.randn(*s, dtype=torch.float64) for s in SHAPES["rank 4"])
    torch.testing.assert_close(A.scaled_dot_product_attention(q, k, v, mask), T(q, k, v, mask))


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 1, 1), (6, 6, 6), (6, 3, 2)])
def test_sdpa_with_grouped_heads_is_torch_s(heads):
    shapes = [(2, h, s, 8) for h, s in zip(heads, (5, 7, 7), strict=True)]
    same_as_torch(shapes, enable_gqa=True)
    same_as_torch([s[1:] for s in shapes], enable_gqa=True, is_causal=True)


@pytest.mark.parametrize("sq", [1, 9, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sdpa_rows_of_the_lowest_number_are_torch_s(sq, dtype):
    # As many models fill their masks: such a row is the mean of all values, not zero.
    q, k, v = (torch.randn(1, 8, n, 24, dtype=dtype) for n in (sq, 70, 70))
    mask = torch.zeros(sq, 70, dtype=dtype)
    mask[:, 40:] = mask[sq // 2] = torch.finfo(dtype).min
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for function in (
        A.scaled_dot_product_attention,
        torch.nn.functional.scaled_dot_product_attention,
    ):
        # Of torch's own ways only the plain one has these gradients; its fused one's are 70 times
        # too large, for its log-sum-exp of such a row cannot say how many keys there were.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = function(*leaves, attn_mask=mask)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 4])
def test_sdpa_in_other_precisions_is_torch_s(dtype, batch):
    q = torch.randn(4, 8, 33, 48, dtype=dtype)
    k, v = torch.randn(2, batch, 2, 70, 48, dtype=dtype)
    for options in ({}, {"attn_mask": torch.rand(33, 70) > 0.3}):
        ours = A.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        wide = (x.double() for x in (q, k.expand(4, -1, -1, -1), v.expand(4, -1, -1, -1)))
        theirs = torch.nn.functional.scaled_dot_product_attention(*wide, enable_gqa=True, **options)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


def test_sdpa_dropout_drops_its_share():
    q = torch.zeros(1, 8, 64, 8)
    v = torch.eye(64).expand(1, 8, 64, 64)
    out = A.scaled_dot_product_attention(q, q, v, None, 0.3)
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert out.max().item() == pytest.approx(1 / 64 / 0.7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda f: f(Q, Q, Q, torch.ones(5, 5).bool(), is_causal=True),
            ValueError,
            "attn_mask cannot be used with is_causal",
        ),
        (lambda f: f(Q, K, V), ValueError, "do not broadcast"),
        (lambda f: f(Q[:, :3], K, V, enable_gqa=True), ValueError, "q has 3 heads"),
        (lambda f: f(Q[0, :3], K[0], V[0], enable_gqa=True), ValueError, "query has 3 heads"),
        (lambda f: f(Q[0, 0, 0], K, V), ValueError, "query has shape (8,), expected at least 2"),
        (lambda f: f(Q, Q[..., :4], Q), ValueError, "head_dim"),
        (lambda f: f(Q, Q, Q[:, :, 1:]), ValueError, "keys"),
        (lambda f: f(Q.int(), Q, Q), TypeError, "query has dtype int32"),
        (lambda f: f(Q, Q.double(), Q), TypeError, "dtype"),
        (lambda f: f(Q, Q, Q, torch.ones(3, 5)), ValueError, "bias has shape (3, 5)"),
        (lambda f: f(Q, Q, Q, torch.ones(5, 5).int()), TypeError, "int32"),
        (lambda f: f(Q, Q, Q, dropout_p=1.5), ValueError, "dropout_p is 1.5"),
    ],
)
def test_sdpa_refuses(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(A.scaled_dot_product_attention)


# --- The module -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_the_module_is_torch_s_attention(kv_heads):
    layer = pentad.nn.Attention(24, 4, kv_heads=kv_heads, causal=True)
    x = torch.randn(3, 9, 24, requires_grad=True)
    split = [p(x).unflatten(-1, (-1, 6)).mT.mT for p in (layer.q_proj, layer.k_proj, layer.v_proj)]
    q, k, v = (t.transpose(1, 2) for t in split)
    want = layer.out_proj(T(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2))
    got = layer(x)
    torch.testing.assert_close(got, want)
    given = (x, *layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(total(got), given), torch.autograd.grad(total(want), given)
    )


def test_the_module_attends_to_another_sequence_with_options():
    layer = pentad.nn.Attention(24, 4, head_dim=10, context_dim=16, bias=False)
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 16)
    seen = torch.tensor([True] * 4 + [False] * 3)
    got = layer(x, context, bias=seen[None, :])
    torch.testing.assert_close(got, layer(x, context[:, :4]))
    assert not torch.allclose(got, layer(x, context))


def test_the_module_drops_in_training_only():
    layer = pentad.nn.Attention(16, 2, window=(2, 2), dropout_p=0.5)
    x = torch.randn(1, 8, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert "window=(2, 2)" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((10, 4), "dim is 10, expected a multiple of 4"), ((12, 4, 3), "heads is 4, expected")],
)
def test_the_module_refuses(arguments, message):
    dim, heads, *kv_heads = arguments
    with pytest.raises(ValueError, match=message):
        pentad.nn.Attention(dim, heads, kv_heads=kv_heads[0] if kv_heads else None)


# --- Rotary embedding -----------------------------------------------------------------------------


def rotated_by_complex_numbers(x, positions, dim, interleaved, base=10000.0):
    """The definition: pairs as complex numbers, times e^(i m theta_j)."""
    half = dim // 2
    theta = base ** (-2 * torch.arange(half, dtype=torch.float64) / dim)
    turn = torch.polar(torch.ones_like(theta), theta) ** positions[..., None]
    head = x[..., :dim].double()
    first, second = (
        (head[..., ::2], head[..., 1::2]) if interleaved else (head[..., :half], head[..., half:])
    )
    z = torch.complex(first.contiguous(), second.contiguous()) * turn
    head = torch.view_as_real(z).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((head, x[..., dim:].double()), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 6, 8])
def test_rotary_is_its_definition(dim, interleaved):
    cos, sin = A.rotary_tables(40, dim, dtype=torch.float64)
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 7, 35])
    positions = offsets[:, None] + torch.arange(5)
    want = rotated_by_complex_numbers(x, positions[:, None], dim, interleaved)
    options = {"interleaved": interleaved}
    for given in ({"offsets": offsets}, {"positions": positions}, {"offsets": offsets.int()}):
        torch.testing.assert_close(A.apply_rotary(x, cos, sin, **given, **options), want)
    for given in ({"offsets": 7}, {"positions": positions[1]}):
        got = A.apply_rotary(x, cos, sin, **given, **options)[1]
        torch.testing.assert_close(got, want[1])
    back = A.apply_rotary(want, cos, -sin, offsets=offsets, **options)
    torch.testing.assert_close(back, x)
    assert torch.autograd.gradcheck(
        lambda x: A.apply_rotary(x, cos, sin, offsets=offsets, **options), x
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotary_keeps_the_dtype_and_computes_in_float32(dtype):
    cos, sin = A.rotary_tables(9, 8)
    x = torch.randn(1, 1, 9, 8).to(dtype)
    got = A.apply_rotary(x, cos, sin)
    assert got.dtype == dtype
    assert torch.equal(got, A.apply_rotary(x.float(), cos, sin).to(dtype))


COS, SIN = A.rotary_tables(10, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(Q[0], COS, SIN), ValueError, "x has shape (4, 5, 8), expected (B, H, S, D)"),
        (lambda f: f(Q.int(), COS, SIN), TypeError, "x has dtype int32"),
        (lambda f: f(Q, COS, SIN[1:]), ValueError, "sin (9, 2)"),
        (lambda f: f(Q, COS[0], SIN[0]), ValueError, "cos has shape (2,)"),
        (lambda f: f(Q[..., :3], COS, SIN), ValueError, "4 dimensions but x has head_dim 3"),
        (lambda f: f(Q, COS, SIN, offsets=6), ValueError, "positions are 6 to 10, expected 0 to 9"),
        (lambda f: f(Q, COS, SIN, offsets=-1), ValueError, "positions are -1 to 3"),
        (lambda f: f(Q, COS, SIN, offsets=torch.tensor([0, 6])), ValueError, "0 to 10"),
        (lambda f: f(Q, COS, SIN, offsets=torch.tensor([0])), ValueError, "offsets has shape (1,)"),
        (lambda f: f(Q, COS, SIN, offsets=torch.zeros(2)), TypeError, "offsets has dtype float32"),
        (lambda f: f(Q, COS, SIN, positions=torch.zeros(5)), TypeError, "positions has dtype"),
        (lambda f: f(Q, COS, SIN, positions=torch.arange(4)), ValueError, "(5,) or (2, 5)"),
    ],
)
def test_rotary_refuses(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(A.apply_rotary)


def test_rotary_tables_refuse_odd_dimensions():
    with pytest.raises(ValueError, match="dim is 5, expected an even number"):
        A.rotary_tables(10, 5)
