# SPDX-License-Identifier: Apache-2.0
"""The modules whose state is a matrix: formulas, caches, and the checkpoints that they load."""

import copy
import math
from types import SimpleNamespace

import pytest
from cases import cpu_kernels_only

import pentad

torch = pytest.importorskip("torch")

from torch.nn.functional import rms_norm, silu, softplus  # noqa: E402

from pentad.scan import reference  # noqa: E402

DIM, BATCH, LENGTH = 12, 2, 9
LAYERS = {
    "mamba2": ("Mamba2", {"d_state": 5, "headdim": 4}),
    "mamba2 groups": (
        "Mamba2",
        {"d_state": 3, "headdim": 4, "ngroups": 2, "D_has_hdim": True, "norm_before_gate": True,
         "bias": True, "conv_bias": False, "d_conv": 2, "dt_limit": (0.02, 0.05)},
    ),
    "mamba2 mlp": (
        "Mamba2",
        {"d_state": 3, "headdim": 8, "d_ssm": 16, "rmsnorm": False, "expand": 2.5, "conv_init": 1},
    ),
    "mamba2 limits": (
        "Mamba2",
        {"d_state": 3, "headdim": 6, "rmsnorm": False, "dt_limit": (0.02, math.inf), "d_conv": 1},
    ),
    "delta": ("GatedDeltaNet", {"head_dim": 4, "num_heads": 2}),
    "delta groups": (
        "GatedDeltaNet",
        {"head_dim": 2, "num_heads": 1, "num_v_heads": 2, "expand_v": 1.5, "use_gate": False,
         "allow_neg_eigval": True, "conv_size": 3, "conv_bias": True},
    ),
    "delta without convolutions": (
        "GatedDeltaNet",
        {"head_dim": 3, "num_heads": 2, "use_short_conv": False, "expand_v": 1},
    ),
    "retention": ("MultiScaleRetention", {"num_heads": 3}),
    "retention plain": (
        "MultiScaleRetention",
        {"num_heads": 4, "expand_k": 1.0, "expand_v": 1.0, "use_output_gate": False,
         "use_rotary": False},
    ),
}  # fmt: skip
each_layer = pytest.mark.parametrize("name", LAYERS)
one_of_each = pytest.mark.parametrize("name", ["mamba2", "delta", "retention"])


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The problems here are smaller than the waking of a thread."""
    threads(1)


def made(name, **more):
    kind, options = LAYERS[name]
    torch.manual_seed(len(name))
    layer = getattr(pentad.nn, kind)(DIM, layer_idx=0, **options, **more)
    with torch.no_grad():  # so that no parameter is without effect
        for parameter_name, parameter in layer.named_parameters():
            if parameter_name.endswith("norm.weight") or parameter_name == "D":
                parameter.uniform_(0.5, 1.5)
    return layer


def cache(offset=0):
    return SimpleNamespace(key_value_memory_dict={}, seqlen_offset=offset)


# --- Formulas -------------------------------------------------------------------------------------


def convolved(conv, x):
    x = reference.causal_conv1d(
        x.transpose(1, 2), conv.weight[:, 0], conv.bias, activation="silu"
    )  # fmt: skip
    return x.transpose(1, 2)


def mamba2_formula(layer, x):
    """Figure 6 of the paper, right, in terms of the reference functions."""
    inner, ssm, heads, n = layer.d_inner, layer.d_ssm, layer.nheads, layer.ngroups * layer.d_state
    split = (inner - ssm, inner - ssm, ssm, ssm + 2 * n, heads)
    gate, mlp, z, hidden, dt = layer.in_proj(x).split(split, -1)
    u, B, C = convolved(layer.conv1d, hidden).split((ssm, n, n), -1)
    by_head, by_group = (heads, ssm // heads), (layer.ngroups, layer.d_state)
    y = reference.ssd(
        u.unflatten(-1, by_head), dt, -torch.exp(layer.A_log), B.unflatten(-1, by_group),
        C.unflatten(-1, by_group), dt_bias=layer.dt_bias, dt_softplus=True,
        D=layer.D.view(by_head) if layer.D_has_hdim else layer.D, dt_limit=layer.dt_limit,
    ).flatten(2)  # fmt: skip
    if layer.rmsnorm:
        before = layer.norm.norm_before_gate
        y = y if before else y * silu(z)
        groups = y.unflatten(-1, (layer.ngroups, -1))
        y = rms_norm(groups, groups.shape[-1:], eps=1e-5).flatten(-2) * layer.norm.weight
        y = y * silu(z) if before else y
    else:
        y = y * silu(z)
    return layer.out_proj(torch.cat([silu(gate) * mlp, y], -1))


def delta_formula(layer, x):
    """Section 3.3 of the paper."""
    q, k, v = (getattr(layer, f"{name}_proj")(x) for name in "qkv")
    if layer.use_short_conv:
        convs = (getattr(layer, f"{name}_conv1d") for name in "qkv")
        q, k, v = (convolved(conv, t) for conv, t in zip(convs, (q, k, v), strict=True))
    else:
        q, k, v = silu(q), silu(k), silu(v)
    q, k = (t.unflatten(-1, (layer.num_heads, -1)) for t in (q, k))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    heads = (layer.num_v_heads, -1)
    beta = layer.b_proj(x).sigmoid() * (2 if layer.allow_neg_eigval else 1)
    decay = torch.exp(-torch.exp(layer.A_log) * softplus(layer.a_proj(x) + layer.dt_bias))
    y = reference.delta_rule(
        q, k, v.unflatten(-1, heads), beta, decay=decay, scale=1 / math.sqrt(layer.head_dim)
    )
    y = rms_norm(y, y.shape[-1:], layer.o_norm.weight, 1e-5)
    if layer.use_gate:
        y = y * silu(layer.g_proj(x).unflatten(-1, heads))
    return layer.o_proj(y.flatten(2))


def retention_formula(layer, x):
    """Equation 5 of the paper, as attention with the matrix D, and equation 8."""
    heads = (layer.num_heads, -1)
    q, k, v = (getattr(layer, f"{name}_proj")(x).unflatten(-1, heads) for name in "qkv")
    n = torch.arange(x.shape[1], dtype=x.dtype)
    if layer.use_rotary:  # pairs as complex numbers
        half = q.shape[-1] // 2
        angle = n[:, None] * 10000 ** (-torch.arange(half, dtype=x.dtype) / half)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        q, k = (torch.complex(t[..., :half], t[..., half:]) * turn for t in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(layer.num_heads, dtype=x.dtype))
    D = (gamma[:, None, None] ** (n[:, None] - n).clamp(min=0)).tril()
    scores = torch.einsum("blhn,bmhn->bhlm", q, k.conj()).real / math.sqrt(layer.head_k_dim)
    y = torch.einsum("bhlm,bmhp->blhp", scores * D, v)
    norm = layer.g_norm_swish_gate if layer.use_output_gate else layer.g_norm
    y = rms_norm(y, y.shape[-1:], norm.weight, 1e-5)
    if layer.use_output_gate:
        y = y * silu(layer.g_proj(x).unflatten(-1, heads))
    return layer.o_proj(y.flatten(2))


FORMULAS = {
    "Mamba2": mamba2_formula,
    "GatedDeltaNet": delta_formula,
    "MultiScaleRetention": retention_formula,
}


@each_layer
def test_forward_and_gradients_are_those_of_the_formula(name):
    layer = made(name).double()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    weights = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    results = []
    for function in (layer, lambda x: FORMULAS[LAYERS[name][0]](layer, x)):
        out = function(x)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    torch.testing.assert_close(*results)
    assert all(grad.any() for grad in results[0])  # none is left out


# --- Caches ---------------------------------------------------------------------------------------


@each_layer
def test_step_by_step_is_the_whole(name):
    layer = made(name)
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


@pytest.mark.parametrize("pieces", [(5, 1, 1, 2), (1, 8), (2, 3, 4)])
@each_layer
def test_a_prompt_and_what_follows_are_the_whole(name, pieces):
    layer, params = made(name), cache()
    x = torch.randn(BATCH, LENGTH, DIM)
    with torch.no_grad():
        layer(x, inference_params=params)  # which the prompt forgets
        outs = []
        for piece in x.split(pieces, 1):
            outs.append(layer(piece, inference_params=params))
            params.seqlen_offset += piece.shape[1]
        torch.testing.assert_close(torch.cat(outs, 1), layer(x), rtol=1e-4, atol=1e-5)
        stepped = layer.allocate_inference_cache(BATCH, LENGTH)
        for t in range(LENGTH):
            layer.step(x[:, t : t + 1], *stepped)
    for kept, want in zip(params.key_value_memory_dict[0], stepped, strict=True):
        if want.ndim == 3:  # the oldest input of a convolution's cache is not read any more
            kept, want = kept[..., 1:], want[..., 1:]
        torch.testing.assert_close(kept, want, rtol=1e-4, atol=1e-5)


@one_of_each
def test_gradients_through_pieces_and_steps_are_those_of_the_whole(name):
    layer, params = made(name).double(), cache()
    x = torch.randn(BATCH, 6, DIM, dtype=torch.float64)
    outs = []
    for piece in x.split((3, 1, 2), 1):
        outs.append(layer(piece, inference_params=params))
        params.seqlen_offset += piece.shape[1]
    leaves = list(layer.parameters())
    weights = torch.randn(BATCH, 6, DIM, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((torch.cat(outs, 1) * weights).sum(), leaves),
        torch.autograd.grad((layer(x) * weights).sum(), leaves),
    )


def test_a_step_whose_decays_could_be_taken_for_those_of_keys():
    layer = pentad.nn.GatedDeltaNet(DIM, head_dim=2, num_heads=2, expand_v=1)
    x = torch.randn(2, 4, DIM)
    with torch.no_grad():
        states = layer.allocate_inference_cache(2, 4)
        steps = [layer.step(x[:, t : t + 1], *states)[0] for t in range(4)]
        torch.testing.assert_close(torch.cat(steps, 1), layer(x), rtol=1e-4, atol=1e-5)


# --- Sequences of Mamba-2 -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba2", "mamba2 mlp"])
def test_packed_sequences_are_separate_calls(name):
    layer, params = made(name), cache()
    x = torch.randn(1, LENGTH, DIM)
    ends = torch.tensor([0, 2, 2, 7, LENGTH])
    seq_idx = torch.tensor([[0] * 2 + [1] * 5 + [2] * 2])
    with torch.no_grad():
        want = torch.cat([layer(x[:, a:b]) for a, b in [(0, 2), (2, 7), (7, LENGTH)]], 1)
        for given in (
            {"cu_seqlens": ends},
            {"seq_idx": seq_idx},
            {"seq_idx": seq_idx, "cu_seqlens": ends},
        ):
            torch.testing.assert_close(layer(x, **given), want, rtol=1e-4, atol=1e-5)

        packed = layer(x, cu_seqlens=ends, inference_params=params)
        torch.testing.assert_close(packed, want, rtol=1e-4, atol=1e-5)
        params.seqlen_offset = 1
        follows = torch.randn(4, 1, DIM)
        out = layer(follows, inference_params=params)
        for s, (a, b) in enumerate([(0, 2), (2, 2), (2, 7), (7, LENGTH)]):
            alone = layer(torch.cat([x[:, a:b], follows[s : s + 1]], 1))[:, -1:]
            torch.testing.assert_close(out[s : s + 1], alone, rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_in_one_dimension():
    layer, params = made("mamba2"), cache()
    x = torch.randn(BATCH, LENGTH, DIM)
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(layer(x.flatten(0, 1), seqlen=LENGTH), want.flatten(0, 1))
        layer(x[:, :-1].flatten(0, 1), seqlen=LENGTH - 1, inference_params=params)
        params.seqlen_offset = LENGTH - 1
        out = layer(x[:, -1], seqlen=1, inference_params=params)
    torch.testing.assert_close(out, want[:, -1], rtol=1e-4, atol=1e-5)


# --- Checkpoints and initialisation ---------------------------------------------------------------

SHAPES = {
    "mamba2": {
        "dt_bias": (6,), "A_log": (6,), "D": (6,), "in_proj.weight": (2 * 24 + 2 * 5 + 6, 12),
        "conv1d.weight": (24 + 2 * 5, 1, 4), "conv1d.bias": (24 + 2 * 5,), "norm.weight": (24,),
        "out_proj.weight": (12, 24),
    },
    "mamba2 groups": {
        "dt_bias": (6,), "A_log": (6,), "D": (24,),
        "in_proj.weight": (2 * 24 + 2 * 2 * 3 + 6, 12), "in_proj.bias": (2 * 24 + 2 * 2 * 3 + 6,),
        "conv1d.weight": (24 + 2 * 2 * 3, 1, 2), "norm.weight": (24,),
        "out_proj.weight": (12, 24), "out_proj.bias": (12,),
    },
    "mamba2 mlp": {
        "dt_bias": (2,), "A_log": (2,), "D": (2,), "in_proj.weight": (2 * 30 + 2 * 3 + 2, 12),
        "conv1d.weight": (16 + 2 * 3, 1, 4), "conv1d.bias": (16 + 2 * 3,),
        "out_proj.weight": (12, 30),
    },
    "delta": {
        "A_log": (2,), "dt_bias": (2,), "q_proj.weight": (8, 12), "k_proj.weight": (8, 12),
        "v_proj.weight": (16, 12), "a_proj.weight": (2, 12), "b_proj.weight": (2, 12),
        "q_conv1d.weight": (8, 1, 4), "k_conv1d.weight": (8, 1, 4), "v_conv1d.weight": (16, 1, 4),
        "g_proj.weight": (16, 12), "o_norm.weight": (8,), "o_proj.weight": (12, 16),
    },
    "delta groups": {
        "A_log": (2,), "dt_bias": (2,), "q_proj.weight": (2, 12), "k_proj.weight": (2, 12),
        "v_proj.weight": (6, 12), "a_proj.weight": (2, 12), "b_proj.weight": (2, 12),
        "q_conv1d.weight": (2, 1, 3), "k_conv1d.weight": (2, 1, 3), "v_conv1d.weight": (6, 1, 3),
        "q_conv1d.bias": (2,), "k_conv1d.bias": (2,), "v_conv1d.bias": (6,),
        "o_norm.weight": (3,), "o_proj.weight": (12, 6),
    },
    "retention": {
        "q_proj.weight": (12, 12), "k_proj.weight": (12, 12), "v_proj.weight": (24, 12),
        "g_proj.weight": (24, 12), "g_norm_swish_gate.weight": (8,), "o_proj.weight": (12, 24),
    },
    "retention plain": {
        "q_proj.weight": (12, 12), "k_proj.weight": (12, 12), "v_proj.weight": (12, 12),
        "g_norm.weight": (3,), "o_proj.weight": (12, 12),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoint_loads(name):
    checkpoint = {key: torch.rand(shape) for key, shape in SHAPES[name].items()}
    layer, other = made(name), made(name)
    layer.load_state_dict(checkpoint, strict=True)
    x = torch.randn(BATCH, LENGTH, DIM)
    first = layer(x)
    assert not torch.allclose(other(x), first)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), first)
    assert torch.equal(copy.deepcopy(layer)(x), first)


def test_initialisation_of_mamba2():
    layer = pentad.nn.Mamba2(
        64, headdim=1, dt_min=0.01, dt_max=0.02, A_init_range=(2, 3), conv_init=0.25
    )
    assert (layer.d_inner, layer.nheads) == (128, 128)
    steps = softplus(layer.dt_bias)
    assert 0.0099 < steps.min() < 0.0115
    assert 0.0175 < steps.max() < 0.0201
    assert 2 <= layer.A_log.exp().min() < 2.1 < 2.9 < layer.A_log.exp().max() <= 3.0001
    assert torch.equal(layer.D, torch.ones(128))
    assert 0.24 < layer.conv1d.weight.abs().max() <= 0.25
    assert all(p._no_weight_decay for p in (layer.dt_bias, layer.A_log, layer.D))
    floor = pentad.nn.Mamba2(64, headdim=1, dt_min=1e-6, dt_max=1e-5)
    torch.testing.assert_close(softplus(floor.dt_bias), torch.full((128,), 1e-4), rtol=1e-3, atol=0)
    assert "headdim=1" in repr(layer)
    assert "group_size=128" in repr(layer.norm)


def test_initialisation_of_gated_delta_net():
    layer = pentad.nn.GatedDeltaNet(8, head_dim=1, num_heads=200)
    assert 0 < layer.A_log.exp().min() < 1 < 15 < layer.A_log.exp().max() <= 16.001
    steps = softplus(layer.dt_bias)
    assert 0.00099 < steps.min() < 0.002 < 0.07 < steps.max() < 0.1001
    assert layer.A_log._no_weight_decay
    assert layer.dt_bias._no_weight_decay
    assert "num_v_heads=200" in repr(layer)


def test_step_sizes_are_drawn_in_float32():
    """Whatever the default; bfloat16 has 3 digits for a range of 100."""
    torch.manual_seed(0)
    want = made("mamba2").dt_bias
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        got = made("mamba2").dt_bias
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want.bfloat16())


def test_heads_of_retention_forget_at_different_rates():
    layer = made("retention plain")
    torch.testing.assert_close(
        layer._decay(torch.zeros(1)), torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256])
    )
    assert "num_heads=4" in repr(layer)


# --- Dtypes, tracing, errors ----------------------------------------------------------------------


@one_of_each
def test_dtype_and_device(name):
    layer = made(name, dtype=torch.bfloat16)
    wide = {key for key, p in layer.named_parameters() if p.dtype == torch.float32}
    assert wide == {"mamba2": {"D"}, "delta": {"A_log", "dt_bias"}, "retention": set()}[name]
    meta = made(name, device="meta")
    assert meta(torch.randn(1, 3, DIM, device="meta")).shape == (1, 3, DIM)
    states = layer.allocate_inference_cache(3, 100, dtype=torch.float64)
    assert {t.dtype for t in states if t.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@one_of_each
def test_half_precision(name, dtype):
    """Within a few times the rounding of the inputs of each of the products, 2^-8, of outputs of
    size 1 or less."""
    layer = made(name)
    x = torch.randn(BATCH, LENGTH, DIM)
    want = layer(x)
    with torch.autocast("cpu", dtype):
        auto = layer(x)
        assert auto.dtype == dtype
    half = copy.deepcopy(layer).to(dtype)
    out = half(x.to(dtype))
    out.float().sum().backward()
    assert all(p.grad.dtype == dtype for p in half.parameters())
    for got in (auto, out):
        torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.05)
    states = half.allocate_inference_cache(BATCH, LENGTH)
    with torch.no_grad():
        steps = [half.step(x[:, t : t + 1].to(dtype), *states)[0] for t in range(LENGTH)]
        torch.testing.assert_close(torch.cat(steps, 1), out, rtol=0.1, atol=0.05)
        params = cache()
        for piece in x.split((4, 1, 4), 1):
            with torch.autocast("cpu", dtype):
                last = layer(piece, inference_params=params)
            params.seqlen_offset += piece.shape[1]
    torch.testing.assert_close(last.float(), want[:, 5:], rtol=0.1, atol=0.05)


@one_of_each
def test_compiles_and_trains(name):
    torch._dynamo.reset()
    layer = made(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, LENGTH, DIM)
    out = compiled(x)
    torch.testing.assert_close(out, layer(x))
    out.pow(2).sum().backward()
    grads = {key: p.grad.clone() for key, p in layer.named_parameters()}
    layer.zero_grad()
    layer(x).pow(2).sum().backward()
    for key, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, grads[key])


@one_of_each
def test_a_compiled_step_changes_the_states(name):
    torch._dynamo.reset()
    layer = made(name)
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, 2, DIM)
    got, want = (layer.allocate_inference_cache(BATCH, 2) for _ in range(2))
    with torch.no_grad():
        for t in range(2):
            out = step(x[:, t : t + 1], *got)[0]
            torch.testing.assert_close(out, layer.step(x[:, t : t + 1], *want)[0])
            torch.testing.assert_close(got, want)


@cpu_kernels_only  # roundings decide the course of a training, and this one is close to its bound
@one_of_each
def test_it_learns(name):
    """To repeat its input of five steps before, which is out of a convolution's reach."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(1, DIM), made(name), torch.nn.Linear(DIM, 1))
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(80):
        x = torch.randn(8, 12, 1)
        loss = (layer(x)[:, 5:] - x[:, :-5]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("Mamba2", {"headdim": 5}, "headdim is 5, expected a divisor of 24 channels"),
        ("Mamba2", {"headdim": 8, "ngroups": 2}, "ngroups is 2, expected a divisor of 3 heads"),
        ("Mamba2", {"headdim": 0}, "headdim is 0, expected a divisor of 24 channels"),
        ("Mamba2", {"headdim": 8, "ngroups": 0}, "ngroups is 0, expected a divisor of 3 heads"),
        ("Mamba2", {"headdim": 4, "d_ssm": 32}, "d_ssm is 32, expected 1 to 24"),
        ("Mamba2", {"headdim": 4, "A_init_range": (0, 1)}, "A_init_range is"),
        ("Mamba2", {"headdim": 4, "process_group": 1}, "process_group is 1"),
        ("Mamba2", {"headdim": 4, "expand": 1.3}, r"expand \* d_model is"),
        ("GatedDeltaNet", {"num_heads": 4, "num_v_heads": 6}, "num_v_heads is 6"),
        ("GatedDeltaNet", {"num_heads": 0}, "num_v_heads is 0, expected a multiple of 0 num_heads"),
        ("GatedDeltaNet", {"head_dim": 3, "expand_v": 1.5}, "expand_v"),
        ("MultiScaleRetention", {"num_heads": 0}, "num_heads is 0, expected at least 1"),
        ("MultiScaleRetention", {"num_heads": 5}, "expand_k"),
        ("MultiScaleRetention", {"num_heads": 4}, "even number of dimensions per head"),
    ],
)
def test_options_that_do_not_fit(kind, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(pentad.nn, kind)(DIM, **options)


@one_of_each
def test_what_is_refused(name):
    layer = made(name)
    states = layer.allocate_inference_cache(1, 2)
    with pytest.raises(ValueError, match=r"hidden_states has shape \(1, 2, 12\)"):
        layer.step(torch.zeros(1, 2, DIM), *states)
    for shape in ((2, DIM), (1, 2, DIM + 1)):
        with pytest.raises(ValueError, match=rf"expected \(B, L, {DIM}\)"):
            layer(torch.zeros(shape))
    params = cache()
    layer(torch.zeros(2, 3, DIM), inference_params=params)
    with pytest.raises(ValueError, match="has 2 rows for a batch of 1"):
        layer(torch.zeros(1, 3, DIM), inference_params=params)
    layer.layer_idx = None
    with pytest.raises(ValueError, match="layer_idx is None"):
        layer(torch.zeros(1, 2, DIM), inference_params=cache())


def test_what_mamba2_refuses():
    layer, x = made("mamba2"), torch.zeros(1, 3, DIM)
    with pytest.raises(ValueError, match="seq_idx cannot be used with inference_params"):
        layer(x, seq_idx=torch.zeros(1, 3, dtype=torch.int32), inference_params=cache())
