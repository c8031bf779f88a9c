# SPDX-License-Identifier: Apache-2.0
"""pentad.sparse on a CUDA device against the plain forms in torch.

make bench-gpu
"""

import numpy as np
from gpu_harness import compare, copy_bandwidth, matmul_rate, run

from pentad import sparse as S


def splade_head(b, length, dim, vocab, backward):
    """Forward, or both ways; the peer forms the logits."""
    import torch

    draw = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(b, length, dim, generator=draw, device="cuda").bfloat16()
    weight = (torch.randn(vocab, dim, generator=draw, device="cuda") / dim**0.5).bfloat16()
    mask = torch.ones(b, length, device="cuda", dtype=torch.bool)
    d_out = torch.randn(b, vocab, generator=draw, device="cuda").bfloat16()
    leaves = hidden.requires_grad_(backward), weight.requires_grad_(backward)

    def plain(hidden, weight):
        logits = (hidden @ weight.T).masked_fill(~mask[..., None], -torch.inf)
        return torch.log1p(logits.amax(1).relu())

    def both_ways(head):
        def call():
            out = head(*leaves)
            return (out, *torch.autograd.grad(out, leaves, d_out)) if backward else (out,)

        return call

    want = both_ways(lambda h, w: torch.log1p((h.float() @ w.float().T).amax(1).relu()))()

    def near(found):  # a tie in fewer bits may go to another token, so gradients differ there
        return all(
            (a.float() - w.float()).norm() < 0.1 * w.float().norm()
            for a, w in zip(found, want, strict=True)
        )

    return compare(
        f"splade_head, {b} x {length} x {dim}, V {vocab}" + (", with gradients" * backward),
        "weight_rows" if backward else "splade_forward",
        {
            "pentad": lambda: (both_ways(lambda h, w: S.splade_head(h, w, None, mask)), near),
            "torch": lambda: (both_ways(plain), near),
        },
        amount=2 * b * length * dim * vocab,
        unit="FLOP",
        ceiling=matmul_rate(),
    )


def rows(rng, n, terms, vocab):
    """Terms of a Zipf law, on the device."""
    import torch

    weights = 1 / np.arange(1, vocab + 1)
    chosen = np.sort(rng.choice(vocab, (n, terms), p=weights / weights.sum()))
    keep = np.diff(chosen, prepend=-1) > 0
    indptr = np.concatenate([[0], keep.sum(1).cumsum()])
    values = rng.random(keep.sum()).astype(np.float32)
    return tuple(
        torch.from_numpy(x).cuda() for x in (indptr, chosen[keep].astype(np.int64), values)
    )


def score(nq, n, vocab):
    import torch

    rng = np.random.default_rng(0)
    queries, docs = rows(rng, nq, 40, vocab), rows(rng, n, 120, vocab)
    q, d = (
        torch.sparse_csr_tensor(*side, (len(side[0]) - 1, vocab), check_invariants=False)
        for side in (queries, docs)
    )
    want = torch.from_numpy(
        S.score(*((*(x.cpu().numpy() for x in side), vocab) for side in (queries, docs)))
    ).cuda()

    def near(found):
        found = found.to_dense() if found.layout != torch.strided else found
        return torch.allclose(found, want, rtol=1e-4, atol=1e-4)

    def sparse_dense():
        dense = q.to_dense().T.contiguous()
        return lambda: (d @ dense).T, near

    return compare(
        f"score, {nq} queries, {n} documents",
        "score_tile",
        {
            "pentad": lambda: (lambda: S.score((*queries, vocab), (*docs, vocab)), near),
            "torch CSR by dense queries": sparse_dense,
            "torch CSR by CSR": lambda: (lambda: q @ d.T.to_sparse_csr(), near),
        },
        amount=len(docs[1]) * nq * 4,
        unit="B",
        ceiling=None,
    )


def search(nq, n, vocab, k):
    import torch

    rng = np.random.default_rng(0)
    queries, docs = rows(rng, nq, 40, vocab), rows(rng, n, 120, vocab)
    index = S.SparseIndex(vocab)
    index.add(tuple(x.cpu().numpy() for x in docs))
    want = index.search(tuple(x.cpu().numpy() for x in queries), k)
    there = index.to("cuda")
    d = torch.sparse_csr_tensor(*docs, (n, vocab), check_invariants=False)
    q = torch.sparse_csr_tensor(*queries, (nq, vocab), check_invariants=False)

    def exact(found):
        return np.array_equal(found[0].cpu(), want.scores) and np.array_equal(
            found[1].cpu(), want.ids
        )

    def near(found):
        return np.allclose(found[0].cpu(), want.scores, rtol=1e-4)

    def torch_topk():
        dense = q.to_dense().T.contiguous()
        return lambda: torch.topk((d @ dense).T, k), near

    return compare(
        f"top {k}, {nq} queries, {n} documents",
        "search_windows",
        {
            "pentad": lambda: (lambda: there.search((*queries, vocab), k), exact),
            "torch": torch_topk,
        },
        amount=len(docs[1]) * 6,
        unit="B",
        ceiling=copy_bandwidth(),
    )


def topk_sparsify(n, d, k):
    import torch

    x = torch.randn(n, d, device="cuda")
    want = torch.topk(x, k)[0].sum(1)

    def near(found):
        return torch.allclose(found.sum(1), want, rtol=1e-4)

    def torch_topk():
        def call():
            values, indices = torch.topk(x, k, sorted=False)
            return torch.zeros_like(x).scatter_(1, indices, values)

        return call, near

    return compare(
        f"topk_sparsify, {n} x {d}, k {k}",
        "select_rows",
        {"pentad": lambda: (lambda: S.topk_sparsify(x, k), near), "torch": torch_topk},
        amount=2 * n * d * 4,
        unit="B",
        ceiling=copy_bandwidth(),
    )


def cases():
    return [
        *(splade_head(16, 128, 768, 30522, backward) for backward in (False, True)),
        splade_head(8, 512, 768, 250002, False),
        score(256, 4096, 30522),
        score(32, 100_000, 30522),
        search(1, 1_000_000, 30522, 10),
        search(256, 1_000_000, 30522, 10),
        topk_sparsify(4096, 16384, 64),
    ]


if __name__ == "__main__":
    run("sparse", cases)
