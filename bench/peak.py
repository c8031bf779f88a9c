# SPDX-License-Identifier: Apache-2.0
"""How fast this machine multiplies and adds: the ceiling for kernels made of matrix products.

python bench/peak.py
"""

from __future__ import annotations

import os
import time


def measure(dtype: str, threads: int, quick: bool = False) -> float:
    """GF/s of independent multiply-adds in registers, the best of several passes.

    dtype "bfloat16" counts products of bf16 pairs summed in float32, where the CPU has them.
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


if __name__ == "__main__":
    for count in sorted({1, os.cpu_count() or 1}):
        for dtype in ("float32", "bfloat16"):
            print(f"{count} threads, {dtype}: {measure(dtype, count):.0f} GF/s")
