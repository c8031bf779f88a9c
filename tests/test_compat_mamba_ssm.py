# SPDX-License-Identifier: Apache-2.0
"""pentad.compat.mamba_ssm on the cases of mamba_ssm's own tests with its tolerances, and beyond.

Inputs are drawn as mamba_ssm draws them. The expected values are those of the plain functions.
"""

import inspect
import itertools
import random

import pytest

torch = pytest.importorskip("torch")

from torch.nn.functional import linear, silu, softplus  # noqa: E402

from pentad.compat import mamba_ssm  # noqa: E402
from pentad.compat.mamba_ssm.ops import selective_scan_interface as interface  # noqa: E402
from pentad.compat.mamba_ssm.ops.triton import selective_state_update as update  # noqa: E402

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Relative and absolute.
SCAN = {F32: (6e-4, 2e-3), F16: (3e-3, 5e-3), BF16: (3e-2, 5e-2)}
UPDATE = {F32: (3e-4, 1e-3), F16: (5e-3, 1e-2), BF16: (1e-2, 5e-2)}
UPDATE_WITH_HEADS = {**UPDATE, BF16: (1e-2, 1e-1)}
PARAMETER = (1e-3, 1e-3)


def close(actual, expected, tolerance, relative=1, absolute=1):
    rtol, atol = tolerance
    torch.testing.assert_close(actual, expected, rtol=rtol * relative, atol=atol * absolute)


def leaves(inputs):
    """The tensors of a dict as new leaves."""
    return {
        name: x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x
        for name, x in inputs.items()
    }


def outcome(function, inputs, d_out, *, d_last=None, **options):
    """(out, last state or None, gradients by name)."""
    inputs = leaves({name: x for name, x in inputs.items() if x is not None})
    result = function(**inputs, **options)
    out, last = result if isinstance(result, tuple) else (result, None)
    roots, seeds = [out], [d_out]
    if d_last is not None:
        roots, seeds = [out, last], [d_out, d_last]
    gradients = torch.autograd.grad(roots, list(inputs.values()), seeds)
    return out, last, dict(zip(inputs, gradients, strict=True))


# --- Signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            interface.selective_scan_fn,
            "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
            "return_last_state=False",
        ),
        (
            interface.mamba_inner_fn,
            "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, "
            "out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, "
            "C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, "
            "c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-06",
        ),
        (
            interface.mamba_inner_ref,
            "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, "
            "out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, "
            "C_proj_bias=None, delta_softplus=True",
        ),
        (
            update.selective_state_update,
            "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
            "state_batch_indices=None",
        ),
    ],
)
def test_signatures_are_those_of_mamba_ssm(function, parameters):
    assert str(inspect.signature(function)) == f"({parameters})"


def test_references_and_package():
    signature = inspect.signature
    assert signature(interface.selective_scan_ref) == signature(interface.selective_scan_fn)
    names = list(signature(update.selective_state_update).parameters)[:-1]
    assert list(signature(update.selective_state_update_ref).parameters) == names
    assert mamba_ssm.selective_scan_fn is interface.selective_scan_fn
    import pentad.nn
    from pentad.compat.mamba_ssm.modules.mamba_simple import Mamba

    assert Mamba is mamba_ssm.Mamba is pentad.nn.Mamba


# --- selective_scan_fn ----------------------------------------------------------------------------


def scan_inputs(
    seed, dtype, length, *, dim=4, states=8, groups=1, complex=False, constant=(), without=()
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=dtype if dtype == F64 else F32).to(
            dtype
        )

    def uniform(*shape):
        return 0.5 * torch.rand(shape, generator=generator)

    wide = F64 if dtype == F64 else F32
    weight = (torch.complex128 if dtype == F64 else torch.complex64) if complex else wide
    inputs = {"u": normal(2, dim, length), "delta": uniform(2, dim, length).to(dtype)}
    A = -uniform(dim, states)
    inputs["A"] = (torch.complex(A, normal(dim, states, dtype=F32)) if complex else A).to(weight)
    for name in "BC":
        if name in constant:
            inputs[name] = normal(dim, states, dtype=weight)
        else:
            steps = length * (2 if complex else 1)
            shape = (2, states, steps) if groups == 1 else (2, groups, states, steps)
            inputs[name] = normal(*shape)
    inputs |= {"D": normal(dim, dtype=wide), "z": normal(2, dim, length)}
    inputs["delta_bias"] = uniform(dim).to(wide)
    return {name: x for name, x in inputs.items() if name not in without}


