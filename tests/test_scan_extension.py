# SPDX-License-Identifier: Apache-2.0
"""The raw entries of scans: bad input raises before anything is written."""

import pytest

pytest.importorskip("torch")

import torch
from cases import arguments_of
from scan_raw import (
    BATCH,
    DIM,
    DRAWS,
    ENTRIES,
    LENGTH,
    STATES,
    WIDTH,
    changed,
    draw_complex,
    draw_constant,
    draw_conv_backward,
    draw_conv_indexed,
    draw_conv_packed,
    draw_conv_update,
    draw_few_rows,
    draw_matrix_packed,
    draw_packed,
    draw_recurrence_backward,
    draw_scan,
    draw_state_update,
    integers,
    longer,
    narrow,
    public,
    refuses,
    run,
    sevens,
    with_gradients,
    with_matrix_gradients,
    with_matrix_results,
    with_results,
)

from pentad import _C


@pytest.mark.parametrize("entry", ENTRIES)
def test_argument_names(entry):
    """The lists above are the module's own, so that a bad argument is the one that is meant."""
    assert len(arguments_of(getattr(_C, entry))) == len(ENTRIES[entry][0])


@pytest.mark.parametrize(
    ("entry", "draw"),
    [
        *DRAWS.items(),
        *[
            ("selective_scan_" + pass_, lambda d=draw, f=complete: f(d()))
            for draw in (draw_packed, draw_complex, draw_constant)
            for pass_, complete in (("forward", with_results), ("backward", with_gradients))
        ],
        ("selective_scan_backward", lambda: with_gradients(draw_scan(dtype=torch.float64))),
        ("selective_scan_backward", lambda: with_gradients(draw_scan(dtype=torch.bfloat16))),
        ("selective_state_update", lambda: draw_state_update(False)),
        ("causal_conv_forward", draw_conv_indexed),
        ("causal_conv_backward", lambda: draw_conv_backward(draw_conv_indexed())),
        ("causal_conv_forward", draw_conv_packed),
        ("causal_conv_backward", lambda: draw_conv_backward(draw_conv_packed())),
    ],
)
def test_good_arguments_write_every_output(entry, draw):
    args = draw()
    for name, output in run(entry, args).items():
        if name == "state":
            continue  # the rows of the batch alone
        if name == "stored" and args.get("cu_seqlens") is not None:
            continue  # sequences that share a chunk leave some unused
        assert not (output == 7).any(), name


def test_one_head_and_one_step_need_no_dimension():
    args = draw_state_update()
    one = {
        n: x[:, :1] if n in ("state", "x", "dt", "z", "B", "C", "out") else x
        for n, x in args.items()
    }
    one |= {n: args[n][:1] for n in ("A", "D", "dt_bias")}
    flat = {
        n: x.squeeze(0 if n in ("A", "D", "dt_bias") else 1).clone()
        if torch.is_tensor(x) and n != "rows"
        else x
        for n, x in one.items()
    }
    expected, got = run("selective_state_update", one), run("selective_state_update", flat)
    for name in expected:
        assert torch.equal(expected[name].squeeze(1), got[name])

    args = draw_conv_update()
    one = args | {n: args[n][..., :1] for n in ("x", "out")} | {"state": args["state"].clone()}
    flat = args | {n: args[n][..., 0].clone() for n in ("x", "out")}
    expected, got = run("causal_conv_update", one), run("causal_conv_update", flat)
    assert torch.equal(expected["out"][..., 0], got["out"])
    assert torch.equal(expected["state"], got["state"])


# --- Every array of every entry ---------------------------------------------------------------

ARRAYS = [
    (entry, name)
    for entry, draw in DRAWS.items()
    for name, x in draw().items()
    if torch.is_tensor(x)
]
OUTPUTS = [(entry, name) for entry, name in ARRAYS if name in ENTRIES[entry][1]]
OPTIONAL = {"D", "z", "delta_bias", "initial", "dt_bias", "h0", "bias", "rows", "positions"} | {
    "last",
    "final",
    "d_last",
    "d_final",
}


FREE = {("causal_conv_update", "state", 2), ("causal_conv_update", "weight", 1)}


