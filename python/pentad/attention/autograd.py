# SPDX-License-Identifier: Apache-2.0
"""The operators of `pentad.attention`, their shape functions, and the gradient."""

import torch

from pentad._ops import define
from pentad.attention import _kernels

_OPTIONS = (
    "Tensor? bias, Tensor? key_bias, Tensor? sink, Tensor? alibi, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor[]? mask, Tensor? seed, float? scale, float softcap, "
    "SymInt left, SymInt right, bool top_left, float dropout, int q_block, int k_block"
)


def _fake_forward(q, k, v, bias, key_bias, sink, alibi, cu_seqlens_q, cu_seqlens_k, *rest):
    return _kernels.empty_forward(q, k, v, cu_seqlens_q is not None, rest[-1])


def _fake_backward(d_out, d_lse, d_key_mass, q, k, v, out, lse, bias, key_bias, sink, *rest):
    return _kernels.empty_gradients(q, k, v, bias, key_bias, sink, rest[-1])


def _fake_decode(q, k_cache, v_cache, *rest):
    return _kernels.empty_out(q, v_cache.shape[3], False), _kernels.empty_lse(q, False)


# Without options or gradients: half the time per call of the general one.
plain = define(
    "attention_plain(Tensor q, Tensor k, Tensor v, float? scale, SymInt left, SymInt right, "
    "bool top_left) -> Tensor",
    _kernels.plain,
    lambda q, k, v, *rest: _kernels.empty_out(q, v.shape[3], False),
)
forward = define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool key_mass)"
    " -> (Tensor, Tensor, Tensor)",
    _kernels.forward,
    _fake_forward,
)
backward = define(
    "attention_backward(Tensor d_out, Tensor? d_lse, Tensor? d_key_mass, Tensor q, Tensor k, "
    f"Tensor v, Tensor out, Tensor lse, {_OPTIONS}, bool[] wanted) -> Tensor[]",
    _kernels.backward,
    _fake_backward,
)
decode = define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor k_lengths, "
    "Tensor? cache_rows, Tensor? left_pad, Tensor? block_table, Tensor? bias, Tensor? sink, "
    "Tensor? alibi, float? scale, float softcap, SymInt left, SymInt right) -> (Tensor, Tensor)",
    _kernels.decode,
    _fake_decode,
)
append = define(
    "attention_append(Tensor k_new, Tensor v_new, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cache_lengths, Tensor? cache_rows, Tensor? left_pad, Tensor? block_table) -> ()",
    _kernels.append,
    lambda *arguments: None,
)

_TENSORS = 11  # the first arguments of `forward`; the rest are its settings
_DIFFERENTIABLE = 6  # of the tensors: q, k, v, bias, key_bias, sink


class _Attention(torch.autograd.Function):
    """`forward` with its gradient; keeps the inputs, out and lse, nothing of size Sq x Sk.

    Its arguments are few and not named, which is what a call of it costs.
    """

    @staticmethod
    def forward(settings, *tensors):
        return forward(*tensors, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        settings, q, k, v, *options, mask, seed = inputs
        out, lse, _ = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *options, seed, *(mask or ()))
        ctx.masked = mask is not None
        *ctx.settings, ctx.key_mass = settings

    @staticmethod
    def backward(ctx, d_out, d_lse, d_key_mass):
        saved = ctx.saved_tensors
        q, k, v, out, lse = saved[:5]
        options, seed, mask = saved[5:11], saved[11], saved[12:]
        wanted = ctx.needs_input_grad[1 : 1 + _DIFFERENTIABLE]
        if not ctx.key_mass:  # a compiled graph hands down zeros
            d_key_mass = None
        grads = backward(
            out.new_zeros(()).expand(out.shape) if d_out is None else d_out,
            d_lse, d_key_mass, q, k, v, out, lse, *options,
            list(mask) if ctx.masked else None, seed, *ctx.settings, wanted,
        )  # fmt: skip
        if torch.is_grad_enabled():  # asked to build a graph of this pass
            grads = _Once.apply(len(grads), *grads, d_out, d_lse, d_key_mass, q, k, v, *options)
        grads = iter(grads)
        given = (next(grads) if want else None for want in wanted)
        return (None, *given, *(None,) * (_TENSORS - _DIFFERENTIABLE))


class _Once(torch.autograd.Function):
    """The identity on the first tensors, which depends on all and refuses to be differentiated."""

    @staticmethod
    def forward(count, *tensors):
        return tensors[:count]

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("[attention] the gradient cannot be differentiated a second time")


def attention(*arguments):
    """`forward` of the same arguments, differentiable where any of the first six needs it."""
    if torch.is_grad_enabled():
        for tensor in arguments[:_DIFFERENTIABLE]:
            if tensor is not None and tensor.requires_grad:
                return _Attention.apply(arguments[_TENSORS:], *arguments[:_TENSORS])
    return forward(*arguments)
