# SPDX-License-Identifier: Apache-2.0
"""Every option of attention, alone and in pairs, with gradients; its edges; its memory."""

import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from attention_cases import (  # noqa: E402
    DTYPES,
    OPTIONS,
    Case,
    Sizes,
    assert_as_close,
    check,
    dtype_name,
)
from cases import run_python  # noqa: E402

from pentad.attention import BlockMask, attention, reference  # noqa: E402

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
all_dtypes = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)


def pairs():
    """Pairs of options that do not set the same argument, each with a dtype in turn."""
    argument = {
        "top_left": "causal",
        "shared_bias": "bias",
        "key_only_bias": "bias",
        "mask": "bias",
        "kv_key_bias": "key_bias",
        "batch_alibi": "alibi",
    }
    turns = itertools.cycle(DTYPES)
    for a, b in itertools.combinations(OPTIONS, 2):
        if argument.get(a, a) != argument.get(b, b):
            dtype = next(turns)
            yield pytest.param(a, b, dtype, id=f"{a}-{b}-{dtype_name(dtype)}")


# --- The definition -------------------------------------------------------------------------------


def test_philox_gives_the_known_words():
    # Random123's known answers for philox4x32-10: key (low word first), counter, words.
    ones, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for key, counter, want in (
        ((0, 0), (0,) * 4, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones), (ones,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0xA4093822, 0x299F31D0), pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        words = reference.philox(key[0] + (key[1] << 32), *(np.uint64(c) for c in counter))
        assert [int(word) for word in words] == list(want)


def test_dropout_mask_is_the_documented_bit():
    mask = reference.dropout_mask(99, 2, 3, 5, 7, 0.4)
    assert mask.shape == (2, 3, 5, 7)
    for b, h, i, j in itertools.product(range(2), range(3), range(5), range(7)):
        words = reference.philox(99, *(np.uint64(c) for c in (j // 4, i, b * 3 + h, 0)))
        assert bool(mask[b, h, i, j]) == (int(words[j % 4]) >= 0.4 * 2**32)


def test_the_reference_equals_torch():
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64).unbind()
    bias = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(
        reference.attention(q, k, v, causal=True), sdpa(q, k, v, is_causal=True)
    )
    torch.testing.assert_close(reference.attention(q, k, v, bias=bias), sdpa(q, k, v, bias))
    torch.testing.assert_close(
        reference.attention(q, k[:, :2], v[:, :2], bias=bias > 0),
        sdpa(q, k[:, :2], v[:, :2], bias > 0, enable_gqa=True),
    )


def test_the_reference_element_by_element():
    s = Sizes(1, 2, 1, 3, 5, 4, 2)
    names = ("window", "bias", "kv_key_bias", "softcap", "batch_alibi", "sink")
    case = Case(torch.float64, s, names, window=(2, 1))
    q, k, v = (case.inputs[n][0] for n in "qkv")
    o = {n: t for n, t in case.options.items()}
    out, lse, mass = reference.attention(
        *case.inputs.values(), return_lse=True, return_key_mass=True, **o
    )
    for h in range(2):
        masses = [0.0] * 5
        for i in range(3):
            place, z, weights = i + 5 - 3, math.exp(o["sink"][h]), {}
            for j in range(max(0, place - 2), min(5, place + 2)):
                x = sum(float(q[h, i, d] * k[0, j, d]) for d in range(4)) * 4**-0.5
                x = 1.5 * math.tanh(x / 1.5) + float(o["bias"][0, h, i, j])
                x += float(o["key_bias"][0, 0, j])
                x -= float(o["alibi_slopes"][0, h]) * abs(place - j)
                weights[j] = math.exp(x)
            z += sum(weights.values())
            assert float(lse[0, h, i]) == pytest.approx(math.log(z))
            for d in range(2):
                want = sum(w / z * float(v[0, j, d]) for j, w in weights.items())
                assert float(out[0, h, i, d]) == pytest.approx(want)
            for j, w in weights.items():
                masses[j] += w / z
        assert mass[0, h].tolist() == pytest.approx(masses)


# --- Options, alone and in pairs ------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@dtypes
def test_each_option_at_every_level(isa, name, dtype):
    check(Case(dtype, names=[name]))


@pytest.mark.parametrize("name", OPTIONS)
@dtypes
def test_each_option_with_few_queries(name, dtype):
    check(Case(dtype, Sizes(2, 8, 2, 1, 300, 64, 64), [name]))
    check(Case(dtype, Sizes(1, 6, 3, 5, 140, 40, 59), [name]))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("sq", "sk"), [(150, 70), (300, 290)])
def test_each_option_with_other_lengths(name, sq, sk):
    check(Case(torch.float32, Sizes(1, 2, 2, sq, sk, 64, 64), [name]))


@pytest.mark.parametrize("name", OPTIONS)
@dtypes
def test_each_option_with_many_short_sequences(name, dtype):
    check(Case(dtype, Sizes(4, 6, 2, 29, 70, 24, 16), [name]))


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_in_double(name):
    check(Case(torch.float64, Sizes(2, 4, 2, 21, 40, 9, 7), [name]))


@pytest.mark.parametrize(("a", "b", "dtype"), list(pairs()))
def test_pairs_of_options(a, b, dtype):
    check(Case(dtype, names=[a, b]))


@dtypes
def test_many_options_at_once(isa, dtype):
    names = [
        "causal", "window", "bias", "kv_key_bias", "block_mask",
        "softcap", "batch_alibi", "sink", "dropout", "scale",
    ]  # fmt: skip
    check(Case(dtype, names=names))


@dtypes
@pytest.mark.parametrize("left", [None, 0, 7, 1000])
@pytest.mark.parametrize("right", [None, 0, 7, 1000])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_windows(dtype, left, right, causal):
    for sq, sk in ((70, 150), (150, 70)):
        sizes = Sizes(1, 2, 1, sq, sk, 16, 16)
        check(Case(dtype, sizes, window=(left, right), causal=causal), gradients=left == 7)


@dtypes
@pytest.mark.parametrize(
    "shape",
    [
        *((70, 150), (1, 150), (70, 1), (1, 1), (4, 70, 150), (4, 1, 150), (2, 4, 70, 150)),
        *((2, 1, 70, 1), (1, 4, 1, 1), (2, 1, 1, 150), (1, 1, 70, 150), (2, 4, 1, 1)),
    ],
)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_biases_broadcast(dtype, shape, kind):
    bias = torch.randn(shape)
    bias = bias > -1 if kind == torch.bool else bias.to(kind)
    case = Case(dtype, bias=bias)
    if kind == torch.bool:
        check(case)
        return
    got = case.results()
    case.options["bias"] = bias.float()
    plain = case.results(reference.attention)
    exact = case.results(reference.attention, torch.float64)
    assert got["dbias"].dtype == kind
    assert got["dbias"].shape == shape
    # The gradient of the bias is rounded to its dtype.
    coarser = kind if torch.finfo(kind).eps > torch.finfo(dtype).eps else dtype
    for name, value in got.items():
        rounded = coarser if name == "dbias" else dtype
        assert_as_close(name, value, plain[name], exact[name], 3, rounded)


# --- Dropout --------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("p", [0.01, 0.5, 0.9])
@pytest.mark.parametrize(("sq", "sk"), [(130, 150), (1, 200), (3, 5)])
def test_dropout_drops_what_the_reference_drops(isa, dtype, p, sq, sk):
    q, k = torch.randn(2, 4, sq, 8).to(dtype), torch.randn(2, 2, sk, 8).to(dtype)
    v = torch.eye(sk).expand(2, 2, sk, sk).to(dtype)  # the output is the matrix of weights
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(11)))
    keep = reference.dropout_mask(seed, 2, 4, sq, sk, p)
    out = attention(q, k, v, dropout_p=p, generator=torch.Generator().manual_seed(11))
    assert torch.equal(out != 0, keep)
    weights = attention(q, k, v)
    torch.testing.assert_close(out * (1 - p), weights * keep, atol=1e-5, rtol=2e-2)


