# SPDX-License-Identifier: Apache-2.0
"""The values and gradients of attention over head dimensions, lengths and dtypes."""

import random

import pytest

torch = pytest.importorskip("torch")

from attention_cases import DTYPES, Case, Sizes, check, dtype_name  # noqa: E402

DIMS = [1, 8, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256, 512]
LENGTHS = [
    (1, 1), (1, 239), (3, 799), (17, 64), (64, 17), (64, 64), (108, 256), (113, 203), (128, 217),
    (127, 512), (127, 513), (200, 100), (256, 512), (333, 65), (512, 256), (129, 129),
]  # fmt: skip
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def sampled(what, count, *key):
    return random.Random(repr(key)).sample(what, count)


@dtypes
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(dtype, dim, causal):
    for sq, sk in sampled(LENGTHS, 2, dtype_name(dtype), dim, causal):
        check(Case(dtype, Sizes(1, 2, 1, sq, sk, dim, dim), causal=causal))


@dtypes
@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_lengths(dtype, sq, sk, causal):
    check(Case(dtype, Sizes(2, 2, 2, sq, sk, 64, 64), causal=causal))


@dtypes
@pytest.mark.parametrize("dim", DIMS)
def test_values_of_another_size(dtype, dim):
    (value_dim,) = sampled([d for d in DIMS if d != dim], 1, dtype_name(dtype), dim)
    check(Case(dtype, Sizes(1, 2, 1, 70, 130, dim, value_dim), causal=True))


@dtypes
@pytest.mark.parametrize("dim", [1, 40, 64, 111, 128, 256])
def test_every_level(isa, dtype, dim):
    for sq, sk in ((1, 300), (5, 70), (150, 131)):
        check(Case(dtype, Sizes(1, 4, 2, sq, sk, dim, dim), causal=True))


@dtypes
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("sq", [1, 90])
def test_groups_of_heads(dtype, group, sq):
    check(Case(dtype, Sizes(2, 2 * group, 2, sq, 130, 32, 32), causal=True))


@dtypes
def test_large_and_small_scores(dtype):
    # The largest score of a row is about 300, others lie far below it.
    check(Case(dtype, Sizes(1, 2, 1, 70, 200, 64, 64), scale=10.0))
    check(Case(dtype, Sizes(1, 2, 1, 70, 200, 64, 64), scale=-10.0))
    check(Case(dtype, Sizes(1, 2, 1, 70, 200, 64, 64), scale=1e-6))
    check(Case(dtype, Sizes(1, 2, 1, 70, 200, 64, 64), scale=0.0))


@pytest.mark.parametrize("causal", [False, True])
def test_double(causal):
    check(Case(torch.float64, Sizes(2, 4, 2, 33, 70, 20, 12), causal=causal))


@dtypes
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("sq", "sk"), [(1, 70), (150, 200), (1, 3000)])
def test_the_bits_do_not_depend_on_the_threads(threads, dtype, gradients, sq, sk):
    case = Case(dtype, Sizes(2, 4, 2, sq, sk, 64, 64), causal=True)
    threads(1)
    want = case.results(gradients=gradients)
    for count in (2, 3):
        threads(count)
        for name, got in case.results(gradients=gradients).items():
            assert torch.equal(got, want[name]), (name, count)
