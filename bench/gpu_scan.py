# SPDX-License-Identifier: Apache-2.0
"""Scans with vector states on a CUDA device against mamba-ssm, causal-conv1d and torch.

make bench-gpu
"""

from gpu_harness import compare, copy_bandwidth, run

from pentad import scan


def near(want):
    def right(got):
        size = want.float().abs().max()
        return bool((got.float() - want.float()).abs().max() <= 2e-2 * size)

    return right


def drawn(*shape, dtype="bfloat16"):
    import torch

    return torch.randn(*shape, device="cuda").to(getattr(torch, dtype))


def selective(batch, dim, length, states, dtype="bfloat16"):
    import torch

    u, delta, z = (drawn(batch, dim, length, dtype=dtype) for _ in range(3))
    B, C = (drawn(batch, 1, states, length, dtype=dtype) for _ in range(2))
    A, bias = -torch.rand(dim, states, device="cuda"), torch.randn(dim, device="cuda")
    inputs = u, delta, A, B, C, bias, z, bias, True
    right = near(scan.selective_scan(*(x.cpu() if hasattr(x, "cpu") else x for x in inputs)).cuda())

    def mamba():
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return lambda: selective_scan_fn(*inputs), right

    return compare(
        f"selective scan ({batch}, {dim}, {length}), {states} states, {dtype}",
        "selective_forward",
        {"pentad": lambda: (lambda: scan.selective_scan(*inputs), right), "mamba-ssm": mamba},
        amount=4 * u.numel() * u.element_size(),
        unit="B",
        ceiling=copy_bandwidth(),
    )


def conv(batch, dim, length, width, dtype="bfloat16"):
    import torch

    x, weight = drawn(batch, dim, length, dtype=dtype), drawn(dim, width, dtype=dtype)
    right = near(scan.causal_conv1d(x.cpu(), weight.cpu(), activation="silu").cuda())

    def dao():
        from causal_conv1d import causal_conv1d_fn

        return lambda: causal_conv1d_fn(x, weight, activation="silu"), right

    def in_torch():
        conv1d, silu = torch.nn.functional.conv1d, torch.nn.functional.silu
        taps = weight.unsqueeze(1)
        return lambda: silu(conv1d(x, taps, padding=width - 1, groups=dim)[..., :length]), right

    return compare(
        f"causal conv ({batch}, {dim}, {length}), width {width}, {dtype}",
        "conv_forward",
        {
            "pentad": lambda: (lambda: scan.causal_conv1d(x, weight, activation="silu"), right),
            "causal-conv1d": dao,
            "torch": in_torch,
        },
        amount=2 * x.numel() * x.element_size(),
        unit="B",
        ceiling=copy_bandwidth(),
    )


def recurrence(batch, dim, length, dtype="float32"):
    x = drawn(batch, dim, length, dtype=dtype)
    a = x.sigmoid()
    right = near(scan.linear_recurrence(a.cpu(), x.cpu()).cuda())
    return compare(
        f"linear recurrence ({batch}, {dim}, {length}), {dtype}",
        "recurrence_along",
        {"pentad": lambda: (lambda: scan.linear_recurrence(a, x), right)},
        amount=3 * x.numel() * x.element_size(),
        unit="B",
        ceiling=copy_bandwidth(),
    )


def cases():
    return [
        selective(8, 2048, 2048, 16),
        selective(1, 1536, 4096, 16),
        selective(8, 2048, 2048, 16, "float32"),
        conv(8, 2048, 2048, 4),
        conv(1, 1536, 4096, 4),
        recurrence(8, 2048, 2048),
        recurrence(1, 1536, 4096),
    ]


if __name__ == "__main__":
    run("scan", cases)
