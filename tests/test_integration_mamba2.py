# SPDX-License-Identifier: Apache-2.0
"""Models of transformers whose states are matrices (Mamba-2's scan and the delta rules) on pentad's
kernels, against transformers' own plain functions.

In float32 both compute the same sums in other orders, over chunks of other lengths and through
three layers: 1e-4 of the largest value, as for the models of one state per channel. A wrong decay,
position or head changes the first digits.
"""

import inspect

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")

from cases import run_python  # noqa: E402
from transformers_cases import (  # noqa: E402
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
    tokens,
)

from pentad import scan  # noqa: E402

MAMBA2 = ("mamba2", "bamba", "zamba2")
ALIKE = ("falcon_h1", "qwen3_5", "olmo_hybrid", "kimi_linear")
MODELS = (*MAMBA2, "qwen3_next")
SCANS = {  # of a whole, and of a step
    **dict.fromkeys((*MAMBA2, "falcon_h1"), ("ssd", "selective_state_update")),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear"),
        ("delta_rule", "delta_rule_update"),
    ),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """What torch computes here is too small for more of them, which would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- What is called -------------------------------------------------------------------------------


def looked_up(family, fast):
    """By name: what a modeling module's functions with kernels call."""
    return {
        name: implementation(function)
        for name, function in vars(modeling(family, fast)).items()
        if inspect.isfunction(function) and "implementation" in function.__code__.co_freevars
    }


@pytest.mark.parametrize("family", SCANS)
def test_the_functions_are_pentads(family):
    fast, slow = (looked_up(family, wanted) for wanted in (True, False))
    assert fast.keys() == slow.keys()
    assert len(fast) == (5 if SCANS[family][0] == "ssd" else 4)
    for name, function in fast.items():
        assert function.__module__.startswith("pentad.compat."), name
        assert slow[name].__module__ == modeling(family, False).__name__
    if "mamba2_split_conv1d_scan_combined" in fast:  # whose answer is to go step by step
        assert fast["mamba2_split_conv1d_scan_combined"](*[None] * 7) is None


