# SPDX-License-Identifier: Apache-2.0
"""The hamming functions on a CUDA device, against themselves on the CPU. `make test-gpu`."""

import numpy as np
import pytest
from cases import CALLS, DIM, LAYOUTS, METRICS, assert_same, codes, laid_out, mask
from gpu import DEVICES, needs_gpu, on_gpu, to_numpy

import pentad
from pentad import hamming as H

torch = pytest.importorskip("torch")
pytestmark = needs_gpu

EXACT = [name for name in CALLS if name.split()[0] in ("distance", "intersection", "topk")]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_results(inputs, name, layout):
    there = {key: on_gpu(laid_out(value, layout)) for key, value in inputs.items()}
    assert_same(to_numpy(CALLS[name](there)), CALLS[name](inputs))


@pytest.mark.parametrize("name", [name for name in CALLS if name.split()[0] in ("pack", "range")])
def test_functions_without_kernels_say_so(inputs, name):
    there = {key: on_gpu(value) for key, value in inputs.items()}
    with pytest.raises(pentad.DeviceError, match="cuda"):
        CALLS[name](there)


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


def test_results_repeat(rng):
    q, db = (on_gpu(codes(rng, n, 256, "ties")) for n in (40, 30_000))
    w = torch.randn(9, 30_000, device="cuda")
    first = (*H.topk(q, db, 100), H.weighted_sum(w, db, 256))
    for _ in range(5):
        again = (*H.topk(q, db, 100), H.weighted_sum(w, db, 256))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_streams(rng):
    """On a stream of its own a kernel waits for what made its input, on two they do not mix."""
    db = codes(rng, 50_000, 512)
    queries = [codes(rng, 20, 512) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    db_there = on_gpu(db)
    torch.cuda.synchronize()
    results = []
    for _ in range(3):
        for stream, q in zip(streams, queries, strict=True):
            with torch.cuda.stream(stream):
                late = torch.zeros((20, 64), dtype=torch.uint8, device="cuda")
                torch.cuda._sleep(20_000_000)
                late.copy_(torch.from_numpy(q).pin_memory(), non_blocking=True)
                results.append((q, H.topk(late, db_there, 10)))
    torch.cuda.synchronize()
    for q, got in results:
        assert_same(to_numpy(got), H.topk(q, db, 10))


def test_graph_capture(rng):
    q, db = codes(rng, 12, 256), codes(rng, 9000, 256)
    there, db_there = on_gpu(np.zeros_like(q)), on_gpu(db)
    H.topk(there, db_there, 7)  # outside first: modules are loaded at the first launch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = H.topk(there, db_there, 7)
        pairs = H.distance(there, db_there)
    there.copy_(on_gpu(q))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(to_numpy(found), H.topk(q, db, 7))
    assert_same(to_numpy(pairs), H.distance(q, db))


def test_compiled(rng):
    q, db = codes(rng, 12, 256), codes(rng, 900, 256)

    def next_to_nearest(a, b):
        return H.topk(a, b, 5)[0] + 1

    compiled = torch.compile(next_to_nearest, fullgraph=True, backend="aot_eager")
    assert_same(to_numpy(compiled(on_gpu(q), on_gpu(db))), H.topk(q, db, 5)[0] + 1)


def test_devices_may_not_mix(rng):
    q = codes(rng, 4, 64)
    with pytest.raises(pentad.DeviceError, match="different devices"):
        H.topk(on_gpu(q), torch.from_numpy(q), 1)
    with pytest.raises(pentad.DeviceError):
        H.BinaryIndex(64).add(on_gpu(q))


@pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")
def test_two_devices(rng):
    q, db = codes(rng, 20, 256), codes(rng, 3000, 256)
    current = torch.cuda.current_device()
    for device in range(2):
        got = H.topk(on_gpu(q, device), on_gpu(db, device), 5)
        assert got[0].device.index == device
        assert_same(to_numpy(got), H.topk(q, db, 5))
        assert torch.cuda.current_device() == current
    with pytest.raises(pentad.DeviceError, match="different devices"):
        H.topk(on_gpu(q, 0), on_gpu(db, 1), 5)
