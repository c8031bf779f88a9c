# SPDX-License-Identifier: Apache-2.0
"""torch, numpy and other arrays: the same answers through every door, and no door that crashes."""

import gc
import sys
import warnings
import weakref

import numpy as np
import pytest
from cases import LAYOUTS, METRICS, WITHOUT_TORCH, assert_same, codes, laid_out, run_python

import pentad
from pentad import _C

torch = pytest.importorskip("torch")
H = pentad.hamming
DIM = 77


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


@pytest.fixture
def inputs(rng):
    return {
        "x": rng.standard_normal((6, DIM)).astype(np.float32),
        "q": codes(rng, 6, DIM),
        "db": codes(rng, 60, DIM),
        "mask": rng.random(60) < 0.5,
        "w": rng.standard_normal((4, 60)).astype(np.float32),
        "votes": rng.integers(-2, 3, 60).astype(np.float32),
    }


# Every function, as a function of the inputs above.
CALLS = {
    "pack": lambda i: H.pack(i["x"]),
    "pack threshold": lambda i: H.pack(i["x"], 0.5),
    "unpack": lambda i: H.unpack(i["q"], DIM),
    "distance": lambda i: H.distance(i["q"], i["db"]),
    "distance jaccard": lambda i: H.distance(i["q"], i["db"], metric="jaccard"),
    "intersection": lambda i: H.intersection(i["q"], i["db"]),
    "topk": lambda i: H.topk(i["q"], i["db"], 7),
    "topk jaccard": lambda i: H.topk(i["q"], i["db"], 70, metric="jaccard"),
    "topk and": lambda i: H.topk(i["q"], i["db"], 5, metric="and"),
    "topk mask": lambda i: H.topk(i["q"], i["db"], 50, mask=i["mask"]),
    "range": lambda i: H.range_search(i["q"], i["db"], 37.5),
    "range mask": lambda i: H.range_search(i["q"], i["db"], 0.7, metric="jaccard", mask=i["mask"]),
    "score": lambda i: H.score(i["x"], i["db"]),
    "topk_score": lambda i: H.topk_score(i["x"], i["db"], 9),
    "topk_score mask": lambda i: H.topk_score(i["x"], i["db"], 60, mask=i["mask"]),
    "weighted_sum": lambda i: H.weighted_sum(i["w"], i["db"], DIM),
    "ste": lambda i: H.binarize(i["x"]),
    "tanh": lambda i: H.binarize(i["x"], "tanh", 0.5),
    "bind": lambda i: H.bind(i["q"][:, None], i["db"]),
    "bundle": lambda i: H.bundle(i["db"], DIM),
    "bundle weights": lambda i: H.bundle(i["db"], DIM, weights=i["votes"], ties="one"),
    "bundle zero": lambda i: H.bundle(i["db"][:4], DIM, ties="zero"),
    "permute": lambda i: H.permute(i["q"], DIM, 13),
}


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
    assert registered == set(op_arguments(inputs))


def test_opcheck(inputs):
    for name, calls in op_arguments(inputs).items():
        for arguments in calls:
            torch.library.opcheck(getattr(torch.ops.pentad, name).default, arguments)


