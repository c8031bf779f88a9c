# SPDX-License-Identifier: Apache-2.0
"""The sparse functions on a CUDA device, against themselves on the CPU. `make test-gpu`."""

import functools

import pytest
from gpu import (
    assert_equal,
    check_captured,
    check_gradients,
    check_mixed_devices,
    check_repeats,
    check_results,
    check_streams,
    check_two_devices,
    needs_gpu,
    needs_two_gpus,
    on_gpu,
)

import pentad
from pentad import sparse as S

torch = pytest.importorskip("torch")
pytestmark = needs_gpu

WIDTHS = ("float32", "bfloat16", "float16")
TOLERANCE = {
    "float32": {"rtol": 1e-4, "atol": 1e-5},
    "bfloat16": {"rtol": 2e-2, "atol": 2e-2},
    "float16": {"rtol": 4e-3, "atol": 4e-3},
}

# --- The SPLADE head ------------------------------------------------------------------------------


def head(rng, b=4, length=19, dim=48, vocab=300, dtype="float32"):
    """hidden, weight, bias, mask; the first sequence has no token."""
    mask = torch.from_numpy(rng.random((b, length)) < 0.6)
    mask[0] = False
    arrays = (rng.standard_normal(shape) for shape in ((b, length, dim), (vocab, dim), (vocab,)))
    hidden, weight, bias = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in arrays)
    return hidden, weight / dim**0.5, bias, mask


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("size", [(2, 3, 5, 7), (3, 200, 64, 513), (40, 9, 1100, 20)])
def test_same_results_splade_head(rng, dtype, pooling, size):
    call = functools.partial(S.splade_head, pooling=pooling)
    inputs = head(rng, *size, dtype=dtype)
    check_results(call, inputs, **TOLERANCE[dtype])
    if dtype == "float32":  # a near tie in fewer bits may go to another token
        check_gradients(call, inputs, rtol=1e-3, atol=1e-4)


def test_same_results_splade_head_of_any_strides(rng):
    hidden, weight, bias, mask = head(rng)
    turned = hidden.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T
    check_results(S.splade_head, (*turned, bias[::2].repeat_interleave(2), mask), rtol=1e-4)


def test_splade_head_repeats_and_runs_anywhere(rng):
    first, second = head(rng), head(rng)
    check_repeats(S.splade_head, first)
    check_streams(S.splade_head, first, second, **TOLERANCE["float32"])
    check_captured(S.splade_head, first, second, **TOLERANCE["float32"])
    check_mixed_devices(S.splade_head, first)
    with pytest.raises(pentad.DeviceError, match="float64"):
        S.splade_head(*(x.double() for x in on_gpu(first)[:3]))


def test_a_mask_of_other_numbers_gives_nan(rng):
    hidden, weight, bias, mask = on_gpu(head(rng))
    mask = mask.float()
    mask[1, 2] = 0.5
    out = S.splade_head(hidden, weight, bias, mask)
    assert out[1].isnan().all()
    assert not out[2:].isnan().any()


@needs_two_gpus
def test_two_devices(rng):
    check_two_devices(S.splade_head, head(rng), **TOLERANCE["float32"])


def test_large_heads(rng):
    """More than one tile of everything, against torch on the device."""
    hidden, weight, bias, mask = on_gpu(head(rng, 8, 300, 768, 30522, "bfloat16"))
    got = S.splade_head(hidden, weight, bias, mask)
    for b in range(8):
        logits = hidden[b].float() @ weight.float().T + bias.float()
        want = torch.log1p(logits.relu())[mask[b]]
        want = want.amax(0) if len(want) else torch.zeros(30522, device="cuda")
        torch.testing.assert_close(got[b].float(), want, rtol=2e-2, atol=2e-2)


# --- Scores ---------------------------------------------------------------------------------------


def rows(rng, n, vocab=200, most=40, dtype="float32"):
    """indptr, terms and values, terms in any order, some twice."""
    sizes = rng.integers(0, most, n)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.from_numpy(sizes.cumsum())])
    terms = torch.from_numpy(rng.integers(0, vocab, int(indptr[-1])))
    values = torch.from_numpy(rng.standard_normal(int(indptr[-1])))
    return indptr, terms, values.to(getattr(torch, dtype))


def score(q_indptr, q_terms, q_values, d_indptr, d_terms, d_values, pairs=None, vocab=200):
    queries, docs = (q_indptr, q_terms, q_values, vocab), (d_indptr, d_terms, d_values, vocab)
    return S.score(queries, docs, pairs=pairs)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("paired", [False, True])
def test_same_results_score(rng, dtype, paired):
    inputs = (*rows(rng, 70, dtype=dtype), *rows(rng, 45, dtype=dtype))
    if paired:
        inputs = (*inputs, torch.from_numpy(rng.integers(0, 45, (60, 2))))
    check_results(score, inputs, rtol=0, atol=0)
    check_gradients(score, inputs, **TOLERANCE[dtype])


def test_same_results_score_of_any_vocabulary(rng):
    wide = functools.partial(score, vocab=2**31 - 1)
    check_results(wide, (*rows(rng, 7), *rows(rng, 9)), rtol=0, atol=0)


def canonical(rng, n):
    indptr = torch.arange(n + 1) * 20
    terms = [torch.from_numpy(rng.choice(200, 20, replace=False)).sort()[0] for _ in range(n)]
    return indptr, torch.cat(terms), torch.from_numpy(rng.standard_normal(20 * n)).float()


def test_score_repeats_and_runs_anywhere(rng):
    first, second = ((*canonical(rng, 40), *canonical(rng, 300)) for _ in range(2))
    check_repeats(score, first)
    check_streams(score, first, second, rtol=0, atol=0)
    check_captured(score, first, second, rtol=0, atol=0)
    with pytest.raises(pentad.DeviceError):
        score(*on_gpu(first[:3]), *first[3:])
    with pytest.raises(ValueError, match="queries"):
        score(*on_gpu((*first[:2], first[2] * torch.nan, *first[3:])))


# --- The largest of each row ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(3, 1, 1), (5, 700, 9), (2, 3000, 2000)])
def test_same_results_topk(rng, dtype, absolute, n, d, k):
    x = torch.from_numpy(rng.integers(-50, 50, (n, d)) / 8).to(getattr(torch, dtype))
    for call in (S.topk_sparsify, S.topk_codes):
        chosen = functools.partial(call, k=k, absolute=absolute)
        check_results(chosen, (x,), rtol=0, atol=0)
        check_results(chosen, (x.T.contiguous().T,), rtol=0, atol=0)
        check_gradients(chosen, (x,), rtol=0, atol=0)


# --- Search ---------------------------------------------------------------------------------------


def test_same_results_search(rng):
    index = S.SparseIndex(200)
    indptr, terms, values = rows(rng, 9000)
    index.add((indptr, terms, values.abs()))
    queries = rows(rng, 6)
    keep = rng.random(9000) < 0.5
    there = index.to("cuda")
    for k in (1, 30, 2000):
        for chosen in (None, keep):
            got = there.search(on_gpu(queries), k, filter=chosen)
            assert_equal(got, index.search(queries, k, filter=chosen), rtol=0, atol=0)
    with pytest.raises(pentad.DeviceError):
        there.search(queries, 3)
