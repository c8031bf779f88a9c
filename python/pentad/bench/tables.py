# SPDX-License-Identifier: Apache-2.0
"""Figures as people read them: units, verdicts, and the table of a family on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .harness import QUIET_CORES


def foreign_cores(case: dict[str, Any]) -> float:
    """Cores that other processes kept busy in the worst round whose times are told."""
    return max((record.get("foreign_cores", 0.0) for record in case["contenders"]), default=0.0)


def format_seconds(seconds: float) -> str:
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def format_bytes(count: float) -> str:
    return f"{count / 2**20:.3g} MiB" if count < 2**30 else f"{count / 2**30:.3g} GiB"


def format_rate(unit: str, per_second: float) -> str:
    if per_second < 1e6:
        return f"{per_second / 1e3:.3g} k {unit}/s"
    return f"{per_second / 1e9:.3g} G" + {"bytes": "B/s", "flop": "F/s"}.get(unit, f" {unit}/s")


def out_of_reach(target: dict[str, Any]) -> bool:
    """Whether the subject would have to be faster than the machine to meet the target."""
    return target.get("ceiling", float("inf")) < target.get("ratio", 0.0)


def format_target(target: dict[str, Any]) -> str:
    verdict = {True: "met", False: "NOT MET", None: "not measured"}[target["met"]]
    if "inferior" in target:
        verdict += f" (worse {', '.join(target['inferior'])})"
    if out_of_reach(target):
        verdict += f" (peak: {target['ceiling']:.2g}x)"
    if "seconds" in target:
        return f"<= {format_seconds(target['seconds'])}: {verdict}"
    return f">= {target['ratio']:g}x: {verdict}"


def contender_row(record: dict[str, Any], target: dict[str, Any] | None) -> list[str]:
    """name, time, spread, rate, ratio, target: the cells that the terminal and Markdown share.

    A record of memory has bytes in the place of the time.
    """
    name = record["name"]
    if "quality" in record:
        name += ": " + ", ".join(f"{key} {value:.3g}" for key, value in record["quality"].items())
    verdict = format_target(target) if target and target["against"] == record["name"] else ""
    ratio = record.get("ratio")
    times = "" if ratio is None else f"{ratio:.2f}x"
    if "extra_bytes" in record:
        size = format_bytes(record["extra_bytes"])
        spread = "computed" if record.get("computed") else "one run"
        return [name, size, spread, "", times, verdict]
    if "median_s" not in record:
        return [name, record["status"], "", "", "", ""]
    unit, rate = next(iter(record["per_second"].items()))
    share = f" ({record['share']:.0%})" if "share" in record else ""
    return [
        name,
        format_seconds(record["median_s"]),
        f"{record['spread']:.0%}" if len(record["seconds"]) > 1 else "one run",
        format_rate(unit, rate) + share,
        times,
        verdict,
    ]


def title(results: dict[str, Any]) -> str:
    """One line of facts: what was measured, on what, and how fast that reads memory."""
    machine = results["machine"]
    read = ", ".join(f"{rate:.0f} GB/s with {n}" for n, rate in machine["read_gb_s"].items())
    facts = [machine["cpu"], machine["isa"], f"{machine['threads']} threads", f"reads {read}"]
    facts += [f"{rate:.0f} GF/s {dtype}" for dtype, rate in machine.get("peak_gflops", {}).items()]
    return f"{results['family']}: " + ", ".join(facts)


def show(results: dict[str, Any], console: Console) -> None:
    """Print the results as one table, and below it why anything has no time."""
    console.print(title(results), markup=False, highlight=False, soft_wrap=True)
    if results["quick"]:
        console.print("quick: small sizes, so targets are not judged and rates mean little")
    table = Table()
    table.add_column("case / contender", min_width=36)
    for heading in ("median", "spread", "rate", "time / ours", "target"):
        table.add_column(heading, justify="right", no_wrap=True)
    failures = []
    for case in results["cases"]:
        table.add_section()
        table.add_row(f"[bold]{case['name']}")
        if (foreign := foreign_cores(case)) > QUIET_CORES:
            table.add_row(f"  [red]disturbed: others used {foreign:.1f} cores")
        for record in case["contenders"]:
            name, *cells = contender_row(record, case.get("target"))
            table.add_row(f"  {name}", *cells)
            if record["status"] != "ok":
                detail = record.get("detail", "")
                failures.append(f"{case['name']}: {record['name']} is {record['status']}: {detail}")
    console.print(table)
    for line in failures:
        console.print(line, markup=False, highlight=False)
    if absent := [name for name, known in results["machine"]["versions"].items() if not known]:
        console.print(
            f"not installed: {', '.join(absent)}; pip install 'pentad[bench]'", markup=False
        )
