# SPDX-License-Identifier: Apache-2.0
"""The modules over `pentad.scan`: their formula, their caches, and the checkpoints they load."""

import copy
import math
from types import SimpleNamespace

import pytest

import pentad

torch = pytest.importorskip("torch")

from torch.nn.functional import linear  # noqa: E402

from pentad.scan import modules, reference  # noqa: E402

DIM, BATCH, LENGTH = 16, 2, 11
OPTIONS = {
    "default": {},
    "bias": {"bias": True, "conv_bias": False},
    "sizes": {"d_state": 5, "d_conv": 2, "expand": 1.5, "dt_rank": 3, "dt_init": "constant"},
    "width 1": {"d_conv": 1, "d_state": 1},
}
each_option = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The problems here are smaller than the waking of a thread."""
    threads(1)


def mamba(option="default", **options):
    return pentad.nn.Mamba(DIM, layer_idx=0, **OPTIONS[option], **options)


def formula(layer, x):
    """The block of the paper's figure 3 in terms of the reference functions."""
    hidden, z = layer.in_proj(x).transpose(1, 2).chunk(2, 1)
    hidden = reference.causal_conv1d(
        hidden, layer.conv1d.weight[:, 0], layer.conv1d.bias, activation="silu"
    )
    sizes = (layer.dt_rank, layer.d_state, layer.d_state)
    dt, B, C = (t.transpose(1, 2) for t in layer.x_proj(hidden.transpose(1, 2)).split(sizes, -1))
    delta = linear(dt.transpose(1, 2), layer.dt_proj.weight).transpose(1, 2)
    out = reference.selective_scan(
        hidden, delta, -torch.exp(layer.A_log), B, C, layer.D, z, layer.dt_proj.bias, True
    )
    return layer.out_proj(out.transpose(1, 2))


def cache(offset=0):
    return SimpleNamespace(key_value_memory_dict={}, seqlen_offset=offset)


@each_option
def test_forward_and_gradients_are_those_of_the_formula(option):
    layer = mamba(option).double()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    results = []
    for function in (layer, lambda x: formula(layer, x)):
        out = function(x)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    torch.testing.assert_close(*results)


@each_option
def test_step_by_step_is_the_whole(option):
    layer = mamba(option)
    x = torch.randn(BATCH, LENGTH, DIM)
    with torch.no_grad():
        want = layer(x)
        states = layer.allocate_inference_cache(BATCH, LENGTH)
        steps = []
        for t in range(LENGTH):
            out, *same = layer.step(x[:, t : t + 1], *states)
            assert all(a is b for a, b in zip(same, states, strict=True))
            steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [(5, 1, 1, 4), (1, 10), (2, 9), (11,), (1,) * 11])
@each_option
def test_a_prompt_and_what_follows_are_the_whole(option, pieces):
    layer, params = mamba(option), cache()
    x = torch.randn(BATCH, LENGTH, DIM)
    outs = []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            outs.append(layer(piece, inference_params=params))
            params.seqlen_offset += piece.shape[1]
        torch.testing.assert_close(torch.cat(outs, 1), layer(x), rtol=1e-4, atol=1e-5)
        conv_state, ssm_state = params.key_value_memory_dict[0]
        assert conv_state.shape == (BATCH, layer.d_inner, layer.d_conv)
        assert ssm_state.shape == (BATCH, layer.d_inner, layer.d_state)
        inputs = layer.in_proj(x)[..., : layer.d_inner].transpose(1, 2)
    torch.testing.assert_close(conv_state, inputs[..., LENGTH - layer.d_conv :])


def test_a_prompt_shorter_than_the_convolution():
    layer, params = mamba(), cache()
    with torch.no_grad():
        layer(torch.randn(BATCH, 2, DIM), inference_params=params)
    conv_state, _ = params.key_value_memory_dict[0]
    assert not conv_state[..., :2].any()
    assert conv_state[..., 2:].all()


def test_a_prompt_forgets_the_states_before():
    layer, params = mamba(), cache()
    x = torch.randn(BATCH, LENGTH, DIM)
    with torch.no_grad():
        for _ in range(2):
            out = layer(x, inference_params=params)
        torch.testing.assert_close(out, layer(x))


def test_gradients_through_steps_are_those_of_the_whole():
    layer = mamba().double()
    x = torch.randn(BATCH, 5, DIM, dtype=torch.float64)
    states = layer.allocate_inference_cache(BATCH, 5)
    out = torch.cat([layer.step(x[:, t : t + 1], *states)[0] for t in range(5)], 1)
    leaves = list(layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(out.sin().sum(), leaves),
        torch.autograd.grad(layer(x).sin().sum(), leaves),
    )


