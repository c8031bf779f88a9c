# SPDX-License-Identifier: Apache-2.0
"""How figures reach the README, the documentation and its pictures; and their comparison."""

import importlib
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench_cases import MACHINE, published, published_curves

pytest.importorskip("rich")

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def _bench_on_path():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def report():
    return importlib.import_module("report")


MARKED = "before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n"


GPU = """\
| kernel | last verified commit | device | figure | distance to the limit |
|---|---|---|---|---|
| family `a`, `b` (few) | unverified | - | - | memory |
| family `c` | unverified | - | - | latency |

<!-- bench:begin -->
old
<!-- bench:end -->
"""


class Site:
    """A README with markers and a folder with results."""

    def __init__(self, root, report):
        self.report, self.results = report, root / "results"
        self.results.mkdir()
        self.readme, self.docs = root / "README.md", root / "docs"
        self.readme.write_text(MARKED)
        self.docs.mkdir()
        (self.docs / "gpu.md").write_text(GPU)
        self.arguments = ["--root", str(root), "--results", str(self.results)]

    def put(self, results):
        (self.results / f"{results['family']}.json").write_text(json.dumps(results))

    def run(self, *arguments):
        return self.report.main([*self.arguments, *arguments], {"family": ("a case",)})

    @property
    def page(self):
        return (self.docs / "benchmarks.md").read_text()


@pytest.fixture
def site(report, tmp_path):
    pytest.importorskip("matplotlib")
    made = Site(tmp_path, report)
    made.put(published())
    return made


def test_figures_of_a_device_reach_its_page(site):
    page = site.docs / "gpu.md"
    assert site.run() == 0
    assert page.read_text() == GPU.replace("old", "Nothing has been measured on a device yet.")
    case = {
        "name": "a case", "kernel": "b", "seconds": {"pentad": 1e-3, "torch": 2e-3},
        "skipped": {"faiss": "no"}, "unit": "B", "rate": 2e12, "share": 0.5,
    }  # fmt: skip
    results = {
        "family": "family", "cases": [case, case | {"share": None}], "device": "H", "date": "today",
        "commit": "0123456789abcdef", "dirty": False,
    }  # fmt: skip
    (site.results / "gpu-family.json").write_text(json.dumps(results))
    assert site.run("--check") == 1
    for _ in range(2):
        assert site.run() == 0
        text = page.read_text()
        row = "| family `a`, `b` (few) | 0123456789ab | H | 2,000 GB/s, a case | memory: 50% |"
        assert row in text
        assert "| family `c` | unverified | - | - | latency |" in text
        row = "| 1 ms | 2,000 GB/s (50%) | torch 2 ms (2.00x), faiss missing |"
        assert "| family, H, today | a case " + row in text
    assert site.run("--check") == 0


def test_figures_reach_the_readme_and_the_page_once(site):
    assert site.run() == 0
    text = site.readme.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n|  | case |")
    assert text.endswith("\n<!-- bench:end -->\nafter\n")
    assert "| family | a case | 100 ms | peer | 200 ms | 2.00x | >= 5x: NOT MET |" in text
    assert "- family: 0 of 1 targets are met." in text
    assert "| a case | ours | 100 ms | 5% | 10 GB/s |  |  |" in site.page
    assert "|  | peer | 200 ms | 5% | 5 GB/s | 2.00x | >= 5x: NOT MET |" in site.page
    assert "|  | absent | missing |  |  |  |  |" in site.page
    assert "20 GB/s with 1 thread, 30 GB/s with 2 threads" in site.page
    assert "peer missing; commit 0123456789ab." in site.page
    assert "Other processes used at most 0.04 cores meanwhile." in site.page
    for name in re.findall(r"\]\((images/.*?)\)", site.page):
        assert (site.docs / name).exists()
    before = {path: path.read_bytes() for path in site.docs.rglob("*.*")}
    assert site.run() == 0
    assert site.readme.read_text() == text
    assert before == {path: path.read_bytes() for path in site.docs.rglob("*.*")}


def test_peaks_shares_and_memory_are_told(site):
    results = published()
    results["machine"] = MACHINE | {"peak_gflops": {"float32": 400.0}}
    case = results["cases"][0]
    case["contenders"][0]["share"] = 0.25
    case["target"]["ceiling"] = 4.0
    records = [
        {"name": "ours", "status": "ok", "extra_bytes": 3 << 20},
        {"name": "peer", "status": "ok", "extra_bytes": 2 << 30, "ratio": 682.67, "computed": True},
    ]
    target = {"against": "peer", "ratio": 59.0, "measured": 682.67, "met": True}
    results["cases"].append({"name": "extra memory", "contenders": records, "target": target})
    site.put(results)
    assert site.run() == 0
    assert "| a case | ours | 100 ms | 5% | 10 GB/s (25%) |  |  |" in site.page
    assert ">= 5x: NOT MET (peak: 4x) |" in site.page
    assert "| extra memory | ours | 3 MiB | one run |  |  |  |" in site.page
    assert "|  | peer | 2 GiB | computed |  | 682.67x | >= 59x: met |" in site.page
    assert "multiplies and adds at 400 GF/s in float32" in site.page
    assert "1 of 2 targets are met, 1 ask for more than the peak" in site.page


def test_check_tells_differences_and_changes_nothing(site, capsys):
    assert site.run("--check") == 1
    assert "README.md differs" in capsys.readouterr().err
    assert site.readme.read_text() == MARKED
    assert not (site.docs / "benchmarks.md").exists()
    site.run()
    assert site.run("--check") == 0
    for path, old, new in (
        (site.readme, "100 ms", "1 ms"),
        (site.docs / "benchmarks.md", "100 ms", "1 ms"),
        (site.docs / "images" / "ratios.svg", "figures ", "figures 0"),
    ):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        assert site.run("--check") == 1
        assert capsys.readouterr().err.split()[0] == str(path)
        path.write_text(text)
    site.put(published(0.05))
    assert site.run("--check") == 1
    assert capsys.readouterr().err.count("differs") == 4  # two texts and two pictures


