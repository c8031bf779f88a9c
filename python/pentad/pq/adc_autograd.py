# SPDX-License-Identifier: Apache-2.0
"""The operators of asymmetric distance computation, their shape functions and gradients."""

import torch

from pentad import _C
from pentad._arrays import on_device
from pentad._ops import define, needs_grad, quick_apply, spread

# --- Tables of scores -----------------------------------------------------------------------------


def _empty_tables(queries, codebooks, metric):
    return queries.new_empty((queries.shape[0], *codebooks.shape[:2]))


def _tables(queries, codebooks, metric):
    tables = _empty_tables(queries, codebooks, metric)
    _C.pq_score_tables(queries, codebooks, metric, tables, *on_device(queries))
    return tables


tables_op = define(
    "pq_score_tables(Tensor queries, Tensor codebooks, str metric) -> Tensor",
    _tables,
    _empty_tables,
    cuda=True,
)


@quick_apply
class _ScoreTables(torch.autograd.Function):
    """The gradient is a matrix product for each subspace, in double."""

    @staticmethod
    def forward(metric, queries, codebooks):
        return tables_op(queries, codebooks, metric)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.metric, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        queries, codebooks = ctx.saved_tensors
        want_queries, want_codebooks = ctx.needs_input_grad[1:]
        count, _, width = codebooks.shape
        with torch.no_grad():
            g = grad.double().transpose(0, 1)  # (M, nq, K)
            c = codebooks.double()
            q = queries.double().reshape(len(queries), count, width).transpose(0, 1)
            grads = []
            if want_queries:
                dq = g @ c
                if ctx.metric == "l2":
                    dq = 2 * (q * g.sum(2, keepdim=True) - dq)
                grads.append(dq.transpose(0, 1).reshape(queries.shape).to(queries.dtype))
            if want_codebooks:
                dc = g.mT @ q
                if ctx.metric == "l2":
                    dc = 2 * (c * g.sum(1).unsqueeze(2) - dc)
                grads.append(dc.to(codebooks.dtype))
        return None, *spread("pq.adc", grads, ctx.needs_input_grad[1:], (grad, queries, codebooks))


def score_tables(queries, codebooks, metric):
    """(nq, M, K) of queries (nq, M * width): "l2" or "ip" with each row of codebooks."""
    if needs_grad(queries, codebooks):
        return _ScoreTables.apply(metric, queries, codebooks)
    return tables_op(queries, codebooks, metric)


# --- Their sums -----------------------------------------------------------------------------------


def _empty_sums(tables, codes):
    return tables.new_empty((tables.shape[0], codes.shape[0]))


def _sums(tables, codes):
    out = _empty_sums(tables, codes)
    _C.pq_table_sum(tables.contiguous(), codes, out, *on_device(tables))
    return out


def _empty_sums_gradient(d_out, codes, levels):
    return d_out.new_empty((d_out.shape[0], codes.shape[1], levels))


def _sums_backward(d_out, codes, levels):
    d_tables = _empty_sums_gradient(d_out, codes, levels)
    sizes = (*codes.shape, d_out.shape[0], levels)
    device = on_device(d_out, _C.pq_table_sum_backward_scratch, *sizes)
    _C.pq_table_sum_backward(d_out, codes, d_tables, *device)
    return d_tables


sums_op = define(
    "pq_table_sum(Tensor tables, Tensor codes) -> Tensor", _sums, _empty_sums, cuda=True
)
sums_backward = define(
    "pq_table_sum_backward(Tensor d_out, Tensor codes, SymInt levels) -> Tensor",
    _sums_backward,
    _empty_sums_gradient,
    cuda=True,
)


@quick_apply
class _TableSum(torch.autograd.Function):
    @staticmethod
    def forward(tables, codes):
        return sums_op(tables, codes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tables, codes = inputs
        ctx.save_for_backward(codes)
        ctx.levels = tables.shape[2]

    @staticmethod
    def backward(ctx, d_out):
        (codes,) = ctx.saved_tensors
        grads = [sums_backward(d_out, codes, ctx.levels)]
        return *spread("pq.adc", grads, (True,), (d_out,)), None


def table_sum(tables, codes):
    """(nq, n) sums over m of ``tables[q, m, codes[i, m]]``, float32 or float64."""
    return _TableSum.apply(tables, codes) if needs_grad(tables) else sums_op(tables, codes)
