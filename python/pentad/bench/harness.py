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

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


class Unfit(ValueError):
    """A contender cannot do what the case asks; that is told, and fails nothing."""


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

    def run(self, options: Options) -> list[dict[str, Any]]:
        return [run_case(self, options.quick, options.threads, options.rounds, options.budget)]


@dataclass(frozen=True)
class Options:
    """How to measure.

    rounds
        Quiet rounds of a case.
    budget
        Seconds per contender and case, after which it sits out.
    """

    quick: bool
    threads: int
    rounds: int
    budget: float


class Measured(Protocol):
    """What a family consists of: a `Case`, or another thing that gives records as of cases."""

    name: str
    bound: str | None

    def run(self, options: Options) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Family:
    """A benchmark that can be asked for by name.

    packages
        Of the peers; their versions stand with the results.
    rounds, budget
        Of `Options`, where nothing else is asked for.
    """

    name: str
    cases: Sequence[Measured]
    packages: Sequence[str]
    rounds: int = 9
    budget: float = 6.0


@dataclass
class Round:
    """Seconds of every contender that took its turn, and the cores that other processes used."""

    seconds: dict[str, float]
    foreign_cores: float


@dataclass
class Outcome:
    """What became of one contender: status is "ok", "missing", "unfit", "wrong" or "error".

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
    os.environ.setdefault("RAYON_NUM_THREADS", str(count))  # read when first used
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
    except Unfit as error:
        outcome.status, outcome.detail = "unfit", str(error)
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
    if outcome.only and outcome is not subject:
        rounds = [subject.only] if subject.only else quietest(done, count, subject.name)
        ours = [entry.seconds[subject.name] for entry in rounds]
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
