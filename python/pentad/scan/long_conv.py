# SPDX-License-Identifier: Apache-2.0
"""Convolutions as long as the sequence, by fast Fourier transforms."""

import torch

from pentad.scan._checks import (
    accumulator,
    check_dtype,
    check_one_device,
    check_rank,
    check_tensor,
    parameter,
    promoted,
)


def long_conv(u, kernel, *, D=None, causal=True):
    r"""Convolve each channel with its own kernel of any length, with gradients.

    ``out_t = sum_k kernel_k u_{t-k} + D u_t``, with u before its first step taken as 0: the
    convolutional form of linear state space models (Gu et al. 2022, "Efficiently Modeling Long
    Sequences with Structured State Spaces", arXiv 2111.00396, equation 5), whose kernels
    `pentad.scan.kernels` computes. Without `causal` the kernel has two sides: entry k is at lag
    ``k - K // 2``, so that lag 0 is at ``K // 2``.

    The products are those of ``torch.fft``, over a length with no prime factor above 5 that leaves
    room for both ends; 16-bit inputs are transformed in float32. An entry of the result therefore
    carries roundings of the size of its channel's largest, and what is not finite anywhere in a
    channel is so in all of it. Differentiable any number of times in all three.

    Parameters
    ----------
    u : (B, D, L) float32, bfloat16, float16 or float64
        Of any strides. Under ``torch.autocast`` `u` and `kernel` are taken in the wider dtype.
    kernel : (D, K) float
        In u's dtype, or float32 beside 16-bit `u`. K may be more or less than L.
    D : (D,) float, optional
    causal : bool

    Returns
    -------
    out : (B, D, L)
        In u's dtype.

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes that do not fit together.
    pentad.DeviceError
        For tensors on different devices.

    Examples
    --------
    >>> import torch
    >>> u = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    >>> kernel = torch.tensor([[1.0, 0.5, 0.25]])
    >>> pentad.scan.long_conv(u, kernel).round(decimals=3)
    tensor([[[1.0000, 0.5000, 0.2500, 2.0000]]])
    >>> pentad.scan.long_conv(u, kernel, causal=False).round(decimals=3)
    tensor([[[0.5000, 0.2500, 2.0000, 1.0000]]])
    """
    op = "long_conv"
    check_tensor(op, "u", u)
    check_tensor(op, "kernel", kernel)
    check_one_device(op, ("u", u), kernel=kernel, D=D)
    if torch.is_autocast_enabled("cpu"):
        u, kernel = promoted(u, kernel)
    check_rank(op, "u", u, 3, "(B, D, L)")
    _, dim, length = u.shape
    dtype, wide = u.dtype, accumulator(u.dtype)
    if kernel.dtype != wide:
        check_dtype(op, "kernel", kernel, dtype, "u")
    if kernel.ndim != 2 or kernel.shape[0] != dim or kernel.shape[1] < 1:
        raise ValueError(
            f"[{op}] kernel has shape {tuple(kernel.shape)}, expected ({dim}, K), K at least 1"
        )
    if D is not None:
        D = parameter(op, "D", D, wide, (dim,))

    u = u.to(wide)
    if u.numel() == 0:
        out = u * kernel[:, :1].to(wide)  # so that both have gradients
    else:
        kernel, first = _within_reach(
            kernel.to(wide), 0 if causal else kernel.shape[1] // 2, length
        )
        size = _fast_length(length + kernel.shape[1] - 1)
        spectrum = torch.fft.rfft(u, size) * torch.fft.rfft(kernel, size)
        out = torch.fft.irfft(spectrum, size)[..., first : first + length]
    if D is not None:
        out = torch.addcmul(out, u, D[:, None])
    return out.to(dtype).contiguous()


def _within_reach(kernel, center, length):
    """Those entries that a sequence of this length sees, and where lag 0 is among them."""
    begin = max(0, center - (length - 1))
    return kernel[:, begin : center + length], center - begin


def _fast_length(size):
    """The least number from `size` on with no prime factor above 5."""
    best = 1
    while best < size:
        best *= 2
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            twos = threes
            while twos < size:
                twos *= 2
            best = min(best, twos)
            threes *= 3
        fives *= 5
    return best
