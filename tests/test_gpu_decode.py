# SPDX-License-Identifier: Apache-2.0
"""Decoding with a cache on a CUDA device, against itself on the CPU. `make test-gpu`."""

import pytest
from gpu import DEVICES, needs_gpu

import pentad

torch = pytest.importorskip("torch")
pytestmark = needs_gpu

A = pentad.attention
B, HQ, HK, CAPACITY = 3, 8, 2, 700
LENGTHS = torch.tensor([7, 0, 640])
ROUGH = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
OPTIONS = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"window": (50, 0)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.arange(HQ) / 16},
    "sink": {"sink": torch.arange(HQ) - 3.0},
    "bias": {"bias": torch.randn(B, HQ, 1, CAPACITY)},
    "bias bool": {"bias": torch.rand(B, 1, 1, CAPACITY) > 0.3},
}


def problem(dtype=torch.float32, t=1, dim=64, pages=None):
    """q, caches, lengths and new tokens; in shuffled pages of this size."""
    generator = torch.Generator().manual_seed(t * dim)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    given = {"q": draw(B, HQ, t, dim), "k_new": draw(B, HK, t, dim), "v_new": draw(B, HK, t, dim)}
    rows, room = (B, CAPACITY) if pages is None else (B * (CAPACITY // pages), pages)
    given |= {"k_cache": draw(rows, HK, room, dim), "v_cache": draw(rows, HK, room, dim)}
    given["cache_seqlens"] = LENGTHS
    if pages is not None:
        given["block_table"] = torch.randperm(rows, generator=generator).view(B, -1).int()
    return given


def there(given, device="cuda"):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}


def run(given, **options):
    out, lse = A.decode(**given, return_lse=True, **options)
    return out, lse, given["k_cache"], given["v_cache"]


def assert_same(got, want, dtype):
    rough = ROUGH[dtype]
    for g, w in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(g.cpu(), w, rtol=rough, atol=rough)
    for g, w in zip(got[2:], want[2:], strict=True):
        assert torch.equal(g.cpu(), w)


@pytest.mark.parametrize("dtype", ROUGH)
@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize("option", OPTIONS)
def test_same_results(option, t, dtype):
    given = problem(dtype, t)
    got = run(there(given), **there(OPTIONS[option]))
    assert_same(got, run(given, **OPTIONS[option]), dtype)


@pytest.mark.parametrize("dtype", ROUGH)
@pytest.mark.parametrize(("dim", "pages"), [(80, 16), (128, 7), (256, 64), (512, 20), (33, 1)])
def test_same_results_in_pages(dim, pages, dtype):
    given = problem(dtype, 2, dim, pages)
    assert_same(run(there(given)), run(given), dtype)


def test_same_results_with_rows_and_padding():
    given = problem(t=2)
    given |= {"cache_batch_idx": torch.tensor([2, 0, 1]), "cache_leftpad": torch.tensor([3, 9, 0])}
    assert_same(run(there(given)), run(given), torch.float32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_same_results_with_rotary_embedding(interleaved):
    given = problem(t=3)
    given |= dict(zip(("rotary_cos", "rotary_sin"), A.rotary_tables(CAPACITY, 32), strict=True))
    given["rotary_interleaved"] = interleaved
    assert_same(run(there(given)), run(given), torch.float32)


def test_results_repeat_and_do_not_depend_on_pages():
    given = there(problem(torch.bfloat16))
    first = A.decode(**given)
    assert all(torch.equal(A.decode(**given), first) for _ in range(5))
    pages = 70
    for name in ("k_cache", "v_cache"):
        cache = given[name].unflatten(2, (-1, pages)).transpose(1, 2).flatten(0, 1)
        given[name] = cache.contiguous()
    given["block_table"] = torch.arange(B * CAPACITY // pages, device="cuda").view(B, -1).int()
    assert torch.equal(A.decode(**given), first)


def test_what_is_out_of_range_gives_nan():
    for change in (
        {"cache_seqlens": torch.tensor([5, CAPACITY, 9])},
        {"cache_seqlens": torch.tensor([5, -1, 9])},
        {"cache_batch_idx": torch.tensor([0, 3, 1])},
        {"cache_leftpad": torch.tensor([0, CAPACITY, 0])},
    ):
        out, lse, *_ = run(there(problem() | change))
        for tensor in (out, lse):
            assert tensor[1].isnan().all()
            assert tensor[[0, 2]].isfinite().all()
    given = problem(pages=10)
    given["block_table"][2, 3] = 10**6
    out = A.decode(**there(given))
    assert out[2].isnan().all()
    assert out[:2].isfinite().all()
    cos, sin = (t.cuda() for t in A.rotary_tables(4, 8))
    turned = A.apply_rotary(torch.ones(1, 1, 6, 8, device="cuda"), cos, sin)
    assert turned[:, :, :4].isfinite().all()
    assert turned[:, :, 4:].isnan().all()


def test_a_stream_and_a_graph():
    """Steps of a captured graph append where the lengths on the device say."""
    given = there(problem())
    want = problem()
    lengths = given["cache_seqlens"]
    A.decode(**there(problem()))  # outside first: modules are loaded at the first launch
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = A.decode(**given)
        lengths.add_(1)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(out.cpu(), A.decode(**want), rtol=1e-5, atol=1e-5)
        want["cache_seqlens"] = want["cache_seqlens"] + 1
    assert torch.equal(given["k_cache"].cpu(), want["k_cache"])


def test_devices_may_not_mix_and_float64_has_no_kernel():
    given = there(problem())
    for name in ("k_cache", "k_new", "cache_seqlens"):
        with pytest.raises(pentad.DeviceError):
            A.decode(**given | {name: given[name].cpu()})
    with pytest.raises(pentad.DeviceError, match="float64"):
        A.decode(**there(problem(torch.float64)))


@pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")
def test_two_devices():
    given = problem()
    want = run(problem())
    for device in range(2):
        got = run(there(given, f"cuda:{device}"))
        assert got[0].device.index == device
        assert_same(got, want, torch.float32)
