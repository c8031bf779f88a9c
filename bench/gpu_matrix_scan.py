# SPDX-License-Identifier: Apache-2.0
"""Matrix states on a CUDA device against mamba-ssm, fla and torch in chunks.

    make bench-gpu

bf16 inputs; each answer is compared with the recurrence in float64 on a slice of the heads.
"""

from gpu_harness import compare, copy_bandwidth, run

from pentad import scan

# batch, length, heads, groups, keys, values
SIZES = [(8, 4096, 24, 1, 128, 64), (1, 16384, 24, 1, 128, 64), (4, 4096, 16, 16, 128, 128)]


def problem(size, *, delta=False):
    import torch

    torch.manual_seed(0)
    batch, length, heads, groups, keys, values = size
    q, k = (torch.randn(batch, length, groups, keys, device="cuda") / keys**0.5 for _ in range(2))
    if delta:
        k = torch.nn.functional.normalize(k, dim=-1)
    v = torch.randn(batch, length, heads, values, device="cuda")
    decay = 0.9 + 0.1 * torch.rand(batch, length, heads, device="cuda")
    beta = torch.rand(batch, length, heads, device="cuda")
    return [*(t.bfloat16() for t in (q, k, v)), decay, beta]


def expected(q, k, v, decay, beta, *, delta):
    """Outputs of the last head of the first 256 steps, step by step in float64."""
    import torch

    q, k = (t[0, :256, -1].double() for t in (q, k))
    v, a, w = (t[0, :256, -1].double() for t in (v, decay, beta))
    state, out = torch.zeros(q.shape[1], v.shape[1], device=q.device, dtype=q.dtype), []
    for t in range(256):
        state = a[t] * state
        rest = v[t] - k[t] @ state if delta else v[t]
        state = state + torch.outer(k[t], (w[t] if delta else 1) * rest)
        out.append(q[t] @ state)
    return torch.stack(out)


def right(want):
    def check(out):
        error = (out[0, :256, -1].double() - want).norm() / want.norm()
        return bool(error < 1e-2)

    return check


def chunks_of_torch(q, k, v, decay, chunk=64):
    """One decay per head, as products of matrices, states passed on chunk by chunk."""
    import torch

    _, length, heads, _ = v.shape
    each = heads // k.shape[2]
    q, k = (t.repeat_interleave(each, 2) for t in (q, k))
    q, k, v = (t.unflatten(1, (-1, chunk)).transpose(2, 3) for t in (q, k, v))
    logs = decay.log().unflatten(1, (-1, chunk)).transpose(2, 3).cumsum(-1)
    pairs = (logs.unsqueeze(-1) - logs.unsqueeze(-2)).exp().tril()
    within = ((q @ k.transpose(-1, -2)) * pairs).to(v.dtype) @ v
    tail = (logs[..., -1:] - logs).exp().unsqueeze(-1)
    added = (k * tail).to(v.dtype).transpose(-1, -2) @ v
    state, before = torch.zeros_like(added[:, 0], dtype=torch.float32), []
    for n in range(length // chunk):
        before.append(state)
        state = state * logs[:, n, :, -1, None, None].exp() + added[:, n]
    across = (q * logs.exp().unsqueeze(-1)).to(v.dtype) @ torch.stack(before, 1).to(v.dtype)
    return (within + across).transpose(2, 3).flatten(1, 2)


def attention_case(size):
    q, k, v, decay, beta = problem(size)
    good = right(expected(q, k, v, decay, beta, delta=False))

    def fla():
        from fla.ops.simple_gla import chunk_simple_gla

        each = v.shape[2] // k.shape[2]
        wide_q, wide_k = (t.repeat_interleave(each, 2) for t in (q, k))
        log = decay.log()
        return lambda: chunk_simple_gla(wide_q, wide_k, v, g=log, scale=1.0)[0], good

    def mamba():
        import torch
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        ones = torch.ones(v.shape[2], device="cuda")
        steps = -decay.log()
        scaled = v / steps.unsqueeze(-1)
        call = mamba_chunk_scan_combined
        return lambda: call(scaled.bfloat16(), steps, -ones, k, q, 256), good

    contenders = {
        "pentad": lambda: (lambda: scan.linear_attention(q, k, v, decay=decay), good),
        "mamba-ssm": mamba,
        "fla": fla,
        "torch": lambda: (lambda: chunks_of_torch(q, k, v, decay), good),
    }
    # What has to be read and written at the least.
    amount = sum(t.nbytes for t in (q, k, v, v, decay))
    return compare(
        f"one decay per head {size}", "outputs", contenders,
        amount=amount, unit="B", ceiling=copy_bandwidth(),
    )  # fmt: skip


def delta_case(size):
    q, k, v, decay, beta = problem(size, delta=True)
    good = right(expected(q, k, v, decay, beta, delta=True))

    def fla():
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        log = decay.log()
        each = v.shape[2] // k.shape[2]
        wide_q, wide_k = (t.repeat_interleave(each, 2) for t in (q, k))
        return lambda: chunk_gated_delta_rule(wide_q, wide_k, v, log, beta, scale=1.0)[0], good

    contenders = {
        "pentad": lambda: (lambda: scan.delta_rule(q, k, v, beta, decay=decay), good),
        "fla": fla,
    }
    amount = sum(t.nbytes for t in (q, k, v, v, decay, beta))
    return compare(
        f"delta rule {size}", "walk_delta", contenders,
        amount=amount, unit="B", ceiling=copy_bandwidth(),
    )  # fmt: skip


def cases():
    return [attention_case(size) for size in SIZES] + [delta_case(size) for size in SIZES]


if __name__ == "__main__":
    run("matrix_scan", cases)
