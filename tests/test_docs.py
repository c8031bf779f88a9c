# SPDX-License-Identifier: Apache-2.0
"""The README and the pages of the site: their code runs, their commands exist, nothing is left out.

The examples in docstrings, which the site shows too, run in test_docstrings.py.
"""

import contextlib
import importlib
import importlib.util
import inspect
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from cases import run_python

import pentad
from pentad import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FAMILIES = ("attention", "scan", "pq", "hamming", "sparse", "nn")


class Block(NamedTuple):
    line: int  # of the page, where the code begins
    language: str
    code: str


def blocks(page):
    found, text = [], page.read_text()
    for fence in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found.append(Block(text.count("\n", 0, fence.start(2)) + 1, fence[1].strip(), fence[2]))
    return found


def name(page):
    return str(page.relative_to(ROOT))


def of_language(language):
    return [page for page in PAGES if any(b.language == language for b in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_checked_here(page):
    """Python runs, commands are looked up; a plan of folders is neither and says so: text."""
    assert {b.language for b in blocks(page)} <= {"python", "console", "text"}


# --- Python ---------------------------------------------------------------------------------------


PEERS = ["flash_attn", "mamba_ssm", "causal_conv1d", "fla"]  # for which compat.install stands in


def python(page):
    """The Python of a page, its blocks in their order and on their lines."""
    lines = [""] * page.read_text().count("\n")
    for block in blocks(page):
        if block.language == "python":
            code = block.code.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines)


def missing(page):
    """Packages that its code imports and that are not installed."""
    imported = re.findall(r"^(?:import|from) (\w+)", python(page), re.MULTILINE)
    return [n for n in imported if n not in PEERS and importlib.util.find_spec(n) is None]


WITH_STAND_INS = [page for page in of_language("python") if "compat.install()" in python(page)]


@pytest.mark.parametrize("page", sorted({*of_language("python")} - {*WITH_STAND_INS}), ids=name)
def test_python_runs(page, tmp_path, monkeypatch):
    if missing(page):
        pytest.skip(f"{missing(page)} are not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(python(page), str(page), "exec"), {})


def test_python_with_stand_ins_runs(tmp_path, monkeypatch):
    """In a process of its own, as it changes what a whole process imports; one for all pages."""
    pages = [page for page in WITH_STAND_INS if not missing(page)]
    if not pages:
        pytest.skip("no torch")
    monkeypatch.chdir(tmp_path)
    sources = {str(page): python(page) for page in pages}
    run_python(f"for page, code in {sources!r}.items(): exec(compile(code, page, 'exec'), {{}})")


# --- Commands -------------------------------------------------------------------------------------


def commands():
    """(page, line) for each line of a console block that is a command."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "console":
                for line in block.code.splitlines():
                    line = line.split("  #")[0].strip()
                    if line:
                        yield pytest.param(line, id=f"{name(page)}: {line}")


@pytest.mark.parametrize("line", list(commands()))
def test_command_exists(line):
    """Most would take minutes or change the machine, so they are only read: by the parser of the
    command, and by what the Makefile and pyproject.toml say. `pentad info` runs."""
    program, *arguments = shlex.split(line)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [a for a in arguments if "=" not in a and a not in targets] == []
    elif program.endswith("pentad"):
        if arguments == ["info"]:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                assert cli.main(arguments) == 0
            assert pentad.isa() in output.getvalue()
        else:
            cli._parser().parse_args(arguments)
    elif program.endswith("pip"):
        assert arguments[0] == "install"
        for extra in re.findall(r"pentad\[(.*?)\]", line):
            declared = (ROOT / "pyproject.toml").read_text()
            assert all(f"\n{one} = [" in declared for one in extra.split(","))
    else:  # a program of the repository or of the virtual environment
        script = program if "/" in program else arguments[0]
        assert (ROOT / script).exists() or script.startswith(".venv/bin/")


# --- The reference --------------------------------------------------------------------------------


def directives():
    """{page of docs/api: the names it shows}."""
    found = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        found[page.stem] = re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    return found


def public(family):
    """The public names of a family; those of a module among them (scan.kernels) by its names."""
    module = importlib.import_module(f"pentad.{family}")
    for public_name in module.__all__:
        thing = getattr(module, public_name)
        if inspect.ismodule(thing):
            yield from (f"pentad.{family}.{public_name}.{inner}" for inner in thing.__all__)
        else:
            yield f"pentad.{family}.{public_name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_has_every_public_name_once(family):
    pytest.importorskip("torch")
    assert sorted(directives()[family]) == sorted(public(family))


def test_the_reference_has_every_name_of_the_package_and_the_stand_ins():
    pytest.importorskip("torch")
    own = {n for n in pentad.__all__ if not n.startswith("_") and n not in (*FAMILIES,)}
    assert set(directives()["index"]) == {f"pentad.{n}" for n in own}
    shown = directives()["integrations"]
    for peer in ("flash_attn", "causal_conv1d"):
        module = importlib.import_module(f"pentad.compat.{peer}")
        wanted = {f"{module.__name__}.{n}" for n in module.__all__ if not n.endswith("_ref")}
        assert wanted == {n for n in shown if n.startswith(module.__name__ + ".")}


# --- The whole ------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation():
    listed = set(
        re.findall(r"^ +- (?:[\w ]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    )
    assert listed == {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}


def test_the_measured_errors_are_those_of_the_script():
    """Every operation of tools/docs/numerics.py stands on the page in every dtype; and one family,
    the cheapest, keeps its budget again."""
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("numerics", ROOT / "tools/docs/numerics.py")
    numerics = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(numerics)
    cases = numerics.cases()
    rows = re.findall(
        r"^\| ([^|]*`[^|]*) \| (\w+) \| +[\d-]", numerics.PAGE.read_text(), re.MULTILINE
    )
    dtypes = [str(dtype).removeprefix("torch.") for dtype in numerics.DTYPES]
    assert rows == [(case.name, dtype) for case in cases for dtype in dtypes]
    for case in cases:
        if case.family == "Hamming":
            for dtype in numerics.DTYPES:
                pairs = numerics.measure(case, dtype)
                for pair, budget in zip(pairs, numerics.BUDGETS, strict=True):
                    assert numerics.within(dtype, pair, budget), case.name


def test_links_between_files_of_the_repository():
    """mkdocs checks those within the site; here those of README and CONTRIBUTING."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"
