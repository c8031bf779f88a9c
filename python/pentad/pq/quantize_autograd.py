# SPDX-License-Identifier: Apache-2.0
"""The torch side of `quantize`: the gradients that pass the rounding, and the usage histogram."""

import torch

from pentad._ops import define, needs_grad, quick_apply, spread
from pentad.pq.lookup import lookup
from pentad.pq.lookup_autograd import backward as _lookup_backward
from pentad.pq.quantize import histogram

_NEARLY_OPPOSITE = 1e-6  # length of the sum of two unit vectors that has no direction left


def _usage(codes, K):
    if codes.is_cuda:
        return counted(codes, K)
    return torch.from_numpy(histogram(codes.numpy(), K))


def counted(codes, K):
    """The histogram by torch, on any device."""
    count = codes.shape[-1]
    # As int64 an unsigned number beyond 2^63 is negative, which is no code either.
    flat = codes.reshape(-1, count).long()
    inside = (flat >= 0) & (flat < K)
    places = flat.clamp(0, K - 1) + K * torch.arange(count, device=codes.device)
    counts = torch.zeros(count * K, dtype=torch.int64, device=codes.device)
    return counts.scatter_add_(0, places.flatten(), inside.long().flatten()).view(count, K)


usage = define(
    "pq_usage(Tensor codes, SymInt K) -> Tensor",
    _usage,
    lambda codes, K: codes.new_empty((codes.shape[-1], K), dtype=torch.int64),
    cuda=True,
)


def rotated(grad, x, quantized):
    """The gradient that the rotation trick gives to x, from that of `quantized`; all (..., width).

    The transpose of ``|q| / |x| * (I - 2 r r' + 2 q^ x^')``, where x^ and q^ are x and q at unit
    length and r is their sum at unit length: the rotation in their plane that takes x to q, with
    the change of length, as a constant. Where x is zero it has no direction and the gradient
    passes straight; where x^ = -q^ the rotation is not unique, and the reflection along x is taken.
    """
    length, target = (t.norm(dim=-1, keepdim=True) for t in (x, quantized))
    start = x / length.where(length > 0, 1)
    end = quantized / target.where(target > 0, 1)
    middle = start + end
    middle = middle / middle.norm(dim=-1, keepdim=True).clamp(min=_NEARLY_OPPOSITE)
    turned = (
        grad
        - 2 * middle * (middle * grad).sum(-1, keepdim=True)
        + 2 * start * (end * grad).sum(-1, keepdim=True)
    )
    return torch.where(length > 0, turned * (target / length.where(length > 0, 1)), grad)


def scatter(grad, codes, shape, combine):
    """The gradient of ``lookup(codes, codebooks, combine=combine)`` to codebooks of `shape`.

    In float32 at least: rows of `grad` (..., columns), added up by code.
    """
    rows = codes.reshape(codes.shape[:-1].numel(), shape[0])
    grad = grad.reshape(rows.shape[0], grad.shape[-1])
    like = [grad.new_empty(shape)]  # of which the sizes are read
    return _lookup_backward(grad, rows, like, None, None, combine, (True, False))[0].view(shape)


@quick_apply
class _Quantize(torch.autograd.Function):
    """lookup, whose gradient also goes to x: straight, or rotated in each part of `width`."""

    @staticmethod
    def forward(x, codebooks, codes, combine, estimator):
        return lookup(codes, codebooks, combine=combine)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, codebooks, codes, ctx.combine, ctx.estimator = inputs
        ctx.dtypes, ctx.shape = (x.dtype, codebooks.dtype), codebooks.shape
        ctx.save_for_backward(codes, *((x, output) if ctx.estimator == "rotation" else ()))

    @staticmethod
    def backward(ctx, grad):
        codes, *moved = ctx.saved_tensors
        to_x = to_codebooks = None
        if ctx.needs_input_grad[0] and ctx.estimator == "ste":
            to_x = grad.to(ctx.dtypes[0])
        elif ctx.needs_input_grad[0] and ctx.estimator == "rotation":
            wide = torch.float64 if torch.float64 in ctx.dtypes else torch.float32
            parts = (t.to(wide).unflatten(-1, (-1, ctx.shape[2])) for t in (grad, *moved))
            to_x = rotated(*parts).flatten(-2).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1] and ctx.estimator != "rotation":
            to_codebooks = scatter(grad, codes, ctx.shape, ctx.combine).to(ctx.dtypes[1])
        gradients = (to_x, to_codebooks)
        wanted = [gradient is not None for gradient in gradients]
        given = [gradient for gradient in gradients if gradient is not None]
        if given:
            gradients = spread("pq.quantize", given, wanted, (grad, *moved))
        return *gradients, None, None, None


def quantize(x, codebooks, codes, combine, estimator):
    """The codewords of `codes`, with the gradients of the estimator."""
    if needs_grad(x, codebooks):
        return _Quantize.apply(x, codebooks, codes, combine, estimator)
    return lookup(codes, codebooks, combine=combine)


def mean_square(a, b):
    """The mean of (a - b)^2 in at least float32; 0 of nothing."""
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return (a.to(wide) - b.to(wide)).square().sum() / max(a.numel(), 1)
