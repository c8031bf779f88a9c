# SPDX-License-Identifier: Apache-2.0
"""The pq functions on a CUDA device, against themselves on the CPU. `make test-gpu`."""

import numpy as np
import pytest
from cases import LAYOUTS, laid_out
from gpu import (
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
from pentad import pq

torch = pytest.importorskip("torch")
pytestmark = needs_gpu

DTYPES = ("float32", "float16", "bfloat16")
INTEGERS = ("uint8", "int8", "uint16", "int16", "int32", "int64")
COMBINATIONS = ("concat", "sum", "mean", "product")
SUMS = {"rtol": 1e-4, "atol": 1e-4}  # of float32, in another order


def floats(rng, *shape, dtype="float32"):
    return torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, dtype))


def codes_below(rng, n, *sizes, dtype="int64"):
    columns = [rng.integers(0, size, n) for size in sizes]
    return torch.from_numpy(np.stack(columns, 1)).to(getattr(torch, dtype))


# --- Lookups and scores ---------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["", "weights", "offsets", "weights offsets"])
def test_same_results_of_lookup(rng, combine, dtype, options):
    for sizes, width in (((5, 9, 70), 8), ((4,), 3), ((3,) * 70, 5)):
        codes, tables = codes_below(rng, 300, *sizes), [floats(rng, k, width) for k in sizes]
        tables = [t.to(getattr(torch, dtype)) for t in tables]
        weights = floats(rng, 300, len(sizes)) if "weights" in options else None
        offsets = torch.arange(0, 300, 7) if "offsets" in options else None

        def call(codes, tables, weights, offsets):
            return pq.lookup(codes, tables, combine=combine, weights=weights, offsets=offsets)

        inputs = (codes, tables, weights, offsets)
        check_results(call, inputs, rtol=0, atol=0)
        tolerance = SUMS if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
        check_gradients(call, inputs, **tolerance)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_results_of_every_code(rng, dtype, layout):
    codes = laid_out(codes_below(rng, 50, 9, 9).numpy().astype(dtype), layout)
    tables = laid_out(floats(rng, 2, 9, 4).numpy(), layout)
    queries = laid_out(floats(rng, 3, 8).numpy(), layout)
    check_results(pq.lookup, (codes, tables))
    check_results(lambda *a: pq.lookup(*a, combine="sum"), (codes, tables))
    for metric in ("l2", "ip", "cosine"):
        check_results(lambda *a: pq.adc(*a, metric=metric), (queries, codes, tables))  # noqa: B023


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize(("nq", "n", "levels"), [(1, 3000, 256), (7, 90, 16), (3, 400, 3000)])
def test_same_results_of_scores(rng, metric, nq, n, levels):
    inputs = floats(rng, nq, 12), codes_below(rng, n, *[levels] * 3), floats(rng, 3, levels, 4)
    check_results(lambda *a: pq.adc(*a, metric=metric), inputs)
    check_gradients(lambda *a: pq.adc(*a, metric=metric), inputs, **SUMS)
    check_results(lambda *a: pq.topk_adc(*a, 20, metric=metric), inputs)
    mask = torch.from_numpy(rng.random(n) < 0.5)
    check_results(lambda *a: pq.topk_adc(*a[:3], 20, metric=metric, mask=a[3]), (*inputs, mask))


def test_codes_without_rows(rng):
    codes, tables = codes_below(rng, 40, 5, 5), floats(rng, 2, 5, 3)
    codes[7, 1], codes[9, 0] = 5, -1
    out = pq.lookup(*on_gpu((codes, tables)))
    lost = out.isnan().cpu().view(40, 2, 3).any(-1)
    assert lost.nonzero().tolist() == [[7, 1], [9, 0]]


def test_many_codes(rng):
    codes = codes_below(rng, 200_000, *[256] * 8, dtype="uint8")
    tables = floats(rng, 8, 256, 16)
    check_results(pq.lookup, (codes, tables))
    check_gradients(pq.lookup, (codes, tables), rtol=1e-3, atol=1e-3)


# --- Assignment -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_same_results_of_assignment(rng, metric, dtype, ties):
    for n, count, levels, width in ((300, 3, 20, 4), (65, 1, 300, 40), (4, 2, 256, 17)):
        x, books = floats(rng, n, count * width), floats(rng, count, levels, width)
        if ties:
            x, books = x.round(), books.round()
        inputs = x.to(getattr(torch, dtype)), books.to(getattr(torch, dtype))
        check_results(lambda *a: pq.assign(*a, metric=metric), inputs)
        check_results(lambda *a: pq.assign(*a, metric=metric, top=7), inputs)
    x, books = floats(rng, 90, 6, dtype=dtype), floats(rng, 3, 40, 6, dtype=dtype)
    for form in ("residual", "grouped"):
        check_results(lambda *a: pq.assign(*a, metric=metric, form=form), (x, books))  # noqa: B023


