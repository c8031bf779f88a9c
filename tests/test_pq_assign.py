# SPDX-License-Identifier: Apache-2.0
"""pentad.pq.assign and soft_assign: exactly the argmin of double distances, on every level."""

import numpy as np
import pytest
from cases import LAYOUTS, assert_same, laid_out, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

import pentad
from pentad import _C, pq
from pentad.pq import assign_reference as reference

METRICS = ("l2", "ip", "cosine")
KINDS = ("random", "ties", "grid", "far", "huge", "tiny", "zero")


def sample(rng, n, M, K, d, kind):
    """x (n, M * d) and codebooks (M, K, d), float32."""
    x = rng.standard_normal((n, M, d)).astype(np.float32)
    c = rng.standard_normal((M, K, d)).astype(np.float32)
    if kind == "ties":
        c[:, K // 2 :] = c[:, : K - K // 2]
    elif kind == "grid":  # many equal distances of different centroids
        x, c = np.round(x), np.round(c)
    elif kind == "far":  # |x - c|^2 is lost in |x|^2
        x, c = x + 1000, c + 1000
    elif kind == "huge":  # squares overflow a float
        x, c = x * np.float32(1e30), c * np.float32(1e30)
    elif kind == "tiny":  # denormals
        x, c = x * np.float32(1e-40), c * np.float32(1e-40)
    elif kind == "zero":
        x[::2], c[:, ::3] = 0, 0
    if n and K > 1:  # rows half-way between two centroids, up to a rounding
        x[0] = (c[:, 0] / 2 + c[:, 1] / 2).astype(np.float32)
    return x.reshape(n, M * d), c


# --- Exactness ------------------------------------------------------------------------------------


def test_reference_says_what_the_definition_says(rng):
    x, c = sample(rng, 3, 2, 5, 3, "random")
    for metric in METRICS:
        got = reference.costs(x.reshape(3, 2, 3), c, metric)
        for i, m, k in np.ndindex(3, 2, 5):
            a, b = x[i, 3 * m : 3 * m + 3].astype(float), c[m, k].astype(float)
            want = {
                "l2": ((a - b) ** 2).sum(),
                "ip": -(a @ b),
                "cosine": -(a @ b) / np.linalg.norm(b),
            }[metric]
            np.testing.assert_allclose(got[i, m, k], want, rtol=1e-14)


@st.composite
def cases(draw):
    K = draw(st.integers(1, 40) | st.sampled_from([16, 64, 65, 256, 257, 300]))
    return {
        "n": draw(st.integers(0, 60)),
        "M": draw(st.integers(1, 5)),
        "K": K,
        "d": draw(st.integers(1, 20) | st.sampled_from([33, 64])),
        "metric": draw(st.sampled_from(METRICS)),
        "kind": draw(st.sampled_from(KINDS)),
        "top": draw(st.none() | st.integers(1, K)),
        "form": draw(st.sampled_from(["product", "residual", "grouped"])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@settings(max_examples=120)
@given(cases())
def test_codes_are_those_of_double_distances(isa, threads, c):
    threads(c["threads"])
    rng = np.random.default_rng(c["seed"])
    x, books = sample(rng, c["n"], c["M"], c["K"], c["d"], c["kind"])
    if c["form"] != "product":
        x = x[:, : c["d"]]
        c["top"] = c["top"] if c["form"] == "grouped" else None
    got = pq.assign(
        laid_out(x, c["layout"]), books, metric=c["metric"], form=c["form"], top=c["top"]
    )
    assert_same(got, reference.assign(x, books, c["metric"], c["form"], c["top"]))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("K", "d"), [(1, 1), (16, 4), (64, 2), (65, 7), (256, 8), (1000, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_the_double_ones(rng, isa, metric, K, d, kind):
    """What k-means uses: the cost of the nearest, rounded once."""
    x, c = sample(rng, 101, 2, K, d, kind)
    x = x.reshape(101, 2, d)
    codes = np.empty((101, 2, 1), np.uint8 if K <= 256 else np.int32)
    distances = np.empty(codes.shape, np.float32)
    _C.pq_assign(x, c, metric, codes, distances)
    costs = reference.costs(x, c, metric)
    assert_same(codes[..., 0], costs.argmin(-1).astype(codes.dtype))
    with np.errstate(over="ignore"):
        assert_same(distances[..., 0], costs.min(-1).astype(np.float32))


def test_the_largest_codebook(rng, isa):
    x, c = sample(rng, 50, 1, 65536, 3, "random")
    c[0, 40000:] = c[0, :25536]
    assert_same(pq.assign(x, c), reference.assign(x, c))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_many_wide_centroids(rng, isa, kind, metric):
    """Where bf16 products may go first: some rows are settled, some are done again."""
    x, c = sample(rng, 150, 1, 521, 33, kind)
    x[1:9] = (c[0, 1:9] + c[0, 2:10]) / 2
    x[9] *= np.float32(1e3)
    assert_same(pq.assign(x, c, metric=metric), reference.assign(x, c, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_near_ties_below_float32(rng, isa, metric):
    """Centroids that differ in the last bit: float32 scores cannot tell them apart."""
    c = np.repeat(rng.standard_normal((1, 8, 16)).astype(np.float32), 6, axis=1)
    for k in range(48):
        c[0, k, k % 16] = np.nextafter(c[0, k, k % 16], np.float32(9 * (-1) ** k))
    x = rng.standard_normal((300, 16)).astype(np.float32)
    want = reference.assign(x, c, metric)
    assert len(np.unique(want)) > 8
    assert_same(pq.assign(x, c, metric=metric), want)
    assert_same(
        pq.assign(x, c, metric=metric, top=11), reference.assign(x, c, metric, "product", 11)
    )


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float64", "float32"),
                                    ("float32", "float64"), ("float16", "float16")])  # fmt: skip
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes_mix(rng, isa, metric, dtypes):
    x, c = sample(rng, 40, 3, 20, 5, "random")
    x, c = x.astype(dtypes[0]), c.astype(dtypes[1])
    assert_same(pq.assign(x, c, metric=metric), reference.assign(x, c, metric))
    assert_same(
        pq.assign(x[:, :5], c, metric=metric, form="residual"),
        reference.assign(x[:, :5], c, metric, "residual"),
    )


def test_float64_sees_what_float32_cannot():
    c = np.array([[[1.0], [1.0 + 1e-12]]])
    assert pq.assign(np.array([[1.0 + 1e-12]]), c).tolist() == [[1]]
    assert pq.assign(np.array([[1.0]], np.float32), c).tolist() == [[0]]


def test_encode_decode_encode_is_a_fixed_point(rng, isa):
    x, c = sample(rng, 400, 4, 100, 6, "random")
    codes = pq.assign(x, c)
    decoded = c[np.arange(4), codes].reshape(x.shape)
    assert_same(pq.assign(decoded, c), codes)


def test_leading_dimensions(rng):
    x, c = sample(rng, 24, 3, 9, 2, "random")
    want = pq.assign(x, c, top=2)
    assert_same(pq.assign(x.reshape(2, 3, 4, 6), c, top=2), want.reshape(2, 3, 4, 3, 2))
    assert_same(pq.assign(x[0], c, top=2), want[0])
    assert pq.assign(x[:0].reshape(0, 5, 6), c).shape == (0, 5, 3)


def test_memory_does_not_grow_with_centroids():
    """(n, K) float32 would be 800 MB; the peak grows by much less."""
    run_python(
        """
        import numpy as np, resource
        from pentad import pq
        x = np.random.default_rng(0).standard_normal((50_000, 4)).astype(np.float32)
        c = np.random.default_rng(1).standard_normal((1, 4096, 4)).astype(np.float32)
        pq.assign(x[:100], c)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pq.assign(x, c)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 20_000, grown  # KiB
        """
    )


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_what_is_not_finite_is_refused(rng, isa, bad, dtype):
    x, c = (a.astype(dtype) for a in sample(rng, 75, 2, 20, 5, "random"))
    for i, j in ((0, 0), (74, 9), (33, 4)):
        worse = x.copy()
        worse[i, j] = bad
        with pytest.raises(ValueError, match=r"\[pq.assign\] x contains NaN or infinity"):
            pq.assign(worse, c)
        with pytest.raises(ValueError, match="x contains NaN"):
            pq.assign(worse, c, top=3)
    for at in ((0, 0, 0), (1, 19, 4)):
        worse = c.copy()
        worse[at] = bad
        with pytest.raises(ValueError, match=r"\[pq.assign\] codebooks contain NaN or infinity"):
            pq.assign(x, worse)


def test_errors_name_what_came():
    x, c = np.zeros((4, 12), np.float32), np.zeros((3, 8, 4), np.float32)
    for call, error, text in [
        (lambda: pq.assign(x, np.zeros((5, 8, 2))), ValueError,
         r"\[pq.assign\] x has 12 columns, which 5 codebooks do not divide"),
        (lambda: pq.assign(x, c[:2]), ValueError, "12 columns, but 2 codebooks of 4 take 8"),
        (lambda: pq.assign(x, c, form="residual"), ValueError, "12 columns, but .* have 4"),
        (lambda: pq.assign(x, c[0]), ValueError, r"shape \(8, 4\), expected \(M, K, dsub\)"),
        (lambda: pq.assign(x, c[:, :0]), ValueError, "empty"),
        (lambda: pq.assign(np.zeros((), np.float32), c), ValueError, "no dimension"),
        (lambda: pq.assign(x.astype(int), c), TypeError, "x has dtype int64"),
        (lambda: pq.assign(x, c.astype(int)), TypeError, "codebooks has dtype int64"),
        (lambda: pq.assign(x.tolist(), c), TypeError, "x is list"),
        (lambda: pq.assign(x, c, metric="l1"), ValueError, "metric is 'l1'"),
        (lambda: pq.assign(x, c, form="sum"), ValueError, "form is 'sum'"),
        (lambda: pq.assign(x, c, top=9), ValueError, "top is 9, but there are 8"),
        (lambda: pq.assign(x, c, top=0), ValueError, "at least 1"),
        (lambda: pq.assign(x, c, top=1.5), TypeError, "top is 1.5"),
        (lambda: pq.assign(x[:, :4], c, form="residual", top=2), ValueError, "not residual"),
        (lambda: pq.assign(x, np.zeros((12, 65537, 1), np.float32)), ValueError, "65537"),
        (lambda: pq.soft_assign(x, c, temperature=0), ValueError, "temperature is 0.0"),
        (lambda: pq.soft_assign(x, c, temperature=float("nan")), ValueError, "temperature"),
        (lambda: pq.soft_assign(x, c, metric="dot"), ValueError, "metric is 'dot'"),
    ]:  # fmt: skip
        with pytest.raises(error, match=text):
            call()


def test_the_extension_refuses_what_would_harm_memory():
    x, c = np.zeros((4, 3, 2), np.float32), np.zeros((3, 300, 2), np.float32)
    good = np.empty((4, 3, 1), np.int32)
    _C.pq_assign(x, c, "l2", good, None)
    read_only = good.copy()
    read_only.flags.writeable = False
    for bad in (
        (x, c, "l2", np.empty((4, 3, 1), np.uint8), None),
        (x, c, "l2", np.empty((4, 3, 301), np.int32), None),
        (x, c, "l2", np.empty((5, 3, 1), np.int32), None),
        (x, c, "l2", read_only, None),
        (x, c, "l2", good, np.empty((4, 3, 2), np.float32)),
        (x[:, :2], c, "l2", good, None),
        (x, c[:, :0], "l2", good, None),
        (x, c, "l3", good, None),
    ):
        with pytest.raises((ValueError, TypeError)):
            _C.pq_assign(*bad)


# --- torch ----------------------------------------------------------------------------------------

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("form", ["product", "residual", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_give_what_arrays_give(rng, form, dtype):
    x, c = sample(rng, 40, 3, 300, 4, "random")
    x = x if form == "product" else x[:, :4]
    tx, tc = torch.tensor(x).to(dtype), torch.tensor(c).to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    want = reference.assign(tx.to(exact).numpy(), tc.to(exact).numpy(), "l2", form)
    got = pq.assign(tx, tc, form=form)
    assert got.dtype == torch.int32
    assert_same(got.numpy(), want)
    leaf = tx.clone().requires_grad_()
    assert not pq.assign(leaf, tc.requires_grad_(), form=form).requires_grad
    assert_same(pq.assign((-tx)._neg_view(), tc, form=form).numpy(), want)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert_same(pq.assign(tx, tc, form=form).numpy(), want)


def test_strided_tensors(rng):
    x, c = sample(rng, 30, 3, 20, 4, "random")
    want = reference.assign(x, c)
    tx, tc = torch.tensor(x), torch.tensor(c)
    assert_same(pq.assign(tx.T.contiguous().T, tc.mT.contiguous().mT).numpy(), want)
    assert_same(pq.assign(tx.repeat(1, 2)[:, :12], tc.expand(3, 20, 4)).numpy(), want)
    assert_same(pq.assign(tx.reshape(5, 6, 12).transpose(0, 1), tc).transpose(0, 1).reshape(30, 3)
                .numpy(), want)  # fmt: skip


@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("form", ["product", "grouped", "residual"])
def test_the_operator_is_well_made(rng, form, top):
    x, c = sample(rng, 12, 3, 20, 4, "random")
    x = x if form == "product" else x[:, :4]
    if form == "residual" and top:
        return
    arguments = (torch.tensor(x).reshape(3, 4, -1), torch.tensor(c), "l2", form, top)
    torch.library.opcheck(torch.ops.pentad.pq_assign.default, arguments)


def test_compiled_and_fake(rng):
    x, c = (torch.tensor(a) for a in sample(rng, 12, 3, 300, 4, "random"))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def both(x, c):
        return pq.assign(x, c), pq.assign(x, c, top=2), pq.soft_assign(x, c)

    for n in (12, 7):
        for got, want in zip(
            both(x[:n], c),
            (pq.assign(x[:n], c), pq.assign(x[:n], c, top=2), pq.soft_assign(x[:n], c)),
            strict=True,
        ):
            torch.testing.assert_close(got, want)
    meta = pq.assign(x.to("meta"), c.to("meta"), top=2)
    assert (meta.shape, meta.dtype, meta.device.type) == ((12, 3, 2), torch.int32, "meta")
    meta = pq.soft_assign(x.to("meta"), c.to("meta"))
    assert (meta.shape, meta.dtype, meta.device.type) == ((12, 3, 300), x.dtype, "meta")


def test_mixed_arguments_are_refused(rng):
    x, c = sample(rng, 4, 3, 5, 2, "random")
    with pytest.raises(TypeError, match="mix numpy"):
        pq.assign(torch.tensor(x), c)
    with pytest.raises(pentad.DeviceError):
        pq.assign(torch.tensor(x), torch.tensor(c).to("meta"))


# --- Soft -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_soft_assignment_is_the_softmax_of_minus_the_costs(rng, metric):
    x, c = sample(rng, 20, 3, 7, 4, "zero")
    for temperature in (0.3, 1.0, 20.0):
        logits = -reference.costs(x.reshape(20, 3, 4), c, metric) / temperature
        want = torch.tensor(logits).softmax(-1).numpy()
        got = pq.soft_assign(x, c, metric=metric, temperature=temperature)
        assert got.dtype == np.float32
        # float32 logits of up to 20 / 0.3, each off by a few 2^-24 of itself
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
        tensor = pq.soft_assign(
            torch.tensor(x), torch.tensor(c), metric=metric, temperature=temperature
        )
        np.testing.assert_allclose(tensor.numpy(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_soft_assignment_is_differentiable(metric):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    c = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    f = lambda x, c: pq.soft_assign(x, c, metric=metric, temperature=0.7)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, c))
    assert torch.autograd.gradgradcheck(f, (x, c))


def test_soft_assignment_in_half_precision():
    x, c = torch.randn(9, 6).bfloat16(), torch.randn(3, 5, 2)
    want = pq.soft_assign(x.float(), c)
    with torch.autocast("cpu", torch.bfloat16):
        got = pq.soft_assign(x, c)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16())
