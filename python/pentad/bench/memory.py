# SPDX-License-Identifier: Apache-2.0
"""Cases of peak extra memory, each measurement in a process of its own.

    python -m pentad.bench.memory MODULE CASE CONTENDER SIZE [SIZE ...]

prints the bytes by which the resident memory of the process rose at its highest during one call,
less the results.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .harness import Call, Options, Target, judge

# Less than a page cannot be told from nothing.
PAGE = 4096

# Writing 5 makes the kernel forget the peak of this process.
FORGET = Path("/proc/self/clear_refs")

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """A case of memory; the first contender is the subject.

    module
        Name of the module that has this case in its `MEMORY`, from which the process fetches it.
    prepare
        By contender, a function of the sizes that makes the inputs and returns the call. The call
        returns arrays or tensors.
    size, small, warm
        The sizes to measure, those of a quick run, and those of a first call, after which what is
        loaded once is loaded and threads have started.
    allowed
        By a name to show, how many bytes would be allowed at a size.
    needs
        By contender, the bytes that it takes at least: they are told where they do not fit into
        memory, in the place of a measurement.
    """

    name: str
    module: str
    prepare: dict[str, Callable[..., Call]]
    size: Sizes
    small: Sizes
    warm: Sizes
    target: Target
    allowed: dict[str, Callable[..., int]] = field(default_factory=dict)
    needs: dict[str, Callable[..., int]] = field(default_factory=dict)
    bound: str | None = None

    def run(self, options: Options) -> list[dict[str, Any]]:
        size = self.small if options.quick else self.size
        records = [self.measure(name, size) for name in self.prepare]
        for name, count in self.allowed.items():
            records.append(computed(name, count(*size)))
        ours = records[0].get("extra_bytes")
        for record in records[1:]:
            if ours is not None and "extra_bytes" in record:
                record["ratio"] = record["extra_bytes"] / max(ours, PAGE)
        result = {"name": self.name, "size": list(size), "contenders": records}
        if not options.quick:
            result["target"] = judge(self.target, records)
        return [result]

    def measure(self, contender: str, size: Sizes) -> dict[str, Any]:
        """The record of one contender."""
        if not FORGET.exists():
            told = "the peak of a process is measured on Linux alone"
            return {"name": contender, "status": "unfit", "detail": told}
        needed = self.needs[contender](*size) if contender in self.needs else 0
        if needed * 1.2 > free_bytes():
            return computed(contender, needed)
        command = [sys.executable, "-m", __spec__.name, self.module, self.name, contender]
        done = subprocess.run(
            [*command, *map(str, size)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            status = "missing" if "ModuleNotFoundError" in lines[-1] else "error"
            return {"name": contender, "status": status, "detail": lines[-1]}
        return {"name": contender, "status": "ok", "extra_bytes": json.loads(done.stdout)}


def computed(name: str, count: int) -> dict[str, Any]:
    return {"name": name, "status": "ok", "computed": True, "extra_bytes": count}


def from_proc(file: str, key: str) -> int:
    """Bytes, which the kernel tells in KiB."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc", file).read_text())[1]) * 1024


def free_bytes() -> int:
    return from_proc("meminfo", "MemAvailable")


def rise(call: Call) -> int:
    """Bytes by which resident memory rises at its highest, less the results."""
    # The peak cannot be told from a higher one before, so that is forgotten first.
    FORGET.write_text("5")
    before = from_proc("self/status", "VmRSS")
    results = call()
    results = results if isinstance(results, tuple) else (results,)
    highest = from_proc("self/status", "VmHWM")
    return max(highest - before - sum(result.nbytes for result in results), 0)


def main(module: str, name: str, contender: str, *sizes: str) -> int:
    """In a fresh process: what was allocated before would be used again."""
    (case,) = [c for c in importlib.import_module(module).MEMORY if c.name == name]
    prepare = case.prepare[contender]
    rise(prepare(*case.warm))
    return rise(prepare(*map(int, sizes)))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
