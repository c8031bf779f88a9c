# SPDX-License-Identifier: Apache-2.0
"""The operators of lookups, their kernels, shape functions and gradients."""

import torch

from pentad import _C
from pentad._arrays import on_device
from pentad._ops import define, needs_grad, quick_apply, spread


def _accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty(codes, tables, weights, offsets, combine):
    rows = codes.shape[0] if offsets is None else offsets.shape[0]
    width = tables[0].shape[-1]
    columns = width * codes.shape[1] if combine == "concat" else width
    return tables[0].new_empty((rows, columns))


def _forward(codes, tables, weights, offsets, combine):
    out = _empty(codes, tables, weights, offsets, combine)
    device = on_device(codes, _C.pq_lookup_scratch, codes.shape[1])
    _C.pq_lookup(codes, _in_rows(tables), weights, offsets, combine, out, *device)
    return out


def _in_rows(tables):
    """Tables as they are, or on a device, where the kernels do not copy, with rows in one piece."""
    if not tables[0].is_cuda:
        return tables
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tables]


def _empty_gradients(d_out, codes, tables, weights, offsets, combine, wanted):
    """Of the tables, one below the other, and of the weights; empty where not wanted."""
    (want_tables, want_weights), dtype = wanted, _accumulator(tables[0].dtype)
    rows = sum(t.shape[:-1].numel() for t in tables) if want_tables else 0
    columns = codes.shape[1] if want_weights else 0
    return (
        tables[0].new_empty((rows, tables[0].shape[-1]), dtype=dtype),
        tables[0].new_empty((codes.shape[0], columns), dtype=dtype),
    )


def _backward(d_out, codes, tables, weights, offsets, combine, wanted):
    gradients = _empty_gradients(d_out, codes, tables, weights, offsets, combine, wanted)
    written = (g if want else None for g, want in zip(gradients, wanted, strict=True))
    if d_out.shape[1] > 1 and d_out.stride(1) != 1:  # as the expanded gradient of a sum has it
        d_out = d_out.clone(memory_format=torch.contiguous_format)
    rows, width = sum(t.shape[:-1].numel() for t in tables), tables[0].shape[-1]
    sizes = (*codes.shape, rows, width, wanted[0])
    device = on_device(codes, _C.pq_lookup_backward_scratch, *sizes)
    tables = _in_rows(tables)
    _C.pq_lookup_backward(d_out, codes, tables, weights, offsets, combine, *written, *device)
    return gradients


_LOOKUP = "Tensor codes, Tensor[] tables, Tensor? weights, Tensor? offsets, str combine"
forward = define(f"pq_lookup({_LOOKUP}) -> Tensor", _forward, _empty, cuda=True)
backward = define(
    f"pq_lookup_backward(Tensor d_out, {_LOOKUP}, bool[] wanted) -> (Tensor, Tensor)",
    _backward,
    _empty_gradients,
    cuda=True,
)


@quick_apply
class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(combine, codes, weights, offsets, *tables):
        return forward(codes, tables, weights, offsets, combine)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.combine, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, d_out):
        codes, weights, offsets, *tables = ctx.saved_tensors
        want_weights, want_tables = ctx.needs_input_grad[2], ctx.needs_input_grad[4:]
        d_tables, d_weights = backward(
            d_out, codes, tables, weights, offsets, ctx.combine, (any(want_tables), want_weights)
        )
        parts = [None] * len(tables)
        if any(want_tables):
            parts = d_tables.split([t.shape[:-1].numel() for t in tables])
        grads = [d_weights.to(weights.dtype)] if want_weights else []
        grads += [
            part.view(table.shape).to(table.dtype)
            for part, table, want in zip(parts, tables, want_tables, strict=True)
            if want
        ]
        given = [t for t in (d_out, weights, *tables) if t is not None]
        grads = spread("pq.lookup", grads, (want_weights, *want_tables), given)
        return None, None, grads[0], None, *grads[1:]


def lookup(codes, tables, weights, offsets, combine):
    """(outputs, columns) of codes (n, M); `tables` one of three dimensions or M of two."""
    if needs_grad(*tables) or (weights is not None and needs_grad(weights)):
        return _Lookup.apply(combine, codes, weights, offsets, *tables)
    return forward(codes, tables, weights, offsets, combine)
