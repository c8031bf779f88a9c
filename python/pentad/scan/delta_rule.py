# SPDX-License-Identifier: Apache-2.0
"""The delta rule: a linear attention that overwrites what its keys are associated with."""

from pentad.scan._checks import (
    accumulator,
    autocasts,
    check_cu_seqlens,
    check_number,
    parameter,
    promoted,
)
from pentad.scan._matrix_checks import check_inputs, check_sizes, factors
from pentad.scan.matrix_autograd import matrix_scan


def delta_rule(
    q,
    k,
    v,
    beta,
    *,
    decay=None,
    log_space=False,
    scale=1.0,
    initial_state=None,
    reverse=False,
    cu_seqlens=None,
    return_final_state=False,
):
    r"""The delta rule, with or without decay, over whole sequences, with gradients.

    Per head, with a state S of N x P, ``S_t = decay_t S_{t-1} + beta_t k_t (v_t - (decay_t
    S_{t-1})^T k_t)^T`` and ``out_t = scale S_t^T q_t`` (Yang et al. 2024, "Parallelizing Linear
    Transformers with the Delta Rule over Sequence Length", arXiv 2406.06484, section 2.2; with
    decays Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks", arXiv 2412.06464, equation 10).
    Keys are taken as they are: those papers normalise them to length 1. All is computed in float32
    (float64 for float64). The bits of the result do not depend on the number of threads.
    Differentiable once in every floating argument, through both results.

    Parameters
    ----------
    q, k : (B, L, G, N)
        In v's dtype, of any strides, as are all others. Head h reads group ``h // (H // G)``.
    v : (B, L, H, P) float32, bfloat16, float16 or float64
        P and N are at most 1024. Under ``torch.autocast`` `q`, `k` and `v` are taken in the widest
        dtype among them.
    beta : (B, L, H) float
        How much of the difference is written. Taken in float32; float64 only with float64 `v`, here
        and below.
    decay : (H,), (B, L, H), (H, N) or (B, L, H, N) float, optional
        Factors of the state per head or per key, constant or for each step: any numbers, 0 and
        negative ones included, of which the products of 64 steps are finite.
    log_space : bool
        `decay` is the logarithm of the factors.
    scale : float
    initial_state : (B, H, N, P) float, optional
        By default zeros. With `cu_seqlens` (S, H, N, P).
    reverse : bool
        Run from the last step to the first; the final state is then that after the first step.
    cu_seqlens : (S + 1,) int32 or int64, optional
        Sequence s is the steps ``[cu_seqlens[s], cu_seqlens[s + 1])`` of the only batch row.
    return_final_state : bool

    Returns
    -------
    out : (B, L, H, P)
        In v's dtype.
    final_state : (B, H, N, P) or (S, H, N, P), float32 (float64 for float64)
        With `return_final_state`.

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes that do not fit together; cu_seqlens that do not rise from 0 to L.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative, or one of forward mode.

    Examples
    --------
    >>> import torch
    >>> k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).view(1, 3, 1, 2)
    >>> v, beta = torch.tensor([5.0, 7.0, 6.0]).view(1, 3, 1, 1), torch.ones(1, 3, 1)
    >>> out, state = pentad.scan.delta_rule(k, k, v, beta, return_final_state=True)
    >>> state[0, 0]  # 6 has taken the place of 5
    tensor([[6.],
            [7.]])
    """
    op = "delta_rule"
    if autocasts(v):
        q, k, v = promoted(q, k, v)
    check_inputs(
        op, q, k, v, beta=beta, decay=decay, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    check_sizes(op, k, v)
    wide, sequences = accumulator(v.dtype), v.shape[0]
    if cu_seqlens is not None:
        sequences = check_cu_seqlens(op, "v", sequences, cu_seqlens)
    if initial_state is not None:
        shape = (sequences, v.shape[2], k.shape[3], v.shape[3])
        initial_state = parameter(op, "initial_state", initial_state, wide, shape, whose="v")
    out, last = matrix_scan(
        op, q, k, v, a=factors(op, decay, log_space, v, k.shape[3]),
        w=parameter(op, "beta", beta, wide, tuple(v.shape[:3]), whose="v"), initial=initial_state,
        cu_seqlens=cu_seqlens, delta=True, reverse=bool(reverse),
        scale=check_number(op, "scale", scale), want_last=bool(return_final_state),
    )  # fmt: skip
    return (out, last) if return_final_state else out
