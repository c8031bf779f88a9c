# SPDX-License-Identifier: Apache-2.0
"""The scan benchmark: its targets, and that it finds wrong answers."""

import pytest

pytest.importorskip("rich")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

from bench_cases import load  # noqa: E402
from cases import run_python  # noqa: E402


def test_targets():
    scan = load("scan")
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
    matrices = {
        "ssd forward float32 1,2048,24,64 N 128, beside transformers, its chunk 256": (
            "transformers, its chunk 256",
            10.0,
        ),
        "ssd forward float32 1,2048,24,64 N 128, beside transformers, its chunk 64": (
            "transformers, its chunk 64",
            4.0,
        ),
        "ssd training float32 1,2048,24,64 N 128, beside transformers, its chunk 256": (
            "transformers, its chunk 256",
            6.0,
        ),
        "Mamba2ForCausalLM training step, 4 layers, d 768, L 512, float32": ("transformers", 5.0),
        "linear_attention one token, float32 1,8,64, a decay for each head": (
            "torch, in place",
            3.0,
        ),
        "linear_attention one token, float32 16,8,64, a decay for each head": (
            "torch, in place",
            3.0,
        ),
    }
    for what in ("forward", "training"):
        own, mambapy = "permute, four scans of pentad", "permute, four scans of mambapy"
        for states in (16, 1):
            name = f"scan2d cross-scan {what} float32 1,192,56,56 N {states}"
            matrices[f"{name}, all as the image lies"] = ((own,), 2.0)
            matrices[f"{name}, delta, B and C in scan order"] = ((own, mambapy), 2.0)
        peers = ("torch, in chunks", "transformers")
        matrices[f"delta_rule {what} float32 1,4096,8,64"] = (peers, 4.0)
        for decay in ("head", "key"):
            name = f"linear_attention {what} float32 1,4096,8,64, a decay for each {decay} and step"
            matrices[name] = ("torch, in chunks", 4.0)
    expected |= matrices
    assert {name: (t.against, t.ratio) for name, t in targets.items()} == expected
    for name in matrices:
        assert cases[name].bound == ("read" if "one token" in name else "float32")
    for name, target in targets.items():
        names = {contender.name for contender in cases[name].contenders}
        assert names >= (
            {target.against} if isinstance(target.against, str) else set(target.against)
        )
    arrays, states = 4 * 2048 * 1536, 16 * 2048 * 1536  # u, delta, z and the output
    assert 1 <= scan.allowed_bytes(2048) / (4 * arrays + 4 * states / 32) < 1.02


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


