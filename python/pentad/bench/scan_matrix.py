# SPDX-License-Identifier: Apache-2.0
"""The scan benchmark's cases of states that are matrices: SSD, linear attention, the delta rule.

They are bound by what this machine multiplies and adds in registers in float32: the flop counted
are those of the products in chunks of 64 steps, whatever a contender's own chunk is. Of a model's
training step, which is the forward and the backward pass without optimizer, they are those of the
scans and of the products with weights; the latter are torch's for both contenders.
"""

from __future__ import annotations

from functools import partial

import torch

from .harness import Call, Case, Contender, Target
from .passes import PASSES, Op
from .scan_matrix_data import (
    Matrix,
    Token,
    chunked_delta_rule,
    chunked_linear_attention,
    flop_of,
    random_delta_rule,
    random_linear_attention,
    random_ssd,
    random_token,
)
from .scan_models import Training, model_step, plain_function, random_training

SSD_DEFAULT = 10.0
SSD_64 = 4.0
SSD_TRAINING = 6.0
MODEL = 5.0
CHUNKED = 4.0
STEP = 3.0


def check_problem(problem, results) -> None:
    problem.check(results)


def matrix_case(name, what, setup, contenders, target) -> Case:
    """contenders: by name, a function of the problem's arguments, made without being timed."""
    return Case(
        name,
        setup,
        [
            Contender(n, partial(prepared, what, make), check_problem)
            for n, make in contenders.items()
        ],
        lambda problem: {"flop": problem.flop[what]},
        target,
        "float32",
    )


def prepared(what: str, make, problem: Matrix) -> Call:
    return PASSES[what](make(), problem.leaves, problem.d_out)


# SSD ---------------------------------------------------------------------------------------------


def ssd_setup(quick: bool, threads: int) -> Matrix:
    return random_ssd(1, 96, 4, 16, 8) if quick else random_ssd(1, 2048, 24, 64, 128)


def pentad_ssd() -> Op:
    from pentad.scan import ssd

    return lambda x, dt, A, B, C, D, dt_bias: ssd(
        x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True
    )


def transformers_ssd(chunk: int) -> Op:
    """The function that its models call without kernels."""
    scan = plain_function("mamba2", "mamba2_chunk_scan")
    return lambda x, dt, A, B, C, D, dt_bias: scan(
        x, dt, A, B, C, chunk, D=D, dt_bias=dt_bias, dt_softplus=True
    )


def ssd_case(what: str, chunks: tuple[int, ...], ratio: float) -> Case:
    names = [f"transformers, its chunk {n}" for n in chunks]
    peers = (partial(transformers_ssd, n) for n in chunks)
    return matrix_case(
        f"ssd {what} float32 1,2048,24,64 N 128, beside {names[0]}",
        what,
        ssd_setup,
        {"pentad": pentad_ssd, **dict(zip(names, peers, strict=True))},
        Target(names[0], ratio),
    )


# A model -----------------------------------------------------------------------------------------


def training_setup(hidden: int, quick: bool, threads: int) -> Training:
    sizes = (1, 64, 32) if quick else (4, hidden, 512)
    return random_training(*sizes, "mamba2")


def train(kind: str, problem: Training) -> Call:
    return model_step(kind, problem.config, problem.weights, problem.ids, family="mamba2")


def training_work(problem: Training) -> dict[str, float]:
    """Of the products with weights, three for each token and weight, and of the scans."""
    config, tokens = problem.config, problem.ids.numel()
    products = [n for n in problem.weights if n.endswith("_proj.weight")]
    weights = sum(problem.weights[n].numel() for n in ["lm_head.weight", *products])
    scan = flop_of(
        1, tokens, config.num_heads, config.n_groups, config.state_size, config.head_dim
    )["training"]
    return {"flop": 6 * tokens * weights + config.num_hidden_layers * scan, "tokens": tokens}


