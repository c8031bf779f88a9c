# SPDX-License-Identifier: Apache-2.0
"""Compare several ways to compute one thing: the right answer first, then the time.

A family's benchmark is a list of cases. A `Case` prepares its inputs once; each of its `Contender`s
prepares its own state from them (an index, packed codes), runs once, and has that answer checked. A
contender with a wrong answer is reported as wrong and is never timed; one whose package is not
installed is reported as missing. The others take turns in one process, so that a machine that slows
down for a while slows everybody down, and ratios are taken within a round before their median is.

The first contender of a case is its subject (ours). `ratio` on another contender says how many
times longer it took than the subject. Where a case names what bounds it (the speed at which this
machine multiplies, or reads memory), the subject's share of that bound stands beside its rate, and
a target's `ceiling` is the ratio at which the subject would reach the bound.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import bandwidth
import peak

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parent.parent

# OpenMP workers spin for some milliseconds after their last loop. A turn starts after this pause,
# so that no contender is timed beside the spinning threads of the one before it.
SETTLE_SECONDS = 0.02
# A turn of a fast call repeats it until it lasts about this long.
TURN_SECONDS = 0.1
# Cores that other processes may keep busy before a round counts as disturbed. Disturbed rounds are
# repeated, up to ATTEMPTS times as many as asked for; the quietest count.
QUIET_CORES = 0.15
ATTEMPTS = 4

# Relative difference of two qualities, such as shares of some thousand answers, that is chance.
SAME = 0.01

# What may bound a case: the unit of work that it limits.
BOUNDS = {"float32": "flop", "bfloat16": "flop", "read": "bytes"}

Inputs = Any
Call = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    name
        As shown in the table.
    prepare
        inputs -> call. Not timed. ImportError means that the contender is missing here. A call may
        have a method `quality`: what is told of its answers beside their time, as {"recall": 0.9}.
    check
        (inputs, result of the call) -> None, raising AssertionError where the result is wrong.
    once
        For peers that take a large part of a minute: the call whose answer is checked is the one
        that is timed, and takes no part in the rounds.
    """

    name: str
    prepare: Callable[[Inputs], Call]
    check: Callable[[Inputs, Any], None]
    once: bool = False


@dataclass(frozen=True)
class Target:
    """The subject must be at least `ratio` times as fast as the contender `against`.

    Of several contenders the fastest counts.

    at_least, at_most
        Names of qualities in which the subject must not be worse than that contender: larger ones
        and smaller ones are better. Less than SAME of a difference is none.
    answers
        Over which the `at_least` are shares: two standard errors of a difference are none either.
    """

    against: str | tuple[str, ...]
    ratio: float
    at_least: tuple[str, ...] = ()
    at_most: tuple[str, ...] = ()
    answers: int | None = None


