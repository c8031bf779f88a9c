# SPDX-License-Identifier: Apache-2.0
"""Kernels of linear state space models for `long_conv`, and the recurrences that equal them.

Each is a function of torch tensors, differentiable, with a real kernel of (D, L) as its result.
Complex states stand for conjugate pairs throughout, of which one is kept: N states are N / 2
complex numbers, and what is read from them is twice the real part (but in `dss`, as its paper has
it). Powers of the transition are computed in double precision, for thousands of float32 steps would
lose the phase, and a kernel of length L takes memory for about 2 N sqrt(L) of them per channel.

Examples
--------
>>> import torch
>>> from pentad.scan import kernels
>>> A = kernels.s4d_lin(4).to(torch.complex64)  # two conjugate pairs
>>> dt, C = torch.tensor([0.1, 0.5, 1.0]), torch.ones(3, 2, dtype=torch.complex64)
>>> kernel = kernels.s4d(A, C, dt, 64)
>>> out = pentad.scan.long_conv(torch.ones(2, 3, 64), kernel)
"""

import math

import torch
from torch.utils.checkpoint import checkpoint

from pentad._ops import autocast_device, needs_grad
from pentad.scan._checks import (
    COMPLEX,
    FLOATS,
    check_integer,
    check_shape,
    check_tensor,
    complex_of,
    name_of,
    real_of,
)
from pentad.scan.transitions import (
    hippo_legs,
    legs_nplr,
    s4d_inv,
    s4d_legs,
    s4d_lin,
)

__all__ = [
    "dss",
    "dss_discretize",
    "hippo_legs",
    "legs_nplr",
    "s4",
    "s4_discretize",
    "s4d",
    "s4d_discretize",
    "s4d_inv",
    "s4d_legs",
    "s4d_lin",
    "step",
]

_REAL = (torch.float32, torch.float64)
_NODES = 1 << 22  # complex numbers at a time in the Cauchy product


# --- Diagonal kernels -----------------------------------------------------------------------------


def s4d(A, C, dt, length, *, B=None, discretization="zoh"):
    r"""The kernel of a diagonal state space model: ``K_l = 2 Re(sum_n C_n Bbar_n Abar_n^l)``.

    Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models",
    arXiv 2206.11893, equations 3 and 6 and listing 1. With real A it is the sum itself, over real C
    and B.

    Parameters
    ----------
    A : (N,) or (D, N) complex64, complex128, float32 or float64
        In continuous time.
    C : (D, N)
        Of A's dtype.
    dt : (D,) real
        Steps of time.
    length : int
        L.
    B : (N,) or (D, N), optional
        By default ones.
    discretization : "zoh" or "bilinear"
        See `s4d_discretize`.

    Returns
    -------
    kernel : (D, L) float32, or float64 for double precision

    Raises
    ------
    TypeError, ValueError
        For dtypes and shapes other than these.

    Examples
    --------
    >>> import torch
    >>> from pentad.scan import kernels
    >>> A, C = torch.tensor([[-1.0]]), torch.tensor([[3.0]])
    >>> kernels.s4d(A, C, torch.tensor([0.5]), 3, discretization="bilinear").round(decimals=3)
    tensor([[1.2000, 0.7200, 0.4320]])
    """
    op = "s4d"
    a, b, dtype = _diagonal(op, A, B, C, dt, discretization)
    kernel = _vandermonde(_double(C) * b, a, _length(op, length), dtype)
    return 2 * kernel if C.is_complex() else kernel


def s4d_discretize(A, dt, *, B=None, discretization="zoh"):
    r"""The transition and input (D, N) of the recurrence that equals `s4d`.

    ``h_t = Abar h_{t-1} + Bbar u_t``, which `step` and `pentad.scan.linear_recurrence` run, and
    ``y_t = 2 Re(sum_n C_n h_tn)``. "zoh": ``Abar = exp(dt A)``, ``Bbar = (Abar - 1) / A B``, and dt
    B for A = 0; "bilinear": ``Abar = (1 + dt A / 2) / (1 - dt A / 2)``, ``Bbar = dt / (1 - dt A /
    2) B`` (arXiv 2206.11893, section 3.1; arXiv 2111.00396, equation 3).

    Parameters
    ----------
    A, dt, B, discretization
        As in `s4d`.

    Examples
    --------
    >>> import torch
    >>> from pentad.scan import kernels
    >>> kernels.s4d_discretize(torch.tensor([0.0]), torch.tensor([0.5]))
    (tensor([[1.]]), tensor([[0.5000]]))
    """
    op = "s4d_discretize"
    check_tensor(op, "A", A, (*_REAL, *COMPLEX))
    check_tensor(op, "dt", dt, FLOATS)
    like = A if A.ndim == 2 else A.expand(*dt.shape, *A.shape)
    a, b, dtype = _diagonal(op, A, B, like, dt, discretization)
    dtype = complex_of(dtype) if A.is_complex() else dtype
    return a.to(dtype), b.expand(a.shape).to(dtype)


