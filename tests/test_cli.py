# SPDX-License-Identifier: Apache-2.0
"""The command `pentad`: what it prints, where, and its exit status."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import pentad
from pentad import cli, docsearch
from pentad.docsearch import DocIndex, engine

COMMAND = [sys.executable, "-m", "pentad"]


def run(*arguments, **options):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An index of two packages, and what building it printed."""
    path = tmp_path_factory.mktemp("index") / "small.pentad"
    process = run("index", "--package", "json", "--package", "gzip", "--out", str(path))
    return path, process


@pytest.fixture
def small_world(built, tmp_path, monkeypatch):
    """An empty cache, and a machine where only a few packages are installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = DocIndex.build
    monkeypatch.setattr(DocIndex, "build", lambda packages, **more: build(["gzip", "json"], **more))
    return tmp_path / "pentad" / "docs-lsa.pentad"


def test_index_says_what_it_did(built):
    path, process = built
    assert process.returncode == 0
    assert process.stdout == ""
    *stages, summary = process.stderr.splitlines()
    assert [stage.split(":")[0] for stage in stages] == [
        "reading files",
        "counting words",
        "finding concepts",
    ]
    count = len(DocIndex.load(path).passages)
    assert re.fullmatch(rf"{path}: {count} passages of \d+ files, \d+ MB, \d+\.\d s", summary)


def test_a_pipe_gets_one_line_for_each_hit(built):
    process = run("search", "open", "a gzip file", "-k", "4", "--file", str(built[0]))
    assert process.returncode == 0
    assert process.stderr == ""
    *hits, times = process.stdout.splitlines()
    fields = [hit.split("\t") for hit in hits]
    assert [rank for rank, *_ in fields] == ["1", "2", "3", "4"]
    names = {name: (first_line, place) for _, _, name, first_line, place in fields}
    first_line, place = names["gzip.open"]
    assert first_line == "Open a gzip-compressed file in binary or text mode."
    assert re.search(r"gzip\.py:\d+$", place)
    scores = [float(score) for _, score, *_ in fields]
    assert scores == sorted(scores, reverse=True)
    names = ("start-up", "load", "encode", "binary search", "rescore", "print")
    stages = ", ".join(rf"{name} [\d.]+ ms" for name in names)
    assert re.fullmatch(rf"# \d+ passages; {stages}; total [\d.]+ ms", times)
    assert "\033" not in process.stdout


def test_more_answers_than_passages(built):
    process = run("search", "open a file", "-k", "100000000", "--file", str(built[0]))
    assert process.returncode == 0
    assert process.stdout.splitlines()[-1].startswith("# ")


@pytest.mark.parametrize("out", [".", "missing/x.pentad"])
def test_what_cannot_be_saved_is_not_built(tmp_path, out):
    process = run("index", "--package", "json", "--out", str(tmp_path / out))
    assert process.returncode == 1
    assert "cannot be written" in process.stderr
    assert "reading files" not in process.stderr


def test_json_is_for_programs(built):
    arguments = ("search", "parse a json string", "-k", "3", "--rescore", "bits", "--json")
    process = run(*arguments, "--package", "json", "--file", str(built[0]))
    answer = json.loads(process.stdout)
    assert answer["question"] == "parse a json string"
    assert answer["stale"] is False
    assert answer["file"] == str(built[0])
    assert set(answer["seconds"]) == {"start-up", "load", "encode", "binary search", "rescore"}
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3]
    for hit in answer["hits"]:
        assert hit["name"].startswith("json")
        assert hit["text"].startswith(hit["first_line"])
        assert os.path.exists(hit["file"])
        assert hit["line"] >= 1


def test_a_terminal_gets_colours(built):
    ours, theirs = os.openpty()
    arguments = ("search", "open a file", "-k", "2", "--file", str(built[0]))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    process = subprocess.run([*COMMAND, *arguments], stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.returncode == 0
    assert b"gzip.open" in shown
    assert b"\033[1m" in shown
    assert b"\t" not in shown


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["search", "  "], 2, "must not be empty"),
        (["search"], 2, "required: question"),
        (["search", "x", "-k", "0"], 2, "-k: must be a number of at least 1, got '0'"),
        (["search", "x", "-k", "ten"], 2, "-k: must be a number of at least 1, got 'ten'"),
        (["search", "x", "--rescore", "all"], 2, "--rescore: invalid choice: 'all'"),
        (["search", "x", "--encoder", "bert"], 2, "--encoder: invalid choice: 'bert'"),
        (["search", "x", "--encoder", "lsa", "--index", "sparse"], 1, "without an --encoder"),
        (["search", "x", "--index", "tree"], 2, "--index: invalid choice: 'tree'"),
        (["index", "--index", "hnsw"], 2, "--index: invalid choice: 'hnsw'"),
        (["search", "x", "--file", "missing.pentad"], 1, "there is no file missing.pentad"),
        (["search", "x", "--file", __file__], 1, "test_cli.py is not a pentad file"),
        (["index", "--package", "no-such"], 1, "no installed package is called 'no-such'"),
        (
            ["index", "--package", "gzip", "--out", "/dev/null/x"],
            1,
            "x cannot be written",
        ),
        ([], 2, "required: COMMAND"),
        (["serch"], 2, "invalid choice: 'serch'"),
    ],
)
def test_bad_calls_get_one_line(arguments, status, complaint, capsys):
    try:
        returned = cli.main(arguments)
    except SystemExit as exit:
        returned = exit.code
    printed = capsys.readouterr()
    assert returned == status
    assert printed.out == ""
    assert printed.err.startswith("pentad")
    assert printed.err.count("\n") == 1
    assert complaint in printed.err


def test_a_failure_in_the_process_itself(built, tmp_path):
    damaged = tmp_path / "damaged.pentad"
    damaged.write_bytes(built[0].read_bytes()[:-100])
    process = run("search", "open", "--file", str(damaged))
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr.startswith("pentad search: ")
    assert process.stderr.count("\n") == 1


def test_an_unknown_package_in_a_search(built, capsys):
    assert cli.main(["search", "open", "--package", "numpy", "--file", str(built[0])]) == 1
    assert capsys.readouterr().err == "pentad search: the index has no package called 'numpy'\n"


def test_unknown_words_are_no_failure(built, capsys):
    assert cli.main(["search", "zyzzyva", "--file", str(built[0])]) == 0
    printed = capsys.readouterr()
    assert printed.err == "No passage has any word of: zyzzyva\n"
    assert printed.out.startswith("# ")
    assert printed.out.count("\n") == 1


def test_the_first_search_builds_the_index(small_world, capsys):
    assert cli.main(["search", "open a file"]) == 0
    first = capsys.readouterr()
    assert f"No index yet: building {small_world}" in first.err
    assert "gzip.open" in first.out
    before = small_world.stat().st_mtime_ns
    assert cli.main(["search", "open a file"]) == 0
    second = capsys.readouterr()
    assert second.err == ""
    assert small_world.stat().st_mtime_ns == before
    assert second.out.splitlines()[:-1] == first.out.splitlines()[:-1]


def test_a_stale_index_is_used_and_reported(built, small_world, capsys, monkeypatch):
    small_world.parent.mkdir()
    shutil.copy(built[0], small_world)
    before = small_world.stat().st_mtime_ns
    monkeypatch.setattr(engine, "fingerprint", lambda: "Python 4.0")
    assert cli.main(["search", "open a file"]) == 0
    printed = capsys.readouterr()
    assert "gzip.open" in printed.out
    assert re.fullmatch(
        "Other packages are installed than when .* was built; renew it with "
        "`pentad index --encoder lsa --package json --package gzip`.\n",
        printed.err,
    )
    assert small_world.stat().st_mtime_ns == before


def test_an_interrupted_build_leaves_the_old_index(built, small_world, monkeypatch):
    small_world.parent.mkdir()
    shutil.copy(built[0], small_world)
    before = small_world.read_bytes()

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(docsearch.LsaEncoder, "fit", interrupt)
    assert cli.main(["index"]) == 130
    assert small_world.read_bytes() == before
    assert os.listdir(small_world.parent) == [small_world.name]


def test_a_closed_pipe_is_quiet(built):
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [*COMMAND, "search", "open", "--file", str(built[0])],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert process.stderr == ""
    assert process.returncode == 0


def test_info_for_people():
    process = run("info")
    assert process.returncode == 0
    shown = dict(line.split(maxsplit=1) for line in process.stdout.splitlines())
    assert set(shown) == {"pentad", "instructions", "threads", "cuda", "torch"}
    assert shown["pentad"].startswith(pentad.__version__)
    for level in pentad.isa_available():
        assert level in shown["instructions"]


def test_info_for_programs_imports_no_torch(monkeypatch):
    code = "import sys; from pentad.cli import main; main(['info', '--json'])"
    code += "; sys.exit('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0
    facts = json.loads(process.stdout)
    assert facts["pentad"] == pentad.__version__
    assert facts["isa_available"] == pentad.isa_available()
    assert facts["isa"] in facts["isa_available"]
    assert facts["threads"] >= 1
    assert facts["cuda_built"] == pentad.cuda_built()
    assert facts["cuda_devices"] == pentad.cuda_devices()


def test_info_without_torch(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert cli.main(["info"]) == 0
    assert re.search(r"^torch +not installed$", capsys.readouterr().out, re.MULTILINE)


def test_the_installed_script_is_the_module():
    assert run("--version").stdout == f"pentad {pentad.__version__}\n"
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="pentad")
    assert script.load() is cli.main


@pytest.mark.parametrize("kind", ["pq", "scalar", "rabitq"])
def test_another_kind_of_index(kind, small_world, tmp_path, capsys):
    """Built beside the binary one, once; and refused where the file holds another."""
    assert cli.main(["search", "open a gzip file", "--index", kind]) == 0
    path = small_world.with_name(f"docs-lsa-{kind}.pentad")
    printed = capsys.readouterr()
    assert f"No index yet: building {path}, once." in printed.err
    assert "gzip.open" in printed.out
    assert f"{kind} search" in printed.out
    assert path.exists()
    assert not small_world.exists()
    assert cli.main(["search", "open a gzip file", "--index", kind, "--json"]) == 0
    printed = capsys.readouterr()
    assert "building" not in printed.err
    assert json.loads(printed.out)["file"] == str(path)

    out = tmp_path / "own.pentad"
    assert cli.main(["index", "--index", kind, "--out", str(out)]) == 0
    assert cli.main(["search", "open", "--file", str(out)]) == 0
    capsys.readouterr()
    assert cli.main(["search", "open", "--file", str(out), "--index", "binary"]) == 1
    complaint = f"pentad search: {out} holds an index of kind '{kind}', not 'binary'\n"
    assert capsys.readouterr().err == complaint
    assert cli.main(["search", "open", "--file", str(out), "--rescore", "bits"]) == 1
    complaint = f"rescore must be one of store, none for an index of kind '{kind}', got 'bits'"
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        ("sparse", ["encode", "sparse search"]),
        ("hybrid", ["encode", "binary search", "rescore", "sparse search", "merge"]),
    ],
)
def test_kinds_with_words(kind, stages, small_world, tmp_path, capsys, monkeypatch):
    path = small_world.with_name(
        "docs-sparse.pentad" if kind == "sparse" else "docs-lsa-hybrid.pentad"
    )
    assert cli.main(["search", "open a gzip file", "--index", kind]) == 0
    printed = capsys.readouterr()
    assert f"No index yet: building {path}, once." in printed.err
    assert "weighing words: " in printed.err
    assert ("finding concepts: " in printed.err) == (kind == "hybrid")
    assert "gzip.open" in printed.out
    for stage in stages:
        assert f"{stage} " in printed.out.splitlines()[-1]
    assert cli.main(["search", "open a gzip file", "--index", kind, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["file"] == str(path)
    assert list(answer["seconds"]) == ["start-up", "load", *stages]
    scores = [hit["score"] for hit in answer["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert cli.main(["search", "zyzzyva", "--index", kind]) == 0
    assert capsys.readouterr().err == "No passage has any word of: zyzzyva\n"

    complaint = f"pentad search: {path} holds an index of kind '{kind}', not 'binary'\n"
    assert cli.main(["search", "open", "--file", str(path), "--index", "binary"]) == 1
    assert capsys.readouterr().err == complaint
    monkeypatch.setattr(engine, "fingerprint", lambda: "Python 4.0")
    assert cli.main(["search", "open", "--index", kind]) == 0
    encoder = "" if kind == "sparse" else "--encoder lsa "
    assert f"renew it with `pentad index {encoder}--index {kind}" in capsys.readouterr().err


def test_the_choices_are_the_kinds():
    parser = cli._parser()
    for command in (["index"], ["search", "x"]):
        for kind in docsearch.INDEXES:
            assert parser.parse_args([*command, "--index", kind]).index == kind
