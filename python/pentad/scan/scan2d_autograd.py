# SPDX-License-Identifier: Apache-2.0
"""The operators of scans over images, their kernels, shape functions and gradients."""

import torch

from pentad import _C
from pentad._ops import define, needs_grad, quick_apply, spread
from pentad.scan._checks import accumulator
from pentad.scan._kernels import CHUNK, _contiguous, empty_like

# --- Cross-scan -----------------------------------------------------------------------------------


def _rows_like(x):
    """(..., D, L) with the channels next to each other in memory where those of `x` are."""
    *outer, d, length = x.shape
    if x.stride(-2) == 1 and x.stride(-1) != 1:
        return x.new_empty((*outer, length, d)).mT
    return x.new_empty((*outer, d, length))


def _empty_cross(u, delta, A, B, C, D, delta_bias, order, softplus, by_step, store):
    (batch, dim, length), (directions, _, states) = u.shape, A.shape
    stored = (0,)
    if store and u.dtype != torch.float64:
        stored = (batch, directions, (length + CHUNK - 1) // CHUNK, states, dim)
    return empty_like(u), u.new_empty(stored, dtype=torch.float32)


def _cross_forward(*arguments):
    *inputs, order, softplus, by_step, store = arguments
    out, stored = _empty_cross(*arguments)
    _C.cross_scan_forward(
        *inputs, order, softplus, *by_step, out,
        stored if store and out.dtype != torch.float64 else None,
    )  # fmt: skip
    return out, stored


def _empty_sums(x):
    """The gradient of B or C as it is summed: states next to each other in memory."""
    *outer, states, length = x.shape
    return x.new_empty((*outer, length, states), dtype=accumulator(x.dtype)).mT


def _empty_cross_gradients(inputs, wanted):
    makers = (
        empty_like, _rows_like, _contiguous, _empty_sums, _empty_sums, _contiguous, _contiguous,
    )  # fmt: skip
    return [make(t) if want else None for t, make, want in zip(inputs, makers, wanted, strict=True)]


def _gradients(written, inputs):
    return [g.to(t.dtype) for g, t in zip(written, inputs, strict=True) if g is not None]


def _cross_backward(d_out, stored, *arguments):
    *inputs, order, softplus, by_step, wanted = arguments
    written = _empty_cross_gradients(inputs, wanted)
    _C.cross_scan_backward(
        d_out, None if d_out.dtype == torch.float64 else stored, *inputs, order, softplus,
        *by_step, *written,
    )  # fmt: skip
    return _gradients(written, inputs)


def _fake_cross_backward(d_out, stored, *arguments):
    *inputs, _, _, _, wanted = arguments
    return _gradients(_empty_cross_gradients(inputs, wanted), inputs)


_CROSS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "Tensor order, bool softplus, bool[] by_step"
)
cross_forward = define(
    f"scan2d({_CROSS}, bool store) -> (Tensor, Tensor)", _cross_forward, _empty_cross
)
cross_backward = define(
    f"scan2d_backward(Tensor d_out, Tensor stored, {_CROSS}, bool[] wanted) -> Tensor[]",
    _cross_backward,
    _fake_cross_backward,
)


@quick_apply
class _CrossScan(torch.autograd.Function):
    @staticmethod
    def forward(settings, *tensors):
        return cross_forward(*tensors, *settings, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.settings, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *tensors)

    @staticmethod
    def backward(ctx, d_out, _):
        stored, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:8]
        grads = cross_backward(d_out, stored, *tensors, *ctx.settings, wanted)
        return None, *spread("scan2d", grads, wanted, (d_out, *tensors[:7])), None


def cross_scan(*arguments):
    """`cross_forward` without its last argument and result; differentiable in seven tensors."""
    tensors, settings = arguments[:8], arguments[8:]
    if needs_grad(*(t for t in tensors[:7] if t is not None)):
        return _CrossScan.apply(settings, *tensors)[0]
    return cross_forward(*arguments, False)[0]


# --- Along both axes ------------------------------------------------------------------------------


def _empty_wavefront(u, delta, A, B, C, D, width, store):
    batch, dim, places = u.shape
    stored = (0,)
    if store and u.dtype != torch.float64:
        bands = (places // width - 1) // _C.wavefront_band if places else 0
        stored = (batch, bands, width, A.shape[2], dim)
    return empty_like(u), u.new_empty(stored, dtype=torch.float32)


def _wavefront_forward(*arguments):
    *inputs, width, store = arguments
    out, stored = _empty_wavefront(*arguments)
    _C.wavefront_forward(
        *inputs, width, out, stored if store and out.dtype != torch.float64 else None
    )
    return out, stored


def _empty_wavefront_gradients(inputs, wanted):
    makers = (empty_like, _rows_like, _contiguous, _empty_sums, _empty_sums, _contiguous)
    return [make(t) if want else None for t, make, want in zip(inputs, makers, wanted, strict=True)]


def _wavefront_backward(d_out, stored, *arguments):
    *inputs, width, wanted = arguments
    written = _empty_wavefront_gradients(inputs, wanted)
    _C.wavefront_backward(
        d_out, None if d_out.dtype == torch.float64 else stored, *inputs, width, *written
    )
    return _gradients(written, inputs)


def _fake_wavefront_backward(d_out, stored, *arguments):
    *inputs, _, wanted = arguments
    return _gradients(_empty_wavefront_gradients(inputs, wanted), inputs)


_WAVEFRONT = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, SymInt width"
wavefront_forward = define(
    f"scan2d_wavefront({_WAVEFRONT}, bool store) -> (Tensor, Tensor)",
    _wavefront_forward,
    _empty_wavefront,
)
wavefront_backward = define(
    f"scan2d_wavefront_backward(Tensor d_out, Tensor stored, {_WAVEFRONT}, bool[] wanted)"
    " -> Tensor[]",
    _wavefront_backward,
    _fake_wavefront_backward,
)


@quick_apply
class _Wavefront(torch.autograd.Function):
    """Keeps the inputs and the states above every eighth row."""

    @staticmethod
    def forward(width, *tensors):
        return wavefront_forward(*tensors, width, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.width, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *tensors)

    @staticmethod
    def backward(ctx, d_out, _):
        stored, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        grads = wavefront_backward(d_out, stored, *tensors, ctx.width, wanted)
        return None, *spread("scan2d_wavefront", grads, wanted, (d_out, *tensors))


def wavefront(*arguments):
    """`wavefront_forward` without its last argument and result, differentiable."""
    tensors, width = arguments[:6], arguments[6]
    if needs_grad(*(t for t in tensors if t is not None)):
        return _Wavefront.apply(width, *tensors)[0]
    return wavefront_forward(*arguments, False)[0]