def dss(Lambda, W, dt, length, *, variant="softmax", eps=1e-7):
    r"""The kernel of DSS: ``K_l = Re(sum_n w_n c_n exp(l dt Lambda_n))``, of two variants.

    "exp": ``c = (exp(dt Lambda) - 1) / Lambda``, for Lambda of negative real part. "softmax": ``c =
    1 / (Lambda sum_{l < L} exp(l dt Lambda))``, a softmax over the L steps, which is bounded for
    any Lambda and depends on L (Gupta et al. 2022, "Diagonal State Spaces are as Effective as
    Structured State Spaces", arXiv 2203.14343, proposition 1). The real part is taken once: other
    than in `s4d` the states are no pairs.

    Parameters
    ----------
    Lambda : (N,) or (D, N) complex64 or complex128
    W : (D, N)
        Of Lambda's dtype.
    dt : (D,) real
    length : int
        L.
    variant : "softmax" or "exp"
    eps : float
        The reciprocal of x, of the softmax's sum (which complex numbers may bring to 0) and of its
        Lambda, is taken as ``conj(x) / (|x|^2 + eps)`` (appendix A.2).

    Returns
    -------
    kernel : (D, L) float32, or float64 for double precision

    Raises
    ------
    TypeError, ValueError
        For dtypes and shapes other than these.

    Examples
    --------
    >>> import torch
    >>> from pentad.scan import kernels
    >>> Lambda, W = torch.tensor([-1 + 0j]), torch.ones(1, 1, dtype=torch.complex64)
    >>> kernels.dss(Lambda, W, torch.ones(1), 3, variant="exp").round(decimals=3)
    tensor([[0.6320, 0.2330, 0.0860]])
    """
    op, length = "dss", _length("dss", length)
    small, w, grows, dtype = _dss(op, Lambda, W, dt, length, variant, eps)
    kernel = _vandermonde(w.where(~grows, 0), small, length, dtype)
    if variant == "softmax":  # those that grow, from their last step back
        kernel = kernel + _vandermonde(w.where(grows, 0), small, length, dtype).flip(-1)
    return kernel


def dss_discretize(Lambda, W, dt, length, *, variant="softmax", eps=1e-7):
    r"""The transition and output weights (D, N) of the recurrence that equals `dss`.

    ``h_t = a h_{t-1} + u_t`` and ``y_t = Re(sum_n c_n h_tn)``. The softmax depends on the length
    for which the kernel was made.

    Parameters
    ----------
    Lambda, W, dt, length, variant, eps
        As in `dss`.

    Examples
    --------
    >>> import torch
    >>> from pentad.scan import kernels
    >>> Lambda, W = torch.tensor([-1 + 0j]), torch.ones(1, 1, dtype=torch.complex64)
    >>> a, c = kernels.dss_discretize(Lambda, W, torch.ones(1), 3, variant="exp")
    >>> a.real.round(decimals=3), c.real.round(decimals=3)
    (tensor([[0.3680]]), tensor([[0.6320]]))
    """
    op, length = "dss_discretize", _length("dss_discretize", length)
    small, w, grows, dtype = _dss(op, Lambda, W, dt, length, variant, eps)
    dtype = complex_of(dtype)
    if variant == "softmax":
        w = w * _power(small, max(0, length - 1)).where(grows, 1)
    return torch.where(grows, small.reciprocal(), small).to(dtype), w.to(dtype)


