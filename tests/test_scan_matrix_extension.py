# SPDX-License-Identifier: Apache-2.0
"""The raw entries of matrix states: what one argument asks of another, and what each may be.
test_scan_extension.py has what all raw entries share."""

import pytest

pytest.importorskip("torch")

import torch
from scan_raw import (
    BATCH,
    DRAWS,
    ENTRIES,
    GROUPS,
    HEADS,
    LENGTH,
    STATES,
    VALUES,
    changed,
    draw_matrix,
    draw_matrix_packed,
    draw_matrix_update,
    integers,
    longer,
    narrow,
    refuses,
    run,
    sevens,
    with_matrix_gradients,
    with_matrix_results,
)

from pentad import _C

PASSES = {
    "matrix_scan_forward": with_matrix_results,
    "matrix_scan_backward": with_matrix_gradients,
}


# --- What is accepted -------------------------------------------------------------------------


@pytest.mark.parametrize("entry", PASSES)
@pytest.mark.parametrize(
    "draw",
    [
        lambda: draw_matrix(key_decay=True),
        draw_matrix_packed,
        lambda: draw_matrix_packed(key_decay=True),
        lambda: draw_matrix(dtype=torch.bfloat16),
        lambda: draw_matrix(dtype=torch.float16, key_decay=True),
        lambda: draw_matrix() | {"reverse": True, "delta": False},
    ],
    ids=["key_decay", "packed", "packed_key_decay", "bfloat16", "float16", "reverse"],
)
def test_good_arguments_write_every_output(entry, draw):
    args = PASSES[entry](draw())
    for name, output in run(entry, args).items():
        if name == "stored" and args.get("cu_seqlens") is not None:
            continue  # sequences that share a chunk leave some unused
        assert not (output == 7).any(), name


