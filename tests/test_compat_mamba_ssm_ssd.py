# SPDX-License-Identifier: Apache-2.0
"""pentad.compat.mamba_ssm's functions for Mamba-2, against the plain recurrences.

In float32 a difference is rounding alone, of sums in another order over some dozens of steps: 1e-4
of the largest value. In bfloat16 the tolerance is that of mamba_ssm's own tests.
"""

import inspect

import pytest

torch = pytest.importorskip("torch")

from torch.nn.functional import layer_norm, linear, rms_norm, silu, softplus  # noqa: E402

from pentad.compat import mamba_ssm  # noqa: E402
from pentad.compat.mamba_ssm.ops.triton import layernorm_gated, ssd_combined  # noqa: E402
from pentad.compat.mamba_ssm.ops.triton import selective_state_update as update  # noqa: E402

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
B, L, H, P, G, N, W = 2, 37, 6, 8, 2, 5, 4
INNER, CONV = H * P, H * P + 2 * G * N


def close(actual, expected, tolerance=1e-4):
    """Relative to the largest value."""
    assert actual.shape == expected.shape
    size = expected.abs().max().clamp(min=1e-6)
    torch.testing.assert_close(actual / size, expected / size, rtol=0, atol=tolerance)


def gradients(out, leaves, seeds):
    return torch.autograd.grad(out, list(leaves.values()), seeds)


def scan_inputs(dtype=F32, gated=True):
    tensors = {
        "x": torch.randn(B, L, H, P).to(dtype),
        "dt": torch.randn(B, L, H).to(dtype),
        "A": -torch.rand(H) - 0.1,
        "B": torch.randn(B, L, G, N).to(dtype),
        "C": torch.randn(B, L, G, N).to(dtype),
        "D": torch.randn(H, P),
        "dt_bias": torch.rand(H) - 2,
    }
    if gated:
        tensors["z"] = torch.randn(B, L, H, P).to(dtype)
    return {name: x.requires_grad_() for name, x in tensors.items()}


# --- Signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            ssd_combined.mamba_chunk_scan_combined,
            "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, "
            "seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), "
            "return_final_states=False, return_varlen_states=False, state_dtype=None",
        ),
        (
            ssd_combined.mamba_split_conv1d_scan_combined,
            "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, "
            "seq_idx=None, dt_limit=(0.0, inf), return_final_states=False, activation='silu', "
            "rmsnorm_weight=None, rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, "
            "headdim=None, ngroups=1, norm_before_gate=True, state_dtype=None",
        ),
        (
            ssd_combined.mamba_split_conv1d_scan_ref,
            "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, dt_limit=(0.0, inf), "
            "activation='silu', rmsnorm_weight=None, rmsnorm_eps=1e-06, outproj_weight=None, "
            "outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True",
        ),
        (
            ssd_combined.ssd_chunk_scan_combined_ref,
            "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False",
        ),
        (
            layernorm_gated.rmsnorm_fn,
            "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True",
        ),
    ],
)
def test_signatures_are_those_of_mamba_ssm(function, parameters):
    assert str(inspect.signature(function)) == f"({parameters})"


def test_transformers_is_told_to_compute_step_by_step():
    """Its call of the whole block knows no padding."""
    name = "mamba_split_conv1d_scan_combined"
    assert not hasattr(mamba_ssm, name)
    asked = {"__name__": "transformers.utils.import_utils", "package": mamba_ssm}
    exec(f"function = getattr(package, {name!r}, None)", asked)
    ours = getattr(ssd_combined, name)
    assert inspect.signature(asked["function"]) == inspect.signature(ours)
    assert asked["function"](*[None] * 7) is None
    exec("function = getattr(package, 'mamba_chunk_scan_combined', None)", asked)
    assert asked["function"] is None  # so that it is looked for where it is


# --- mamba_chunk_scan_combined --------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-4), (BF16, 3e-2)], ids=str)
def test_chunk_scan(dtype, tolerance):
    inputs = scan_inputs(dtype)
    options = {"chunk_size": 16, "dt_softplus": True}
    d_out = torch.randn(B, L, H, P).to(dtype)
    out = ssd_combined.mamba_chunk_scan_combined(**inputs, **options)
    expected = ssd_combined.ssd_chunk_scan_combined_ref(**inputs, **options)
    assert out.dtype == dtype
    close(out, expected, tolerance)
    for name, actual, correct in zip(
        inputs, gradients(out, inputs, d_out), gradients(expected, inputs, d_out), strict=True
    ):
        assert actual.dtype == inputs[name].dtype
        close(actual, correct, tolerance)


