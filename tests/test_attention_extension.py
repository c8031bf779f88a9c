# SPDX-License-Identifier: Apache-2.0
"""The raw entries of attention: bad input raises before anything is written."""

import itertools
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from attention_raw import (
    APPEND,
    BACKWARD,
    FORWARD,
    HK,
    HQ,
    OUTPUTS,
    SK,
    SQ,
    WRITTEN,
    B,
    D,
    append,
    arrays_of,
    backward,
    draw,
    draw_append,
    draw_append_rows,
    draw_cached,
    draw_packed,
    draw_paged,
    forward,
    mask_lists,
    with_gradients,
    with_outputs,
)
from cases import arguments_of
from device_array import DeviceArray

import pentad
from pentad import _C


def copy_of(x):
    """What an output on the CPU holds, as bytes; None for anything else."""
    if torch.is_tensor(x) and x.device.type == "cpu":
        x = x.contiguous().view(torch.uint8).numpy()
    return x.tobytes() if isinstance(x, np.ndarray) else None


def refuses(run, args, error, match):
    """`run(args)` raises, and every output still holds what it held."""
    before = {n: copy_of(args.get(n)) for n in OUTPUTS}
    with pytest.raises(error, match=match):
        run(args)
    for name, values in before.items():
        assert copy_of(args.get(name)) == values, name


def changed(args, changes):
    return args | {n: f(args.get(n)) if callable(f) else f for n, f in changes.items()}


def narrow(dim):
    return lambda x: x.narrow(dim, 0, x.shape[dim] - 1).contiguous()


def longer(dim):
    return lambda x: torch.cat([x, x.narrow(dim, 0, 1)], dim)


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def entry_of(position, values):
    """A block mask with another array at this position of its tuple."""

    def change(mask):
        old = mask[position]
        new = torch.tensor(values, dtype=old.dtype).reshape(old.shape)
        return (*mask[:position], new, *mask[position + 1 :])

    return change


def test_argument_names():
    """The lists above are the module's own, so that a bad argument is the one that is meant."""
    for names, entry in (
        (FORWARD, _C.attention_forward),
        (BACKWARD, _C.attention_backward),
        (APPEND, _C.attention_append),
    ):
        assert len(arguments_of(entry)) == len(names)
    for args in (draw(), draw(masked=True), draw_packed()):
        for output in forward(with_outputs(args)) + backward(with_gradients(args)):
            assert not (output == 7).any()
    for args in (draw_paged(), draw_cached()):
        for output in forward(with_outputs(args)):
            assert not (output == 7).any()


