# SPDX-License-Identifier: Apache-2.0
"""pentad.pq on a CUDA device against torch, and faiss-gpu where it is installed.

make bench-gpu
"""

import torch
from gpu_harness import compare, copy_bandwidth, matmul_rate, run

from pentad import pq


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).cuda()


def draw_codes(levels, *shape):
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(1)).cuda()


def close(want):
    return lambda got: torch.allclose(got.float(), want.float(), rtol=1e-3, atol=1e-3)


def lookup(n, M, K, width):
    """Against torch's gather of each table."""
    codes, tables = draw_codes(K, n, M), draw(M, K, width)
    subspaces = torch.arange(M, device="cuda")
    want = tables[subspaces, codes].flatten(1)
    return compare(
        f"lookup, {n} x {M} codes of {K} rows of {width}",
        "gather",
        {
            "pentad": lambda: (lambda: pq.lookup(codes, tables), close(want)),
            "torch": lambda: (lambda: tables[subspaces, codes].flatten(1), close(want)),
        },
        amount=codes.numel() * (8 + 4 * width), unit="B", ceiling=copy_bandwidth(),
    )  # fmt: skip


def bags(n, K, width):
    """Sums of bags of ten rows, forward and backward, against embedding_bag."""
    codes, table = draw_codes(K, n, 1), draw(K, width).requires_grad_()
    offsets = torch.arange(0, n, 10, device="cuda")

    def ours():
        out = pq.lookup(codes, [table], combine="sum", offsets=offsets)
        return torch.autograd.grad(out.square().sum(), table)[0]

    def torch_bags():
        out = torch.nn.functional.embedding_bag(codes[:, 0], table, offsets, mode="sum")
        return torch.autograd.grad(out.square().sum(), table)[0]

    want = torch_bags()
    return compare(
        f"bags of ten, {n} codes of {K} rows of {width}, with gradient",
        "sum_chunks",
        {
            "pentad": lambda: (ours, close(want)),
            "torch": lambda: (torch_bags, close(want)),
        },
        amount=n * width * 4 * 2, unit="B", ceiling=copy_bandwidth(),
    )  # fmt: skip


def assign(n, M, K, width):
    """Against the distances of torch.cdist, which differ where two are nearly equal."""
    x, books = draw(n, M * width), draw(M, K, width)

    def nearest():
        parts = x.view(n, M, width).transpose(0, 1).contiguous()
        return torch.cdist(parts, books).argmin(-1).T

    want = nearest()
    return compare(
        f"assign, {n} x {M} vectors of {width} to {K}",
        "assign_tiles",
        {
            name: lambda call=call: (call, lambda got: (got == want).float().mean() > 0.999)
            for name, call in (("pentad", lambda: pq.assign(x, books)), ("torch", nearest))
        },
        amount=2 * n * M * K * width, unit="FLOP", ceiling=matmul_rate("float32"),
    )  # fmt: skip


def adc(nq, n, M):
    """Against gathers from the tables by torch."""
    queries, codes, books = draw(nq, M * 8), draw_codes(256, n, M).to(torch.uint8), draw(M, 256, 8)
    subspaces = torch.arange(M, device="cuda")

    def gathered():
        parts = queries.view(nq, M, 1, 8)
        tables = (parts - books).square().sum(-1)
        return tables[:, subspaces, codes.long()].sum(-1)

    want = gathered()
    return compare(
        f"adc, {nq} queries, {n} x {M} codes",
        "sum_entries",
        {
            "pentad": lambda: (lambda: pq.adc(queries, codes, books), close(want)),
            "torch": lambda: (gathered, close(want)),
        },
        amount=nq * n * M, unit="OP", ceiling=None,
    )  # fmt: skip


def product_keys(rows, heads, n, half, dim, k):
    """Against the same of torch: top-k of each half, then of their sums, then embedding_bag."""
    q, subkeys, values = draw(rows, heads, 2 * half), draw(heads, 2, n, half), draw(n * n, dim)

    def by_torch():
        scores = torch.einsum("rhsd,hsnd->rhsn", q.view(rows, heads, 2, half), subkeys)
        best, keys = scores.topk(k)
        sums = (best[:, :, 0, :, None] + best[:, :, 1, None]).flatten(2)
        top, places = sums.topk(k)
        first = keys[:, :, 0].gather(2, places // k)
        index = first * n + keys[:, :, 1].gather(2, places % k)
        return torch.nn.functional.embedding_bag(
            index.view(rows, -1), values, per_sample_weights=top.softmax(-1).view(rows, -1),
            mode="sum",
        )  # fmt: skip

    want = by_torch()
    return compare(
        f"product keys, {rows} x {heads} queries, {n}^2 keys, top {k}, values of {dim}",
        "sum_values",
        {
            "pentad": lambda: (
                lambda: pq.product_key_lookup(q, subkeys, values, k),
                close(want),
            ),
            "torch": lambda: (by_torch, close(want)),
        },
        amount=rows * heads * k * dim * 4, unit="B", ceiling=copy_bandwidth(),
    )  # fmt: skip


def cases():
    return [
        lookup(1_000_000, 8, 256, 16),
        bags(1_000_000, 100_000, 64),
        assign(200_000, 8, 256, 16),
        assign(100_000, 1, 8192, 64),
        adc(1, 10_000_000, 16),
        adc(64, 1_000_000, 16),
        product_keys(4096, 4, 1024, 128, 512, 32),
    ]


if __name__ == "__main__":
    run("pq", cases)
