# SPDX-License-Identifier: Apache-2.0
"""Small random models of transformers, on pentad's kernels and on transformers' plain functions.

A modeling module looks for mamba_ssm, causal_conv1d and fla when it is imported. Here each is
imported twice: with pentad's stand-ins, and with nothing in their place.
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

from torch.nn.functional import cross_entropy  # noqa: E402

import pentad.compat  # noqa: E402

PEERS = ("mamba_ssm", "causal_conv1d", "fla")
if any(
    getattr(sys.modules.get(p), "__name__", p) == p and importlib.util.find_spec(p) for p in PEERS
):
    pytest.skip(", ".join(PEERS) + ": one of them is installed", allow_module_level=True)

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
STATES = {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4}
# Of delta rules: half as many heads of the keys as of the values.
DELTA = {"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2}
DELTA |= {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
LAYERS = ["linear_attention", "full_attention", "linear_attention"]
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
    "zamba2": lambda: transformers.Zamba2Config(
        **SIZES,
        intermediate_size=48,
        layers_block_type=["linear_attention", "hybrid", "linear_attention"],
        num_attention_heads=4,
        mamba_d_state=8,
        mamba_ngroups=2,
        n_mamba_heads=4,
        chunk_size=8,
        num_mem_blocks=1,
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **SIZES,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_chunk_size=8,
        time_step_limit=(0.1, 2.0),
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **SIZES, **DELTA, head_dim=8, intermediate_size=48, num_experts=0, layer_types=LAYERS
    ),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **SIZES, **DELTA, head_dim=8, intermediate_size=48, layer_types=LAYERS
    ),
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(
        **SIZES, **DELTA, intermediate_size=48, layer_types=LAYERS
    ),
    "kimi_linear": lambda: transformers.KimiLinearConfig(
        **SIZES,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        linear_head_dim=8,
        linear_num_heads=4,
        mlp_layer_types=["dense"] * 3,
        layer_types=LAYERS,
    ),
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
