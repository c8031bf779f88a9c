# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources, as texts: each is built, each entry has its stub, each kernel its row."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))
HEADERS = sorted((ROOT / "csrc").glob("*/*_cuda.h"))


def kernels_in(text: str):
    for piece in re.sub(r"//.*", "", text).split("__global__ void")[1:]:
        bounds = r"\s*__launch_bounds__\((?:[^()]|\([^()]*\))*\)"
        yield re.match(rf"(?:{bounds})?\s*(\w+)", piece)[1]


KERNELS = [
    (path.parent.name, name)
    for path in sorted((ROOT / "csrc").glob("*/*.cu*"))
    for name in kernels_in(path.read_text())
]


def declared(header: str) -> set[str]:
    """The functions that a header declares in its namespace, without those in structs."""
    text = re.sub(r"//.*", "", header)
    text = re.sub(r"namespace [\w:]+ \{", "", text)
    while (shorter := re.sub(r"\{[^{}]*\}", "", text)) != text:
        text = shorter
    return set(re.findall(r"(\w+)\([^()]*(?:\([^()]*\)[^()]*)*\);", text))


def cmake_list(name: str) -> set[str]:
    text = (ROOT / "CMakeLists.txt").read_text()
    return set(re.search(rf"set\({name}\n(.*?)\)", text, re.DOTALL)[1].split())


def test_there_are_sources():
    assert SOURCES
    assert HEADERS
    assert ("hamming", "topk_scan") in KERNELS
    assert list(kernels_in("__global__ void __launch_bounds__(f(1), 2)\n  a(int) {}")) == ["a"]
    assert declared("struct A { int f(); };\nint64_t g(int, int (*)(int));\nvoid h() {}") == {"g"}


def test_every_kernel_source_is_built():
    present = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert cmake_list("PENTAD_CUDA_KERNELS") == present - {"csrc/common/cuda_info.cu"}


def test_every_stub_is_built():
    present = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*/*_nocuda.cc")}
    assert cmake_list("PENTAD_CUDA_STUBS") == present - {"csrc/common/cuda_info_nocuda.cc"}


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.stem)
def test_every_entry_has_its_stub(header):
    stubs = "".join(path.read_text() for path in header.parent.glob("*_nocuda.cc"))
    names = declared(header.read_text())
    assert names
    assert {name for name in names if not re.search(rf"\b{name}\(.*?\) \{{", stubs, re.S)} == set()


@pytest.mark.parametrize(("family", "kernel"), KERNELS)
def test_every_kernel_has_its_row(family, kernel):
    table = (ROOT / "docs/gpu.md").read_text()
    rows = re.findall(rf"^\| {family} .*", table, re.MULTILINE)
    named = {f"`{kernel}`", f"`{kernel.removesuffix('_kernel')}`"}
    assert any(name in row for name in named for row in rows), f"docs/gpu.md: {family} `{kernel}`"
