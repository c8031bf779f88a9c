# SPDX-License-Identifier: Apache-2.0
"""What the package promises as a whole."""

import ast
import importlib
import re
from importlib import metadata
from pathlib import Path

import pentad
from pentad import _C

ROOT = Path(__file__).parent.parent


def test_one_version_everywhere():
    assert pentad.__version__ == _C.__version__ == metadata.version("pentad")


def test_stub_matches_the_extension():
    tree = ast.parse((ROOT / "python/pentad/_C.pyi").read_text())
    declared = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            declared.add(node.name)
        elif isinstance(node, ast.AnnAssign) and node.target.id != "Array":
            declared.add(node.target.id)
    defined = {n for n in dir(_C) if not n.startswith("__")} | {"__version__"}
    assert declared == defined


def test_stub_has_the_arguments_of_the_extension():
    tree = ast.parse((ROOT / "python/pentad/_C.pyi").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            signature = re.search(r"\((.*?)\) ->", getattr(_C, node.name).__doc__)[1]
            given = [part for part in signature.split(", ") if ":" in part]
            assert len(given) == len(node.args.args), node.name


def test_public_names_have_docstrings_and_exist():
    for module in ("pentad", "pentad.hamming", "pentad.nn"):
        module = importlib.import_module(module)
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing) and not type(thing).__name__.startswith("builtin"):
                assert thing.__doc__, f"{module.__name__}.{name}"


def test_typed():
    assert (Path(pentad.__file__).parent / "py.typed").exists()
