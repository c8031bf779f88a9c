# SPDX-License-Identifier: Apache-2.0
"""What a stage of the demo is given, and what it hands back to be shown."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..docsearch.passages import Passage, Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is read with --small: enough for most questions, and for a model to have something to read.
SMALL = [
    *("argparse", "base64", "bisect", "collections", "csv", "datetime", "difflib", "functools"),
    *("gzip", "glob", "hashlib", "heapq", "html", "itertools", "json", "math", "pathlib", "pprint"),
    *("random", "re", "shlex", "shutil", "statistics", "struct", "subprocess", "tempfile"),
    *("textwrap", "threading", "timeit", "zipfile", "numpy.linalg"),
]


@dataclass
class Table:
    """Rows of texts; the first column is text, the others are figures unless `prose`."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    prose: bool = False
    brief: bool = True  # shown in the terminal too


@dataclass
class Result:
    """What a stage found; `failures` says in one line each what did not hold."""

    title: str
    about: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, holds: bool, otherwise: str) -> None:
        """Note a failure, and go on: what was measured is shown all the same."""
        if not holds:
            self.failures.append(otherwise)


class Context:
    """The folder to write to, the size of everything, and the documentation, which is read once."""

    def __init__(self, out: Path, small: bool, progress: Progress, packages=()):
        self.out, self.small, self.progress = out, small, progress
        self.packages = list(packages) or (SMALL if small else [])

    @cached_property
    def passages(self) -> list[Passage]:
        """Of everything installed, or of a few modules."""
        from ..docsearch import corpus

        sources = corpus.sources()
        if self.packages:
            sources = corpus.restrict(sources, self.packages)
        return corpus.read(sources, processes=2, progress=self.progress).passages


class ChildError(RuntimeError):
    """What another process failed with, in one line, and its traceback."""

    def __init__(self, line: str, details: str = ""):
        super().__init__(line)
        self.details = details


def in_process(function: Callable, *arguments: Any, progress: Progress) -> Any:
    """``function(report, *arguments)`` in a process of its own, and what it returned.

    `report` is a progress function that arrives at `progress`. A process that has done nothing else
    shows how much memory the work takes, and imports what it imports for the first time.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        while True:
            kind, content = ours.recv()
            if kind == "progress":
                progress(*content)
            elif kind == "result":
                return content
            else:
                raise ChildError(*content)
    except EOFError:
        process.join()
        raise ChildError(f"{function.__name__} ended with status {process.exitcode}") from None
    finally:
        ours.close()
        process.join(5)
        process.kill()  # nothing, where it has ended


def _child(connection, function, arguments) -> None:
    def report(stage: str, done: int, total: int) -> None:
        connection.send(("progress", (stage, done, total)))

    try:
        connection.send(("result", function(report, *arguments)))
    except Exception as error:
        connection.send(("error", (in_one_line(error), traceback.format_exc())))


def in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ChildError):  # which begins with the name of the error there
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
