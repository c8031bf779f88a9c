# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory of a selective scan with gradients, each measurement in a process of its own.

    python bench/scan_memory.py CONTENDER LENGTH

prints the bytes by which the resident memory of the process rose at its highest during one forward
and backward pass of 1536 channels of 16 states in float32, less the results.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from attention_memory import memory_kib
from harness import Target, judge

DIM, STATES, LENGTH = 1536, 16, 2048
NAME = f"extra memory, training float32 1,{DIM},{LENGTH} N {STATES}"
ALLOWED = "inputs + output + states / 32"
CONTENDERS = {"pentad": "pentad", "mambapy": "mambapy"}


def allowed_bytes(length: int) -> int:
    """u, delta, z and the output, A, B, C, D and the bias, and one in 32 of the states."""
    inputs = 4 * DIM * length + DIM * STATES + 2 * STATES * length + 2 * DIM
    return 4 * (inputs + DIM * STATES * length // 32)


def extra_bytes(contender: str, length: int) -> int:
    """Run in a fresh process: what was allocated before would be used again."""
    import torch

    import scan
    from scan_data import random_scan

    prepare = {"pentad": scan.pentad_scan, "mambapy": scan.mambapy_scan}[contender]

    def run(steps: int) -> int:
        problem = random_scan(1, DIM, steps, STATES, torch.float32, solve=False)
        call = prepare("training", problem)
        # The peak cannot be told from a higher one before, so that is forgotten first.
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_kib("VmRSS")
        results = call()
        rise = (memory_kib("VmHWM") - before) * 1024
        return max(rise - sum(x.nbytes for x in results), 0)

    run(64)  # libraries load what they load once, and threads start
    return run(length)


def measure(name: str, length: int) -> dict[str, Any]:
    command = [sys.executable, __file__, CONTENDERS[name], str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        status = "missing" if "ModuleNotFoundError" in lines[-1] else "error"
        return {"name": name, "status": status, "detail": lines[-1]}
    return {"name": name, "status": "ok", "extra_bytes": json.loads(done.stdout)}


def run_case(quick: bool) -> dict[str, Any]:
    length = 256 if quick else LENGTH
    records = [measure(name, length) for name in CONTENDERS]
    allowed = {"name": ALLOWED, "status": "ok", "computed": True}
    records.append(allowed | {"extra_bytes": allowed_bytes(length)})
    ours = records[0].get("extra_bytes")
    for record in records[1:]:
        if ours is not None and "extra_bytes" in record:
            record["ratio"] = record["extra_bytes"] / max(ours, 4096)
    result = {"name": NAME, "length": length, "contenders": records}
    if not quick:
        result["target"] = judge(Target(ALLOWED, 1.0), records)
    return result


CASES = [(NAME, run_case)]


if __name__ == "__main__":
    print(json.dumps(extra_bytes(sys.argv[1], int(sys.argv[2]))))
