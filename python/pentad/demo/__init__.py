# SPDX-License-Identifier: Apache-2.0
"""The whole package on real input, in some minutes: ``pentad demo``.

`search` asks the installed documentation questions through every kind of index, `training` trains
the language model of `model` on it beside its twin in `plain` PyTorch, `dropin` runs Hugging Face
models with and without pentad. `stage` is what the three have in common, `report` shows what they
found.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

# Each is a module here with a function `run`.
STAGES = {"search": "search", "model": "training", "dropin": "dropin"}
TITLES = {"search": "Search", "model": "A model", "dropin": "Drop-in"}
NEEDS = ("jinja2", "matplotlib", "rich", "safetensors", "sklearn", "torch", "transformers")


def run(
    out: Path, *, small: bool = False, stages: Sequence[str] = (), packages: Sequence[str] = ()
) -> int:
    """Run the stages, show what they found and write the report.

    Parameters
    ----------
    out : Path
        The folder to write to; made where there is none.
    small : bool
        A smoke run: little documentation, few steps.
    stages : sequence of str
        Of `STAGES`; empty for all.
    packages : sequence of str
        Whose documentation is read, in place of everything installed.

    Returns
    -------
    int
        How many stages failed. The others ran all the same; each failure is one line on standard
        error.

    Raises
    ------
    ModuleNotFoundError
        What the demo needs is not installed.
    OSError
        The folder cannot be written.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the demo needs {', '.join(missing)}: pip install 'pentad[demo]'"
        )
    out.mkdir(parents=True, exist_ok=True)
    from ..docsearch import present
    from . import report
    from .stage import Context

    with present.progress() as progress:
        context = Context(out, small, progress, packages)
        results = [_run(name, context) for name in dict.fromkeys(stages or STAGES)]
    report.write(results, out)
    report.show(results, out)
    for result in results:
        for failure in result.failures:
            print(f"pentad demo: {result.title}: {failure}", file=sys.stderr)
    return sum(bool(result.failures) for result in results)


def _run(name: str, context):
    from .stage import Result, in_one_line

    start = time.perf_counter()
    try:
        result = importlib.import_module(f".{STAGES[name]}", __name__).run(context)
    except Exception as error:  # whatever it is, the other stages are still worth running
        result = Result(TITLES[name], failures=[in_one_line(error)])
        details = getattr(error, "details", "") or traceback.format_exc()
        result.texts["What went wrong"] = details
    result.seconds = time.perf_counter() - start
    return result
