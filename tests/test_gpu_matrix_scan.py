# SPDX-License-Identifier: Apache-2.0
"""Recurrences of matrix states on a CUDA device, against themselves on the CPU. `make test-gpu`."""

import pytest
from gpu import (
    check_captured,
    check_gradients,
    check_mixed_devices,
    check_repeats,
    check_results,
    check_streams,
    check_two_devices,
    needs_gpu,
    needs_two_gpus,
    on_gpu,
)

import pentad
from pentad import scan

torch = pytest.importorskip("torch")
pytestmark = needs_gpu

TOLERANCE = {
    "float32": {"rtol": 1e-4, "atol": 1e-4},
    "bfloat16": {"rtol": 2e-2, "atol": 2e-2},
    "float16": {"rtol": 4e-3, "atol": 4e-3},
}
SIZES = [(2, 1, 2, 1, 3, 5), (2, 65, 4, 2, 64, 64), (1, 200, 3, 3, 130, 70), (1, 70, 1, 1, 300, 9)]


def inputs(size, dtype="float32", decay="head"):
    """q, k, v, beta, decay; keys of length 1, as the delta rule wants them."""
    batch, length, heads, groups, keys, values = size
    wide = getattr(torch, dtype)
    q, k = (torch.randn(batch, length, groups, keys) for _ in range(2))
    k = torch.nn.functional.normalize(k, dim=-1)
    v = torch.randn(batch, length, heads, values)
    beta = torch.rand(batch, length, heads)
    shape = {"head": (batch, length, heads), "key": (batch, length, heads, keys)}.get(decay)
    a = None if shape is None else 0.8 + 0.2 * torch.rand(shape)
    if a is not None:
        a.flatten()[::17] = 0.0  # exact, without a logarithm
    return q.to(wide), k.to(wide), v.to(wide), beta, a


def attention(q, k, v, beta, decay, **options):
    return scan.linear_attention(
        q, k, v, decay=decay, scale=0.3, return_final_state=True, **options
    )


def delta(q, k, v, beta, decay, **options):
    return scan.delta_rule(q, k, v, beta, decay=decay, return_final_state=True, **options)


def mamba(x, dt, A, B, C, D, **options):
    return scan.ssd(x, dt, A, B, C, D=D, dt_softplus=True, return_final_states=True, **options)


@pytest.mark.parametrize("call", [attention, delta])
@pytest.mark.parametrize("decay", [None, "head", "key"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_same_results(call, decay, dtype, size):
    torch.manual_seed(0)
    check_results(call, inputs(size, dtype, decay), **TOLERANCE[dtype])


@pytest.mark.parametrize("call", [attention, delta])
@pytest.mark.parametrize("decay", [None, "head", "key"])
@pytest.mark.parametrize("size", SIZES)
def test_same_results_of_gradients(call, decay, size):
    torch.manual_seed(0)
    check_gradients(call, inputs(size, decay=decay), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reverse", [False, True])
def test_same_results_ssd(reverse):
    torch.manual_seed(0)
    x, A, D = torch.randn(2, 130, 14, 24), -torch.rand(14), torch.randn(14)
    B, C = (torch.randn(2, 130, 2, 40) for _ in range(2))
    dt = torch.randn(2, 130, 14)

    def call(*tensors):
        return mamba(*tensors, reverse=reverse)

    check_results(call, (x, dt, A, B, C, D), rtol=1e-4, atol=1e-4)
    check_gradients(call, (x, dt, A, B, C, D), rtol=1e-3, atol=1e-3)


def test_same_results_packed():
    torch.manual_seed(0)
    ends = torch.tensor([0, 3, 3, 130, 200], dtype=torch.int32)

    def call(*tensors):
        return delta(*tensors[:-1], cu_seqlens=tensors[-1])

    check_results(call, (*inputs(SIZES[2]), ends), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", ["head", "key"])
def test_same_results_steps(decay):
    torch.manual_seed(0)
    q, k, v, beta, a = (t[:, 0] for t in inputs((4, 1, 6, 2, 40, 70), decay=decay))
    rows = torch.tensor([2, -1, 0, 4])

    def call(state, *tensors):
        state = state.clone()
        *tensors, where = tensors
        out = scan.delta_rule_update(
            state, *tensors[:4], decay=tensors[4], state_batch_indices=where
        )
        return out, state

    check_results(call, (torch.randn(5, 6, 40, 70), q, k, v, beta, a, rows), rtol=1e-4, atol=1e-4)


def test_what_a_device_promises():
    torch.manual_seed(0)
    first, second = (inputs((1, 300, 4, 2, 64, 64)) for _ in range(2))
    for call in (attention, delta):
        check_repeats(call, first)
        check_streams(call, first, second, rtol=1e-4, atol=1e-4)
        check_captured(call, first, second, rtol=1e-4, atol=1e-4)
    check_mixed_devices(delta, first)


@needs_two_gpus
def test_two_devices():
    check_two_devices(delta, inputs(SIZES[1]), rtol=1e-4, atol=1e-4)


def test_float64_has_no_kernel():
    q = torch.zeros(1, 2, 1, 3, dtype=torch.float64)
    with pytest.raises(pentad.DeviceError, match="float64"):
        scan.linear_attention(*(on_gpu(q) for _ in range(3)))
