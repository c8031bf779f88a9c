# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory of attention, each measurement in a process of its own.

    python bench/attention_memory.py CONTENDER LENGTH forward|training

prints the bytes by which the resident memory of the process rose at its highest during one call on
one head of 64 dimensions in float32, less the results. "plain" is softmax(q k^T) v with the matrix
in memory, which Rabe and Staats (arXiv 2112.05682) compare with.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from harness import Target, judge

LENGTH = 16384
DIM = 64
# The savings that Rabe and Staats report at this length, forward and with gradients.
TARGETS = {"forward": Target("plain torch", 59.0), "training": Target("plain torch", 32.0)}
CONTENDERS = {"pentad": "pentad", "plain torch": "plain", "torch SDPA": "sdpa"}
# Matrices of LENGTH x LENGTH that "plain" holds at once, at most.
PLAIN_MATRICES = {"forward": 2, "training": 3}


def memory_kib(field: str) -> int:
    """VmRSS (resident now) or VmHWM (at most since the last reset)."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def make(contender: str):
    if contender == "pentad":
        from pentad.attention import attention

        return attention
    if contender == "sdpa":
        from torch.nn.functional import scaled_dot_product_attention

        return scaled_dot_product_attention
    from attention_data import plain

    return plain


def extra_bytes(contender: str, length: int, what: str) -> int:
    """Run in a fresh process: what was allocated before would be used again."""
    import torch

    op = make(contender)

    def run(rows: int):
        leaves = [torch.randn(1, 1, rows, DIM, requires_grad=what == "training") for _ in range(3)]
        d_out = torch.randn(1, 1, rows, DIM)
        # The peak cannot be told from a higher one before, so that is forgotten first.
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_kib("VmRSS")
        out = op(*leaves)
        results = [out.detach()]
        if what == "training":
            results += torch.autograd.grad(out, leaves, d_out)
        rise = (memory_kib("VmHWM") - before) * 1024
        return rise - sum(x.nbytes for x in results)

    run(64)  # libraries load what they load once, and threads start
    return run(length)


def free_bytes() -> int:
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024


def measure(name: str, length: int, what: str) -> dict[str, Any]:
    """The record of one contender; "plain" is computed where it does not fit into memory."""
    matrices = PLAIN_MATRICES[what] * 4 * length**2
    if CONTENDERS[name] == "plain" and matrices * 1.2 > free_bytes():
        return {"name": name, "status": "ok", "computed": True, "extra_bytes": matrices}
    command = [sys.executable, __file__, CONTENDERS[name], str(length), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"name": name, "status": "error", "detail": lines[-1]}
    return {"name": name, "status": "ok", "extra_bytes": json.loads(done.stdout)}


def run_case(what: str, quick: bool) -> dict[str, Any]:
    length = 1024 if quick else LENGTH
    records = [measure(name, length, what) for name in CONTENDERS]
    ours = records[0].get("extra_bytes")
    for record in records[1:]:
        if ours is not None and "extra_bytes" in record:
            record["ratio"] = record["extra_bytes"] / max(ours, 4096)
    result = {"name": case_name(what), "length": length, "contenders": records}
    if not quick:
        result["target"] = judge(TARGETS[what], records)
    return result


def case_name(what: str) -> str:
    return f"extra memory, {what} float32 1,1,{LENGTH},{DIM} full"


CASES = [(case_name(what), partial(run_case, what)) for what in TARGETS]


if __name__ == "__main__":
    print(json.dumps(extra_bytes(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
