# SPDX-License-Identifier: Apache-2.0
"""Arguments for the raw entries of scans, by name."""

import numpy as np
import pytest
import torch

from pentad import _C

SCAN = [
    "u",
    "delta",
    "A",
    "B",
    "C",
    "D",
    "z",
    "delta_bias",
    "initial",
    "cu_seqlens",
    "softplus",
    "reverse",
    "complex",
]
MATRIX = ["q", "k", "v", "a", "w", "d", "initial", "cu_seqlens", "delta", "reverse", "scale"]
CONV = ["x", "weight", "bias", "initial", "seq_idx", "cu_seqlens", "silu"]
# Of each entry: its arguments in order, and those that it writes.
ENTRIES = {
    "selective_scan_forward": ([*SCAN, "out", "last", "stored"], ["out", "last", "stored"]),
    "selective_scan_backward": (
        ["d_out", "d_last", "stored", *SCAN]
        + (written := ["du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dinitial"]),
        written,
    ),
    "selective_state_update": (
        ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "softplus", "rows", "out"],
        ["state", "out"],
    ),
    "few_rows_linear": (["x", "weight", "bias", "out"], ["out"]),
    "matrix_scan_forward": ([*MATRIX, "out", "last", "stored"], ["out", "last", "stored"]),
    "matrix_scan_backward": (
        ["d_out", "d_last", "stored", *MATRIX]
        + (matrix_written := ["dq", "dk", "dv", "da", "dw", "dd", "dinitial"]),
        matrix_written,
    ),
    "matrix_update": (
        ["state", "q", "k", "v", "a", "w", "d", "delta", "scale", "rows", "out"],
        ["state", "out"],
    ),
    "recurrence_forward": (["a", "x", "h0", "h", "log_space", "reverse", "complex"], ["h"]),
    "recurrence_backward": (
        ["a", "h0", "h", "dh", "da", "dx", "dh0", "log_space", "reverse", "complex"],
        ["da", "dx", "dh0"],
    ),
    "causal_conv_forward": ([*CONV, "out", "final"], ["out", "final"]),
    "causal_conv_backward": (
        ["d_out", "d_final", *CONV, "dx", "dweight", "dbias", "dinitial"],
        ["dx", "dweight", "dbias", "dinitial"],
    ),
    "causal_conv_update": (
        ["x", "state", "weight", "bias", "silu", "rows", "positions", "out"],
        ["state", "out"],
    ),
}
BATCH, DIM, LENGTH, STATES, GROUPS, WIDTH = 2, 6, 5, 3, 2, 4
HEADS, VALUES = 4, 2  # of matrix states, beside STATES keys


def sevens(*shape, dtype=torch.float32):
    return torch.full(shape, 7.0, dtype=dtype)


