# SPDX-License-Identifier: Apache-2.0
"""pentad.compat.causal_conv1d on the cases of causal_conv1d's own tests with its tolerances.

A seeded sample of its grids; the expected values are those of the plain functions, and these are
compared with torch's convolution.
"""

import inspect
import random

import pytest

torch = pytest.importorskip("torch")

from torch.nn.functional import conv1d, pad, silu  # noqa: E402

from pentad.compat import causal_conv1d as F  # noqa: E402
from pentad.compat.causal_conv1d import causal_conv1d_interface, causal_conv1d_varlen  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative and absolute.
TOLERANCES = {
    torch.float32: (3e-4, 1e-3),
    torch.float16: (3e-3, 5e-3),
    torch.bfloat16: (1e-2, 5e-2),
}
PARAMETER = (1e-3, 1e-3)
LENGTHS = (1, 2, 8, 16, 32, 64, 128, 129, 130, 151, 256, 372, 512, 784, 1024, 1134, 2048, 4096)


def close(actual, expected, tolerance):
    rtol, atol = tolerance
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def layout(x, channel_last):
    return x.transpose(1, 2).contiguous().transpose(1, 2) if channel_last else x.contiguous()


def gradients(function, inputs, seeds, **options):
    """The results, and the gradients of those inputs that are there."""
    given = {name: x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
             for name, x in inputs.items() if x is not None}  # fmt: skip
    results = function(**given, **options)
    results = results if isinstance(results, tuple) else (results,)
    return results, dict(
        zip(given, torch.autograd.grad(results, list(given.values()), seeds), strict=True)
    )


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            F.causal_conv1d_fn,
            "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
            "final_states_out=None, activation=None",
        ),
        (
            F.causal_conv1d_ref,
            "x, weight, bias=None, initial_states=None, return_final_states=False, "
            "final_states_out=None, activation=None",
        ),
        (
            F.causal_conv1d_update,
            "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
            "conv_state_indices=None",
        ),
        (
            F.causal_conv1d_update_ref,
            "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None",
        ),
        (F.causal_conv1d_varlen_states, "x, cu_seqlens, state_len"),
    ],
)
def test_signatures_are_those_of_causal_conv1d(function, parameters):
    assert str(inspect.signature(function)) == f"({parameters})"
    for module in (causal_conv1d_interface, causal_conv1d_varlen):
        if hasattr(module, function.__name__):
            assert getattr(module, function.__name__) is function


def test_the_plain_function_is_torchs():
    x, weight, bias = torch.randn(2, 5, 9), torch.randn(5, 3), torch.randn(5)
    initial = torch.randn(2, 5, 2)
    expected = conv1d(x, weight[:, None], bias, padding=2, groups=5)[..., :9]
    close(F.causal_conv1d_ref(x, weight, bias), expected, (1e-5, 1e-5))
    expected = silu(conv1d(torch.cat([initial, x], 2), weight[:, None], bias, groups=5))
    out, final = F.causal_conv1d_ref(x, weight, bias, initial, True, activation="silu")
    close(out, expected, (1e-5, 1e-5))
    assert torch.equal(final, x[..., -2:])


