# SPDX-License-Identifier: Apache-2.0
"""What the functions refuse, in one wording: op, argument, what came, what is accepted."""

import operator

import torch

from pentad import _C
from pentad._errors import DeviceError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
_INTEGERS = (torch.int32, torch.int64)
MAX_WIDTH = 64  # of a convolution


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def accumulator(dtype):
    """The dtype of states and small operands: float64 beside float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def real_of(dtype):
    if dtype == torch.complex64:
        return torch.float32
    return torch.float64 if dtype == torch.complex128 else dtype


def complex_of(dtype):
    return torch.complex128 if dtype in (torch.float64, torch.complex128) else torch.complex64


def check_tensor(op, name, tensor, dtypes=FLOATS):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"[{op}] {name} is {type(tensor).__name__}, expected a torch tensor")
    if tensor.dtype not in dtypes:
        *names, last = (name_of(dtype) for dtype in dtypes)
        raise TypeError(
            f"[{op}] {name} has dtype {name_of(tensor.dtype)}, "
            f"expected {', '.join(names)}{' or ' if names else ''}{last}"
        )


def check_dtype(op, name, tensor, dtype, whose):
    if tensor.dtype != dtype:
        raise TypeError(
            f"[{op}] {name} has dtype {name_of(tensor.dtype)} but {whose} has {name_of(dtype)}, "
            "expected one dtype"
        )


def check_shape(op, name, tensor, *accepted):
    shape = tensor.shape
    for expected in accepted:  # size by size, as symbolic ones are compared
        if len(shape) == len(expected) and all(map(operator.eq, shape, expected)):
            return
    shapes = " or ".join(f"{expected}" for expected in accepted)
    raise ValueError(f"[{op}] {name} has shape {tuple(shape)}, expected {shapes}")


def check_rank(op, name, tensor, rank, letters):
    if tensor.ndim != rank:
        raise ValueError(f"[{op}] {name} has shape {tuple(tensor.shape)}, expected {letters}")


def check_one_device(op, first, **others):
    """One device for all; `first` is (name, tensor)."""
    name, tensor = first
    device = tensor.device
    for other, t in others.items():
        if isinstance(t, torch.Tensor) and t.device != device:
            raise DeviceError(f"[{op}] {other} is on {t.device} but {name} is on {device}")


def check_devices(op, first, **others):
    """One device for all, and one that has a kernel; `first` is (name, tensor)."""
    check_one_device(op, first, **others)
    device = first[1].device
    if device.type not in ("cpu", "meta"):
        raise DeviceError(f"[{op}] there is no {device.type} kernel, only a CPU one")


def check_cuda_devices(op, first, **others):
    """`check_devices` of an operation that has CUDA kernels."""
    check_one_device(op, first, **others)
    device = first[1].device.type
    if device == "cuda" and not _C.cuda_built():
        raise DeviceError(f"[{op}] there is no cuda kernel in this build of pentad, only CPU ones")
    if device not in ("cpu", "cuda", "meta"):
        raise DeviceError(f"[{op}] there is no {device} kernel, only CPU and CUDA ones")


def autocasts(tensor):
    """Whether autocast is on where `tensor` is; what is no tensor counts as the CPU's."""
    return torch.is_autocast_enabled("cuda" if getattr(tensor, "is_cuda", False) else "cpu")


def check_integers(op, name, tensor, shape, dtypes=_INTEGERS):
    check_tensor(op, name, tensor, dtypes)
    check_shape(op, name, tensor, shape)


def check_cu_seqlens(op, name, batch, cu_seqlens):
    """The number of sequences; the extension looks at the contents."""
    check_tensor(op, "cu_seqlens", cu_seqlens, _INTEGERS)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"[{op}] cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (S + 1,)"
        )
    if batch != 1:
        raise ValueError(f"[{op}] {name} has batch {batch}, expected 1 with cu_seqlens")
    return cu_seqlens.shape[0] - 1


def parameter(op, name, tensor, dtype, shape, *, whose="u"):
    """A real parameter of this shape in `dtype`, which only float64 does not become silently."""
    check_tensor(op, name, tensor)
    check_shape(op, name, tensor, shape)
    if tensor.dtype == dtype:
        return tensor
    if tensor.dtype == torch.float64:
        raise TypeError(f"[{op}] {name} has dtype float64, expected it only where {whose} has it")
    return tensor.to(dtype)


def weights(op, weight, bias, dtype, dim):
    """Of a convolution: checked, and float64 beside float64."""
    check_tensor(op, "weight", weight)
    if weight.ndim != 2 or weight.shape[0] != dim:
        raise ValueError(f"[{op}] weight has shape {tuple(weight.shape)}, expected ({dim}, W)")
    if not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(f"[{op}] weight has width {weight.shape[1]}, expected 1 to {MAX_WIDTH}")
    if dtype == torch.float64 or weight.dtype == torch.float64:
        weight = parameter(op, "weight", weight, accumulator(dtype), weight.shape, whose="x")
    if bias is not None:
        check_tensor(op, "bias", bias)
        check_shape(op, "bias", bias, (dim,))
        if dtype == torch.float64 or bias.dtype == torch.float64:
            bias = parameter(op, "bias", bias, accumulator(dtype), (dim,), whose="x")
    return weight, bias