def test_chunk_size_and_state_dtype_change_nothing():
    inputs = scan_inputs()
    scan = ssd_combined.mamba_chunk_scan_combined
    outs = [
        scan(**inputs, chunk_size=size, state_dtype=dtype)
        for size, dtype in ((1, None), (256, BF16))
    ]
    assert torch.equal(*outs)


def test_states_in_pieces():
    """Final states are the initial states of the rest, in mamba_ssm's layout and in float32."""
    inputs = scan_inputs(BF16)
    options = {"chunk_size": 16, "dt_softplus": True, "return_final_states": True}
    names = {"x", "z", "dt", "B", "C"}
    scan = ssd_combined.mamba_chunk_scan_combined
    whole, last = scan(**inputs, **options)
    outs, state = [], None
    for begin, end in ((0, 11), (11, 12), (12, L)):
        piece = {n: x[:, begin:end] if n in names else x for n, x in inputs.items()}
        out, state = scan(**piece, **options, initial_states=state)
        outs.append(out)
    assert last.dtype == F32
    assert last.shape == (B, H, P, N)
    close(torch.cat(outs, 1), whole, 1e-2)
    close(state, last, 1e-4)


def test_time_steps_are_limited():
    inputs = scan_inputs()
    limit = (0.2, 0.7)
    out = ssd_combined.mamba_chunk_scan_combined(
        **inputs, chunk_size=16, dt_softplus=True, dt_limit=limit
    )
    inputs["dt"] = softplus(inputs["dt"] + inputs.pop("dt_bias")).clamp(*limit)
    close(out, ssd_combined.ssd_chunk_scan_combined_ref(**inputs, chunk_size=16))


def test_packed_sequences():
    """One behind the other, each as alone; the state after each, and the last."""
    inputs = {n: x.detach() if x.ndim < 3 else x.detach()[:1] for n, x in scan_inputs().items()}
    lengths = torch.tensor([20, 1, 16])
    options = {"chunk_size": 16, "dt_softplus": True, "return_final_states": True}
    scan = ssd_combined.mamba_chunk_scan_combined
    out, last, states = scan(
        **inputs,
        **options,
        seq_idx=torch.repeat_interleave(torch.arange(3, dtype=torch.int32), lengths)[None],
        cu_seqlens=torch.tensor([0, 20, 21, L]),
        return_varlen_states=True,
    )
    pieces = zip(
        *(
            x.split(lengths.tolist(), 1) if n in ("x", "z", "dt", "B", "C") else (x,) * 3
            for n, x in inputs.items()
        ),
        strict=True,
    )
    alone = [scan(**dict(zip(inputs, piece, strict=True)), **options) for piece in pieces]
    close(out, torch.cat([a for a, _ in alone], 1))
    close(states, torch.cat([s for _, s in alone]))
    close(last, states[-1:])
    only = scan(**inputs, chunk_size=16, cu_seqlens=torch.tensor([0, L]), return_varlen_states=True)
    assert len(only) == 2
    with pytest.raises(ValueError, match="needs cu_seqlens"):
        scan(**inputs, chunk_size=16, return_varlen_states=True)


# --- mamba_split_conv1d_scan_combined -------------------------------------------------------------


