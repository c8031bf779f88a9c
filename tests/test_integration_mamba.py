# SPDX-License-Identifier: Apache-2.0
"""Mamba models of transformers on pentad's kernels, against transformers' own plain functions."""

import importlib

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")

from cases import run_python  # noqa: E402
from transformers_cases import (  # noqa: E402
    PEERS,
    build,
    cached_logits,
    close,
    close_gradients,
    distance,
    gradients,
    implementation,
    modeling,
    padding,
    pair,
    stand_ins,
    tokens,
)

MAMBA = ("mamba", "falcon_mamba", "jamba")
SCAN_FUNCTIONS = {
    "mamba_selective_scan": "selective_scan_fn",
    "mamba_selective_state_update": "selective_state_update",
    "causal_conv1d_fn": "causal_conv1d_fn",
    "causal_conv1d_update": "causal_conv1d_update",
}


# --- What is called -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MAMBA)
def test_the_functions_are_pentads(family):
    with stand_ins(True):
        peers = {name: importlib.import_module(name) for name in PEERS}
        peers["update"] = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    fast, slow = (modeling(family, wanted) for wanted in (True, False))
    for name, peer_name in SCAN_FUNCTIONS.items():
        ours = implementation(getattr(fast, name))
        assert ours.__module__.startswith("pentad.compat."), name
        assert ours in [getattr(peer, peer_name, None) for peer in peers.values()]
        assert implementation(getattr(slow, name)).__module__ == slow.__name__
    if family != "jamba":
        inner = implementation(fast.mamba_inner_fn)  # whose answer is to go step by step
        assert inner.__module__.startswith("pentad.compat.")
        assert inner(*[None] * 8) is None


def test_pentad_runs(monkeypatch):
    """The calls arrive at the kernels: a forward pass, a cached step, a training step."""
    from pentad import scan

    called = set()

    def noting(name, function):
        def call(*args, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        return call

    names = ("selective_scan", "selective_state_update", "causal_conv1d", "causal_conv1d_update")
    for name in names:
        monkeypatch.setattr(scan, name, noting(name, getattr(scan, name)))
    model = build("mamba", True)
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).cache_params
        assert called == {"selective_scan", "causal_conv1d"}
        model(tokens()[:, :1], cache_params=cache, use_cache=True)
    assert called == set(names)
    called.clear()
    gradients(model.train(), tokens())
    assert called == {"selective_scan", "causal_conv1d"}


def test_ordinary_imports():
    """In another process: install, then transformers as everybody imports it."""
    run_python("""
        import inspect, torch, transformers
        import pentad.compat
        assert "mamba_ssm" in pentad.compat.install()
        config = transformers.MambaConfig(
            vocab_size=19, hidden_size=16, state_size=4, num_hidden_layers=1
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        scan = inspect.getmodule(type(model)).mamba_selective_scan
        function = inspect.getclosurevars(scan).nonlocals["implementation"]
        assert function.__module__.startswith("pentad.compat.mamba_ssm.")
        ids = torch.tensor([[3, 4, 5, 6]])
        model.train()(ids, labels=ids).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert model.eval().generate(ids, max_new_tokens=3, do_sample=False).shape[0] == 1
    """)


# --- Logits and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", MAMBA)
def test_logits_and_gradients(family, training):
    fast, slow = pair(family, training=training)
    ids = tokens()
    close(fast(ids, use_cache=False).logits, slow(ids, use_cache=False).logits)
    loss, actual = gradients(fast, ids)
    expected_loss, expected = gradients(slow, ids)
    close(loss, expected_loss)
    close_gradients(actual, expected)
    assert any("A_log" in name for name in actual)


@pytest.mark.parametrize("family", MAMBA)
def test_bfloat16(family):
    """No further from float32 than transformers' own bfloat16, twice over."""
    fast, slow = pair(family, dtype=torch.bfloat16, training=True)
    wide = build(family, False, training=True)
    wide.load_state_dict(slow.state_dict())
    ids = tokens()
    (loss, actual), (low_loss, low), (_, expected) = (gradients(m, ids) for m in (fast, slow, wide))
    close(loss, low_loss, 0.02)
    assert distance(actual, expected) <= 2 * distance(low, expected)
    fast_logits, logits, exact = (
        m(ids, use_cache=False).logits.float() for m in (fast, slow, wide)
    )
    assert (fast_logits - exact).norm() <= 2 * (logits - exact).norm()


@pytest.mark.parametrize("family", MAMBA)
def test_autocast(family):
    fast, slow = pair(family, training=True)
    _, expected = gradients(slow, tokens())
    with torch.autocast("cpu", torch.bfloat16):
        (loss, actual), (low_loss, low) = (gradients(model, tokens()) for model in (fast, slow))
    close(loss, low_loss, 0.05)
    assert distance(actual, expected) <= 2 * distance(low, expected)


@pytest.mark.parametrize("family", MAMBA)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    fast, slow = pair(family)
    ids, mask = padding(tokens(), side)
    inputs = {"attention_mask": mask}
    if family == "jamba":
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = positions
    valid = mask.bool()
    logits = fast(ids, **inputs, use_cache=False).logits
    close(logits[valid], slow(ids, **inputs, use_cache=False).logits[valid])
    for row, alone in zip(range(3), ids, strict=True):
        expected = fast(alone[valid[row]][None], use_cache=False).logits[0]
        close(logits[row][valid[row]], expected)
    (loss, actual), (expected_loss, expected) = (gradients(m, ids, **inputs) for m in (fast, slow))
    close(loss, expected_loss)
    close_gradients(actual, expected)


@pytest.mark.parametrize("family", MAMBA)
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_with_padding(family, side):
    fast, slow = pair(family, training=True)
    ids, mask = padding(tokens(), side)
    (loss, actual), (expected_loss, expected) = (
        gradients(m, ids, attention_mask=mask) for m in (fast, slow)
    )
    close(loss, expected_loss)
    close_gradients(actual, expected)


@pytest.mark.parametrize("family", MAMBA)
def test_training(family):
    """Both learn the same at the same pace."""
    models = pair(family, training=True)
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses.append([])
        for _ in range(6):
            losses[-1].append(gradients(model, tokens())[0])
            optimizer.step()
    close(torch.stack(losses[0]), torch.stack(losses[1]), 1e-3)
    assert losses[0][-1] < 0.9 * losses[0][0]


# --- Caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefill", [1, 2, 9])
@pytest.mark.parametrize("family", MAMBA)
def test_cached_steps_are_the_whole(family, prefill, dtype):
    model = build(family, True, dtype=dtype)
    ids = tokens(length=14)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        stepped = cached_logits(model, ids, prefill)
    if dtype == torch.float32:
        close(stepped, whole)
    else:
        assert (stepped - whole).norm() < 0.05 * whole.norm()


@pytest.mark.parametrize("family", MAMBA)
def test_generation(family):
    """As transformers' own, with padding on the left, and the same without a cache."""
    fast, slow = pair(family)
    ids, mask = padding(tokens(), "left")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = slow.generate(ids, attention_mask=mask, **options)
    assert torch.equal(fast.generate(ids, attention_mask=mask, **options), expected)
    assert expected.shape == (3, 29)
    ids = tokens(1)
    cached = fast.generate(ids, **options)
    assert torch.equal(cached, fast.generate(ids, use_cache=False, **options))
