# SPDX-License-Identifier: Apache-2.0
"""What changed between two runs of `pentad bench`, curves among them.

    python bench/compare.py OLD NEW

Each is what `--json` wrote: a file of one family or of several, or a folder of files. Families
that only one of them has are named. A change larger than the spread of both runs is marked with a
star; the others may be noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pentad.bench.tables import format_bytes, format_seconds

WRITTEN = {"family", "quick", "machine", "cases"}
SAME_MACHINE = ("cpu", "cores", "isa", "threads", "thread_runtime")


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Results by family; ValueError where the file or folder holds something else."""
    paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found: dict[str, dict[str, Any]] = {}
    for one in paths:
        try:
            content = json.loads(one.read_text())
        except ValueError:
            content = None
        for results in content if isinstance(content, list) else [content]:
            if not isinstance(results, dict) or not results.keys() >= WRITTEN:
                raise ValueError(f"{one} holds no results of pentad bench")
            found[results["family"]] = results
    if not found:
        raise ValueError(f"{path} holds no results of pentad bench")
    return found


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


def cost(record: dict[str, Any]) -> tuple[float | None, str]:
    """Seconds, or bytes of a case of memory; and how that is shown, or why there is none."""
    if "median_s" in record:
        return record["median_s"], format_seconds(record["median_s"])
    if "extra_bytes" in record:
        return record["extra_bytes"], format_bytes(record["extra_bytes"])
    return None, record.get("status", "absent")


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[list[str]]:
    """case, contender, old cost, new cost, change, old ratio -> new ratio."""
    before, after = records(old), records(new)
    for key in before | after:
        a, b = before.get(key, {}), after.get(key, {})
        (was, shown_was), (now, shown_now) = cost(a), cost(b)
        change = ""
        if was and now is not None:
            relative = now / was - 1
            star = " *" if abs(relative) > max(a.get("spread", 0), b.get("spread", 0)) else ""
            change = f"{relative:+.1%}{star}"
        ratios = [f"{r['ratio']:.2f}x" if r.get("ratio") else "-" for r in (a, b)]
        told = "" if ratios == ["-", "-"] else " -> ".join(ratios)
        yield [*key, shown_was, shown_now, change, told]


def show(old: dict[str, Any], new: dict[str, Any], console: Console) -> None:
    table = Table(title=new["family"])
    for heading in ("case", "contender", "old", "new", "cost", "/ ours"):
        table.add_column(heading, justify="left" if heading in ("case", "contender") else "right")
    for row in changes(old, new):
        table.add_row(*row)
    console.print(table)
    for fact in differing_facts(old, new):
        console.print(f"differs, {fact}", markup=False, highlight=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare two runs of pentad bench.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    try:
        old, new = load(options.old), load(options.new)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    if not old.keys() & new.keys():
        print(f"compare: {options.old} and {options.new} have no family in common", file=sys.stderr)
        return 1
    console = Console()
    if not console.is_terminal:
        console.width = 160
    for family in sorted(old.keys() & new.keys()):
        show(old[family], new[family], console)
    for family in sorted(old.keys() ^ new.keys()):
        console.print(f"only {'old' if family in old else 'new'}: {family}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
