# SPDX-License-Identifier: Apache-2.0
"""Shipped: one version, complete sources, pinned extras, workflows that run what runs here."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import pentad

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from requirements import requirements, tomllib  # noqa: E402

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_the_version_is_typed_in_one_place():
    assert PROJECT["version"] == pentad.__version__
    typed = [
        path
        for folder in ("csrc", "python", "tests/cpp", "bench/cpp", "tools", "cmake")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".h", ".cc", ".cu", ".cuh", ".inc", ".py", ".txt", ".cmake")
        and re.search(rf"\b{re.escape(PROJECT['version'])}\b", path.read_text())
    ]
    assert typed == []
    assert PROJECT["version"] not in (ROOT / "CMakeLists.txt").read_text()


def test_every_source_is_built():
    lists = [ROOT / "CMakeLists.txt", ROOT / "tests/cpp/CMakeLists.txt"]
    text = "".join(path.read_text() for path in lists)
    named = set(re.findall(r"csrc/\S+\.(?:cc|cu)(?=[\s)])", text))
    present = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cc", ".cu")
    }
    assert named == present


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], check=True, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2]: tar.getmember(name).size for name in tar.getnames()}


def test_sdist_has_what_a_build_reads(sdist):
    wanted = {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"}
    for folder in ("csrc", "python/pentad"):
        wanted |= {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".cc", ".cu", ".cuh", ".h", ".inc", ".in", ".py", ".pyi", ".typed")
        }
    assert wanted - set(sdist) == set()


def test_sdist_has_nothing_built_or_measured(sdist):
    foreign = (".so", ".a", ".o", ".pyc", ".whl", ".pentad")
    assert [name for name in sdist if name.endswith(foreign)] == []
    assert [n for n in sdist if n.startswith((".", "tests/", "docs/", "site/", "bench/res"))] == []
    assert sum(sdist.values()) < 20e6


def test_extras():
    assert {"torch", "bench", "demo", "encoders", "docs", "dev"} <= set(EXTRAS)
    assert PROJECT["dependencies"] == ["numpy>=1.26"]


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_are_pinned_within_their_ranges(extra):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(pin.name, []).append(next(iter(pin.specifier)).version)
    for line in requirements(PROJECT, extra):
        wanted = Requirement(line)
        assert wanted.name in pins, f"{wanted.name} of [{extra}] has no pin"
        for version in pins[wanted.name]:
            assert wanted.specifier.contains(version), f"{line} of [{extra}] is pinned to {version}"


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github/workflows" / name).read_text())


def commands(job: dict) -> str:
    return "\n".join(step["run"] for step in job["steps"] if "run" in step)


def test_the_workflow_runs_what_runs_here():
    jobs = workflow("ci.yml")["jobs"]
    assert "bash .ci/run" in commands(jobs["all"])
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in (*jobs.values(), *workflow("wheels.yml")["jobs"].values()):
        assert set(re.findall(r"\bmake ([a-z0-9-]+)", commands(job))) <= targets


def test_wheels_for_every_platform_and_python():
    machines = workflow("wheels.yml")["jobs"]["wheels"]["strategy"]["matrix"]["machine"]
    assert [m.split("-")[0] for m in machines] == ["ubuntu", "ubuntu", "macos", "windows"]
    config = PYPROJECT["tool"]["cibuildwheel"]
    first = int(re.search(r">=3\.(\d+)", PROJECT["requires-python"])[1])
    assert config["build"].split() == [f"cp3{minor}-*" for minor in range(first, 15)]
    assert "auditwheel" in config["linux"]["repair-wheel-command"]
    assert (ROOT / config["test-command"].split("{project}/")[1]).exists()
