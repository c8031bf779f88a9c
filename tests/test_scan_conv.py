# SPDX-License-Identifier: Apache-2.0
"""The values and gradients of the causal depthwise convolution."""

import itertools
import random

import pytest

torch = pytest.importorskip("torch")

from scan_cases import (  # noqa: E402
    DTYPES,
    LAYOUTS,
    SPREADS,
    Problem,
    assert_gradcheck,
    assert_same_bits,
    check,
    dtype_name,
    ends_of,
    views_of,
)

from pentad import scan  # noqa: E402
from pentad.scan import reference  # noqa: E402

LENGTHS = [0, 1, 2, 3, 31, 32, 33, 63, 64, 65]
WIDTHS = [1, 2, 3, 4, 5, 7, 16, 31, 64]
OPTIONS = ("bias", "silu", "initial", "final", "seq_idx", "packed")
PAIRS = [
    pair
    for pair in itertools.combinations(OPTIONS, 2)
    if "seq_idx" not in pair or not {"initial", "final", "packed"} & set(pair)
]
ALL = ("bias", "silu", "initial", "final")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
layouts = pytest.mark.parametrize("layout", ["contiguous", "transposed"])


def conv_problem(
    dtype, names=(), b=2, d=17, l=40, width=4, layout="contiguous", weight_dtype=None, seed=0,  # noqa: E741
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    b = 1 if "packed" in names else b
    inputs = {"x": draw(b, d, l).to(dtype), "weight": draw(d, width).to(weight_dtype or dtype)}
    if "bias" in names:
        inputs["bias"] = draw(d).to(weight_dtype or dtype)
    sequences = b
    if "packed" in names:
        inputs["cu_seqlens"] = ends_of(l)
        sequences = len(inputs["cu_seqlens"]) - 1
    if "initial" in names:
        inputs["initial_states"] = draw(sequences, d, width - 1).to(dtype)
    inputs = views_of(inputs, layout)
    if "silu" in names:
        inputs["activation"] = "silu"
    if "final" in names:
        inputs["return_final_states"] = True
    if "seq_idx" in names:
        inputs["seq_idx"] = sequence_indices(b, l, seed)
    return Problem("causal_conv1d", dtype, inputs, seed, SPREADS[layout])


def sequence_indices(b, length, seed):
    """(b, length): ascending with jumps, some steps padding."""
    rng = random.Random(seed)
    rows = []
    for _ in range(b):
        row, index = [], 0
        while len(row) < length:
            index += rng.randint(0, 2)
            row += [index if rng.random() < 0.7 else -rng.randint(1, 9)] * rng.choice([1, 3, 9])
        rows.append(row[:length])
    return torch.tensor(rows, dtype=torch.int32).reshape(b, length)


# --- Sizes and options ----------------------------------------------------------------------------


@dtypes
@layouts
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(dtype, layout, width):
    for names in (ALL, ("seq_idx", "silu"), ("packed", *ALL), ()):
        for d, length in ((17, 33), (8, 70), (3, 2)):
            check(conv_problem(dtype, names, d=d, l=length, width=width, layout=layout))


@dtypes
@layouts
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("d", [1, 3, 8, 16, 17, 40])
def test_lengths(dtype, layout, length, d):
    check(conv_problem(dtype, ALL, d=d, l=length, layout=layout))
    check(conv_problem(dtype, ("bias",), d=d, l=length, layout=layout), gradients=False)


@dtypes
@layouts
@pytest.mark.parametrize("names", [ALL, ("seq_idx",), ("packed", *ALL)])
def test_long(dtype, layout, names):
    check(conv_problem(dtype, names, d=13, l=1000, layout=layout))


@pytest.mark.parametrize(("b", "d", "length"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
@pytest.mark.parametrize("names", [ALL, ("seq_idx",)])
def test_empty_sizes(b, d, length, names):
    check(conv_problem(torch.float32, names, b, d, length))


def test_no_sequences():
    out, final = scan.causal_conv1d(
        torch.zeros(1, 3, 0),
        torch.ones(3, 4),
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        return_final_states=True,
    )
    assert out.shape == (1, 3, 0)
    assert final.shape == (0, 3, 3)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_option_pairs(dtype, layout, pair):
    check(conv_problem(dtype, pair, layout=layout))


@dtypes
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=dtype_name)
@layouts
def test_weight_dtypes(dtype, weight_dtype, layout):
    check(conv_problem(dtype, ALL, weight_dtype=weight_dtype, layout=layout))


@dtypes
@pytest.mark.parametrize("seed", range(20))
def test_every_level(isa, dtype, seed):
    rng = random.Random(seed)
    names = [name for name in OPTIONS if rng.random() < 0.5]
    if "seq_idx" in names:
        names = [name for name in names if name not in ("initial", "final", "packed")]
    check(
        conv_problem(
            dtype,
            names,
            b=rng.randint(1, 3),
            d=rng.choice([1, 5, 16, 24, 33]),
            l=rng.choice([1, 9, 32, 47]),
            width=rng.choice([2, 3, 4, 4, 4, 6, 9]),
            layout=rng.choice(LAYOUTS),
            seed=seed,
        )
    )


def test_swish_is_silu():
    inputs = conv_problem(torch.float32, ("silu",)).inputs
    want = scan.causal_conv1d(**inputs)
    assert torch.equal(scan.causal_conv1d(**inputs | {"activation": "swish"}), want)


@pytest.mark.parametrize("width", [1, 4, 9])
def test_double(width):
    for names in (ALL, ("seq_idx", "silu"), ("packed", *ALL)):
        check(conv_problem(torch.float64, names, width=width))


@pytest.mark.parametrize("padded", ["left", "right", "all", "between"])
@layouts
def test_padding(padded, layout):
    problem = conv_problem(torch.float32, ("bias", "silu", "seq_idx"), l=30, layout=layout)
    idx = torch.zeros(2, 30, dtype=torch.int32)
    part = {
        "left": slice(0, 7),
        "right": slice(20, 30),
        "all": slice(0, 30),
        "between": slice(11, 13),
    }[padded]
    idx[:, part] = -1
    problem.inputs["seq_idx"] = idx
    problem.inputs["x"][:, :, part] = torch.nan  # padding may hold anything
    results = check(problem)
    assert not results["out0"][:, :, part].any()
    assert not results["dx"][:, :, part].any()


def test_seq_idx_of_any_strides():
    problem = conv_problem(torch.float32, ("seq_idx",), l=30)
    want = problem.results()
    idx = problem.inputs["seq_idx"]
    for view in (idx.T.contiguous().T, idx.repeat_interleave(3, 1)[:, ::3]):
        problem.inputs["seq_idx"] = view
        for name, got in problem.results().items():
            assert torch.equal(got, want[name])
    shared = idx[:1].expand(2, -1)
    problem.inputs["seq_idx"] = shared
    check(problem)


# --- The same in another way ----------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_equals_torch(dtype, width):
    def convolved(x, weight, bias, activation):
        padded = torch.nn.functional.pad(x, (width - 1, 0))
        out = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=x.shape[1])
        return torch.nn.functional.silu(out)

    problem = conv_problem(dtype, ("bias", "silu"), width=width)
    ours, exact = problem.results(), problem.results(convolved, double=True)
    rtol, atol = PUBLISHED[dtype]
    for name, got in ours.items():
        torch.testing.assert_close(got.double(), exact[name], rtol=rtol, atol=atol)


@dtypes
@pytest.mark.parametrize("width", [1, 2, 4, 7, 64])
@pytest.mark.parametrize("cuts", [[20], [1, 2, 33], [0, 40]])
def test_pieces_with_carried_states_equal_the_whole(dtype, width, cuts):
    def by_pieces(x, weight, bias, activation, initial_states, return_final_states):
        outs, states = [], initial_states
        for begin, end in itertools.pairwise([0, *cuts, x.shape[2]]):
            out, states = scan.causal_conv1d(
                x[..., begin:end], weight, bias, activation=activation,
                initial_states=states, return_final_states=return_final_states,
            )  # fmt: skip
            outs.append(out)
        return torch.cat(outs, -1), states

    # Gradients of what the pieces share are rounded once more.
    check(conv_problem(dtype, ALL, width=width, l=45), by_pieces, factor=4)


@dtypes
@layouts
def test_packed_sequences_equal_separate_calls(dtype, layout):
    problem = conv_problem(dtype, ("packed", *ALL), l=60, layout=layout)
    results = problem.results(gradients=False)
    given = {n: problem.inputs[n] for n in ("weight", "bias", "activation")}
    for s, (begin, end) in enumerate(itertools.pairwise(problem.inputs["cu_seqlens"].tolist())):
        out, final = scan.causal_conv1d(
            problem.inputs["x"][..., begin:end],
            **given,
            initial_states=problem.inputs["initial_states"][s : s + 1],
            return_final_states=True,
        )
        torch.testing.assert_close(results["out0"][..., begin:end], out)
        assert torch.equal(results["out1"][s], final[0])


@dtypes
@layouts
def test_packed_sequences_equal_seq_idx(dtype, layout):
    def with_seq_idx(x, cu_seqlens, **options):
        of = torch.bucketize(torch.arange(60), cu_seqlens[1:-1], right=True).int()
        return scan.causal_conv1d(x, seq_idx=of[None], **options)

    check(conv_problem(dtype, ("bias", "silu", "packed"), l=60, layout=layout), with_seq_idx)


@pytest.mark.parametrize("ends", [[0, 0, 50, 50, 50], [0, 2, 50], [0, 1, 2, 3, 50], [0, 50]])
@layouts
def test_empty_and_short_sequences(ends, layout):
    problem = conv_problem(torch.float32, ("packed", *ALL), l=50, layout=layout)
    problem.inputs["cu_seqlens"] = torch.tensor(ends, dtype=torch.int64)
    problem.inputs["initial_states"] = torch.randn(len(ends) - 1, 17, 3)
    check(problem)


# --- Extreme numbers, bits, derivatives -----------------------------------------------------------


@dtypes
@layouts
@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_states"])
def test_nan_reaches_what_depends_on_it_and_nothing_else(isa, dtype, layout, name):
    problem = conv_problem(dtype, ALL, d=21, l=37, layout=layout)
    where = {"x": (1, 12, 20), "weight": (4, 1), "bias": (20,), "initial_states": (0, 9, 1)}
    problem.inputs[name][where[name]] = torch.nan
    ours = problem.results()
    plain = problem.results(reference.causal_conv1d)
    for key, got in ours.items():
        assert torch.equal(got.isnan(), plain[key].isnan()), key
    assert ours["out0"].isnan().any()


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
@layouts
@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (ALL, (2, 40, 130, 4)),
        (("packed", *ALL), (1, 66, 300, 3)),
        (("seq_idx", "bias"), (3, 17, 70, 7)),
        (("silu",), (1, 1, 1000, 4)),
    ],
)
def test_the_bits_do_not_depend_on_the_threads(threads, dtype, gradients, layout, names, sizes):
    assert_same_bits(conv_problem(dtype, names, *sizes, layout=layout), threads, gradients)


