# SPDX-License-Identifier: Apache-2.0
"""pentad.compat: flash-attention's padding functions and rotary embedding, and `install`."""

import pytest
from cases import run_python

torch = pytest.importorskip("torch")

from flash_attn_cases import turned  # noqa: E402

from pentad.compat.flash_attn import bert_padding  # noqa: E402
from pentad.compat.flash_attn.layers import rotary  # noqa: E402

# --- bert_padding ---------------------------------------------------------------------------------


def test_unpad_and_pad():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 2, 5, requires_grad=True)
    mask = torch.rand(3, 7) < 0.6
    mask[1] = False
    flat, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(flat, x[mask])
    assert torch.equal(indices, mask.flatten().nonzero().flatten())
    assert cu_seqlens.dtype == used.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, *mask.sum(-1).cumsum(0).tolist()]
    assert longest == int(mask.sum(-1).max())
    assert isinstance(longest, int)
    assert used.tolist() == mask.sum(-1).tolist()
    back = bert_padding.pad_input(flat, indices, 3, 7)
    assert torch.equal(back, x * mask[:, :, None, None])
    weight = torch.randn_like(x)
    (grad,) = torch.autograd.grad((back * weight).sum(), x)
    assert torch.equal(grad, weight * mask[:, :, None, None])
    as_numbers = bert_padding.unpad_input(x, mask.long())
    assert torch.equal(as_numbers[0], flat)


def test_unpad_with_unused_tokens():
    x = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    for kind in (torch.int64, torch.bool):
        flat, indices, cu_seqlens, longest, used = bert_padding.unpad_input(
            x, mask.to(kind), unused.to(kind)
        )
        assert indices.tolist() == flat.flatten().tolist() == [0, 1, 2, 4, 5, 6, 7]
        assert cu_seqlens.tolist() == [0, 3, 7]
        assert longest == 4
        assert used.tolist() == [2, 1]


def test_first_axis_functions_are_inverse():
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([7, 0, 3])
    assert torch.equal(bert_padding.index_first_axis(x, rows), x[rows])
    placed = bert_padding.index_put_first_axis(x[rows], rows, 9)
    assert torch.equal(bert_padding.index_first_axis(placed, rows), x[rows])
    assert placed.count_nonzero() == 12
    torch.autograd.gradcheck(lambda x: bert_padding.index_first_axis(x, rows), x)
    torch.autograd.gradcheck(lambda x: bert_padding.index_put_first_axis(x[:3], rows, 9), x)


# --- Rotary ---------------------------------------------------------------------------------------


def tables(length, half, dtype=torch.float32):
    angles = torch.rand(length, half) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", ["none", "int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary(interleaved, offset, dtype, inplace):
    torch.manual_seed(0)
    cos, sin = tables(40, 12, dtype)
    offset = {"none": 0, "int": 5, "tensor": torch.tensor([3, 0, 9])}[offset]
    x = torch.randn(3, 17, 2, 32).to(dtype).requires_grad_()
    before = x.detach().clone()
    positions = (torch.as_tensor(offset).expand(3)[:, None]) + torch.arange(17)
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, inplace=inplace, seqlen_offsets=offset)
    expected = turned(before, cos, sin, positions, interleaved)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(out, expected, **tolerance)
    assert torch.equal(x, out if inplace else before)
    weight = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(out, x, weight)
    torch.testing.assert_close(grad, turned(weight, cos, -sin, positions, interleaved), **tolerance)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offset", [0, torch.tensor([4, 0, 2])], ids=["none", "tensor"])
def test_rotary_of_packed_sequences(offset, inplace):
    torch.manual_seed(0)
    cos, sin = tables(30, 8)
    cu_seqlens = torch.tensor([0, 6, 6, 20], dtype=torch.int32)
    x = torch.randn(20, 2, 16, requires_grad=True)
    before = x.detach().clone()
    offsets = torch.as_tensor(offset).expand(3).tolist()
    positions = torch.cat([n + torch.arange(m) for n, m in zip(offsets, (6, 0, 14), strict=True)])
    out = rotary.apply_rotary_emb(
        x, cos, sin, inplace=inplace, seqlen_offsets=offset, cu_seqlens=cu_seqlens, max_seqlen=14
    )
    expected = turned(before[None], cos, sin, positions[None], False)[0]
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(before)
    (grad,) = torch.autograd.grad(out, x, weight)
    torch.testing.assert_close(grad, turned(weight[None], cos, -sin, positions[None], False)[0])


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_rotary_of_qkv(grouped, separate):
    torch.manual_seed(0)
    cos, sin = tables(30, 8)
    cos_k, sin_k = tables(30, 8) if separate else (None, None)
    shape = (2, 11, 6 + 2 * 2, 16) if grouped else (2, 11, 3, 4, 16)
    qkv = torch.randn(shape, requires_grad=True)
    q, k, v = qkv.split((6, 2, 2), 2) if grouped else qkv.unbind(2)
    positions = (7 + torch.arange(11)).expand(2, -1)
    keys = (cos_k, sin_k) if separate else (cos, sin)

    def rotated(q, k, v, sign):
        parts = (
            turned(q, cos, sign * sin, positions, False),
            turned(k, keys[0], sign * keys[1], positions, False),
        )
        return torch.cat((*parts, v), 2) if grouped else torch.stack((*parts, v), 2)

    expected = rotated(q.detach(), k.detach(), v.detach(), 1)
    out = rotary.apply_rotary_emb_qkv_(
        qkv, cos, sin, cos_k, sin_k, seqlen_offsets=7, num_heads_q=6 if grouped else None
    )
    torch.testing.assert_close(out, expected)
    assert torch.equal(qkv, out)
    weight = torch.randn(shape)
    (grad,) = torch.autograd.grad(out, qkv, weight)
    parts = weight.split((6, 2, 2), 2) if grouped else weight.unbind(2)
    torch.testing.assert_close(grad, rotated(*parts, -1))


