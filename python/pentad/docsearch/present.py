# SPDX-License-Identifier: Apache-2.0
"""Answers for people at a terminal, for pipes, and for programs.

`rich` costs 60 ms to import, half of a search, so only a terminal pays for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from .engine import Answer
from .passages import Passage, Progress


def show(answer: Answer) -> None:
    """Print the hits: three lines each at a terminal, one line of tabbed fields elsewhere."""
    if _is_rich(sys.stdout):
        _show_in_terminal(answer)
        return
    for rank, (score, passage) in enumerate(answer.hits, 1):
        fields = (f"{rank}", f"{score:.3f}", _named(passage), passage.first_line, passage.place)
        print("\t".join(" ".join(field.split()) for field in fields))


def _show_in_terminal(answer: Answer) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim")
    table.add_column(justify="right", style="cyan")
    table.add_column()
    for rank, (score, passage) in enumerate(answer.hits, 1):
        text = Text(_named(passage), style="bold")
        text.append(f"  {passage.kind}, {passage.distribution}", style="not bold dim")
        text.append(f"\n{passage.first_line}\n", style="not bold")
        text.append(passage.place, style="not bold dim")
        table.add_row(str(rank), f"{score:.3f}", text)
    Console(highlight=False).print(table)


def _is_rich(stream: TextIO) -> bool:
    """Whether the stream is a terminal and `rich` is there to draw on it."""
    return stream.isatty() and importlib.util.find_spec("rich") is not None


def _named(passage: Passage) -> str:
    return f"{passage.name} (+{passage.copies})" if passage.copies else passage.name


def show_times(seconds: dict[str, float], passages: int) -> None:
    """Print what each stage took, and all of them, under the hits."""
    stages = ", ".join(f"{stage} {1000 * spent:.1f} ms" for stage, spent in seconds.items())
    total = 1000 * sum(seconds.values())
    print(f"# {passages} passages; {stages}; total {total:.1f} ms")


def as_json(question: str, answer: Answer, seconds: dict[str, float], **more) -> str:
    """The answer as one JSON object; seconds by stage, hits best first with their whole text."""
    hits = [
        {"rank": rank, "score": score, **passage._asdict(), "first_line": passage.first_line}
        for rank, (score, passage) in enumerate(answer.hits, 1)
    ]
    return json.dumps({"question": question, "hits": hits, "seconds": seconds, **more}, indent=2)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A function to report progress to: a bar for each stage at a terminal, else a line for each.

    Both go to standard error.
    """
    if _is_rich(sys.stderr):
        from rich.console import Console
        from rich.progress import Progress as Bars

        with Bars(*Bars.get_default_columns(), console=Console(stderr=True)) as bars:
            tasks = {}

            def report(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=None)
                bars.update(tasks[stage], completed=done, total=total or None)

            yield report
        return

    begun: dict[str, float] = {}

    def report_lines(stage: str, done: int, total: int) -> None:
        start = begun.setdefault(stage, time.perf_counter())
        if total and done == total:
            count = f"{total}, " if total > 1 else ""
            print(f"{stage}: {count}{time.perf_counter() - start:.1f} s", file=sys.stderr)

    yield report_lines