INPUTS = {
    "q_int": ({"q": lambda x: x.int()}, TypeError, "q has dtype int32"),
    "q_rank": ({"q": lambda x: x[0]}, ValueError, "q has shape .*expected 4 dimensions"),
    "k_other_dtype": ({"k": lambda x: x.half()}, TypeError, "k has dtype float16 but q has"),
    "v_other_dtype": ({"v": lambda x: x.bfloat16()}, TypeError, "v has dtype bfloat16 but q"),
    "k_none": ({"k": None}, TypeError, "incompatible"),
    "q_list": ({"q": [1.0]}, TypeError, "not list"),
    "k_dim": ({"k": narrow(3)}, ValueError, "k has head_dim 4 but q has 5"),
    "k_batch": ({"k": narrow(0), "v": narrow(0)}, ValueError, "k has batch 1 but q has 2"),
    "k_heads": (
        {"k": longer(1), "v": longer(1)},
        ValueError,
        "4 heads, which is no multiple of the heads of k, 3",
    ),
    "no_heads": ({"k": lambda x: x[:, :0], "v": lambda x: x[:, :0]}, ValueError, "heads"),
    "v_length": ({"v": narrow(2)}, ValueError, "v has shape .*does not fit k's"),
    "v_heads": ({"v": narrow(1)}, ValueError, "v has shape"),
    "too_wide": (
        {"q": torch.ones(B, HQ, SQ, 513), "k": torch.ones(B, HK, SK, 513)},
        ValueError,
        "head_dim 513 and 3, expected 1 to 512",
    ),
    "no_width": ({"q": lambda x: x[..., :0], "k": lambda x: x[..., :0]}, ValueError, "head_dim 0"),
    "bias_rank": ({"bias": lambda x: x[0]}, ValueError, "bias has shape"),
    "bias_int": ({"bias": lambda x: x.int()}, TypeError, "bias has dtype int32"),
    "bias_shape": ({"bias": narrow(3)}, ValueError, "bias has shape .*does not broadcast"),
    "bias_batch": ({"bias": lambda x: x.repeat(3, 1, 1, 1)}, ValueError, "does not broadcast"),
    "key_bias_shape": ({"key_bias": narrow(2)}, ValueError, r"key_bias has shape \(2, 2, 8\)"),
    "key_bias_heads": ({"key_bias": longer(1)}, ValueError, "key_bias has shape"),
    "key_bias_batch": ({"key_bias": narrow(0)}, ValueError, "key_bias has shape"),
    "key_bias_rank": ({"key_bias": lambda x: x[0]}, ValueError, "key_bias has shape"),
    "alibi_shape": ({"alibi": narrow(0)}, ValueError, "alibi_slopes has shape"),
    "alibi_rank": ({"alibi": torch.ones(1, B, HQ)}, ValueError, "alibi_slopes has shape"),
    "sink_shape": ({"sink": narrow(0)}, ValueError, "sink has shape"),
    "sink_strided": ({"sink": torch.ones(2 * HQ)[::2]}, ValueError, "sink is not contiguous"),
    "one_cu_seqlens": ({"cu_seqlens_q": integers(0, 3)}, ValueError, "needed together"),
    "scale_nan": ({"scale": float("nan")}, ValueError, "scale is not finite"),
    "scale_text": ({"scale": "1"}, TypeError, "incompatible"),
    "softcap_negative": ({"softcap": -1.0}, ValueError, "softcap"),
    "softcap_inf": ({"softcap": float("inf")}, ValueError, "softcap"),
    "left": ({"left": -2}, ValueError, r"window is \(-2, -1\)"),
    "right": ({"right": -(2**63)}, ValueError, "window is"),
    "left_overflow": ({"left": 2**63}, TypeError, "incompatible"),
    "dropout_one": ({"dropout": 1.0, "seed": torch.tensor(3)}, ValueError, "dropout is 1"),
    "dropout_nan": ({"dropout": float("nan")}, ValueError, "dropout is"),
    "dropout_without_seed": ({"dropout": 0.5}, ValueError, "dropout needs a seed"),
    "seed_float": ({"seed": torch.tensor(3.0)}, TypeError, "seed has dtype"),
    "seeds": ({"seed": torch.tensor([3, 4])}, ValueError, "seed has shape"),
    "no_seed": ({"seed": torch.tensor([], dtype=torch.int64)}, ValueError, "seed has shape"),
}
PACKED = {
    "bias": ({"bias": torch.ones(1, 1, 7, 11)}, ValueError, "bias does not go with cu_seqlens"),
    "rank": ({"q": torch.ones(1, HQ, 7, D)}, ValueError, "expected 3 dimensions"),
    "float": ({"cu_seqlens_q": lambda x: x.float()}, TypeError, "cu_seqlens_q has dtype"),
    "matrix": ({"cu_seqlens_q": lambda x: x[None]}, ValueError, "cu_seqlens_q has shape"),
    "empty": ({"cu_seqlens_q": lambda x: x[:0]}, ValueError, "does not begin with 0"),
    "first": ({"cu_seqlens_q": integers(1, 3, 7)}, ValueError, "does not begin with 0"),
    "negative": ({"cu_seqlens_q": integers(0, -1, 7)}, ValueError, "descends from 0 to -1"),
    "descends": ({"cu_seqlens_k": integers(0, 12, 11)}, ValueError, "descends from 12 to 11"),
    "overrun": ({"cu_seqlens_k": integers(0, 6, 12)}, ValueError, "ends with 12, but .* 11"),
    "short": ({"cu_seqlens_q": integers(0, 3, 6)}, ValueError, "ends with 6, but there are 7"),
    "count": ({"cu_seqlens_q": integers(0, 7)}, ValueError, "2 entries but cu_seqlens_k has 3"),
    "wraps": (
        {"cu_seqlens_k": torch.tensor([0, 2**62, 11])},
        ValueError,
        "descends from 4611686018427387904",
    ),
    "key_bias": ({"key_bias": narrow(1)}, ValueError, "key_bias has shape"),
    "alibi": ({"alibi": torch.ones(3, HQ)}, ValueError, "alibi_slopes has shape"),
    "mask": ({"mask": (4, 4, *mask_lists())}, ValueError, "block mask does not go with"),
}
MASKED = {
    "short_tuple": ({"mask": lambda m: m[:-1]}, TypeError, "incompatible"),
    "no_block": ({"mask": lambda m: (0, *m[1:])}, ValueError, "blocks have no size"),
    "negative_block": ({"mask": lambda m: (4, -4, *m[2:])}, ValueError, "blocks have no size"),
    "other_block": ({"mask": lambda m: (8, *m[1:])}, ValueError, "row_ptr has shape"),
    "long_block": ({"mask": lambda m: (5, *m[1:])}, ValueError, "partial has shape"),
    "pointer_dtype": ({"mask": lambda m: (*m[:2], m[2].int(), *m[3:])}, TypeError, "row_ptr has"),
    "cols_dtype": ({"mask": lambda m: (*m[:3], m[3].long(), *m[4:])}, TypeError, "cols has dtype"),
    "pointer_rank": ({"mask": lambda m: (*m[:2], m[2][0], *m[3:])}, ValueError, "row_ptr has"),
    "batch": (
        {"mask": lambda m: (*m[:2], m[2].repeat(3, 1, 1), *m[3:])},
        ValueError,
        "row_ptr has shape",
    ),
    "col_batch": (
        {"mask": lambda m: (*m[:5], m[5].repeat(2, 1, 1), *m[6:])},
        ValueError,
        "col_ptr has shape",
    ),
    "fewer_kinds": ({"mask": lambda m: (*m[:4], m[4][:2], *m[5:])}, ValueError, "kinds has shape"),
    "fewer_rows": ({"mask": lambda m: (*m[:6], m[6][:2], *m[7:])}, ValueError, "rows has shape"),
    "strided": (
        {"mask": lambda m: (*m[:3], m[3].repeat_interleave(2)[::2], *m[4:])},
        ValueError,
        "cols is not contiguous",
    ),
    "partial_dtype": ({"mask": lambda m: (*m[:8], m[8].bool())}, TypeError, "partial has dtype"),
    "partial_strided": (
        {"mask": lambda m: (*m[:8], transposed(m[8]))},
        ValueError,
        "partial is not contiguous",
    ),
    "row_ptr_negative": ({"mask": entry_of(2, [-1, 2, 3])}, ValueError, "row_ptr is out of"),
    "row_ptr_overrun": ({"mask": entry_of(2, [0, 2, 4])}, ValueError, "row_ptr is out of"),
    "row_ptr_descends": ({"mask": entry_of(2, [0, 3, 2])}, ValueError, "row_ptr is out of"),
    "col_ptr_overrun": ({"mask": entry_of(5, [0, 1, 2, 4])}, ValueError, "col_ptr is out of"),
    "col_ptr_descends": ({"mask": entry_of(5, [0, 2, 1, 3])}, ValueError, "col_ptr is out of"),
    "col_negative": ({"mask": entry_of(3, [-1, 2, 1])}, ValueError, "cols are out of"),
    "col_overrun": ({"mask": entry_of(3, [0, 3, 1])}, ValueError, "cols are out of"),
    "cols_descend": ({"mask": entry_of(3, [2, 0, 1])}, ValueError, "lists by row|cols are out"),
    "cols_repeat": ({"mask": entry_of(3, [0, 0, 1])}, ValueError, "cols are out of|lists by row"),
    "kind_overrun": ({"mask": entry_of(4, [-1, 1, -1])}, ValueError, "kinds are out of"),
    "kind_negative": ({"mask": entry_of(4, [-1, -2, -1])}, ValueError, "kinds are out of"),
    "rows_differ": ({"mask": entry_of(6, [0, 0, 1])}, ValueError, "by row and by column differ"),
    "row_overrun": ({"mask": entry_of(6, [0, 2, 0])}, ValueError, "by row and by column differ"),
    "row_kinds_differ": ({"mask": entry_of(7, [-1, 0, 0])}, ValueError, "column differ"),
    "columns_incomplete": ({"mask": entry_of(2, [0, 2, 2])}, ValueError, "column differ"),
}


