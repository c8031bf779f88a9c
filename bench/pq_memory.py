# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory of an assignment, each measurement in a process of its own.

    python bench/pq_memory.py CONTENDER ROWS

prints the bytes by which the resident memory of the process rose at its highest while rows of 64
dimensions were given the nearest of 4096 centroids, less the result.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from attention_memory import memory_kib
from harness import Target, judge

DIM, CENTROIDS, ROWS = 64, 4096, 100_000
NAME = f"extra memory, assign, n {ROWS:,}, d {DIM}, K {CENTROIDS}"
ALLOWED = "vectors, centroids and codes once more"
CONTENDERS = ("pentad", "torch.cdist + argmin")


def allowed_bytes(rows: int) -> int:
    return 4 * (rows * DIM + CENTROIDS * DIM + rows)


def extra_bytes(contender: str, rows: int) -> int:
    """Run in a fresh process: what was allocated before would be used again."""
    import pq

    rng = np.random.default_rng(1)
    centroids = rng.standard_normal((CENTROIDS, DIM), dtype=np.float32)
    prepare = pq.pentad_assign if contender == "pentad" else lambda x: pq.torch_assign(None, x)

    def run(n: int) -> int:
        inputs = SimpleNamespace(x=rng.standard_normal((n, DIM), np.float32), centroids=centroids)
        call = prepare(inputs)
        # The peak cannot be told from a higher one before, so that is forgotten first.
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_kib("VmRSS")
        result = call()
        rise = (memory_kib("VmHWM") - before) * 1024
        return max(rise - result.nbytes, 0)

    run(64)  # libraries load what they load once, and threads start
    return run(rows)


def measure(name: str, rows: int) -> dict[str, Any]:
    command = [sys.executable, __file__, name, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        status = "missing" if "ModuleNotFoundError" in lines[-1] else "error"
        return {"name": name, "status": status, "detail": lines[-1]}
    return {"name": name, "status": "ok", "extra_bytes": json.loads(done.stdout)}


def run_case(quick: bool) -> dict[str, Any]:
    rows = 2_000 if quick else ROWS
    records = [measure(name, rows) for name in CONTENDERS]
    allowed = {"name": ALLOWED, "status": "ok", "computed": True}
    records.append(allowed | {"extra_bytes": allowed_bytes(rows)})
    ours = records[0].get("extra_bytes")
    for record in records[1:]:
        if ours is not None and "extra_bytes" in record:
            record["ratio"] = record["extra_bytes"] / max(ours, 4096)
    result = {"name": NAME, "rows": rows, "contenders": records}
    if not quick:
        result["target"] = judge(Target(ALLOWED, 1.0), records)
    return result


CASES = [(NAME, run_case)]


if __name__ == "__main__":
    print(json.dumps(extra_bytes(sys.argv[1], int(sys.argv[2]))))