def model_case(hidden: int, target: Target | None) -> Case:
    return Case(
        f"Mamba2ForCausalLM training step, 4 layers, d {hidden}, L 512, float32",
        partial(training_setup, hidden),
        [
            Contender("transformers on pentad", partial(train, "pentad"), check_problem),
            Contender("transformers", partial(train, "plain"), check_problem),
        ],
        training_work,
        target,
        "float32",
    )


# Delta rule --------------------------------------------------------------------------------------


def delta_setup(quick: bool, threads: int) -> Matrix:
    return random_delta_rule(1, 96, 2, 16) if quick else random_delta_rule(1, 4096, 8, 64)


def pentad_delta() -> Op:
    from pentad.scan import delta_rule

    def op(q, k, v, beta, g):
        return delta_rule(q, k, v, beta, decay=g, log_space=True, scale=q.shape[-1] ** -0.5)

    return op


def transformers_delta() -> Op:
    """The function that its models call without kernels."""
    rule = plain_function("qwen3_next", "torch_chunk_gated_delta_rule")

    return lambda q, k, v, beta, g: rule(q, k, v, g, beta)[0]


def delta_case(what: str) -> Case:
    peers = {"torch, in chunks": lambda: chunked_delta_rule, "transformers": transformers_delta}
    return matrix_case(
        f"delta_rule {what} float32 1,4096,8,64",
        what,
        delta_setup,
        {"pentad": pentad_delta, **peers},
        Target(tuple(peers), CHUNKED),
    )


# Linear attention --------------------------------------------------------------------------------


def attention_setup(per_key: bool, quick: bool, threads: int) -> Matrix:
    sizes = (1, 96, 2, 16) if quick else (1, 4096, 8, 64)
    return random_linear_attention(*sizes, per_key)


def pentad_attention() -> Op:
    from pentad.scan import linear_attention

    return lambda q, k, v, g: linear_attention(q, k, v, decay=g, log_space=True)


def attention_case(what: str, per_key: bool) -> Case:
    decay = "each key" if per_key else "each head"
    return matrix_case(
        f"linear_attention {what} float32 1,4096,8,64, a decay for {decay} and step",
        what,
        partial(attention_setup, per_key),
        {"pentad": pentad_attention, "torch, in chunks": lambda: chunked_linear_attention},
        Target("torch, in chunks", CHUNKED),
    )


# One token ---------------------------------------------------------------------------------------


def token_setup(batch: int, quick: bool, threads: int) -> Token:
    return random_token(2, 2, 16) if quick else random_token(batch, 8, 64)


def pentad_token(token: Token) -> Call:
    from pentad.scan import linear_attention_update

    state = token.state.clone()

    def call():
        with torch.no_grad():
            return linear_attention_update(state, token.q, token.k, token.v, decay=token.decay)

    return call


def torch_token(token: Token) -> Call:
    """In place, in as few calls as there are: two products of matrices beside the decay."""
    state = token.state.clone()
    rows = state.flatten(0, 1)

    def call():
        with torch.no_grad():
            state.mul_(token.decay[..., None, None])
            rows.baddbmm_(token.k.flatten(0, 1)[:, :, None], token.v.flatten(0, 1)[:, None])
            return torch.bmm(token.q.flatten(0, 1)[:, None], rows).view_as(token.v)

    return call


def token_case(batch: int) -> Case:
    return Case(
        f"linear_attention one token, float32 {batch},8,64, a decay for each head",
        partial(token_setup, batch),
        [
            Contender("pentad", pentad_token, check_problem),
            Contender("torch, in place", torch_token, check_problem),
        ],
        lambda token: {"bytes": token.nbytes},
        Target("torch, in place", STEP),
        "read",
    )


CASES = [
    ssd_case("forward", (256,), SSD_DEFAULT),
    ssd_case("forward", (64,), SSD_64),
    ssd_case("training", (256, 64), SSD_TRAINING),
    model_case(768, Target("transformers", MODEL)),
    model_case(256, None),
    *(delta_case(what) for what in ("forward", "training")),
    *(attention_case(what, False) for what in ("forward", "training")),
    *(attention_case(what, True) for what in ("forward", "training")),
    token_case(1),
    token_case(16),
]
