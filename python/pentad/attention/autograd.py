# SPDX-License-Identifier: Apache-2.0
"""The operators of `pentad.attention`, their shape functions, and the gradient."""

import torch

from pentad._ops import define, forward_mode, quick_apply, spread
from pentad.attention import _kernels

# Defaults are what makes a call cheap: those at the end need not be carried to the kernel.
_PLAIN = (
    "Tensor q, Tensor k, Tensor v, float? scale=None, SymInt left=-1, SymInt right=-1, "
    "bool top_left=False"
)
_OPTIONS = (
    "Tensor? bias=None, Tensor? key_bias=None, Tensor? sink=None, Tensor? alibi=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seed=None, "
    "Tensor[]? mask=None, float softcap=0.0, float dropout=0.0, int q_block=0, int k_block=0"
)


def _fake_plain(q, k, v, *rest):
    return _kernels.empty_out(q, v.shape[3], False)


def _fake_forward(q, k, v, scale=None, left=-1, right=-1, top_left=False, key_mass=False, *rest):
    return _kernels.empty_forward(q, k, v, q.ndim == 3, key_mass)


def _fake_backward(
    d_out, d_lse, d_key_mass, out, lse, wanted, q, k, v, scale=None, left=-1, right=-1,
    top_left=False, bias=None, key_bias=None, sink=None, *rest,
):  # fmt: skip
    return _kernels.empty_gradients(wanted, q, k, v, bias, key_bias, sink)


def _fake_decode(q, k_cache, v_cache, *rest):
    return _kernels.empty_out(q, v_cache.shape[3], False), _kernels.empty_lse(q, False)


# Without options or gradients: half the time per call of the general one.
plain = define(f"attention_plain({_PLAIN}) -> Tensor", _kernels.plain, _fake_plain, cuda=True)
forward = define(
    f"attention_forward({_PLAIN}, bool key_mass=False, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _kernels.forward,
    _fake_forward,
    cuda=True,
)
backward = define(
    "attention_backward(Tensor d_out, Tensor? d_lse, Tensor? d_key_mass, Tensor out, Tensor lse, "
    f"bool[] wanted, {_PLAIN}, {_OPTIONS}) -> Tensor[]",
    _kernels.backward,
    _fake_backward,
    cuda=True,
)
decode = define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor k_lengths, "
    "Tensor? cache_rows, Tensor? left_pad, Tensor? block_table, Tensor? bias, Tensor? sink, "
    "Tensor? alibi, float? scale, float softcap, SymInt left, SymInt right) -> (Tensor, Tensor)",
    _kernels.decode,
    _fake_decode,
    cuda=True,
)
append = define(
    "attention_append(Tensor k_new, Tensor v_new, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cache_lengths, Tensor? cache_rows, Tensor? left_pad, Tensor? block_table) -> ()",
    _kernels.append,
    lambda *arguments: None,
    cuda=True,
)

_DIFFERENTIABLE = 6  # q, k, v, bias, key_bias, sink
_LISTS = 7  # index in the options of `mask`, the one that is not one tensor


@quick_apply
class _Attention(torch.autograd.Function):
    """`forward` with its gradient; keeps the inputs, out and lse, nothing of size Sq x Sk.

    Its arguments are few and not named, which is what a call of it costs. There may be no options.
    """

    @staticmethod
    def forward(*inputs):
        (settings, more), q, k, v, *options = inputs
        return forward(q, k, v, *settings, *options, *more)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.settings, q, k, v, *options = inputs
        out, lse, _ = output
        if options:
            options[_LISTS:] = options[_LISTS] or ()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *options)

    @staticmethod
    def backward(ctx, d_out, d_lse, d_key_mass):
        q, k, v, out, lse, *options = ctx.saved_tensors
        if options:
            options[_LISTS:] = [options[_LISTS:] or None]
        settings, more = ctx.settings
        wants = ctx.needs_input_grad
        wanted = wants[1 : 1 + _DIFFERENTIABLE]
        if settings[4:] != (True,):  # a compiled graph hands down zeros
            d_key_mass = None
        if d_out is None:
            d_out = out.new_zeros(()).expand(out.shape)
        grads = backward(
            d_out, d_lse, d_key_mass, out, lse, wanted, q, k, v, *settings[:4], *options, *more
        )
        inputs = (d_out, d_lse, d_key_mass, q, k, v, *options[:_LISTS])
        given = spread("attention", grads, wanted, inputs)
        return (None, *given, *(None,) * (len(wants) - 1 - len(given)))


def needs_grad(q, k, v):
    """Whether `plain` will not do; `pentad._ops.needs_grad` would take four times as long."""
    if forward_mode():
        return True
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def attention(q, k, v, settings=(), options=(), more=()):
    """`forward` of all these arguments, differentiable in q, k, v and the first three options.

    `settings` end with top_left or key_mass, `options` are the tensors and `more` what follows;
    all are left out where they are the defaults.
    """
    wanted = forward_mode()
    if not wanted and torch.is_grad_enabled():
        for tensor in (q, k, v, *options[:3]):
            if tensor is not None and tensor.requires_grad:
                wanted = True
                break
    if wanted:
        return _Attention.apply((settings, more), q, k, v, *options)
    return forward(q, k, v, *settings, *options, *more)
