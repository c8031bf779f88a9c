# SPDX-License-Identifier: Apache-2.0
"""``pentad bench``: choose cases, measure them, show the tables, write the results.

Several families take their turns in processes of their own: each starts from a heap and threads
that no other has used, and a peer that crashes takes no other family with it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from . import machine
from .harness import Family, Options, relate, use_threads
from .tables import show


def family_named(name: str) -> Family:
    try:
        return importlib.import_module(f"{__package__}.{name}").FAMILY
    except ModuleNotFoundError as error:
        needed = f"benchmarking {name} needs the package {error.name}"
        raise ImportError(f"{needed}: pip install 'pentad[bench]'") from error


def run(
    names: Sequence[str],
    *,
    quick: bool,
    only: str | None,
    json_path: Path | None,
    threads: int,
    rounds: int | None,
    budget: float | None,
) -> int:
    """Measure families; 1 where an answer was wrong or a call failed, 2 where no case was meant."""
    if json_path is not None:
        ready(json_path)
    if len(names) > 1:
        return run_apart(names, quick, only, json_path, threads, rounds, budget)
    family = family_named(names[0])
    chosen = chosen_of(family, only)
    if not chosen:
        print(f"pentad bench: no case of {family.name} has '{only}' in its name", file=sys.stderr)
        return 2
    options = Options(
        quick,
        threads,
        rounds or (2 if quick else family.rounds),
        family.budget if budget is None else budget,
    )
    console = Console()
    if not console.is_terminal:
        console.width = 132
    results = measure(family, chosen, options)
    show(results, console)

    if json_path is not None:
        write(json_path, family.name, results)
    # A partial or small run never replaces the published results unless told where to go.
    elif not quick and not only and (root := machine.clone()):
        path = write(root / "bench" / "results", family.name, results)
        console.print(f"wrote {path}", markup=False, highlight=False)
    return complain(results)


def chosen_of(family: Family, only: str | None) -> list[Any]:
    return [case for case in family.cases if not only or only in case.name]


def ready(path: Path) -> None:
    """Makes the folder; OSError where results could not be written, so that none are measured."""
    folder = path.parent if path.suffix == ".json" else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
    there = path if path.exists() else folder
    if (folder != path and path.is_dir()) or not os.access(there, os.W_OK):
        raise OSError(f"{path} cannot be written")


def write(path: Path, name: str, results: Any) -> Path:
    """The file, in a folder under its family's name."""
    path = path if path.suffix == ".json" else path / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def measure(family: Family, chosen: Sequence[Any], options: Options) -> dict[str, Any]:
    """The content of a result file."""
    use_threads(options.threads)
    bounds = {case.bound for case in chosen if case.bound}
    facts = machine.machine_facts(family.packages, options.threads)
    # A ceiling is the best that was seen, before and after.
    machine.raise_ceilings(facts, bounds, options.threads, options.quick)
    cases = []
    progress = Console(stderr=True)
    quiet = not progress.is_terminal
    for case in track(chosen, "measuring", console=progress, transient=True, disable=quiet):
        cases += case.run(options)
    machine.raise_ceilings(facts, bounds, options.threads, options.quick)
    for case in cases:
        if "bound" in case:
            relate(case, facts)
    return {"family": family.name, "quick": options.quick, "machine": facts, "cases": cases}


def complain(results: dict[str, Any]) -> int:
    """1, and a line that says which, where a contender was wrong or failed."""
    failed = [
        f"{record['name']} is {record['status']} in '{case['name']}'"
        for case in results["cases"]
        for record in case["contenders"]
        if record["status"] in ("wrong", "error")
    ]
    if failed:
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        print(f"pentad bench: {results['family']}: {failed[0]}{more}", file=sys.stderr)
    return 1 if failed else 0


def run_apart(names, quick, only, json_path, threads, rounds, budget) -> int:
    """Each family in a process; into a folder a file each, into a file a list of all.

    Where only some cases are meant, families that have none of them are left out.
    """
    meant = [name for name in names if only is None or chosen_of(family_named(name), only)]
    if not meant:
        print(f"pentad bench: no case has '{only}' in its name", file=sys.stderr)
        return 2
    asked = ["--threads", str(threads)] + ["--quick"] * quick
    for option, value in (("--only", only), ("--rounds", rounds), ("--budget", budget)):
        asked += [] if value is None else [option, str(value)]
    with tempfile.TemporaryDirectory() as folder:
        together = json_path is not None and json_path.suffix == ".json"
        target = Path(folder) if together else json_path
        asked += [] if target is None else ["--json", str(target)]
        statuses = [
            subprocess.run([sys.executable, "-m", "pentad", "bench", name, *asked]).returncode
            for name in meant
        ]
        if together:
            parts = [Path(folder) / f"{name}.json" for name in meant]
            results = [json.loads(part.read_text()) for part in parts if part.exists()]
            write(json_path, "", results)
    failed = [name for name, status in zip(meant, statuses, strict=True) if status]
    if failed:
        print(f"pentad bench: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
