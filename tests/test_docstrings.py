# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings run, and everything public has one."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import pentad

FAMILIES = ["pentad.hamming", "pentad.pq", "pentad.sparse"]
if importlib.util.find_spec("torch"):
    FAMILIES += ["pentad.attention", "pentad.nn", "pentad.scan"]
NEEDED = {
    "pentad.docsearch.engine": ["rich", "sklearn"],
    "pentad.integrations.transformers": ["transformers"],
}  # beside torch


def modules():
    """Those with examples; without torch, those that work without it."""
    root = Path(pentad.__file__).parent
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        needs_torch = re.search(r"^(import|from) torch", text, re.MULTILINE)
        if ">>> " in text and ("pentad.nn" in FAMILIES or not needs_torch):
            parts = ("pentad", *path.relative_to(root).with_suffix("").parts)
            yield ".".join(parts).removesuffix(".__init__")


def public():
    return [f"{f}.{name}" for f in FAMILIES for name in importlib.import_module(f).__all__]


def resolve(dotted):
    family, name = dotted.rsplit(".", 1)
    return getattr(importlib.import_module(family), name)


@pytest.mark.parametrize("name", list(modules()))
def test_examples_run(name):
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said = []
    for example in doctest.DocTestFinder().find(module, globs={"pentad": pentad, "np": np}):
        runner.run(example, out=said.append, clear_globs=False)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.mark.parametrize("name", public())
def test_everything_public_shows_an_example(name):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(resolve(name)) or "")
    assert examples
    assert any(name.rsplit(".", 1)[1] in example.source for example in examples)


@pytest.mark.parametrize("name", public())
def test_every_public_method_is_described(name):
    thing = resolve(name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            if callable(value) and not attribute.startswith("_"):
                assert inspect.getdoc(value), attribute


@pytest.mark.parametrize("name", [n for n in public() if inspect.isfunction(resolve(n))])
def test_every_parameter_is_described(name):
    function = resolve(name)
    text = inspect.getdoc(function)
    if name == "pentad.hamming.intersection":  # which is distance with one metric
        return
    section = text.split("Parameters\n----------\n")[1].split("\n\n")[0]
    described = {
        part.strip() for line in section.splitlines() if not line.startswith(" ")
        for part in line.split(":")[0].split(",")
    }  # fmt: skip
    assert described == set(inspect.signature(function).parameters)
    assert "Returns\n-------" in text


@pytest.mark.parametrize("name", public())
def test_docstrings_are_markdown_as_the_site_reads_them(name):
    """No directive, role or table of reStructuredText, which would stand there as typed."""
    text = inspect.getdoc(resolve(name)) or ""
    assert re.findall(r"::$|^\.\. |^=+( =+)+$|:\w+:`", text, re.MULTILINE) == []
