# SPDX-License-Identifier: Apache-2.0
"""The torch side of `pentad.hamming`: operators, their shape functions and their gradients."""

import torch

from pentad._ops import define, needs_grad
from pentad.hamming import _kernels


def _empty(like, shape, dtype):
    return torch.empty(shape, dtype=dtype, device=like.device)


def _value_dtype(metric):
    return getattr(torch, _kernels.value_dtype(metric))


def _fake_range(queries, codes, radius, metric, mask):
    found = torch.library.get_ctx().new_dynamic_size()
    return (
        _empty(queries, (queries.shape[0] + 1,), torch.int64),
        _empty(queries, (found,), _value_dtype(metric)),
        _empty(queries, (found,), torch.int64),
    )


pack = define(
    "hamming_pack(Tensor x, float threshold) -> Tensor",
    _kernels.pack,
    lambda x, threshold: _empty(x, (*x.shape[:-1], (x.shape[-1] + 7) // 8), torch.uint8),
    cuda=True,
)
unpack = define(
    "hamming_unpack(Tensor codes, SymInt dim, ScalarType dtype) -> Tensor",
    _kernels.unpack,
    lambda codes, dim, dtype: _empty(codes, (*codes.shape[:-1], dim), dtype),
    cuda=True,
)
permute = define(
    "hamming_permute(Tensor codes, SymInt dim, SymInt shift) -> Tensor",
    _kernels.permute,
    lambda codes, dim, shift: _empty(codes, codes.shape, torch.uint8),
    cuda=True,
)
distance = define(
    "hamming_distance(Tensor a, Tensor b, str metric) -> Tensor",
    _kernels.distance,
    lambda a, b, metric: _empty(a, (a.shape[0], b.shape[0]), _value_dtype(metric)),
    cuda=True,
)
topk = define(
    "hamming_topk(Tensor queries, Tensor codes, SymInt k, str metric, Tensor? mask)"
    " -> (Tensor, Tensor)",
    _kernels.topk,
    lambda queries, codes, k, metric, mask: (
        _empty(queries, (queries.shape[0], k), _value_dtype(metric)),
        _empty(queries, (queries.shape[0], k), torch.int64),
    ),
    cuda=True,
)
range_search = define(
    "hamming_range_search(Tensor queries, Tensor codes, float radius, str metric, Tensor? mask)"
    " -> (Tensor, Tensor, Tensor)",
    _kernels.range_search,
    _fake_range,
    cuda=True,
)
score_op = define(
    "hamming_score(Tensor x, Tensor codes) -> Tensor",
    _kernels.score,
    lambda x, codes: _empty(x, (x.shape[0], codes.shape[0]), torch.float32),
    cuda=True,
)
topk_score = define(
    "hamming_topk_score(Tensor x, Tensor codes, SymInt k, Tensor? mask) -> (Tensor, Tensor)",
    _kernels.topk_score,
    lambda x, codes, k, mask: (
        _empty(x, (x.shape[0], k), torch.float32),
        _empty(x, (x.shape[0], k), torch.int64),
    ),
    cuda=True,
)
weighted_sum_op = define(
    "hamming_weighted_sum(Tensor weights, Tensor codes, SymInt dim) -> Tensor",
    _kernels.weighted_sum,
    lambda weights, codes, dim: _empty(
        weights, (weights.shape[0], weights.shape[1], dim), torch.float32
    ),
    cuda=True,
)


class _Score(torch.autograd.Function):
    """score is linear in x with the matrix of signs, so its gradient is weighted_sum."""

    @staticmethod
    def forward(x, codes):
        return score_op(x, codes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, codes = inputs
        ctx.save_for_backward(codes)
        ctx.dim = x.shape[1]

    @staticmethod
    def backward(ctx, grad):
        (codes,) = ctx.saved_tensors
        return weighted_sum(grad.unsqueeze(0), codes.unsqueeze(0), ctx.dim).squeeze(0), None


class _WeightedSum(torch.autograd.Function):
    """And the other way round, one batch entry at a time."""

    @staticmethod
    def forward(weights, codes, dim):
        return weighted_sum_op(weights, codes, dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        (codes,) = ctx.saved_tensors
        scores = [score(grad[i], codes[i]) for i in range(codes.shape[0])]
        return torch.stack(scores) if scores else grad.new_zeros((0, *codes.shape[:2])), None, None


def score(x, codes):
    return _Score.apply(x, codes) if needs_grad(x) else score_op(x, codes)


def weighted_sum(weights, codes, dim):
    if needs_grad(weights):
        return _WeightedSum.apply(weights, codes, dim)
    return weighted_sum_op(weights, codes, dim)


class _Binarize(torch.autograd.Function):
    """Forward the sign or a sample; backward the derivative of a smooth stand-in."""

    @staticmethod
    def forward(x, one, estimator, temperature):
        return _signs(x, one)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, ctx.estimator, ctx.temperature = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        t = ctx.temperature
        if ctx.estimator == "ste":  # the hard tanh's slope
            slope = (x.abs() <= t).to(x.dtype)
        elif ctx.estimator == "tanh":
            slope = (1 - torch.tanh(x / t) ** 2) / t
        else:  # of the sample's mean, 2 sigmoid(x / t) - 1
            p = torch.sigmoid(x / t)
            slope = 2 * p * (1 - p) / t
        return grad * slope, None, None, None


def _signs(x, one):
    return torch.where(x.isnan(), x, torch.where(one, 1.0, -1.0).to(x.dtype))


def binarize(x, estimator, temperature, generator):
    with torch.no_grad():
        if estimator == "bernoulli":
            # Not torch.rand, whose form with a generator takes no symbolic shapes.
            draw = torch.empty(x.shape, device=x.device).uniform_(generator=generator)
            one = draw < torch.sigmoid(x.float() / temperature)
        else:
            one = x > 0
    if needs_grad(x):
        return _Binarize.apply(x, one, estimator, temperature)
    return _signs(x, one)