def block_inputs(mlp=0, norm=True, projection=True, headed=True):
    tensors = {
        "zxbcdt": torch.randn(B, L, 2 * mlp + INNER + CONV + H),
        "conv1d_weight": torch.randn(CONV, W),
        "conv1d_bias": torch.randn(CONV),
        "dt_bias": torch.rand(H) - 2,
        "A": -torch.rand(H) - 0.1,
        "D": torch.randn(H, P) if headed else torch.randn(H),
    }
    if norm:
        tensors["rmsnorm_weight"] = torch.randn(INNER)
    if projection:
        tensors["outproj_weight"] = torch.randn(10, mlp + INNER)
        tensors["outproj_bias"] = torch.randn(10)
    return {name: x.requires_grad_() for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {"norm_before_gate": False}),
        ({"mlp": 3}, {"norm_before_gate": True, "rmsnorm_eps": 0.3}),
        ({"norm": False, "headed": False}, {"headdim": P}),
        ({"projection": False}, {"dt_limit": (0.1, 0.5), "activation": None}),
    ],
)
def test_block(shape, options):
    """Against the pieces that it is put together from, and the plain block; gradients as well."""
    inputs = block_inputs(**shape)
    options = {"chunk_size": 16, "ngroups": G, **options}
    out, state = ssd_combined.mamba_split_conv1d_scan_combined(
        **inputs, **options, return_final_states=True
    )
    by_pieces, expected_state = block(inputs, **options)
    plain = ssd_combined.mamba_split_conv1d_scan_ref(**inputs, **options)
    close(out, by_pieces)
    close(state, expected_state)
    close(out, plain)
    d_out = torch.randn_like(out)
    for actual, expected in zip(
        gradients(out, inputs, d_out), gradients(plain, inputs, d_out), strict=True
    ):
        close(actual, expected)
    alone = ssd_combined.mamba_split_conv1d_scan_combined(**inputs, **options)
    assert torch.equal(alone, out)


