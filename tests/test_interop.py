# SPDX-License-Identifier: Apache-2.0
"""torch beside numpy: the same answers through every door of torch's."""

import warnings

import numpy as np
import pytest
from cases import CALLS, DIM, METRICS, WITHOUT_TORCH, assert_same, codes, run_python

import pentad
from pentad import _C
from pentad import hamming as H

torch = pytest.importorskip("torch")


# --- Imports --------------------------------------------------------------------------------------


def test_importing_pentad_imports_numpy_alone():
    run_python(
        """
        import sys
        import pentad
        from pentad import SearchResult, FormatError, DeviceError
        assert "numpy" in sys.modules
        heavy = {"torch", "sklearn", "rich", "scipy", "pentad.hamming"} & set(sys.modules)
        assert not heavy, heavy
        import numpy as np
        pentad.hamming.pack(np.ones((2, 9)))
        index = pentad.hamming.BinaryIndex(9)
        index.add(np.ones((2, 9)))
        index.search(np.ones((2, 9)), 1)
        heavy = {"torch", "sklearn", "rich", "scipy"} & set(sys.modules)
        assert not heavy, heavy
        """
    )


def test_everything_but_torch_works_without_torch(tmp_path):
    run_python(
        WITHOUT_TORCH
        + f"""
import numpy as np
import pentad
from pentad import hamming as H
from pentad.hamming import reference

assert pentad.thread_runtime() == "own pool"
rng = np.random.default_rng(0)
x = rng.standard_normal((500, 77)).astype(np.float32)
codes = H.pack(x)
assert (codes == reference.pack(x)).all()
assert (H.unpack(codes, 77) == reference.unpack(codes, 77)).all()
for metric in ("hamming", "jaccard", "and"):
    got = H.distance(codes, codes, metric=metric)
    assert (got == reference.distance(codes, codes, metric)).all()
    got = H.topk(codes[:5], codes, 9, metric=metric)
    want = reference.topk(codes[:5], codes, 9, metric)
    assert all((a == b).all() for a, b in zip(got, want))
    got = H.range_search(codes[:5], codes, 30, metric=metric)
    want = reference.range_search(codes[:5], codes, 30, metric)
    assert all((a == b).all() for a, b in zip(got, want))
assert np.allclose(H.score(x[:3], codes), reference.score(x[:3], codes), atol=1e-4)
assert (H.topk_score(x, codes, 1)[1][:, 0] == np.arange(500)).mean() > 0.9
H.weighted_sum(x, H.pack(rng.standard_normal((77, 9))), 9)
H.binarize(x, "bernoulli")
H.permute(codes, 77, 3)
H.bundle(codes, 77)
H.bind(codes, codes[:1])
index = H.BinaryIVFIndex(77, 5, store="int8")
index.train(x)
index.add(x)
index.save({str(tmp_path / "x")!r})
index = H.BinaryIVFIndex.load({str(tmp_path / "x")!r})
assert (index.search(x[:9], 1, rescore="store").ids[:, 0] == np.arange(9)).all()
try:
    pentad.nn
except ImportError:
    pass
else:
    raise AssertionError("pentad.nn without torch")
assert "torch" not in sys.modules
"""
    )


def test_first_use_inside_a_compiled_function():
    run_python(
        """
        import torch
        import pentad

        @torch.compile(fullgraph=True, backend="aot_eager")
        def loss(x, codes):
            return pentad.hamming.score(x, codes).sum()

        x = torch.randn(3, 20, requires_grad=True)
        loss(x, torch.randint(0, 256, (5, 3), dtype=torch.uint8)).backward()
        assert x.grad.shape == (3, 20)
        """
    )


# --- The same answers -----------------------------------------------------------------------------


def to_torch(inputs):
    return {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}


def numbers(result):
    """The arrays of a result, in numpy."""
    if isinstance(result, tuple):
        return tuple(numbers(part) for part in result)
    return result.detach().numpy() if isinstance(result, torch.Tensor) else result


