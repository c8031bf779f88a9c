# SPDX-License-Identifier: Apache-2.0
"""The operators of the recurrences whose state is a matrix, and their gradients."""

import torch

from pentad._ops import define, direct, needs_grad, quick_apply, spread
from pentad.scan import _matrix_kernels as kernels
from pentad.scan._checks import check_cuda_devices

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? a, Tensor? w, Tensor? d, Tensor? initial, "
    "Tensor? cu_seqlens, bool delta, bool reverse, float scale"
)


def _fake_forward(op, q, k, v, a, w, d, initial, cu_seqlens, delta, reverse, scale, *settings):
    return kernels.empty_scan(v, q, cu_seqlens, *settings)


def _fake_backward(d_out, d_last, stored, *arguments):
    wanted = arguments[-1]
    grads = kernels.empty_scan_gradients(*arguments[:7], wanted)
    return [grad for grad in grads if grad is not None]


def _fake_update(op, state, q, k, v, a, w, delta, scale, rows):
    """The steps run without a look at devices: one meta tensor among others leads here."""
    check_cuda_devices(
        op, ("v", v), state=state, q=q, k=k, decay=a, beta=w, state_batch_indices=rows
    )
    return torch.empty_like(v)


scan_forward = define(
    f"matrix_scan(str op, {_INPUTS}, bool wide, bool want_last, bool store)"
    " -> (Tensor, Tensor, Tensor)",
    kernels.scan_forward,
    _fake_forward,
    cuda=True,
)
scan_backward = define(
    f"matrix_scan_backward(Tensor d_out, Tensor? d_last, Tensor stored, {_INPUTS}, bool[] wanted)"
    " -> Tensor[]",
    kernels.scan_backward,
    _fake_backward,
    cuda=True,
)
_update = define(
    "matrix_update(str op, Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor? a, Tensor? w, "
    "bool delta, float scale, Tensor? rows) -> Tensor",
    kernels.update,
    _fake_update,
    cuda=True,
)


def update(op, state, q, k, v, a, w, delta, scale, rows):
    """`kernels.update`, by the operator unless nobody would see the difference.

    One token of 8 heads of 64 and 64, us: 14.8 in all before; 8.3 without the dispatcher, with
    `empty_like` in place of `new_empty` and decays that go through `factors` as they are.
    """
    if direct(state, q, k, v, a, w, rows):
        try:
            return kernels.update(op, state, q, k, v, a, w, delta, scale, rows)
        except Exception:  # nothing has been written
            pass
    return _update(op, state, q, k, v, a, w, delta, scale, rows)


@quick_apply
class _MatrixScan(torch.autograd.Function):
    """Keeps the inputs and the state before every `kernels.CHUNK`-th step."""

    @staticmethod
    def forward(op, settings, *tensors):
        return scan_forward(op, *tensors, *settings, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, (*ctx.settings, ctx.wide, ctx.want_last), *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2], *(() if ctx.want_last else output[1:2]))
        ctx.save_for_backward(output[2], *tensors)

    @staticmethod
    def backward(ctx, d_out, d_last, _):
        stored, *tensors = ctx.saved_tensors
        v = tensors[2]
        wanted = ctx.needs_input_grad[2:9]
        if not ctx.want_last:  # a compiled graph hands down zeros
            d_last = None
        grads = scan_backward(
            v.new_zeros(()).expand(v.shape) if d_out is None else d_out,
            d_last, stored, *tensors, *ctx.settings, wanted,
        )  # fmt: skip
        inputs = (d_out, d_last, *tensors[:7])
        return None, None, *spread(ctx.op, grads, wanted, inputs), None


def matrix_scan(
    op,
    q,
    k,
    v,
    *,
    a=None,
    w=None,
    d=None,
    initial=None,
    cu_seqlens=None,
    delta=False,
    reverse=False,
    scale=1.0,
    wide=False,
    want_last=False,
):
    """(out, last states) of ``csrc/scan/matrix_scan.h``, differentiable in q to `initial`.

    `op` is named in errors. `wide`: out in the accumulator's dtype. Without `want_last` the last
    states are empty.
    """
    tensors = (q, k, v, a, w, d, initial, cu_seqlens)
    settings = (delta, reverse, scale, wide, want_last)
    if needs_grad(*(t for t in tensors if t is not None)):
        out, last, _ = _MatrixScan.apply(op, settings, *tensors)
    else:
        out, last, _ = scan_forward(op, *tensors, *settings, False)
    return out, last
