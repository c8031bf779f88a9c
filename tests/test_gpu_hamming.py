# SPDX-License-Identifier: Apache-2.0
"""The hamming functions on a CUDA device, against themselves on the CPU. `make test-gpu`."""

import numpy as np
import pytest
from cases import CALLS, DIM, LAYOUTS, METRICS, assert_same, codes, laid_out, mask
from gpu import (
    check_captured,
    check_mixed_devices,
    check_repeats,
    check_results,
    check_streams,
    check_two_devices,
    needs_gpu,
    needs_two_gpus,
    on_gpu,
    to_numpy,
)
from hamming_index_cases import whole_vectors

import pentad
from pentad import hamming as H

torch = pytest.importorskip("torch")
pytestmark = needs_gpu

SUMS = ("weighted_sum",)  # whose order differs from the CPU's


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_results(inputs, name, layout):
    there = on_gpu({key: laid_out(value, layout) for key, value in inputs.items()})
    got, want = to_numpy(CALLS[name](there)), CALLS[name](inputs)
    if name in SUMS:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    else:
        assert_same(got, want)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int8", "bool"])
@pytest.mark.parametrize("dim", [1, 16, 77])
def test_same_results_of_packing_every_type(rng, dtype, dim):
    x = torch.from_numpy(rng.integers(-2, 3, (5, 3, dim))).to(getattr(torch, dtype))
    check_results(lambda x: H.pack(x, 0.5), (x,))
    check_results(lambda x: H.pack(x.transpose(0, 1)), (x,))
    if dtype != "bool":
        check_results(lambda c: H.unpack(c, dim, x.dtype), (H.pack(x),))
    check_results(lambda c: H.permute(c, dim, 5), (H.pack(x),))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [100, 128])
def test_same_results_of_an_index(rng, metric, dim):
    index = H.BinaryIndex(dim, metric=metric, store="int8")
    index.add(whole_vectors(rng, 800, dim), rng.permutation(3000)[:800])
    there, queries = index.to("cuda"), whole_vectors(rng, 6, dim)
    keep = rng.random(800) < 0.5
    for asked in (queries, H.pack(queries)):
        for chosen in (None, keep, index.ids[keep]):
            got = there.search(on_gpu(asked), 9, filter=chosen)
            assert_same(to_numpy(tuple(got)), tuple(index.search(asked, 9, filter=chosen)))
        radius = 0.7 if metric == "jaccard" else dim * 0.3
        got = there.range_search(on_gpu(asked), radius, filter=keep)
        assert_same(to_numpy(got), index.range_search(asked, radius, filter=keep))
    for by in ("bits", "store"):
        got = there.search(on_gpu(queries), 9, rescore=by)
        assert_same(to_numpy(tuple(got)), tuple(index.search(queries, 9, rescore=by)))
    with pytest.raises(pentad.DeviceError, match="is on cpu"):
        there.search(torch.from_numpy(queries), 1)
    lists = H.BinaryIVFIndex(dim, 20, metric=metric, nprobe=3)
    lists.train(queries.repeat(10, 0))
    lists.add(index.codes(), index.ids)
    for chosen in (None, keep):
        got = lists.to("cuda").search(on_gpu(queries), 9, filter=chosen)
        assert_same(to_numpy(tuple(got)), tuple(lists.search(queries, 9, filter=chosen)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [1, 5, 100])
@pytest.mark.parametrize(("dim", "n"), [(1, 1), (77, 3000), (128, 0), (1024, 20_000), (4000, 700)])
def test_every_size(rng, metric, nq, dim, n):
    q, db = codes(rng, nq, dim, "ties"), codes(rng, n, dim)
    some = mask(rng, n, "random")
    there = [on_gpu(x) for x in (q, db, some)]
    assert_same(to_numpy(H.distance(*there[:2], metric=metric)), H.distance(q, db, metric=metric))
    for k in (1, 10, 300, 2500):
        got = H.topk(*there[:2], k, metric=metric, mask=there[2])
        assert_same(to_numpy(got), H.topk(q, db, k, metric=metric, mask=some))
    radius = {"hamming": dim * 0.48, "jaccard": 0.65, "and": dim * 0.27}[metric]
    got = H.range_search(*there[:2], radius, metric=metric, mask=there[2])
    assert_same(to_numpy(got), H.range_search(q, db, radius, metric=metric, mask=some))


@pytest.mark.parametrize(("dim", "n"), [(1, 1), (77, 9000), (1024, 20_000), (4000, 700)])
def test_every_size_of_scores(rng, dim, n):
    x, db = rng.integers(-3, 4, (5, dim)).astype(np.float32), codes(rng, n, dim)
    for k in (1, 10, 300, 2500):
        check_results(lambda x, db, k=k: H.topk_score(x, db, k), (x, db))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scores_and_sums_with_gradients(rng, dtype):
    db = torch.from_numpy(codes(rng, 5000, DIM))
    x = torch.from_numpy(rng.standard_normal((6, DIM))).to(getattr(torch, dtype))
    results = []
    for device in ("cpu", "cuda"):
        rows = x.to(device).requires_grad_()
        scores = H.score(rows, db.to(device))
        sums = H.weighted_sum(scores.softmax(-1), db.to(device), DIM)
        sums.square().sum().backward()
        results.append([t.detach().cpu() for t in (scores, sums, rows.grad)])
    (scores, sums, grad), (scores_there, sums_there, grad_there) = results
    assert torch.equal(scores, scores_there)
    torch.testing.assert_close(sums_there, sums)
    torch.testing.assert_close(grad_there, grad)


def pair(rng, nq=20, n=9000):
    return codes(rng, nq, 256, "ties"), codes(rng, n, 256)


def search(q, db):
    found = H.topk_score(H.unpack(q, 256), db, 5)
    return H.topk(q, db, 10), H.distance(q[:3], db), found, H.pack(found[0] - 100)


def test_results_repeat(rng):
    check_repeats(search, pair(rng, 40, 30_000))
    check_repeats(
        lambda w, db: H.weighted_sum(w, db, 256),
        (rng.random((9, 3000)), pair(rng)[0][:1].repeat(3000, 0)),
    )


def test_streams(rng):
    check_streams(search, pair(rng), pair(rng))


def test_graph_capture(rng):
    check_captured(search, pair(rng), pair(rng))


def test_an_index_in_a_graph(rng):
    index = H.BinaryIndex(256, store="float16")
    index.add(whole_vectors(rng, 5000, 256))
    there, keep = index.to("cuda"), rng.random(5000) < 0.5

    def search(queries, keep):
        some = index if queries.device.type == "cpu" else there
        return some.search(queries, 8, filter=keep, rescore="store")

    first, second = (whole_vectors(rng, 4, 256) for _ in range(2))
    check_captured(search, (first, keep), (second, ~keep))
    check_streams(search, (first, keep), (second, ~keep))


def test_compiled(rng):
    q, db = codes(rng, 12, 256), codes(rng, 900, 256)

    def next_to_nearest(a, b):
        return H.topk(a, b, 5)[0] + 1

    compiled = torch.compile(next_to_nearest, fullgraph=True, backend="aot_eager")
    assert_same(to_numpy(compiled(on_gpu(q), on_gpu(db))), H.topk(q, db, 5)[0] + 1)


def test_devices_may_not_mix(rng):
    check_mixed_devices(search, pair(rng))
    with pytest.raises(pentad.DeviceError):
        H.BinaryIndex(64).add(on_gpu(codes(rng, 4, 64)))


@needs_two_gpus
def test_two_devices(rng):
    check_two_devices(search, pair(rng))