@pytest.mark.parametrize("entry", [forward, backward])
@pytest.mark.parametrize(
    ("draw_arguments", "change"),
    [
        *(pytest.param(draw, case, id=name) for name, case in INPUTS.items()),
        *(pytest.param(draw_packed, case, id="packed_" + name) for name, case in PACKED.items()),
        *(
            pytest.param(lambda: draw(masked=True), case, id="mask_" + name)
            for name, case in MASKED.items()
        ),
    ],
)
def test_bad_inputs(entry, draw_arguments, change):
    changes, error, match = change
    args = draw_arguments()
    args = with_outputs(args) if entry is forward else with_gradients(args)
    refuses(entry, changed(args, changes), error, match)


CACHED = {
    "lengths_missing": (draw_paged, {"k_lengths": None}, "need lengths"),
    "length_beyond_pages": (draw_paged, {"k_lengths": integers(13, 4)}, "holds 13, expected 0"),
    "length_negative": (draw_paged, {"k_lengths": integers(-1, 4)}, "k_lengths holds -1"),
    "length_huge": (draw_paged, {"k_lengths": torch.tensor([2**62, 0])}, "k_lengths holds"),
    "lengths_count": (draw_paged, {"k_lengths": integers(7, 4, 1)}, "k_lengths has shape"),
    "page_beyond": (draw_paged, {"k_lengths": integers(7, 5)}, "page 777, but there are 5"),
    "page_negative": (draw_paged, {"k_lengths": integers(9, 4)}, "page -9, but there are 5"),
    "table_batch": (draw_paged, {"block_table": narrow(0)}, "block_table has shape"),
    "table_rank": (draw_paged, {"block_table": lambda x: x[0]}, "block_table has shape"),
    "table_endless": (
        draw_paged,
        {"block_table": integers(3).as_strided((B, 2**60), (0, 0))},
        "block_table has shape",
    ),
    "page_of_no_rows": (
        draw_paged,
        {"k": lambda x: x[:, :, :0], "v": lambda x: x[:, :, :0]},
        "for pages of 0 rows",
    ),
    "rows_and_pages": (draw_paged, {"cache_rows": integers(0, 1)}, "do not go with a block_table"),
    "pad_and_pages": (draw_paged, {"left_pad": integers(0, 1)}, "do not go with a block_table"),
    "v_pages": (draw_paged, {"v": narrow(0)}, "v has shape"),
    "key_mass": (draw_paged, {"key_mass": torch.ones(B, HQ, 7)}, "key_mass does not go with"),
    "mask": (draw_paged, {"mask": (4, 4, *mask_lists())}, "block mask does not go with"),
    "short_bias": (draw_paged, {"bias": torch.ones(B, HQ, SQ, 6)}, "does not broadcast"),
    "short_key_bias": (draw_paged, {"key_bias": torch.ones(B, HQ, 6)}, "key_bias has shape"),
    "row_beyond": (draw_cached, {"cache_rows": integers(3, 0)}, "cache_rows holds 3, expected 0"),
    "row_negative": (draw_cached, {"cache_rows": integers(-1, 0)}, "cache_rows holds -1"),
    "rows_count": (draw_cached, {"cache_rows": integers(1)}, "cache_rows has shape"),
    "rows_missing": (draw_cached, {"cache_rows": None}, "k has batch 3 but q has 2"),
    "pad_negative": (draw_cached, {"left_pad": integers(-1, 0)}, "left_pad holds -1"),
    "pad_beyond": (draw_cached, {"left_pad": integers(2, 0)}, "needs 9 positions, .* has 8"),
    "length_beyond": (draw_cached, {"k_lengths": integers(8, 4)}, "needs 9 positions"),
}