def test_dropout_follows_its_generator():
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()

    def drawn(seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return attention(q, k, v, dropout_p=0.5, generator=generator)

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))
    torch.manual_seed(5)
    first, second = drawn(), drawn()
    torch.manual_seed(5)
    assert torch.equal(drawn(), first)
    assert not torch.equal(first, second)


# --- Rows that see nothing, and values that are not finite ----------------------------------------


@all_dtypes
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("how", ["causal", "mask", "block_mask", "window", "minus_infinity"])
def test_rows_that_see_nothing(isa, dtype, sink, how):
    sq, sk = (150, 70) if how == "causal" else (70, 150)
    options, blind = {}, torch.zeros(sq, dtype=torch.bool)
    if how == "causal":
        options, blind[: sq - sk] = {"causal": True}, True
    elif how == "window":
        sq, sk = 150, 70
        blind = torch.arange(sq) >= sk + 4
        options = {"window": (4, 4), "causal": "top_left"}
    else:
        mask = torch.ones(sq, sk, dtype=torch.bool)
        mask[3], mask[16:32], mask[60:] = False, False, False
        blind = ~mask.any(1)
        options["bias"] = mask
        if how == "block_mask":
            options = {"block_mask": BlockMask.from_dense(mask, q_block=16, k_block=16)}
        elif how == "minus_infinity":
            options["bias"] = torch.zeros(sq, sk).masked_fill(~mask, -math.inf)
    if sink:
        options["sink"] = torch.tensor([0.5, -1.0, 2.0, 0.0])
    case = Case(dtype, Sizes(2, 4, 2, sq, sk, 24, 16), **options)
    found = check(case)
    assert blind.any()
    assert not blind.all()
    assert (found["out"][:, :, blind] == 0).all()
    assert (found["dq"][:, :, blind] == 0).all()
    want = options["sink"][:, None] if sink else torch.tensor(-math.inf)
    want = want.to(found["lse"].dtype).expand(found["lse"][:, :, blind].shape)
    torch.testing.assert_close(found["lse"][:, :, blind], want, atol=5e-6, rtol=1e-6)
    assert all(not t.isnan().any() for t in found.values())


