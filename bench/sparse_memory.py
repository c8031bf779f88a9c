# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory of training a SPLADE head, each measurement in a process of its own.

    python bench/sparse_memory.py CONTENDER WIDTH BATCH

prints the bytes by which the resident memory of the process rose at its highest during one step
forward and backward, less the result and the gradients.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import sparse_data
import sparse_training
from attention_memory import memory_kib
from harness import Target, judge

RATIO = 10.0


def name(width: int) -> str:
    batch, length = sparse_training.BATCH, sparse_training.LENGTH
    return f"extra memory, splade_head, B {batch}, L {length}, V 30,522, H {width}"


def extra_bytes(contender: str, width: int, batch: int) -> int:
    """Run in a fresh process: what was allocated before would be used again."""
    head = sparse_training.HEADS[contender]

    def run(batch: int, length: int, terms: int) -> int:
        call = sparse_training.training(
            head, sparse_training.head_inputs(batch, length, terms, width)
        )
        # The peak cannot be told from a higher one before, so that is forgotten first.
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_kib("VmRSS")
        results = call()
        rise = (memory_kib("VmHWM") - before) * 1024
        return max(rise - sum(result.nbytes for result in results), 0)

    run(1, 8, 100)  # libraries load what they load once, and threads start
    return run(batch, sparse_training.LENGTH, sparse_data.VOCABULARY)


def measure(contender: str, width: int, batch: int) -> dict[str, Any]:
    command = [sys.executable, __file__, contender, str(width), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        status = "missing" if "ModuleNotFoundError" in lines[-1] else "error"
        return {"name": contender, "status": status, "detail": lines[-1]}
    return {"name": contender, "status": "ok", "extra_bytes": json.loads(done.stdout)}


def run_case(width: int, quick: bool) -> dict[str, Any]:
    batch = 1 if quick else sparse_training.BATCH
    records = [measure(contender, width, batch) for contender in sparse_training.HEADS]
    ours = records[0].get("extra_bytes")
    for record in records[1:]:
        if ours is not None and "extra_bytes" in record:
            record["ratio"] = record["extra_bytes"] / max(ours, 4096)
    result = {"name": name(width), "batch": batch, "contenders": records}
    if not quick:
        result["target"] = judge(Target("plain torch", RATIO), records)
    return result


CASES = [(name(width), partial(run_case, width)) for width in sparse_training.WIDTHS]


if __name__ == "__main__":
    print(json.dumps(extra_bytes(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