def step(state, u, A, B, C):
    r"""One step of ``h_t = A h_{t-1} + B u_t, y_t = C h_t``: the state in place, and y (B, D).

    Parameters
    ----------
    state : (B, D, N) real or complex
        h, changed in place; complex where A, B or C are.
    u : (B, D) real
    A : (D, N), or (D, N, N) for a matrix
        In discrete time, as the functions ``*_discretize`` give it.
    B, C : (D, N)
        y is twice the real part of a complex sum.

    Examples
    --------
    >>> import torch
    >>> from pentad.scan import kernels
    >>> A, B = kernels.s4d_discretize(torch.tensor([0.0]), torch.ones(1))
    >>> state, ones = torch.zeros(1, 1, 1), torch.ones(1, 1)
    >>> for _ in range(3):
    ...     y = kernels.step(state, ones, A, B, ones)
    >>> y
    tensor([[3.]])
    """
    for name, tensor in (("state", state), ("A", A), ("B", B), ("C", C)):
        check_tensor("step", name, tensor, (*_REAL, *COMPLEX))
    check_tensor("step", "u", u, FLOATS)
    if state.ndim != 3:
        raise ValueError(f"[step] state has shape {tuple(state.shape)}, expected (B, D, N)")
    batch, dim, states = state.shape
    check_shape("step", "u", u, (batch, dim))
    check_shape("step", "A", A, (dim, states), (dim, states, states))
    check_shape("step", "B", B, (dim, states))
    check_shape("step", "C", C, (dim, states))
    if not state.is_complex() and any(t.is_complex() for t in (A, B, C)):
        raise TypeError(
            f"[step] state has dtype {name_of(state.dtype)}, expected a complex one as of A, B or C"
        )
    # A copy, as the state itself changes before the backward pass.
    before = state.clone() if needs_grad(state, u, A, B, C) else state
    before = A * before if A.ndim == 2 else (A @ before[..., None])[..., 0]
    new = before + B * u[..., None]
    y = (C * new).sum(-1)
    state.copy_(new)
    return 2 * y.real if y.is_complex() else y


def _diagonal(op, A, B, C, dt, discretization):
    """Discrete A and B in double precision, and the dtype of the kernel."""
    check_tensor(op, "A", A, (*_REAL, *COMPLEX))
    dtype = _shapes(op, dt, A=A, B=B, C=C)
    if discretization not in ("zoh", "bilinear"):
        raise ValueError(
            f'[{op}] discretization is {discretization!r}, expected "zoh" or "bilinear"'
        )
    dt, A = dt.double()[:, None], _double(A)
    z = dt * A
    if discretization == "zoh":
        a, b = z.exp(), dt * _expm1_ratio(z)
    else:
        a, b = (1 + z / 2) / (1 - z / 2), dt / (1 - z / 2)
    return a, (b if B is None else b * _double(B)), dtype


def _dss(op, Lambda, W, dt, length, variant, eps):
    """Transitions of at most unit size, weights of their powers, and which of them count backwards
    from the last step because they grow."""
    check_tensor(op, "Lambda", Lambda, COMPLEX)
    dtype = _shapes(op, dt, Lambda=Lambda, W=W)
    if variant not in ("exp", "softmax"):
        raise ValueError(f'[{op}] variant is {variant!r}, expected "softmax" or "exp"')
    dt, Lambda, W = dt.double()[:, None], _double(Lambda), _double(W)
    z = dt * Lambda
    if variant == "exp":
        return z.exp(), W * dt * _expm1_ratio(z), torch.zeros_like(z.real, dtype=torch.bool), dtype
    grows = z.real > 0
    small = torch.where(grows, -z, z).exp()
    weight = W * _reciprocal(Lambda, eps) * _reciprocal(_geometric_sum(small, length), eps)
    return small, weight, grows, dtype


def _reciprocal(x, eps):
    return x.conj() / (x.real.square() + x.imag.square() + eps)


def _expm1_ratio(z):
    """(exp(z) - 1) / z, and 1 for 0."""
    zero = z == 0
    z = z.where(~zero, 1)
    return (z.expm1() / z).where(~zero, 1)


