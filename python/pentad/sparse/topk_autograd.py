# SPDX-License-Identifier: Apache-2.0
"""The operators of row-wise top-k selection, their shape functions and gradients."""

import torch

from pentad import _C
from pentad._arrays import on_device
from pentad._ops import define, needs_grad
from pentad.sparse.topk import SparseCodes


def _empty_indices(x, k, absolute):
    return x.new_empty((x.shape[0], k), dtype=torch.int64)


def _indices(x, k, absolute):
    out = _empty_indices(x, k, absolute)
    _C.sparse_topk(x, k, absolute, out, None, *on_device(x))
    return out


def _empty(x, k, absolute):
    return x.new_empty(x.shape)


def _sparsify(x, k, absolute):
    out = _empty(x, k, absolute)
    _C.sparse_topk_sparsify(x, k, absolute, out, *on_device(x))
    return out


indices_op = define(
    "sparse_topk(Tensor x, SymInt k, bool absolute) -> Tensor", _indices, _empty_indices, cuda=True
)
sparsify_op = define(
    "sparse_topk_sparsify(Tensor x, SymInt k, bool absolute) -> Tensor",
    _sparsify,
    _empty,
    cuda=True,
)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x, k, absolute):
        return sparsify_op(x, k, absolute)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def sparsify(x, k, absolute, straight_through):
    if not needs_grad(x):
        return sparsify_op(x, k, absolute)
    if straight_through:
        return _StraightThrough.apply(x, k, absolute)
    indices, values = pairs(x, k, absolute)
    return torch.zeros_like(x).scatter(1, indices, values)


def pairs(x, k, absolute=False):
    """(n, k) columns, int64 and rising, and the numbers there."""
    indices = indices_op(x.detach(), k, absolute)
    return indices, x.gather(1, indices)


def of_pairs(indices, values, columns):
    """Sparse rows of (n, k) columns and numbers."""
    n, k = indices.shape
    indptr = torch.arange(n + 1, device=indices.device) * k
    return SparseCodes(indptr, indices.int().reshape(-1), values.reshape(-1), columns)


def dense(n, indptr, indices, values, columns):
    row = torch.repeat_interleave(indptr.diff(), output_size=len(values))
    out = values.new_zeros(n * columns)
    return out.index_add(0, row * columns + indices, values).view(n, columns)
