# SPDX-License-Identifier: Apache-2.0
"""The operators of product-key memory and their gradients."""

import torch

from pentad import _C
from pentad._arrays import on_device, runs_cuda
from pentad._ops import define, needs_grad, quick_apply, spread
from pentad.pq import product_keys as kernels

_BACKWARD = (
    "Tensor? d_out, Tensor? d_weights, Tensor q, Tensor subkeys, Tensor values, Tensor indices, "
    "Tensor weights, float scale, bool softmax, bool per_head"
)


def _fake(q, subkeys, values, k, scale, softmax, per_head):
    def make(shape, dtype):
        return q.new_empty(shape, dtype=getattr(torch, dtype))

    return kernels.outputs(make, q, values, k, per_head)


def _empty(tensor, want=True):
    """A contiguous one, of no elements where it is not wanted."""
    return torch.empty(tensor.shape if want else (0,), dtype=tensor.dtype, device=tensor.device)


def _backward(
    d_out, d_weights, q, subkeys, values, indices, weights, scale, softmax, per_head, wanted
):
    grads = [_empty(x, want) for x, want in zip((q, subkeys, values), wanted, strict=True)]
    written = (g if want else None for g, want in zip(grads, wanted, strict=True))
    settings = scale, softmax, per_head
    _run(d_out, d_weights, q, subkeys, values, indices, weights, settings, written)
    return tuple(grads)


def _backward_sparse(
    d_out, d_weights, q, subkeys, values, indices, weights, scale, softmax, per_head, wanted
):
    places = None
    if runs_cuda(q) and _on_kernels(q, indices):
        touched, places = torch.unique(indices, return_inverse=True)
    else:
        touched = torch.empty(_C.pq_count_distinct(indices, values.shape[0]), dtype=torch.int64)
    rows = values.new_empty((touched.shape[0], values.shape[1]))
    grads = [_empty(x, want) for x, want in zip((q, subkeys), wanted, strict=True)]
    written = (*(g if want else None for g, want in zip(grads, wanted, strict=True)), rows)
    settings = scale, softmax, per_head
    _run(d_out, d_weights, q, subkeys, values, indices, weights, settings, written, touched, places)
    return *grads, rows, touched


def _on_kernels(q, indices):
    """Whether the CUDA kernels take these."""
    return q.dtype != torch.float64 and indices.shape[2] <= kernels.MOST_ON_DEVICE


def _run(
    d_out, d_weights, q, subkeys, values, indices, weights, settings, grads, touched=None,
    places=None,
):  # fmt: skip
    if d_out is not None:
        groups = indices.shape[0] * (indices.shape[1] if settings[2] else 1)
        d_out = d_out.reshape(-1, values.shape[1]) if d_out.numel() else d_out.view(
            groups, values.shape[1]
        )  # fmt: skip
    if d_weights is not None:
        d_weights = d_weights.contiguous()
    device = ()
    if _on_kernels(q, indices):
        value_rows = values.shape[0] if touched is None else touched.shape[0]
        sizes = (*q.shape[:2], *subkeys.shape[2:], indices.shape[2], values.shape[1], value_rows)
        device = on_device(q, _C.pq_product_keys_backward_scratch, *sizes)
    _C.pq_product_keys_backward(
        q, subkeys, values, *settings, indices.contiguous(), weights.contiguous(),
        d_out, d_weights, *grads, None if device else touched, places, *device,
    )  # fmt: skip


def _fake_backward(
    d_out, d_weights, q, subkeys, values, indices, weights, scale, softmax, per_head, wanted
):
    return tuple(_empty(x, want) for x, want in zip((q, subkeys, values), wanted, strict=True))


def _fake_backward_sparse(
    d_out, d_weights, q, subkeys, values, indices, weights, scale, softmax, per_head, wanted
):
    touched = torch.library.get_ctx().new_dynamic_size()
    return (
        *(_empty(x, want) for x, want in zip((q, subkeys), wanted, strict=True)),
        values.new_empty((touched, values.shape[1])),
        indices.new_empty((touched,)),
    )


lookup_op = define(
    "pq_product_keys(Tensor q, Tensor subkeys, Tensor values, SymInt k, float scale, bool softmax,"
    " bool per_head) -> (Tensor, Tensor, Tensor)",
    kernels.lookup,
    _fake,
    cuda=True,
)
backward_op = define(
    f"pq_product_keys_backward({_BACKWARD}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    cuda=True,
)
backward_sparse_op = define(
    f"pq_product_keys_backward_sparse({_BACKWARD}, bool[2] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_sparse,
    _fake_backward_sparse,
    cuda=True,
)


@quick_apply
class _Lookup(torch.autograd.Function):
    """Keeps the inputs, the selected indices and their weights."""

    @staticmethod
    def forward(q, subkeys, values, sparse, k, settings):
        return lookup_op(q, subkeys, values, k, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, subkeys, values, ctx.sparse, _, ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, subkeys, values, output[1], output[2])

    @staticmethod
    def backward(ctx, d_out, _, d_weights):
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        arguments = (d_out, d_weights, *saved, *ctx.settings)
        if ctx.sparse and wanted[2]:
            *grads, rows, touched = backward_sparse_op(*arguments, wanted[:2])
            grads.append(
                torch.sparse_coo_tensor(
                    touched[None], rows, saved[2].shape, is_coalesced=True, check_invariants=False
                )
            )
        else:
            grads = backward_op(*arguments, wanted)
        grads = [grad for grad, want in zip(grads, wanted, strict=True) if want]
        inputs = (d_out, d_weights, *saved[:3])
        return *spread(kernels.OP, grads, wanted, inputs), None, None, None


def lookup(q, subkeys, values, k, scale, softmax, per_head, sparse):
    """(out, indices, weights) of tensors, q (rows, heads, 2 * half)."""
    settings = scale, softmax, per_head
    if needs_grad(q, subkeys, values):
        return _Lookup.apply(q, subkeys, values, sparse, k, settings)
    return lookup_op(q, subkeys, values, k, *settings)