def _vandermonde(weights, a, length, dtype):
    """Re(sum_n weights_n a_n^l), (D, length): powers of up to T and of T, then matrix products."""
    inner = max(1, math.isqrt(length))
    outer = -(-length // inner)
    low = _powers(a, inner)  # (D, N, T)
    high = _powers(_power(a, inner), outer) * weights[..., None]
    if low.is_complex():
        low = torch.cat([low.real, -low.imag], -2)
        high = torch.cat([high.real, high.imag], -2)
    with torch.autocast(autocast_device(a), enabled=False):  # not in 16 bits
        return (high.mT.to(dtype) @ low.to(dtype)).flatten(-2)[..., :length]


def _powers(a, count):
    """a^0 to a^(count - 1) in a last dimension, by doubling: exact for 0."""
    powers, square = torch.ones_like(a)[..., None], a[..., None]
    while powers.shape[-1] < count:
        powers = torch.cat([powers, powers * square], -1)
        square = square * square
    return powers[..., :count]


def _power(a, exponent):
    power = torch.ones_like(a)
    while exponent:
        if exponent % 2:
            power = power * a
        exponent //= 2
        if exponent:
            a = a * a
    return power


def _geometric_sum(a, count):
    """a^0 + ... + a^(count - 1), from the count's bits: S(2 m) = S(m) (1 + a^m)."""
    total, power = torch.zeros_like(a), torch.ones_like(a)
    for bit in f"{count:b}":
        total, power = total * (1 + power), power * power
        if bit == "1":
            total, power = total * a + 1, power * a
    return total


# --- Diagonal and a product of rank one -----------------------------------------------------------


def s4(Lambda, P, B, C, dt, length, *, Q=None, truncated=False):
    r"""The kernel of S4: ``K_l = C Abar^l Bbar`` with ``A = Lambda - P Q*``, in conjugate pairs.

    By its generating function at the roots of unity, which takes four Cauchy products and the
    Woodbury identity, and an inverse Fourier transform; discretised by the bilinear rule (Gu et al.
    2022, "Efficiently Modeling Long Sequences with Structured State Spaces", arXiv 2111.00396,
    algorithm 1 and appendix C.3). The products are taken some roots at a time and computed again in
    the backward pass, so that memory does not grow with N L.

    Parameters
    ----------
    Lambda, P : (N / 2,) or (D, N / 2) complex64 or complex128
        One of each conjugate pair; `legs_nplr` has initial ones.
    B : (N / 2,) or (D, N / 2)
    C : (D, N / 2)
        A row: y is twice the real part of ``sum_n C_n h_n``.
    dt : (D,) real
    length : int
        L.
    Q : (N / 2,) or (D, N / 2), optional
        By default `P`.
    truncated : bool
        C is already ``C (1 - Abar^L)``, which models train to save the power of a matrix. It is the
        expensive part for short kernels.

    Returns
    -------
    kernel : (D, L) float32, or float64 for double precision

    Raises
    ------
    TypeError, ValueError
        For dtypes and shapes other than these.

    Examples
    --------
    >>> import torch
    >>> from pentad.scan import kernels
    >>> Lambda, P, B, V = kernels.legs_nplr(8)
    >>> C = torch.ones(2, 4, dtype=torch.complex128)
    >>> kernels.s4(Lambda, P, B, C, torch.tensor([0.1, 0.2]), 16).shape
    torch.Size([2, 16])
    """
    op, length = "s4", _length("s4", length)
    dtype = _pairs(op, Lambda, P, B, C, dt, Q)
    Q = P if Q is None else Q
    if not truncated:
        A, _, row = _real_system(Lambda, P, B, C, dt, Q)
        row = row - (row[:, None] @ torch.linalg.matrix_power(A, length))[:, 0]
        half = row.shape[-1] // 2
        C = torch.complex(row[:, :half], -row[:, half:]) / 2
    if not length:
        return torch.zeros(C.shape[0], 0, dtype=dtype)
    kind = complex_of(dtype)
    Lambda, P, B, C, Q = (t.to(kind) for t in (Lambda, P, B, C, Q))
    weights = torch.stack(
        torch.broadcast_tensors(C * B, C * P, Q.conj() * B, Q.conj() * P)
    )  # (4, D, N / 2)
    count = length // 2 + 1
    angles = torch.arange(count, dtype=torch.float64, device=C.device) * (-2 * math.pi / length)
    z = torch.polar(torch.ones_like(angles), angles)
    below, above = (1 - z).to(kind), (1 + z).to(kind)
    rates = 2 / dt.to(dtype)[:, None]
    size = max(1, _NODES // max(1, weights[0].numel()))
    pieces = [
        checkpoint(_generating_function, weights, Lambda, rates, m, p, use_reentrant=False)
        for m, p in zip(below.split(size), above.split(size), strict=True)
    ]
    return torch.fft.irfft(torch.cat(pieces, -1), length)


def _generating_function(weights, Lambda, rates, below, above):
    """sum_l K_l z^l at some z, by 1 - z and 1 + z. Each Cauchy product comes times 2 / (1 + z),
    which is finite at z = -1."""

    def product(roots, weights):
        denominators = rates[..., None] * below - roots[..., None] * above
        return (weights[..., None, :] @ (2 / denominators))[..., 0, :]

    k = product(Lambda, weights) + product(Lambda.conj(), weights.conj())
    k_cb, k_cp, k_qb, k_qp = k
    half = above / 2
    return k_cb - half * k_cp * k_qb / (1 + half * k_qp)


def s4_discretize(Lambda, P, B, C, dt, *, Q=None):
    r"""The real recurrence that equals `s4`: (A, B, C) of (D, N, N), (D, N) and (D, N).

    ``h_t = A h_{t-1} + B u_t, y_t = C h_t``, which `step` runs, where h holds the real parts of the
    N / 2 states and then the imaginary ones (arXiv 2111.00396, equation 3).

    Parameters
    ----------
    Lambda, P, B, C, dt, Q
        As in `s4`.

    Examples
    --------
    >>> import torch
    >>> from pentad.scan import kernels
    >>> Lambda, P, B, V = kernels.legs_nplr(8)
    >>> C = torch.ones(2, 4, dtype=torch.complex128)
    >>> A, B, C = kernels.s4_discretize(Lambda, P, B, C, torch.tensor([0.1, 0.2]))
    >>> A.shape, B.shape
    (torch.Size([2, 8, 8]), torch.Size([2, 8]))
    """
    dtype = _pairs("s4_discretize", Lambda, P, B, C, dt, Q)
    system = _real_system(Lambda, P, B, C, dt, P if Q is None else Q)
    return tuple(t.to(dtype) for t in system)


def _real_system(Lambda, P, B, C, dt, Q):
    """Discrete A, B, C over real and imaginary parts, float64."""
    Lambda, P, B, C, Q = (_double(t) for t in (Lambda, P, B, C, Q))
    Lambda, P, B, Q = (t.expand(C.shape) for t in (Lambda, P, B, Q))

    def parts(x):
        return torch.cat([x.real, x.imag], -1)

    turn = torch.cat(
        [
            torch.cat([Lambda.real.diag_embed(), -Lambda.imag.diag_embed()], -1),
            torch.cat([Lambda.imag.diag_embed(), Lambda.real.diag_embed()], -1),
        ],
        -2,
    )
    A = turn - 2 * parts(P)[..., :, None] * parts(Q)[..., None, :]  # Q* h and its conjugate
    dt = dt.double()[:, None, None]
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    right = torch.cat([one + dt / 2 * A, dt * parts(B)[..., None]], -1)
    solved = torch.linalg.solve(one - dt / 2 * A, right)
    return solved[..., :-1], solved[..., -1], 2 * parts(C.conj())


# --- Checks ---------------------------------------------------------------------------------------


def _double(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _shapes(op, dt, **tensors):
    """The last of `tensors` is (D, N), the others may lack D; their real dtype."""
    name, last = list(tensors.items())[-1]
    first = next(iter(tensors.values()))
    for other, tensor in tensors.items():
        if tensor is not None:
            check_tensor(op, other, tensor, (first.dtype,))
    if last.ndim != 2:
        raise ValueError(f"[{op}] {name} has shape {tuple(last.shape)}, expected (D, N)")
    dim, states = last.shape
    for other, tensor in tensors.items():
        if tensor is not None and tensor is not last:
            check_shape(op, other, tensor, (states,), (dim, states))
    check_tensor(op, "dt", dt, FLOATS)
    check_shape(op, "dt", dt, (dim,))
    return real_of(first.dtype)


def _pairs(op, Lambda, P, B, C, dt, Q):
    check_tensor(op, "Lambda", Lambda, COMPLEX)
    return _shapes(op, dt, Lambda=Lambda, P=P, B=B, Q=Q, C=C)


def _length(op, length):
    length = check_integer(op, "length", length)
    if length < 0:
        raise ValueError(f"[{op}] length is {length}, expected 0 or more")
    return length
