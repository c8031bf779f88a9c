# SPDX-License-Identifier: Apache-2.0
"""Scans, recurrences and causal convolutions of torch tensors: checks, and canonical forms.

The mathematics stand in ``csrc/scan/scan.h`` and, in plain PyTorch, in `pentad.scan.reference`.
"""

import operator

import torch

from pentad.scan import autograd
from pentad.scan._checks import (
    COMPLEX,
    FLOATS,
    accumulator,
    autocasts,
    check_cu_seqlens,
    check_cuda_devices,
    check_dtype,
    check_integers,
    check_rank,
    check_shape,
    check_tensor,
    complex_of,
    name_of,
    parameter,
    promoted,
    real_of,
    weights,
)

# --- Selective scan -------------------------------------------------------------------------------


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    initial_state=None,
    cu_seqlens=None,
    reverse=False,
    return_last_state=False,
):
    r"""The selective state space model of Mamba over whole sequences, with gradients.

    Per channel d and state n, ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`` and ``out_t = sum_n C_t
    h_t + D u_t``, times ``silu(z_t)`` with `z`, where ``dt_t = delta_t + delta_bias``, through
    softplus with `delta_softplus` (Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with
    Selective State Spaces", arXiv 2312.00752, section 3 and algorithm 2, with the discretisation of
    its reference code, which takes ``dt B`` for the input). Complex A: ``2 Re(C_t h_t)`` in place
    of ``C_t h_t``. Everything is computed in float32 (float64 for float64); the backward pass keeps
    every 32nd state and recomputes the others. The bits of the result do not depend on the number
    of threads. Differentiable once in every floating argument, through both results.

    Parameters
    ----------
    u : (B, D, L) float32, bfloat16, float16 or float64
        Of any strides, as are all others. Under ``torch.autocast`` `u`, `delta`, `z`, `B` and `C`
        are taken in the widest dtype among them.
    delta : (B, D, L)
        Of u's dtype.
    A : (D, N) float32 or complex64
        Other real floats are converted; float64 and complex128 only with float64 `u`.
    B : (D, N), (B, N, L) or (B, G, N, L)
        Constant in A's dtype (or real), or varying in u's dtype: channel d reads group
        ``d // (D // G)``. With complex A the varying one is complex, or real and interleaved:
        (B, N, 2 L) or (B, G, N, 2 L).
    C : (D, N), (B, N, L) or (B, G, N, L)
        As `B`, of as many groups.
    D : (D,) float, optional
    z : (B, D, L), optional
        Of u's dtype.
    delta_bias : (D,) float, optional
    delta_softplus : bool
        ``log(1 + exp(x))``, or x itself above 20.
    initial_state : (B, D, N) float32 or complex64, optional
        By default zeros. With `cu_seqlens` (S, D, N).
    cu_seqlens : (S + 1,) int32 or int64, optional
        Sequence s is the steps ``[cu_seqlens[s], cu_seqlens[s + 1])`` of the only batch row.
    reverse : bool
        Run from the last step to the first; the last state is then that after the first step.
    return_last_state : bool

    Returns
    -------
    out : (B, D, L)
        In u's dtype; the channels are next to each other in memory if those of `u` are.
    last_state : (B, D, N) or (S, D, N), float32 or complex64 (float64 or complex128 for float64)
        With `return_last_state`.

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
    >>> u = torch.ones(1, 1, 4)
    >>> A, B = torch.zeros(1, 1), torch.ones(1, 1)  # no decay: a running sum
    >>> pentad.scan.selective_scan(u, u, A, B, B)
    tensor([[[1., 2., 3., 4.]]])
    >>> out, state = pentad.scan.selective_scan(u, u, A, B, B, return_last_state=True)
    >>> pentad.scan.selective_scan(u, u, A, B, B, initial_state=state)  # the next piece
    tensor([[[5., 6., 7., 8.]]])
    """
    op = "selective_scan"
    if autocasts(u):
        u, delta, z, B, C = promoted_inputs(u, delta, z, B, C)
    u, delta, A, B, C, D, z, delta_bias = canonical(op, u, delta, A, B, C, D, z, delta_bias)
    sequences = u.shape[0]
    if cu_seqlens is not None:
        check_cuda_devices(op, ("u", u), cu_seqlens=cu_seqlens)
        sequences = check_cu_seqlens(op, "u", sequences, cu_seqlens)
    if initial_state is not None:
        check_cuda_devices(op, ("u", u), initial_state=initial_state)
        initial_state = _state(op, initial_state, A, (sequences, *A.shape))
    out, last, _ = autograd.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens,
        bool(delta_softplus), bool(reverse), bool(return_last_state),
    )  # fmt: skip
    return (out, last) if return_last_state else out


