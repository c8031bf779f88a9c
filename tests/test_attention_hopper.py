# SPDX-License-Identifier: Apache-2.0
"""Hopper's kernels through `attention`: on such a device, or executed on the CPU.

`make test-gpu`, `make test-cuda-host`.
"""

import pytest

import pentad

torch = pytest.importorskip("torch")

from pentad.attention import attention, reference  # noqa: E402

ON_DEVICE = (
    pentad._C.cuda_built()
    and torch.cuda.is_available()
    and torch.cuda.get_device_capability() == (9, 0)
)
DEVICE = "cuda" if ON_DEVICE else "cpu"
pytestmark = pytest.mark.skipif(
    not ON_DEVICE and not pentad._C.cuda_on_host, reason="no device with Hopper's instructions"
)


@pytest.fixture
def hopper():
    """Turns the kernels on and off."""
    yield pentad._C.attention_want_hopper
    pentad._C.attention_want_hopper(False)


def results(function, q, k, v, upstream, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves, return_lse=True, **options)
    (out.double() * upstream).sum().add(lse.double().sum()).backward()
    return [x.detach() for x in (out, lse, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (50, 0)}])
def test_as_right_as_the_other_kernels(hopper, dtype, dim, options):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    # (B, S, H, D) in memory, and strides of (B, H, S, D).
    q, upstream = (draw(1, 150, 2, dim).transpose(1, 2) for _ in range(2))
    k, v = (draw(1, 200, 1, dim).transpose(1, 2) for _ in range(2))
    others = results(attention, q, k, v, upstream, **options)
    hopper(True)
    ours = results(attention, q, k, v, upstream, **options)
    exact = (x.cpu().double() for x in (q, k, v, upstream))
    exact = results(reference.attention, *exact, **options)
    assert not torch.equal(ours[1], others[1])  # the sums of lse have another order
    for got, other, want in zip(ours, others, exact, strict=True):
        got, other = (x.cpu().double() for x in (got, other))
        assert (got - want).abs().max() <= 2 * (other - want).abs().max() + 1e-6
    again = results(attention, q, k, v, upstream, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
