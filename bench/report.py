# SPDX-License-Identifier: Apache-2.0
"""Put the measured figures into README.md and docs/benchmarks.md, so that none is ever typed.

    python bench/report.py            # rewrite both, and the pictures in docs/images
    python bench/report.py --check    # exit 1 where anything differs from the results

bench/results/<family>.json and curves.json are read; README.md gets some rows of every family and
two pictures between `<!-- bench:begin -->` and `<!-- bench:end -->`, docs/benchmarks.md everything.
A picture holds the digest of the figures in it, so that --check need not draw. gpu-<family>.json,
from `make bench-gpu`, fill docs/gpu.md: the rows of the kernels, and all cases between the markers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import plots

from pentad.bench import CURVES, FAMILIES
from pentad.bench.tables import (
    contender_row,
    foreign_cores,
    format_seconds,
    format_target,
    out_of_reach,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
GENERATED = "<!-- Written by bench/report.py from bench/results/. -->"

# What the README shows: of every family the jobs that it is taken for, met targets or not.
HEADLINES = {
    "attention": (
        "forward float32 1,8,4096,64 causal",
        "forward bfloat16 1,8,4096,64 causal",
        "training bfloat16 1,8,4096,64 causal",
        "forward float32 1,8,4096,64 window of 128",
        "extra memory, training float32 1,1,16384,64 full",
    ),
    "scan": (
        "selective_scan forward float32 1,1536,2048 N 16",
        "selective_scan training float32 1,1536,2048 N 16",
        "ssd training float32 1,2048,24,64 N 128, beside transformers, its chunk 256",
        "Mamba2ForCausalLM training step, 4 layers, d 768, L 512, float32",
    ),
    "pq": (
        "top 10, 4 bits, M 32, 256 queries",
        "top 10, 8 bits, M 16, 32 queries",
        "recall@10 0.9 by inverted lists, the passages, 256 queries",
        "product_key_lookup forward float32 512^2 keys, k 32, 4 heads, 4096 rows",
    ),
    "sparse": (
        "exact top 10, 200,000 documents, 100 queries one at a time",
        "BM25, the passages, top 10, 256 queries one at a time",
        "recall@10 0.95, 1,000,000 documents, 256 queries",
        "splade_head forward and backward, B 16, L 128, V 30,522, H 768",
    ),
    "hamming": (
        "top 10, 1024 bits, 256 queries",
        "top 10, 1024 bits, 1 query",
        "top 1000, 1024 bits, 32 queries",
    ),
}
TITLES = {
    "attention": "Attention",
    "scan": "Scan",
    "pq": "Product quantization",
    "sparse": "Sparse",
    "hamming": "Hamming",
}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], text: set[int]) -> str:
    """A Markdown table; the columns in `text` are aligned to the left, the others to the right."""
    ruler = ["---" if column in text else "--:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ruler, *rows])


# What was measured, on what ----------------------------------------------------------------------


def facts(results: dict[str, Any]) -> str:
    machine = results["machine"]
    ceilings = "reads memory at " + ", ".join(
        f"{rate:.0f} GB/s with {count} thread{'s' if count != '1' else ''}"
        for count, rate in machine["read_gb_s"].items()
    )
    if peaks := machine.get("peak_gflops"):
        rates = " and ".join(f"{rate:.0f} GF/s in {dtype}" for dtype, rate in peaks.items())
        ceilings += f", and multiplies and adds at {rates}; shares in brackets are of these"
    versions = ", ".join(f"{p} {v or 'missing'}" for p, v in machine["versions"].items())
    commit = (machine["commit"] or "unknown")[:12] + (" with changes" if machine["dirty"] else "")
    foreign = max(map(foreign_cores, results["cases"]))
    return (
        f"Measured {machine['date']} on {machine['cpu']}, {machine['cores']} cores, "
        f"ISA level {machine['isa']}, {machine['threads']} threads; it {ceilings}. "
        f"Python {machine['python']}, {versions}; commit {commit}. Other processes used at most "
        f"{foreign:.2f} cores meanwhile."
    )


def score(results: dict[str, Any]) -> str:
    """How many targets were met."""
    targets = [case["target"] for case in results["cases"] if "target" in case]
    met = sum(target["met"] is True for target in targets)
    text = f"{met} of {len(targets)} targets are met"
    if unknown := sum(target["met"] is None for target in targets):
        text += f", {unknown} could not be judged"
    if beyond := sum(map(out_of_reach, targets)):
        text += f", {beyond} ask for more than the peak of this machine allows"
    return text


# docs/benchmarks.md ------------------------------------------------------------------------------


def family_page(results: dict[str, Any]) -> str:
    family, rows = results["family"], []
    for case in results["cases"]:
        for number, record in enumerate(case["contenders"]):
            name = "" if number else case["name"]
            rows.append((name, *contender_row(record, case.get("target"))))
    head = ("case", "contender", "median", "spread", "rate", "time / ours", "target")
    return "\n\n".join(
        [
            f"## {TITLES.get(family, family)}",
            f"{score(results)}. {facts(results)}",
            f"![Time of every peer by ours]({picture_name(family)})",
            table(head, rows, {0, 1}),
        ]
    )


def curve_table(cases: list[dict[str, Any]]) -> str:
    """A row for each size, a column for each contender, ours with its share of the limit."""
    names = list(dict.fromkeys(r["name"] for case in cases for r in case["contenders"]))

    def cell(case: dict[str, Any], name: str) -> str:
        record = next((r for r in case["contenders"] if r["name"] == name), {})
        if "median_s" not in record:
            return record.get("detail") or record.get("status", "")
        share = f" ({record['share']:.0%})" if "share" in record else ""
        return format_seconds(record["median_s"]) + share

    rows = [(f"{case['size']:,}", *(cell(case, name) for name in names)) for case in cases]
    return table((cases[0]["axis"], *names), rows, set())


def curves_page(results: dict[str, Any]) -> str:
    parts = [
        "## Cost against length and size",
        "Dashed: what the machine would need if nothing but its speed of reading memory, or of "
        "multiplying, bounded the work. Codes that fit the caches are read faster than that. A "
        f"curve ends where the next size would take too long, or too much memory. {facts(results)}",
        f"![Seconds against length and size]({picture_name(CURVES)})",
    ]
    for name, cases in plots.by_curve(results).items():
        parts += [f"**{name}**", curve_table(cases)]
    return "\n\n".join(parts)


def page(measured: dict[str, dict[str, Any]]) -> str:
    parts = [
        GENERATED,
        "# Benchmarks",
        "`pentad bench` measures these on your machine. Every answer is checked before it is "
        "timed; the contenders of a case take turns in one process, and ratios are medians over "
        "rounds. The first contender of a case is ours. Bars are the time of a peer by ours, or "
        "its memory by ours; the mark on a bar is its target.",
    ]
    for name, results in measured.items():
        parts.append(curves_page(results) if name == CURVES else family_page(results))
    return "\n\n".join(parts) + "\n"


# README.md ---------------------------------------------------------------------------------------


def headline(case: dict[str, Any]) -> tuple[str, ...]:
    """case, ours, the peer of the target or else the fastest, its time by ours, the verdict."""
    ours, *others = case["contenders"]
    target = case.get("target")
    timed = [record for record in others if record.get("ratio") is not None]
    if target:
        timed = [record for record in timed if record["name"] == target["against"]]
    verdict = format_target(target) if target else ""
    if not timed:
        return case["name"], contender_row(ours, None)[1], "", "", "", verdict
    peer = min(timed, key=lambda record: record["ratio"])
    cells = contender_row(peer, None)
    return case["name"], contender_row(ours, None)[1], peer["name"], cells[1], cells[4], verdict


def summary(measured: dict[str, dict[str, Any]], headlines: dict[str, tuple[str, ...]]) -> str:
    rows, scores = [], []
    for family, results in measured.items():
        cases = {case["name"]: case for case in results["cases"]}
        if absent := [name for name in headlines.get(family, ()) if name not in cases]:
            raise ValueError(f"the results of {family} have no case {absent[0]!r}")
        for number, name in enumerate(headlines.get(family, ())):
            rows.append(("" if number else TITLES.get(family, family), *headline(cases[name])))
        if family != CURVES:
            scores.append(f"{TITLES.get(family, family)}: {score(results)}.")
    head = ("", "case", "pentad", "peer", "its cost", "/ ours", "target")
    parts = [table(head, rows, {0, 1, 3, 6})]
    parts.append("\n".join(f"- {line}" for line in scores))
    parts.append(f"![Time of peers by ours](docs/{picture_name('ratios')})")
    if CURVES in measured:
        parts.append(f"![Seconds against length and size](docs/{picture_name(CURVES)})")
    return "\n\n".join(parts)


def insert(text: str, block: str) -> str:
    """The text with the block between the markers; ValueError where they are not there."""
    head, found_begin, rest = text.partition(BEGIN)
    _, found_end, tail = rest.partition(END)
    if not (found_begin and found_end):
        raise ValueError(f"no {BEGIN} followed by {END}")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


# docs/gpu.md -------------------------------------------------------------------------------------

KERNEL_ROW = re.compile(r"\| (\w+) (`.*?) \|.*\| (.*?) \|")


def gpu_rate(case: dict[str, Any]) -> str:
    return f"{case['rate'] / 1e9:,.0f} G{case['unit']}/s"


def gpu_kernels(text: str, measured: dict[str, dict[str, Any]]) -> str:
    """Each row "| family `kernel` ... | commit | device | figure | limit |" with its best case."""

    def filled(row: re.Match[str]) -> str:
        family, kernels, limit = row.groups()
        results = measured.get(family, {"cases": []})
        cases = [c for c in results["cases"] if f"`{c['kernel']}`" in kernels]
        if not cases:
            return row[0]
        best = max(cases, key=lambda case: case["share"] or 0)
        limit = limit.split(": ")[0] + (f": {best['share']:.0%}" if best["share"] else "")
        commit = results["commit"][:12] + (" with changes" if results["dirty"] else "")
        figure = f"{gpu_rate(best)}, {best['name']}"
        return f"| {family} {kernels} | {commit} | {results['device']} | {figure} | {limit} |"

    return "\n".join(KERNEL_ROW.sub(filled, line) for line in text.split("\n"))


def gpu_cases(measured: dict[str, dict[str, Any]]) -> str:
    if not measured:
        return "Nothing has been measured on a device yet."
    rows = []
    for family, results in measured.items():
        where = f"{TITLES.get(family, family)}, {results['device']}, {results['date']}"
        for number, case in enumerate(results["cases"]):
            ours, *peers = case["seconds"].items()
            cells = [f"{who} {format_seconds(t)} ({t / ours[1]:.2f}x)" for who, t in peers]
            cells += [f"{who} missing" for who in case["skipped"]]
            share = f" ({case['share']:.0%})" if case["share"] else ""
            mine = format_seconds(ours[1]), gpu_rate(case) + share
            rows.append(("" if number else where, case["name"], *mine, ", ".join(cells)))
    return table(("", "case", "pentad", "rate", "peers, their time / ours"), rows, {0, 1, 4})


# The pictures and the whole ----------------------------------------------------------------------


def picture_name(name: str) -> str:
    """Its path from docs/."""
    return f"images/{name if name in ('ratios', CURVES) else f'ratios-{name}'}.svg"


def pictures(
    measured: dict[str, dict[str, Any]], headlines: dict[str, tuple[str, ...]]
) -> dict[str, plots.Picture]:
    """By path from docs/, what each picture shows."""
    families = {name: results for name, results in measured.items() if name != CURVES}
    chosen = {
        TITLES.get(name, name): [
            c for c in results["cases"] if c["name"] in headlines.get(name, ())
        ]
        for name, results in families.items()
    }
    made = {picture_name("ratios"): plots.Ratios(chosen)}
    for name, results in families.items():
        made[picture_name(name)] = plots.Ratios({"": results["cases"]})
    if CURVES in measured:
        made[picture_name(CURVES)] = plots.Curves(measured[CURVES])
    return made


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by family, in the order in which they are shown."""
    paths = [path for path in folder.glob("*.json") if not path.stem.startswith("gpu-")]
    found = {path.stem: json.loads(path.read_text()) for path in paths}
    if not found:
        raise ValueError(f"{folder} holds no results of pentad bench")
    if quick := [name for name, results in found.items() if results["quick"]]:
        raise ValueError(f"{folder / quick[0]}.json: a quick run is nothing to publish")
    return {name: found[name] for name in [*FAMILIES, CURVES, *sorted(found)] if name in found}


def read_gpu(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of `make bench-gpu` by family."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]
    return {results["family"]: results for results in found}


def main(arguments: list[str] | None = None, headlines: dict[str, Any] = HEADLINES) -> int:
    parser = argparse.ArgumentParser(description="Insert benchmark results into the documents.")
    parser.add_argument("--check", action="store_true", help="change nothing, tell differences")
    parser.add_argument("--root", type=Path, default=ROOT, help="of README.md and docs/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    readme, docs = options.root / "README.md", options.root / "docs"

    try:
        measured, on_gpu = read(options.results), read_gpu(options.results)
        block = insert(readme.read_text(), summary(measured, headlines))
        gpu = docs / "gpu.md"
        gpu_text = insert(gpu_kernels(gpu.read_text(), on_gpu), gpu_cases(on_gpu))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    texts = {readme: block, docs / "benchmarks.md": page(measured), gpu: gpu_text}
    drawn = pictures(measured, headlines)
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    stale += [docs / name for name, p in drawn.items() if plots.digest_in(docs / name) != p.digest]
    if options.check:
        for path in stale:
            print(f"{path} differs from the results; run bench/report.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path in texts:
            path.write_text(texts[path])
        else:
            drawn[path.relative_to(docs).as_posix()].draw(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
