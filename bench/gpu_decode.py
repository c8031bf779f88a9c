# SPDX-License-Identifier: Apache-2.0
"""pentad.attention.decode on a CUDA device against torch's attention to the same keys.

    make bench-gpu

A step reads every key and value in use once, so the figure is bytes per second. Answers are held to
torch's in float32.
"""

from gpu_harness import compare, copy_bandwidth, run

from pentad import attention as A

ALLOWED = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


def step(batch, heads, kv_heads, length, dim, dtype, page_size=0):
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q = torch.randn(batch, heads, 1, dim, device="cuda").to(getattr(torch, dtype))
    k, v = torch.randn(2, batch, kv_heads, length, dim, device="cuda").to(q.dtype)
    lengths, caches, pages = torch.full((batch,), length, device="cuda"), (k, v), {}
    if page_size:
        caches = [t.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1) for t in caches]
        place = torch.randperm(len(caches[0]), device="cuda")  # of each page
        caches = [torch.empty_like(t).index_copy_(0, place, t) for t in caches]
        pages["block_table"] = place.view(batch, -1).int()
    gqa = heads != kv_heads
    first = (t[:1].float() for t in (q, k, v))
    want = scaled_dot_product_attention(*first, enable_gqa=gqa)

    def right(out):
        return float((out[:1] - want).abs().max() / want.abs().max()) <= ALLOWED[dtype]

    def ours():
        return A.decode(q, *caches, lengths, **pages)

    def by_torch():
        return scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

    where = f" in pages of {page_size}" if page_size else ""
    return compare(
        f"decode {batch} x {heads}/{kv_heads} heads, {length} keys of {dim} {dtype}{where}",
        "decode_kernel",
        {"pentad": lambda: (ours, right), "torch": lambda: (by_torch, right)},
        amount=2 * k.numel() * k.element_size(),
        unit="B",
        ceiling=copy_bandwidth(),
    )


def cases():
    return [
        step(1, 32, 8, 131072, 128, "bfloat16"),
        step(16, 32, 8, 8192, 128, "bfloat16"),
        step(16, 32, 8, 8192, 128, "bfloat16", 16),
        step(64, 32, 8, 2048, 128, "float16"),
        step(8, 32, 32, 8192, 64, "bfloat16"),
        step(4, 16, 4, 16384, 256, "bfloat16"),
        step(8, 32, 8, 8192, 128, "float32"),
    ]


if __name__ == "__main__":
    run("decode", cases)
