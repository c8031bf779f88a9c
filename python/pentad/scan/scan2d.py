# SPDX-License-Identifier: Apache-2.0
"""Selective scans over images: in several orders, and along both axes at once."""

import torch

from pentad.scan import scan2d_autograd
from pentad.scan._checks import (
    accumulator,
    check_devices,
    check_dtype,
    check_integers,
    check_rank,
    check_shape,
    check_tensor,
    parameter,
    promoted,
)

_INPUTS = ("delta", "B", "C")


def scan2d(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    *,
    delta_bias=None,
    delta_softplus=False,
    order="cross",
    by_step=(),
):
    r"""Selective scans of an image in several orders, summed place by place, with gradients.

    Direction k visits place ``order[k, t]`` at step t and runs `selective_scan` over what it finds,
    with parameters of its own; the result at a place is the sum of what all directions give there.
    With order "cross" this is SS2D, the cross-scan and cross-merge of Liu et al. 2024, "VMamba:
    Visual State Space Model", arXiv 2401.10166, section 4.2; with "snake" the continuous scan of
    Yang et al. 2024, "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", arXiv
    2403.17695, section 3.2. Neither the image nor the results are ever laid out in scan order.
    Sums are float32 (float64 for float64), rounded once. The bits of the result do not depend on
    the number of threads. Differentiable once in every floating argument.

    Parameters
    ----------
    u : (B, D, H, W) float32, bfloat16, float16 or float64
        Of any strides, as are all others, but what cannot be viewed as (B, D, H * W) is copied.
        Under ``torch.autocast`` `u`, `delta`, `B` and `C` are taken in the widest dtype among them.
    delta : (B, K, D, H, W) or (B, K, D, L)
        Of K directions, in u's dtype; L is H * W.
    A : (K, D, N) or (K * D, N) float32
        Other real floats are converted; float64 only with float64 `u`.
    B, C : (B, K, N, H, W) or (B, K, N, L)
        In u's dtype.
    D, delta_bias : (K, D) or (K * D,) float, optional
    delta_softplus : bool
    order : "cross", "snake" or (K, L) int32 or int64
        Which place ``h * W + w`` comes at each step. "cross": rows, columns, and both backwards.
        "snake": rows of which every second runs backwards, columns likewise, and both backwards.
    by_step : tuple of names among "delta", "B" and "C"
        Those whose element t belongs to step t of their direction. The others lie as the image
        does: their element at a place belongs to the step that visits it. VMamba computes them from
        the image in scan order, which comes to the same but for its layout: name all three.
        PlainMamba's released code computes them from the image as it lies and does not put them in
        order: name all three as well.

    Returns
    -------
    out : (B, D, H, W)
        In u's dtype; the channels are next to each other in memory if those of `u` are.

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes that do not fit together; an `order` whose rows are no permutations.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative, or one of forward mode.

    Examples
    --------
    >>> import torch
    >>> u = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> delta, A = torch.ones(1, 4, 1, 2, 2), torch.zeros(4, 1, 1)  # no decay: running sums
    >>> pentad.scan.scan2d(u, delta, A, delta, delta)  # four of them, and u is in each
    tensor([[[[22., 24.], [26., 28.]]]])
    """
    op = "scan2d"
    check_tensor(op, "u", u)
    check_rank(op, "u", u, 4, "(B, D, H, W)")
    check_devices(op, ("u", u), delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias, order=order)
    if torch.is_autocast_enabled("cpu"):
        u, delta, B, C = promoted(u, delta, B, C)
    batch, dim, height, width = u.shape
    length, wide = height * width, accumulator(u.dtype)
    if isinstance(by_step, str):
        raise TypeError(f"[{op}] by_step is {by_step!r}, expected a tuple of names")
    for name in by_step:
        if name not in _INPUTS:
            raise ValueError(f'[{op}] by_step has {name!r}, expected "delta", "B" or "C"')
    A = _of_directions(op, "A", A, dim, wide)
    directions, _, states = A.shape
    order = _orders(op, order, directions, height, width, u.device)
    delta = _of_places(op, "delta", delta, u, (batch, directions, dim))
    B = _of_places(op, "B", B, u, (batch, directions, states))
    C = _of_places(op, "C", C, u, (batch, directions, states))
    D, delta_bias = (
        t if t is None else _vector_of_directions(op, name, t, directions, dim, wide)
        for name, t in (("D", D), ("delta_bias", delta_bias))
    )
    out = scan2d_autograd.cross_scan(
        u.reshape(batch, dim, length), delta, A, B, C, D, delta_bias, order,
        bool(delta_softplus), [name in by_step for name in _INPUTS],
    )  # fmt: skip
    return out.unflatten(2, (height, width))


def cross_order(height, width, device=None):
    """The places by rows, by columns, and both backwards: (4, L)."""
    places = torch.arange(height * width, device=device).view(height, width)
    forwards = torch.stack([places.flatten(), places.mT.flatten()])
    return torch.cat([forwards, forwards.flip(1)])


def snake_order(height, width, device=None):
    """The places by rows and by columns, every second one backwards; and both backwards: (4, L)."""

    def snake(lines):
        odd = (torch.arange(lines.shape[0], device=device) % 2).bool()[:, None]
        return torch.where(odd, lines.flip(1), lines).flatten()

    places = torch.arange(height * width, device=device).view(height, width)
    forwards = torch.stack([snake(places), snake(places.mT)])
    return torch.cat([forwards, forwards.flip(1)])