def canonical(op, u, delta, A, B, C, D, z, delta_bias, *, first="u"):
    """The tensors of a scan, checked, in the dtypes and with the dimensions that kernels take.

    `first` is the caller's name of `u`, by which the others are judged.
    """
    check_tensor(op, first, u)
    check_rank(op, first, u, 3, "(B, D, L)")
    check_cuda_devices(op, (first, u), delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    dtype, dim = u.dtype, u.shape[1]
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None or name == "delta":
            check_tensor(op, name, tensor)
            check_dtype(op, name, tensor, dtype, first)
            check_shape(op, name, tensor, tuple(u.shape))
    wide = accumulator(dtype)
    A = _transition(op, A, wide, dim, first)
    B = _coefficient(op, "B", B, A, u, first)
    C = _coefficient(op, "C", C, A, u, first)
    if B.ndim > 2 and C.ndim > 2 and B.shape[1] != C.shape[1]:
        raise ValueError(f"[{op}] C has {C.shape[1]} groups but B has {B.shape[1]}")
    if D is not None:
        D = parameter(op, "D", D, wide, (dim,), whose=first)
    if delta_bias is not None:
        delta_bias = parameter(op, "delta_bias", delta_bias, wide, (dim,), whose=first)
    return u, delta, A, B, C, D, z, delta_bias


def promoted_inputs(u, delta, z, B, C):
    """`promoted`, but for constant B and C, which are of A's dtype."""
    varying = [t if isinstance(t, torch.Tensor) and t.ndim > 2 else None for t in (B, C)]
    u, delta, z, *varying = promoted(u, delta, z, *varying)
    B, C = (t if new is None else new for t, new in zip((B, C), varying, strict=True))
    return u, delta, z, B, C


def _transition(op, A, wide, dim, first):
    check_tensor(op, "A", A, (*FLOATS, *COMPLEX))
    if A.ndim != 2 or A.shape[0] != dim or A.shape[1] < 1:
        raise ValueError(f"[{op}] A has shape {tuple(A.shape)}, expected ({dim}, N), N at least 1")
    dtype = complex_of(wide) if A.is_complex() else wide
    if A.dtype == dtype:
        return A
    if A.dtype in (torch.float64, torch.complex128):
        raise TypeError(
            f"[{op}] A has dtype {name_of(A.dtype)}, expected it only where {first} has float64"
        )
    return A.to(dtype)


def _coefficient(op, name, tensor, A, u, first):
    """B or C as (D, N), or (B, G, N, L), real ones beside complex A (B, G, N, L, 2)."""
    check_tensor(op, name, tensor, (*FLOATS, *COMPLEX))
    (batch, dim, length), states, is_complex = u.shape, A.shape[1], tensor.is_complex()
    if is_complex and not A.is_complex():
        raise TypeError(f"[{op}] {name} has dtype {name_of(tensor.dtype)} but A is real")
    if tensor.ndim == 2:
        check_shape(op, name, tensor, (dim, states))
        if tensor.dtype == A.dtype:
            return tensor
        if tensor.dtype in (torch.float64, torch.complex128) and u.dtype != torch.float64:
            raise TypeError(
                f"[{op}] {name} has dtype {name_of(tensor.dtype)}, "
                f"expected it only where {first} has float64"
            )
        return tensor.to(A.dtype)
    if is_complex:
        if u.dtype not in (torch.float32, torch.float64) or tensor.dtype != complex_of(u.dtype):
            expected = "expected interleaved pairs of it"
            if u.dtype in (torch.float32, torch.float64):
                expected = f"expected {name_of(complex_of(u.dtype))}"
            raise TypeError(
                f"[{op}] {name} has dtype {name_of(tensor.dtype)} but {first} has "
                f"{name_of(u.dtype)}, {expected}"
            )
    else:
        check_dtype(op, name, tensor, u.dtype, first)
    pairs = A.is_complex() and not is_complex
    steps = 2 * length if pairs else length
    if tensor.ndim == 3:
        check_shape(op, name, tensor, (batch, states, steps))
        tensor = tensor.unsqueeze(1)
    elif tensor.ndim == 4:
        groups = tensor.shape[1]
        check_shape(op, name, tensor, (batch, groups, states, steps))
        if groups < 1 or dim % groups:
            raise ValueError(
                f"[{op}] {name} has {groups} groups but D = {dim} channels "
                f"are not a multiple of {groups}"
            )
    else:
        raise ValueError(
            f"[{op}] {name} has shape {tuple(tensor.shape)}, expected ({dim}, {states}), "
            f"({batch}, {states}, {steps}) or ({batch}, G, {states}, {steps})"
        )
    return tensor.unflatten(3, (length, 2)) if pairs else tensor


def _state(op, state, A, shape):
    """The initial state in A's dtype."""
    check_tensor(op, "initial_state", state, (*FLOATS, *COMPLEX))
    check_shape(op, "initial_state", state, shape)
    if state.dtype == A.dtype:
        return state
    if state.is_complex() and not A.is_complex():
        raise TypeError(f"[{op}] initial_state has dtype {name_of(state.dtype)} but A is real")
    if accumulator(real_of(state.dtype)) != real_of(A.dtype) != torch.float64:
        raise TypeError(
            f"[{op}] initial_state has dtype {name_of(state.dtype)}, "
            "expected it only where u has float64"
        )
    return state.to(A.dtype)


# --- Elementwise recurrence -----------------------------------------------------------------------


def linear_recurrence(a, x, h0=None, *, reverse=False, dim=-1, log_space=False):
    r"""All states of ``h_t = a_t h_{t-1} + x_t``, element by element, with gradients.

    The recurrence of gated linear RNNs: Martin & Cundy 2018, "Parallelizing Linear Recurrent Neural
    Nets Over Sequence Length", arXiv 1709.04057, equation 5; LRU (arXiv 2303.06349), HGRN (arXiv
    2311.04823), GateLoop (arXiv 2311.01927), RG-LRU (arXiv 2402.19427) and minGRU (arXiv
    2410.01201) compute their gates and call it. The carry is float32 (float64 for float64), and
    rounded only where it is stored. Differentiable once in `a`, `x` and `h0`.

    Parameters
    ----------
    a : broadcastable to the shape of `x`
        The gates, in x's dtype; real ones beside complex `x` are converted. One step along `dim` is
        a gate that is constant over time, and costs no more memory than that.
    x : (..., L, ...) float32, bfloat16, float16, float64, complex64 or complex128
        Of any strides; time is along `dim`. Under ``torch.autocast`` `a`, `x` and `h0` are taken in
        the widest dtype among them.
    h0 : broadcastable to the shape of `x` without `dim`, optional
        The state before the first step, in x's dtype; by default zeros.
    reverse : bool
        Run from the last step to the first.
    dim : int
    log_space : bool
        `a` is the logarithm of the gates, which are ``exp(a)``; -inf is a gate of 0.

    Returns
    -------
    h : the shape and dtype of `x`, and up to three dimensions its layout

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For shapes that do not broadcast.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative, or one of forward mode.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([1.0, 0.0, 0.0, 4.0])
    >>> pentad.scan.linear_recurrence(torch.tensor(0.5), x)
    tensor([1.0000, 0.5000, 0.2500, 4.1250])
    >>> pentad.scan.linear_recurrence(torch.tensor(0.5), x, torch.tensor(8.0), reverse=True)
    tensor([2., 2., 4., 8.])
    """
    op = "linear_recurrence"
    check_tensor(op, "x", x, (*FLOATS, *COMPLEX))
    check_tensor(op, "a", a, (*FLOATS, *COMPLEX))
    check_cuda_devices(op, ("x", x), a=a, h0=h0)
    if x.ndim < 1:
        raise ValueError(f"[{op}] x has shape (), expected at least one dimension")
    rank = x.ndim
    try:
        axis = operator.index(dim)
    except TypeError:
        raise TypeError(f"[{op}] dim is {type(dim).__name__}, expected an int") from None
    if not -rank <= axis < rank:
        raise ValueError(f"[{op}] dim is {axis}, expected {-rank} to {rank - 1}")
    axis %= rank
    if autocasts(x):
        a, x, h0 = _promoted_gates(a, x, h0)
    a = _as_states(op, "a", a, x)
    a = _aligned(op, "a", a, x.shape)
    if h0 is not None:
        check_tensor(op, "h0", h0, (*FLOATS, *COMPLEX))
        h0 = _as_states(op, "h0", h0, x)
        h0 = _aligned(op, "h0", h0, (*x.shape[:axis], *x.shape[axis + 1 :]))

    a, x = a.movedim(axis, -1), x.movedim(axis, -1)
    sizes = x.shape
    a, x, h0 = _three_dimensions(a, x, h0)
    h = autograd.linear_recurrence(a, x, h0, bool(log_space), bool(reverse))
    if rank != 3:
        h = h.view(sizes) if rank < 3 else h.reshape(sizes)
    return h.movedim(-1, axis)


def _promoted_gates(a, x, h0):
    a, x, h0 = promoted(a, x, h0)
    if a.is_complex() and not x.is_complex():
        return a, x.to(a.dtype), h0
    return a, x, h0


def _as_states(op, name, tensor, x):
    """In x's dtype, which only a real tensor beside a complex one is not already."""
    if tensor.dtype == x.dtype:
        return tensor
    if not x.is_complex() or tensor.is_complex() or complex_of(tensor.dtype) != x.dtype:
        check_dtype(op, name, tensor, x.dtype, "x")
    return tensor.to(x.dtype)


def _aligned(op, name, tensor, shape):
    """`tensor` with as many dimensions as `shape`, to which it broadcasts."""
    missing = len(shape) - tensor.ndim
    fits = missing >= 0 and all(
        n == 1 or n == m for n, m in zip(tensor.shape, shape[missing:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"[{op}] {name} has shape {tuple(tensor.shape)}, "
            f"expected one that broadcasts to {tuple(shape)}"
        )
    return tensor[(None,) * missing] if missing else tensor


def _three_dimensions(a, x, h0):
    """(outer, inner, time): `a` and `h0` may stay broadcast. Copies only what cannot be viewed."""
    rank = x.ndim
    if rank == 3:
        return a, x, h0
    if rank < 3:
        more = (None,) * (3 - rank)
        return a[more], x[more], None if h0 is None else h0[more]
    # The other dimensions become two, cut where `x` needs no copy.
    lead = rank - 1
    cut = next(
        (n for n in range(1, lead) if _mergeable(x, 0, n) and _mergeable(x, n, lead)), lead - 1
    )
    x_shape, sizes = x.shape, (x.shape[:cut], x.shape[cut:lead])

    def merged(tensor, tail):
        """Its leading dimensions in two groups, each of size 1 or as large as x's."""
        shape = list(tensor.shape)
        for begin, end in ((0, cut), (cut, lead)):
            if any(n != 1 for n in shape[begin:end]):
                shape[begin:end] = x_shape[begin:end]
        tensor = _expanded(tensor, shape)
        both = ((0, cut, sizes[0]), (cut, lead, sizes[1]))
        new = [1 if all(n == 1 for n in shape[b:e]) else _product(s) for b, e, s in both]
        return tensor.reshape(*new, *tail)

    return (
        merged(a, a.shape[lead:]),
        merged(x, x_shape[lead:]),
        None if h0 is None else merged(h0, ()),
    )


def _mergeable(tensor, begin, end):
    """Whether dimensions [begin, end) are one in memory."""
    return all(
        tensor.stride(n) == tensor.shape[n + 1] * tensor.stride(n + 1)
        for n in range(begin, end - 1)
    )


def _expanded(tensor, shape):
    """Expanded; half precision passes float32, in which the gradient is then summed."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    if tensor.requires_grad and tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.float().expand(shape).to(tensor.dtype)
    return tensor.expand(shape)


def _product(sizes):
    result = 1
    for n in sizes:
        result = result * n
    return result


# --- Causal convolution ---------------------------------------------------------------------------


def causal_conv1d(
    x,
    weight,
    bias=None,
    *,
    activation=None,
    initial_states=None,
    return_final_states=False,
    seq_idx=None,
    cu_seqlens=None,
):
    r"""The causal depthwise convolution before a scan, with its activation and gradients.

    ``out_t = act(bias + sum_k weight_k x_{t - (W - 1) + k})`` per channel (Gu & Dao 2023, "Mamba",
    arXiv 2312.00752, figure 3; Dao, causal-conv1d). Sums in float32 (float64 for float64).
    Differentiable once in `x`, `weight`, `bias` and `initial_states`, through both results.

    Parameters
    ----------
    x : (B, D, L) float32, bfloat16, float16 or float64
        Of any strides.
    weight : (D, W) float
        W is 1 to 64. float64 only with float64 `x`.
    bias : (D,) float, optional
    activation : "silu" or "swish" (the same), optional
    initial_states : (B, D, W - 1), optional
        The inputs before the first, the latest last, in x's dtype (to which ``torch.autocast``
        rounds them); by default zeros. With `cu_seqlens` (S, D, W - 1).
    return_final_states : bool
    seq_idx : (B, L) int32, optional
        The sequence of each step: taps reach only steps of the same one. Rises along a row; a
        negative entry is padding, and its output 0. Not with states or `cu_seqlens`.
    cu_seqlens : (S + 1,) int32 or int64, optional
        Sequence s is the steps ``[cu_seqlens[s], cu_seqlens[s + 1])`` of the only batch row.

    Returns
    -------
    out : (B, D, L)
        In x's dtype; the channels are next to each other in memory if those of `x` are.
    final_states : (B, D, W - 1) or (S, D, W - 1), in x's dtype
        With `return_final_states`: the initial states of what follows.

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes or options that do not fit together; a seq_idx that descends; cu_seqlens that do
        not rise from 0 to L.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative, or one of forward mode.

    Examples
    --------
    >>> import torch
    >>> x, weight = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0, 1.0]])
    >>> pentad.scan.causal_conv1d(x, weight)
    tensor([[[ 1., 12., 23.]]])
    >>> pentad.scan.causal_conv1d(x, weight, initial_states=torch.full((1, 1, 1), 5.0))
    tensor([[[51., 12., 23.]]])
    """
    op = "causal_conv1d"
    check_tensor(op, "x", x)
    check_rank(op, "x", x, 3, "(B, D, L)")
    batch, dim, length = x.shape
    check_cuda_devices(
        op, ("x", x), weight=weight, bias=bias, initial_states=initial_states, seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    weight, bias = weights(op, weight, bias, x.dtype, dim)
    width = weight.shape[1]
    sequences = batch
    if seq_idx is not None:
        check_integers(op, "seq_idx", seq_idx, (batch, length), (torch.int32,))
        for name, given in (
            ("initial_states", initial_states is not None),
            ("return_final_states", return_final_states),
            ("cu_seqlens", cu_seqlens is not None),
        ):
            if given:
                raise ValueError(f"[{op}] {name} cannot be used with seq_idx")
    if cu_seqlens is not None:
        sequences = check_cu_seqlens(op, "x", batch, cu_seqlens)
    if initial_states is not None:
        check_tensor(op, "initial_states", initial_states)
        if initial_states.dtype != x.dtype:
            if not autocasts(x):
                check_dtype(op, "initial_states", initial_states, x.dtype, "x")
            initial_states = initial_states.to(x.dtype)
        check_shape(op, "initial_states", initial_states, (sequences, dim, width - 1))

    out, final = autograd.causal_conv1d(
        x, weight, bias, initial_states, seq_idx, cu_seqlens, is_silu(op, activation),
        bool(return_final_states),
    )  # fmt: skip
    return (out, final) if return_final_states else out


def is_silu(op, activation):
    if activation is None:
        return False
    if activation not in ("silu", "swish"):
        raise ValueError(f"[{op}] activation is {activation!r}, expected None, 'silu' or 'swish'")
    return True