@pytest.mark.parametrize(("entry", "name"), ARRAYS)
def test_dtypes_ranks_and_shapes(entry, name):
    draw, called = DRAWS[entry], public(entry, name)
    x = draw()[name]
    wrong = x.to(torch.float32 if name in ("rows", "positions") else torch.int8)
    refuses(
        entry, draw() | {name: wrong}, TypeError, rf"\] {called} has dtype {str(wrong.dtype)[6:]}"
    )
    wrong = x.double() if x.is_floating_point() else x.to(torch.int16)
    refuses(entry, draw() | {name: wrong}, TypeError, r"^\[.* has dtype ")
    refuses(entry, draw() | {name: x[None]}, ValueError, rf"\] {called} has shape \(1, ")
    refuses(entry, draw() | {name: [1.0]}, TypeError, "not list")
    for dim in range(x.ndim):
        for change in (narrow(dim), longer(dim)):
            args = draw()
            args[name] = change(args[name])
            # A cache may have rows of no sequence, and more than the convolution needs.
            if (name, dim) == ("state", 0) and args[name].shape[0] > 3:
                continue
            if (entry, name, dim) in FREE:
                continue
            refuses(entry, args, ValueError, r"^\[")


@pytest.mark.parametrize(("entry", "name"), ARRAYS)
def test_required_arrays(entry, name):
    optional = name in OPTIONAL or (entry.endswith("backward") and name[0] == "d")
    optional |= entry.startswith("matrix") and name in ("a", "w", "d")
    if name in ("d_out", "dh", "du", "delta", "dt"):
        optional = name == "d_out" and entry in ("selective_scan_backward", "matrix_scan_backward")
    args = DRAWS[entry]() | {name: None}
    if entry in ("selective_scan_forward", "matrix_scan_forward") and name == "stored":
        optional = True
    # A gradient goes with its argument, and caches of more rows than the batch with their rows.
    if name in ("D", "z", "delta_bias", "initial", "bias", "h0", "a", "w", "d"):
        args.pop("d" + name, None)
    if name == "rows":
        refuses(entry, args, ValueError, "which needs")
    elif optional:
        for n, output in run(entry, args).items():
            assert n in ("state", "stored") or not (output == 7).any(), n
    else:
        refuses(entry, args, (TypeError, ValueError), "incompatible|missing")


@pytest.mark.parametrize(("entry", "name"), OUTPUTS)
def test_outputs_that_cannot_be_written(entry, name):
    args, called = DRAWS[entry](), public(entry, name)
    x = args[name]
    shared = args | {name: x.narrow(-1, 0, 1).expand(x.shape)}
    refuses(entry, shared, ValueError, f"{called} has elements that share memory")
    fixed = x.numpy().copy()
    fixed.flags.writeable = False
    refuses(entry, args | {name: fixed}, ValueError, f"{called} is read-only")


@pytest.mark.parametrize(("entry", "name"), OUTPUTS)
def test_outputs_that_share_memory(entry, name):
    """With each other array, by their first address."""
    for other, x in DRAWS[entry]().items():
        if not torch.is_tensor(x) or other == name or x.dtype != torch.float32:
            continue
        args = DRAWS[entry]()
        memory = torch.randn(max(args[other].numel(), args[name].numel()) + 1)
        for n in (other, name):
            args[n] = memory[: args[n].numel()].view(args[n].shape)
        if other in ("dt", "delta"):
            memory.abs_()
        refuses(
            entry,
            args,
            ValueError,
            f"shares memory with ({public(entry, other)}|{public(entry, name)})",
        )


# --- What one argument asks of another --------------------------------------------------------

