# SPDX-License-Identifier: Apache-2.0
"""Every function of `pentad.scan` with its options, as (function, arguments) of a dtype."""

import torch

import pentad

S = pentad.scan
B, D, L, N, G, W = 2, 4, 5, 3, 2, 3


def grown(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def complex_of(dtype):
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def complex_grown(*shape, dtype):
    return torch.randn(shape, dtype=complex_of(dtype)).requires_grad_()


def scan(**given):
    """`selective_scan` with the arguments of `given`, each a shape or a function of the dtype."""

    def case(t):
        arguments = {
            "u": grown(B, D, L, dtype=t),
            "delta": grown(B, D, L, dtype=t),
            "A": (-torch.rand(D, N, dtype=wide_of(t))).requires_grad_(),
            "B": grown(B, N, L, dtype=t),
            "C": grown(B, N, L, dtype=t),
        }
        for name, value in given.items():
            if isinstance(value, tuple):
                arguments[name] = grown(*value, dtype=t)
            else:
                arguments[name] = value(t) if callable(value) else value
        return S.selective_scan, arguments

    return case


def small(*shape):
    return lambda t: grown(*shape, dtype=wide_of(t))


def pairs(*shape):
    return lambda t: complex_grown(*shape, dtype=t)


def packed(t):
    return torch.tensor([0, 3, 3, 5], dtype=torch.int32)


def one_row(**given):
    like_u, like_b = (1, D, L), (1, N, L)
    return scan(u=like_u, delta=like_u, B=like_b, C=like_b, cu_seqlens=packed, **given)


def decay(t):
    return (0.1j - torch.rand(D, N, dtype=wide_of(t))).requires_grad_()


def recurrence(a, x=(B, D, L), h0=None, make=grown, **options):
    def case(t):
        arguments = {"a": make(*a, dtype=t), "x": make(*x, dtype=t), **options}
        if h0 is not None:
            arguments["h0"] = make(*h0, dtype=t)
        return S.linear_recurrence, arguments

    return case


def conv(width=W, x=(B, D, L), bias=True, initial=None, **options):
    def case(t):
        arguments = {"x": grown(*x, dtype=t), "weight": grown(D, width, dtype=t), **options}
        if bias:
            arguments["bias"] = grown(D, dtype=wide_of(t))
        if initial is not None:
            arguments["initial_states"] = grown(*initial, dtype=t)
        return S.causal_conv1d, arguments

    return case


def matrix(**given):
    def case(t):
        _, arguments = scan(**given)(t)
        if "contributions" not in given:
            arguments.pop("u")
        arguments.pop("contributions", None)
        return S.attention_matrix, arguments

    return case


def state_step(state, before, **arguments):
    """A step on a copy of the state, which is a result too."""
    state = state * 1
    out = S.selective_state_update(state, before, **arguments)
    return out, state


def conv_step(conv_state, x, **arguments):
    conv_state = conv_state * 1
    return S.causal_conv1d_update(x, conv_state, **arguments), conv_state


ROWS = torch.tensor([2, -1])


def step(heads=(D,), groups=(), state_type=wide_of, **options):
    def case(t):
        rows = 3 if "state_batch_indices" in options else B
        small = wide_of(t)
        return state_step, {
            "state": grown(rows, *heads, N, dtype=state_type(t)),
            "before": grown(B, *heads, dtype=t),
            "dt": grown(B, *heads, dtype=t),
            "A": (-torch.rand(*heads, N, dtype=small)).requires_grad_(),
            "B": grown(B, *groups, N, dtype=t),
            "C": grown(B, *groups, N, dtype=t),
            "D": grown(*heads, dtype=small),
            "z": grown(B, *heads, dtype=t),
            "dt_bias": grown(*heads, dtype=small),
            "dt_softplus": True,
            **options,
        }

    return case


def conv_steps(x=(B, D), size=W, **options):
    def case(t):
        rows = 3 if "conv_state_indices" in options else B
        return conv_step, {
            "conv_state": grown(rows, D, size, dtype=t),
            "x": grown(*x, dtype=t),
            "weight": grown(D, W, dtype=t),
            "bias": grown(D, dtype=t),
            "activation": "silu",
            **options,
        }

    return case


SEQ_IDX = torch.tensor([[0, 0, 1, 1, -1], [0, 1, -1, 1, 2]], dtype=torch.int32)
CASES = {
    "scan": scan(),
    "scan groups": scan(B=(B, G, N, L), C=(B, G, N, L)),
    "scan all": scan(
        D=small(D), z=(B, D, L), delta_bias=small(D), delta_softplus=True,
        initial_state=small(B, D, N), return_last_state=True,
    ),
    "scan reverse": scan(reverse=True, initial_state=small(B, D, N), return_last_state=True),
    "scan constant B": scan(B=small(D, N), z=(B, D, L)),
    "scan constants": scan(B=small(D, N), C=small(D, N), D=small(D)),
    "scan packed": one_row(initial_state=small(3, D, N), return_last_state=True),
    "scan complex": scan(A=decay, B=(B, N, 2 * L), C=(B, N, 2 * L)),
    "scan complex matrices": scan(A=decay, B=pairs(B, G, N, L), C=pairs(B, G, N, L), D=small(D)),
    "scan complex constants": scan(A=decay, B=pairs(D, N), C=small(D, N), return_last_state=True),
    "recurrence": recurrence((B, D, L)),
    "recurrence all": recurrence((D, L), h0=(D,), reverse=True),
    "recurrence constant": recurrence((D, 1), h0=(B, D)),
    "recurrence number": recurrence((), x=(L,), h0=()),
    "recurrence log": recurrence((B, D, L), log_space=True, h0=(B, 1)),
    "recurrence tokens": recurrence((B, L, D), x=(B, L, D), dim=1, h0=(B, D)),
    "recurrence heads": recurrence((2, 1, 1), x=(B, 2, L, D), dim=2, h0=(2, D)),
    "recurrence complex": recurrence((D, 1), h0=(D,), make=complex_grown, dim=-1),
    "conv": conv(bias=False),
    "conv silu": conv(activation="silu"),
    "conv states": conv(initial=(B, D, W - 1), return_final_states=True, activation="swish"),
    "conv width 1": conv(width=1, initial=(B, D, 0), return_final_states=True),
    "conv seq_idx": conv(seq_idx=SEQ_IDX, activation="silu"),
    "conv packed": conv(
        x=(1, D, L), cu_seqlens=torch.tensor([0, 3, 3, 5]), initial=(3, D, W - 1),
        return_final_states=True,
    ),
    "step": step(),
    "step heads": step(heads=(2, 2), groups=(2,)),
    "step groups": step(groups=(2,), state_batch_indices=ROWS),
    "conv step": conv_steps(),
    "conv steps": conv_steps(x=(B, D, 4), conv_state_indices=ROWS),
    "conv ring": conv_steps(x=(B, D, 2), size=4, cache_seqlens=torch.tensor([0, 7])),
    "matrix": matrix(delta_softplus=True),
    "matrix all": matrix(
        contributions=True, D=small(D), z=(B, D, L), reduce=None, reverse=True, delta_bias=small(D)
    ),
    "matrix norm": matrix(contributions=True, B=small(D, N), reduce="norm"),
}  # fmt: skip
HALF = (torch.bfloat16, torch.float16)


def total(result):
    """A number whose gradient goes through all results."""
    parts = result if isinstance(result, tuple) else (result,)
    parts = [torch.view_as_real(p) if p.is_complex() else p for p in parts]
    return sum(((n + 2) * part).sin().sum() for n, part in enumerate(parts))


def leaves(arguments):
    return {n: t for n, t in arguments.items() if torch.is_tensor(t) and t.requires_grad}


def value_and_gradients(function, arguments):
    loss = total(function(**arguments))
    return loss, *torch.autograd.grad(loss, list(leaves(arguments).values()))


def made(case, dtype=torch.float32, grad=True):
    function, arguments = CASES[case](dtype)
    if not grad:
        arguments = {n: t.detach() if torch.is_tensor(t) else t for n, t in arguments.items()}
    return function, arguments


def is_number(value):
    return torch.is_tensor(value) and (value.is_floating_point() or value.is_complex())
