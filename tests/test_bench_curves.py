# SPDX-License-Identifier: Apache-2.0
"""The curves of cost against size: when a peer leaves, and that their answers are checked."""

from dataclasses import replace

import numpy as np
import pytest
from bench_cases import load

pytest.importorskip("rich")
torch = pytest.importorskip("torch")
pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def curves():
    return load("curves")


@pytest.fixture
def options(monkeypatch):
    harness = load("harness")
    monkeypatch.setattr(harness, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(harness, "TURN_SECONDS", 0.0)
    return harness.Options(quick=True, threads=1, rounds=1, budget=60.0)


def curve_of(curves, seconds, monkeypatch, needs=None):
    """Contenders that take `seconds[name](size)` by a clock that only they move."""
    harness, now = load("harness"), [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def contender(name):
        def prepare(size):
            def call():
                now[0] += seconds[name](size)

            return call

        return harness.Contender(name, prepare, lambda size, result: None)

    sizes = (10, 100, 1_000)
    contenders = [contender(name) for name in seconds]
    return curves.Curve(
        *("a curve", "codes", (), sizes, lambda size, threads: size, contenders),
        lambda size: {"bytes": size},
        needs=needs or {},
    )


def statuses(records):
    return [{c["name"]: c["status"] for c in record["contenders"]} for record in records]


def test_a_peer_leaves_where_it_would_be_slow(curves, options, monkeypatch):
    seconds = {
        "ours": lambda n: 0.1 * n,  # slow too, and stays
        "linear": lambda n: 0.02 * n,
        "square": lambda n: 1e-4 * n * n,
    }
    records = curve_of(curves, seconds, monkeypatch).run(options)
    assert statuses(records) == [
        {"ours": "ok", "linear": "ok", "square": "ok"},
        {"ours": "ok", "linear": "ok", "square": "ok"},
        {"ours": "ok", "linear": "left", "square": "left"},
    ]
    assert records[2]["contenders"][2]["detail"] == "would take some 1e+02 s"
    assert [r["name"] for r in records] == [f"a curve, codes {n}" for n in ("10", "100", "1,000")]
    assert [(r["curve"], r["axis"], r["size"]) for r in records[:1]] == [("a curve", "codes", 10)]
    # Calls of a large part of a second are made once, and compared with the only call of ours.
    assert [len(r["contenders"][0]["seconds"]) for r in records] == [1, 1, 1]
    assert records[1]["contenders"][1]["ratio"] == pytest.approx(0.2)


def test_a_peer_leaves_where_it_would_need_much_memory(curves, options, monkeypatch):
    seconds = {"ours": lambda n: 1e-6, "peer": lambda n: 1e-6}
    needs = {"peer": lambda n: n * 2.0**26, "ours": lambda n: 2.0**60}
    records = curve_of(curves, seconds, monkeypatch, needs).run(options)
    assert [found.get("peer") for found in statuses(records)] == ["ok", "left", None]
    assert records[1]["contenders"][1]["detail"] == "would take 6.2 GiB"


def test_times_are_extrapolated_by_their_growth(curves):
    assert curves.extrapolated([], 10) == 0
    assert curves.extrapolated([(10, 2.0)], 40) == 8.0
    assert curves.extrapolated([(10, 2.0), (20, 8.0)], 40) == pytest.approx(32.0)
    assert curves.extrapolated([(10, 2.0), (20, 2.0)], 40) == 4.0  # no less than in proportion


def test_curves_reach_what_was_asked_for(curves):
    names = [curve.name for curve in curves.CURVES]
    assert len(set(names)) == len(names)
    for curve in curves.CURVES:
        if curve.axis == "L":
            assert curve.sizes[-1] == 65_536
        elif curve.axis == "codes":
            assert curve.sizes[-1] == 10_000_000
    assert {name.split()[0] for name in names} == {
        *("attention", "selective_scan", "ssd", "pq", "hamming", "sparse")
    }


def test_every_curve_measures_right_answers(curves, options):
    """But for what takes seconds to import or to compile."""
    for curve in curves.CURVES:
        kept = [c for c in curve.contenders if "transformers" not in c.name]
        (record,) = replace(curve, small=curve.small[:1], contenders=kept).run(options)
        for one in record["contenders"]:
            assert one["status"] in ("ok", "missing"), (curve.name, one)


@pytest.mark.parametrize("gradients", [False, True])
def test_long_attention_is_solved_at_some_queries(monkeypatch, gradients):
    data, whole = load("curves_data"), load("attention_data")
    monkeypatch.setattr(data, "APART", 3)
    monkeypatch.setattr(data, "ROWS", 2)
    problem = data.long_problem(13, gradients)
    assert problem.rows == (0, 3, 6, 9, 12)
    assert (problem.d_out.abs().sum(-1)[0, 0] > 0).nonzero().flatten().tolist() == [0, 3, 6, 9, 12]
    reference = whole.Problem(problem.q, problem.k, problem.v, problem.d_out, causal=True)
    reference.solve(gradients)
    answers = list(reference.last_head.values())
    problem.check([answer.float() for answer in answers])
    assert len(answers) == (4 if gradients else 1)
    for number in range(len(answers)):
        wrong = [answer.float() for answer in answers]
        wrong[number][0, 0, -1, 0] += 0.1
        with pytest.raises(AssertionError, match=whole.RESULTS[number]):
            problem.check(wrong)


def test_fewer_vectors_are_the_first_of_more():
    data = load("curves_data")
    few, more = data.random_vectors(1_000, 4), data.random_vectors(70_000, 4)
    np.testing.assert_array_equal(few.vectors, more.vectors[:1_000])
    np.testing.assert_array_equal(few.query, more.query)
    np.testing.assert_allclose(np.linalg.norm(more.vectors, axis=1), 1, rtol=1e-5)


def test_wrong_neighbours_are_found(curves):
    inputs = load("curves_data").random_vectors(2_000, 4)
    scores, ids, index = curves.pentad_codes(inputs)()
    curves.check_pentad_codes(inputs, (scores, ids, index))
    for wrong in ((scores + 1, ids, index), (scores, ids[:, ::-1], index)):
        with pytest.raises(AssertionError):
            curves.check_pentad_codes(inputs, wrong)
    codes = curves.binary_codes(500, 1)
    apart = np.bitwise_count(codes.codes ^ codes.queries).sum(1, dtype=np.int64)
    order = np.lexsort((np.arange(500), apart))[:10]
    np.testing.assert_array_equal(codes.ids[0], order)
    np.testing.assert_array_equal(codes.values[0], apart[order])
