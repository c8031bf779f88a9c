# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks on a CUDA device share: time by its own clock, ceilings, checks, the file.

A bench/gpu_<family>.py is a list of cases, each made by `compare`, and ``run("family", cases)``,
which writes bench/results/gpu-<family>.json; bench/report.py brings that to docs/gpu.md.
"""

import functools
import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

import pentad

ROUNDS, REPEATS = 15, 5
RESULTS = Path(__file__).parent / "results"


def unavailable():
    """Why nothing can be measured, or None."""
    if not pentad._C.cuda_built():
        return "this build of pentad has no CUDA kernels"
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


# --- Time -----------------------------------------------------------------------------------------


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
    """Of each call by name; they take turns."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


# --- Ceilings -------------------------------------------------------------------------------------


@functools.cache
def copy_bandwidth():
    """Bytes per second of a copy in the device's memory, both ways counted."""
    import torch

    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / medians({"copy": lambda: y.copy_(x)})["copy"]


@functools.cache
def matmul_rate(dtype="bfloat16", size=8192):
    """Floating-point operations per second of torch's product of large square matrices."""
    import torch

    x = torch.randn(size, size, device="cuda").to(getattr(torch, dtype))
    return 2 * size**3 / medians({"product": lambda: x @ x})["product"]


# --- A case ---------------------------------------------------------------------------------------


def compare(name, kernel, contenders, *, amount, unit, ceiling):
    """Check every contender's answer, time them in turn, and return what the file keeps of it.

    Parameters
    ----------
    name, kernel : str
        What is measured, and the kernel whose row in docs/gpu.md it fills: "topk_scan".
    contenders : dict of str -> callable
        "pentad" first. Each is called once, to prepare, and returns (call, right): what is timed,
        and a function that tells whether the result of a call is right. One that is not installed,
        or takes too much memory, is skipped; a wrong answer ends the run.
    amount, unit, ceiling :
        Bytes ("B") or operations ("FLOP") of one call, and how many per second are the limit:
        `copy_bandwidth()`, `matmul_rate()`, or None where nobody knows.
    """
    import torch

    calls, skipped = {}, {}
    for who, prepare in contenders.items():
        try:
            call, right = prepare()
            if not right(call()):
                sys.exit(f"wrong answer of {who}: {name}")
            calls[who] = call
        except (ImportError, AttributeError, torch.cuda.OutOfMemoryError) as error:
            if who == "pentad":
                raise
            skipped[who] = str(error) or type(error).__name__
    times = medians(calls)
    rate = amount / times["pentad"]
    print(f"{name}: " + ", ".join(f"{who} {t * 1e6:.1f} us" for who, t in times.items()))
    share = f", {rate / ceiling:.0%} of the ceiling" if ceiling else ""
    print(f"    {rate / 1e9:.0f} G{unit}/s{share}")
    return {
        "name": name, "kernel": kernel, "seconds": times, "skipped": skipped,
        "unit": unit, "rate": rate, "share": rate / ceiling if ceiling else None,
    }  # fmt: skip


def run(family, cases):
    """Write what ``cases()`` returns, a list of `compare`d ones; or say why nothing is measured."""
    if reason := unavailable():
        print(f"bench-gpu {family} skipped: {reason}")
        return
    import torch

    def git(*arguments):
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()

    result = {
        "family": family,
        "cases": cases(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "copy_bandwidth": copy_bandwidth(),
    }
    path = RESULTS / f"gpu-{family}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")