@all_dtypes
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(("sq", "sk"), [(0, 9), (9, 0), (0, 0)])
def test_no_queries_or_no_keys(dtype, sink, sq, sk):
    names = ["bias", "key_bias", "causal"] + ["sink"] * sink
    found = Case(dtype, Sizes(2, 4, 2, sq, sk, 8, 3), names).results()
    assert found["out"].shape == (2, 4, sq, 3)
    assert (found["out"] == 0).all()
    assert found["lse"].shape == (2, 4, sq)
    assert found["key_mass"].shape == (2, 4, sk)
    assert (found["key_mass"] == 0).all()
    if not sink:
        assert (found["lse"] == -math.inf).all()
    for name in ("dq", "dk", "dv", "dbias", "dkey_bias"):
        assert (found[name] == 0).all()


def test_no_batch():
    found = Case(torch.float32, Sizes(0, 4, 2, 5, 6, 8, 3), ["bias", "sink"]).results()
    assert found["out"].shape == (0, 4, 5, 3)
    assert (found["dsink"] == 0).all()


@all_dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sq", [70, 2])
def test_keys_that_no_query_sees_may_hold_anything(isa, dtype, bad, sq):
    # Left of the window, between blocks, masked one by one, and beyond the causal edge.
    mask = torch.rand(sq, 150) < 0.5
    mask[:, 40:50], mask[:, 96:128], mask[:, 10] = False, False, True
    for options in (
        {"bias": mask},
        {"block_mask": BlockMask.from_dense(mask, q_block=16, k_block=32)},
        {"window": (30, 0)},
        {"window": (0, 30), "causal": "top_left"},
        {"causal": "top_left"},
    ):
        seen = reference.visible(sq, 150, **options).expand(1, 1, sq, 150)[0, 0].any(0)
        if seen.all():
            continue
        clean = Case(dtype, Sizes(2, 4, 2, sq, 150, 24, 16), softcap=2.0, **options)
        dirty = Case(dtype, Sizes(2, 4, 2, sq, 150, 24, 16), softcap=2.0, **options)
        for name in "kv":
            dirty.inputs[name][:, :, ~seen] = bad
        want = clean.results()
        for name, got in dirty.results().items():
            finite = want[name][want[name].isfinite()].double()
            atol = 16 * torch.finfo(dtype).eps * float(finite.abs().max())
            torch.testing.assert_close(got, want[name], atol=atol, rtol=0)


@all_dtypes
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("sq", [70, 2])
def test_nan_reaches_what_sees_it_and_nothing_else(isa, dtype, where, sq):
    case = Case(dtype, Sizes(1, 2, 1, sq, 150, 24, 16), ["causal"])
    case.inputs[where][0, 0, -2 if where == "q" else 149, 3] = math.nan
    found, exact = case.results(), case.results(reference.attention, torch.float64)
    for name, got in found.items():
        assert torch.equal(got.isnan(), exact[name].isnan()), name
        assert got.isnan().any() or (where == "v" and name in ("lse", "key_mass", "dv"))