@pytest.mark.parametrize("dynamic", [False, True, None])
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
        lambda: H.pack(there["x"]),
        lambda: H.unpack(there["q"], DIM),
        lambda: H.topk(there["q"], there["q"], 1),
        lambda: H.score(there["x"], there["q"]),
        lambda: H.distance(there["q"], here["db"]),
        lambda: H.score(here["x"], there["q"]),
        lambda: H.distance(here["q"].to("meta"), here["db"]),
        lambda: H.BinaryIndex(DIM).add(there["x"]),
        lambda: H.BinaryIndex(DIM).search(there["q"], 1),
        lambda: H.BinaryIndex(DIM).search(here["x"].to("meta"), 1),
        lambda: H.BinaryIndex(DIM).add(here["q"].to("meta")),
        lambda: H.BinaryIndex(DIM).add(here["x"], torch.arange(6, device="meta")),
        lambda: _C.hamming_pack(there["x"], 0.0, np.zeros((6, 10), np.uint8)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(pentad.DeviceError):
                call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_tensors_are_refused(inputs):
    there = {k: t.cuda() for k, t in to_torch(inputs).items()}
    for name, call in CALLS.items():
        if name in ("bind", "ste", "tanh"):  # torch's own elementwise functions serve
            assert_same(call(there).cpu().numpy(), CALLS[name](inputs))
        else:
            with pytest.raises(pentad.DeviceError, match="cuda"):
                call(there)
    with pytest.raises(pentad.DeviceError):
        H.BinaryIndex(DIM).add(there["x"])


def test_device_error_is_public():
    assert issubclass(pentad.DeviceError, RuntimeError)
    assert pentad.DeviceError is _C.DeviceError


# --- The extension itself, called with anything ---------------------------------------------------


class Lender:
    """An array of a third library: only __dlpack__."""

    def __init__(self, array, **options):
        self.array, self.options = array, options

    def __dlpack__(self, **_):
        return self.array.__dlpack__(**self.options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("options", [{}, {"max_version": (1, 0)}], ids=["legacy", "versioned"])
@pytest.mark.parametrize("maker", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_any_dlpack_object(inputs, maker, options):
    q, db, mask = (Lender(maker(inputs[k].copy()), **options) for k in ("q", "db", "mask"))
    values, ids = np.zeros((6, 5), np.int32), np.zeros((6, 5), np.int64)
    none = [None] * 4
    _C.hamming_topk(q, db, -1, None, mask, *none, "hamming", values, Lender(ids, **options))
    assert_same((values, ids), H.topk(inputs["q"], inputs["db"], 5, mask=inputs["mask"]))
    strided = Lender(maker(inputs["x"].copy())[::2, :: -1 if maker is np.asarray else 1], **options)
    out = np.zeros((3, 10), np.uint8)
    _C.hamming_pack(strided, 0.0, out)
    assert_same(out, H.pack(inputs["x"][::2, :: -1 if maker is np.asarray else 1]))


def test_buffers_of_the_standard_library():
    out = np.zeros(24, np.float32)
    for buffer in (b"\x80\0\1", bytearray(b"\x80\0\1"), memoryview(b"\x80\0\1")):
        _C.hamming_unpack(buffer, 24, out)
        assert np.flatnonzero(out > 0).tolist() == [0, 23]
    assert _C.stream_read(memoryview(b"\1" + b"\0" * 15)) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_read_where_they_lie(inputs, layout):
    out = np.zeros((6, 60), np.int32)
    _C.hamming_distance(laid_out(inputs["q"], layout), laid_out(inputs["db"], layout), "and", out)
    assert_same(out, H.intersection(inputs["q"], inputs["db"]))


def test_a_call_lets_go_of_its_arguments():
    memory = bytearray(64)
    _C.stream_read(memory)
    with pytest.raises((TypeError, ValueError)):
        _C.hamming_pack(memory, 0.0, np.zeros(8, np.uint8))
    with pytest.raises((TypeError, ValueError)):
        _C.hamming_unpack(memory, 3, np.zeros(8, np.float32))
    memory.append(1)  # refused while a buffer is out

    class Array(np.ndarray):
        pass

    array = np.zeros((4, 8), np.float32).view(Array)
    gone = weakref.ref(array)
    _C.hamming_pack(array, 0.0, np.zeros((4, 1), np.uint8))
    with pytest.raises(ValueError, match="out"):
        _C.hamming_pack(array, 0.0, np.zeros((4, 2), np.uint8))
    lender = Lender(array)
    _C.hamming_pack(lender, 0.0, np.zeros((4, 1), np.uint8))
    before = sys.getrefcount(None)
    for _ in range(1000):
        H.pack(array)
    assert abs(sys.getrefcount(None) - before) < 500
    del array, lender
    gc.collect()
    assert gone() is None


class Liar:
    """An object whose __dlpack__ is no such thing."""

    def __init__(self, value):
        self.value = value

    def __dlpack__(self, **_):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def capsule(name):
    import ctypes

    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    return new(1, name, None)


CAPSULE_NAME = b"something else"


def test_impostors_are_refused():
    out = np.zeros((1, 1), np.uint8)
    exchange = type("Exchange", (), {"__dlpack_c_exchange_api__": capsule(CAPSULE_NAME)})()
    empty = type("Exchange", (), {"__dlpack_c_exchange_api__": 5})()
    for impostor, error in (
        (5, TypeError),
        ("text", TypeError),
        ([[1.0]], TypeError),
        (None, TypeError),
        (object(), TypeError),
        (np.ndarray, TypeError),
        (torch.Tensor, TypeError),
        (Liar(5), TypeError),
        (Liar(None), TypeError),
        (Liar(capsule(CAPSULE_NAME)), TypeError),
        (Liar(KeyError("x")), KeyError),
        (exchange, ValueError),
        (empty, TypeError),
        (np.zeros((1, 1), "M8[s]"), TypeError),
        (np.zeros((1, 1), object), TypeError),
        (np.zeros((1, 1), "S4"), TypeError),
        (np.zeros((1, 1), "U4"), TypeError),
        (np.zeros((1, 1), "V8"), TypeError),
        (np.zeros((1, 1), np.longdouble), TypeError),
        (np.zeros((1, 1), np.complex64), TypeError),
        (np.zeros((1, 1), ">f4"), TypeError),
        (np.zeros((1, 1), [("a", "f4"), ("b", "i1")]), TypeError),
        (np.zeros((3, 1), [("a", "f4"), ("b", "i1")])["a"], TypeError),
        (torch.zeros(1, 1, dtype=torch.complex64), TypeError),
        (np.zeros((1,) * 9, np.float32), TypeError),
        (torch.zeros((1,) * 9), TypeError),
        (np.zeros((), np.float32), ValueError),
        (torch.zeros(()), ValueError),
    ):
        with pytest.raises(error):
            _C.hamming_pack(impostor, 0.0, out)
        if impostor is not None:
            with pytest.raises((TypeError, ValueError, KeyError)):
                _C.hamming_pack(np.zeros((1, 8), np.float32), 0.0, impostor)


def read_only(array):
    array.flags.writeable = False
    return array


def blocks_of(rows):
    """(blocks, ones) as an index keeps them."""
    n, width = rows.shape
    blocks = np.zeros((-(-n // 32), _C.hamming_words(width), 32), np.uint16)
    ones = np.zeros(n, np.uint16)
    _C.hamming_to_blocks(rows, 0, blocks, ones)
    return blocks, ones


def hostile_calls():
    rng = np.random.default_rng(0)
    z = np.zeros
    q, db = codes(rng, 3, 64), codes(rng, 70, 64)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    blocks, ones = blocks_of(db)
    values, ids = z((3, 4), np.int32), z((3, 4), np.int64)
    none = [None] * 4
    i64 = lambda *v: np.array(v, np.int64)  # noqa: E731
    offsets, begin, end = i64(0, 1, 2, 3), i64(0, 32, 64), i64(20, 64, 70)
    at = i64([0, 69], [-1, 5], [3, 3])
    vectors, scale, scores = z((70, 64), np.int8), z(70, np.float32), z((3, 2), np.float32)

    def topk(database=db, rows=-1, ones=None, mask=None, ids_in=None, ranges=(None,) * 3, q=q,
             metric="hamming", values=values, ids=ids):  # fmt: skip
        return lambda: _C.hamming_topk(
            q, database, rows, ones, mask, ids_in, *ranges, metric, values, ids
        )

    def ranged(offsets=offsets, begin=begin, end=end):
        return topk(blocks, 70, ranges=(offsets, begin, end))

    def from_blocks(positions, rows=70, out=None, blocks=blocks):
        out = z((len(positions), 8), np.uint8) if out is None else out
        return lambda: _C.hamming_from_blocks(blocks, rows, positions, out)

    def candidates(at=at, rows=70, blocks=blocks, out=scores, x=x):
        return lambda: _C.hamming_score_candidates(x, blocks, rows, at, out)

    def dots(vectors=vectors, scale=scale, at=at, out=scores, x=x):
        return lambda: _C.hamming_dot_candidates(x, vectors, scale, at, out)

    def found(indptr=None, values=None, ids=None):
        indptr = z(4, np.int64) if indptr is None else indptr
        hits = _C.hamming_range(q, db, -1, None, None, *none, "hamming", 64.0)
        v = z(hits.total, np.int32) if values is None else values
        return lambda: hits.write(indptr, v, z(hits.total, np.int64) if ids is None else ids)

    good = {
        "topk": topk(),
        "topk blocks": topk(blocks, 70, metric="hamming"),
        "topk ranges": ranged(),
        "from_blocks": from_blocks(i64(0, 69)),
        "candidates": candidates(),
        "dots": dots(),
        "found": found(),
        "to_blocks": lambda: _C.hamming_to_blocks(db, 0, blocks, ones),
    }
    bad = {
        "topk outputs of another shape": topk(values=z((3, 5), np.int32)),
        "topk ids of another shape": topk(ids=z((4, 4), np.int64)),
        "topk values of another type": topk(values=z((3, 4), np.float32)),
        "topk ids of another type": topk(ids=z((3, 4), np.int32)),
        "topk jaccard into ints": topk(metric="jaccard"),
        "topk read-only": topk(values=read_only(z((3, 4), np.int32))),
        "topk read-only ids": topk(ids=read_only(z((3, 4), np.int64))),
        "topk strided outputs": topk(values=z((3, 8), np.int32)[:, ::2]),
        "topk transposed outputs": topk(values=z((4, 3), np.int32).T),
        "topk outputs of rank 0": topk(values=z((), np.int32), ids=z((), np.int64)),
        "topk outputs of rank 1": topk(values=z(12, np.int32), ids=z(12, np.int64)),
        "topk zero-stride outputs": topk(
            values=np.lib.stride_tricks.as_strided(z(1, np.int32), (3, 4), (0, 0))
        ),
        "topk metric": topk(metric="x"),
        "topk widths": topk(db[:, :7]),
        "topk no width": topk(db[:, :0], q=q[:, :0]),
        "topk rank": topk(db[0]),
        "topk rank 0": topk(np.uint8(1)),
        "topk too many rows": topk(blocks, 97),
        "topk negative rows": topk(blocks, -1),
        "topk huge rows": topk(blocks, 2**62),
        "topk blocks width": topk(blocks[:, :3], 70),
        "topk blocks slice": topk(blocks[:, ::2], 70),
        "topk blocks lanes": topk(blocks[:, :, ::-1], 70),
        "topk blocks reversed": topk(blocks[::-1], 70),
        "topk blocks no words": topk(blocks[:, :0], 70),
        "topk blocks type": topk(blocks.view(np.int16), 70),
        "topk mask length": topk(mask=z(69, bool)),
        "topk mask type": topk(mask=z(70, np.uint8)),
        "topk mask strided": topk(mask=z(140, bool)[::2]),
        "topk mask rank": topk(mask=z((70, 1), bool)),
        "topk ids length": topk(ids_in=z(69, np.int64)),
        "topk ids type": topk(ids_in=z(70, np.int32)),
        "topk jaccard without ones": topk(
            blocks, 70, metric="jaccard", values=z((3, 4), np.float32)
        ),
        "topk jaccard short ones": topk(
            blocks, 70, ones[:69], metric="jaccard", values=z((3, 4), np.float32)
        ),
        "ranges short offsets": ranged(offsets=i64(0, 3)),
        "ranges offsets past the end": ranged(offsets=i64(0, 1, 2, 4)),
        "ranges falling offsets": ranged(offsets=i64(0, 2, 1, 3)),
        "ranges negative offsets": ranged(offsets=i64(-1, 1, 2, 3)),
        "ranges negative begin": ranged(begin=i64(-32, 32, 64)),
        "ranges odd begin": ranged(begin=i64(1, 32, 64)),
        "ranges end past the rows": ranged(end=i64(20, 64, 71)),
        "ranges end before begin": ranged(end=i64(20, 31, 70)),
        "ranges huge": ranged(begin=i64(2**62, 32, 64), end=i64(2**62 + 32, 64, 70)),
        "ranges unequal": ranged(end=i64(20, 64)),
        "ranges incomplete": ranged(end=None),
        "ranges without begin": ranged(begin=None),
        "ranges of rank 0": ranged(begin=np.int64(0)),
        "ranges of rank 2": ranged(begin=begin[None], end=end[None]),
        "ranges strided": ranged(offsets=np.repeat(offsets, 2)[::2]),
        "positions past the rows": from_blocks(i64(70)),
        "positions negative": from_blocks(i64(-1)),
        "positions lowest": from_blocks(i64(-(2**63))),
        "positions strided": from_blocks(i64(1, 2, 3, 4)[::2]),
        "positions rank": from_blocks(i64([1], [2])),
        "positions out": from_blocks(i64(1, 2), out=z((3, 8), np.uint8)),
        "positions out width": from_blocks(i64(1, 2), out=z((2, 9), np.uint8)),
        "positions out read-only": from_blocks(i64(1, 2), out=read_only(z((2, 8), np.uint8))),
        "positions rows": from_blocks(i64(1, 2), rows=97),
        "candidates past the rows": candidates(i64([0, 70], [0, 0], [0, 0])),
        "candidates queries": candidates(at[:2]),
        "candidates strided": candidates(np.repeat(at, 2, 1)[:, ::2]),
        "candidates out": candidates(out=z((3, 3), np.float32)),
        "candidates width": candidates(x=z((3, 65), np.float32)),
        "candidates double": candidates(x=x.astype(np.float64)),
        "dots past the rows": dots(at=i64([0, 70], [0, 0], [0, 0])),
        "dots without a scale": dots(scale=None),
        "dots short scale": dots(scale=scale[:69]),
        "dots width": dots(vectors=vectors[:, :63]),
        "dots strided": dots(vectors=z((70, 128), np.int8)[:, ::2]),
        "dots type": dots(vectors=vectors.view(np.uint8)),
        "dots out": dots(out=read_only(z((3, 2), np.float32))),
        "to_blocks no room": lambda: _C.hamming_to_blocks(db, 27, blocks, None),
        "to_blocks negative": lambda: _C.hamming_to_blocks(db, -1, blocks, None),
        "to_blocks huge": lambda: _C.hamming_to_blocks(db, 2**63 - 1, blocks, None),
        "to_blocks width": lambda: _C.hamming_to_blocks(codes(rng, 3, 65), 0, blocks, None),
        "to_blocks ones": lambda: _C.hamming_to_blocks(db, 0, blocks, ones[:69]),
        "to_blocks ones type": lambda: _C.hamming_to_blocks(db, 0, blocks, ones.view(np.int16)),
        "to_blocks ones read-only": lambda: _C.hamming_to_blocks(
            db, 0, blocks, read_only(ones.copy())
        ),
        "to_blocks read-only": lambda: _C.hamming_to_blocks(db, 0, read_only(blocks.copy()), None),
        "found indptr": found(indptr=z(3, np.int64)),
        "found values": found(values=z(5, np.int32)),
        "found ids": found(ids=z(5, np.int64)),
        "found float values": found(values=z(3 * 70, np.float32)),
        "found read-only": found(indptr=read_only(z(4, np.int64))),
        "distance out": lambda: _C.hamming_distance(q, db, "hamming", z((3, 69), np.int32)),
        "distance rank": lambda: _C.hamming_distance(q[0], db, "hamming", z((1, 70), np.int32)),
        "score out": lambda: _C.hamming_score(x, db, z((70, 3), np.float32)),
        "score width": lambda: _C.hamming_score(x, db[:, :7], z((3, 70), np.float32)),
        "score half": lambda: _C.hamming_score(x.astype("f2"), db, z((3, 70), np.float32)),
        "topk_score NaN": lambda: _C.hamming_topk_score(
            x * np.nan, db, -1, None, None, z((3, 4), np.float32), ids
        ),
        "topk_score out": lambda: _C.hamming_topk_score(
            x, db, -1, None, None, z((3, 4), np.float32), ids[:2]
        ),
        "weighted_sum ranks": lambda: _C.hamming_weighted_sum(
            z((3, 70), np.float32), db, 64, z((3, 64), np.float32)
        ),
        "weighted_sum batch": lambda: _C.hamming_weighted_sum(
            z((2, 3, 70), np.float32), db[None], 64, z((2, 3, 64), np.float32)
        ),
        "weighted_sum rows": lambda: _C.hamming_weighted_sum(
            z((1, 3, 71), np.float32), db[None], 64, z((1, 3, 64), np.float32)
        ),
        "weighted_sum dim": lambda: _C.hamming_weighted_sum(
            z((1, 3, 70), np.float32), db[None], 65, z((1, 3, 65), np.float32)
        ),
        "weighted_sum dim 0": lambda: _C.hamming_weighted_sum(
            z((1, 3, 70), np.float32), db[None, :, :0], 0, z((1, 3, 0), np.float32)
        ),
        "pack out": lambda: _C.hamming_pack(x, 0.0, z((3, 7), np.uint8)),
        "pack out rank": lambda: _C.hamming_pack(x, 0.0, z(24, np.uint8)),
        "pack out strided": lambda: _C.hamming_pack(x, 0.0, z((3, 16), np.uint8)[:, ::2]),
        "pack out read-only": lambda: _C.hamming_pack(x, 0.0, b"24 bytes"),
        "unpack dim": lambda: _C.hamming_unpack(q, 65, z((3, 65), np.float32)),
        "unpack negative dim": lambda: _C.hamming_unpack(q, -7, z((3, 0), np.float32)),
        "unpack huge dim": lambda: _C.hamming_unpack(q, 2**63 - 1, z((3, 64), np.float32)),
        "unpack type": lambda: _C.hamming_unpack(q, 64, z((3, 64), np.int64)),
        "permute dim": lambda: _C.hamming_permute(q, 57 - 1, 1, z((3, 8), np.uint8)),
        "permute out": lambda: _C.hamming_permute(q, 64, 1, z((3, 9), np.uint8)),
        "stream_read strided": lambda: _C.stream_read(z(64, np.uint8)[::2]),
        "stream_read rank": lambda: _C.stream_read(z((8, 8), np.uint8)),
        "result without a search": _C.HammingRange,
    }
    return good, bad


GOOD, BAD = hostile_calls()


@pytest.mark.parametrize("name", GOOD)
def test_the_calls_that_the_hostile_ones_vary_are_fine(name):
    GOOD[name]()


@pytest.mark.parametrize("name", BAD)
def test_hostile_calls_raise(name):
    with pytest.raises((TypeError, ValueError)):
        BAD[name]()


def test_operators_called_directly_with_nonsense():
    CALLS["pack"]({"x": torch.zeros(1, 8)})  # registers them
    ops, u8, f32 = torch.ops.pentad, torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, 32)
    for call in (
        lambda: ops.hamming_topk(u8, u8, -1, "hamming", None),
        lambda: ops.hamming_topk(u8, u8[:, :3], 1, "hamming", None),
        lambda: ops.hamming_topk(u8, u8, 1, "", None),
        lambda: ops.hamming_topk(u8, u8, 1, "hamming", torch.zeros(2).bool()),
        lambda: ops.hamming_topk(u8[0], u8, 1, "hamming", None),
        lambda: ops.hamming_range_search(u8, u8[0], 1.0, "hamming", None),
        lambda: ops.hamming_distance(u8, f32, "hamming"),
        lambda: ops.hamming_distance(u8, u8, "x"),
        lambda: ops.hamming_score(f32.double(), u8),
        lambda: ops.hamming_score(f32, u8[:, :2]),
        lambda: ops.hamming_topk_score(f32, u8, -5, None),
        lambda: ops.hamming_weighted_sum(f32, u8, 32),
        lambda: ops.hamming_weighted_sum(f32[None, :, :3], u8[None], 99),
        lambda: ops.hamming_pack(u8, 0.0),
        lambda: ops.hamming_pack(torch.tensor(1.0), 0.0),
        lambda: ops.hamming_unpack(u8, 99, torch.float32),
        lambda: ops.hamming_unpack(u8, 32, torch.complex64),
        lambda: ops.hamming_permute(u8, -1, 0),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            call()


def test_a_tensor_without_memory_is_refused():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError(func)

    with pytest.raises((ValueError, RuntimeError, TypeError, BufferError, NotImplementedError)):
        _C.hamming_pack(Wrapper(torch.zeros(4, 8)), 0.0, np.zeros((4, 1), np.uint8))


def test_channels_last(rng):
    x = torch.from_numpy(rng.standard_normal((2, 5, 3, 9)).astype(np.float32))
    last = x.contiguous(memory_format=torch.channels_last)
    assert last.stride() != x.stride()
    assert torch.equal(H.pack(last), H.pack(x))
    packed = H.pack(x)
    assert torch.equal(H.unpack(packed.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), 9),
                       H.unpack(packed, 9))  # fmt: skip


# --- Memory ---------------------------------------------------------------------------------------


def bytes_in_use():
    """What the C heap holds; numpy's and the kernels' memory is in it, most of Python's is not."""
    import ctypes

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost")]  # fmt: skip

    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        pytest.skip("needs glibc 2.33")
    mallinfo2.restype = Info
    gc.collect()
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def test_no_call_keeps_memory(inputs):
    nan = inputs["x"] * np.nan

    def round_():
        for call in CALLS.values():
            call(inputs)
        for refused in (
            lambda: H.pack(nan),
            lambda: H.topk_score(nan, inputs["db"], 3),
            lambda: _C.hamming_score(inputs["x"], inputs["db"], np.zeros((1, 1), np.float32)),
            lambda: _C.hamming_pack(Lender(inputs["x"]), 0.0, np.zeros((6, 9), np.uint8)),
        ):
            with pytest.raises(ValueError):  # noqa: PT011
                refused()

    for _ in range(20):
        round_()
    before = bytes_in_use()
    for _ in range(200):
        round_()
    assert bytes_in_use() - before < 200 * 300  # bytes per round; one lost buffer is more


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.parametrize("torch_too", [False, True])
def test_a_kernel_that_runs_out_of_memory_raises(torch_too):
    """In worker threads, too, where an exception that escapes would end the process."""
    start = "import torch\n" if torch_too else WITHOUT_TORCH
    run_python(
        start
        + """
import resource
import numpy as np
import pentad
pentad.set_num_threads(2)
n = 1 << 19
codes = np.zeros((n, 8), np.uint8)
queries = np.zeros((64, 8), np.uint8)
pentad.hamming.topk(queries[:2], codes, 3)  # the threads have their stacks

def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def limited(room, call):
    size = mapped()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + room, limits[1]))
    try:
        call()
    except MemoryError:
        pass
    else:
        raise AssertionError("there was enough memory")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)

# The outputs fit (400 MB), the hits of 64 queries beside them do not (1 GB).
before = mapped()
for _ in range(3):
    limited(600 << 20, lambda: pentad.hamming.topk(queries, codes, n))
    limited(200 << 20, lambda: pentad.hamming.range_search(queries, codes, 1))
assert mapped() - before < 200 << 20, "what a failed search had is lost"
found = pentad.hamming.topk(queries[:2], codes, 3)[1]
assert found.tolist() == [[0, 1, 2]] * 2
"""
    )


# --- Ranges of rows -------------------------------------------------------------------------------


def test_overlapping_ranges_visit_rows_twice(rng):
    db, q = codes(rng, 64, 64), codes(rng, 1, 64)
    blocks, _ = blocks_of(db)
    values, ids = np.zeros((1, 128), np.int32), np.zeros((1, 128), np.int64)
    ranges = [np.array(v, np.int64) for v in ([0, 2], [0, 0], [64, 64])]
    _C.hamming_topk(q, blocks, 64, None, None, None, *ranges, "hamming", values, ids)
    want = H.topk(q, db, 64)
    # At most as many results as there are rows: each of the best appears twice.
    assert_same(values[:, :64], np.repeat(want[0], 2, 1)[:, :64])
    assert_same(ids[:, :64], np.repeat(want[1], 2, 1)[:, :64])
    assert (ids[:, 64:] == -1).all()


def test_ranges_over_row_major_codes(rng):
    db, q = codes(rng, 96, 40), codes(rng, 2, 40)
    ranges = [np.array(v, np.int64) for v in ([0, 1, 3], [32, 0, 64], [90, 10, 96])]
    hits = _C.hamming_range(q, db, -1, None, None, None, *ranges, "hamming", 99.0)
    indptr, values, ids = np.zeros(3, np.int64), np.zeros(hits.total, np.int32), None
    ids = np.zeros(hits.total, np.int64)
    hits.write(indptr, values, ids)
    assert_same(ids, np.concatenate([np.arange(32, 90), np.arange(10), np.arange(64, 96)]))
    d = H.distance(q, db)
    assert_same(values, np.concatenate([d[0, 32:90], d[1, :10], d[1, 64:96]]))
    assert indptr.tolist() == [0, 58, 100]