def test_gradients_through_pieces_are_those_of_the_whole():
    layer, params = mamba().double(), cache()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    outs = []
    for piece in x.split((4, 1, 6), 1):
        outs.append(layer(piece, inference_params=params))
        params.seqlen_offset += piece.shape[1]
    leaves = list(layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(torch.cat(outs, 1).sin().sum(), leaves),
        torch.autograd.grad(layer(x).sin().sum(), leaves),
    )


# --- Projections of a step ------------------------------------------------------------------------

ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def few_rows(monkeypatch):
    """The shapes of x that the kernel for few rows is given."""
    operator, shapes = modules.autograd.few_rows_linear, []

    def kept(x, weight, bias):
        shapes.append(tuple(x.shape))
        return operator(x, weight, bias)

    monkeypatch.setattr(modules.autograd, "few_rows_linear", kept)
    return shapes


@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("outputs", [1, 7, 16, 90])
@pytest.mark.parametrize("inputs", [1, 5, 48, 64, 131])
def test_a_few_rows_are_those_of_linear(isa, few_rows, dtype, outputs, inputs):
    for rows in range(1, 10):
        x = torch.randn(rows, inputs).to(dtype)
        weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
        sizes = linear(x.double().abs(), weight.double().abs(), bias.double().abs())
        gaps = torch.randn(outputs, inputs + 3).to(dtype)
        gaps[:, :inputs] = weight
        for given in (x, x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2]):
            for by in (weight, gaps[:, :inputs], weight.T.contiguous().T):
                few_rows.clear()
                got = modules._linear(given, by, bias)
                assert bool(few_rows) == (rows <= 8 and by.stride(1) == 1)
                want = linear(x.double(), weight.double(), bias.double())
                error = (got.double() - want).abs()
                assert got.dtype == dtype
                assert (error <= ROUNDING[dtype] * want.abs() + 2e-6 * sizes).all()
                if few_rows:  # each row as if alone
                    assert torch.equal(got[:1], modules._linear(given[:1], by, bias))


def test_a_projection_of_many_pieces_has_the_same_bits_for_any_number_of_threads(few_rows, threads):
    x, weight = torch.randn(3, 700), torch.randn(1000, 700)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(modules._linear(x, weight))
    torch.testing.assert_close(results[0], linear(x, weight), rtol=1e-4, atol=1e-4)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert few_rows == [(3, 700)] * 3


def step_of(layer, batch=BATCH, dtype=torch.float32):
    x = torch.randn(batch, 1, DIM, dtype=dtype)
    return layer.step(x, *layer.allocate_inference_cache(batch, 1))[0], x


@torch.no_grad()
@pytest.mark.parametrize("dtype", [*ROUNDING, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("batch", [1, 8, 9])
@each_option
def test_a_step_goes_through_the_kernel_for_few_rows(few_rows, option, batch, dtype):
    layer = mamba(option, dtype=dtype)
    out, x = step_of(layer, batch, dtype)
    assert len(few_rows) == (4 if batch <= 8 and dtype != torch.float64 else 0)
    close = {} if dtype in (torch.float32, torch.float64) else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(out, layer(x), **close)


def test_a_step_that_needs_gradients_or_a_layer_of_another_kind_goes_through_linear(few_rows):
    layer = mamba()
    out, _ = step_of(layer)
    assert out.requires_grad
    assert not few_rows
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            step_of(layer)
        assert not few_rows

        calls = []
        handle = layer.in_proj.register_forward_hook(lambda *given: calls.append(given))
        step_of(layer)
        assert (len(calls), len(few_rows)) == (1, 3)
        handle.remove()
        layer.out_proj.register_forward_pre_hook(lambda *given: calls.append(given))
        step_of(layer)
        assert (len(calls), len(few_rows)) == (2, 6)

        class Doubled(torch.nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        other = mamba()
        plain, x = step_of(other)
        other.out_proj.__class__ = Doubled
        few_rows.clear()
        states = other.allocate_inference_cache(BATCH, 1)
        torch.testing.assert_close(other.step(x, *states)[0], 2 * plain)
        assert len(few_rows) == 3
        other.out_proj.__class__ = torch.nn.Linear
        other.out_proj.forward = lambda x: torch.zeros_like(x)[:, :DIM]
        assert not other.step(x, *states)[0].any()


# --- Checkpoints and initialisation ---------------------------------------------------------------


def test_a_checkpoint_of_mamba_ssm_loads():
    inner, rank, states, width = 32, 1, 16, 4
    shapes = {
        "A_log": (inner, states),
        "D": (inner,),
        "in_proj.weight": (2 * inner, DIM),
        "conv1d.weight": (inner, 1, width),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (DIM, inner),
    }
    checkpoint = {name: torch.rand(shape) for name, shape in shapes.items()}
    layer = pentad.nn.Mamba(DIM)
    layer.load_state_dict(checkpoint, strict=True)
    x = torch.randn(BATCH, LENGTH, DIM)
    first = layer(x)
    torch.testing.assert_close(first, formula(layer, x), rtol=1e-4, atol=1e-4)
    other = pentad.nn.Mamba(DIM)
    assert not torch.allclose(other(x), first)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), first)
    assert torch.equal(copy.deepcopy(layer)(x), first)


def test_biases_of_the_projections():
    names = set(mamba("bias").state_dict())
    assert {"in_proj.bias", "out_proj.bias"} <= names
    assert "conv1d.bias" not in names


def test_initialisation():
    layer = pentad.nn.Mamba(64, dt_min=0.01, dt_max=0.02, dt_scale=0.5)
    assert (layer.d_inner, layer.dt_rank) == (128, math.ceil(64 / 16))
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17).repeat(128, 1))
    assert torch.equal(layer.D, torch.ones(128))
    steps = torch.nn.functional.softplus(layer.dt_proj.bias)
    assert 0.0099 < steps.min() < 0.0115
    assert 0.0175 < steps.max() < 0.0201
    bound = 0.5 * layer.dt_rank**-0.5
    assert 0.9 * bound < layer.dt_proj.weight.abs().max() <= bound
    constant = pentad.nn.Mamba(64, dt_init="constant", dt_min=1e-6, dt_max=1e-5)
    assert (constant.dt_proj.weight == constant.dt_rank**-0.5).all()
    floor = torch.nn.functional.softplus(constant.dt_proj.bias)
    torch.testing.assert_close(floor, torch.full((128,), 1e-4), rtol=1e-3, atol=0)
    assert layer.A_log._no_weight_decay
    assert layer.D._no_weight_decay
    assert layer.dt_proj.bias._no_reinit
    assert "d_state=16" in repr(layer)