def block(
    tensors, *, ngroups, activation="silu", rmsnorm_eps=1e-6, norm_before_gate=True,
    dt_limit=(0.0, float("inf")), headdim=None, chunk_size=None, initial_states=None,
):  # fmt: skip
    """The block's equations: one convolution per channel, one step of the scan after another."""
    zxbcdt, D = tensors["zxbcdt"], tensors["D"].reshape(H, -1)
    mlp = (zxbcdt.shape[-1] - INNER - CONV - H) // 2
    gate, inner, z, xBC, dt = zxbcdt.split([mlp, mlp, INNER, CONV, H], -1)
    padded = torch.cat([torch.zeros(B, W - 1, CONV), xBC], 1)
    taps = tensors["conv1d_weight"].unbind(1)
    xBC = sum(padded[:, i : i + L] * tap for i, tap in enumerate(taps)) + tensors["conv1d_bias"]
    xBC = xBC if activation is None else silu(xBC)
    x, k, q = xBC.split([INNER, G * N, G * N], -1)
    x = x.view(B, L, H, P)
    k, q = (t.view(B, L, G, N).repeat_interleave(H // G, 2) for t in (k, q))
    dt = softplus(dt + tensors["dt_bias"]).clamp(*dt_limit)
    state = torch.zeros(B, H, P, N) if initial_states is None else initial_states
    ys = []
    for t in range(L):
        state = (dt[:, t] * tensors["A"]).exp()[..., None, None] * state
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * k[:, t, :, None]
        ys.append((state * q[:, t, :, None]).sum(-1) + D * x[:, t])
    y, gating = torch.stack(ys, 1).flatten(2), silu(z)
    weight = tensors.get("rmsnorm_weight")
    if weight is None:
        y = y * gating
    else:
        y = y if norm_before_gate else y * gating
        y = rms_norm(y.view(B, L, G, -1), (INNER // G,), eps=rmsnorm_eps).flatten(2) * weight
        y = y * gating if norm_before_gate else y
    if mlp:
        y = torch.cat([silu(gate) * inner, y], -1)
    if "outproj_weight" in tensors:
        y = linear(y, tensors["outproj_weight"], tensors["outproj_bias"])
    return y, state


def test_block_with_initial_states_and_packed_sequences():
    inputs = block_inputs()
    options = {"chunk_size": 16, "ngroups": G, "return_final_states": True}
    run = ssd_combined.mamba_split_conv1d_scan_combined
    initial = torch.randn(B, H, P, N)
    _, state = run(**inputs, **options, initial_states=initial)
    close(state, block(inputs, ngroups=G, initial_states=initial)[1])
    seq_idx = (torch.arange(L) >= 12).int().expand(B, L).contiguous()
    out, state = run(**inputs, **options, seq_idx=seq_idx)
    zxbcdt = inputs.pop("zxbcdt")
    pieces = [run(piece, **inputs, **options) for piece in (zxbcdt[:, :12], zxbcdt[:, 12:])]
    close(out, torch.cat([piece for piece, _ in pieces], 1))
    close(state, pieces[-1][1])


def test_block_refuses_what_does_not_fit():
    inputs = block_inputs(headed=False)
    with pytest.raises(ValueError, match="needs headdim"):
        ssd_combined.mamba_split_conv1d_scan_combined(**inputs, chunk_size=16, ngroups=G)
    with pytest.raises(ValueError, match=r"zxbcdt has \d+ columns"):
        ssd_combined.mamba_split_conv1d_scan_combined(
            **inputs, chunk_size=16, ngroups=G, headdim=P + 1
        )


# --- layernorm_gated ------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group_size", [None, 4])
def test_gated_norms(group_size, before):
    x, z, weight, bias = (torch.randn(s) for s in ((3, 7, 12), (3, 7, 12), (12,), (12,)))
    size = group_size or 12
    for norm, function in ((layer_norm, "layernorm_fn"), (rms_norm, "rmsnorm_fn")):
        y = x if before else x * silu(z)
        y = norm(y.unflatten(-1, (-1, size)), (size,), eps=0.2).flatten(-2) * weight + bias
        y = y * silu(z) if before else y
        actual = getattr(layernorm_gated, function)(x, weight, bias, z, 0.2, group_size, before)
        close(actual, y, 1e-5)


def test_gated_norm_modules():
    x, z = torch.randn(5, 12), torch.randn(5, 12)
    rms = layernorm_gated.RMSNorm(12, eps=0.1, group_size=6)
    assert list(rms.state_dict()) == ["weight"]
    close(rms(x, z), layernorm_gated.rmsnorm_fn(x, rms.weight, None, z, 0.1, 6, True))
    layer = layernorm_gated.LayerNorm(12, eps=0.1, norm_before_gate=False)
    assert list(layer.state_dict()) == ["weight", "bias"]
    close(layer(x), layer_norm(x, (12,), eps=0.1), 1e-5)
    assert layernorm_gated.RMSNorm(12)(x.to(BF16), z.to(BF16)).dtype == BF16


# --- selective_state_update -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("optional", [(), ("D",), ("dt_bias",), ("D", "dt_bias", "z")], ids=str)
def test_steps_are_the_scan(dtype, optional):
    """As Mamba-2 calls it: what a head has in common is an expanded tensor."""
    inputs = {n: x.detach() for n, x in scan_inputs(dtype).items() if n not in optional}
    inputs["D"] = inputs["D"][:, 0] if "D" in inputs else None
    out, last = ssd_combined.mamba_chunk_scan_combined(
        **inputs, chunk_size=16, dt_softplus=True, return_final_states=True
    )
    state = torch.zeros(B, H, P, N)
    shared = {
        n: inputs[n][:, None].expand(H, P) if inputs.get(n) is not None else None
        for n in ("D", "dt_bias")
    }
    for t in range(L):
        y = update.selective_state_update(
            state, inputs["x"][:, t], inputs["dt"][:, t, :, None].expand(B, H, P),
            inputs["A"][:, None, None].expand(H, P, N), inputs["B"][:, t], inputs["C"][:, t],
            z=inputs["z"][:, t] if "z" in inputs else None, dt_softplus=True, **shared,
        )  # fmt: skip
        close(y, out[:, t], 1e-4 if dtype == F32 else 2e-2)
    close(state, last)


# --- Mamba2 ---------------------------------------------------------------------------------------


def test_the_module_is_the_block():
    """pentad.nn.Mamba2 under mamba_ssm's name, with the whole block on its parameters."""
    from pentad.compat.mamba_ssm.modules.mamba2 import Mamba2
    from pentad.nn import Mamba2 as ours

    assert mamba_ssm.Mamba2 is Mamba2 is ours
    module = Mamba2(12, d_state=N, headdim=P, expand=4, ngroups=G)
    u = torch.randn(B, L, 12)
    expected = ssd_combined.mamba_split_conv1d_scan_combined(
        module.in_proj(u), module.conv1d.weight[:, 0], module.conv1d.bias, module.dt_bias,
        -module.A_log.exp(), module.D, 256, rmsnorm_weight=module.norm.weight, rmsnorm_eps=1e-5,
        outproj_weight=module.out_proj.weight, outproj_bias=module.out_proj.bias, headdim=P,
        ngroups=G, norm_before_gate=False,
    )  # fmt: skip
    close(module(u), expected)