MATRICES = {
    "ssd": ("random_ssd", (2, 150, 4, 5, 3)),
    "delta_rule": ("random_delta_rule", (2, 150, 2, 5)),
    "a decay for each head": ("random_linear_attention", (2, 150, 2, 5, False)),
    "a decay for each key": ("random_linear_attention", (2, 150, 2, 5, True)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_answers_of_matrix_states(name):
    """The chunked forms, over two chunks and a part of a third, against the recurrences."""
    from pentad.scan import reference

    make, sizes = MATRICES[name]
    problem = getattr(load("scan_matrix_data"), make)(*sizes)
    function = {
        "ssd": lambda x, dt, A, B, C, D, dt_bias: reference.ssd(
            x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True
        ),
        "delta_rule": lambda q, k, v, beta, g: reference.delta_rule(
            q, k, v, beta, decay=g, log_space=True, scale=5**-0.5
        ),
    }.get(name, lambda q, k, v, g: reference.linear_attention(q, k, v, decay=g, log_space=True))
    results = gradients(function, problem, problem.d_out)
    for actual, expected in zip(results, problem.expected.values(), strict=True):
        torch.testing.assert_close(actual, expected)
    results = [x.float() for x in results]
    problem.check(results)
    for wrong in wrong_in_turn(results):
        with pytest.raises(AssertionError, match="is off by"):
            problem.check(wrong)
    assert 0 < problem.flop["forward"] < problem.flop["training"]


def test_answers_of_images():
    """Against selective scans that visit the places in the orders of the four directions."""
    images = load("scan_images")
    from pentad.scan import reference

    problem = images.random_image(2, 3, 5, 4, 2)
    orders = problem.orders
    columns = torch.tensor([[4 * row + column for column in range(4) for row in range(5)]])
    assert torch.equal(orders[:2], torch.cat([torch.arange(20)[None], columns]))
    assert torch.equal(orders[2:], orders[:2].flip(1))

    def scan(u, delta, A, B, C, D, delta_bias):
        total = torch.zeros_like(u.flatten(2))
        for k, order in enumerate(orders):
            found = (x[..., order] for x in (u.flatten(2), delta[:, k], B[:, k], C[:, k]))
            u_k, delta_k, B_k, C_k = found
            y = reference.selective_scan(
                u_k, delta_k, A[k], B_k, C_k, D[k], None, delta_bias[k], delta_softplus=True
            )
            total = total.index_add(2, order, y)
        return total.view(u.shape)

    results = gradients(scan, problem, problem.d_out)
    for actual, expected in zip(results, problem.expected.values(), strict=True):
        torch.testing.assert_close(actual, expected)
    results = [x.float() for x in results]
    problem.check(results)
    for wrong in wrong_in_turn(results):
        with pytest.raises(AssertionError, match="is off by"):
            problem.check(wrong)
    for what in ("forward", "training"):
        for make in (images.scan2d, images.permute_and_scan):
            problem.check(make(what, False, problem)())
            problem.check_by_step(make(what, True, problem)())


def test_flop_of_matrix_states():
    """A group's products of queries and keys count once; those of a state count for each head."""
    flop_of = load("scan_matrix_data").flop_of
    assert flop_of(1, 10, 6, 2, 8, 4)["forward"] == 10 * (2 * 64 * 8 + 6 * (64 * 4 + 4 * 8 * 4))
    assert flop_of(1, 10, 6, 6, 8, 4, delta=True)["forward"] == 10 * 6 * (
        2 * 64 * (8 + 4) + 6 * 8 * 4
    )


def test_a_token_of_linear_attention():
    matrix, token = load("scan_matrix"), load("scan_matrix_data").random_token(2, 3, 4)
    for prepare in (matrix.pentad_token, matrix.torch_token):
        call = prepare(token)
        first = call().clone()
        token.check(first)
        with pytest.raises(AssertionError, match="is off by"):
            token.check(call())  # the state has moved on


def test_transformers_functions_are_used_as_they_are_meant():
    """In another process, where nothing has been installed before: models and functions."""
    run_python("""
        import torch
        from pentad.bench import scan_matrix, scan_matrix_data, scan_models
        torch.set_num_threads(1)
        for what in ("forward", "training"):
            problem = scan_matrix_data.random_ssd(2, 70, 4, 6, 3)
            for name in (scan_matrix.pentad_ssd, lambda: scan_matrix.transformers_ssd(16)):
                problem.check(scan_matrix.prepared(what, name, problem)())
            problem = scan_matrix_data.random_delta_rule(2, 70, 2, 6)
            for name in (scan_matrix.pentad_delta, scan_matrix.transformers_delta):
                problem.check(scan_matrix.prepared(what, name, problem)())
        step = scan_models.random_step(32)
        step.check(scan_models.transformers_step("plain", step)())
        training = scan_models.random_training(1, 32, 20, "mamba2")
        for kind in ("plain", "pentad"):
            loss, gradients = scan_matrix.train(kind, training)()
            training.check((loss, gradients))
            gradients[next(n for n in gradients if "A_log" in n)][0] += 1
            try:
                training.check((loss, gradients))
            except AssertionError:
                continue
            raise SystemExit("a wrong gradient was admitted")
    """)


def test_mambapy_is_used_as_it_is_meant():
    pytest.importorskip("mambapy")
    scan = load("scan")
    problem = load("scan_data").random_scan(2, 6, 16, 3, torch.float32)
    scan.check_turned(problem, scan.mambapy_scan("training", problem)())


def test_a_failed_measurement_of_memory_says_why():
    (case,) = load("scan").MEMORY
    record = case.measure("pentad", (-1,))
    assert record["status"] == "error"
    assert "negative" in record["detail"]
