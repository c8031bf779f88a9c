# SPDX-License-Identifier: Apache-2.0
"""Allocate outputs and call the native kernels: what the dispatcher runs.

Arguments have been checked by the functions; the extension checks again whatever could harm memory.
"""

import torch

from pentad import _C
from pentad._arrays import on_device


def accumulator(dtype):
    """The dtype of lse, key mass and small float operands: float64 for float64, or float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_out(q, value_dim, packed):
    """The output, laid out as (B, S, H, D) where q has its heads inside its tokens in memory."""
    if value_dim == q.shape[-1] and q.is_contiguous():  # for half the price of what follows
        return torch.empty_like(q)
    if packed:
        s, h, _ = q.shape
        return q.new_empty_strided((s, h, value_dim), (h * value_dim, value_dim, 1))
    b, h, s, _ = q.shape
    token, head = value_dim, s * value_dim
    if not q.is_contiguous() and q.stride(2) > q.stride(1):
        token, head = h * value_dim, value_dim
    return q.new_empty_strided((b, h, s, value_dim), (h * s * value_dim, head, token, 1))


def empty_lse(q, packed):
    """float64 whatever `q` is: the gradient recomputes the probabilities from it."""
    if packed:
        s, h, _ = q.shape
        return q.new_empty(h, s, dtype=torch.float64)
    b, h, s, _ = q.shape
    return q.new_empty(b, h, s, dtype=torch.float64)


def empty_forward(q, k, v, packed, key_mass):
    """(out, lse, key_mass), the last empty where it is not wanted."""
    if not key_mass:
        mass = q.new_empty(0)
    else:
        shape = (q.shape[1], k.shape[0]) if packed else (q.shape[0], q.shape[1], k.shape[2])
        mass = q.new_empty(shape, dtype=accumulator(q.dtype))
    return empty_out(q, v.shape[-1], packed), empty_lse(q, packed), mass


def empty_gradients(wanted, *tensors):
    """Gradients of those of q, k, v, bias, key_bias and sink that are `wanted`, in their order."""
    grads = []
    for i, want in enumerate(wanted):
        if want and i < 3:
            grads.append(torch.empty_like(tensors[i]))
        elif want:
            grads.append(torch.empty_like(tensors[i], memory_format=torch.contiguous_format))
    return grads


def _mask(tensors, q_block, k_block):
    return None if tensors is None else (q_block, k_block, *tensors)


# The defaults are the schemas': the dispatcher leaves out what equals them, at the end.


def plain(q, k, v, scale=None, left=-1, right=-1, top_left=False):
    out = empty_out(q, v.shape[3], False)
    _C.attention_plain(q, k, v, out, scale, left, right, top_left, *on_device(q))
    return out


def forward(
    q, k, v, scale=None, left=-1, right=-1, top_left=False, key_mass=False,
    bias=None, key_bias=None, sink=None, alibi=None, cu_seqlens_q=None, cu_seqlens_k=None,
    seed=None, mask=None, softcap=0.0, dropout=0.0, q_block=0, k_block=0,
):  # fmt: skip
    out, lse, mass = empty_forward(q, k, v, cu_seqlens_q is not None, key_mass)
    _C.attention_forward(
        q, k, v, out, lse, mass if key_mass else None, bias, key_bias, alibi, sink,
        cu_seqlens_q, cu_seqlens_k, None, None, None, None, _mask(mask, q_block, k_block),
        scale, softcap, left, right, top_left, dropout, seed,
        *on_device(q, _C.attention_scratch, lse.numel() if key_mass else 0),
    )  # fmt: skip
    return out, lse, mass


def backward(
    d_out, d_lse, d_key_mass, out, lse, wanted,
    q, k, v, scale=None, left=-1, right=-1, top_left=False,
    bias=None, key_bias=None, sink=None, alibi=None, cu_seqlens_q=None, cu_seqlens_k=None,
    seed=None, mask=None, softcap=0.0, dropout=0.0, q_block=0, k_block=0,
):  # fmt: skip
    grads = empty_gradients(wanted, q, k, v, bias, key_bias, sink)
    rest = iter(grads)
    dq, dk, dv, *others = (next(rest) if want else None for want in wanted)
    dbias, dkey_bias, dsink = others or (None, None, None)
    written = dbias  # in the accumulator's dtype
    if dbias is not None and dbias.dtype != accumulator(q.dtype):
        written = torch.empty_like(dbias, dtype=accumulator(q.dtype))
    _C.attention_backward(
        q, k, v, out, lse, d_out,
        None if d_lse is None else d_lse.contiguous(),
        None if d_key_mass is None else d_key_mass.contiguous(),
        dq, dk, dv, written, dkey_bias, dsink, bias, key_bias, alibi, sink,
        cu_seqlens_q, cu_seqlens_k, _mask(mask, q_block, k_block),
        scale, softcap, left, right, top_left, dropout, seed,
        *on_device(q, _C.attention_scratch, lse.numel()),
    )  # fmt: skip
    if written is not dbias:
        dbias.copy_(written)
    return grads


def decode(
    q, k_cache, v_cache, k_lengths, cache_rows, left_pad, block_table, bias, sink, alibi,
    scale, softcap, left, right,
):  # fmt: skip
    out, lse = empty_out(q, v_cache.shape[3], False), empty_lse(q, False)
    (b, hq, sq, _), (_, hk, capacity, _) = q.shape, k_cache.shape
    if block_table is not None:
        capacity *= block_table.shape[1]
    sizes = b, hq, hk, sq, capacity, v_cache.shape[3], q.element_size()
    _C.attention_decode(
        q, k_cache, v_cache, out, lse, bias, alibi, sink, k_lengths, cache_rows, left_pad,
        block_table, scale, softcap, left, right,
        *on_device(q, _C.attention_decode_scratch, *sizes),
    )  # fmt: skip
    return out, lse


def append(k_new, v_new, k_cache, v_cache, cache_lengths, cache_rows, left_pad, block_table):
    _C.attention_append(
        k_new, v_new, k_cache, v_cache, cache_lengths, cache_rows, left_pad, block_table,
        *on_device(k_cache),
    )  # fmt: skip
    torch.autograd.graph.increment_version((k_cache, v_cache))
