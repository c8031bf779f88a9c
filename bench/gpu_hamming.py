# SPDX-License-Identifier: Apache-2.0
"""pentad.hamming on a CUDA device against torch, and faiss-gpu where it is installed.

    make bench-gpu

Codes are random.
"""

import numpy as np
from gpu_harness import compare, copy_bandwidth, run

from pentad import hamming as H


def torch_topk(queries, codes, dim, k):
    """Products of +-1 in half precision, exact for these dimensions, and torch's top-k."""
    import torch

    def signs(packed):
        shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
        return ((packed[:, :, None] >> shifts & 1).flatten(1)[:, :dim] * 2.0 - 1).half()

    a, b = signs(queries), signs(codes).T
    return lambda: torch.topk((a @ b).float(), k)


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


def cases():
    return [
        topk(nq, 2_560_000_000 // dim, dim, k)
        for dim in (256, 1024)
        for nq, k in ((1, 10), (4, 10), (256, 10), (1024, 100))
    ]


if __name__ == "__main__":
    run("hamming", cases)