def assert_tensors(result):
    parts = result if isinstance(result, tuple) else (result,)
    assert all(type(part) is torch.Tensor for part in parts)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_give_what_arrays_give(inputs, name):
    got = CALLS[name](to_torch(inputs))
    assert_tensors(got)
    assert_same(numbers(got), CALLS[name](inputs))


def _strided(t):
    roomy = torch.full([n * 3 for n in t.shape], 1).to(t.dtype)
    view = roomy[tuple(slice(1, None, 3) for _ in t.shape)]
    return view.copy_(t)


def _transposed(t):
    return t.T.contiguous().T if t.ndim == 2 else _strided(t)


def _offset(t):
    return torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape)


def _negated(t):
    return (-t)._neg_view() if t.is_floating_point() else t


def _leaf(t):
    return t.requires_grad_() if t.is_floating_point() else t


def _parameter(t):
    return torch.nn.Parameter(t, requires_grad=t.is_floating_point())


def _viewed(t):
    return t.clone().unsqueeze(0)[0]


VIEWS = (_strided, _transposed, _offset, _negated, _leaf, _parameter, _viewed)


@pytest.mark.parametrize("view", VIEWS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("name", CALLS)
def test_tensors_of_every_make(inputs, name, view):
    tensors = {key: view(t) for key, t in to_torch(inputs).items()}
    assert_same(numbers(CALLS[name](tensors)), CALLS[name](inputs))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.enable_grad,
    ],
    ids=["no_grad", "inference", "autocast", "enable_grad"],
)
def test_contexts_change_nothing(inputs, name, context):
    with context():
        tensors = {key: _leaf(t) for key, t in to_torch(inputs).items()}
        got = CALLS[name](tensors)
    assert_same(numbers(got), CALLS[name](inputs))


@pytest.mark.parametrize("name", CALLS)
def test_defaults_of_dtype_and_device_change_nothing(inputs, name):
    tensors = to_torch(inputs)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        got = CALLS[name](tensors)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert_same(numbers(got), CALLS[name](inputs))


@pytest.mark.parametrize("metric", METRICS)
def test_expanded_tensors(rng, metric):
    row = torch.from_numpy(codes(rng, 1, DIM))
    many, plain = row.expand(300, -1), row.repeat(300, 1)
    assert many.stride(0) == 0
    for t in (many, plain):
        assert_same(
            numbers(H.topk(many[:9], t, 4, metric=metric)),
            H.topk(plain[:9].numpy(), plain.numpy(), 4, metric=metric),
        )
    x = torch.ones(1).expand(5, DIM)
    assert_same(numbers(H.score(x, many)), H.score(np.ones((5, DIM), "f4"), plain.numpy()))
    w = torch.ones(1).expand(2, 300)
    assert_same(
        numbers(H.weighted_sum(w, many, DIM)),
        H.weighted_sum(np.ones((2, 300), "f4"), plain.numpy(), DIM),
    )
    assert_same(numbers(H.pack(x)), H.pack(np.ones((5, DIM))))


@pytest.mark.parametrize("metric", METRICS)
def test_jaccard_ties_survive_flushed_denormals(rng, metric):
    db = codes(rng, 300, 40, "ties")
    want = [H.range_search(db[:5], db, r, metric=metric) for r in (0.0, 1e-40)]
    index = H.BinaryIVFIndex(40, 4, metric=metric, nprobe=4)
    index.train(codes(rng, 50, 40))
    index.add(db)
    found = index.search(db[:5], 250)
    assert torch.set_flush_denormal(True)
    try:
        got = [H.range_search(db[:5], db, r, metric=metric) for r in (0.0, 1e-40)]
        again = index.search(db[:5], 250)
    finally:
        torch.set_flush_denormal(False)
    assert_same(tuple(got), tuple(want))
    assert_same(tuple(again), tuple(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, -0.7, 1e-30, 70000.0, -1e300])