@pytest.mark.parametrize("case", CACHED.values(), ids=CACHED.keys())
def test_bad_caches(case):
    draw_arguments, changes, match = case
    refuses(forward, changed(with_outputs(draw_arguments()), changes), ValueError, match)


def test_bad_types_of_cache_indices():
    for name, value in (
        ("k_lengths", torch.ones(B)),
        ("block_table", torch.zeros(B, 3, dtype=torch.int64)),
    ):
        args = with_outputs(draw_paged()) | {name: value}
        refuses(forward, args, TypeError, f"{name} has dtype")


APPENDED = {
    "dtype": ({"k_new": lambda x: x.half()}, TypeError, "k_new has dtype float16 but k_cache"),
    "cache_dtype": ({"v_cache": lambda x: x.double()}, TypeError, "v_cache has dtype float64"),
    "integers": ({"k_cache": lambda x: x.int()}, TypeError, "k_cache has dtype int32"),
    "rank": ({"v_new": lambda x: x[0]}, ValueError, "v_new has shape"),
    "tokens": ({"v_new": narrow(2)}, ValueError, "v_new has shape"),
    "heads": ({"k_new": narrow(1), "v_new": narrow(1)}, ValueError, "k_cache has shape"),
    "dim": ({"k_new": narrow(3)}, ValueError, "k_cache has shape"),
    "value_dim": ({"v_cache": narrow(3)}, ValueError, "v_cache has shape"),
    "value_pages": ({"v_cache": narrow(0)}, ValueError, "v_cache has shape"),
    "lengths_missing": ({"cache_lengths": None}, TypeError, "incompatible"),
    "lengths_float": ({"cache_lengths": torch.zeros(B)}, TypeError, "cache_lengths has dtype"),
    "lengths_count": ({"cache_lengths": integers(0)}, ValueError, "cache_lengths has shape"),
    "length_negative": ({"cache_lengths": integers(5, -1)}, ValueError, "cache_lengths holds -1"),
    "no_room": ({"cache_lengths": integers(10, 0)}, ValueError, "needs 13 positions, .* has 12"),
    "page_beyond": ({"cache_lengths": integers(5, 2)}, ValueError, "page 777, but there are 5"),
    "page_negative": ({"cache_lengths": integers(6, 0)}, ValueError, "page -9, but there are 5"),
    "page_twice": (
        {"block_table": integers(3, 0, 0, 0).reshape(2, 2)},
        ValueError,
        "one page twice",
    ),
    "read_only": (
        {"k_cache": lambda x: np.broadcast_to(x.numpy()[:, :, :1], x.shape)},
        ValueError,
        "k_cache is read-only",
    ),
    "overlap": (
        {"k_cache": lambda x: x[:, :, :1].expand(x.shape)},
        ValueError,
        "k_cache has elements that share memory",
    ),
}
APPENDED_ROWS = {
    "row_beyond": ({"cache_rows": integers(5, 1)}, ValueError, "cache_rows holds 5"),
    "row_twice": ({"cache_rows": integers(1, 1)}, ValueError, "one row twice"),
    "rows_missing": ({"cache_rows": None}, ValueError, "batch 5"),
    "no_room": ({"cache_lengths": integers(2, 0)}, ValueError, "needs 5 positions, .* has 4"),
    "no_room_after_pad": ({"left_pad": integers(1, 0)}, ValueError, "needs 5 positions"),
    "caches_shared": ({"v_cache": 0, "v_new": 0}, ValueError, "v_cache shares memory"),
}