@pytest.mark.parametrize("entry", PASSES)
def test_float64_stores_nothing(entry):
    args = PASSES[entry](draw_matrix(dtype=torch.float64)) | {"stored": None}
    for name, output in run(entry, args).items():
        assert not (output == 7).any(), name
    stored = {"stored": sevens(BATCH, HEADS, STATES, VALUES)}
    refuses(entry, args | stored, ValueError, "stored does not go with float64")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_float32_beside_halves(dtype):
    """They are what is rounded otherwise; so are their gradients."""
    args = with_matrix_results(draw_matrix(dtype=dtype))
    rounded = run("matrix_scan_forward", args)["out"].clone()
    wide = run("matrix_scan_forward", args | {"out": args["out"].float()})["out"]
    assert torch.equal(wide.to(dtype), rounded)
    assert not torch.equal(wide, rounded.float())
    args = with_matrix_gradients(draw_matrix(dtype=dtype))
    own = {n: x.clone() for n, x in run("matrix_scan_backward", args).items()}
    same = run("matrix_scan_backward", args | {"d_out": args["d_out"].float()})
    for name, gradient in same.items():
        assert torch.equal(gradient, own[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key_decay", [False, True])
def test_states_of_other_dtypes(dtype, key_decay):
    args = draw_matrix_update(key_decay=key_decay)
    state = torch.randn(args["state"].shape).to(dtype)
    expected = run("matrix_update", args | {"state": state.double().float()})
    expected = {n: x.clone() for n, x in expected.items()}
    got = run("matrix_update", args | {"state": state})
    assert torch.equal(got["out"], expected["out"])  # taken before the state is rounded
    assert torch.equal(got["state"], expected["state"].to(dtype))


def test_updates_without_rows():
    args = draw_matrix_update(rows=False)
    run("matrix_update", args)
    assert not (args["state"] == 7).any()
    state = sevens(3, HEADS, STATES, VALUES)
    refuses("matrix_update", args | {"state": state}, ValueError, "which needs state_batch_indices")


# --- What is refused --------------------------------------------------------------------------

THREE = {n: sevens(BATCH, LENGTH, 3, STATES) for n in ("q", "k", "dq", "dk")}
CASES = {
    "groups": (THREE, ValueError, "q has 3 groups but v has 4 heads, which are not a multiple"),
    "no_groups": ({n: x[:, :, :0] for n, x in THREE.items()}, ValueError, "q has 0 groups"),
    "groups_of_k": ({"k": THREE["k"]}, ValueError, r"k has shape .* expected \(2, 5, 2, 3\)"),
    "no_keys": ({"q": lambda x: x[..., :0]}, ValueError, "q has shape .* 1 to 1024 keys"),
    "most_keys": (
        {"q": sevens(1).expand(BATCH, LENGTH, GROUPS, 1025)},
        ValueError,
        r"q has shape \(2, 5, 2, 1025\), expected 1 to 1024 keys",
    ),
    "endless": (
        {"v": sevens(1).expand(BATCH, LENGTH, HEADS, 2**40)},
        ValueError,
        "expected 1 to 1024 values",
    ),
    "no_values": ({"v": lambda x: x[..., :0]}, ValueError, "expected 1 to 1024 values"),
    "decay_of_heads": ({"a": sevens(HEADS)}, ValueError, "a has shape .* expected 3 or 4 dim"),
    "decay_of_values": (
        {"a": sevens(BATCH, LENGTH, HEADS, VALUES)},
        ValueError,
        r"a has shape \(2, 5, 4, 2\), expected \(2, 5, 4, 3\)",
    ),
    "half_decay": ({"a": lambda x: x.half()}, TypeError, "a has dtype float16, expected float32"),
    "half_k": ({"k": lambda x: x.half()}, TypeError, "k has dtype float16, expected float32"),
    "wide_w": ({"w": lambda x: x.double()}, TypeError, "w has dtype float64, expected float32"),
    "cu_seqlens": ({"cu_seqlens": integers(0, 5)}, ValueError, "batch of 1, but the batch is 2"),
    "stored_strided": (
        {"stored": torch.zeros(BATCH, HEADS, STATES, 2 * VALUES)[..., ::2]},
        ValueError,
        "stored is not contiguous",
    ),
    "stored_short": ({"stored": narrow(0)}, ValueError, r"stored has shape \(1, 4, 3, 2\)"),
    "stored_long": ({"stored": longer(0)}, ValueError, r"stored has shape \(3, 4, 3, 2\)"),
    "stored_wide": ({"stored": lambda x: x.double()}, TypeError, "stored has dtype float64"),
}


@pytest.mark.parametrize("entry", PASSES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_scan(entry, case):
    changes, error, match = case
    changes = {n: x for n, x in changes.items() if n in ENTRIES[entry][0]}
    refuses(entry, changed(DRAWS[entry](), changes), error, match)


@pytest.mark.parametrize("length", [_C.matrix_chunk, _C.matrix_chunk + 1])
@pytest.mark.parametrize("packed", [False, True])
def test_stored_states_of_every_chunk(length, packed):
    """A packed sequence may begin within a chunk; else each has its own."""
    sizes = [1, 1]
    q, v = torch.randn(1, length, *sizes), torch.randn(1, length, *sizes)
    needed = length // _C.matrix_chunk + 2 if packed else -(-length // _C.matrix_chunk)
    args = {"q": q, "k": q, "v": v, "delta": False, "reverse": False, "scale": 1.0}
    args |= {"out": sevens(*v.shape)}
    if packed:
        args["cu_seqlens"] = integers(0, 3, length)
    for chunks in (needed - 1, needed + 1):
        stored = {"stored": sevens(chunks, 1, *sizes)}
        refuses("matrix_scan_forward", args | stored, ValueError, "stored has shape")
    run("matrix_scan_forward", args | {"stored": sevens(needed, 1, *sizes)})


@pytest.mark.parametrize("name", ["out", "d_out"])
def test_float32_takes_no_half_results(name):
    entry = "matrix_scan_forward" if name == "out" else "matrix_scan_backward"
    args = DRAWS[entry]()
    args[name] = args[name].bfloat16()
    refuses(entry, args, TypeError, f"{name} has dtype bfloat16, expected float32")
    halves = PASSES[entry](draw_matrix(dtype=torch.float16))
    halves[name] = halves[name].bfloat16()
    refuses(entry, halves, TypeError, f"{name} has dtype bfloat16, expected float16, float32")


@pytest.mark.parametrize("other", ["a", "w", "d", "initial"])
def test_gradients_need_their_argument(other):
    args = DRAWS["matrix_scan_backward"]() | {other: None}
    called = {"initial": "initial_state"}.get(other, other)
    refuses("matrix_scan_backward", args, ValueError, f"d{other} needs {called}")


UPDATE_CASES = {
    "groups": ({"q": sevens(BATCH, 3, STATES)}, ValueError, "q has 3 groups but v has 4 heads"),
    "no_groups": ({"q": sevens(BATCH, 0, STATES)}, ValueError, "q has 0 groups"),
    "keys": ({"q": sevens(1).expand(BATCH, GROUPS, 1025)}, ValueError, "expected 1 to 1024 keys"),
    "no_values": ({"v": sevens(BATCH, HEADS, 0)}, ValueError, "expected 1 to 1024 values"),
    "decay": ({"a": sevens(1, 1, 1, HEADS)}, ValueError, "a has shape .* expected 1 to 3 dim"),
    "decay_of_heads": ({"a": sevens(HEADS + 1)}, ValueError, "a has shape"),
    "transposed": (
        {"state": sevens(3, HEADS, VALUES, STATES)},
        ValueError,
        r"state has shape \(3, 4, 2, 3\), expected \(3, 4, 3, 2\)",
    ),
    "wide_state": ({"state": lambda x: x.double()}, TypeError, "state has dtype float64"),
    "wide_out": ({"out": lambda x: x.double()}, TypeError, "out has dtype float64"),
}


@pytest.mark.parametrize("case", UPDATE_CASES.values(), ids=UPDATE_CASES.keys())
def test_bad_update(case):
    changes, error, match = case
    refuses("matrix_update", changed(draw_matrix_update(), changes), error, match)
