# SPDX-License-Identifier: Apache-2.0
"""Put the measured figures into README.md, so that none is ever typed.

    python bench/report.py            # rewrite the tables
    python bench/report.py --check    # exit 1 where the README and the results differ

Every bench/results/<family>.json goes between `<!-- bench:<family>:begin -->` and
`<!-- bench:<family>:end -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pentad.bench.tables import contender_row, foreign_cores, out_of_reach

REPOSITORY = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

HEADINGS = ("case", "contender", "median", "spread", "rate", "time / ours", "target")
ALIGNMENT = ("---", "---", "--:", "--:", "--:", "--:", "--:")


def markdown(results: dict[str, Any]) -> str:
    """The table of one family, and below it what it was measured on."""
    lines = [HEADINGS, ALIGNMENT]
    for case in results["cases"]:
        for number, record in enumerate(case["contenders"]):
            name = "" if number else case["name"]
            lines.append((name, *contender_row(record, case.get("target"))))
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    machine = results["machine"]
    read = ", ".join(
        f"{rate:.0f} GB/s with {count} thread{'s' if count != '1' else ''}"
        for count, rate in machine["read_gb_s"].items()
    )
    versions = ", ".join(f"{p} {v or 'missing'}" for p, v in machine["versions"].items())
    peaks = " and ".join(
        f"{rate:.0f} GF/s in {dtype}" for dtype, rate in machine.get("peak_gflops", {}).items()
    )
    if peaks:
        read += f", and multiplies and adds at {peaks}; shares in brackets are of these"
    foreign = max(map(foreign_cores, results["cases"]))
    commit = (machine["commit"] or "unknown")[:12] + (" with changes" if machine["dirty"] else "")
    facts = (
        f"Measured {machine['date']} on {machine['cpu']}, {machine['cores']} cores, "
        f"ISA level {machine['isa']}, {machine['threads']} threads; it reads memory at {read}. "
        f"Python {machine['python']}, {versions}; commit {commit}. Every answer was checked before "
        "it was timed; contenders took turns, and ratios are medians over rounds. Other processes "
        f"used at most {foreign:.2f} cores meanwhile."
    )
    targets = [case["target"] for case in results["cases"] if "target" in case]
    if beyond := sum(map(out_of_reach, targets)):
        met = sum(target["met"] is True for target in targets)
        facts += (
            f" {met} of {len(targets)} targets are met; {beyond} ask for more than the peak of "
            "this machine allows, which then stands beside them as a multiple of the peer."
        )
    return f"{table}\n\n{facts}"


def insert(text: str, family: str, block: str) -> str:
    """The text with the block between the family's markers; ValueError where they are not there."""
    begin, end = (f"<!-- bench:{family}:{edge} -->" for edge in ("begin", "end"))
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"no {begin} followed by {end}")
    return f"{head}{begin}\n{block}\n{end}{tail}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Insert benchmark results into the README.")
    parser.add_argument("--check", action="store_true", help="change nothing, tell differences")
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    before = after = options.readme.read_text()
    for path in sorted(options.results.glob("*.json")):
        results = json.loads(path.read_text())
        if results["quick"]:
            print(f"{path}: a quick run is nothing to publish", file=sys.stderr)
            return 1
        try:
            after = insert(after, results["family"], markdown(results))
        except ValueError as error:
            print(f"{options.readme}: {error}", file=sys.stderr)
            return 1
    if options.check and before != after:
        print(f"{options.readme} differs from the results; run bench/report.py", file=sys.stderr)
        return 1
    if before != after:
        options.readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