def test_rotary_of_kv():
    torch.manual_seed(0)
    cos, sin = tables(30, 8)
    kv = torch.randn(2, 11, 2, 3, 16)
    positions = torch.arange(11).expand(2, -1)
    expected = torch.stack((turned(kv[:, :, 0], cos, sin, positions, True), kv[:, :, 1]), 2)
    torch.testing.assert_close(rotary.apply_rotary_emb_kv_(kv, cos, sin, True), expected)
    torch.testing.assert_close(kv, expected)


def test_rotary_through_an_intermediate():
    """In place on a result of the graph: what used it before sees that it changed."""
    cos, sin = tables(8, 4)
    x = torch.randn(1, 8, 1, 8, requires_grad=True)
    y = x * 2
    out = rotary.apply_rotary_emb(y, cos, sin, inplace=True).square().sum()
    (grad,) = torch.autograd.grad(out, x)
    torch.testing.assert_close(grad, 8 * x)  # a rotation keeps the norm
    y = x * 2
    saved = y * y
    rotary.apply_rotary_emb(y, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (rotary.apply_rotary_emb_qkv_, (1, 4, 2, 2, 8)),
        (rotary.apply_rotary_emb_qkv_, (1, 4, 6, 8)),
        (rotary.apply_rotary_emb_kv_, (1, 4, 3, 2, 8)),
    ],
)
def test_rotary_of_another_shape(function, shape):
    cos, sin = tables(4, 4)
    with pytest.raises(ValueError, match="has shape"):
        function(torch.zeros(shape), cos, sin)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale_base", [None, 64.0])
def test_rotary_embedding(interleaved, scale_base):
    torch.manual_seed(0)
    module = rotary.RotaryEmbedding(16, 100.0, interleaved, scale_base)
    assert not list(module.state_dict())
    rates = 100.0 ** (-torch.arange(8) / 8)
    angles = torch.arange(12)[:, None] * rates
    scale = torch.ones(12, 8)
    if scale_base:
        decays = (torch.arange(0, 16, 2) + 0.4 * 16) / (1.4 * 16)
        scale = decays ** ((torch.arange(12) - 6) / scale_base)[:, None]
    q_tables = angles.cos() * scale, angles.sin() * scale
    k_tables = angles.cos() / scale, angles.sin() / scale
    positions = (torch.arange(9) + 3).expand(2, -1)
    qkv = torch.randn(2, 9, 3, 4, 16)
    q = turned(qkv[:, :, 0], *q_tables, positions, interleaved)
    k = turned(qkv[:, :, 1], *k_tables, positions, interleaved)
    expected = torch.stack((q, k, qkv[:, :, 2]), 2)
    apart = qkv[:, :, 0].clone(), qkv[:, :, 1:].clone()
    torch.testing.assert_close(module(qkv, seqlen_offset=3), expected)
    torch.testing.assert_close(qkv, expected)
    ours = module(*apart, seqlen_offset=torch.tensor([3, 3]), max_seqlen=12)
    torch.testing.assert_close(ours[0], expected[:, :, 0])
    torch.testing.assert_close(ours[1], expected[:, :, 1:])


# --- install --------------------------------------------------------------------------------------


def test_install():
    """In another process: under the peer's name, and the same objects as under pentad's."""
    run_python("""
        import sys
        import pentad.compat
        names = ["flash_attn", "mamba_ssm", "causal_conv1d", "fla"]
        assert pentad.compat.install() == names
        assert pentad.compat.install() == names
        import flash_attn
        from flash_attn import flash_attn_func
        from flash_attn.bert_padding import (
            index_first_axis, index_put_first_axis, pad_input, unpad_input
        )
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
        from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
        import pentad.compat.flash_attn.layers.rotary as rotary
        assert RotaryEmbedding is rotary.RotaryEmbedding
        assert flash_attn_func is pentad.compat.flash_attn.flash_attn_func
        assert flash_attn.__version__ >= "2.8"
        import torch
        q = torch.randn(1, 3, 2, 8)
        assert flash_attn_func(q, q, q, causal=True).shape == q.shape
    """)


def test_install_leaves_a_present_package_alone(tmp_path):
    for name in ("flash_attn", "mamba_ssm", "causal_conv1d", "fla"):
        (tmp_path / f"{name}.py").write_text("real = True\n")
    run_python(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import pentad.compat
        assert pentad.compat.install() == []
        import flash_attn
        assert flash_attn.real
        assert pentad.compat.install() == []
        assert "torch" not in sys.modules
    """)