def test_markers_full_runs_and_headlines_are_needed(site, capsys):
    site.readme.write_text("no markers")
    assert site.run() == 1
    assert "no <!-- bench:begin -->" in capsys.readouterr().err
    site.readme.write_text(MARKED)
    results = published()
    results["cases"][0]["name"] = "another"
    site.put(results)
    assert site.run() == 1
    assert "no case 'a case'" in capsys.readouterr().err
    site.put(published() | {"quick": True})
    assert site.run() == 1
    assert "quick" in capsys.readouterr().err
    for path in (site.results / "family.json", site.readme):
        path.unlink()
        assert site.run() == 1
        error = capsys.readouterr().err
        assert "holds no results" in error or "No such file" in error
        assert error.count("\n") == 1
        site.put(published())


def test_curves_have_a_table_and_a_picture_with_their_limit(site):
    site.put(published_curves())
    assert site.run() == 0
    assert "| codes | ours | peer |" in site.page
    assert "| 1,000 | 1 ms (50%) | 100 ms |" in site.page
    assert "| 10,000 | 10 ms (50%) | would take some 20 s |" in site.page
    assert "docs/images/curves.svg" in site.readme.read_text()
    plots = importlib.import_module("plots")
    ((name, axis, lines, limit),) = plots.Curves(published_curves()).figures
    assert (name, axis) == ("a curve", "codes")
    assert lines == {"ours": [[1_000, 1e-3], [10_000, 1e-2]], "peer": [[1_000, 0.1]]}
    # 30 kB for each code, at 30 GB/s with the 2 threads of the run.
    assert limit == [[1_000, 1e-3], [10_000, 1e-2]]
    drawn = ElementTree.parse(site.docs / "images" / "curves.svg")
    texts = {"".join(node.itertext()).strip() for node in drawn.iter() if node.tag.endswith("text")}
    assert {"a curve", "codes", "ours", "peer", "limit"} <= texts


def test_bars_are_of_peers_alone_and_carry_the_target():
    plots = importlib.import_module("plots")
    case = published()["cases"][0]
    case["contenders"].append({"name": "pentad otherwise", "ratio": 2.0})
    picture = plots.Ratios({"a family": [case]})
    assert picture.figures == [["a family", "a case", [["peer", 2.0, 5.0]]]]
    assert picture.digest != plots.Ratios({"another": [case]}).digest


def test_the_published_figures_have_the_headlines(report):
    measured = report.read(report.RESULTS)
    assert set(report.HEADLINES) <= set(measured)
    report.summary(measured, report.HEADLINES)  # refuses a case that is not there


@pytest.fixture
def compare():
    return importlib.import_module("compare")


def test_compare_tells_changes_and_other_machines(compare):
    old, new = published(0.1), published(0.05)
    new["machine"] = MACHINE | {"isa": "v4"}
    del new["cases"][0]["contenders"][2]
    for results, size in ((old, 4), (new, 3)):
        record = {"name": "ours", "status": "ok", "extra_bytes": size << 20}
        results["cases"].append({"name": "memory", "contenders": [record]})
    rows = list(compare.changes(old, new))
    assert rows == [
        ["a case", "ours", "100 ms", "50 ms", "-50.0% *", ""],
        ["a case", "peer", "200 ms", "200 ms", "+0.0%", "2.00x -> 4.00x"],
        ["a case", "absent", "missing", "absent", "", ""],
        ["memory", "ours", "4 MiB", "3 MiB", "-25.0% *", ""],
    ]
    assert compare.differing_facts(old, new) == ["isa: v3 -> v4"]


def test_compare_reads_files_and_folders(compare, tmp_path, capsys):
    folder = tmp_path / "old"
    folder.mkdir()
    for results in (published(), published_curves()):
        (folder / f"{results['family']}.json").write_text(json.dumps(results))
    faster = published_curves()
    faster["cases"][1]["contenders"][0]["median_s"] = 5e-3
    together = tmp_path / "new.json"
    together.write_text(json.dumps([faster, published() | {"family": "another"}]))
    assert compare.main([str(folder), str(together)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"a curve, codes 10,000 +│ ours +│ +10 ms │ +5 ms │ -50.0% \*", printed)
    assert re.search(r"a curve, codes 10,000 +│ peer +│ +left │ +left │", printed)
    assert "only new: another" in printed
    assert "only old: family" in printed
    assert compare.main([str(folder / "family.json"), str(folder / "family.json")]) == 0


def test_compare_refuses_what_it_cannot_compare(compare, tmp_path, capsys):
    family, other = tmp_path / "a.json", tmp_path / "b.json"
    family.write_text(json.dumps(published()))
    other.write_text(json.dumps({"benchmarks": []}))
    part = tmp_path / "part.json"
    part.write_text(json.dumps({"family": "family"}))
    for arguments, reason in (
        ((family, other), "holds no results of pentad bench"),
        ((family, tmp_path / "none.json"), "No such file"),
        ((family, BENCH), "holds no results"),
        ((family, BENCH / "compare.py"), "compare.py holds no results"),
        ((family, part), "part.json holds no results"),
    ):
        assert compare.main([str(path) for path in arguments]) == 1
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    other.write_text(json.dumps(published_curves()))
    assert compare.main([str(family), str(other)]) == 1
    assert "no family in common" in capsys.readouterr().err
