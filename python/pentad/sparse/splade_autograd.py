# SPDX-License-Identifier: Apache-2.0
"""The operators of the SPLADE head, their kernels, shape functions and gradients."""

import torch

from pentad import _C
from pentad._arrays import on_device, runs_cuda
from pentad._ops import autocast_device, define, needs_grad, quick_apply, spread

OP = "sparse.splade_head"


def autocast(*tensors):
    """As a linear layer has them under ``torch.autocast``."""
    device = autocast_device(tensors[0])
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype == torch.float32 else t for t in tensors)


def _empty(hidden, weight, bias, mask, pooling, activation, saved):
    """out, and for the gradient of the maximum the largest logits and their tokens, else empty."""
    shape = (hidden.shape[0], weight.shape[0])
    kept = shape if saved else (0, 0)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(shape),
        hidden.new_empty(kept, dtype=wide),
        hidden.new_empty(kept, dtype=torch.int32),
    )


def _forward(hidden, weight, bias, mask, pooling, activation, saved):
    given = (hidden, weight, bias, mask, pooling, activation)
    out, top, place = _empty(*given, saved)
    device = on_device(hidden, _C.sparse_splade_scratch, *hidden.shape[:2])
    _C.sparse_splade_head(*given, out, *((top, place) if saved else (None, None)), *device)
    return out, top, place


def _empty_gradients(d_out, hidden, weight, bias, mask, top, place, pooling, activation, wanted):
    """Of hidden, weight and bias; empty where not wanted."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape if want else (0,))
        for shape, want in zip(shapes, wanted, strict=True)
    )


def _backward(d_out, hidden, weight, bias, mask, top, place, pooling, activation, wanted):
    given = (d_out, hidden, weight, bias, mask, top, place, pooling, activation)
    gradients = _empty_gradients(*given, wanted)
    if pooling == "sum":
        given = (*given[:5], None, None, *given[7:])
    written = (g if want else None for g, want in zip(gradients, wanted, strict=True))
    sizes = (*hidden.shape, weight.shape[0], hidden.element_size(), pooling == "sum")
    device = on_device(hidden, _C.sparse_splade_backward_scratch, *sizes)
    _C.sparse_splade_head_backward(*given, *written, *device)
    return gradients


def _keep(x, k):
    if runs_cuda(x) and x.dtype != torch.float64:  # none is below 0, so these are the largest
        out = x.new_empty(x.shape)
        _C.sparse_topk_sparsify(x, min(k, x.shape[1]), False, out, *on_device(x))
        return out
    out = x.clone(memory_format=torch.contiguous_format)
    _C.sparse_splade_keep(out, k)
    return out


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask"
forward = define(
    f"sparse_splade_head({_HEAD}, str pooling, str activation, bool saved) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _empty,
    cuda=True,
)
backward = define(
    f"sparse_splade_head_backward(Tensor d_out, {_HEAD}, Tensor top, Tensor place, str pooling, "
    "str activation, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_gradients,
    cuda=True,
)
keep = define(
    "sparse_splade_keep(Tensor x, SymInt k) -> Tensor",
    _keep,
    lambda x, k: x.new_empty(x.shape),
    cuda=True,
)


@quick_apply
class _Head(torch.autograd.Function):
    @staticmethod
    def forward(hidden, weight, bias, mask, pooling, activation):
        return forward(hidden, weight, bias, mask, pooling, activation, pooling == "max")

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.pooling, ctx.activation = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx, d_out, *_):
        if d_out is None:
            return (None,) * 6
        wanted = ctx.needs_input_grad[:3]
        given = ctx.saved_tensors
        grads = backward(d_out, *given, ctx.pooling, ctx.activation, wanted)
        grads = [g for g, want in zip(grads, wanted, strict=True) if want]
        inputs = [t for t in (d_out, *given[:3]) if t is not None]
        return *spread(OP, grads, wanted, inputs), None, None, None


@quick_apply
class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(x, k):
        return keep(x, k)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return torch.where(kept != 0, grad, 0), None


class _Compressed(torch.autograd.Function):
    """indptr, indices and values of the rows of x, without what is zero."""

    @staticmethod
    def forward(ctx, x):
        indptr = x.new_zeros(x.shape[0] + 1, dtype=torch.int64)
        if x.is_cuda:
            rows, indices = x.nonzero(as_tuple=True)
            indptr[1:] = (x != 0).sum(1).cumsum(0)
            values = x[rows, indices]
        else:
            _C.sparse_splade_count(x, indptr)
            count = int(indptr[-1])
            indices, values = x.new_empty(count, dtype=torch.int64), x.new_empty(count)
            _C.sparse_splade_compress(x, indptr, indices, values)
        ctx.mark_non_differentiable(indptr, indices)
        ctx.shape = x.shape
        ctx.save_for_backward(indptr, indices)
        return indptr, indices, values

    @staticmethod
    def backward(ctx, _indptr, _indices, d_values):
        indptr, indices = ctx.saved_tensors
        rows = torch.repeat_interleave(indptr.diff(), output_size=len(indices))
        grad = d_values.new_zeros(ctx.shape)
        return grad.index_put((rows, indices), d_values)


def splade_head(hidden, weight, bias, mask, pooling, activation, sparse_output, top_k):
    """The head of checked tensors."""
    given = (hidden, weight, bias, mask, pooling, activation)
    if needs_grad(*(t for t in given[:3] if t is not None)):
        out = _Head.apply(*given)[0]
    else:
        out = forward(*given, False)[0]
    if top_k is not None:
        out = _Keep.apply(out, top_k) if needs_grad(out) else keep(out, top_k)
    if not sparse_output:
        return out
    indptr, indices, values = _Compressed.apply(out)
    return torch.sparse_csr_tensor(indptr, indices, values, out.shape, check_invariants=False)