FOUR_GROUPS = sevens(BATCH, 4, STATES, LENGTH)
SCAN_CASES = {
    "groups": ({"B": FOUR_GROUPS, "C": FOUR_GROUPS}, ValueError, "B has 4 groups but D = 6"),
    "no_groups": ({"B": FOUR_GROUPS[:, :0], "C": FOUR_GROUPS[:, :0]}, ValueError, "B has 0 groups"),
    "groups_differ": ({"C": sevens(BATCH, 3, STATES, LENGTH)}, ValueError, "C has shape"),
    "groups_of_C_alone": (
        {"B": sevens(DIM, STATES), "dB": sevens(DIM, STATES), "C": FOUR_GROUPS},
        ValueError,
        "C has 4 groups",
    ),
    "three_dimensions": ({"B": lambda x: x[:, 0]}, ValueError, "B has shape .* expected 2 or 4"),
    "no_states": ({"A": sevens(DIM, 0)}, ValueError, "expected 1 to 65536 states"),
    "endless": (
        {"A": sevens(1, 1).expand(DIM, 2**40), "B": sevens(1, 1).expand(DIM, 2**40)},
        ValueError,
        "expected 1 to 65536 states",
    ),
    "half": ({"delta": lambda x: x.half()}, TypeError, "delta has dtype float16, expected float32"),
    "wide_B": ({"B": lambda x: x.bfloat16()}, TypeError, "B has dtype bfloat16, expected float32"),
    "complex_u": ({"complex": True}, ValueError, "A has shape .* expected 3 dimensions"),
    "cu_seqlens": ({"cu_seqlens": integers(0, 5)}, ValueError, "batch of 1, but the batch is 2"),
    "stored_strided": (
        {"stored": torch.randn(BATCH, STATES, 1, 2 * DIM)[..., ::2]},
        ValueError,
        "stored is not contiguous",
    ),
}
PACKED_CASES = {
    "float": (lambda x: x.float(), TypeError, "cu_seqlens has dtype"),
    "matrix": (lambda x: x[None], ValueError, "cu_seqlens has shape"),
    "empty": (lambda x: x[:0], ValueError, "does not begin with 0"),
    "first": (integers(1, 2, 2, LENGTH), ValueError, "does not begin with 0"),
    "descends": (integers(0, 4, 2, LENGTH), ValueError, "descends from 4 to 2"),
    "negative": (integers(0, -1, 2, LENGTH), ValueError, "descends from 0 to -1"),
    "short": (integers(0, 2, 2, 4), ValueError, "ends with 4, but there are 5"),
    "overrun": (integers(0, 2, 2, 6), ValueError, "ends with 6, but there are 5"),
    "wraps": (integers(0, 2**62, 2, 5, dtype=torch.int64), ValueError, "descends from 461168"),
    "fewer": (integers(0, 2, LENGTH), ValueError, "has shape"),
}


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("case", SCAN_CASES.values(), ids=SCAN_CASES.keys())
def test_bad_scan(pass_, case):
    changes, error, match = case
    entry = "selective_scan_" + pass_
    if pass_ == "forward":
        changes = {n: x for n, x in changes.items() if n != "dB"}
    refuses(entry, changed(DRAWS[entry](), changes), error, match)


@pytest.mark.parametrize("case", PACKED_CASES.values(), ids=PACKED_CASES.keys())
def test_bad_cu_seqlens(case):
    change, error, match = case
    for entry, args in (
        ("selective_scan_forward", with_results(draw_packed())),
        ("selective_scan_backward", with_gradients(draw_packed())),
        ("causal_conv_forward", draw_conv_packed()),
        ("causal_conv_backward", draw_conv_backward(draw_conv_packed())),
        ("matrix_scan_forward", with_matrix_results(draw_matrix_packed())),
        ("matrix_scan_backward", with_matrix_gradients(draw_matrix_packed())),
    ):
        refuses(entry, changed(args, {"cu_seqlens": change}), error, match)


def test_float64_stores_nothing():
    args = draw_scan(dtype=torch.float64)
    refuses("selective_scan_forward", with_results(args), ValueError, "stored does not go with")
    refuses(
        "selective_scan_backward",
        with_gradients(args) | {"stored": sevens(BATCH, STATES, 1, DIM)},
        ValueError,
        "stored does not go with float64",
    )


@pytest.mark.parametrize(
    ("entry", "name", "other"),
    [
        ("selective_scan_backward", "dD", "D"),
        ("selective_scan_backward", "dz", "z"),
        ("selective_scan_backward", "ddelta_bias", "delta_bias"),
        ("selective_scan_backward", "dinitial", "initial"),
        ("recurrence_backward", "dh0", "h0"),
        ("causal_conv_backward", "dbias", "bias"),
        ("causal_conv_backward", "dinitial", "initial"),
    ],
)
def test_gradients_need_their_argument(entry, name, other):
    args = DRAWS[entry]() | {other: None}
    refuses(entry, args, ValueError, f"{name} needs {public(entry, other)}")


UPDATES = ["selective_state_update", "causal_conv_update", "matrix_update"]
ROWS = {
    "beyond": ((4, 0), "holds 4, but there are [34] rows"),
    "huge": ((2**31 - 1, 0), "holds 2147483647"),
    "twice": ((1, 1), "has row 1 twice"),
    "count": ((0, 1, 2), "has shape"),
}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("entry", UPDATES)
def test_bad_rows(entry, case):
    rows, match = case
    for dtype in (torch.int32, torch.int64):
        args = DRAWS[entry]() | {"rows": integers(*rows, dtype=dtype)}
        refuses(entry, args, ValueError, match)


@pytest.mark.parametrize("entry", UPDATES)
def test_negative_rows_are_padding(entry):
    args = DRAWS[entry]() | {"rows": integers(-1, -1)}
    before = args["state"].clone()
    run(entry, args)
    assert not args["out"].any()
    assert torch.equal(args["state"], before)


