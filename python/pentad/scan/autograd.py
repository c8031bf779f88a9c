# SPDX-License-Identifier: Apache-2.0
"""The operators of `pentad.scan`, their shape functions, and the gradients."""

import torch

from pentad._errors import DeviceError
from pentad._ops import define, needs_grad, quick_apply, spread
from pentad.scan import _kernels

_SCAN = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial, Tensor? cu_seqlens"
)
_CONV = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial, Tensor? seq_idx, Tensor? cu_seqlens"
)


# --- Shape functions ------------------------------------------------------------------------------


def _fake_scan(u, delta, A, B, C, D, z, delta_bias, initial, cu_seqlens, *settings):
    return _kernels.empty_scan(u, A, cu_seqlens, *settings[2:])


def _fake_scan_backward(d_out, d_last, stored, *arguments):
    *inputs, _, _, _, wanted = arguments
    written = _kernels.empty_scan_gradients(*inputs, wanted)
    return _kernels.scan_gradients(written, inputs[3], inputs[4], wanted)


def _fake_recurrence_backward(dh, a, x, h0, h, log_space, reverse, wanted):
    written = _kernels.empty_recurrence_gradients(a, x, h0, wanted)
    return _kernels.recurrence_gradients(written, a, h0)


def _fake_conv(x, weight, bias, initial, seq_idx, cu_seqlens, silu, want_final):
    return _kernels.empty_conv(x, weight, cu_seqlens, want_final)


def _fake_conv_backward(d_out, d_final, x, weight, bias, initial, *rest):
    written = _kernels.empty_conv_gradients(x, weight, bias, initial, rest[-1])
    return _kernels.conv_gradients(written, weight, bias)


def _fake_step(op, x, *arguments):
    """The steps run without a look at devices: one meta tensor among others leads here."""
    for tensor in arguments:
        if isinstance(tensor, torch.Tensor) and tensor.device != x.device:
            raise DeviceError(f"[{op}] x is on {x.device} but another tensor on {tensor.device}")
    return torch.empty_like(x)


# --- Operators ------------------------------------------------------------------------------------

scan_forward = define(
    f"selective_scan({_SCAN}, bool softplus, bool reverse, bool want_last, bool store)"
    " -> (Tensor, Tensor, Tensor)",
    _kernels.scan_forward,
    _fake_scan,
    cuda=True,
)
scan_backward = define(
    f"selective_scan_backward(Tensor d_out, Tensor? d_last, Tensor stored, {_SCAN}, "
    "bool softplus, bool reverse, bool[] wanted) -> Tensor[]",
    _kernels.scan_backward,
    _fake_scan_backward,
    cuda=True,
)
state_update = define(
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, bool softplus, Tensor? rows) -> Tensor",
    _kernels.state_update,
    lambda state, x, *rest: _fake_step("selective_state_update", x, state, *rest),
    cuda=True,
)
few_rows_linear = define(
    "few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _kernels.few_rows_linear,
    lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
    cuda=True,
)
cache_rows = define(
    "scan_cache_rows(str op, str name, Tensor rows, SymInt size) -> Tensor",
    _kernels.cache_rows,
    lambda op, name, rows, size: torch.empty_like(rows, dtype=torch.int64),
    cuda=True,
)
cache_positions = define(
    "scan_cache_positions(str op, Tensor positions, SymInt steps) -> Tensor",
    _kernels.cache_positions,
    lambda op, positions, steps: torch.empty_like(positions, dtype=torch.int64),
    cuda=True,
)
recurrence_forward = define(
    "linear_recurrence(Tensor a, Tensor x, Tensor? h0, bool log_space, bool reverse) -> Tensor",
    _kernels.recurrence_forward,
    lambda a, x, *rest: torch.empty_like(x),
    cuda=True,
)
recurrence_backward = define(
    "linear_recurrence_backward(Tensor dh, Tensor a, Tensor x, Tensor? h0, Tensor h, "
    "bool log_space, bool reverse, bool[] wanted) -> Tensor[]",
    _kernels.recurrence_backward,
    _fake_recurrence_backward,
    cuda=True,
)
conv_forward = define(
    f"causal_conv1d({_CONV}, bool silu, bool want_final) -> (Tensor, Tensor)",
    _kernels.conv_forward,
    _fake_conv,
    cuda=True,
)
conv_backward = define(
    f"causal_conv1d_backward(Tensor d_out, Tensor? d_final, {_CONV}, bool silu, bool[] wanted)"
    " -> Tensor[]",
    _kernels.conv_backward,
    _fake_conv_backward,
    cuda=True,
)
conv_update = define(
    "causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? rows, Tensor? positions) -> Tensor",
    _kernels.conv_update,
    lambda x, *rest: _fake_step("causal_conv1d_update", x, *rest),
    cuda=True,
)