@pytest.mark.parametrize("family", SCANS)
def test_pentad_runs(family, monkeypatch):
    """The calls arrive at the kernels: a forward pass, a cached step, a training step."""
    called = set()

    def noting(name, function):
        def call(*args, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        return call

    whole, step = SCANS[family]
    for name in (whole, step, "causal_conv1d", "causal_conv1d_update"):
        monkeypatch.setattr(scan, name, noting(name, getattr(scan, name)))
    model = build(family, True)
    with torch.no_grad():
        model(tokens(), use_cache=False)
        assert called == {whole, "causal_conv1d"}
        called.clear()
        cached_logits(model, tokens(length=4), 3)
    assert called == {whole, step, "causal_conv1d", "causal_conv1d_update"}
    called.clear()
    gradients(model.train(), tokens())
    assert called == {whole, "causal_conv1d"}


def test_ordinary_imports():
    """In another process: install, then transformers as everybody imports it."""
    run_python("""
        import inspect, torch, transformers
        import pentad.compat
        assert {"mamba_ssm", "causal_conv1d", "fla"} <= set(pentad.compat.install())
        sizes = {"vocab_size": 19, "hidden_size": 16}
        delta = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
        delta |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        models = {
            "mamba2_chunk_scan": transformers.Mamba2Config(
                **sizes, num_hidden_layers=1, num_heads=2, head_dim=16, n_groups=1
            ),
            "torch_chunk_gated_delta_rule": transformers.Qwen3NextConfig(
                **sizes, **delta, **attention, num_hidden_layers=2, num_experts=0,
                intermediate_size=16, layer_types=["linear_attention", "full_attention"],
            ),
        }
        ids = torch.tensor([[3, 4, 5, 6]])
        for name, config in models.items():
            model = transformers.AutoModelForCausalLM.from_config(config)
            wrapper = getattr(inspect.getmodule(type(model)), name)
            function = inspect.getclosurevars(wrapper).nonlocals["implementation"]
            assert function.__module__.startswith("pentad.compat.")
            model.train()(ids, labels=ids).loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            assert model.eval().generate(ids, max_new_tokens=3, do_sample=False).shape[0] == 1
    """)


# --- Logits and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", SCANS)
def test_logits_and_gradients(family, training):
    fast, slow = pair(family, training=training)
    ids = tokens()
    close(fast(ids, use_cache=False).logits, slow(ids, use_cache=False).logits)
    loss, actual = gradients(fast, ids)
    expected_loss, expected = gradients(slow, ids)
    close(loss, expected_loss)
    close_gradients(actual, expected)
    assert any("A_log" in name for name in actual)


@pytest.mark.parametrize("family", [*MODELS, "kimi_linear"])
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


@pytest.mark.parametrize("family", MODELS)
def test_autocast(family):
    fast, slow = pair(family, training=True)
    _, expected = gradients(slow, tokens())
    with torch.autocast("cpu", torch.bfloat16):
        (loss, actual), (low_loss, low) = (gradients(model, tokens()) for model in (fast, slow))
    close(loss, low_loss, 0.05)
    assert distance(actual, expected) <= 2 * distance(low, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODELS)
def test_padding(family, side, training):
    fast, slow = pair(family, training=training)
    ids, mask = padding(tokens(), side)
    valid = mask.bool()
    logits, expected = (
        model(ids, attention_mask=mask, use_cache=False).logits for model in (fast, slow)
    )
    close(logits[valid], expected[valid])
    (loss, actual), (expected_loss, expected) = (
        gradients(model, ids, attention_mask=mask) for model in (fast, slow)
    )
    close(loss, expected_loss)
    close_gradients(actual, expected)


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next"])
def test_packed_sequences(family):
    """As each alone; transformers' plain functions refuse them."""
    fast, slow = (model.base_model for model in pair(family))
    ids = tokens(1)
    lengths = torch.tensor([9, 1, 11])
    pieces = ids.split(lengths.tolist(), 1)
    inputs = {"seq_idx": torch.repeat_interleave(torch.arange(3, dtype=torch.int32), lengths)[None]}
    if family == "qwen3_next":
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    packed = fast(ids, use_cache=False, **inputs).last_hidden_state
    alone = [slow(piece, use_cache=False).last_hidden_state for piece in pieces]
    close(packed, torch.cat(alone, 1))
    with pytest.raises(ValueError, match="packed"):
        slow(ids, use_cache=False, **inputs)


# --- Caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill", [1, 9])
@pytest.mark.parametrize("family", SCANS)
def test_cached_steps(family, prefill):
    """As transformers' own; and as the whole, where those are."""
    fast, slow = pair(family)
    ids = tokens(length=14)
    with torch.no_grad():
        stepped, expected = (cached_logits(model, ids, prefill) for model in (fast, slow))
        close(stepped, expected)
        if family not in ("bamba", "zamba2", "falcon_h1"):  # their attention takes no position here
            close(stepped, fast(ids, use_cache=False).logits)


@pytest.mark.parametrize("family", MODELS)
def test_cached_steps_in_bfloat16(family):
    fast, slow = pair(family, dtype=torch.bfloat16)
    ids = tokens(length=14)
    with torch.no_grad():
        stepped, expected = (cached_logits(model, ids, 9) for model in (fast, slow))
    assert (stepped - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("family", SCANS)
def test_generation(family):
    """As transformers' own, with padding on the left, and the same without a cache."""
    fast, slow = pair(family)
    ids, mask = padding(tokens(), "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = slow.generate(ids, attention_mask=mask, **options)
    assert torch.equal(fast.generate(ids, attention_mask=mask, **options), expected)
    assert expected.shape == (3, 27)
    ids = tokens(1)
    cached = fast.generate(ids, **options)
    assert torch.equal(cached, fast.generate(ids, use_cache=False, **options))