def check_number(op, name, value):
    """The value as a float."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"[{op}] {name} is {type(value).__name__}, expected a number") from None


def check_integer(op, name, value):
    """The value as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"[{op}] {name} is {type(value).__name__}, expected an int") from None


def promoted(*tensors):
    """Under autocast: all in the widest dtype among them, so that nothing is rounded."""
    widest = None
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            real = real_of(tensor.dtype)
            widest = real if widest is None else torch.promote_types(widest, real)
    return tuple(
        t if not isinstance(t, torch.Tensor) or real_of(t.dtype) == widest
        else t.to(complex_of(widest) if t.is_complex() else widest)
        for t in tensors
    )  # fmt: skip


def check_state_update(op, state, x, dt, A, B, C, D, z, dt_bias, rows):
    """All that the step of a scan must have in common."""
    check_tensor(op, "state", state, (*FLOATS, *COMPLEX))
    check_tensor(op, "x", x)
    check_tensor(op, "A", A, (*FLOATS, *COMPLEX))
    check_cuda_devices(
        op, ("x", x), state=state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias,
        state_batch_indices=rows,
    )  # fmt: skip
    if state.ndim not in (3, 4):
        raise ValueError(
            f"[{op}] state has shape {tuple(state.shape)}, expected (S, P, N) or (S, H, P, N)"
        )
    if state.is_complex() != A.is_complex():
        raise TypeError(
            f"[{op}] state has dtype {name_of(state.dtype)} but A has {name_of(A.dtype)}, "
            "expected both real or both complex"
        )
    if (real_of(state.dtype) == torch.float64) != (x.dtype == torch.float64):
        check_dtype(op, "state", state, x.dtype, "x")
    *heads, states = state.shape[1:]
    batch = x.shape[0] if x.ndim else 0
    check_shape(op, "x", x, (batch, *heads))
    for name, tensor in (("dt", dt), ("z", z)):
        if tensor is not None or name == "dt":
            check_tensor(op, name, tensor)
            check_dtype(op, name, tensor, x.dtype, "x")
            check_shape(op, name, tensor, x.shape)
    check_shape(op, "A", A, (*heads, states))
    if real_of(A.dtype) == torch.float64 != x.dtype:
        raise TypeError(
            f"[{op}] A has dtype {name_of(A.dtype)}, expected it only where x has float64"
        )
    groups = B.shape[1] if isinstance(B, torch.Tensor) and B.ndim == 3 else 1
    for name, tensor in (("B", B), ("C", C)):
        check_tensor(op, name, tensor, (*FLOATS, *COMPLEX) if A.is_complex() else FLOATS)
        if not tensor.is_complex():
            check_dtype(op, name, tensor, x.dtype, "x")
        check_shape(op, name, tensor, (batch, groups, states), *[(batch, states)] * (groups == 1))
    if groups < 1 or heads[0] % groups:
        what = "heads" if len(heads) == 2 else "channels"
        raise ValueError(
            f"[{op}] B has {groups} groups but {heads[0]} {what} are not a multiple of {groups}"
        )
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        if tensor is not None:
            parameter(op, name, tensor, accumulator(x.dtype), tuple(heads), whose="x")
    check_rows(op, "state_batch_indices", rows, batch, "state", state)


def check_conv_update(op, x, state, weight, bias, positions, rows):
    """All that further steps of a convolution must have in common."""
    check_tensor(op, "x", x)
    check_tensor(op, "conv_state", state)
    check_cuda_devices(
        op, ("x", x), conv_state=state, weight=weight, bias=bias, cache_seqlens=positions,
        conv_state_indices=rows,
    )  # fmt: skip
    check_dtype(op, "conv_state", state, x.dtype, "x")
    if x.ndim not in (2, 3):
        raise ValueError(f"[{op}] x has shape {tuple(x.shape)}, expected (B, D) or (B, D, L)")
    batch, dim = x.shape[:2]
    weights(op, weight, bias, x.dtype, dim)
    width = weight.shape[1]
    if state.ndim != 3 or state.shape[1] != dim or state.shape[2] < width - 1:
        raise ValueError(
            f"[{op}] conv_state has shape {tuple(state.shape)}, "
            f"expected (S, {dim}, M) with M at least {width - 1}"
        )
    if positions is not None:
        check_integers(op, "cache_seqlens", positions, (batch,))
    check_rows(op, "conv_state_indices", rows, batch, "conv_state", state)


def check_rows(op, name, rows, batch, state_name, state):
    """Where a batch finds its rows in a cache."""
    if rows is not None:
        check_integers(op, name, rows, (batch,))
    elif state.shape[0] != batch:
        raise ValueError(
            f"[{op}] {state_name} has {state.shape[0]} rows for a batch of {batch}, "
            f"which needs {name}"
        )
