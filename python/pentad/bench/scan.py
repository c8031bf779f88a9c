# SPDX-License-Identifier: Apache-2.0
"""pentad.scan against mambapy, transformers' functions and torch.

    pentad bench scan [--quick] [--only TEXT] [--json FILE]

Expected answers, gradients included, are computed in float64 by the equations. Shapes are B,D,L.

A selective scan is measured in states: B x D x L x N of them. Its bound is what this machine
multiplies and adds in registers in float32, measured in the same run, where a state costs eleven
instructions forward (seven of them the exponential) and thirty-one in both passes (eleven, the same
again for the states that the backward pass recomputes, and nine for the adjoint). An instruction
counts two "flop" whether it multiplies, adds or both, as the peak does.

How the peers are used, where it is not obvious:

- mambapy's scan gets its own layout, time before channels, and softplus and gate from torch.
- transformers' loop is the function that its models call without kernels. Its backward pass takes
  minutes where a scan has 2048 steps, so it stands beside 256 of them, in one run.
- A loop over time in torch is given its time steps as they lie, and copied to the front first.
- torch.associative_scan is compiled, as it must be with gradients on the CPU; compilation is not
  timed.
- A training step of transformers' Mamba is the forward and the backward pass, without optimizer,
  with a vocabulary of 1024.
- The functions of states that are matrices stand beside those that transformers' models call
  without kernels, and beside chunked forms in plain PyTorch, see `scan_matrix_data`.
- Whoever scans an image by permuting it gets time steps, B and C in the order of each scan, as the
  models that do so compute them; pentad's scan2d gets them as the image lies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.nn.functional import silu, softplus

from . import scan_images, scan_matrix
from .harness import Call, Case, Contender, Family, Target
from .memory import Memory
from .passes import PASSES, Op, training
from .scan_data import (
    FLOP_PER_STATE,
    Convolution,
    Recurrence,
    Scan,
    random_convolution,
    random_recurrence,
    random_scan,
    torch_conv,
)
from .scan_models import (
    Step,
    Training,
    model_step,
    pentad_step,
    plain_function,
    random_step,
    random_training,
    transformers_step,
)

PACKAGES = ("torch", "mambapy", "transformers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

FORWARD = 120.0
TRAINING = 100.0
MODEL = 20.0
RECURRENCE = 5.0
CONVOLUTION = 4.0
STEP = 3.0


def check_problem(problem: Any, results) -> None:
    problem.check(results)


# Selective scan ----------------------------------------------------------------------------------


def pentad_scan(what: str, problem: Scan) -> Call:
    from pentad.scan import selective_scan

    op = partial(selective_scan, delta_softplus=True)
    return PASSES[what](op, problem.leaves, problem.d_out)


def turned(x: torch.Tensor) -> torch.Tensor:
    """(B, L, D) of (B, D, L), and back."""
    return x.transpose(1, 2).contiguous() if x.dim() == 3 else x


def mambapy_scan(what: str, problem: Scan) -> Call:
    from mambapy.mamba import MambaBlock

    def op(u, delta, A, B, C, D, z, delta_bias):
        steps = softplus(delta + delta_bias)
        return MambaBlock.selective_scan(None, u, steps, A, B, C, D) * silu(z)

    return PASSES[what](op, [turned(x) for x in problem.leaves], turned(problem.d_out))


def check_turned(problem: Scan, results) -> None:
    problem.check([turned(x.detach()) for x in results])


def transformers_scan(what: str, problem: Scan) -> Call:
    loop = plain_function("mamba", "mamba_selective_scan")

    def op(u, delta, A, B, C, D, z, delta_bias):
        return loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True).to(u.dtype)

    return PASSES[what](op, problem.leaves, problem.d_out)


def scan_setup(length: int, dtype: str, side_by_side: bool, quick: bool, threads: int) -> Scan:
    shape = (1, 64, 48) if quick else (1, 1536, length)
    problem = random_scan(*shape, 16, DTYPES[dtype])
    if side_by_side:  # channels, as of the u and z in transformers
        for name in ("u", "delta", "z", "d_out"):
            setattr(problem, name, turned(getattr(problem, name)).transpose(1, 2))
    return problem


def scan_case(
    what: str,
    length: int,
    dtype: str = "float32",
    peers: tuple[str, ...] = (),
    ratio: float | None = None,
    side_by_side: bool = False,
) -> Case:
    prepare = {"mambapy": mambapy_scan, "transformers' loop": transformers_scan}
    contenders = [Contender("pentad", partial(pentad_scan, what), check_problem)]
    for name in peers:
        checked = check_turned if name == "mambapy" else check_problem
        once = what == "training" and name != "mambapy"
        contenders.append(Contender(name, partial(prepare[name], what), checked, once))
    layout = ", channels side by side" if side_by_side else ""
    return Case(
        f"selective_scan {what} {dtype} 1,1536,{length} N 16{layout}",
        partial(scan_setup, length, dtype, side_by_side),
        contenders,
        lambda problem: {
            "states": problem.states,
            "flop": problem.states * FLOP_PER_STATE[what],
        },
        ratio and Target("mambapy", ratio),
        "float32",
    )


# A model -----------------------------------------------------------------------------------------


def training_setup(quick: bool, threads: int) -> Training:
    return random_training(1, 64, 32) if quick else random_training(4, 768, 512)


def train(kind: str, problem: Training) -> Call:
    return model_step(kind, problem.config, problem.weights, problem.ids)


def train_with_mambapy(problem: Training) -> Call:
    import copy

    import mambapy.pscan  # noqa: F401  without it transformers takes its loop

    config = copy.deepcopy(problem.config)
    config.use_mambapy = True
    return model_step("plain", config, problem.weights, problem.ids)


def model_case() -> Case:
    return Case(
        "MambaForCausalLM training step, 4 layers, d 768, L 512, float32",
        training_setup,
        [
            Contender("transformers on pentad", partial(train, "pentad"), check_problem),
            Contender("transformers, its loop", partial(train, "plain"), check_problem, once=True),
            Contender("transformers, use_mambapy", train_with_mambapy, check_problem),
        ],
        lambda problem: {"tokens": problem.ids.numel()},
        Target("transformers, its loop", MODEL),
    )


# Elementwise recurrence --------------------------------------------------------------------------


def recurrence_setup(quick: bool, threads: int) -> Recurrence:
    return random_recurrence((2, 16, 8) if quick else (4, 1024, 4096))


def recurrence_with(op: Callable[[], Op], problem: Recurrence) -> Call:
    return training(op(), problem.leaves, problem.d_h)


def pentad_recurrence() -> Op:
    from pentad.scan import linear_recurrence

    return linear_recurrence


@cache
def compiled_associative_scan() -> Op:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def op(a, x):
        return associative_scan(combine, (a, x), dim=-1, combine_mode="generic")[1]

    return torch.compile(op, fullgraph=True, dynamic=False)


def loop(a: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    h, states = torch.zeros_like(x[0]), []
    for a_t, x_t in zip(a.unbind(0), x.unbind(0), strict=True):
        h = a_t * h + x_t
        states.append(h)
    return states


def torch_loop() -> Op:
    return lambda a, x: torch.stack(loop(a.movedim(-1, 0), x.movedim(-1, 0)), -1)


def copied_torch_loop() -> Op:
    def op(a, x):
        a, x = (v.movedim(-1, 0).contiguous() for v in (a, x))
        return torch.stack(loop(a, x)).movedim(0, -1).contiguous()

    return op


def recurrence_case() -> Case:
    peers = {
        "torch.associative_scan, compiled": compiled_associative_scan,
        "torch, a loop over time": torch_loop,
        "torch, a loop over copied steps": copied_torch_loop,
    }
    return Case(
        "linear_recurrence training float32 4,1024,4096",
        recurrence_setup,
        [
            Contender(name, partial(recurrence_with, op), check_problem)
            for name, op in {"pentad": pentad_recurrence, **peers}.items()
        ],
        # Of a, x and h; and of these, d_h, d_a and d_x, without d_h once more as the carry.
        lambda problem: {"bytes": 8 * problem.x.nbytes},
        Target(tuple(peers), RECURRENCE),
        "read",
    )


# Causal convolution ------------------------------------------------------------------------------


def convolution_setup(dtype: str, channels_last: bool, quick: bool, threads: int) -> Convolution:
    dim, length = (40, 64) if quick else (1536, 2048)
    return random_convolution(1, dim, length, 4, DTYPES[dtype], channels_last)


def pentad_conv(what: str, problem: Convolution) -> Call:
    from pentad.scan import causal_conv1d

    return PASSES[what](partial(causal_conv1d, activation="silu"), problem.leaves, problem.d_out)


def conv1d_and_silu(what: str, problem: Convolution) -> Call:
    return PASSES[what](torch_conv, problem.leaves, problem.d_out)


def convolution_case(
    what: str, channels_last: bool, dtype: str = "float32", ratio: float | None = None
) -> Case:
    layout = "channels" if channels_last else "steps"
    # x and the result; and x, d_out, d_x.
    arrays = {"forward": 2, "training": 5}[what]
    return Case(
        f"causal_conv1d {what} {dtype} 1,1536,2048 W 4 and SiLU, {layout} side by side",
        partial(convolution_setup, dtype, channels_last),
        [
            Contender("pentad", partial(pentad_conv, what), check_problem),
            Contender("torch conv1d and silu", partial(conv1d_and_silu, what), check_problem),
        ],
        lambda problem: {"bytes": arrays * problem.x.nbytes},
        ratio and Target("torch conv1d and silu", ratio),
        "read",
    )


# One token ---------------------------------------------------------------------------------------


def step_setup(hidden: int, quick: bool, threads: int) -> Step:
    return random_step(32 if quick else hidden)


def step_case(hidden: int, ratio: float | None) -> Case:
    return Case(
        f"one token of a Mamba block, d {hidden}, float32",
        partial(step_setup, hidden),
        [
            Contender("pentad.nn.Mamba.step", pentad_step, check_problem),
            Contender("transformers", partial(transformers_step, "plain"), check_problem),
            Contender(
                "transformers on pentad", partial(transformers_step, "pentad"), check_problem
            ),
        ],
        lambda problem: {"bytes": problem.nbytes},
        ratio and Target("transformers", ratio),
        "read",
    )


# The cases ---------------------------------------------------------------------------------------

PEERS = ("mambapy", "transformers' loop")

CASES = [
    scan_case("forward", 2048, peers=PEERS, ratio=FORWARD),
    scan_case("training", 2048, peers=PEERS[:1], ratio=TRAINING),
    scan_case("training", 256, peers=PEERS),
    scan_case("training", 2048, side_by_side=True),
    scan_case("forward", 2048, "bfloat16", PEERS[1:]),
    scan_case("training", 2048, "bfloat16"),
    model_case(),
    recurrence_case(),
    *(
        convolution_case("forward", channels_last, ratio=CONVOLUTION)
        for channels_last in (False, True)
    ),
    *(convolution_case("training", channels_last) for channels_last in (False, True)),
    convolution_case("forward", True, "bfloat16"),
    step_case(768, STEP),
    step_case(256, None),
    *scan_matrix.CASES,
    *scan_images.CASES,
]

# Memory ------------------------------------------------------------------------------------------

DIM, STATES, MEMORY_LENGTH = 1536, 16, 2048
ALLOWED = "inputs + output + states / 32"


def allowed_bytes(length: int) -> int:
    """u, delta, z and the output, A, B, C, D and the bias, and one in 32 of the states."""
    inputs = 4 * DIM * length + DIM * STATES + 2 * STATES * length + 2 * DIM
    return 4 * (inputs + DIM * STATES * length // 32)


def memory_call(prepare: Callable[[str, Scan], Call], length: int) -> Call:
    problem = random_scan(1, DIM, length, STATES, torch.float32, solve=False)
    return prepare("training", problem)


MEMORY = [
    Memory(
        f"extra memory, training float32 1,{DIM},{MEMORY_LENGTH} N {STATES}",
        __name__,
        {
            "pentad": partial(memory_call, pentad_scan),
            "mambapy": partial(memory_call, mambapy_scan),
        },
        size=(MEMORY_LENGTH,),
        small=(256,),
        warm=(64,),
        target=Target(ALLOWED, 1.0),
        allowed={ALLOWED: allowed_bytes},
    )
]

FAMILY = Family("scan", [*CASES, *MEMORY], PACKAGES, rounds=5, budget=2.5)