# --- Gradients ------------------------------------------------------------------------------------


@quick_apply
class _SelectiveScan(torch.autograd.Function):
    """Keeps the inputs and every `_kernels.CHUNK`-th state."""

    @staticmethod
    def forward(settings, *tensors):
        return scan_forward(*tensors, *settings, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        (softplus, reverse, want_last), *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2], *(() if want_last else output[1:2]))
        ctx.save_for_backward(output[2], *tensors)
        ctx.settings, ctx.want_last = (softplus, reverse), want_last

    @staticmethod
    def backward(ctx, d_out, d_last, _):
        stored, *tensors = ctx.saved_tensors
        u = tensors[0]
        wanted = ctx.needs_input_grad[1:10]
        if not ctx.want_last:  # a compiled graph hands down zeros
            d_last = None
        grads = scan_backward(
            u.new_zeros(()).expand(u.shape) if d_out is None else d_out,
            d_last, stored, *tensors, *ctx.settings, wanted,
        )  # fmt: skip
        inputs = d_out, d_last, *tensors[:9]
        return None, *spread("selective_scan", grads, wanted, inputs), None


def selective_scan(*arguments):
    """`scan_forward` without its last argument; differentiable in the first nine tensors."""
    tensors, settings = arguments[:10], arguments[10:]
    if needs_grad(*(t for t in tensors if t is not None)):
        return _SelectiveScan.apply(settings, *tensors)
    return scan_forward(*arguments, False)


@quick_apply
class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(settings, a, x, h0):
        return recurrence_forward(a, x, h0, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.settings, a, x, h0 = inputs
        ctx.save_for_backward(a, x, h0, output)

    @staticmethod
    def backward(ctx, dh):
        a, x, h0, h = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        grads = recurrence_backward(dh, a, x, h0, h, *ctx.settings, wanted)
        return None, *spread("linear_recurrence", grads, wanted, (dh, a, x, h0))


def linear_recurrence(a, x, h0, *settings):
    """`recurrence_forward`, differentiable."""
    if needs_grad(a, x) or (h0 is not None and needs_grad(h0)):
        return _Recurrence.apply(settings, a, x, h0)
    return recurrence_forward(a, x, h0, *settings)


@quick_apply
class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(settings, *tensors):
        return conv_forward(*tensors, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        (ctx.silu, ctx.want_final), *tensors = inputs
        ctx.set_materialize_grads(False)
        if not ctx.want_final:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, d_out, d_final):
        tensors = ctx.saved_tensors
        x, wanted = tensors[0], ctx.needs_input_grad[1:5]
        if not ctx.want_final:
            d_final = None
        grads = conv_backward(
            x.new_zeros(()).expand(x.shape) if d_out is None else d_out,
            d_final, *tensors, ctx.silu, wanted,
        )  # fmt: skip
        inputs = d_out, d_final, *tensors[:4]
        return None, *spread("causal_conv1d", grads, wanted, inputs), None, None


def causal_conv1d(*arguments):
    """`conv_forward`, differentiable in x, weight, bias and initial."""
    if needs_grad(*(t for t in arguments[:4] if t is not None)):
        return _CausalConv.apply(arguments[6:], *arguments[:6])
    return conv_forward(*arguments)
