# SPDX-License-Identifier: Apache-2.0
"""The sparse functions on a CUDA device, against themselves on the CPU. `make test-gpu`."""

import functools

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
from pentad import sparse as S

torch = pytest.importorskip("torch")
pytestmark = needs_gpu

WIDTHS = ("float32", "bfloat16", "float16")
TOLERANCE = {
    "float32": {"rtol": 1e-4, "atol": 1e-5},
    "bfloat16": {"rtol": 2e-2, "atol": 2e-2},
    "float16": {"rtol": 4e-3, "atol": 4e-3},
}

# --- The SPLADE head ------------------------------------------------------------------------------


def head(rng, b=4, length=19, dim=48, vocab=300, dtype="float32"):
    """hidden, weight, bias, mask; the first sequence has no token."""
    mask = torch.from_numpy(rng.random((b, length)) < 0.6)
    mask[0] = False
    arrays = (rng.standard_normal(shape) for shape in ((b, length, dim), (vocab, dim), (vocab,)))
    hidden, weight, bias = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in arrays)
    return hidden, weight / dim**0.5, bias, mask


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("size", [(2, 3, 5, 7), (3, 200, 64, 513), (40, 9, 1100, 20)])
def test_same_results_splade_head(rng, dtype, pooling, size):
    call = functools.partial(S.splade_head, pooling=pooling)
    inputs = head(rng, *size, dtype=dtype)
    check_results(call, inputs, **TOLERANCE[dtype])
    if dtype == "float32":  # a near tie in fewer bits may go to another token
        check_gradients(call, inputs, rtol=1e-3, atol=1e-4)


def test_same_results_splade_head_of_any_strides(rng):
    hidden, weight, bias, mask = head(rng)
    turned = hidden.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T
    check_results(S.splade_head, (*turned, bias[::2].repeat_interleave(2), mask), rtol=1e-4)


def test_splade_head_repeats_and_runs_anywhere(rng):
    first, second = head(rng), head(rng)
    check_repeats(S.splade_head, first)
    check_streams(S.splade_head, first, second, **TOLERANCE["float32"])
    check_captured(S.splade_head, first, second, **TOLERANCE["float32"])
    check_mixed_devices(S.splade_head, first)
    with pytest.raises(pentad.DeviceError, match="float64"):
        S.splade_head(*(x.double() for x in on_gpu(first)[:3]))


def test_a_mask_of_other_numbers_gives_nan(rng):
    hidden, weight, bias, mask = on_gpu(head(rng))
    mask = mask.float()
    mask[1, 2] = 0.5
    out = S.splade_head(hidden, weight, bias, mask)
    assert out[1].isnan().all()
    assert not out[2:].isnan().any()


@needs_two_gpus
def test_two_devices(rng):
    check_two_devices(S.splade_head, head(rng), **TOLERANCE["float32"])


def test_large_heads(rng):
    """More than one tile of everything, against torch on the device."""
    hidden, weight, bias, mask = on_gpu(head(rng, 8, 300, 768, 30522, "bfloat16"))
    got = S.splade_head(hidden, weight, bias, mask)
    for b in range(8):
        logits = hidden[b].float() @ weight.float().T + bias.float()
        want = torch.log1p(logits.relu())[mask[b]]
        want = want.amax(0) if len(want) else torch.zeros(30522, device="cuda")
        torch.testing.assert_close(got[b].float(), want, rtol=2e-2, atol=2e-2)
