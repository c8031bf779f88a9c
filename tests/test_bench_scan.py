# SPDX-License-Identifier: Apache-2.0
"""The scan benchmark: its targets, and that it finds wrong answers."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def _bench_on_path():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def load(name):
    return importlib.import_module(name)


def test_targets():
    scan, memory = load("scan"), load("scan_memory")
    cases = {case.name: case for case in scan.CASES}
    assert len(cases) == len(scan.CASES)
    targets = {name: case.target for name, case in cases.items() if case.target}
    loops = "torch, a loop over time", "torch, a loop over copied steps"
    expected = {
        "selective_scan forward float32 1,1536,2048 N 16": ("mambapy", 120.0),
        "selective_scan training float32 1,1536,2048 N 16": ("mambapy", 100.0),
        "MambaForCausalLM training step, 4 layers, d 768, L 512, float32": (
            "transformers, its loop",
            20.0,
        ),
        "linear_recurrence training float32 4,1024,4096": (
            ("torch.associative_scan, compiled", *loops),
            5.0,
        ),
        "one token of a Mamba block, d 768, float32": ("transformers", 3.0),
    }
    for layout in ("steps", "channels"):
        name = f"causal_conv1d forward float32 1,1536,2048 W 4 and SiLU, {layout} side by side"
        expected[name] = ("torch conv1d and silu", 4.0)
    assert {name: (t.against, t.ratio) for name, t in targets.items()} == expected
    for name, target in targets.items():
        names = {contender.name for contender in cases[name].contenders}
        assert names >= (
            {target.against} if isinstance(target.against, str) else set(target.against)
        )
    arrays, states = 4 * 2048 * 1536, 16 * 2048 * 1536  # u, delta, z and the output
    assert 1 <= memory.allowed_bytes(2048) / (4 * arrays + 4 * states / 32) < 1.02


def test_a_slow_contender_runs_once(monkeypatch):
    harness = load("harness")
    monkeypatch.setattr(harness, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(harness, "TURN_SECONDS", 0.0)
    calls = []

    def contender(name, wrong=False, **options):
        def check(inputs, result):
            assert not wrong, "wrong"

        return harness.Contender(name, lambda inputs: lambda: calls.append(name), check, **options)

    contenders = [
        contender("ours"),
        contender("slow", once=True),
        contender("wrong", wrong=True, once=True),
    ]
    case = harness.Case(
        "a case", lambda quick, threads: None, contenders, lambda inputs: {"calls": 1}
    )
    ours, slow, wrong = harness.run_case(case, quick=False, threads=1, rounds=3, budget=60)[
        "contenders"
    ]
    assert (calls.count("slow"), calls.count("wrong")) == (1, 1)
    assert calls.count("ours") > 3
    assert len(slow["seconds"]) == 1
    assert slow["ratio"] == pytest.approx(slow["median_s"] / ours["median_s"])
    assert wrong["status"] == "wrong"
    assert "median_s" not in wrong


def wrong_in_turn(results):
    """The results, each with one wrong value."""
    for number in range(len(results)):
        wrong = [x.detach().clone() for x in results]
        wrong[number].view(-1)[-1] += 0.01 * wrong[number].abs().max() + 0.01
        yield wrong


def gradients(function, problem, d_out):
    leaves = [x.detach().double().requires_grad_() for x in problem.leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.double())]


def test_answers_of_the_scan():
    """The adjoint step by step, against autograd through the plain functions."""
    data = load("scan_data")
    from pentad.scan import reference

    problem = data.random_scan(2, 6, 11, 3, torch.float32)
    results = gradients(
        lambda *leaves: reference.selective_scan(*leaves, delta_softplus=True),
        problem,
        problem.d_out,
    )
    for actual, expected in zip(results, problem.expected.values(), strict=True):
        torch.testing.assert_close(actual, expected)
    results = [x.float() for x in results]
    problem.check(results)
    for wrong in wrong_in_turn(results):
        with pytest.raises(AssertionError, match="is off by"):
            problem.check(wrong)


def test_answers_of_the_recurrence_and_the_convolution():
    data = load("scan_data")
    from pentad.scan import reference

    recurrence = data.random_recurrence((2, 3, 9))
    convolution = data.random_convolution(2, 5, 9, 4, torch.float32, True)
    for problem, function, d_out in (
        (recurrence, reference.linear_recurrence, recurrence.d_h),
        (
            convolution,
            lambda *leaves: reference.causal_conv1d(*leaves, activation="silu"),
            convolution.d_out,
        ),
    ):
        results = gradients(function, problem, d_out)
        for actual, expected in zip(results, problem.expected.values(), strict=True):
            torch.testing.assert_close(actual, expected)
        for wrong in wrong_in_turn([x.float() for x in results]):
            with pytest.raises(AssertionError, match="is off by"):
                problem.check(wrong)


def test_mambapy_is_used_as_it_is_meant():
    pytest.importorskip("mambapy")
    scan = load("scan")
    problem = load("scan_data").random_scan(2, 6, 16, 3, torch.float32)
    scan.check_turned(problem, scan.mambapy_scan("training", problem)())


def test_a_failed_measurement_of_memory_says_why():
    record = load("scan_memory").measure("pentad", -1)
    assert record["status"] == "error"
    assert "negative" in record["detail"]
