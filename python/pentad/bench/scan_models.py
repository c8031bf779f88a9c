# SPDX-License-Identifier: Apache-2.0
"""Models of transformers, on its own functions and on pentad's, for the scan benchmark."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import linear, silu, softplus

from .scan_data import assert_close
from .scan_matrix_data import chunked_ssd

# Of every family, the function that tells whose kernels its module has found.
FAMILIES = {
    "mamba": "mamba_selective_scan",
    "mamba2": "mamba2_chunk_scan",
    "qwen3_next": "torch_chunk_gated_delta_rule",
}
# Largest error of a gradient, relative to its largest value: of four layers, in float32.
MODEL_TOLERANCE = 2e-3


@functools.cache
def modeling(kind: str, family: str) -> ModuleType:
    """A copy of transformers' module: "plain", on "pentad", or on the float64 "definitions"."""
    name = f"transformers.models.{family}.modeling_{family}"
    before = sys.modules.pop(name, None)
    if kind == "pentad":
        import pentad.compat

        pentad.compat.install()
    elif {"mamba_ssm", "causal_conv1d", "fla"} & sys.modules.keys():
        raise RuntimeError("the plain module has to be imported first")
    module = importlib.import_module(name)
    if before is not None:
        sys.modules[name] = before
    found = getattr(module, FAMILIES[family])
    function = inspect.getclosurevars(found).nonlocals["implementation"]
    expected = "pentad." if kind == "pentad" else name
    if not function.__module__.startswith(expected):
        raise RuntimeError(f"transformers' {kind} module calls {function.__module__}")
    if kind == "definitions":
        use_definitions(module)
    return module


def use_definitions(module: ModuleType) -> None:
    """Those of the families whose models are trained here."""
    from pentad.scan import reference

    def selective_scan(*args, use_mambapy, use_associative_scan, **kwargs):
        return reference.selective_scan(*args, **kwargs)

    def chunk_scan(x, dt, A, B, C, chunk_size, D, dt_bias, **ignored):
        return chunked_ssd(x, dt, A, B, C, D, dt_bias)

    module.mamba_selective_scan = selective_scan
    module.mamba2_chunk_scan = chunk_scan
    module.causal_conv1d_fn = reference.causal_conv1d
    module.mamba_inner_fn = lambda *args, **kwargs: None


def load_modules() -> None:
    """The copies without pentad's stand-ins, before anybody installs these."""
    for kind in ("plain", "definitions", "pentad"):
        for family in FAMILIES:
            modeling(kind, family)


def plain_function(family: str, name: str) -> Callable:
    """What transformers' models call under that name without kernels."""
    load_modules()
    return getattr(modeling("plain", family), name).__wrapped__


# Training ----------------------------------------------------------------------------------------


@dataclass
class Training:
    """Weights and tokens of a training step, and its loss and gradients from float64."""

    config: Any
    weights: dict[str, torch.Tensor]
    ids: torch.Tensor
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]

    def check(self, result) -> None:
        loss, gradients = result
        assert abs(loss - self.loss) <= 1e-4 * self.loss, f"loss {loss}, not {self.loss}"
        assert gradients.keys() == self.gradients.keys(), "gradients of other parameters"
        for name, expected in self.gradients.items():
            error = (gradients[name].double() - expected).abs().max() / expected.abs().max()
            assert error <= MODEL_TOLERANCE, f"d {name} is off by {error:.2g} of its largest value"


def model_step(kind: str, config, weights, ids, dtype=torch.float32, family="mamba"):
    """A call: forward and backward of predicting the next token."""
    model = model_class(kind, family)(config)
    model.load_state_dict(weights)
    model = model.to(dtype).train()

    def call():
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {name: x.grad for name, x in model.named_parameters()}

    return call


def model_class(kind: str, family: str):
    return getattr(
        modeling(kind, family), {"mamba": "Mamba", "mamba2": "Mamba2"}[family] + "ForCausalLM"
    )


