# SPDX-License-Identifier: Apache-2.0
"""One-token steps on caches of matrices, as those of `pentad.scan.update`."""

import torch

from pentad.scan import matrix_autograd
from pentad.scan._checks import (
    accumulator,
    autocasts,
    check_number,
    parameter,
    promoted,
)
from pentad.scan._matrix_checks import check_inputs, check_sizes, check_step, factors
from pentad.scan.linear_attention import feature_map_of, normalized, prepared
from pentad.scan.update import _by_gradient, _gathered, _scatter, _without_padding


def linear_attention_update(
    state,
    q,
    k,
    v,
    *,
    decay=None,
    log_space=False,
    normalize=False,
    feature_map=None,
    scale=1.0,
    state_batch_indices=None,
):
    r"""One token of `linear_attention` on a cache of states, in place.

    ``state <- decay state + phi(k) v^T``, ``out = scale state^T phi(q)`` (Katharopoulos et al.
    2020, "Transformers are RNNs", arXiv 2006.16236, equations 16 to 20). The output is taken from
    the state before that is rounded. Where a gradient is needed, it is differentiable once in every
    floating argument, the state before the call included.

    Parameters
    ----------
    state : (S, H, N, P) float32, bfloat16, float16 or float64
        Changed in place. S is B unless `state_batch_indices` are given; (S, H, N, P + 1) with
        `normalize`.
    q, k : (B, G, N)
        In v's dtype. Head h reads group ``h // (H // G)``.
    v : (B, H, P) float32, bfloat16, float16 or float64
        Under ``torch.autocast`` `q`, `k` and `v` are taken in the widest dtype among them.
    decay : (H,), (B, H), (H, N) or (B, H, N) float, optional
        Factors of the state. Two dimensions that could be (B, H) as well as (H, N) are refused.
    log_space : bool
        As in `linear_attention`, and so are the following.
    normalize : bool
    feature_map : "elu", "relu", "cosine", "taylor" or callable, optional
    scale : float
    state_batch_indices : (B,) int32 or int64, optional
        The row of `state` that belongs to each of the batch, no row twice; a negative one is
        padding: its output is 0 and no state changes.

    Returns
    -------
    out : (B, H, P)
        In v's dtype.

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes that do not fit together; rows out of range, or twice the same.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative, or one of forward mode.

    Examples
    --------
    >>> import torch
    >>> state, ones = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1)
    >>> for n in (4.0, 2.0, 6.0):
    ...     out = pentad.scan.linear_attention_update(state, ones, ones, torch.tensor([[[n]]]))
    >>> out
    tensor([[[12.]]])
    """
    op = "linear_attention_update"
    if autocasts(v):
        q, k, v = promoted(q, k, v)
    phi = feature_map_of(op, feature_map)
    if phi is None and not normalize:
        return _step(op, state, q, k, v, decay, log_space, None, scale, state_batch_indices)
    check_inputs(op, q, k, v, steps=False)
    dtype = v.dtype
    q, k, v = prepared(op, q, k, v, phi, normalize)
    inner = 1.0 if normalize else scale
    out = _step(op, state, q, k, v, decay, log_space, None, inner, state_batch_indices)
    if normalize:
        out = normalized(out, check_number(op, "scale", scale))
    return out if out.dtype == dtype else out.to(dtype)


def delta_rule_update(
    state,
    q,
    k,
    v,
    beta,
    *,
    decay=None,
    log_space=False,
    scale=1.0,
    state_batch_indices=None,
):
    r"""One token of `delta_rule` on a cache of states, in place.

    ``state <- decay state``, ``state <- state + beta k (v - state^T k)^T``, ``out = scale state^T
    q`` (Yang et al. 2024, arXiv 2406.06484, section 2.2; with decays Yang, Kautz & Hatamizadeh
    2024, "Gated Delta Networks", arXiv 2412.06464, equation 10). The output is taken from the state
    before that is rounded. Where a gradient is needed, it is differentiable once in every floating
    argument, the state before the call included.

    Parameters
    ----------
    state : (S, H, N, P) float32, bfloat16, float16 or float64
        Changed in place. S is B unless `state_batch_indices` are given.
    q, k : (B, G, N)
        In v's dtype. Head h reads group ``h // (H // G)``.
    v : (B, H, P) float32, bfloat16, float16 or float64
        Under ``torch.autocast`` `q`, `k` and `v` are taken in the widest dtype among them.
    beta : (B, H) float
    decay : (H,), (B, H), (H, N) or (B, H, N) float, optional
        Factors of the state. Two dimensions that could be (B, H) as well as (H, N) are refused.
    log_space : bool
        `decay` is the logarithm of the factors.
    scale : float
    state_batch_indices : (B,) int32 or int64, optional
        The row of `state` that belongs to each of the batch, no row twice; a negative one is
        padding: its output is 0 and no state changes.

    Returns
    -------
    out : (B, H, P)
        In v's dtype.

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes that do not fit together; rows out of range, or twice the same.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative, or one of forward mode.

    Examples
    --------
    >>> import torch
    >>> state, ones = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1)
    >>> for n in (4.0, 2.0, 6.0):  # each takes the place of the one before
    ...     out = pentad.scan.delta_rule_update(state, ones, ones, n * ones, torch.ones(1, 1))
    >>> out
    tensor([[[6.]]])
    """
    op = "delta_rule_update"
    if autocasts(v):
        q, k, v = promoted(q, k, v)
    if not isinstance(beta, torch.Tensor):
        raise TypeError(f"[{op}] beta is {type(beta).__name__}, expected a torch tensor")
    return _step(op, state, q, k, v, decay, log_space, beta, scale, state_batch_indices)


def _step(op, state, q, k, v, decay, log_space, beta, scale, rows):
    """The kernel, which checks everything but devices; what it refuses is looked at again."""
    scale = check_number(op, "scale", scale)
    try:
        wide = accumulator(v.dtype)
        if decay is not None:
            decay = factors(op, decay, log_space, v, k.shape[-1])
        if beta is not None and beta.dtype != wide:
            beta = parameter(op, "beta", beta, wide, beta.shape, whose="v")
        if _by_gradient((state, q, k, v, decay, beta)):
            check_step(op, state, q, k, v, decay, beta, rows)
            check_sizes(op, k, v)
            return _scan_step(op, state, q, k, v, decay, beta, scale, rows)
        return matrix_autograd.update(
            op, state, q, k, v, decay, beta, beta is not None, scale, rows
        )
    except Exception:
        check_step(op, state, q, k, v, decay, beta, rows)
        check_sizes(op, k, v)
        raise


def _scan_step(op, state, q, k, v, decay, beta, scale, rows):
    """The recurrence over the one step."""
    # A copy, as the state itself changes before the backward pass.
    initial, places = _gathered(op, "state_batch_indices", state, rows)
    initial = initial.to(accumulator(v.dtype), copy=rows is None)
    if decay is not None and decay.ndim == 1:
        decay = decay.expand(v.shape[:2])
    q, k, v, decay, beta = (None if t is None else t.unsqueeze(1) for t in (q, k, v, decay, beta))
    out, last = matrix_autograd.matrix_scan(
        op, q, k, v, a=decay, w=beta, initial=initial, delta=beta is not None, scale=scale,
        want_last=True,
    )  # fmt: skip
    _scatter(state, last, places)
    return _without_padding(out.squeeze(1), places, state.shape[0])