@pytest.mark.parametrize("form", ["product", "residual", "grouped"])
@pytest.mark.parametrize("estimator", ["ste", "rotation", "none"])
def test_same_results_of_quantization(rng, form, estimator):
    inputs = floats(rng, 90, 8), floats(rng, 2, 30, 4 if form == "product" else 8)

    def call(*arguments):
        return tuple(pq.quantize(*arguments, form=form, estimator=estimator))

    check_results(call, inputs)
    check_gradients(call, inputs, **SUMS)


def test_many_vectors(rng):
    inputs = floats(rng, 50_000, 64), floats(rng, 4, 1024, 16)
    check_results(pq.assign, inputs)


# --- Codes ----------------------------------------------------------------------------------------


def test_same_results_of_integers(rng):
    for nbits in (1, 4, 5, 8, 12, 16):
        codes = codes_below(rng, 60, *[2**nbits] * 5, dtype="int32")
        check_results(lambda c: pq.pack_codes(c, nbits), (codes,))  # noqa: B023
        packed = pq.pack_codes(codes, nbits)
        check_results(lambda p: pq.unpack_codes(p, nbits, 5), (packed,))  # noqa: B023
    ids = torch.from_numpy(rng.integers(0, 10_000, (7, 5)))
    check_results(lambda i: pq.hash_codes(i, range(40), 1000), (ids,))
    check_results(lambda i: pq.quotient_remainder(i, [100, 100]), (ids,))
    check_results(lambda c: pq.usage(c, 10_000), (ids,))


# --- Product keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", ["sum", "none"])
@pytest.mark.parametrize("softmax", [True, False])
def test_same_results_of_product_keys(rng, dtype, combine, softmax):
    for heads, n, half, dim, k in ((2, 20, 6, 33, 8), (1, 130, 16, 8, 32), (1, 30, 4, 2, 300)):
        inputs = floats(rng, 50, heads, 2 * half), floats(rng, heads, 2, n, half)
        inputs = (*inputs, floats(rng, n * n, dim))
        inputs = tuple(x.to(getattr(torch, dtype)) for x in inputs)

        def call(*arguments, k=k):
            found = pq.product_key_lookup(
                *arguments, k, combine=combine, softmax=softmax, return_indices=True
            )
            return tuple(found)

        tolerance = SUMS if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
        check_results(call, inputs, **tolerance)
        check_gradients(call, inputs, **tolerance)


def test_sparse_gradients(rng):
    q, subkeys, values = on_gpu((floats(rng, 30, 1, 8), floats(rng, 1, 2, 12, 4),
                                 floats(rng, 144, 5)))  # fmt: skip
    dense, sparse = (values.clone().requires_grad_() for _ in range(2))
    pq.product_key_lookup(q, subkeys, dense, 6).square().sum().backward()
    pq.product_key_lookup(q, subkeys, sparse, 6, sparse_grad=True).square().sum().backward()
    assert torch.equal(sparse.grad.to_dense(), dense.grad)


# --- Devices --------------------------------------------------------------------------------------

CALLS = {
    "lookup": (pq.lookup, lambda rng: (codes_below(rng, 500, 30, 30), floats(rng, 2, 30, 8))),
    "adc": (pq.adc, lambda rng: (floats(rng, 3, 8), codes_below(rng, 500, 30, 30),
                                 floats(rng, 2, 30, 4))),
    "assign": (pq.assign, lambda rng: (floats(rng, 500, 8), floats(rng, 2, 30, 4))),
    "pack": (lambda c: pq.pack_codes(c, 5), lambda rng: (codes_below(rng, 500, 30, 30),)),
    "product keys": (
        lambda *a: pq.product_key_lookup(*a, 9),
        lambda rng: (floats(rng, 40, 2, 8), floats(rng, 2, 2, 11, 4), floats(rng, 121, 5)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_streams_and_graphs(rng, name):
    call, draw = CALLS[name]
    check_repeats(call, draw(rng))
    check_streams(call, draw(rng), draw(rng), **SUMS)
    check_captured(call, draw(rng), draw(rng), **SUMS)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "pack"])
def test_devices_may_not_mix(rng, name):
    call, draw = CALLS[name]
    check_mixed_devices(call, draw(rng))


@needs_two_gpus
@pytest.mark.parametrize("name", CALLS)
def test_two_devices(rng, name):
    call, draw = CALLS[name]
    check_two_devices(call, draw(rng), **SUMS)


def test_float64_is_refused(rng):
    tables = floats(rng, 2, 5, 3, dtype="float64")
    with pytest.raises(pentad.DeviceError, match="float64"):
        pq.lookup(*on_gpu((codes_below(rng, 4, 5, 5), tables)))