@dataclass(frozen=True)
class Limit:
    """The subject must take at most so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Case:
    """One question, answered by several contenders; the first of them is the subject.

    setup
        (quick, threads) -> inputs, the expected answer among them; `quick` asks for small sizes.
    work
        inputs -> amounts of work in one call, as {"pairs": 1e9, "bytes": 1e6}. The table shows the
        first as a rate, the file all of them.
    bound
        What limits the subject: a name in BOUNDS, whose unit is then the first of `work`.
    """

    name: str
    setup: Callable[[bool, int], Inputs]
    contenders: Sequence[Contender]
    work: Callable[[Inputs], dict[str, float]]
    target: Target | Limit | None = None
    bound: str | None = None


@dataclass
class Round:
    """Seconds of every contender that took its turn, and the cores that other processes used."""

    seconds: dict[str, float]
    foreign_cores: float


@dataclass
class Outcome:
    """What became of one contender: status is "ok", "missing", "wrong" or "error".

    An "ok" contender has a call that takes part in the rounds, or the only round that it had.
    """

    name: str
    status: str = "ok"
    detail: str = ""
    call: Call | None = None
    only: Round | None = None
    quality: dict[str, float] | None = None


def use_threads(count: int) -> None:
    """Give every library with a thread setting of its own the same number of threads."""
    import pentad

    pentad.set_num_threads(count)
    for package, setter in (("torch", "set_num_threads"), ("faiss", "omp_set_num_threads")):
        try:
            module = __import__(package)
        except ImportError:
            continue
        getattr(module, setter)(count)


def admit(contender: Contender, inputs: Inputs) -> Outcome:
    """Prepare a contender, run it once and check its answer; only an "ok" outcome has a call."""
    outcome = Outcome(contender.name)
    try:
        call = contender.prepare(inputs)
        start, foreign_before = time.perf_counter(), foreign_cpu_seconds()
        result = call()
        seconds = time.perf_counter() - start
        foreign = max(foreign_cpu_seconds() - foreign_before, 0.0) / max(seconds, 1e-9)
        contender.check(inputs, result)
        if hasattr(call, "quality"):
            outcome.quality = call.quality()
    except ImportError as error:
        outcome.status, outcome.detail = "missing", str(error)
    except AssertionError as error:
        outcome.status, outcome.detail = "wrong", str(error).strip()
    except Exception as error:
        outcome.status, outcome.detail = "error", f"{type(error).__name__}: {error}"
    else:
        if contender.once:
            outcome.only = Round({contender.name: seconds}, foreign)
        else:
            outcome.call = call
    return outcome


def take_turn(call: Call, turn_seconds: float | None = None) -> float:
    """Seconds of one call. A fast one has warmed up by then, and is the mean over the turn."""
    turn_seconds = TURN_SECONDS if turn_seconds is None else turn_seconds
    time.sleep(SETTLE_SECONDS)
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    if first >= turn_seconds:
        return first
    repeats = min(round(turn_seconds / max(first, 1e-6)), 10_000)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def take_quick_turn(call: Call) -> float:
    return take_turn(call, TURN_SECONDS / 10)


def foreign_cpu_seconds() -> float:
    """CPU seconds since boot that this process did not use; 0 where the system does not tell.

    A busy neighbour does not slow all contenders alike: OpenMP waits for its last thread at every
    barrier, and was 4 to 25 times slower beside one busy process on two cores.
    """
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def interleave(
    outcomes: Sequence[Outcome],
    rounds: int,
    attempts: int,
    budget: float,
    turn: Callable[[Call], float] = take_turn,
    foreign: Callable[[], float] = foreign_cpu_seconds,
) -> list[Round]:
    """Let the admitted contenders take turns until `rounds` rounds were quiet, or `attempts` made.

    Each round starts with the next contender. One that has used up `budget` seconds sits out the
    rest, so that a slow peer does not cost minutes; a disturbed round is charged in part.
    """
    ready = [outcome for outcome in outcomes if outcome.call is not None]
    spent = dict.fromkeys((outcome.name for outcome in ready), 0.0)
    done: list[Round] = []
    while len(done) < attempts and sum(r.foreign_cores <= QUIET_CORES for r in done) < rounds:
        first = len(done) % max(len(ready), 1)
        seconds, turns = {}, {}
        start, foreign_before = time.perf_counter(), foreign()
        for outcome in ready[first:] + ready[:first]:
            if spent[outcome.name] <= budget:
                turn_start = time.perf_counter()
                seconds[outcome.name] = turn(outcome.call)
                turns[outcome.name] = time.perf_counter() - turn_start
        wall = max(time.perf_counter() - start, 1e-9)
        cores = max(foreign() - foreign_before, 0.0) / wall
        for name, duration in turns.items():
            spent[name] += duration if cores <= QUIET_CORES else duration / ATTEMPTS
        done.append(Round(seconds, cores))
    return done


def quietest(done: Sequence[Round], count: int, *names: str) -> list[Round]:
    """The `count` least disturbed of the rounds in which all these contenders took part.

    Choosing by what other processes did, never by the times, keeps the choice fair.
    """
    met = [entry for entry in done if all(name in entry.seconds for name in names)]
    return sorted(met, key=lambda entry: entry.foreign_cores)[:count]


def pairwise_ratio(done: Sequence[Round], count: int, subject: str, other: str) -> float | None:
    """Median over rounds of the other's time by the subject's; None where they never met."""
    ratios = [
        entry.seconds[other] / entry.seconds[subject]
        for entry in quietest(done, count, subject, other)
    ]
    return statistics.median(ratios) if ratios else None


def summarise(
    outcome: Outcome, subject: Outcome, done: Sequence[Round], count: int, work: dict[str, float]
) -> dict[str, Any]:
    """The record of one contender as it stands in the result file."""
    record: dict[str, Any] = {"name": outcome.name, "status": outcome.status}
    if outcome.detail:
        record["detail"] = outcome.detail
    if outcome.quality:
        record["quality"] = outcome.quality
    kept = [outcome.only] if outcome.only else quietest(done, count, outcome.name)
    if not kept:
        return record
    seconds = [entry.seconds[outcome.name] for entry in kept]
    median = statistics.median(seconds)
    record |= {
        "seconds": seconds,
        "foreign_cores": max(entry.foreign_cores for entry in kept),
        "median_s": median,
        "min_s": min(seconds),
        "spread": (max(seconds) - min(seconds)) / median,
        "per_second": {unit: amount / median for unit, amount in work.items()},
    }
    if outcome.only:
        ours = [entry.seconds[subject.name] for entry in quietest(done, count, subject.name)]
        record["ratio"] = median / statistics.median(ours) if ours else None
    elif outcome is not subject:
        record["ratio"] = pairwise_ratio(done, count, subject.name, outcome.name)
    return record


def judge(target: Target | Limit, contenders: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A target and what came of it; `met` is None where there is nothing to judge."""
    if isinstance(target, Limit):
        subject = contenders[0]
        measured = subject.get("median_s")
        met = None if measured is None else measured <= target.seconds
        return {
            "against": subject["name"],
            "seconds": target.seconds,
            "measured": measured,
            "met": met,
        }
    names = [target.against] if isinstance(target.against, str) else target.against
    ratios = {record["name"]: record.get("ratio") for record in contenders}
    measured, against = min(
        ((ratios[name], name) for name in names if ratios.get(name) is not None),
        default=(None, names[0]),
    )
    met = None if measured is None else measured >= target.ratio
    result = {"against": against, "ratio": target.ratio, "measured": measured, "met": met}
    if met is not None and (names := inferior(target, contenders, against)):
        result |= {"met": False, "inferior": names}
    return result


