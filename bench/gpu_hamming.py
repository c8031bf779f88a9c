# SPDX-License-Identifier: Apache-2.0
"""pentad.hamming on a CUDA device against torch, and faiss-gpu where it is installed.

    make bench-gpu

Codes are random.
"""

import numpy as np
from gpu_harness import compare, copy_bandwidth, run

from pentad import hamming as H


def signs(packed, dim):
    """+-1 in half precision, whose products are exact for these dimensions."""
    import torch

    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    return ((packed[:, :, None] >> shifts & 1).flatten(1)[:, :dim] * 2.0 - 1).half()


def torch_topk(queries, codes, dim, k):
    import torch

    a, b = signs(queries, dim), signs(codes, dim).T
    return lambda: torch.topk((a @ b).float(), k)


def torch_range(queries, codes, dim, radius):
    import torch

    a, b = signs(queries, dim), signs(codes, dim).T
    return lambda: torch.nonzero(a @ b >= dim - 2 * radius)


def faiss_topk(queries, codes, dim, k):
    import faiss

    index = faiss.GpuIndexBinaryFlat(faiss.StandardGpuResources(), dim)
    index.add(codes.cpu().numpy())
    packed = queries.cpu().numpy()
    return lambda: index.search(packed, k)


def topk(nq, n, dim, k):
    import torch

    rng = np.random.default_rng(0)
    q, db = (rng.integers(0, 256, (rows, dim // 8), dtype=np.uint8) for rows in (nq, n))
    values, ids = H.topk(q, db, k)
    there = [torch.from_numpy(x).cuda() for x in (q, db)]

    def exact(found):
        return np.array_equal(found[0].cpu(), values) and np.array_equal(found[1].cpu(), ids)

    def products(found):
        return np.array_equal((dim - found[0].cpu().numpy()) / 2, values)

    return compare(
        f"top {k}, {nq} queries, {n} x {dim} bits",
        "topk_scan" if nq <= 8 else "topk_tiles",
        {
            "pentad": lambda: (lambda: H.topk(*there, k), exact),
            "torch": lambda: (torch_topk(*there, dim, k), products),
            "faiss": lambda: (
                faiss_topk(*there, dim, k),
                lambda found: np.array_equal(found[0], values),
            ),
        },
        # Few queries read every code once; many are products of bits, whose ceiling is not known.
        **(
            {"amount": n * dim / 8, "unit": "B", "ceiling": copy_bandwidth()}
            if nq <= 8
            else {"amount": 2 * nq * n * dim, "unit": "OP", "ceiling": None}
        ),
    )


def within(nq, n, dim, radius):
    import torch

    rng = np.random.default_rng(0)
    q, db = (rng.integers(0, 256, (rows, dim // 8), dtype=np.uint8) for rows in (nq, n))
    want = H.range_search(q, db, radius)
    there = [torch.from_numpy(x).cuda() for x in (q, db)]

    def exact(found):
        return all(np.array_equal(x.cpu(), y) for x, y in zip(found, want, strict=True))

    return compare(
        f"within {radius} bits, {nq} queries, {n} x {dim} bits",
        "range",
        {
            "pentad": lambda: (lambda: H.range_search(*there, radius), exact),
            "torch": lambda: (
                torch_range(*there, dim, radius),
                lambda found: np.array_equal(found[:, 1].cpu(), want[2]),
            ),
        },
        amount=2 * nq * n * dim,
        unit="OP",
        ceiling=None,
    )


def scores(nq, n, dim, k):
    import torch

    rng = np.random.default_rng(0)
    x = rng.integers(-9, 10, (nq, dim)).astype(np.float32)  # whose sums are exact
    db = rng.integers(0, 256, (n, dim // 8), dtype=np.uint8)
    values, ids = H.topk_score(x, db, k)
    floats, codes = torch.from_numpy(x).cuda(), torch.from_numpy(db).cuda()

    def products():
        a, b = floats.half(), signs(codes, dim).T
        return lambda: torch.topk((a @ b).float(), k)

    return compare(
        f"top {k} scores, {nq} queries, {n} x {dim} bits",
        "topk_score",
        {
            "pentad": lambda: (
                lambda: H.topk_score(floats, codes, k),
                lambda found: np.array_equal(found[1].cpu(), ids),
            ),
            "torch": lambda: (
                products(),
                lambda found: np.array_equal(found[0].cpu().numpy(), values),
            ),
        },
        amount=2 * nq * n * dim,
        unit="OP",
        ceiling=None,
    )


def packing(n, dim):
    import torch

    x = torch.randn(n, dim, device="cuda")
    powers = 2 ** torch.arange(7, -1, -1, device="cuda", dtype=torch.uint8)
    want = H.pack(x.cpu())

    def right(found):
        return torch.equal(found.cpu(), want)

    def by_torch():
        return ((x > 0).view(n, -1, 8) * powers).sum(-1, dtype=torch.uint8)

    return compare(
        f"pack {n} x {dim}",
        "pack",
        {"pentad": lambda: (lambda: H.pack(x), right), "torch": lambda: (by_torch, right)},
        amount=n * dim * 4 + n * dim / 8,
        unit="B",
        ceiling=copy_bandwidth(),
    )


def cases():
    return [
        *(
            topk(nq, 2_560_000_000 // dim, dim, k)
            for dim in (256, 1024)
            for nq, k in ((1, 10), (4, 10), (256, 10), (1024, 100))
        ),
        within(256, 1_000_000, 1024, 430),
        scores(16, 1_000_000, 1024, 10),
        packing(1_000_000, 1024),
    ]


if __name__ == "__main__":
    run("hamming", cases)
