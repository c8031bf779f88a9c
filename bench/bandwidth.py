# SPDX-License-Identifier: Apache-2.0
"""How fast this machine reads memory: the ceiling for every kernel that streams its data once.

python bench/bandwidth.py
"""

from __future__ import annotations

import os
import time

import numpy as np

MIB = 1 << 20


def measure(threads: int, quick: bool = False) -> float:
    """GB/s read from a buffer far larger than the caches, the best of several passes.

    The best, not the median: a ceiling is what the machine can do when nothing disturbs it.
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


if __name__ == "__main__":
    for count in sorted({1, os.cpu_count() or 1}):
        print(f"{count} threads: {measure(count):.1f} GB/s")
