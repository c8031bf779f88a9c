# SPDX-License-Identifier: Apache-2.0
"""What changed between two result files of the same family.

    python bench/compare.py OLD.json NEW.json

A change larger than the spread of both runs is marked with a star; the others may be noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pentad.bench.tables import format_seconds

SAME_MACHINE = ("cpu", "cores", "isa", "threads", "thread_runtime")


def records(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(case, contender) -> record."""
    return {
        (case["name"], record["name"]): record
        for case in results["cases"]
        for record in case["contenders"]
    }


def differing_facts(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Facts and versions that make the two runs hard to compare."""
    before, after = old["machine"], new["machine"]
    pairs = [(name, before[name], after[name]) for name in SAME_MACHINE]
    packages = sorted(before["versions"].keys() | after["versions"].keys())
    pairs += [(p, before["versions"].get(p), after["versions"].get(p)) for p in packages]
    pairs.append(("quick", old["quick"], new["quick"]))
    return [f"{name}: {a} -> {b}" for name, a, b in pairs if a != b]


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[list[str]]:
    """case, contender, old median, new median, change, old ratio -> new ratio."""
    before, after = records(old), records(new)
    for key in before | after:
        a, b = before.get(key, {}), after.get(key, {})
        times = [r.get("median_s") for r in (a, b)]
        shown = [
            format_seconds(t) if t else r.get("status", "absent")
            for t, r in zip(times, (a, b), strict=True)
        ]
        change = ""
        if None not in times:
            relative = times[1] / times[0] - 1
            star = " *" if abs(relative) > max(a["spread"], b["spread"]) else ""
            change = f"{relative:+.1%}{star}"
        ratios = [f"{r['ratio']:.2f}x" if r.get("ratio") else "-" for r in (a, b)]
        yield [*key, *shown, change, "" if ratios == ["-", "-"] else " -> ".join(ratios)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare two benchmark result files.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    if old["family"] != new["family"]:
        parser.error(f"{options.old} is about {old['family']}, {options.new} about {new['family']}")

    console = Console()
    if not console.is_terminal:
        console.width = 160
    table = Table()
    for heading in ("case", "contender", "old", "new", "time", "time / ours"):
        table.add_column(heading, justify="left" if heading in ("case", "contender") else "right")
    for row in changes(old, new):
        table.add_row(*row)
    console.print(table)
    for fact in differing_facts(old, new):
        console.print(f"differs, {fact}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
