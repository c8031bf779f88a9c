# SPDX-License-Identifier: Apache-2.0
"""What the tests of the benchmarks share, results as `pentad bench` writes them among it."""

import importlib
from types import SimpleNamespace

MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "isa": "v3",
    "threads": 2,
    "thread_runtime": "own pool",
    "read_gb_s": {"1": 20.0, "2": 30.0},
    "python": "3.12.0",
    "versions": {"pentad": "0.1.0", "peer": None},
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02",
}


def timed(name, seconds, **more):
    return {
        "name": name,
        "status": "ok",
        "seconds": [seconds] * 3,
        "foreign_cores": 0.04,
        "median_s": seconds,
        "min_s": seconds,
        "spread": 0.05,
        "per_second": {"bytes": 1e9 / seconds},
        **more,
    }


def published(seconds=0.1):
    """A family with one case: ours, a peer that misses its target, and one that is not there."""
    target = {"against": "peer", "ratio": 5.0, "measured": 0.2 / seconds, "met": 0.2 / seconds >= 5}
    contenders = [
        timed("ours", seconds),
        timed("peer", 0.2, ratio=0.2 / seconds),
        {"name": "absent", "status": "missing", "detail": "no module"},
    ]
    case = {"name": "a case", "work": {"bytes": 1e9}, "contenders": contenders, "target": target}
    return {"family": "family", "quick": False, "machine": MACHINE, "cases": [case]}


def published_curves():
    """Two sizes; the peer leaves at the second."""
    cases = []
    for size in (1_000, 10_000):
        ours = timed("ours", size * 1e-6, share=0.5)
        left = {"name": "peer", "status": "left", "detail": "would take some 20 s"}
        peer = left if cases else timed("peer", size * 1e-4, ratio=100.0)
        cases.append(
            {
                "name": f"a curve, codes {size:,}",
                "curve": "a curve",
                "axis": "codes",
                "size": size,
                "work": {"bytes": size * 3e4},
                "bound": "read",
                "contenders": [ours, peer],
            }
        )
    return {"family": "curves", "quick": False, "machine": MACHINE, "cases": cases}


def load(name):
    return importlib.import_module(f"pentad.bench.{name}")


def timed_by(clock):
    """A stand-in for `timeit`: a call takes what it adds to ``clock[0]``."""

    def repeat(call, number, repeat):
        begin = clock[0]
        call()
        return [clock[0] - begin]

    return SimpleNamespace(repeat=repeat)