def _orders(op, order, directions, height, width, device):
    if isinstance(order, str):
        if order not in ("cross", "snake"):
            raise ValueError(f'[{op}] order is {order!r}, expected "cross", "snake" or a tensor')
        if directions != 4:
            raise ValueError(f'[{op}] A has {directions} directions but order "{order}" has 4')
        make = cross_order if order == "cross" else snake_order
        return make(height, width, device)
    check_integers(op, "order", order, (directions, height * width))
    return order


def _of_directions(op, name, tensor, dim, wide):
    """A as (K, D, N)."""
    check_tensor(op, name, tensor)
    shape = tensor.shape
    fits = (
        (len(shape) == 3 and shape[1] == dim) or (len(shape) == 2 and dim and shape[0] % dim == 0)
    ) and shape[-1] >= 1
    if not fits:
        raise ValueError(
            f"[{op}] {name} has shape {tuple(shape)}, expected (K, {dim}, N) or (K * {dim}, N), "
            "N at least 1"
        )
    if len(shape) == 2:
        tensor = tensor.unflatten(0, (shape[0] // dim, dim))
    return parameter(op, name, tensor, wide, tensor.shape)


def _vector_of_directions(op, name, tensor, directions, dim, wide):
    check_tensor(op, name, tensor)
    check_shape(op, name, tensor, (directions, dim), (directions * dim,))
    tensor = parameter(op, name, tensor, wide, tensor.shape)
    return tensor.reshape(directions, dim)


def _of_places(op, name, tensor, u, outer):
    """(..., H, W) or (..., L) as (..., L)."""
    check_tensor(op, name, tensor)
    check_dtype(op, name, tensor, u.dtype, "u")
    height, width = u.shape[2:]
    check_shape(op, name, tensor, (*outer, height, width), (*outer, height * width))
    return tensor.reshape(*outer, height * width)


def scan2d_wavefront(u, delta, A, B, C, D=None):
    r"""The two-axis selective scan of an image: each state has two predecessors, with gradients.

    With axis 0 leading from the left and axis 1 from the top, per channel and state ``h_ij =
    (left_ij + top_ij) / 2``, ``left_ij = exp(delta_0 A_0) h_i,j-1 + delta_0 B_0 u``, ``top_ij =
    exp(delta_1 A_1) h_i-1,j + delta_1 B_1 u``, all at (i, j), and ``out_ij = sum_n C_ij h_ij + D
    u_ij``. In the first row, the corner included, h is `left`; in the first column below it,
    `top` (Baty et al. 2024, "Mamba2D: A Natively Multi-Dimensional State-Space Model for Vision
    Tasks", arXiv 2412.16146, section 3.2). Sums are float32 (float64 for float64). The backward
    pass keeps the states of every eighth row and recomputes the others. The bits of the result do
    not depend on the number of threads. Differentiable once in every argument.

    Parameters
    ----------
    u : (B, D, H, W) float32, bfloat16, float16 or float64
        Of any strides, as are all others, but what cannot be viewed as (B, D, H * W) is copied.
        Under ``torch.autocast`` `u`, `delta`, `B` and `C` are taken in the widest dtype among them.
    delta : (B, 2, D, H, W)
        In u's dtype; as it is, without bias or softplus.
    A : (2, D, N) float32
        Other real floats are converted; float64 only with float64 `u`.
    B : (B, 2, N, H, W)
        In u's dtype.
    C : (B, N, H, W)
        In u's dtype.
    D : (D,) float, optional

    Returns
    -------
    out : (B, D, H, W)
        In u's dtype; the channels are next to each other in memory if those of `u` are.

    Raises
    ------
    TypeError
        For what is no tensor, or has another dtype.
    ValueError
        For sizes that do not fit together.
    pentad.DeviceError
        For tensors on different devices, or on one without a kernel.
    RuntimeError
        For a second derivative, or one of forward mode.

    Examples
    --------
    >>> import torch
    >>> u = torch.tensor([[[[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]])
    >>> ones, A = torch.ones(1, 2, 1, 2, 3), torch.zeros(2, 1, 1)  # no decay
    >>> pentad.scan.scan2d_wavefront(u, ones, A, ones, ones[:, 0])
    tensor([[[[4., 4., 4.], [4., 4., 4.]]]])
    """
    op = "scan2d_wavefront"
    check_tensor(op, "u", u)
    check_rank(op, "u", u, 4, "(B, D, H, W)")
    check_devices(op, ("u", u), delta=delta, A=A, B=B, C=C, D=D)
    if torch.is_autocast_enabled("cpu"):
        u, delta, B, C = promoted(u, delta, B, C)
    batch, dim, height, width = u.shape
    wide = accumulator(u.dtype)
    check_tensor(op, "A", A)
    if A.ndim != 3 or A.shape[:2] != (2, dim) or A.shape[2] < 1:
        raise ValueError(
            f"[{op}] A has shape {tuple(A.shape)}, expected (2, {dim}, N), N at least 1"
        )
    A = parameter(op, "A", A, wide, A.shape)
    for name, tensor, outer in (
        ("delta", delta, (batch, 2, dim)),
        ("B", B, (batch, 2, A.shape[2])),
        ("C", C, (batch, A.shape[2])),
    ):
        check_tensor(op, name, tensor)
        check_dtype(op, name, tensor, u.dtype, "u")
        check_shape(op, name, tensor, (*outer, height, width))
    if D is not None:
        D = parameter(op, "D", D, wide, (dim,))
    u, delta, B, C = (t.reshape(*t.shape[:-2], height * width) for t in (u, delta, B, C))
    out = scan2d_autograd.wavefront(u, delta, A, B, C, D, width)
    return out.unflatten(2, (height, width))
