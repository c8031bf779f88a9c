# SPDX-License-Identifier: Apache-2.0
"""pentad.hamming on a CUDA device against torch, and faiss-gpu where it is installed.

    make bench-gpu

Codes are random. Every contender's answer is compared with the CPU's before it is timed; medians of
the device's own clock (events), contenders in turn. Written to bench/results/gpu-hamming.json.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

import pentad
from pentad import hamming as H

ROUNDS, REPEATS = 15, 5
OUT = Path(__file__).parent / "results" / "gpu-hamming.json"


def unavailable():
    if not pentad._C.cuda_built():
        return "this build of pentad has no CUDA kernels"
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def seconds(call):
    """Of one call, by the device's clock."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / REPEATS


def medians(calls):
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth():
    """Bytes per second of a copy in the device's memory, both ways counted: the ceiling."""
    import torch

    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / medians({"copy": lambda: y.copy_(x)})["copy"]


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
    here = queries.cpu().numpy()
    return lambda: index.search(here, k)


def case(nq, n, dim, k, bandwidth):
    import torch

    rng = np.random.default_rng(0)
    q, db = (rng.integers(0, 256, (rows, dim // 8), dtype=np.uint8) for rows in (nq, n))
    values, ids = H.topk(q, db, k)
    there = [torch.from_numpy(x).cuda() for x in (q, db)]
    calls = {"pentad": lambda: H.topk(*there, k)}
    got = calls["pentad"]()
    if not (np.array_equal(got[0].cpu(), values) and np.array_equal(got[1].cpu(), ids)):
        sys.exit(f"wrong answer: {nq} queries, {n} codes of {dim} bits, k {k}")
    skipped = {}
    for name, make in (("torch", torch_topk), ("faiss", faiss_topk)):
        try:
            call = make(*there, dim, k)
            found = call()
        except (ImportError, AttributeError, torch.cuda.OutOfMemoryError) as error:
            skipped[name] = str(error) or type(error).__name__
            continue
        distances = (dim - found[0].cpu().numpy()) / 2 if name == "torch" else found[0]
        if not np.array_equal(distances, values):
            sys.exit(f"wrong answer of {name}: {nq} queries, {n} codes of {dim} bits, k {k}")
        calls[name] = call
    times = medians(calls)
    read = n * dim / 8 / times["pentad"]
    return {
        "queries": nq, "codes": n, "dim": dim, "k": k, "seconds": times, "skipped": skipped,
        "bytes_per_second": read, "of_copy_bandwidth": read / bandwidth,
        "pairs_per_second": nq * n / times["pentad"],
    }  # fmt: skip


def main():
    reason = unavailable()
    if reason:
        print(f"bench-gpu skipped: {reason}")
        return
    import torch

    bandwidth = copy_bandwidth()
    sizes = [
        (nq, 2_560_000_000 // dim, dim, k)
        for dim in (256, 1024)
        for nq, k in ((1, 10), (4, 10), (256, 10), (1024, 100))
    ]
    cases = [case(*size, bandwidth) for size in sizes]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit.strip(),
        "copy_bandwidth": bandwidth,
        "cases": cases,
    }
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    for c in cases:
        what = f"{c['queries']:5} queries, {c['codes']:9} x {c['dim']:4} bits, k {c['k']:3}"
        print(f"{what}: {c['seconds']}")
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