def test_pack_compares_as_torch_does(dtype, threshold):
    at = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    around = [at, torch.nextafter(at, at + 1), torch.nextafter(at, at - 1), at * 0, -at]
    x = torch.stack(around)
    x = x[~x.isnan()]
    assert_same(H.pack(x, threshold).numpy(), np.packbits((x > threshold).numpy()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_dtypes_that_numpy_lacks_or_widens(rng, dtype):
    db = torch.from_numpy(codes(rng, 9, DIM))
    out = H.unpack(db, DIM, dtype)
    assert out.dtype == dtype
    assert torch.equal(out.float(), H.unpack(db, DIM))
    assert torch.equal(H.pack(out), db)
    if dtype.is_floating_point:
        x = torch.randn(3, DIM).to(dtype)
        assert torch.equal(H.score(x, db), H.score(x.float(), db))
        assert torch.equal(H.topk_score(x, db, 4)[0], H.topk_score(x.float(), db, 4)[0])


# --- Empty ----------------------------------------------------------------------------------------

EMPTY = {
    "distance n 0": lambda z: H.distance(z(5, 8), z(0, 8)),
    "distance nq 0": lambda z: H.distance(z(0, 8), z(5, 8)),
    "topk k 0": lambda z: H.topk(z(5, 8), z(7, 8), 0),
    "topk n 0": lambda z: H.topk(z(5, 8), z(0, 8), 3),
    "topk nq 0": lambda z: H.topk(z(0, 8), z(5, 8), 3),
    "topk jaccard": lambda z: H.topk(z(5, 8), z(0, 8), 3, metric="jaccard"),
    "range n 0": lambda z: H.range_search(z(5, 8), z(0, 8), 3),
    "range nq 0": lambda z: H.range_search(z(0, 8), z(5, 8), 3),
    "range none": lambda z: H.range_search(z(5, 8), z(5, 8), -1),
    "score n 0": lambda z: H.score(z(5, 8, dtype="float32"), z(0, 1)),
    "score nq 0": lambda z: H.score(z(0, 8, dtype="float32"), z(5, 1)),
    "score lead": lambda z: H.score(z(2, 0, 3, 8, dtype="float32"), z(5, 1)),
    "topk_score k 0": lambda z: H.topk_score(z(3, 8, dtype="float32"), z(5, 1), 0),
    "topk_score n 0": lambda z: H.topk_score(z(3, 8, dtype="float32"), z(0, 1), 2),
    "topk_score nq 0": lambda z: H.topk_score(z(0, 8, dtype="float32"), z(5, 1), 2),
    "weighted_sum n 0": lambda z: H.weighted_sum(z(3, 0, dtype="float32"), z(0, 1), 8),
    "weighted_sum nq 0": lambda z: H.weighted_sum(z(0, 3, dtype="float32"), z(3, 1), 8),
    "pack columns": lambda z: H.pack(z(3, 0, dtype="float32")),
    "pack columns 3-d": lambda z: H.pack(z(3, 2, 0, dtype="float32")),
    "pack middle": lambda z: H.pack(z(3, 0, 8, dtype="float32")),
    "pack rows": lambda z: H.pack(z(0, 8, dtype="float32")),
    "pack 1-d": lambda z: H.pack(z(0, dtype="float32")),
    "unpack rows": lambda z: H.unpack(z(0, 1), 8),
    "unpack middle": lambda z: H.unpack(z(3, 0, 1), 8),
    "permute rows": lambda z: H.permute(z(0, 1), 8, 1),
    "permute middle": lambda z: H.permute(z(3, 0, 1), 8, 1),
    "bind": lambda z: H.bind(z(0, 1), z(1, 1)),
    "bundle rows": lambda z: H.bundle(z(0, 3, 1), 8),
    "bundle middle": lambda z: H.bundle(z(2, 0, 3, 1), 8),
    "binarize": lambda z: H.binarize(z(3, 0, dtype="float32")),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_inputs(name):
    want = EMPTY[name](lambda *shape, dtype="uint8": np.zeros(shape, dtype))
    got = EMPTY[name](lambda *shape, dtype="uint8": torch.zeros(shape, dtype=getattr(torch, dtype)))
    assert_tensors(got)
    assert_same(numbers(got), want)


# --- The dispatcher -------------------------------------------------------------------------------


def op_arguments(inputs):
    i = to_torch(inputs)
    x, q, db, mask, w = i["x"], i["q"], i["db"], i["mask"], i["w"]
    return {
        "hamming_pack": [(x, 0.0), (x.half().reshape(2, 3, DIM), 0.5), (x > 0, 0.0)],
        "hamming_unpack": [(q, DIM, torch.float16), (q.reshape(3, 2, -1), DIM, torch.int8)],
        "hamming_permute": [(q, DIM, 3)],
        "hamming_distance": [(q, db, metric) for metric in METRICS],
        "hamming_topk": [(q, db, 5, "jaccard", None), (q, db, 70, "hamming", mask)],
        "hamming_range_search": [(q, db, 30.0, "hamming", None), (q, db, 0.5, "jaccard", mask)],
        "hamming_score": [(x, db), (x[:, :70], db[:, :9])],
        "hamming_topk_score": [(x, db, 5, None), (x, db, 70, mask)],
        "hamming_weighted_sum": [(w[None], db[None], DIM)],
    }


def test_every_operator_is_checked(inputs):
    CALLS["score"](to_torch(inputs))  # registers them
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pentad::")
    }
    assert {n for n in registered if n.startswith("hamming_")} == set(op_arguments(inputs))


def test_opcheck(inputs):
    for name, calls in op_arguments(inputs).items():
        for arguments in calls:
            torch.library.opcheck(getattr(torch.ops.pentad, name).default, arguments)


@pytest.mark.parametrize("dynamic", [True, None])  # None: of these sizes first, then of any
@pytest.mark.parametrize("name", CALLS)
def test_compiled_functions_agree(inputs, name, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same(numbers(compiled(to_torch(inputs))), CALLS[name](inputs))
    grown = {k: np.concatenate([v, v]) if k in ("x", "q") else v for k, v in inputs.items()}
    assert_same(numbers(compiled(to_torch(grown))), CALLS[name](grown))


def test_compiled_scalars_may_change(inputs):
    torch._dynamo.reset()
    i = to_torch(inputs)

    def search(q, db, x, k, radius, threshold, shift):
        return (
            H.topk(q, db, k),
            H.range_search(q, db, radius),
            H.pack(x, threshold),
            H.permute(q, DIM, shift),
        )

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager", dynamic=True)
    for k, radius, threshold, shift in [(3, 30.0, 0.0, 1), (9, 31.5, 0.5, -7), (70, 10, -1.0, 99)]:
        arguments = (i["q"], i["db"], i["x"], k, radius, threshold, shift)
        assert_same(numbers(compiled(*arguments)), numbers(search(*arguments)))


def memory(x, db):
    """A clean-up step: the two differentiable functions and binarize in one."""
    hidden = H.binarize(H.weighted_sum(torch.softmax(H.score(x, db) / 9, -1), db, DIM) + x, "tanh")
    return (H.score(hidden.double() * x, db) ** 2).mean()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradients_agree(inputs, dynamic):
    torch._dynamo.reset()
    db = torch.from_numpy(inputs["db"])
    grads = []
    compiled = torch.compile(memory, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for function in (memory, compiled):
        x = torch.tensor(inputs["x"], requires_grad=True)
        function(x, db).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_inductor_compiles_forward_and_backward(inputs):
    torch._dynamo.reset()
    db = torch.from_numpy(inputs["db"])
    grads = []
    for function in (memory, torch.compile(memory, fullgraph=True)):
        x = torch.tensor(inputs["x"], requires_grad=True)
        function(x, db).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_search_can_be_exported(inputs):
    class Search(torch.nn.Module):
        def __init__(self, db):
            super().__init__()
            self.register_buffer("db", db)

        def forward(self, x):
            return H.topk_score(x, self.db, 3), H.topk(H.pack(x), self.db, 3)

    i = to_torch(inputs)
    module = Search(i["db"])
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(module, (i["x"],), dynamic_shapes=({0: rows},))
    for x in (i["x"], i["x"][:4], i["x"].repeat(5, 1)):
        assert_same(numbers(program.module()(x)), numbers(module(x)))


@pytest.mark.parametrize("name", [n for n in CALLS if not n.startswith("range")])
def test_fake_and_meta_tensors_have_the_true_shapes(inputs, name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    want = CALLS[name](to_torch(inputs))
    mode = FakeTensorMode()
    with mode:
        fakes = CALLS[name]({k: mode.from_tensor(t) for k, t in to_torch(inputs).items()})
    metas = CALLS[name]({k: t.to("meta") for k, t in to_torch(inputs).items()})
    pairs = (
        zip(want, fakes, metas, strict=True) if isinstance(want, tuple) else [(want, fakes, metas)]
    )
    for real, fake, meta in pairs:
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")


# --- Refusals -------------------------------------------------------------------------------------


def test_mixtures_are_refused(inputs):
    t, n = to_torch(inputs), inputs
    for call in (
        lambda: H.distance(t["q"], n["db"]),
        lambda: H.topk(n["q"], t["db"], 1),
        lambda: H.topk(t["q"], t["db"], 1, mask=n["mask"]),
        lambda: H.score(n["x"], t["db"]),
        lambda: H.weighted_sum(t["w"], n["db"], DIM),
        lambda: H.bind(t["q"], n["q"]),
        lambda: H.bundle(t["db"], DIM, weights=n["votes"]),
        lambda: H.range_search(t["q"], n["db"], 1),
    ):
        with pytest.raises(TypeError, match="mix numpy arrays and torch tensors"):
            call()


def test_tensors_are_refused_like_arrays():
    u8, f32 = torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, 32)
    for call, error, message in (
        (lambda: H.distance(f32, f32), TypeError, "a has dtype float32"),
        (lambda: H.distance(u8, u8[:, :3]), ValueError, "have 3"),
        (lambda: H.topk(u8, u8, -1), ValueError, "k is -1"),
        (lambda: H.topk(u8, u8, 1, mask=torch.ones(4).bool()), ValueError, "mask has shape"),
        (lambda: H.range_search(u8, u8, float("nan")), ValueError, "radius is NaN"),
        (lambda: H.score(f32, u8[:, :3]), ValueError, "32 columns"),
        (lambda: H.score(f32.int(), u8), TypeError, "x has dtype int32"),
        (lambda: H.topk_score(f32 / 0, u8, 1), ValueError, "NaN or an infinity"),
        (lambda: H.pack(f32 / 0), ValueError, "NaN"),
        (lambda: H.pack(f32.long()), TypeError, "x has dtype int64"),
        (lambda: H.pack(f32.to(torch.complex64)), TypeError, "complex64"),
        (lambda: H.pack(torch.tensor(1.0)), ValueError, "no dimension"),
        (lambda: H.unpack(u8, 33), ValueError, "dim 33"),
        (lambda: H.unpack(u8, 32, torch.int32), ValueError, "dtype is torch.int32"),
        (lambda: H.unpack(u8, 32, np.float32), (ValueError, TypeError), "dtype is"),
        (lambda: H.bind(u8, u8[:2]), ValueError, "broadcast"),
        (lambda: H.bundle(u8[:0], 32), ValueError, "m >= 1"),
        (lambda: H.binarize(u8), TypeError, "uint8"),
        (lambda: H.binarize(f32, "sign"), ValueError, "estimator is 'sign'"),
        (lambda: H.distance([1], u8), TypeError, "a is list"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_results_beyond_memory_are_refused():
    u8 = torch.zeros(3, 4, dtype=torch.uint8)
    with pytest.raises((MemoryError, RuntimeError), match="memory"):
        H.topk(u8, u8, 2**42)
    with pytest.raises((ValueError, RuntimeError, OverflowError)):
        H.topk(u8, u8, 2**63)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_tensors_without_strides_are_refused(layout):
    strange = getattr(torch.eye(8), layout)()
    out = np.zeros((8, 1), np.uint8)
    for call in (lambda: H.pack(strange), lambda: _C.hamming_pack(strange, 0.0, out)):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            call()


def fake(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        return {
            "x": torch.empty(6, DIM, device=device),
            "q": torch.empty(6, 10, dtype=torch.uint8, device=device),
        }


def test_devices_without_kernels_are_refused(inputs):
    there, here = fake("cuda"), to_torch(inputs)
    for call in (
        lambda: H.distance(there["q"], here["db"]),
        lambda: H.score(here["x"], there["q"]),
        lambda: H.distance(here["q"].to("meta"), here["db"]),
        lambda: H.BinaryIndex(DIM).add(there["x"]),
        lambda: H.BinaryIndex(DIM).search(there["q"], 1),
        lambda: H.BinaryIndex(DIM).search(here["x"].to("meta"), 1),
        lambda: H.BinaryIndex(DIM).add(here["q"].to("meta")),
        lambda: H.BinaryIndex(DIM).add(here["x"], torch.arange(6, device="meta")),
        lambda: _C.hamming_to_blocks(there["q"], 0, np.zeros((1, 8, 32), np.uint16), None),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(pentad.DeviceError):
                call()


@pytest.mark.filterwarnings("ignore")
def test_kernels_for_a_device_are_traced_where_they_are_built():
    there = fake("cuda")
    calls = {
        (6, 6): lambda: H.distance(there["q"], there["q"]),
        (6, 3): lambda: H.topk(there["q"], there["q"], 3)[0],
        (6, 10): lambda: H.pack(there["x"]),
        (6, DIM): lambda: H.unpack(there["q"], DIM),
    }  # the others take views, for which torch itself wants CUDA
    for shape, call in calls.items():
        if _C.cuda_built():
            assert call().shape == shape
            assert call().device.type == "cuda"
        else:
            with pytest.raises(pentad.DeviceError, match="has no CUDA kernels"):
                call()


def test_device_error_is_public():
    assert issubclass(pentad.DeviceError, RuntimeError)
    assert pentad.DeviceError is _C.DeviceError


@pytest.mark.parametrize("estimator", ["tanh", "bernoulli"])
def test_second_derivatives_of_binarize(estimator):
    """Of the stand-in: the forward value is constant almost everywhere."""
    x = torch.tensor([0.3, -0.5, 2.0, 0.9], dtype=torch.float64, requires_grad=True)
    slope, stand_in = [], {"tanh": torch.tanh, "bernoulli": lambda t: 2 * torch.sigmoid(t) - 1}
    for y in (pentad.hamming.binarize(x, estimator), stand_in[estimator](x)):
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        slope.append(second)
    torch.testing.assert_close(*slope)


def test_functional_gradients():
    x = torch.randn(3, 20)
    codes = pentad.hamming.pack(torch.randn(5, 20))
    signs = pentad.hamming.unpack(codes, 20)
    got = torch.func.grad(lambda x: pentad.hamming.score(x, codes).square().sum())(x)
    want = torch.func.grad(lambda x: (x @ signs.T).square().sum())(x)
    torch.testing.assert_close(got, want)
    weights = torch.randn(3, 5)
    got = torch.func.grad(lambda w: pentad.hamming.weighted_sum(w, codes, 20).square().sum())(
        weights
    )
    want = torch.func.grad(lambda w: (w @ signs).square().sum())(weights)
    torch.testing.assert_close(got, want)
    got = torch.func.grad(lambda x: pentad.hamming.binarize(x, "tanh").sum())(x)
    torch.testing.assert_close(got, 1 - torch.tanh(x) ** 2)