def check_scan(inputs, dtype, softplus=True, with_last_gradient=False):
    tolerance = SCAN[dtype]
    d_out = torch.randn_like(inputs["u"])
    options = {"delta_softplus": softplus, "return_last_state": True}
    if with_last_gradient:
        options["d_last"] = torch.randn(2, *inputs["A"].shape, dtype=inputs["A"].dtype)
    out, last, gradients = outcome(interface.selective_scan_fn, inputs, d_out, **options)
    ref, ref_last, expected = outcome(interface.selective_scan_ref, inputs, d_out, **options)
    close(out, ref, tolerance)
    close(last, ref_last, tolerance)
    assert last.dtype == inputs["A"].dtype
    weights = tuple(map(max, PARAMETER, tolerance))
    assert gradients.keys() == inputs.keys()
    for name, gradient in gradients.items():
        bounds = {
            "u": (tolerance, 2, 2),
            "delta": (tolerance, 5, 10),
            "A": (PARAMETER, 1, 5),
        }.get(name, (weights,) if inputs[name].ndim < 3 else (tolerance,))
        close(gradient, expected[name], *bounds)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [128, 256, 512, 1024])
def test_selective_scan(length, groups):
    check_scan(scan_inputs(length + groups, F32, length, groups=groups), F32)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_selective_scan_options(seed, dtype):
    """Every kind of A, B and C, without and with each optional tensor, at odd lengths."""
    draw = random.Random(seed)
    inputs = scan_inputs(
        seed,
        dtype,
        draw.choice((1, 2, 31, 33, 65, 130)),
        groups=draw.choice((1, 2)),
        dim=draw.choice((4, 18)),
        states=draw.choice((1, 5, 8, 16)),
        complex=seed % 2 == 1,
        constant=[name for name in "BC" if draw.random() < 0.4],
        without=[name for name in ("D", "z", "delta_bias") if draw.random() < 0.3],
    )
    check_scan(inputs, dtype, softplus=draw.random() < 0.7, with_last_gradient=True)


def test_last_state_with_constant_B():
    inputs = scan_inputs(0, F32, 40, constant="BC")
    last = interface.selective_scan_fn(**inputs, return_last_state=True)[1]
    step = inputs["delta"] + inputs["delta_bias"][:, None]
    later = step.flip(2).cumsum(2).flip(2) - step  # the time between each step and the last
    weights = (
        torch.exp(later[:, :, None] * inputs["A"][..., None]) * (step * inputs["u"])[:, :, None]
    )
    close(last, (weights * inputs["B"][..., None]).sum(-1), SCAN[F32])


def test_selective_scan_gradients_in_float64():
    for complex in (False, True):
        inputs = scan_inputs(5, F64, 7, dim=2, states=3, complex=complex)
        names = list(inputs)

        def scan(*tensors, names=names):
            given = dict(zip(names, tensors, strict=True))
            return interface.selective_scan_fn(**given, delta_softplus=True, return_last_state=True)

        assert torch.autograd.gradcheck(scan, list(leaves(inputs).values()))


def test_selective_scan_layouts():
    """Channels side by side in memory, as transformers has u and z, give the same."""
    inputs = scan_inputs(3, F32, 50, dim=6)
    expected = interface.selective_scan_fn(**inputs)
    turned = {
        name: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim == 3 else x
        for name, x in inputs.items()
    }
    close(interface.selective_scan_fn(**turned), expected, (1e-5, 1e-5))
    wide = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in inputs.items()}
    close(interface.selective_scan_fn(**wide), expected, (1e-5, 1e-5))


def test_selective_scan_of_nothing_and_of_nan():
    inputs = scan_inputs(0, F32, 0)
    out, last = interface.selective_scan_fn(**inputs, return_last_state=True)
    assert out.shape == (2, 4, 0)
    assert torch.equal(last, torch.zeros(2, 4, 8))
    inputs = scan_inputs(0, F32, 20)
    inputs["u"][0, 1, 7] = torch.nan
    nan = interface.selective_scan_fn(**inputs).isnan()
    assert nan[0, 1, 7:].all()
    assert nan.sum() == 13


