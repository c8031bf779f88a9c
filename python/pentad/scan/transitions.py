# SPDX-License-Identifier: Apache-2.0
"""Initial transitions of linear state space models, for `pentad.scan.kernels`."""

import math

import torch

from pentad.scan._checks import check_integer


def hippo_legs(states):
    """The transition and input of HiPPO-LegS, float64 (N, N) and (N,).

    ``A_nk = -sqrt((2n+1)(2k+1))`` below the diagonal, ``-(n+1)`` on it; ``B_n = sqrt(2n+1)`` (Gu et
    al. 2020, "HiPPO: Recurrent Memory with Optimal Polynomial Projections", arXiv 2008.07669,
    theorem 2).

    Examples
    --------
    >>> from pentad.scan import kernels
    >>> A, B = kernels.hippo_legs(2)
    >>> A
    tensor([[-1.0000, -0.0000],
            [-1.7321, -2.0000]], dtype=torch.float64)
    """
    n = torch.arange(_count("hippo_legs", states), dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    return -(torch.outer(B, B).tril(-1) + torch.diag(n + 1)), B


def legs_nplr(states):
    """HiPPO-LegS as a diagonal less a product of rank one: (Lambda, P, B, V), complex128.

    ``A = V (Lambda - P P*) V*`` over all conjugate pairs, of which the N / 2 of positive imaginary
    part are given: Lambda, P and B are (N / 2,), V is (N, N / 2) (Gu et al. 2022, "Efficiently
    Modeling Long Sequences with Structured State Spaces", arXiv 2111.00396, theorem 1 and appendix
    C.1).

    Examples
    --------
    >>> from pentad.scan import kernels
    >>> Lambda, P, B, V = kernels.legs_nplr(4)
    >>> Lambda.real
    tensor([-0.5000, -0.5000], dtype=torch.float64)
    """
    states = _even("legs_nplr", states)
    A, B = hippo_legs(states)
    P = (torch.arange(states, dtype=torch.float64) + 0.5).sqrt()
    normal = A + torch.outer(P, P)  # a skew-symmetric matrix less I / 2
    skew = (normal - normal.mT) / 2
    frequencies, V = torch.linalg.eigh(-1j * skew)  # ascending, in pairs of opposite sign
    frequencies, V = frequencies[states // 2 :], V[:, states // 2 :]
    half = torch.full_like(frequencies, -0.5)
    return torch.complex(half, frequencies), V.mH @ P.to(V.dtype), V.mH @ B.to(V.dtype), V


def s4d_legs(states):
    """S4D-LegS: the diagonal of `legs_nplr`, complex128 (N / 2,).

    Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models",
    arXiv 2206.11893, section 4.

    Examples
    --------
    >>> from pentad.scan import kernels
    >>> kernels.s4d_legs(4).imag.round(decimals=3)
    tensor([0.5570, 4.6030], dtype=torch.float64)
    """
    return legs_nplr(states)[0]


def s4d_inv(states):
    """S4D-Inv: ``-1/2 + i N/pi (N/(2n+1) - 1)``, complex128 (N / 2,) (arXiv 2206.11893, eq. 8).

    Examples
    --------
    >>> from pentad.scan import kernels
    >>> kernels.s4d_inv(4)[0].imag.round(decimals=3)
    tensor(3.8200, dtype=torch.float64)
    """
    states = _even("s4d_inv", states)
    n = torch.arange(states // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), states / math.pi * (states / (2 * n + 1) - 1))


def s4d_lin(states):
    """S4D-Lin: ``-1/2 + i pi n``, complex128 (N / 2,) (arXiv 2206.11893, equation 9).

    Examples
    --------
    >>> from pentad.scan import kernels
    >>> kernels.s4d_lin(4)
    tensor([-0.5000+0.0000j, -0.5000+3.1416j], dtype=torch.complex128)
    """
    n = torch.arange(_even("s4d_lin", states) // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), math.pi * n)


def _count(op, states):
    states = check_integer(op, "states", states)
    if states < 1:
        raise ValueError(f"[{op}] states is {states}, expected 1 or more")
    return states


def _even(op, states):
    states = check_integer(op, "states", states)
    if states < 2 or states % 2:
        raise ValueError(f"[{op}] states is {states}, expected an even number")
    return states