@dtypes
def test_infinities_inside(dtype):
    # A bias of +inf makes the row's sum infinite; an infinite value is passed on.
    q, k, v = torch.randn(3, 1, 1, 4, 8).to(dtype).unbind()
    v[0, 0, 2, 5] = math.inf
    bias = torch.zeros(4, 4)
    bias[1, 3] = math.inf
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    assert lse[0, 0, 1] == math.inf
    assert out[0, 0, 1].isnan().all()
    assert (out[0, 0, [0, 2, 3], 5] == math.inf).all()
    assert out[0, 0, [0, 2, 3]][:, [0, 1, 2, 3, 4, 6, 7]].isfinite().all()


# --- Layouts --------------------------------------------------------------------------------------


def laid_out(tensor, how):
    """The same numbers with other strides."""
    if how == "bshd":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "apart":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if how == "dim_first":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert how == "odd_start"
    flat = tensor.new_full((tensor.numel() + 3,), math.nan)
    flat[3:] = tensor.flatten()
    return flat[3:].view(tensor.shape)


@all_dtypes
@pytest.mark.parametrize("how", ["bshd", "apart", "dim_first", "odd_start"])
@pytest.mark.parametrize("sq", [70, 1])
def test_strides_do_not_change_a_bit(dtype, how, sq):
    case = Case(dtype, Sizes(2, 4, 2, sq, 150, 24, 16), ["bias", "key_bias", "causal"])
    want = case.results()
    for name in case.inputs:
        case.inputs[name] = laid_out(case.inputs[name], how)
    case.options["bias"] = laid_out(case.options["bias"], how)
    case.options["key_bias"] = laid_out(case.options["key_bias"], how)
    case.upstream[0] = laid_out(case.upstream[0], how)
    for name, got in case.results().items():
        assert torch.equal(got, want[name]), name


@all_dtypes
@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_expanded_inputs(dtype, dimension):
    case = Case(dtype, Sizes(2, 4, 2, 70, 150, 24, 16), ["bias", "key_bias"])
    plain = Case(dtype, Sizes(2, 4, 2, 70, 150, 24, 16), ["bias", "key_bias"])
    for tensors, copies in ((case.inputs, plain.inputs), (case.options, plain.options)):
        for name, tensor in tensors.items():
            if dimension < tensor.ndim:
                one = tensor.narrow(dimension, 0, 1)
                tensors[name] = one.expand(tensor.shape)
                copies[name] = tensors[name].contiguous()
    case.upstream[0] = case.upstream[0].narrow(dimension, 0, 1).expand(case.upstream[0].shape)
    plain.upstream[0] = case.upstream[0].contiguous()
    want = plain.results()
    for name, got in case.results().items():
        assert torch.equal(got, want[name]), name


def test_gradients_reach_results_one_by_one():
    case = Case(torch.float32, names=["causal", "sink", "softcap"])
    for chosen in ([0], [1], [2], [0, 1], [1, 2]):
        for n, upstream in enumerate(case.upstream):
            upstream.zero_() if n not in chosen else upstream.normal_()
        check(case)

        q, k, v = (t.clone().requires_grad_() for t in case.inputs.values())
        found = attention(q, k, v, return_lse=True, return_key_mass=True, **case.options)
        some = [found[n] for n in chosen], [case.upstream[n] for n in chosen]
        want = case.results()
        for name, got in zip("qkv", torch.autograd.grad(some[0], (q, k, v), some[1]), strict=True):
            torch.testing.assert_close(got, want[f"d{name}"])


# --- Packed sequences -----------------------------------------------------------------------------


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@all_dtypes
@pytest.mark.parametrize("names", [[], ["causal"], ["window"], ["softcap", "sink"], ["dropout"]])
def test_packed_sequences(isa, dtype, names):
    q_lengths, k_lengths = [70, 0, 1, 33, 0, 5], [150, 4, 90, 20, 0, 0]
    sizes = Sizes(1, 4, 2, sum(q_lengths), sum(k_lengths), 24, 16)
    case = Case(dtype, sizes, names)
    for name, tensor in case.inputs.items():
        case.inputs[name] = tensor[0].transpose(0, 1)
    case.upstream = [case.upstream[0][0].transpose(0, 1), *(u[0] for u in case.upstream[1:])]
    case.options["key_bias"] = torch.randn(2, sizes.sk)
    case.options["alibi_slopes"] = torch.rand(len(q_lengths), 4)
    case.options["cu_seqlens_q"] = packed(q_lengths).int()
    case.options["cu_seqlens_k"] = packed(k_lengths)
    found = check(case)
    assert found["out"].shape == (sizes.sq, 4, 16)
    assert found["lse"].shape == (4, sizes.sq)
    assert found["key_mass"].shape == (4, sizes.sk)