def test_selective_scan_is_deterministic():
    inputs = scan_inputs(1, F32, 300, dim=33, groups=3)
    d_out = torch.randn_like(inputs["u"])
    first = outcome(interface.selective_scan_fn, inputs, d_out)[2]
    for _ in range(5):
        again = outcome(interface.selective_scan_fn, inputs, d_out)[2]
        assert all(torch.equal(first[name], again[name]) for name in first)


# --- mamba_inner_fn -------------------------------------------------------------------------------


def inner_inputs(seed, dtype, *, dim=48, length=128, states=8, rank=6, complex=False, constant=()):
    """As mamba_ssm's test, smaller; x_proj has rows for what varies."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=F32, scale=1.0):
        wide = dtype if dtype in (F64, torch.complex64, torch.complex128) else F32
        return (scale * torch.randn(shape, generator=generator, dtype=wide)).to(dtype)

    wide = F64 if dtype == F64 else F32
    weight = (torch.complex128 if dtype == F64 else torch.complex64) if complex else wide
    rows = states * (2 if complex else 1)
    A = (-0.5 * torch.rand(dim, states, generator=generator)).to(wide)
    return {
        "xz": normal(2, 2 * dim, length, dtype=dtype),
        "conv1d_weight": normal(dim, 1, 3, dtype=wide),
        "conv1d_bias": normal(dim, dtype=wide),
        "x_proj_weight": normal(
            rank + rows * (2 - len(constant)), dim, dtype=dtype, scale=dim**-0.5
        ),
        "delta_proj_weight": normal(dim, rank, dtype=dtype, scale=rank**-0.5),
        "out_proj_weight": normal(dim // 2, dim, dtype=dtype, scale=dim**-0.5),
        "out_proj_bias": normal(dim // 2, dtype=dtype),
        "A": torch.complex(A, normal(dim, states, dtype=wide)) if complex else A,
        "B": normal(dim, states, dtype=weight) if "B" in constant else None,
        "C": normal(dim, states, dtype=weight) if "C" in constant else None,
        "D": normal(dim, dtype=wide),
        "delta_bias": 0.5 * torch.rand(dim, generator=generator, dtype=wide),
        "B_proj_bias": None if "B" in constant else normal(rows, dtype=dtype),
        "C_proj_bias": None if "C" in constant else normal(rows, dtype=dtype),
    }


def compare_inner(expected_function, inputs, tolerance, **options):
    generator = torch.Generator().manual_seed(1)
    shape = (*inputs["xz"].shape[::2], inputs["out_proj_weight"].shape[0])
    d_out = torch.randn(shape, generator=generator, dtype=F32).to(inputs["xz"].dtype)
    out, _, gradients = outcome(interface.mamba_inner_fn, inputs, d_out, **options)
    ref, _, expected = outcome(expected_function, inputs, d_out, **options)
    close(out, ref, tolerance)
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape
        size = expected[name].abs().max()  # gradients of weights are sums over all steps
        close(gradient / size, expected[name] / size, tolerance)


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
def test_mamba_inner(complex, constant):
    inputs = inner_inputs(1, F32, complex=complex, constant=constant)
    compare_inner(interface.mamba_inner_ref, inputs, (1e-3, 1e-3))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_mamba_inner_in_half_precision(dtype):
    compare_inner(interface.mamba_inner_ref, inner_inputs(2, dtype), SCAN[dtype])


def plain_inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
    out_proj_bias, A, D, delta_bias, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight,
    dt_rms_weight, b_c_dt_rms_eps,
):  # fmt: skip
    """With the three normalisations and all states in memory, in torch alone."""

    def normalised(x, weight):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + b_c_dt_rms_eps) * weight

    x, z = xz.chunk(2, 1)
    width, length = conv1d_weight.shape[2], x.shape[2]
    x = torch.nn.functional.conv1d(
        x, conv1d_weight, conv1d_bias, padding=width - 1, groups=x.shape[1]
    )
    x = silu(x[..., :length]).transpose(1, 2)  # (B, L, D)
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    low_rank, B, C = linear(x, x_proj_weight).split([rank, states, states], -1)
    delta = normalised(linear(low_rank, delta_proj_weight), dt_rms_weight)
    delta = softplus(delta + delta_bias)
    B = normalised(B + B_proj_bias, b_rms_weight)
    C = normalised(C + C_proj_bias, c_rms_weight)
    log_decay = (delta[..., None] * A).cumsum(1)  # (B, L, D, N)
    since = (log_decay[:, :, None] - log_decay[:, None]).exp()  # (B, t, s, D, N)
    since = since * torch.ones(length, length).tril()[..., None, None]
    y = torch.einsum("btsdn,bsd,bsn,btn->btd", since, delta * x, B, C) + D * x
    return linear(y * silu(z.transpose(1, 2)), out_proj_weight, out_proj_bias)


def normalised_inputs(seed, dtype, **sizes):
    inputs = inner_inputs(seed, dtype, **sizes)
    dim, states = inputs["A"].shape
    generator = torch.Generator().manual_seed(seed)
    for name, size in (("b", states), ("c", states), ("dt", dim)):
        inputs[f"{name}_rms_weight"] = 0.5 + torch.rand(size, generator=generator, dtype=dtype)
    return {name: x for name, x in inputs.items() if x is not None}


def test_mamba_inner_with_normalisations():
    """Which have no gradient in mamba_ssm, and are applied twice in its backward pass."""
    inputs = normalised_inputs(3, F32, dim=12, length=9, states=5)
    compare_inner(plain_inner, inputs, (1e-4, 1e-4), b_c_dt_rms_eps=1e-3)
    plain = {name: x for name, x in inputs.items() if "rms" not in name}
    without = interface.mamba_inner_fn(**plain)
    for name in ("b_rms_weight", "c_rms_weight", "dt_rms_weight"):
        out = interface.mamba_inner_fn(**plain, **{name: inputs[name]})
        assert not torch.allclose(out, without, rtol=1e-3, atol=1e-3)


def test_mamba_inner_gradients_in_float64():
    inputs = normalised_inputs(4, F64, dim=4, length=5, states=2, rank=2)
    names = list(inputs)

    def inner(*tensors):
        return interface.mamba_inner_fn(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(inner, list(leaves(inputs).values()))


def test_mamba_inner_layouts():
    """Channels side by side in memory give the same."""
    inputs = inner_inputs(5, F32, length=37)
    expected = interface.mamba_inner_fn(**inputs)
    inputs["xz"] = inputs["xz"].transpose(1, 2).contiguous().transpose(1, 2)
    close(interface.mamba_inner_fn(**inputs), expected, (1e-4, 1e-4))


def test_mamba_inner_under_autocast():
    inputs = inner_inputs(6, F32, length=40)
    expected = interface.mamba_inner_fn(**inputs)
    with torch.autocast("cpu", BF16):
        out = interface.mamba_inner_fn(**inputs)
    assert out.dtype == BF16
    assert (out.float() - expected).norm() < 0.03 * expected.norm()


def test_mamba_inner_refuses_a_projection_of_other_size():
    inputs = inner_inputs(7, F32)
    inputs["x_proj_weight"] = inputs["x_proj_weight"][:-1]
    with pytest.raises(ValueError, match=r"x_proj_weight has 21 rows, expected 6 \+ 8 \+ 8"):
        interface.mamba_inner_fn(**inputs)


def test_transformers_is_told_to_compute_step_by_step():
    """Its call knows neither the padding nor the packed sequences."""
    assert mamba_ssm.mamba_inner_fn is interface.mamba_inner_fn
    from pentad.compat.mamba_ssm import mamba_inner_fn

    assert mamba_inner_fn is interface.mamba_inner_fn
    asked = {"__name__": "transformers.utils.import_utils", "package": mamba_ssm}
    exec("function = getattr(package, 'mamba_inner_fn', None)", asked)
    assert inspect.signature(asked["function"]) == inspect.signature(interface.mamba_inner_fn)
    assert asked["function"](**inner_inputs(8, F32, length=4)) is None
    assert not hasattr(mamba_ssm, "mamba_chunk_scan_combined")


# --- selective_state_update -----------------------------------------------------------------------


def check_update(arguments, options, tolerance, indices=None):
    state = arguments["state"]
    ours, reference = state.clone(), state.clone()
    if indices is None:
        out = update.selective_state_update(**{**arguments, "state": ours}, **options)
        expected = update.selective_state_update_ref(**{**arguments, "state": reference}, **options)
    else:
        out = update.selective_state_update(
            **{**arguments, "state": ours}, **options, state_batch_indices=indices
        )
        rows = reference[indices.long()]
        expected = update.selective_state_update_ref(**{**arguments, "state": rows}, **options)
        reference[indices.long()] = rows
    close(out, expected, tolerance)
    close(ours, reference, tolerance)


def update_inputs(dtype, shape, rows, B_shape, tie=False):
    """`shape` is (dim,) or (heads, head_dim); tied: a value for each head."""
    states = B_shape[-1]
    value = (shape[0], 1) if tie else shape
    wide = (*value, 1) if tie else (*shape, states)
    return {
        "state": torch.randn(rows, *shape, states, dtype=dtype),
        "x": torch.randn(B_shape[0], *shape, dtype=dtype),
        "dt": torch.randn(B_shape[0], *value, dtype=dtype).expand(-1, *shape),
        "A": (-torch.rand(wide) - 1.0).expand(*shape, states),
        "B": torch.randn(B_shape).to(dtype),
        "C": torch.randn(B_shape).to(dtype),
        "D": torch.randn(value).expand(shape),
        "dt_bias": (torch.rand(value) - 4.0).expand(shape),
    }


@pytest.mark.parametrize("dtype", UPDATE, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("states", [16, 32, 64])
@pytest.mark.parametrize("dim", [2048, 2064, 4096])
def test_state_update(dim, states, gated, dtype):
    arguments = update_inputs(dtype, (dim,), 2, (2, states))
    z = torch.randn_like(arguments["x"]) if gated else None
    check_update(arguments, {"z": z, "dt_softplus": True}, UPDATE[dtype])


@pytest.mark.parametrize("dtype", UPDATE, ids=str)
@pytest.mark.parametrize(
    ("groups", "tie", "gated"), [*itertools.product([1, 2, 4], [False, True], [False, True])]
)
def test_state_update_with_heads(groups, tie, gated, dtype):
    for states, dim in ((16, 2048), (64, 4096)):
        arguments = update_inputs(dtype, (dim // 64, 64), 2, (2, groups, states), tie)
        z = torch.randn_like(arguments["x"]) if gated else None
        check_update(arguments, {"z": z, "dt_softplus": True}, UPDATE_WITH_HEADS[dtype])


@pytest.mark.parametrize("dtype", UPDATE, ids=str)
@pytest.mark.parametrize("shape", [(2064,), (32, 64)], ids=str)
def test_state_update_with_rows(shape, dtype):
    indices = torch.randperm(30)[:3].to(torch.int32)
    arguments = update_inputs(dtype, shape, 30, (3, 1, 16) if len(shape) > 1 else (3, 16))
    check_update(arguments, {"dt_softplus": True}, UPDATE_WITH_HEADS[dtype], indices)


@pytest.mark.parametrize("absent", [("D",), ("dt_bias",), ("D", "dt_bias")])
def test_state_update_without_optional_tensors(absent):
    arguments = update_inputs(F32, (34,), 2, (2, 5))
    for name in absent:
        del arguments[name]
    check_update(arguments, {}, UPDATE[F32])


def test_state_updates_are_the_scan():
    """One step after another, as `selective_scan_fn` over all; a negative row is padding."""
    inputs = scan_inputs(2, F32, 6)
    out, last = interface.selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    state = torch.zeros(3, 4, 8)
    rows = torch.tensor([2, 0, -1], dtype=torch.int32)
    for t in range(6):
        u, delta, B, C, z = (
            torch.cat([inputs[n][..., t], torch.full_like(inputs[n][:1, ..., t], torch.nan)])
            for n in ("u", "delta", "B", "C", "z")
        )
        step = update.selective_state_update(
            state, u, delta, inputs["A"], B, C, inputs["D"], z, inputs["delta_bias"], True, rows
        )
        close(step[:2], out[..., t], (1e-5, 1e-5))
        assert torch.equal(step[2], torch.zeros(4))
    close(state[[2, 0]], last, (1e-5, 1e-5))
    assert torch.equal(state[1], torch.zeros(4, 8))
