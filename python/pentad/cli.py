# SPDX-License-Identifier: Apache-2.0
"""The command ``pentad``: search the documentation of what is installed, show and measure it all.

Exit status: 0, 1 where something could not be done, 2 where the call makes no sense; then one line
on standard error says what.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from . import __version__, num_threads


def main(arguments: list[str] | None = None) -> int:
    """Run the command with ``arguments``, those of the process by default; returns the status."""
    # What the interpreter and all imports up to here took of this thread.
    started_up = time.thread_time()
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options, started_up)
        sys.stdout.flush()  # here, so that a closed pipe shows here
        return status
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (LookupError, ValueError, OSError, ImportError, MemoryError) as error:
        print(f"pentad {options.command}: {_in_one_line(error)}", file=sys.stderr)
        return 1


def _index(options: argparse.Namespace, started_up: float) -> int:
    from .docsearch import default_path

    index = options.index or "binary"
    encoder = _encoder(options)
    path = options.out or default_path(encoder, index)
    _build(path, encoder, index, options.package)
    return 0


def _search(options: argparse.Namespace, started_up: float) -> int:
    begin = time.perf_counter()
    from .docsearch import DocIndex, default_path, present

    imported = time.perf_counter()
    encoder = _encoder(options)
    path = options.file or default_path(encoder, options.index or "binary")
    if options.file is None and not path.exists():
        print(f"No index yet: building {path}, once.", file=sys.stderr)
        _build(path, encoder, options.index or "binary", ())
    opened = time.perf_counter()
    docs = DocIndex.load(path)
    if options.index not in (None, docs.kind):
        raise ValueError(f"{path} holds an index of kind '{docs.kind}', not '{options.index}'")
    loaded = time.perf_counter()
    question = " ".join(options.question)
    answer = docs.search(question, options.k, rescore=options.rescore, packages=options.package)
    stages = {"start-up": started_up + imported - begin, "load": loaded - opened}
    seconds = {**stages, **answer.seconds}
    if options.json:
        print(present.as_json(question, answer, seconds, file=str(path), stale=docs.stale))
        return 0
    printing = time.perf_counter()
    present.show(answer)
    present.show_times({**seconds, "print": time.perf_counter() - printing}, len(docs.passages))
    if not answer.hits:
        print(f"No passage has any word of: {question}", file=sys.stderr)
    if docs.stale:
        renew = ["pentad", "index"]
        renew += ["--encoder", docs.about["encoder"]] if docs.about["encoder"] else []
        renew += ["--index", docs.kind] if docs.kind != "binary" else []
        for package in docs.about["packages"]:
            renew += ["--package", package]
        renew += ["--out", str(path)] if options.file else []
        print(
            f"Other packages are installed than when {path} was built; renew it with "
            f"`{shlex.join(renew)}`.",
            file=sys.stderr,
        )
    return 0


def _encoder(options: argparse.Namespace) -> str:
    if options.encoder and options.index == "sparse":
        raise ValueError("--index sparse ranks words, without an --encoder")
    return options.encoder or "lsa"


def _build(path: Path, encoder: str, index: str, packages) -> None:
    """Build an index and save it, with progress and a summary on standard error."""
    from .docsearch import DocIndex, default_path, present

    start = time.perf_counter()
    if path.parent == default_path(encoder).parent:
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"{path} cannot be written")  # what cannot be saved need not be built
    with present.progress() as progress:
        docs = DocIndex.build(
            packages,
            encoder=encoder,
            index=index,
            processes=num_threads(),
            progress=progress,
        )
        docs.save(path)
    skipped = "".join(f", {n} {reason}" for reason, n in docs.about["skipped"].items())
    print(
        f"{path}: {len(docs.passages)} passages of {docs.about['files']} files{skipped}, "
        f"{path.stat().st_size / 1e6:.0f} MB, {time.perf_counter() - start:.1f} s",
        file=sys.stderr,
    )


def _info(options: argparse.Namespace, started_up: float) -> int:
    import importlib.metadata

    import pentad

    try:
        torch = importlib.metadata.version("torch")  # without importing it
    except importlib.metadata.PackageNotFoundError:
        torch = None
    facts = {
        "pentad": __version__,
        "python": sys.version.split()[0],
        "isa": pentad.isa(),
        "isa_available": pentad.isa_available(),
        "threads": pentad.num_threads(),
        "thread_runtime": pentad.thread_runtime(),
        "cuda_built": pentad.cuda_built(),
        "cuda_devices": pentad.cuda_devices(),
        "torch": torch,
    }
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    devices = ", ".join(facts["cuda_devices"]) or "no device found"
    lines = {
        "pentad": f"{__version__} (Python {facts['python']})",
        "instructions": f"{facts['isa']} (this processor offers "
        f"{', '.join(facts['isa_available'])})",
        "threads": f"{facts['threads']}, {facts['thread_runtime']}",
        "cuda": devices if facts["cuda_built"] else "not built",
        "torch": torch or "not installed",
    }
    for name, text in lines.items():
        print(f"{name:<13} {text}")
    return 0


def _bench(options: argparse.Namespace, started_up: float) -> int:
    from .bench import CURVES, FAMILIES

    names = options.family or list(FAMILIES)
    if unknown := set(names) - {*FAMILIES, CURVES}:
        known = ", ".join([*FAMILIES, CURVES])
        print(f"pentad bench: no family {min(unknown)!r}; there are {known}", file=sys.stderr)
        return 2
    try:
        from .bench import command
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}: pip install 'pentad[bench]'") from error
    return command.run(
        list(dict.fromkeys(names)),
        quick=options.quick,
        only=options.only,
        json_path=options.json,
        threads=options.threads or min(2, os.cpu_count() or 1),
        rounds=options.rounds,
        budget=options.budget,
    )


def _demo(options: argparse.Namespace, started_up: float) -> int:
    from . import demo

    return min(demo.run(options.out, small=options.small, stages=options.stage), 1)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pentad",
        description="Search the documentation of what is installed; show and measure the package.",
    )
    parser.add_argument("--version", action="version", version=f"pentad {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    index = commands.add_parser("index", help="read, encode and index the installed documentation")
    index.add_argument("--out", type=Path, metavar="FILE", help="instead of the user's cache")
    index.set_defaults(run=_index)

    search = commands.add_parser("search", help="search it; builds the index at first")
    search.add_argument("question", nargs="+", type=_question)
    search.add_argument("-k", type=_count, default=10, metavar="N", help="answers (%(default)s)")
    search.add_argument(
        "--rescore",
        choices=("store", "bits", "none"),
        default="store",
        help="score the candidates again with the int8 vectors, binary codes, or not at all",
    )
    search.add_argument("--file", type=Path, help="an index made with `pentad index --out FILE`")
    search.add_argument("--json", action="store_true", help="one JSON object")
    search.set_defaults(run=_search)

    info = commands.add_parser("info", help="what this installation and machine can do")
    info.add_argument("--json", action="store_true", help="one JSON object")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="the whole package on real input, in some minutes")
    demo.add_argument("--small", action="store_true", help="a smoke run, in seconds")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("pentad-demo"),
        metavar="DIR",
        help="where to write the report and what is made (%(default)s)",
    )
    demo.add_argument(
        "--stage",
        action="append",
        default=[],
        choices=("search", "model", "dropin"),
        help="only this one; may be repeated",
    )
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measure against the peers that are installed")
    bench.add_argument(
        "family",
        nargs="*",
        help="attention, scan, pq, sparse, hamming (all of these unless told), or curves: "
        "cost against sequence length and size",
    )
    bench.add_argument("--quick", action="store_true", help="small sizes, few rounds: a smoke run")
    bench.add_argument("--only", metavar="TEXT", help="only cases whose name contains this")
    bench.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        help="where to write: a .json file, or a folder that gets one for each family",
    )
    bench.add_argument("--threads", type=_count, metavar="N", help="2, or 1 where there is 1 core")
    bench.add_argument("--rounds", type=_count, metavar="N", help="times that each case is timed")
    bench.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        help="of a contender in a case; afterwards it sits out",
    )
    bench.set_defaults(run=_bench)

    for command in (index, search):
        command.add_argument("--encoder", choices=("lsa", "minilm"), help="lsa unless told")
        command.add_argument(
            "--index",
            choices=("binary", "pq", "scalar", "rabitq", "sparse", "hybrid"),
            help="the kind of index: binary unless told, or what --file holds; sparse ranks words "
            "by BM25 and needs no encoder, hybrid merges that with binary",
        )
        command.add_argument(
            "--package",
            action="append",
            default=[],
            metavar="NAME",
            help="only this import path or distribution; may be repeated",
        )
    return parser


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return seconds


def _question(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"there is no file {error.filename}"
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()) or type(error).__name__
