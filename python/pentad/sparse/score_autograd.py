# SPDX-License-Identifier: Apache-2.0
"""The operators of sparse scores, their kernels, shape functions and gradients."""

import torch

from pentad import _C
from pentad._arrays import runs_cuda
from pentad._ops import define, needs_grad, quick_apply, spread
from pentad.sparse import score_device

_KNOWN = (torch.int32, torch.int64)


def _wide(q_values, d_values):
    double = torch.float64 in (q_values.dtype, d_values.dtype)
    return torch.float64 if double else torch.float32


def _integers(indices):
    return (indices if indices.dtype in _KNOWN else indices.to(torch.int64)).contiguous()


def _ready(indptr, indices, values):
    return _integers(indptr), _integers(indices), values.contiguous()


def _sides(q_indptr, q_indices, q_values, d_indptr, d_indices, d_values, pairs):
    pairs = None if pairs is None else pairs.to(torch.int64)
    queries = _ready(q_indptr, q_indices, q_values)
    return *queries, *_ready(d_indptr, d_indices, d_values), pairs


def _by_device(q_values, d_values):
    """Whether the CUDA kernels have these: not float64, which is refused on a device."""
    return q_values.is_cuda or (runs_cuda(q_values) and _wide(q_values, d_values) == torch.float32)


def _shape(q_indptr, d_indptr, pairs):
    if pairs is not None:
        return (pairs.shape[0],)
    return (q_indptr.shape[0] - 1, d_indptr.shape[0] - 1)


def _empty(q_indptr, q_indices, q_values, d_indptr, d_indices, d_values, pairs, columns):
    dtype = torch.promote_types(q_values.dtype, d_values.dtype)
    return q_values.new_empty(_shape(q_indptr, d_indptr, pairs), dtype=dtype)


def _forward(q_indptr, q_indices, q_values, d_indptr, d_indices, d_values, pairs, columns):
    out = q_values.new_empty(_shape(q_indptr, d_indptr, pairs), dtype=_wide(q_values, d_values))
    sides = _sides(q_indptr, q_indices, q_values, d_indptr, d_indices, d_values, pairs)
    if _by_device(q_values, d_values):
        out = score_device.score(sides[:3], sides[3:6], sides[6], columns)
    else:
        _C.sparse_score(*sides, columns, out)
    return out.to(torch.promote_types(q_values.dtype, d_values.dtype))


def _empty_gradients(
    d_out, q_indptr, q_indices, q_values, d_indptr, d_indices, d_values, pairs, columns, wanted
):
    """Of both sides' values; empty where not wanted."""
    dtype = _wide(q_values, d_values)
    return tuple(
        values.new_empty(values.shape[0] if want else 0, dtype=dtype)
        for values, want in zip((q_values, d_values), wanted, strict=True)
    )


def _backward(
    d_out, q_indptr, q_indices, q_values, d_indptr, d_indices, d_values, pairs, columns, wanted
):
    given = (q_indptr, q_indices, q_values, d_indptr, d_indices, d_values, pairs)
    gradients = _empty_gradients(d_out, *given, columns, wanted)
    written = (g if want else None for g, want in zip(gradients, wanted, strict=True))
    d_out = d_out.to(_wide(q_values, d_values)).contiguous()
    if _by_device(q_values, d_values):
        sides = _sides(*given)
        found = score_device.score_backward(d_out, sides[:3], sides[3:6], sides[6], columns, wanted)
        return tuple(
            none if grad is None else grad for none, grad in zip(gradients, found, strict=True)
        )
    _C.sparse_score_backward(d_out, *_sides(*given), columns, *written)
    return gradients


_SCORE = (
    "Tensor q_indptr, Tensor q_indices, Tensor q_values, "
    "Tensor d_indptr, Tensor d_indices, Tensor d_values, Tensor? pairs, int columns"
)
forward = define(f"sparse_score({_SCORE}) -> Tensor", _forward, _empty, cuda=True)
backward = define(
    f"sparse_score_backward(Tensor d_out, {_SCORE}, bool[] wanted) -> (Tensor, Tensor)",
    _backward,
    _empty_gradients,
    cuda=True,
)


@quick_apply
class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        columns, q_indptr, q_indices, q_values, d_indptr, d_indices, d_values, pairs
    ):  # fmt: skip
        return forward(
            q_indptr, q_indices, q_values, d_indptr, d_indices, d_values, pairs, columns
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.columns, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, d_out):
        tensors = ctx.saved_tensors
        q_values, d_values = tensors[2], tensors[5]
        wanted = ctx.needs_input_grad[3], ctx.needs_input_grad[6]
        found = backward(d_out, *tensors, ctx.columns, wanted)
        grads = [
            grad.to(values.dtype)
            for grad, values, want in zip(found, (q_values, d_values), wanted, strict=True)
            if want
        ]
        d_queries, d_docs = spread("sparse.score", grads, wanted, (d_out, q_values, d_values))
        return None, None, None, d_queries, None, None, d_docs, None


def score(q_indptr, q_indices, q_values, d_indptr, d_indices, d_values, pairs, columns):
    """(nq, n), or (p,) for pairs (p, 2)."""
    given = (q_indptr, q_indices, q_values, d_indptr, d_indices, d_values, pairs)
    if needs_grad(q_values, d_values):
        return _Score.apply(columns, *given)
    return forward(*given, columns)