def inferior(target: Target, contenders: Sequence[dict[str, Any]], against: str) -> list[str]:
    """The qualities of the target in which the subject is worse than the peer."""
    ours = contenders[0].get("quality", {})
    theirs = next(record for record in contenders if record["name"] == against).get("quality", {})

    def fluctuation(name: str) -> float:
        shares = ours[name], theirs[name]
        variance = sum(p * (1 - p) for p in shares) / target.answers if target.answers else 0.0
        return max(SAME * theirs[name], 2 * variance**0.5)

    less = [name for name in target.at_least if ours[name] < theirs[name] - fluctuation(name)]
    return less + [name for name in target.at_most if ours[name] > theirs[name] * (1 + SAME)]


def bound_rate(bound: str, machine: dict[str, Any]) -> float:
    """What the machine does per second, in the unit of the bound, with the threads of the run."""
    if bound == "read":
        return machine["read_gb_s"][str(machine["threads"])] * 1e9
    return machine["peak_gflops"][bound] * 1e9


def relate(case: dict[str, Any], machine: dict[str, Any]) -> None:
    """Add the subject's `share` of the case's bound, and the `ceiling` of its target."""
    rate, unit = bound_rate(case["bound"], machine), BOUNDS[case["bound"]]
    subject = case["contenders"][0]
    if "per_second" in subject:
        subject["share"] = subject["per_second"][unit] / rate
    target = case.get("target", {})
    for record in case["contenders"]:
        if "ratio" in target and record["name"] == target["against"] and "per_second" in record:
            target["ceiling"] = rate / record["per_second"][unit]


def run_case(case: Case, quick: bool, threads: int, rounds: int, budget: float) -> dict[str, Any]:
    """Check, time and summarise one case."""
    inputs = case.setup(quick, threads)
    outcomes = [admit(contender, inputs) for contender in case.contenders]
    attempts = rounds if quick else ATTEMPTS * rounds
    turn = take_quick_turn if quick else take_turn
    done = interleave(outcomes, rounds, attempts, budget, turn)
    work = case.work(inputs)
    records = [summarise(outcome, outcomes[0], done, rounds, work) for outcome in outcomes]
    result = {"name": case.name, "work": work, "contenders": records}
    if case.bound:
        result["bound"] = case.bound
    if case.target and not quick:
        result["target"] = judge(case.target, records)
    return result


