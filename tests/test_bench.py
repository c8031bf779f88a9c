# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness: who runs when, what is timed, and what `pentad bench` makes of it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bench_cases import MACHINE, load

from pentad import cli

pytest.importorskip("rich")


@pytest.fixture(scope="module")
def harness():
    return load("harness")


@pytest.fixture
def no_pauses(harness, monkeypatch):
    monkeypatch.setattr(harness, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(harness, "TURN_SECONDS", 0.0)


def equals(expected):
    def check(inputs, result):
        assert result == expected, f"{result} is not {expected}"

    return check


def returning(value):
    return lambda inputs: lambda: value


def raising(error):
    def prepare(inputs):
        raise error

    return prepare


def case_of(harness, *contenders, target=None):
    return harness.Case(
        "a case", lambda quick, threads: None, contenders, lambda inputs: {"pairs": 1e6}, target
    )


def admitted(harness, *names):
    """Outcomes whose calls are their names, for a turn that knows what to do with them."""
    return [harness.Outcome(name, call=name) for name in names]


def scripted(script, order):
    """A turn that notes who ran and answers with the next of that contender's seconds."""
    script = {name: iter(seconds) for name, seconds in script.items()}

    def turn(name):
        order.append(name)
        return next(script[name])

    return turn


def foreign_clock(*readings):
    """Two readings, before and after, for each round."""
    readings = iter(readings)
    return lambda: next(readings)


def test_rounds_start_with_the_next_contender(harness):
    order = []
    turn = scripted({name: [1.0] * 3 for name in "abc"}, order)
    done = harness.interleave(
        admitted(harness, "a", "b", "c"), 3, 9, budget=60, turn=turn, foreign=lambda: 0.0
    )
    assert "".join(order) == "abc" + "bca" + "cab"
    assert done == [harness.Round({"a": 1.0, "b": 1.0, "c": 1.0}, 0.0)] * 3


def test_a_contender_over_budget_sits_out(harness):
    turn = scripted({name: [1.0] * 3 for name in "ab"}, order := [])
    done = harness.interleave(
        admitted(harness, "a", "b"), 3, 9, budget=0, turn=turn, foreign=lambda: 0.0
    )
    assert "".join(order) == "ab"
    assert [entry.seconds for entry in done] == [{"a": 1.0, "b": 1.0}, {}, {}]


def test_disturbed_rounds_are_repeated(harness):
    def rounds(*foreign, attempts):
        turn = scripted({"a": map(float, range(9))}, [])
        outcomes = admitted(harness, "a")
        clock = foreign_clock(*foreign)
        return harness.interleave(outcomes, 2, attempts, budget=60, turn=turn, foreign=clock)

    done = rounds(0, 9, 9, 9, 9, 9, attempts=8)
    assert [entry.foreign_cores > 1 for entry in done] == [True, False, False]
    assert [entry.seconds["a"] for entry in harness.quietest(done, 2, "a")] == [1.0, 2.0]
    done = rounds(0, 9, 9, 18, 18, 27, attempts=3)
    assert len(done) == 3


def test_ratio_is_taken_within_rounds(harness):
    def ratio(ours, theirs, foreign=(0.0, 0.0, 0.0), count=3):
        done = [
            harness.Round({name: s for name, s in (("ours", a), ("peer", b)) if s}, cores)
            for a, b, cores in zip(ours, theirs, foreign, strict=True)
        ]
        return harness.pairwise_ratio(done, count, "ours", "peer")

    # The machine is 10 times slower in the second round: medians of each side would say 3 / 1.
    assert ratio([1.0, 10.0, 1.0], [4.0, 20.0, 3.0]) == 3.0
    assert ratio([1.0, 10.0, 1.0], [4.0, 20.0, 2.0]) == 2.0
    assert ratio([1.0, 2.0, None], [4.0, None, 5.0]) == 4.0
    assert ratio([None, 1.0, None], [1.0, None, 1.0]) is None
    assert ratio([1.0, 1.0, 1.0], [2.0, 3.0, 9.0], foreign=(0.0, 0.1, 1.0), count=2) == 2.5


def test_only_fast_calls_repeat_within_a_turn(harness, monkeypatch):
    now = [0.0]
    calls = []

    def call_lasting(seconds):
        def call():
            calls.append(seconds)
            now[0] += seconds

        return call

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(harness.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(harness, "TURN_SECONDS", 0.1)
    assert harness.take_turn(call_lasting(0.01)) == pytest.approx(0.01)
    assert len(calls) == 1 + 10  # one to warm up
    calls.clear()
    assert harness.take_turn(call_lasting(2.0)) == 2.0
    assert len(calls) == 1


@pytest.mark.usefixtures("no_pauses")
def test_only_right_answers_are_timed(harness):
    case = case_of(
        harness,
        harness.Contender("right", returning(1), equals(1)),
        harness.Contender("wrong", returning(2), equals(1)),
        harness.Contender("missing", raising(ImportError("no module")), equals(1)),
        harness.Contender("broken", raising(RuntimeError("no memory")), equals(1)),
        target=harness.Target("wrong", 2.0),
    )
    result = harness.run_case(case, quick=False, threads=1, rounds=3, budget=60)
    right, wrong, missing, broken = result["contenders"]
    assert right["status"] == "ok"
    assert len(right["seconds"]) == 3
    assert right["min_s"] <= right["median_s"]
    assert right["per_second"]["pairs"] == pytest.approx(1e6 / right["median_s"])
    assert (wrong["status"], wrong["detail"]) == ("wrong", "2 is not 1\nassert 2 == 1")
    assert (missing["status"], missing["detail"]) == ("missing", "no module")
    assert (broken["status"], broken["detail"]) == ("error", "RuntimeError: no memory")
    assert not any("median_s" in record for record in (wrong, missing, broken))
    assert result["target"] == {"against": "wrong", "ratio": 2.0, "measured": None, "met": None}


@pytest.mark.usefixtures("no_pauses")
def test_a_wrong_subject_leaves_its_peers_timed_without_ratio(harness):
    case = case_of(
        harness,
        harness.Contender("ours", returning(2), equals(1)),
        harness.Contender("peer", returning(1), equals(1)),
    )
    ours, peer = harness.run_case(case, False, 1, 2, 60)["contenders"]
    assert ours["status"] == "wrong"
    assert len(peer["seconds"]) == 2
    assert peer["ratio"] is None


@pytest.mark.parametrize(("measured", "met"), [(5.1, True), (5.0, True), (4.9, False)])
def test_targets_are_judged(harness, measured, met):
    records = [{"name": "ours"}, {"name": "peer", "ratio": measured}]
    assert harness.judge(harness.Target("peer", 5.0), records)["met"] is met


@pytest.mark.parametrize(("measured", "met"), [(9e-6, True), (1e-5, True), (1.1e-5, False)])
def test_limits_are_judged(harness, measured, met):
    judged = harness.judge(harness.Limit(1e-5), [{"name": "ours", "median_s": measured}])
    assert judged == {"against": "ours", "seconds": 1e-5, "measured": measured, "met": met}
    assert harness.judge(harness.Limit(1e-5), [{"name": "ours"}])["met"] is None
    assert load("tables").format_target(judged) == f"<= 10 us: {'met' if met else 'NOT MET'}"


def test_the_fastest_of_several_peers_counts(harness):
    target = harness.Target(("a", "b", "c"), 3.0)
    records = [{"name": "ours"}, {"name": "a", "ratio": 5.0}, {"name": "b", "ratio": 2.0}]
    judged = harness.judge(target, records)
    assert judged == {"against": "b", "ratio": 3.0, "measured": 2.0, "met": False}
    assert harness.judge(target, records[:1])["met"] is None


def test_shares_and_ceilings_are_of_the_bound(harness):
    machine = {"threads": 2, "read_gb_s": {"1": 20.0, "2": 30.0}, "peak_gflops": {"float32": 400.0}}

    def related(bound, unit, ratio):
        ours = {"name": "ours", "per_second": {unit: 20e9}}
        peer = {"name": "b", "per_second": {unit: 10e9}}
        target = {"against": "b", "ratio": ratio, "measured": 2.0, "met": False}
        case = {"bound": bound, "contenders": [ours, peer], "target": target}
        harness.relate(case, machine)
        return ours["share"], target["ceiling"], load("tables").format_target(target)

    assert related("float32", "flop", 50.0) == (
        pytest.approx(0.05),
        pytest.approx(40.0),
        ">= 50x: NOT MET (peak: 40x)",
    )
    share, ceiling, shown = related("read", "bytes", 2.5)
    assert (share, ceiling) == (pytest.approx(20 / 30), pytest.approx(3.0))
    assert shown == ">= 2.5x: NOT MET"


def test_ceilings_are_the_best_seen(monkeypatch):
    seen = iter([300.0, 200.0, 250.0, 350.0])
    read = iter([20.0, 31.0, 21.0, 30.0])
    machine = load("machine")
    monkeypatch.setattr(machine, "peak_gflops", lambda dtype, threads, quick: next(seen))
    monkeypatch.setattr(machine, "read_gb_s", lambda threads, quick: next(read))
    facts = {"read_gb_s": {}}
    machine.raise_ceilings(facts, {"read", "float32", "bfloat16"}, 2, True)
    machine.raise_ceilings(facts, {"read", "float32", "bfloat16"}, 2, True)
    assert facts == {
        "read_gb_s": {"1": 21.0, "2": 31.0},
        "peak_gflops": {"bfloat16": 300.0, "float32": 350.0},
    }


def test_multiply_adds_are_counted_and_timed():
    from pentad import _C

    plain = _C.multiply_adds(10, False)
    assert plain == 10 * _C.multiply_adds(1, False) > 0
    assert _C.multiply_adds(10, True) in (plain, 2 * plain)
    with pytest.raises(ValueError, match="negative"):
        _C.multiply_adds(-1, False)
    assert load("machine").peak_gflops("float32", 1, quick=True) > 0.1


@pytest.mark.parametrize(
    ("unit", "rate", "shown"),
    [
        ("bytes", 3e9, "3 GB/s"),
        ("flop", 1.5e11, "150 GF/s"),
        ("pairs", 2e7, "0.02 G pairs/s"),
        ("calls", 1.25e5, "125 k calls/s"),
    ],
)
def test_rates_have_the_unit_of_the_work(harness, unit, rate, shown):
    assert load("tables").format_rate(unit, rate) == shown


def test_machine_facts_are_complete():
    machine = load("machine")
    facts = machine.machine_facts(["no-such-package"], threads=1)
    assert facts.keys() == MACHINE.keys()
    assert re.fullmatch("[0-9a-f]{40}", facts["commit"])
    assert machine.read_gb_s(1, quick=True) > 0
    assert facts["versions"]["no-such-package"] is None
    assert facts["versions"]["numpy"] == np.__version__


@pytest.fixture
def run_main(harness, monkeypatch, tmp_path):
    """`pentad bench family`, with a subject and a peer of the given answers, both due 1."""
    command, machine = load("command"), load("machine")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    monkeypatch.setattr(machine, "clone", lambda: tmp_path)
    monkeypatch.setattr(machine, "machine_facts", lambda *_: MACHINE | {"read_gb_s": {}})
    monkeypatch.setattr(machine, "read_gb_s", lambda threads, quick: 20.0 + threads)
    monkeypatch.setattr(command, "use_threads", lambda count: None)
    monkeypatch.setattr("pentad.bench.FAMILIES", ("family",))

    def run(*arguments, ours=1, peer=1):
        case = case_of(
            harness,
            harness.Contender("ours", returning(ours), equals(1)),
            harness.Contender("peer", returning(peer), equals(1)),
            harness.Contender("absent", raising(ImportError("no module")), equals(1)),
            target=harness.Target("peer", 1e-9),
        )
        family = harness.Family("family", [case], ["peer"])
        monkeypatch.setattr(command, "family_named", lambda name: family)
        return cli.main(["bench", "family", *arguments])

    return run


@pytest.mark.usefixtures("no_pauses")
def test_full_runs_write_the_family_results(run_main, tmp_path, capsys):
    assert run_main() == 0
    results = json.loads((tmp_path / "bench" / "results" / "family.json").read_text())
    assert set(results) == {"family", "quick", "machine", "cases"}
    assert results["machine"]["read_gb_s"] == {"1": 21.0, "2": 22.0}
    (case,) = results["cases"]
    assert set(case) == {"name", "work", "contenders", "target"}
    ours, peer, absent = case["contenders"]
    timed = {
        "name",
        "status",
        "seconds",
        "foreign_cores",
        "median_s",
        "min_s",
        "spread",
        "per_second",
    }
    assert set(ours) == timed
    assert set(peer) == timed | {"ratio"}
    assert absent == {"name": "absent", "status": "missing", "detail": "no module"}
    assert case["target"]["met"] is True
    printed = capsys.readouterr().out
    assert ">= 1e-09x: met" in printed
    assert "absent is missing: no module" in printed
    assert "not installed: peer" in printed


@pytest.mark.usefixtures("no_pauses")
def test_small_and_partial_runs_publish_nothing(run_main, tmp_path, capsys):
    run_main("--quick")
    run_main("--only", "case")
    assert list((tmp_path / "bench" / "results").iterdir()) == []
    run_main("--quick", "--json", str(tmp_path / "here" / "quick.json"))
    results = json.loads((tmp_path / "here" / "quick.json").read_text())
    assert results["quick"]
    assert "target" not in results["cases"][0]
    run_main("--quick", "--json", str(tmp_path / "folder"))
    assert (tmp_path / "folder" / "family.json").exists()
    assert run_main("--only", "no such case") == 2
    assert capsys.readouterr().err == (
        "pentad bench: no case of family has 'no such case' in its name\n"
    )


def test_what_cannot_be_written_is_not_measured(tmp_path, monkeypatch, capsys):
    command = load("command")
    monkeypatch.setattr(command, "measure", None)
    monkeypatch.setattr(command.subprocess, "run", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    for path in ("file", "file/here.json", "file/deep/here", "folder.json"):
        for families in (["hamming"], ["hamming", "pq"]):
            assert cli.main(["bench", *families, "--json", str(tmp_path / path)]) == 1
            error = capsys.readouterr().err
            assert error.startswith(f"pentad bench: {tmp_path / path} cannot be written")
            assert error.count("\n") == 1


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("wrong", [{"ours": 2}, {"peer": 2}])
def test_a_wrong_answer_fails_the_run(run_main, wrong, capsys):
    assert run_main("--quick", **wrong) == 1
    printed = capsys.readouterr()
    assert "is wrong: 2 is not 1" in printed.out
    (name,) = wrong
    assert printed.err.endswith(f"pentad bench: family: {name} is wrong in 'a case'\n")


@pytest.mark.usefixtures("no_pauses")
def test_outside_a_clone_nothing_is_written(run_main, monkeypatch, tmp_path):
    machine = load("machine")
    monkeypatch.setattr(machine, "clone", lambda: None)
    assert run_main() == 0
    assert list((tmp_path / "bench" / "results").iterdir()) == []


def test_a_package_installed_beneath_a_repository_is_no_clone(monkeypatch):
    machine = load("machine")
    assert machine.clone() == Path(__file__).parent.parent
    beneath = machine.clone() / ".venv/lib/python3/site-packages/pentad/bench/machine.py"
    monkeypatch.setattr(machine, "__file__", str(beneath))
    assert machine.clone() is None
    facts = machine.machine_facts([], threads=1)
    assert (facts["commit"], facts["dirty"]) == (None, None)


@pytest.fixture
def run_several(monkeypatch):
    """`pentad bench` of several families, each of which exits as told and writes its name."""
    command = load("command")

    def run(*arguments, **statuses):
        def one(arguments, **_):
            name = arguments[4]
            if "--json" in arguments and statuses.get(name, 0) != 2:
                folder = Path(arguments[arguments.index("--json") + 1])
                command.write(folder, name, {"family": name})
            return SimpleNamespace(returncode=statuses.get(name, 0))

        monkeypatch.setattr(command.subprocess, "run", one)
        return cli.main(["bench", *arguments])

    return run


def test_results_of_several_families_go_to_one_file_or_a_folder(run_several, tmp_path):
    together = tmp_path / "here" / "all.json"
    assert run_several("--json", str(together)) == 0
    written = json.loads(together.read_text())
    assert [r["family"] for r in written] == ["attention", "scan", "pq", "sparse", "hamming"]
    assert run_several("pq", "scan", "pq", "--json", str(tmp_path / "folder")) == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["pq.json", "scan.json"]


def test_one_failed_family_fails_the_run_after_the_others(run_several, tmp_path, capsys):
    together = tmp_path / "all.json"
    arguments = ("pq", "scan", "hamming", "--json", str(together))
    assert run_several(*arguments, pq=1, scan=-11) == 1
    assert capsys.readouterr().err == "pentad bench: failed: pq, scan\n"


def test_families_without_a_case_of_this_name_are_left_out(run_several, tmp_path, capsys):
    together = tmp_path / "all.json"
    arguments = ("pq", "scan", "hamming", "--json", str(together), "--only")
    assert run_several(*arguments, "ssd") == 0
    assert [results["family"] for results in json.loads(together.read_text())] == ["scan"]
    assert run_several(*arguments, "no such case") == 2
    assert capsys.readouterr().err == "pentad bench: no case has 'no such case' in its name\n"


def test_bad_arguments_are_one_line(capsys, monkeypatch):
    command = load("command")
    assert cli.main(["bench", "atention"]) == 2
    assert capsys.readouterr().err == (
        "pentad bench: no family 'atention'; "
        "there are attention, scan, pq, sparse, hamming, curves\n"
    )
    for option, value in (("--threads", "0"), ("--rounds", "x"), ("--budget", "nan")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["bench", "pq", option, value])
        assert capsys.readouterr().err.count("\n") == 1

    def absent(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(command.importlib, "import_module", absent)
    assert cli.main(["bench", "pq"]) == 1
    assert capsys.readouterr().err == (
        "pentad bench: benchmarking pq needs the package torch: pip install 'pentad[bench]'\n"
    )


@pytest.mark.usefixtures("no_pauses")
def test_a_contender_that_is_unfit_fails_nothing(harness):
    unfit = harness.Contender("peer", raising(harness.Unfit("finds 0.9 at most")), equals(1))
    case = case_of(harness, harness.Contender("ours", returning(1), equals(1)), unfit)
    result = harness.run_case(case, True, 1, 1, 60)
    assert result["contenders"][1]["status"] == "unfit"
    assert result["contenders"][1]["detail"] == "finds 0.9 at most"
    assert load("command").complain({"family": "family", "cases": [result]}) == 0


def test_brute_force_of_the_hamming_benchmark():
    data = load("hamming_data")
    codes, queries = data.random_codes(300, 16, seed=1), data.random_codes(5, 16, seed=2)
    distances = np.unpackbits(queries[:, None] ^ codes, axis=2).sum(axis=2, dtype=np.int64)
    order = np.lexsort((np.broadcast_to(np.arange(300), distances.shape), distances), axis=1)
    values, ids = data.nearest(queries, codes, 7)
    np.testing.assert_array_equal(ids, order[:, :7])
    np.testing.assert_array_equal(values, np.take_along_axis(distances, order, axis=1)[:, :7])

    mask = np.random.default_rng(3).random(300) < 0.5
    _, ids = data.nearest(queries, codes, 7, mask)
    admitted_order = [row[mask[row]][:7] for row in order]
    np.testing.assert_array_equal(ids, admitted_order)


def test_every_target_of_hamming_has_its_case():
    hamming = load("hamming")
    cases = {case.name: case for case in hamming.CASES}
    assert len(cases) == len(hamming.CASES)
    for name, target in hamming.TARGETS.items():
        assert cases[name].target == target
        assert target.against in [contender.name for contender in cases[name].contenders]


@pytest.fixture(scope="module")
def attention():
    pytest.importorskip("torch")
    return load("attention")


@pytest.fixture(scope="module")
def attention_data(attention):
    return load("attention_data")


MASKS = ("full", "causal")


def test_every_row_of_the_attention_table_has_its_cases(attention):
    cases = {case.name: case for case in attention.CASES}
    assert len(cases) == len(attention.CASES)
    grid = [f"1,8,{n},{d} {m}" for n in (1024, 2048, 4096) for d in (64, 128) for m in MASKS]
    short = ["8,8,256,64 causal", "4,8,512,64 causal"]
    half = [name for name in grid if "4096,128" not in name]
    many = ["64,8,49,32 full"]
    expected = {
        ("forward float32", 2.0): grid,
        ("forward bfloat16", 3.5): grid,
        ("forward float32", 3.5): short,
        ("forward bfloat16", 5.0): short,
        ("training float32", 1.8): half + short,
        ("training bfloat16", 2.5): half + short,
        ("backward float16", 8.0): ["1,8,1024,64 full", "1,8,1024,64 causal"],
        ("forward float32", 3.0): many,
        ("forward bfloat16", 3.0): many,
        ("training float32", 3.0): many,
        ("training bfloat16", 3.0): many,
        ("forward float32", 10.0): ["1,8,4096,64 window of 128"],
        ("forward bfloat16", 10.0): ["1,8,4096,64 window of 128"],
        ("decode float32,", 0.7): ["1 query, 32/8 heads, 16384 keys, D 128"],
        ("decode bfloat16,", 0.7): ["1 query, 32/8 heads, 16384 keys, D 128"],
    }
    for (what, ratio), shapes in expected.items():
        for shape in shapes:
            case = cases.pop(f"{what} {shape}")
            assert case.target.ratio == ratio
            against = case.target.against
            names = {contender.name for contender in case.contenders}
            assert names >= ({against} if isinstance(against, str) else set(against))
    tiny = cases.pop("a call on 1,1,1,8 without gradients")
    assert tiny.target.seconds == 1e-5
    assert not any(case.target for case in cases.values())
    assert [case.target.ratio for case in attention.MEMORY] == [59.0, 32.0]


def test_the_attention_benchmark_finds_wrong_answers(attention, attention_data):
    torch = pytest.importorskip("torch")
    options = {"causal": True, "window": 5}
    problem = attention_data.random_problem((2, 3, 12, 8), torch.float32, **options)
    problem.bias = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    problem.solve(gradients=True)
    mask = torch.ones(12, 12, dtype=torch.bool).tril().triu(-4)

    def plain(q, k, v, bias):
        bias = bias.masked_fill(~mask, float("-inf"))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    results = attention.PASSES["training"](plain, problem.leaves, problem.d_out)()
    problem.check(results)
    for number in range(len(results)):
        wrong = [x.detach().clone() for x in results]
        wrong[number][0, -1, -1, -1] += 0.1
        with pytest.raises(AssertionError, match=attention_data.RESULTS[number]):
            problem.check(wrong)
    wrong = [x.detach().clone() for x in results]
    wrong[0][0, 0, 6, 0] = float("nan")  # a head of which only some rows are checked
    with pytest.raises(AssertionError, match="some rows"):
        problem.check(wrong)


def test_the_documents_of_the_attention_benchmark(attention, attention_data):
    documents = attention_data.random_documents(4, 9, heads=2, dim=8)
    assert len(set(documents.lengths)) > 1
    padded = attention.padded_sdpa("training", documents)()
    documents.check(padded)
    documents.check(attention.sdpa_per_document("training", documents)())
    wrong = [x.detach().clone() for x in padded]
    wrong[2][1, 0, 0, 0] += 0.1
    with pytest.raises(AssertionError, match="dk"):
        documents.check(wrong)


def test_extra_memory_is_that_of_the_matrices():
    pytest.importorskip("torch")
    case = load("attention").MEMORY[0]
    record = case.measure("plain torch", (1024,))
    matrix = 4 * 1024**2
    assert 1.5 * matrix < record["extra_bytes"] < 4 * matrix
    failed = case.measure("plain torch", (-1,))
    assert failed["status"] == "error"
    assert "negative" in failed["detail"]


def test_memory_without_a_peak_to_ask_for_fails_nothing(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    memory, case = load("memory"), load("attention").MEMORY[0]
    monkeypatch.setattr(memory, "FORGET", tmp_path / "none")
    monkeypatch.setattr(memory, "free_bytes", None)
    (result,) = case.run(load("harness").Options(False, 1, 1, 1.0))
    assert {record["status"] for record in result["contenders"]} == {"unfit"}
    assert result["target"]["met"] is None
    assert load("command").complain({"family": "attention", "cases": [result]}) == 0