@pytest.mark.parametrize("entry", UPDATES)
def test_only_the_rows_of_the_batch_are_written(entry):
    args = DRAWS[entry]()
    rows = args["rows"].tolist()
    run(entry, args)
    written = [bool((x != 7).any()) for x in args["state"]]
    assert written == [row in rows for row in range(len(written))]


def test_heads_and_groups_of_a_step():
    four = torch.randn(BATCH, 3, STATES)
    args = draw_state_update() | {"B": four, "C": four}
    refuses("selective_state_update", args, ValueError, "B has 3 groups but 4 heads")
    args = draw_state_update() | {"B": four[:, :0], "C": four[:, :0]}
    refuses("selective_state_update", args, ValueError, "B has 0 groups")


@pytest.mark.parametrize("rows", [0, 9])
def test_rows_of_a_projection(rows):
    args = draw_few_rows()
    args |= {n: args[n][:1].repeat(rows, 1) for n in ("x", "out")}
    refuses(
        "few_rows_linear", args, ValueError, rf"x has shape \({rows}, 6\), expected 1 to 8 rows"
    )


def test_weights_of_a_projection():
    args = draw_few_rows()
    args["weight"] = args["weight"].T.contiguous().T
    refuses("few_rows_linear", args, ValueError, "weight has stride 5 along its rows, expected 1")
    one = draw_few_rows() | {"weight": torch.randn(1, LENGTH).T, "x": torch.randn(BATCH, 1)}
    run("few_rows_linear", one)
    torch.testing.assert_close(
        one["out"], torch.nn.functional.linear(one["x"], one["weight"], one["bias"])
    )


def test_gates_that_are_constant_over_time():
    args = draw_recurrence_backward()
    run("recurrence_backward", args)
    summed = draw_recurrence_backward() | {n: args[n] for n in ("a", "h0", "h", "dh")}
    summed["da"] = sevens(2, 4, 1)
    run("recurrence_backward", summed)
    assert torch.allclose(summed["da"][..., 0], args["da"].sum(-1), atol=1e-5)
    args["da"] = sevens(2, 4, 2)
    refuses("recurrence_backward", args, ValueError, "da has shape")


INDEX = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
INDEXED = {"initial": None, "dinitial": None, "seq_idx": INDEX}
CONV_CASES = {
    "too_wide": (
        {"weight": torch.randn(DIM, 65)},
        ValueError,
        r"weight has shape \(6, 65\), expected 1 to 64",
    ),
    "no_width": ({"weight": torch.randn(DIM, 0)}, ValueError, "expected 1 to 64"),
    "seq_idx_and_initial": (
        {"seq_idx": integers(0).expand(BATCH, LENGTH)},
        ValueError,
        "neither cu_seqlens nor initial",
    ),
    "seq_idx_long": (
        INDEXED | {"seq_idx": INDEX.long()},
        TypeError,
        "seq_idx has dtype int64, expected int32",
    ),
    "seq_idx_shape": (
        INDEXED | {"seq_idx": INDEX[:, 1:]},
        ValueError,
        "seq_idx has shape",
    ),
    "seq_idx_and_final": (
        INDEXED,
        ValueError,
        "final.* does not go with seq_idx",
    ),
    "cu_seqlens": ({"cu_seqlens": integers(0, 5)}, ValueError, "batch of 1, but the batch is 2"),
}


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("case", CONV_CASES.values(), ids=CONV_CASES.keys())
def test_bad_conv(pass_, case):
    changes, error, match = case
    entry = "causal_conv_" + pass_
    if pass_ == "forward":
        changes = {n: x for n, x in changes.items() if n != "dinitial"}
    refuses(entry, changed(DRAWS[entry](), changes), error, match)


def test_seq_idx_and_cu_seqlens():
    args = draw_conv_indexed()
    args = {n: x[:1] if n in ("x", "out", "seq_idx") else x for n, x in args.items()}
    refuses(
        "causal_conv_forward",
        args | {"cu_seqlens": integers(0, 5)},
        ValueError,
        "neither cu_seqlens nor initial",
    )


def test_bad_positions():
    for position in (-1, 2**63 - 1):
        args = draw_conv_update() | {"positions": integers(0, position, dtype=torch.int64)}
        refuses("causal_conv_update", args, ValueError, f"cache_seqlens holds {position}")
    args = draw_conv_update() | {"state": sevens(4, DIM, WIDTH - 2)}
    refuses("causal_conv_update", args, ValueError, "conv_state has shape .* 3 columns or more")


@pytest.mark.parametrize(("entry", "name"), ARRAYS)
def test_meta_tensors(entry, name):
    args = DRAWS[entry]()
    args[name] = torch.empty_like(args[name], device="meta")
    refuses(entry, args, Exception, "meta|memory|DLPack|device")
