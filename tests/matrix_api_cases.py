# SPDX-License-Identifier: Apache-2.0
"""The functions whose state is a matrix with their options, as (function, arguments) of a dtype."""

import torch
from matrix_cases import (
    SSD_ALL,
    delta_problem,
    is_float,
    linear_problem,
    ssd_problem,
    update_problem,
)

from pentad import scan

B, L, H, P, N, G = 2, 5, 4, 3, 2, 2


def attention_step(state, **given):
    """A step on a copy of the state, which is a result too."""
    state = state * 1
    out = scan.linear_attention_update(state, **given)
    return out, state


def delta_step(state, **given):
    state = state * 1
    return scan.delta_rule_update(state, **given), state


def case(make, *names):
    function = {ssd_problem: scan.ssd, linear_problem: scan.linear_attention}
    return (
        function.get(make, scan.delta_rule),
        lambda t: make(t, names, B, L, H, P, N, G).inputs,
    )


def step(op, *names, **options):
    function = attention_step if op == "linear_attention" else delta_step
    return function, lambda t: update_problem(op, t, names, B, H, P, N, G, **options).inputs


ROWS = [2, -1]
CASES = {
    "ssd": case(ssd_problem, "no_last"),
    "ssd all": case(ssd_problem, "dt_float", "dt_limit", "chunk_size", *SSD_ALL),
    "ssd seq_idx": case(ssd_problem, "seq_idx", "D_per_value", "reverse"),
    "ssd packed": case(ssd_problem, "packed", "initial"),
    "ssd sums": case(ssd_problem, "not_causal", "D", "z", "grouped"),
    "attention": case(linear_problem, "no_last"),
    "attention heads": case(
        linear_problem, "decay_head", "elu", "normalize", "initial", "scale", "prefix"
    ),
    "attention keys": case(
        linear_problem, "decay_key_step", "log_space", "reverse", "grouped", "initial"
    ),
    "attention packed": case(linear_problem, "packed", "decay_step"),
    "attention sums": case(linear_problem, "not_causal", "prefix", "taylor", "normalize"),
    "delta": case(delta_problem, "initial", "no_last"),
    "delta keys": case(delta_problem, "decay_key", "grouped", "initial", "scale"),
    "delta packed": case(delta_problem, "packed", "decay_step", "reverse", "initial"),
    "attention step": step("linear_attention", "decay_step"),
    "attention step rows": step("linear_attention", "decay_key", "normalize", "elu", rows=ROWS),
    "delta step": step("delta_rule"),
    "delta step rows": step("delta_rule", "decay_key_step", "log_space", "grouped", rows=ROWS),
}
NAMES = {
    scan.ssd: "ssd",
    scan.linear_attention: "linear_attention",
    scan.delta_rule: "delta_rule",
    attention_step: "linear_attention_update",
    delta_step: "delta_rule_update",
}


def made(case, dtype=torch.float32, grad=True):
    function, make = CASES[case]
    arguments = {
        n: t.detach().requires_grad_(grad) if is_float(t) else t for n, t in make(dtype).items()
    }
    return function, arguments


def parts_of(result):
    return result if isinstance(result, tuple) else (result,)


def first_of(arguments):
    return next(n for n in ("v", "x") if n in arguments)