def random_training(layers: int, hidden: int, length: int, family: str = "mamba") -> Training:
    from transformers import Mamba2Config, MambaConfig

    load_modules()
    sizes = {"vocab_size": 1024, "hidden_size": hidden, "num_hidden_layers": layers}
    if family == "mamba":
        config = MambaConfig(**sizes, use_mambapy=False)
    else:
        heads = {"num_heads": hidden // 32, "head_dim": 64, "n_groups": 1}
        config = Mamba2Config(**sizes, **heads, tie_word_embeddings=True)
    torch.manual_seed(1)
    weights = model_class("plain", family)(config).state_dict()
    ids = torch.randint(1, 1024, (1, length))
    options = {"dtype": torch.float64, "family": family}
    loss, gradients = model_step("definitions", config, weights, ids, **options)()
    return Training(config, weights, ids, loss, gradients)


# One token ---------------------------------------------------------------------------------------


@dataclass
class Step:
    """Weights of a block, its caches after some tokens, the next one, and the answer."""

    hidden: int
    weights: dict[str, torch.Tensor]
    before: torch.Tensor
    conv_state: torch.Tensor
    ssm_state: torch.Tensor
    x: torch.Tensor
    expected: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Of the weights, read, and of the states, read and written."""
        states = self.conv_state.nbytes + self.ssm_state.nbytes
        return sum(x.nbytes for x in self.weights.values()) + 2 * states

    def check(self, result: torch.Tensor) -> None:
        assert_close("the block's result", result, self.expected)


def step_in_float64(weights, conv_state, ssm_state, x) -> torch.Tensor:
    """(1, 1, hidden): a Mamba block on one token, equation by equation."""
    w = {name: v.double() for name, v in weights.items()}
    inner, gate = linear(x[0, 0].double(), w["in_proj.weight"]).chunk(2)
    window = torch.cat([conv_state[0, :, 1:].double(), inner[:, None]], 1)
    inner = silu((window * w["conv1d.weight"][:, 0]).sum(1) + w["conv1d.bias"])
    rank, states = w["dt_proj.weight"].shape[1], w["A_log"].shape[1]
    low_rank, B, C = linear(inner, w["x_proj.weight"]).split([rank, states, states])
    dt = softplus(linear(low_rank, w["dt_proj.weight"], w["dt_proj.bias"]))[:, None]
    state = torch.exp(-dt * w["A_log"].exp()) * ssm_state[0].double()
    state = state + dt * inner[:, None] * B
    y = (state * C).sum(1) + w["D"] * inner
    return linear(y * silu(gate), w["out_proj.weight"])[None, None]


def random_step(hidden: int) -> Step:
    import pentad

    load_modules()
    torch.manual_seed(1)
    weights = pentad.nn.Mamba(hidden).state_dict()
    before, x = torch.randn(1, 9, hidden).split([8, 1], 1)
    cache, _ = mixer("plain", hidden, weights, before)
    conv_state, ssm_state = (
        states[0].clone()
        for states in (cache.layers[0].conv_states, cache.layers[0].recurrent_states)
    )
    expected = step_in_float64(weights, conv_state, ssm_state, x)
    return Step(hidden, weights, before, conv_state, ssm_state, x, expected)


@torch.no_grad()
def mixer(kind: str, hidden: int, weights, before):
    """transformers' block, and its cache after some tokens."""
    from transformers import DynamicCache, MambaConfig

    config = MambaConfig(hidden_size=hidden, num_hidden_layers=1, vocab_size=8)
    block = modeling(kind, "mamba").MambaMixer(config, 0).eval()
    block.load_state_dict(weights)
    cache = DynamicCache(config=config)
    block(before, cache_params=cache)
    return cache, block


def pentad_step(step: Step):
    import pentad

    block = pentad.nn.Mamba(step.hidden)
    block.load_state_dict(step.weights)
    states = step.conv_state.clone(), step.ssm_state.clone()
    return torch.no_grad()(lambda: block.step(step.x, *states)[0])


def transformers_step(kind: str, step: Step):
    cache, block = mixer(kind, step.hidden, step.weights, step.before)
    return torch.no_grad()(lambda: block(step.x, cache_params=cache))