@pytest.mark.parametrize(
    ("draw_arguments", "change"),
    [
        *(pytest.param(draw_append, case, id="pages_" + n) for n, case in APPENDED.items()),
        *(pytest.param(draw_append_rows, case, id=n) for n, case in APPENDED_ROWS.items()),
    ],
)
def test_bad_appends(draw_arguments, change):
    changes, error, match = change
    args = draw_arguments()
    if changes.get("v_cache") == 0:  # the same array for both
        changes = {"v_cache": args["k_cache"], "v_new": args["k_new"]}
    refuses(append, changed(args, changes), error, match)


def test_append_writes_its_rows_and_no_others():
    for args, places in (
        (
            draw_append(),
            [(0, t, (0, 1 + t)) for t in range(3)] + [(1, t, (1, t)) for t in range(3)],
        ),
        (
            draw_append_rows() | {"left_pad": integers(0, 1)},
            [(0, t, (4, 1 + t)) for t in range(3)] + [(1, t, (1, 1 + t)) for t in range(3)],
        ),
    ):
        expected = [args["k_cache"].clone(), args["v_cache"].clone()]
        for (b, t, (row, position)), (n, new) in itertools.product(
            places, enumerate(("k_new", "v_new"))
        ):
            expected[n][row, :, position] = args[new][b, :, t]
        for got, want in zip(append(args), expected, strict=True):
            assert torch.equal(got, want)