def integers(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def draw_scan(batch=BATCH, sequences=None, dtype=torch.float32):
    sequences = batch if sequences is None else sequences
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    like_u, varying = (batch, DIM, LENGTH), (batch, GROUPS, STATES, LENGTH)
    return {
        "u": torch.randn(like_u).to(dtype),
        "delta": torch.rand(like_u).to(dtype),
        "A": -torch.rand(DIM, STATES, dtype=wide),
        "B": torch.randn(varying).to(dtype),
        "C": torch.randn(varying).to(dtype),
        "D": torch.randn(DIM, dtype=wide),
        "z": torch.randn(like_u).to(dtype),
        "delta_bias": torch.randn(DIM, dtype=wide),
        "initial": torch.randn(sequences, DIM, STATES, dtype=wide),
        "softplus": True,
        "reverse": False,
        "complex": False,
    }


def with_results(args):
    u, initial = args["u"], args["initial"]
    packed = args.get("cu_seqlens") is not None
    assert _C.scan_chunk > LENGTH
    chunks = initial.shape[0] if packed else u.shape[0]
    return args | {
        "out": sevens(*u.shape, dtype=u.dtype),
        "last": sevens(*initial.shape, dtype=initial.dtype),
        "stored": sevens(chunks, STATES, 2 if args["complex"] else 1, DIM),
    }


def with_gradients(args):
    args = with_results(args)
    if args["u"].dtype == torch.float64:
        args["stored"] = None
    _C.selective_scan_forward(*(args.get(n) for n in ENTRIES["selective_scan_forward"][0]))
    out, last = args.pop("out"), args.pop("last")
    wide = last.dtype
    like_u = dict.fromkeys(("u", "delta", "z"), out.dtype)
    return args | {
        "d_out": torch.randn_like(out),
        "d_last": torch.randn_like(last),
        **{
            "d" + n: sevens(*args[n].shape, dtype=like_u.get(n, wide))
            for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial")
            if args.get(n) is not None
        },
    }


def draw_packed():
    return draw_scan(1, 3) | {"cu_seqlens": integers(0, 2, 2, LENGTH)}


def draw_complex():
    args = draw_scan() | {"complex": True}
    for n in ("A", "B", "C", "initial"):
        args[n] = torch.stack([args[n], torch.zeros_like(args[n])], -1)
    return args


def draw_constant():
    args = draw_scan()
    return args | {"B": torch.randn(DIM, STATES), "C": torch.randn(DIM, STATES)}


def draw_state_update(rows=True):
    heads, head_dim = 4, 3
    args = {
        "state": sevens(3 if rows else BATCH, heads, head_dim, STATES),
        "x": torch.randn(BATCH, heads, head_dim),
        "dt": torch.rand(BATCH, heads, head_dim),
        "A": -torch.rand(heads, head_dim, STATES),
        "B": torch.randn(BATCH, GROUPS, STATES),
        "C": torch.randn(BATCH, GROUPS, STATES),
        "D": torch.randn(heads, head_dim),
        "z": torch.randn(BATCH, heads, head_dim),
        "dt_bias": torch.randn(heads, head_dim),
        "softplus": True,
        "rows": integers(2, 0) if rows else None,
        "out": sevens(BATCH, heads, head_dim),
    }
    return args


def draw_matrix(batch=BATCH, sequences=None, dtype=torch.float32, key_decay=False):
    sequences = batch if sequences is None else sequences
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    like_w = (batch, LENGTH, HEADS)
    return {
        "q": torch.randn(batch, LENGTH, GROUPS, STATES).to(dtype),
        "k": torch.randn(batch, LENGTH, GROUPS, STATES).to(dtype),
        "v": torch.randn(batch, LENGTH, HEADS, VALUES).to(dtype),
        "a": torch.rand(*like_w, *([STATES] if key_decay else []), dtype=wide),
        "w": torch.rand(like_w, dtype=wide),
        "d": torch.randn(HEADS, VALUES, dtype=wide),
        "initial": torch.randn(sequences, HEADS, STATES, VALUES, dtype=wide),
        "delta": True,
        "reverse": False,
        "scale": 0.5,
    }


def draw_matrix_packed(key_decay=False):
    return draw_matrix(1, 3, key_decay=key_decay) | {"cu_seqlens": integers(0, 2, 2, LENGTH)}


def with_matrix_results(args):
    v, initial = args["v"], args["initial"]
    assert _C.matrix_chunk > LENGTH  # one chunk of each sequence
    return args | {
        "out": sevens(*v.shape, dtype=v.dtype),
        "last": sevens(*initial.shape, dtype=initial.dtype),
        "stored": sevens(*initial.shape),
    }


def with_matrix_gradients(args):
    args = with_matrix_results(args)
    if args["v"].dtype == torch.float64:
        args["stored"] = None
    _C.matrix_scan_forward(*(args.get(n) for n in ENTRIES["matrix_scan_forward"][0]))
    out, last = args.pop("out"), args.pop("last")
    return args | {
        "d_out": torch.randn_like(out),
        "d_last": torch.randn_like(last),
        **{"d" + n: torch.full_like(args[n], 7) for n in ("q", "k", "v", "a", "w", "d", "initial")},
    }


def draw_matrix_update(rows=True, key_decay=False):
    like_q, like_w = (BATCH, GROUPS, STATES), (BATCH, HEADS)
    return {
        "state": sevens(3 if rows else BATCH, HEADS, STATES, VALUES),
        "q": torch.randn(like_q),
        "k": torch.randn(like_q),
        "v": torch.randn(BATCH, HEADS, VALUES),
        "a": torch.rand(*like_w, *([STATES] if key_decay else [])),
        "w": torch.rand(like_w),
        "d": torch.randn(HEADS, VALUES),
        "delta": True,
        "scale": 0.5,
        "rows": integers(2, 0) if rows else None,
        "out": sevens(BATCH, HEADS, VALUES),
    }


def draw_few_rows():
    return {
        "x": torch.randn(BATCH, DIM),
        "weight": torch.randn(LENGTH, DIM),
        "bias": torch.randn(LENGTH),
        "out": sevens(BATCH, LENGTH),
    }


def draw_recurrence():
    return {
        "a": torch.rand(2, 4, LENGTH),
        "x": torch.randn(2, 4, LENGTH),
        "h0": torch.randn(2, 4),
        "log_space": False,
        "reverse": False,
        "complex": False,
        "h": sevens(2, 4, LENGTH),
    }


def draw_recurrence_backward():
    args = draw_recurrence()
    del args["x"]
    return args | {
        "h": torch.randn(2, 4, LENGTH),
        "dh": torch.randn(2, 4, LENGTH),
        "da": sevens(2, 4, LENGTH),
        "dx": sevens(2, 4, LENGTH),
        "dh0": sevens(2, 4),
    }


def draw_conv(batch=BATCH, sequences=None):
    return {
        "x": torch.randn(batch, DIM, LENGTH),
        "weight": torch.randn(DIM, WIDTH),
        "bias": torch.randn(DIM),
        "initial": torch.randn(sequences or batch, DIM, WIDTH - 1),
        "silu": True,
        "out": sevens(batch, DIM, LENGTH),
        "final": sevens(sequences or batch, DIM, WIDTH - 1),
    }


def draw_conv_backward(args=None):
    args = args or draw_conv()
    out, final = args.pop("out"), args.pop("final", None)
    args |= {"d_out": torch.randn_like(out), "dx": torch.full_like(out, 7)}
    if final is not None:
        args["d_final"] = torch.randn_like(final)
    given = [n for n in ("weight", "bias", "initial") if args.get(n) is not None]
    return args | {"d" + n: torch.full_like(args[n], 7) for n in given}


def draw_conv_indexed():
    args = draw_conv()
    del args["initial"], args["final"]
    return args | {"seq_idx": torch.zeros(BATCH, LENGTH, dtype=torch.int32)}


def draw_conv_packed():
    return draw_conv(1, 3) | {"cu_seqlens": integers(0, 2, 2, LENGTH)}


def draw_conv_update():
    return {
        "x": torch.randn(BATCH, DIM, 2),
        "state": sevens(4, DIM, WIDTH),
        "weight": torch.randn(DIM, WIDTH),
        "bias": torch.randn(DIM),
        "silu": True,
        "rows": integers(3, 1),
        "positions": integers(9, 0, dtype=torch.int64),
        "out": sevens(BATCH, DIM, 2),
    }


DRAWS = {
    "selective_scan_forward": lambda: with_results(draw_scan()),
    "selective_scan_backward": lambda: with_gradients(draw_scan()),
    "selective_state_update": draw_state_update,
    "few_rows_linear": draw_few_rows,
    "matrix_scan_forward": lambda: with_matrix_results(draw_matrix()),
    "matrix_scan_backward": lambda: with_matrix_gradients(draw_matrix()),
    "matrix_update": draw_matrix_update,
    "recurrence_forward": draw_recurrence,
    "recurrence_backward": draw_recurrence_backward,
    "causal_conv_forward": draw_conv,
    "causal_conv_backward": draw_conv_backward,
    "causal_conv_update": draw_conv_update,
}


def run(entry, args):
    names, written = ENTRIES[entry]
    unknown = set(args) - set(names)
    assert not unknown, unknown
    getattr(_C, entry)(*(args.get(n) for n in names))
    return {n: args[n] for n in written if args.get(n) is not None}


# What a message calls an argument, where that is not the name above.
PUBLIC = {
    "initial": "initial_state",
    "last": "last_state",
    "final": "final_states",
    "rows": "state_batch_indices",
    "positions": "cache_seqlens",
}


def copy_of(x):
    """What an array holds, as bytes; None for anything else."""
    if torch.is_tensor(x) and x.device.type == "cpu":
        x = x.contiguous().view(torch.uint8).numpy()
    return x.tobytes() if isinstance(x, np.ndarray) else None


def refuses(entry, args, error, match):
    """The entry raises, and every output still holds what it held."""
    before = {n: copy_of(args.get(n)) for n in ENTRIES[entry][1]}
    with pytest.raises(error, match=match):
        run(entry, args)
    for name, values in before.items():
        assert copy_of(args.get(name)) == values, name


def changed(args, changes):
    return args | {n: f(args.get(n)) if callable(f) else f for n, f in changes.items()}


def narrow(dim):
    return lambda x: x.narrow(dim, 0, x.shape[dim] - 1).contiguous()


def longer(dim):
    return lambda x: torch.cat([x, x.narrow(dim, 0, 1)], dim)


def public(entry, name):
    if entry.startswith("causal_conv"):
        names = {"initial": "initial_states", "state": "conv_state", "rows": "conv_state_indices"}
        return names.get(name, PUBLIC.get(name, name))
    return PUBLIC.get(name, name)