def foreign_cores(case: dict[str, Any]) -> float:
    """Cores that other processes kept busy in the worst round whose times are told."""
    return max((record.get("foreign_cores", 0.0) for record in case["contenders"]), default=0.0)


def measure_peaks(machine: dict[str, Any], bounds: set[str], threads: int, quick: bool) -> None:
    """Add to the facts how fast the machine multiplies, or raise what stands there."""
    for dtype in sorted(bounds - {"read"}):
        best = machine.setdefault("peak_gflops", {})
        best[dtype] = max(best.get(dtype, 0.0), peak.measure(dtype, threads, quick))


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The CPU as the kernel names it, with family and model where the name is generic."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine_facts(packages: Sequence[str], threads: int, quick: bool) -> dict[str, Any]:
    """Everything a reader needs to place the figures, and the ceiling they are compared with."""
    import pentad

    # Results and the figures quoted from them change with every run, the code measured does not.
    changes = git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "isa": pentad.isa(),
        "threads": threads,
        "thread_runtime": pentad.thread_runtime(),
        "read_gb_s": {
            str(count): bandwidth.measure(count, quick) for count in sorted({1, threads})
        },
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("pentad", "numpy", *packages)},
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


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


def main(
    family: str,
    cases: Sequence[Case],
    packages: Sequence[str],
    arguments: Sequence[str] | None = None,
    *,
    rounds: int = 9,
    budget: float = 6.0,
    more: Sequence[tuple[str, Callable[[bool], dict[str, Any]]]] = (),
) -> int:
    """The command line of a family's benchmark; 1 where an answer was wrong or a call failed.

    rounds, budget
        The defaults of the options of that name.
    more
        Cases that are not about time: a name, and quick -> the record as in the result file.
    """
    parser = argparse.ArgumentParser(description=f"Benchmark pentad.{family} against its peers.")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: a smoke run")
    parser.add_argument("--only", metavar="CASE", help="only cases whose name contains this")
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        help="where to write; a folder if not named .json",
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, help=f"default {rounds}, or 2 with --quick")
    parser.add_argument(
        "--budget",
        type=float,
        default=budget,
        help="seconds per contender and case, then it sits out",
    )
    options = parser.parse_args(arguments)

    chosen = [case for case in cases if not options.only or options.only in case.name]
    added = [run for name, run in more if not options.only or options.only in name]
    if not (chosen or added):
        names = [*(case.name for case in cases), *(name for name, _ in more)]
        parser.error(f"no case matches {options.only!r}: " + "; ".join(names))
    rounds = options.rounds or (2 if options.quick else rounds)

    use_threads(options.threads)
    console = Console()
    if not console.is_terminal:
        console.width = 132
    bounds = {case.bound for case in chosen if case.bound}
    machine = machine_facts(packages, options.threads, options.quick)
    measure_peaks(machine, bounds, options.threads, options.quick)
    progress = Console(stderr=True)
    timed = [
        run_case(case, options.quick, options.threads, rounds, options.budget)
        for case in track(chosen, "measuring", console=progress, transient=True)
    ]
    # A ceiling is the best that was seen: a neighbour may have been busy at the first measurement.
    measure_peaks(machine, bounds, options.threads, options.quick)
    read = machine["read_gb_s"]
    for count, rate in read.items():
        read[count] = max(rate, bandwidth.measure(int(count), options.quick))
    for case in timed:
        if "bound" in case:
            relate(case, machine)
    results = {
        "family": family,
        "quick": options.quick,
        "machine": machine,
        "cases": timed + [run(options.quick) for run in added],
    }
    show(results, console)

    # A partial or small run never replaces the family's published results unless told where to go.
    path = options.json
    if path is None and not options.quick and not options.only:
        path = RESULTS / f"{family}.json"
    if path is not None:
        path = path if path.suffix == ".json" else path / f"{family}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"wrote {path}", markup=False, highlight=False)

    statuses = {record["status"] for case in results["cases"] for record in case["contenders"]}
    return 1 if statuses & {"wrong", "error"} else 0
