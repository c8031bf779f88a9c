# SPDX-License-Identifier: Apache-2.0
"""The machine a benchmark ran on: what it is, and the ceilings that figures are compared with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

MIB = 1 << 20


def clone() -> Path | None:
    """The repository that this file belongs to; None for an installed package."""
    root = Path(__file__).parents[3]
    return root if (root / "bench" / "results").is_dir() else None


def cache_folder() -> Path:
    """Where inputs that take minutes to make are kept."""
    root = clone()
    if root:
        return root / ".bench"
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "pentad" / "bench"


# Ceilings ----------------------------------------------------------------------------------------


def read_gb_s(threads: int, quick: bool = False) -> float:
    """GB/s read from a buffer far larger than the caches, the best of several passes.

    The ceiling of every kernel that streams its data once. The best, not the median: a ceiling is
    what the machine can do when nothing disturbs it.
    """
    import pentad
    from pentad import _C

    buffer = np.ones((128 if quick else 1024) * MIB, dtype=np.uint8)
    before = pentad.num_threads()
    pentad.set_num_threads(threads)
    try:
        _C.stream_read(buffer)
        seconds = []
        for _ in range(3 if quick else 20):
            time.sleep(0.0 if quick else 0.1)  # a neighbour's burst should not fill all passes
            start = time.perf_counter()
            _C.stream_read(buffer)
            seconds.append(time.perf_counter() - start)
    finally:
        pentad.set_num_threads(before)
    return buffer.nbytes / min(seconds) / 1e9


def peak_gflops(dtype: str, threads: int, quick: bool = False) -> float:
    """GF/s of independent multiply-adds in registers, the best of several passes.

    The ceiling of kernels made of matrix products. dtype "bfloat16" counts products of bf16 pairs
    summed in float32, where the CPU has them.
    """
    import pentad
    from pentad import _C

    rounds = 20_000 if quick else 200_000
    before = pentad.num_threads()
    pentad.set_num_threads(threads)
    try:
        rates = []
        for _ in range(5 if quick else 30):
            start = time.perf_counter()
            operations = _C.multiply_adds(rounds, dtype == "bfloat16")
            rates.append(operations / (time.perf_counter() - start))
    finally:
        pentad.set_num_threads(before)
    return max(rates) / 1e9


def raise_ceilings(machine: dict[str, Any], bounds: set[str], threads: int, quick: bool) -> None:
    """Measure the ceilings again: a neighbour may have been busy the time before."""
    for dtype in sorted(bounds - {"read"}):
        best = machine.setdefault("peak_gflops", {})
        best[dtype] = max(best.get(dtype, 0.0), peak_gflops(dtype, threads, quick))
    best = machine["read_gb_s"]
    for count in sorted({1, threads}):
        best[str(count)] = max(best.get(str(count), 0.0), read_gb_s(count, quick))


# Facts -------------------------------------------------------------------------------------------


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The CPU as the kernel names it, with family and model where the name is generic."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


def git(*arguments: str) -> str | None:
    """What git says of the clone; None where there is none, whatever encloses the package."""
    root = clone()
    if root is None:
        return None
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine_facts(packages: Sequence[str], threads: int) -> dict[str, Any]:
    """Everything a reader needs to place the figures; the ceilings are still to be measured."""
    import pentad

    # Results and what is made of them change with every run, the code measured does not.
    made = (":!bench/results", ":!README.md", ":!docs/benchmarks.md", ":!docs/images")
    changes = git("status", "--porcelain", "--", ".", *made)
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "isa": pentad.isa(),
        "threads": threads,
        "thread_runtime": pentad.thread_runtime(),
        "read_gb_s": {},
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("pentad", "numpy", *packages)},
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