BAD_OUTPUTS = {
    "dtype": (lambda x: x.half(), TypeError, "{} has dtype float16"),
    "rank": (lambda x: x[None], ValueError, "{} has shape"),
    "shape": (narrow(-1), ValueError, "{} has (shape|the wrong shape)"),
    "first_extent": (narrow(0), ValueError, "{} has (shape|the wrong shape)"),
    "overlap": (
        lambda x: x[..., :1].expand(x.shape),
        ValueError,
        "{} (has elements that share memory|is not contiguous)",
    ),
    "read_only": (
        lambda x: np.broadcast_to(x.numpy(), x.shape),
        ValueError,
        "{} is read-only",
    ),
    "none_or_list": (lambda x: [1.0], TypeError, "not list"),
}


@pytest.mark.parametrize("bad", BAD_OUTPUTS.values(), ids=BAD_OUTPUTS.keys())
@pytest.mark.parametrize("name", ["out", "lse", "key_mass", *WRITTEN])
def test_bad_outputs(name, bad):
    change, error, match = bad
    entry, args = (backward, with_gradients(draw()))
    if name not in WRITTEN:
        entry, args = (forward, with_outputs(draw()))
    refuses(entry, changed(args, {name: change}), error, match.format(name))


@pytest.mark.parametrize(
    ("name", "other"),
    [("out", "q"), ("lse", "key_mass"), ("dq", "q"), ("dk", "k"), ("dv", "v"), ("dq", "dk")],
)
def test_outputs_that_share_memory_with_another_argument(name, other):
    square = draw()
    square["v"] = torch.randn(B, HQ, SK, D)
    square["q"] = torch.randn(B, HQ, SK, D)
    square["k"] = torch.randn(B, HQ, SK, D)
    square["bias"] = torch.randn(1, HQ, SK, SK)
    square["key_bias"] = torch.randn(B, HQ, SK)
    entry, args = (backward, with_gradients(square))
    if name in ("out", "lse"):
        entry, args = (forward, with_outputs(square))
    both = torch.full((args[other].numel() + 3,), 7.0)
    for shift in (0, 3):
        shared = args | {
            name: both[shift:][: args[name].numel()].view(args[name].shape),
            other: both[: args[other].numel()].view(args[other].shape),
        }
        refuses(entry, shared, ValueError, "shares memory with")


