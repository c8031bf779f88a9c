# SPDX-License-Identifier: Apache-2.0
"""Scans with vector states on a CUDA device, against themselves on the CPU. `make test-gpu`."""

import pytest

torch = pytest.importorskip("torch")

from gpu import (  # noqa: E402
    assert_equal,
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

import pentad  # noqa: E402
from pentad import scan  # noqa: E402

pytestmark = needs_gpu

CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 2e-4},
    torch.bfloat16: {"rtol": 3e-2, "atol": 5e-2},
    torch.float16: {"rtol": 5e-3, "atol": 1e-2},
}
dtypes = pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
layouts = pytest.mark.parametrize("by_channel", [False, True])


def draw(*shape, dtype=torch.float32, seed=0, by_channel=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.mT.contiguous().mT if by_channel else x


def scan_inputs(
    dtype, b=2, d=70, length=100, n=16, groups=2, is_complex=False, by_channel=False, seed=0
):
    u, delta, z = (
        draw(b, d, length, dtype=dtype, seed=seed + i, by_channel=by_channel) for i in range(3)
    )
    A = -torch.rand(d, n, generator=torch.Generator().manual_seed(seed))
    if is_complex:
        A = torch.complex(A, draw(d, n, seed=9))
    steps = 2 * length if is_complex else length
    B, C = (draw(b, groups, n, steps, dtype=dtype, seed=seed + i) / 4 for i in (4, 5))
    first = draw(b, d, n, seed=6)
    initial = torch.complex(first, first) if is_complex else first
    return u, delta, A, B, C, draw(d, seed=7), z, draw(d, seed=8), initial


def selective(u, delta, A, B, C, D, z, bias, initial):
    return scan.selective_scan(
        u, delta, A, B, C, D, z, bias, True, initial_state=initial, return_last_state=True
    )


def packed(u, delta, A, B, C, cu_seqlens):
    return scan.selective_scan(
        u, delta, A, B, C, delta_softplus=True, cu_seqlens=cu_seqlens, return_last_state=True
    )


def conv(x, weight, bias, initial):
    return scan.causal_conv1d(
        x, weight, bias, activation="silu", initial_states=initial, return_final_states=True
    )


def conv_inputs(dtype, width=4, by_channel=False, seed=0):
    x = draw(2, 70, 100, dtype=dtype, seed=seed, by_channel=by_channel)
    rest = (70, width), (70,), (2, 70, width - 1)
    return x, *(draw(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(rest, 1))


@dtypes
@layouts
@pytest.mark.parametrize("is_complex", [False, True])
def test_same_results_selective_scan(dtype, by_channel, is_complex):
    inputs = scan_inputs(dtype, is_complex=is_complex, by_channel=by_channel)
    check_results(selective, inputs, **CLOSE[dtype])
    check_gradients(selective, inputs, **CLOSE[dtype])


@dtypes
def test_same_results_packed(dtype):
    u, delta, A, B, C, *_ = scan_inputs(dtype, b=1)
    inputs = u, delta, A, B, C, torch.tensor([0, 3, 3, 70, 100])
    check_results(packed, inputs, **CLOSE[dtype])
    check_gradients(packed, inputs, **CLOSE[dtype])


@dtypes
@layouts
@pytest.mark.parametrize("log_space", [False, True])
def test_same_results_recurrence(dtype, by_channel, log_space):
    def call(a, x, h0):
        return scan.linear_recurrence(a, x, h0, log_space=log_space)

    a = draw(2, 70, 700, dtype=dtype, by_channel=by_channel).abs()
    a = -a if log_space else a.exp().reciprocal()
    inputs = a, draw(2, 70, 700, dtype=dtype, by_channel=by_channel), draw(2, 70, dtype=dtype)
    check_results(call, inputs, **CLOSE[dtype])
    check_gradients(call, inputs, **CLOSE[dtype])


@dtypes
@layouts
@pytest.mark.parametrize("width", [1, 4, 64])
def test_same_results_conv(dtype, by_channel, width):
    inputs = conv_inputs(dtype, width, by_channel)
    check_results(conv, inputs, **CLOSE[dtype])
    check_gradients(conv, inputs, **CLOSE[dtype])


@dtypes
def test_same_results_steps(dtype):
    def call(state, x, dt, A, B, conv_state, weight):
        state, conv_state = state.clone(), conv_state.clone()
        out = scan.selective_state_update(state, x, dt, A, B, B, dt_softplus=True)
        mixed = scan.causal_conv1d_update(x.flatten(1), conv_state, weight, activation="silu")
        return out, mixed, state, conv_state

    shapes = (3, 4, 8, 33), (3, 4, 8), (3, 4, 8), (4, 8, 33), (3, 2, 33), (3, 32, 5), (32, 4)
    state, x, dt, A, B, conv_state, weight = (draw(*shape, dtype=dtype) for shape in shapes)
    inputs = state.float(), x, dt, -A.float().abs(), B, conv_state, weight
    check_results(call, inputs, **CLOSE[dtype])


@pytest.mark.parametrize(
    ("b", "d", "length", "n"), [(1, 64, 5000, 16), (8, 1536, 500, 16), (2, 300, 900, 50)]
)
def test_larger(b, d, length, n):
    inputs = scan_inputs(torch.float32, b, d, length, n, groups=1)
    check_results(selective, inputs, rtol=1e-3, atol=2e-3)
    check_repeats(selective, inputs)


def test_streams_and_graphs():
    for call, make in ((selective, scan_inputs), (conv, conv_inputs)):
        first, second = make(torch.float32, seed=1), make(torch.float32, seed=20)
        check_streams(call, first, second, **CLOSE[torch.float32])
        check_captured(call, first, second, **CLOSE[torch.float32])


def test_lists_out_of_range_harm_nothing():
    u, delta, A, B, C, *_ = on_gpu(scan_inputs(torch.float32, b=1))
    wrong = torch.tensor([0, 90, -7, 10**12], device="cuda")
    out, last = packed(u, delta, A, B, C, wrong)
    torch.cuda.synchronize()
    assert_equal(torch.tensor([*out.shape, *last.shape]), torch.tensor([*u.shape, 3, *A.shape]))


def test_devices():
    check_mixed_devices(conv, conv_inputs(torch.float32))
    with pytest.raises(pentad.DeviceError, match="float64"):
        conv(*on_gpu(conv_inputs(torch.float64)))


@needs_two_gpus
def test_two_devices():
    check_two_devices(selective, scan_inputs(torch.float32), **CLOSE[torch.float32])
