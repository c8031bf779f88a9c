# SPDX-License-Identifier: Apache-2.0
"""The pq benchmark: its targets, what it tells beside times, and that it finds wrong answers."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
from bench_cases import load, timed_by

pytest.importorskip("rich")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def data():
    return load("pq_data").random_data(1500)


def search(data, M=16, nbits=4, count=4):
    return load("pq").Search(data, (data,), M, nbits, count, 1)


def test_targets():
    pq = load("pq")
    assert len({case.name for case in pq.CASES}) == len(pq.CASES)
    targets = {case.name: case.target for case in pq.CASES if case.target}
    both = ("recall@10 random", "recall@10 real")
    expected = {
        **{
            f"top 10, 4 bits, M {M}, 256 queries": ("faiss IndexPQFastScan", 1.5, both, ())
            for M in (16, 32, 64)
        },
        "top 10, 4 bits, M 32, 1 query": ("faiss IndexPQFastScan", 1.5, both, ()),
        **{
            f"top 10, 8 bits, M {M}, 32 queries": ("faiss IndexPQ", 15.0, both, ())
            for M in (16, 32)
        },
        **{f"top 10, 8 bits, M {M}, 1 query": ("faiss IndexPQ", 12.0, both, ()) for M in (16, 32)},
        "train, 8 bits, M 16, 50,000 vectors, to the distortion of 25 of Lloyd's iterations": (
            "faiss ProductQuantizer.train",
            4.0,
            (),
            ("distortion",),
        ),
        "assign, n 100,000, d 64, K 4096": ("torch.cdist + argmin", 5.0, (), ()),
    }
    for name, target in targets.items():
        if "by inverted lists" in name:
            assert target.ratio == 1.3
            assert len(target.against) == 3
            assert all(peer.startswith("faiss") for peer in target.against)
        elif "product_key_lookup" in name:
            assert target.ratio >= 3
        else:
            values = target.against, target.ratio, target.at_least, target.at_most
            assert values == expected.pop(name)
    assert not expected
    for case in pq.CASES:
        names = {contender.name for contender in case.contenders}
        against = case.target.against if case.target else ()
        assert {against} if isinstance(against, str) else set(against) <= names


def test_recall_counts_the_nearest(data):
    products = data.queries.astype(np.float64) @ data.vectors.T.astype(np.float64)
    order = np.argsort(-products, axis=1)
    assert data.recall(order[:, :10]) == 1
    assert data.recall(order[:, 10:20]) == 0
    assert data.recall(order[:, 5:15]) == 0.5
    assert data.recall(np.full((256, 10), -1)) == 0


def test_wrong_answers_are_found(data):
    pq, inputs = load("pq"), search(data)
    call = pq.Searching(pq.pentad_find, inputs)
    result = call()
    pq.check_definition(inputs, result)
    assert 0 < call.quality()["recall@10 random"] < 1
    swapped = result.ids.copy()
    swapped[0, [3, 4]] = swapped[0, [4, 3]]
    with pytest.raises(AssertionError, match="ids"):
        pq.check_definition(inputs, (result.scores, swapped))
    with pytest.raises(AssertionError, match="distances"):
        pq.check_definition(inputs, (np.nextafter(result.scores, 9), result.ids))
    twice = result.ids.copy()
    twice[1, 1] = twice[1, 0]
    for ids, complaint in ((twice, "twice"), (result.ids + 1500, "exist"), (twice[:2], "ids")):
        with pytest.raises(AssertionError, match=complaint):
            pq.check_distinct(inputs, (result.scores, ids))


@pytest.mark.parametrize("nbits", [4, 8])
def test_faiss_is_checked_too(data, nbits):
    pytest.importorskip("faiss")
    pq, inputs = load("pq"), search(data, 16, nbits)
    call = pq.Searching(pq.faiss_find, inputs)
    distances, ids = call()
    pq.check_faiss(inputs, (distances, ids))
    with pytest.raises(AssertionError):
        pq.check_faiss(inputs, (distances + 1, ids))
    assert call.quality()["recall@10 random"] > 0.1


def test_turbovec_is_checked_too(data):
    pytest.importorskip("turbovec")
    pq, inputs = load("pq"), search(data, 64)
    products, ids = pq.Searching(pq.turbovec_find, inputs)()
    pq.check_products(inputs, (products, ids))
    with pytest.raises(AssertionError):
        pq.check_products(inputs, (-products, ids))


def test_wrong_assignments_and_codebooks_are_found():
    pq = load("pq")
    inputs = pq.assign_setup(True, 1)
    codes = np.asarray(pq.pentad_assign(inputs)()).reshape(-1)
    pq.check_nearest(inputs, codes)
    pq.check_nearly(inputs, pq.torch_assign(64, inputs)())
    for check in (pq.check_nearest, pq.check_nearly):
        with pytest.raises(AssertionError):
            check(inputs, (codes + 1) % len(inputs.centroids))
    rng = np.random.default_rng(1)
    inputs = SimpleNamespace(x=rng.standard_normal((400, 128), dtype=np.float32))
    call = pq.Training(functools.partial(pq.pentad_codebooks, 2), inputs)
    books = call()
    pq.check_codebooks(inputs, books)
    parts = inputs.x.reshape(400, 16, 1, 8).astype(np.float64)
    squares = ((parts - books.astype(np.float64)) ** 2).sum(3).min(2).sum(1).mean()
    assert call.quality()["distortion"] == pytest.approx(squares, rel=1e-6)
    for wrong in (books[:8], books * np.float32(np.nan), books + 1):
        with pytest.raises(AssertionError):
            pq.check_codebooks(inputs, wrong)


def test_lists_are_tuned(data, monkeypatch):
    ivf, clock = load("pq_ivf"), [0]
    monkeypatch.setattr(ivf, "timeit", timed_by(clock))
    inputs = ivf.Lists(data, 16)

    def settings(find):
        tuned = ivf.Tuned(lambda inputs: find, inputs)
        return tuned, (tuned.probes, tuned.oversample)

    order = np.argsort(-(data.queries @ data.vectors.T), axis=1)

    def needs_six(queries, probes, oversample):
        """All from 6 lists and 4 candidates, else none; more candidates take longer."""
        clock[0] += probes * oversample
        enough = probes >= 6 and oversample >= 4
        return None, order[:, :10] if enough else order[:, 10:20]

    tuned, chosen = settings(needs_six)
    assert chosen == (6, 4)
    assert tuned.quality() == {"recall@10 random": 1.0, "nprobe": 6, "oversample": 4}
    with pytest.raises(ValueError, match="no setting finds"):
        settings(lambda queries, probes, oversample: (None, order[:, 10:20]))


def test_ours_finds_enough(data):
    ivf = load("pq_ivf")
    inputs = ivf.Lists(data, 16)
    tuned = ivf.Tuned(lambda inputs: ivf.pentad_lists(32, 4, inputs), inputs)
    scores, ids = tuned()
    ivf.check_enough(inputs, (scores, ids))
    for wrong in ((scores + 1, ids), (scores, np.roll(ids, 1, axis=0)), (scores, ids * 0)):
        with pytest.raises(AssertionError):
            ivf.check_enough(inputs, wrong)


def test_worse_answers_do_not_meet_a_target():
    harness = load("harness")
    target = harness.Target("peer", 2.0, at_least=("recall",), at_most=("error",))

    def judged(ours, theirs):
        records = [
            {"name": "ours", "quality": dict(zip(("recall", "error"), ours, strict=True))},
            {
                "name": "peer",
                "ratio": 3.0,
                "quality": dict(zip(("recall", "error"), theirs, strict=True)),
            },
        ]
        return harness.judge(target, records)

    assert judged((0.9, 1.0), (0.9, 1.0)) == {
        "against": "peer",
        "ratio": 2.0,
        "measured": 3.0,
        "met": True,
    }
    assert judged((0.95, 0.5), (0.9, 1.0))["met"]
    less = judged((0.8, 1.0), (0.9, 1.0))
    assert (less["met"], less["inferior"]) == (False, ["recall"])
    assert "NOT MET (worse recall)" in load("tables").format_target(less)
    assert judged((0.9, 1.2), (0.9, 1.0))["inferior"] == ["error"]


def test_what_sampling_explains_is_not_worse():
    """A share of 0.4 of 2,500 answers has a standard error of 0.01, a difference one of 0.014."""
    harness = load("harness")

    def worse(ours, theirs, answers):
        target = harness.Target("peer", 2.0, at_least=("recall",), answers=answers)
        names = {"ours": ours, "peer": theirs}
        records = [{"name": n, "quality": {"recall": share}} for n, share in names.items()]
        return harness.inferior(target, records, "peer")

    assert worse(0.38, 0.4, None) == ["recall"]
    assert worse(0.38, 0.4, 2500) == []
    assert worse(0.37, 0.4, 2500) == ["recall"]
    assert worse(0.38, 0.4, 250_000) == ["recall"]


def test_qualities_stand_in_the_table():
    harness = load("harness")

    class Call:
        def __call__(self):
            return 1

        def quality(self):
            return {"recall": 0.98765}

    contender = harness.Contender("ours", lambda inputs: Call(), lambda inputs, result: None)
    outcome = harness.admit(contender, None)
    assert outcome.quality == {"recall": 0.98765}
    record = harness.summarise(
        outcome, outcome, [harness.Round({"ours": 1.0}, 0.0)], 1, {"rows": 1e9}
    )
    assert load("tables").contender_row(record, None)[0] == "ours: recall 0.988"


def test_memory_of_an_assignment():
    (case,) = load("pq").MEMORY
    record = case.measure("pentad", (2000,))
    assert record["status"] == "ok", record.get("detail")
    assert record["extra_bytes"] >= 0
    assert case.measure("pentad", (-1,))["status"] == "error"