def test_gradients_that_interleave_are_no_overlap():
    args = draw() | {n: torch.randn(B, HQ, SK, D) for n in "qkv"}
    args |= {"bias": torch.randn(1, HQ, SK, SK), "key_bias": torch.randn(B, HQ, SK)}
    args = with_gradients(args)
    packed = torch.full((B, SK, 3, HQ, D), 7.0)
    slices = dict(zip(("dq", "dk", "dv"), packed.permute(2, 0, 3, 1, 4), strict=True))
    for got, want in zip(backward(args | slices), backward(args), strict=True):
        assert torch.equal(got, want)


GRADIENTS = {
    "d_out_shape": ({"d_out": narrow(3)}, ValueError, "d_out has shape"),
    "d_out_dtype": ({"d_out": lambda x: x.double()}, TypeError, "d_out has dtype"),
    "d_out_none": ({"d_out": None}, TypeError, "incompatible"),
    "lse_none": ({"lse": None}, TypeError, "incompatible"),
    "d_lse_shape": ({"d_lse": narrow(2)}, ValueError, "d_lse has shape"),
    "d_key_mass_shape": ({"d_key_mass": narrow(2)}, ValueError, "d_key_mass has shape"),
    "d_key_mass_strided": ({"d_key_mass": transposed}, ValueError, "d_key_mass is not contiguous"),
    "dbias_alone": ({"bias": None}, ValueError, "dbias needs a bias"),
    "dbias_of_booleans": ({"bias": lambda x: x > 0}, ValueError, "dbias needs a bias of numbers"),
    "dbias_of_one_query": (
        {"bias": lambda x: x[:, :, :1], "dbias": lambda x: x[:, :, :1].contiguous()},
        ValueError,
        "query dimension is not broadcast",
    ),
    "dkey_bias_alone": ({"key_bias": None}, ValueError, "dkey_bias needs a key_bias"),
    "dsink_alone": ({"sink": None}, ValueError, "dsink needs a sink"),
    "dsink_strided": ({"dsink": torch.full((2 * HQ,), 7.0)[::2]}, ValueError, "not contiguous"),
}


@pytest.mark.parametrize("change", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_bad_gradients(change):
    changes, error, match = change
    refuses(backward, changed(with_gradients(draw()), changes), error, match)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("entry", [forward, backward])
def test_one_argument_of_another_precision(entry, dtype):
    other = torch.float32 if dtype == torch.float64 else torch.float64
    make = with_outputs if entry is forward else with_gradients
    for name in arrays_of(make(draw(dtype))):
        args = make(draw(dtype))
        args[name] = args[name].to(other)
        narrower = name == "bias" and other == torch.float32
        if narrower or (name in ("lse", "d_lse") and other == torch.float64):  # free to be
            entry(args)
            continue
        what = {"alibi": "alibi_slopes", "q": "k"}.get(name, name)
        refuses(entry, args, TypeError, f"{what} has dtype")


def test_float64_agrees_with_float32():
    args = with_outputs(draw())
    wide = {n: x.double() if n in arrays_of(args) else x for n, x in args.items()}
    for narrow_result, result in zip(forward(args), forward(wide), strict=True):
        torch.testing.assert_close(narrow_result.double(), result, rtol=1e-5, atol=1e-5)
        assert (narrow_result != result).any()


@pytest.mark.parametrize("entry", [forward, backward])
def test_another_device(entry):
    from torch._subclasses.fake_tensor import FakeTensorMode

    make = with_outputs if entry is forward else with_gradients
    for name in arrays_of(make(draw())):
        args = make(draw())
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            away = torch.empty(args[name].shape, device="cuda")
        match = "is on an accelerator"
        if name == "q":  # says where the others are to be
            away, match = DeviceArray(args[name].numpy()), "is not on cuda:0, where the first"
        refuses(entry, args | {name: away}, pentad.DeviceError, match)
        refuses(entry, args | {name: args[name].to("meta")}, RuntimeError, "meta")
