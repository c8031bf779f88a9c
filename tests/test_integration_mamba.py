# SPDX-License-Identifier: Apache-2.0
"""Mamba models of transformers on pentad's kernels, against transformers' own plain functions.

A modeling module looks for mamba_ssm and causal_conv1d when it is imported. Here each is imported
twice: with pentad's stand-ins, and with nothing in their place.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")

from cases import run_python  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import pentad.compat  # noqa: E402

PEERS = ("mamba_ssm", "causal_conv1d")
if any(
    getattr(sys.modules.get(p), "__name__", p) == p and importlib.util.find_spec(p) for p in PEERS
):
    pytest.skip("mamba_ssm or causal_conv1d is installed", allow_module_level=True)

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
STATES = {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4}
CONFIGURATIONS = {
    "mamba": lambda: transformers.MambaConfig(**SIZES, **STATES),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(**SIZES, **STATES),
    "jamba": lambda: transformers.JambaConfig(
        **SIZES,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=3,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        **SIZES, state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=8
    ),
    "bamba": lambda: transformers.BambaConfig(
        **SIZES,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
}
MAMBA = ("mamba", "falcon_mamba", "jamba")
SCAN_FUNCTIONS = {
    "mamba_selective_scan": "selective_scan_fn",
    "mamba_selective_state_update": "selective_state_update",
    "causal_conv1d_fn": "causal_conv1d_fn",
    "causal_conv1d_update": "causal_conv1d_update",
}


# --- Models ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def stand_ins(wanted):
    """With pentad's packages under the peers' names, or with none; as before afterwards."""
    before = dict(sys.modules)
    for name in before:
        if name.split(".")[0] in PEERS:
            del sys.modules[name]
    try:
        if wanted:
            assert set(pentad.compat.install()) >= set(PEERS)
        yield
    finally:
        for name in list(sys.modules):
            if name.split(".")[0] in ("flash_attn", *PEERS):
                del sys.modules[name]
        sys.modules.update(before)


@functools.cache
def modeling(family, fast):
    """A copy of the modeling module of its own."""
    name = f"transformers.models.{family}.modeling_{family}"
    before = sys.modules.pop(name, None)
    with stand_ins(fast):
        module = importlib.import_module(name)
    if before is not None:
        sys.modules[name] = before
        setattr(sys.modules[name.rpartition(".")[0]], f"modeling_{family}", before)
    return module


def implementation(function):
    """What a function of a modeling module calls."""
    return inspect.getclosurevars(function).nonlocals["implementation"]


def build(family, fast, dtype=torch.float32, training=False):
    """The same weights, fast or not; with random decays and biases."""
    module = modeling(family, fast)
    torch.manual_seed(5)
    model_class = next(
        getattr(module, n)
        for n in dir(module)
        if n.endswith("ForCausalLM") and n != "AutoModelForCausalLM"
    )
    model = model_class(CONFIGURATIONS[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("conv1d.bias", "dt_proj.bias", "A_log", ".D")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).train(training)


def pair(family, **options):
    fast, slow = (build(family, fast, **options) for fast in (True, False))
    for (name, a), (_, b) in zip(fast.named_parameters(), slow.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    return fast, slow


def tokens(batch=3, length=21):
    generator = torch.Generator().manual_seed(11)
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=generator)


def padding(ids, side, lengths=(21, 13, 7)):
    """(ids with padding, mask), on that side."""
    steps = torch.arange(ids.shape[1])
    lengths = torch.tensor(lengths)[:, None]
    mask = steps < lengths if side == "right" else steps >= ids.shape[1] - lengths
    return ids.where(mask, 0), mask.long()


def gradients(model, ids, **inputs):
    """(loss, gradients by parameter) of predicting the next token."""
    labels = ids.masked_fill(inputs["attention_mask"] == 0, -100) if inputs else ids
    logits = model(input_ids=ids, **inputs, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    return loss.detach(), {
        name: x.grad for name, x in model.named_parameters() if x.grad is not None
    }


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def close_gradients(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        size = expected[name].abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            gradient / size, expected[name] / size, rtol=0, atol=tolerance, msg=name
        )


def distance(actual, expected):
    return sum((actual[n].float() - expected[n]).square().sum() for n in expected).sqrt()


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


def cached_logits(model, ids, prefill, mask=None):
    """Those of the whole, computed token by token behind the first `prefill` of them."""
    name = (
        "past_key_values"
        if "past_key_values" in inspect.signature(model.forward).parameters
        else "cache_params"
    )
    inputs = {} if mask is None else {"attention_mask": mask[:, :prefill]}
    output = model(ids[:, :prefill], use_cache=True, **inputs)
    logits = [output.logits]
    for t in range(prefill, ids.shape[1]):
        inputs = {name: getattr(output, name)}
        if mask is not None:
            inputs["attention_mask"] = mask[:, : t + 1]
        output = model(ids[:, t : t + 1], use_cache=True, **inputs)
        logits.append(output.logits)
    return torch.cat(logits, 1)


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


# --- Later models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_later_models_keep_their_own_scan(family):
    """Of Mamba-2's functions pentad has the convolution and the one-token step."""
    fast, slow = pair(family)
    module = modeling(family, True)
    functions = {
        name: implementation(function)
        for name, function in vars(module).items()
        if inspect.isfunction(function) and "implementation" in function.__code__.co_freevars
    }
    ours = {n for n, f in functions.items() if f.__module__.startswith("pentad.compat.")}
    assert any("causal_conv1d" in name for name in ours)
    assert any("state_update" in name for name in ours)
    assert not any("chunk" in name or "combined" in name for name in ours)
    ids = tokens()
    close(fast(ids, use_cache=False).logits, slow(ids, use_cache=False).logits)
    with torch.no_grad():
        close(cached_logits(fast, ids, 16), cached_logits(slow, ids, 16))
    (loss, actual), (expected_loss, expected) = (gradients(m.train(), ids) for m in (fast, slow))
    close(loss, expected_loss)
    close_gradients(actual, expected)