# --- causal_conv1d_fn -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(len(LENGTHS) * 3))
def test_causal_conv1d(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    length, dtype = LENGTHS[seed // 3], DTYPES[seed % 3]
    dim, batch, width = draw.choice((64, 96, 35)), 2, draw.choice((2, 3, 4))
    initial, final, channel_last = (draw.random() < 0.5 for _ in range(3))
    inputs = {
        "x": layout(torch.randn(batch, dim, length).to(dtype), channel_last),
        "weight": torch.randn(dim, width),
        "bias": torch.randn(dim) if draw.random() < 0.5 else None,
        "initial_states": torch.randn(batch, dim, width - 1).to(dtype) if initial else None,
    }
    options = {"activation": draw.choice((None, "silu")), "return_final_states": final}
    seeds = [torch.randn_like(inputs["x"])]
    if final:
        seeds.append(torch.randn(batch, dim, width - 1).to(dtype))
    results, actual = gradients(F.causal_conv1d_fn, inputs, seeds, **options)
    expected_results, expected = gradients(F.causal_conv1d_ref, inputs, seeds, **options)
    tolerance = TOLERANCES[dtype]
    close(results[0], expected_results[0], tolerance)
    assert results[0].stride(1 if channel_last else 2) == 1
    if final:
        assert torch.equal(results[1], expected_results[1])
    for name, gradient in actual.items():
        if name in ("weight", "bias"):  # sums over all steps
            size = expected[name].abs().max()
            close(gradient / size, expected[name] / size, PARAMETER)
        else:
            close(gradient, expected[name], tolerance)


@pytest.mark.parametrize("width", [1, 5, 7, 32])
def test_other_widths(width):
    x, weight = torch.randn(2, 11, 40), torch.randn(11, width)
    close(F.causal_conv1d_fn(x, weight), F.causal_conv1d_ref(x, weight), (1e-4, 1e-4))


def test_many_channels():
    x, weight = torch.randn(1, 4096 + 32, 20), torch.randn(4096 + 32, 4)
    close(F.causal_conv1d_fn(x, weight), F.causal_conv1d_ref(x, weight), (1e-5, 1e-5))


@pytest.mark.parametrize("activation", ["silu", "swish"])
def test_both_names_of_the_activation(activation):
    x, weight = torch.randn(1, 3, 5), torch.randn(3, 2)
    expected = silu(F.causal_conv1d_ref(x, weight))
    close(F.causal_conv1d_fn(x, weight, activation=activation), expected, (1e-5, 1e-5))


def test_final_states_are_written_where_asked():
    x, weight = torch.randn(2, 8, 6), torch.randn(8, 4)
    for function in (F.causal_conv1d_fn, F.causal_conv1d_ref):
        place = torch.zeros(2, 8, 3)
        _, final = function(x, weight, return_final_states=True, final_states_out=place)
        assert final is place
        assert torch.equal(place, x[..., -3:])


def test_pieces_with_states_are_the_whole():
    x, weight, bias = torch.randn(2, 8, 30), torch.randn(8, 4), torch.randn(8)
    whole = F.causal_conv1d_fn(x, weight, bias, activation="silu")
    state, parts = torch.zeros(2, 8, 3), []
    for piece in x.split([1, 2, 17, 10], 2):
        out, state = F.causal_conv1d_fn(piece, weight, bias, None, state, True, activation="silu")
        parts.append(out)
    close(torch.cat(parts, 2), whole, (1e-5, 1e-5))


def sequence_index(lengths, padding=0):
    index = torch.repeat_interleave(torch.tensor(lengths)).to(torch.int32)
    return pad(index, (0, padding), value=-1)


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_sequences_in_a_row(seed, channel_last):
    """Each row of the batch has sequences of its own, as separate calls; the rest is padding."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, dim, width = DTYPES[seed % 3], draw.choice((64, 20)), draw.choice((2, 3, 4))
    length = draw.choice((9, 64, 151, 512))
    lengths, index = [], []
    for _ in range(2):
        padding = draw.choice((0, 0, draw.randint(1, length // 2)))
        cuts = sorted(draw.sample(range(1, length - padding), draw.randint(1, 3)))
        ends = [*cuts, length - padding]
        lengths.append([b - a for a, b in zip([0, *cuts], ends, strict=True)])
        index.append(sequence_index(lengths[-1], padding))
    inputs = {
        "x": layout(torch.randn(2, dim, length).to(dtype), channel_last),
        "weight": torch.randn(dim, width),
        "bias": torch.randn(dim),
    }

    def separately(x, weight, bias, activation):
        rows = []
        for row, pieces in zip(x, lengths, strict=True):
            outs = [
                F.causal_conv1d_ref(piece[None], weight, bias, activation=activation)[0]
                for piece in row[:, : sum(pieces)].split(pieces, 1)
            ]
            rows.append(pad(torch.cat(outs, 1), (0, length - sum(pieces))))
        return torch.stack(rows)

    seeds = [torch.randn_like(inputs["x"])]
    activation = draw.choice((None, "silu"))
    results, actual = gradients(
        F.causal_conv1d_fn, inputs, seeds, activation=activation, seq_idx=torch.stack(index)
    )
    expected_results, expected = gradients(separately, inputs, seeds, activation=activation)
    close(results[0], expected_results[0], TOLERANCES[dtype])
    close(actual["x"], expected["x"], TOLERANCES[dtype])
    for name in ("weight", "bias"):
        size = expected[name].abs().max()
        close(actual[name] / size, expected[name] / size, PARAMETER)


def test_repeated_calls_give_the_same_bits():
    x, weight, bias = torch.randn(2, 96, 500), torch.randn(96, 4), torch.randn(96)
    inputs, seeds = {"x": x, "weight": weight, "bias": bias}, [torch.randn_like(x)]
    first, expected = gradients(F.causal_conv1d_fn, inputs, seeds, activation="silu")
    for _ in range(20):
        again, actual = gradients(F.causal_conv1d_fn, inputs, seeds, activation="silu")
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(expected[name], actual[name]) for name in expected)


# --- causal_conv1d_update -------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("seed", range(18))
def test_update(seed, ring):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, dim, width = DTYPES[seed % 3], draw.choice((2048, 2048 + 16, 70)), 2 + seed % 3
    batch, length = 2, draw.choice((None, 1, 4, 5))
    state = torch.randn(batch, dim, draw.randint(width - 1, width + 9)).to(dtype)
    x = torch.randn((batch, dim) if length is None else (batch, length, dim)).to(dtype)
    x = x if length is None else x.transpose(1, 2)
    options = {
        "bias": torch.randn(dim) if draw.random() < 0.5 else None,
        "activation": draw.choice((None, "silu")),
        "cache_seqlens": torch.randint(0, 1024, (batch,), dtype=torch.int32) if ring else None,
    }
    weight, expected_state = torch.randn(dim, width), state.clone()
    out = F.causal_conv1d_update(x, state, weight, **options)
    expected = F.causal_conv1d_update_ref(x, expected_state, weight, **options)
    assert torch.equal(state, expected_state)
    close(out, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ring", [False, True])
def test_update_of_some_rows(ring, dtype):
    """Rows of a larger cache; a negative index is padding."""
    dim, width, batch, rows = 70, 4, 3, 30
    cache = torch.randn(rows, dim, 6).to(dtype)
    before = cache.clone()
    x = torch.randn(batch + 2, dim).to(dtype)
    x[batch:] = torch.nan
    used = torch.randperm(rows)[:batch]
    indices = torch.cat([used, torch.full((2,), -1)]).to(torch.int32)
    lengths = torch.tensor([0, 3, 100, 5, 5], dtype=torch.int32) if ring else None
    weight, bias = torch.randn(dim, width), torch.randn(dim)
    out = F.causal_conv1d_update(x, cache, weight, bias, "silu", lengths, indices)
    expected_rows = before[used]
    expected = F.causal_conv1d_update_ref(
        x[:batch], expected_rows, weight, bias, "silu", lengths[:batch] if ring else None
    )
    close(out[:batch], expected, TOLERANCES[dtype])
    assert torch.equal(out[batch:], torch.zeros_like(out[batch:]))
    before[used] = expected_rows
    assert torch.equal(cache, before)


def test_updates_are_the_convolution():
    x, weight, bias = torch.randn(2, 9, 12), torch.randn(9, 4), torch.randn(9)
    expected = F.causal_conv1d_fn(x, weight, bias, activation="silu")
    shifted, ring = torch.zeros(2, 9, 3), torch.zeros(2, 9, 5)
    for t in range(12):
        step = F.causal_conv1d_update(x[..., t], shifted, weight, bias, "silu")
        close(step, expected[..., t], (1e-5, 1e-5))
        before = torch.full((2,), t, dtype=torch.int32)
        step = F.causal_conv1d_update(x[..., t], ring, weight, bias, "silu", before)
        close(step, expected[..., t], (1e-5, 1e-5))


# --- causal_conv1d_varlen_states ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_len", [1, 4, 11])
def test_states_of_packed_sequences(state_len, dtype):
    lengths = [3, 1, 0, 20, 11]
    x = torch.randn(sum(lengths), 7).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    states = F.causal_conv1d_varlen_states(x, cu_seqlens, state_len)
    assert states.shape == (5, 7, state_len)
    assert states.stride(1) == 1
    expected = causal_conv1d_varlen.causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len)
    assert torch.equal(states, expected)
    for state, piece in zip(states, x.split(lengths), strict=True):
        assert torch.equal(state, pad(piece.T, (state_len, 0))[:, -state_len:])
