# SPDX-License-Identifier: Apache-2.0
"""`attention` on a CUDA device: errors against the definition in float64, as on the CPU.

`make test-gpu`.
"""

import copy
import itertools

import pytest

torch = pytest.importorskip("torch")

from attention_cases import (  # noqa: E402
    DTYPES,
    OPTIONS,
    Case,
    Sizes,
    assert_as_close,
    dtype_name,
)
from gpu import (  # noqa: E402
    check_captured,
    check_mixed_devices,
    check_repeats,
    check_streams,
    check_two_devices,
    here,
    needs_gpu,
    needs_two_gpus,
    on_gpu,
)

import pentad  # noqa: E402
from pentad.attention import BlockMask, attention, reference  # noqa: E402

pytestmark = needs_gpu
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
TOLERANCE = {"rtol": 2e-2, "atol": 2e-2}  # of bf16 against the CPU's bf16


def check(case):
    """As attention_cases.check, with the case on the device."""
    there = copy.copy(case)
    there.inputs, there.options, there.upstream = (
        on_gpu(part) for part in (case.inputs, case.options, case.upstream)
    )
    for mass in (False, True):
        ours = here(there.results(mass=mass))
        plain = case.results(reference.attention, mass=mass)
        exact = case.results(reference.attention, torch.float64, mass=mass)
        for name, got in ours.items():
            factor = 3 if name[0] == "d" else 2
            assert_as_close(name, got, plain[name], exact[name], factor, case.dtype)


@dtypes
@pytest.mark.parametrize("name", OPTIONS)
def test_same_results_of_each_option(dtype, name):
    check(Case(dtype, names=[name]))


@dtypes
@pytest.mark.parametrize("names", list(itertools.combinations(OPTIONS, 2)), ids="-".join)
def test_pairs_of_options(dtype, names):
    check(Case(dtype, names=names))


@dtypes
@pytest.mark.parametrize("names", [[], ["causal"], ["window"], ["softcap", "sink"]])
def test_same_results_of_packed_sequences(dtype, names):
    q_lengths, k_lengths = [70, 0, 1, 33, 0, 5], [150, 4, 90, 20, 0, 0]
    sizes = Sizes(1, 4, 2, sum(q_lengths), sum(k_lengths), 24, 16)
    case = Case(dtype, sizes, names)
    case.inputs = {n: x[0].transpose(0, 1) for n, x in case.inputs.items()}
    case.upstream = [case.upstream[0][0].transpose(0, 1), *(u[0] for u in case.upstream[1:])]
    for name, lengths in (("cu_seqlens_q", q_lengths), ("cu_seqlens_k", k_lengths)):
        case.options[name] = torch.tensor([0, *lengths]).cumsum(0)
    case.options["cu_seqlens_q"] = case.options["cu_seqlens_q"].int()
    check(case)


@dtypes
@pytest.mark.parametrize("dim", [1, 40, 64, 80, 128, 192, 256, 300, 512])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(dtype, dim, causal):
    check(Case(dtype, Sizes(1, 4, 2, 150, 300, dim, dim), causal=causal))
    check(Case(dtype, Sizes(1, 2, 1, 70, 130, dim, 96), causal=causal))


@dtypes
@pytest.mark.parametrize(("sq", "sk"), [(1, 3000), (1000, 1000), (333, 65), (65, 2049)])
def test_lengths(dtype, sq, sk):
    check(Case(dtype, Sizes(2, 4, 2, sq, sk, 64, 64), causal=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("dim", [64, 128])
def test_long_sequences_against_sdpa(dtype, dim):
    q, k, v, d = (torch.randn(2, 8, 4096, dim, device="cuda", dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for function in (
        lambda: attention(q, k, v, causal="top_left"),
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    ):
        out = function()
        results.append([out, *torch.autograd.grad(out, leaves, d)])
    for got, want in zip(*results, strict=True):
        error = (got.float() - want.float()).abs().max()
        assert error <= 3e-2 * want.float().abs().max()


def operands(seed, sq=200, dim=64, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, h, sq, dim, generator=draw).to(dtype) for h in (4, 2, 2))


def forward_and_backward(q, k, v):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse, mass = attention(*leaves, causal=True, return_lse=True, return_key_mass=True)
    grads = torch.autograd.grad((out, lse, mass), leaves, (out.detach(), lse.detach(), mass))
    return out.detach(), lse.detach(), mass.detach(), grads


def test_results_repeat():
    check_repeats(forward_and_backward, operands(0, 1000))


def test_streams():
    check_streams(forward_and_backward, operands(0), operands(1), **TOLERANCE)


def test_graph_capture():
    def call(q, k, v):
        return attention(q, k, v, causal=True)

    check_captured(call, operands(0), operands(1), **TOLERANCE)


def test_compiled():
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    there = on_gpu(operands(0))
    assert torch.equal(compiled(*there), attention(*there))


def test_a_block_mask_is_copied_once():
    mask = BlockMask.sliding_window(200, window=(30, 0))
    there = on_gpu(operands(0))
    first = attention(*there, block_mask=mask)
    assert torch.equal(first, attention(*there, block_mask=mask))
    assert list(mask._copies) == [there[0].device]


def test_devices_may_not_mix():
    check_mixed_devices(attention, operands(0))
    check_mixed_devices(lambda q, k, v, sink: attention(q, k, v, sink=sink),
                        (*operands(0), torch.zeros(4)))  # fmt: skip


def test_float64_has_no_kernel():
    with pytest.raises(pentad.DeviceError, match="float64"):
        attention(*on_gpu(operands(0, dtype=torch.float64)))


@needs_two_gpus
def test_two_devices():
    check_two_devices(forward_and_backward, operands(0), **TOLERANCE)