@pytest.mark.parametrize("names", [(), ALL, ("packed", *ALL), ("seq_idx", "silu", "bias")])
@pytest.mark.parametrize("width", [1, 3, 6])
def test_gradcheck(names, width):
    assert_gradcheck(conv_problem(torch.float64, names, b=2, d=2, l=5, width=width))


# (rtol, atol) that causal-conv1d accepts of its own convolution against its float32 reference.
PUBLISHED = {
    torch.float32: (3e-4, 1e-3),
    torch.bfloat16: (1e-2, 5e-2),
    torch.float16: (3e-3, 5e-3),
}


@dtypes
@layouts
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("names", [ALL, ("bias", "silu"), ("seq_idx", "bias"), ()])
def test_published_tolerances(dtype, layout, width, names):
    problem = conv_problem(dtype, names, b=2, d=72, l=151, width=width, layout=layout)
    for name in ("weight", "bias"):
        if name in problem.inputs:
            problem.inputs[name] = problem.inputs[name].float()
    ours = problem.results()
    want = problem.results(reference.causal_conv1d, double=True)
    rtol, atol = PUBLISHED[dtype]
    for name, got in ours.items():
        at_least = 1e-3 if name in ("dweight", "dbias") else 0
        torch.testing.assert_close(
            got.double(), want[name], rtol=max(rtol, at_least), atol=max(atol, at_least)
        )