@dtypes
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_packed_equals_one_by_one(dtype, causal):
    q_lengths, k_lengths = [70, 33, 1, 130], [150, 20, 90, 130]
    q = torch.randn(sum(q_lengths), 4, 40).to(dtype)
    k, v = torch.randn(2, sum(k_lengths), 2, 40).to(dtype).unbind()
    cu_q, cu_k = packed(q_lengths), packed(k_lengths)
    out = attention(q, k, v, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for n in range(len(q_lengths)):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        one = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys]))
        want = attention(*one, causal=causal)[0].transpose(0, 1)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out[rows], want, atol=4 * eps, rtol=4 * eps)


def test_no_sequences_at_all():
    nothing = torch.zeros(1, dtype=torch.int32)
    q, k, v = torch.zeros(3, 0, 2, 8).unbind()
    out = attention(q, k, v, cu_seqlens_q=nothing, cu_seqlens_k=nothing)
    assert out.shape == (0, 2, 8)


# --- Threads and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@dtypes
def test_the_bits_do_not_depend_on_the_threads(threads, dtype, name):
    for sizes in (Sizes(2, 4, 2, 150, 200, 24, 16), Sizes(4, 4, 2, 40, 50, 16, 8)):
        case = Case(dtype, sizes, [name])
        threads(1)
        want = case.results()
        for count in (2, 3):
            threads(count)
            for result, got in case.results().items():
                assert torch.equal(got, want[result]), (result, count)


def test_memory_grows_with_the_length_only():
    # One matrix of scores would have 268 MB; inputs, results and gradients have 2 MB each.
    grown = run_python(
        """
        import resource, torch
        from pentad.attention import BlockMask, attention
        torch.set_num_threads(1)
        options = (
            lambda n: {},
            lambda n: {"causal": True},
            lambda n: {
                "dropout_p": 0.1,
                "key_bias": torch.randn(1, 2, n, requires_grad=True),
                "softcap": 5.0,
            },
            lambda n: {
                "block_mask": BlockMask.sliding_window(n, window=(500, 0)),
                "return_key_mass": True,
            },
            lambda n: {
                "window": (300, 300),
                "sink": torch.zeros(2),
                "alibi_slopes": torch.ones(2),
            },
        )
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        def step(n, option):
            q, k, v = torch.randn(3, 1, 2, n, 32).unbind()
            q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
            found = attention(q, k, v, **option(n))
            out = found[0] if isinstance(found, tuple) else found
            out.sum().backward()
        for option in options:
            step(300, option)
        before = peak()
        for option in options:
            step(8192, option)
            print(peak() - before)
        """
    )
    assert all(int(line) < 80_000 for line in grown.split()), grown  # KiB, after each option


@dtypes
@pytest.mark.parametrize("sq", [1, 90])
def test_infinite_and_strided_sinks(dtype, sq):
    q, k, v = (torch.randn(1, 4, n, 16, dtype=dtype) for n in (sq, 50, 50))
    infinity = torch.tensor(math.inf)
    out, lse = attention(q, k, v, sink=infinity.expand(4), return_lse=True)
    assert (out == 0).all()
    assert (lse == math.inf).all()
    plain = attention(q, k, v, sink=(-infinity).expand(4))
    assert torch.equal(plain, attention(q, k, v, sink=torch.full((8,), -math.inf)[::2]))
    torch.testing.assert_close(plain, attention(q, k, v))


@dtypes
def test_nearly_all_dropped(dtype):
    q = torch.randn(1, 2, 40, 16, dtype=dtype)
    assert not attention(q, q, q, dropout_p=1 - 1e-9).isnan().any()


@dtypes
@pytest.mark.parametrize("dim", [7, 16, 32, 80, 96, 111, 160])
def test_values_of_any_width_with_few_queries(isa, dtype, dim):
    check(Case(dtype, Sizes(1, 4, 2, 2, 150, 32, dim)))


@dtypes
def test_many_rows_share_many_keys(dtype):
    check(Case(dtype, Sizes(1, 20, 1, 2, 1300, 16, 16), causal=True), gradients=False)


def test_keys_that_no_query_sees_are_not_read():
    q, k, v = torch.randn(1, 2, 40, 16), *torch.randn(2, 1, 2, 3000, 16)
    out = attention(q, k, v, window=(100, 0), causal=True)
    k[:, :, :2800] = v[:, :, :2800] = math.nan
    assert torch.equal(out, attention(q, k, v, window=(100, 0), causal=True))