# --- Dtypes, tracing, errors ----------------------------------------------------------------------


def test_dtype_and_device():
    layer = mamba(dtype=torch.bfloat16)
    assert layer.in_proj.weight.dtype == torch.bfloat16
    assert layer.A_log.dtype == layer.D.dtype == torch.float32
    assert mamba(device="meta")(torch.randn(1, 3, DIM, device="meta")).shape == (1, 3, DIM)
    states = layer.allocate_inference_cache(3, 100)
    assert [t.dtype for t in states] == [torch.bfloat16] * 2
    states = layer.allocate_inference_cache(3, 100, dtype=torch.float32)
    assert [t.dtype for t in states] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = mamba()
    x = torch.randn(BATCH, LENGTH, DIM)
    want = layer(x)
    with torch.autocast("cpu", dtype):
        auto = layer(x)
        assert auto.dtype == dtype
    half = copy.deepcopy(layer).to(dtype)
    out = half(x.to(dtype))
    out.float().sum().backward()
    assert half.A_log.grad.dtype == dtype
    for got in (auto, out):
        torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.02)
    states = half.allocate_inference_cache(BATCH, LENGTH)
    with torch.no_grad():
        steps = [half.step(x[:, t : t + 1].to(dtype), *states)[0] for t in range(LENGTH)]
        torch.testing.assert_close(torch.cat(steps, 1), out, rtol=0.1, atol=0.02)
        params = cache()
        for piece in x.split((4, 1, 6), 1):
            with torch.autocast("cpu", dtype):
                last = layer(piece, inference_params=params)
            params.seqlen_offset += piece.shape[1]
    torch.testing.assert_close(last.float(), want[:, 5:], rtol=0.1, atol=0.02)


def test_compiles_and_trains():
    torch._dynamo.reset()
    layer = mamba()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, LENGTH, DIM)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).pow(2).sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer(x).pow(2).sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])
        assert p.grad.abs().sum() > 0


def test_a_compiled_step_changes_the_states():
    torch._dynamo.reset()
    layer = mamba()
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, 3, DIM)
    got, want = (layer.allocate_inference_cache(BATCH, 3) for _ in range(2))
    with torch.no_grad():
        for t in range(3):
            out = step(x[:, t : t + 1], *got)[0]
            torch.testing.assert_close(out, layer.step(x[:, t : t + 1], *want)[0])
            torch.testing.assert_close(got, want)


def test_it_learns():
    """To repeat its input of two steps before, which needs a state."""
    layer = torch.nn.Sequential(torch.nn.Linear(1, DIM), mamba(), torch.nn.Linear(DIM, 1))
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        x = torch.randn(8, 12, 1)
        loss = (layer(x)[:, 2:] - x[:, :-2]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_what_is_refused():
    with pytest.raises(ValueError, match="dt_init is 'zeros'"):
        pentad.nn.Mamba(DIM, dt_init="zeros")
    layer = pentad.nn.Mamba(DIM)
    with pytest.raises(ValueError, match="layer_idx is None"):
        layer(torch.zeros(1, 2, DIM), inference_params=cache())
    with pytest.raises(ValueError, match=r"hidden_states has shape \(1, 2, 16\)"):
        layer.step(torch.zeros(1, 2, DIM), *layer.allocate_inference_cache(1, 2))
