# SPDX-License-Identifier: Apache-2.0
"""pentad.compat.fla's delta rules, against the recurrence written out.

In float32 a difference is rounding alone, of sums in another order over some dozens of steps: 1e-4
of the largest value. In bfloat16 queries and keys are rounded once more after their normalisation,
as in flash-linear-attention, whose tests allow 0.5% of the root mean square per result; here a
largest error is compared, for which 2% is asked.
"""

import inspect

import pytest

torch = pytest.importorskip("torch")

from cases import run_python  # noqa: E402
from torch.nn.functional import logsigmoid, rms_norm, silu, softplus  # noqa: E402

from pentad import scan  # noqa: E402
from pentad.compat.fla import modules, ops  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
B, T, H, HV, K, V = 2, 37, 2, 4, 8, 6
GATED = (ops.chunk_gated_delta_rule, ops.fused_recurrent_gated_delta_rule)
KEYED = (ops.chunk_kda, ops.fused_recurrent_kda)
PLAIN = (ops.chunk_delta_rule, ops.fused_recurrent_delta_rule)


def close(actual, expected, tolerance=1e-4):
    """Relative to the largest value."""
    assert actual.shape == expected.shape
    size = expected.abs().max().clamp(min=1e-6)
    torch.testing.assert_close(actual.float() / size, expected / size, rtol=0, atol=tolerance)


def random_inputs(function, dtype=F32, steps=T, state=True):
    keyed = function in KEYED
    tensors = {
        "q": torch.randn(B, steps, H, K).to(dtype),
        "k": torch.randn(B, steps, H, K).to(dtype),
        "v": torch.randn(B, steps, HV, V).to(dtype),
        "beta": torch.rand(B, steps, HV).to(dtype),
    }
    if function not in PLAIN:
        tensors["g"] = logsigmoid(torch.randn(B, steps, HV, K) if keyed else tensors["v"][..., 0])
        tensors["g"] = tensors["g"].float()
    if state:
        tensors["initial_state"] = torch.randn(B, HV, K, V)
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}


def delta_rule(q, k, v, beta, g=None, initial_state=None, scale=K**-0.5, l2=True):
    """(out, state), one step after another (arXiv 2412.06464, equation 10)."""
    q, k, v, beta = (x.float() for x in (q, k, v, beta))
    if l2:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(HV // x.shape[2], 2) for x in (q, k))
    state = (
        torch.zeros(len(v), HV, q.shape[3], v.shape[3]) if initial_state is None else initial_state
    )
    outs = []
    for t in range(v.shape[1]):
        if g is not None:
            decay = g[:, t].float().exp()
            state = state * decay.view(*decay.shape, *(1,) * (4 - decay.ndim))
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outs, 1), state


NORMED = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}


@pytest.mark.parametrize("function", [*GATED, *KEYED, *PLAIN], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-4), (BF16, 2e-2)], ids=str)
def test_against_the_recurrence(function, dtype, tolerance):
    """The result, the final state, and every gradient through both."""
    inputs = random_inputs(function, dtype)
    out, state = function(**inputs, **NORMED)
    expected = delta_rule(**inputs)
    assert out.dtype == dtype
    assert state.dtype == F32
    seeds = [torch.randn_like(x) for x in expected]
    actual = torch.autograd.grad(
        (out, state), list(inputs.values()), [seeds[0].to(dtype), seeds[1]]
    )
    correct = torch.autograd.grad(expected, list(inputs.values()), seeds)
    close(out, expected[0], tolerance)
    close(state, expected[1], tolerance)
    for name, a, c in zip(inputs, actual, correct, strict=True):
        assert a.dtype == inputs[name].dtype
        close(a, c.float(), tolerance)


@pytest.mark.parametrize("function", [*GATED, *KEYED, *PLAIN], ids=lambda f: f.__name__)
def test_options(function):
    inputs = {n: x.detach() for n, x in random_inputs(function).items()}
    inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)  # as is
    out, state = function(**inputs, scale=0.3)
    assert state is None
    close(out, delta_rule(**inputs, scale=0.3, l2=False)[0])
    del inputs["initial_state"]
    close(function(**inputs)[0], delta_rule(**inputs, l2=False)[0])
    if function.__name__.startswith("fused"):
        ones = torch.ones(B, T, HV)
        close(
            function(**{**inputs, "beta": ones})[0],
            delta_rule(**{**inputs, "beta": ones}, l2=False)[0],
        )
    with pytest.raises(ValueError, match="cp_context"):
        function(**inputs, cp_context=object())
    with pytest.raises(ValueError, match="head_first"):
        function(**inputs, head_first=True)


def test_betas_are_one_by_default():
    inputs = random_inputs(PLAIN[1])
    ones = torch.ones_like(inputs.pop("beta"))
    for function in (PLAIN[1], GATED[1]):
        close(function(**inputs, **NORMED)[0], delta_rule(**inputs, beta=ones)[0])


@pytest.mark.parametrize("function", [*GATED, *KEYED, *PLAIN], ids=lambda f: f.__name__)
def test_packed_sequences(function):
    """Each as alone, with its own initial and final state."""
    inputs = {n: x.detach()[:1] for n, x in random_inputs(function).items()}
    initial = torch.randn(3, HV, K, V)
    bounds = [0, 20, 21, T]
    out, state = function(
        **{**inputs, "initial_state": initial}, **NORMED, cu_seqlens=torch.tensor(bounds)
    )
    assert state.shape == initial.shape
    for s in range(3):
        piece = {n: x[:, bounds[s] : bounds[s + 1]] for n, x in inputs.items()}
        expected = delta_rule(**{**piece, "initial_state": initial[s : s + 1]})
        close(out[:, bounds[s] : bounds[s + 1]], expected[0])
        close(state[s : s + 1], expected[1])


@pytest.mark.parametrize("function", [*GATED, *KEYED, *PLAIN], ids=lambda f: f.__name__)
@pytest.mark.parametrize("gradient", [False, True])
def test_one_step(function, gradient, monkeypatch):
    """It goes to the update, whose state is a copy."""
    calls = []
    real = scan.delta_rule_update

    def noting(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(scan, "delta_rule_update", noting)
    inputs = random_inputs(function, steps=1)
    before = inputs["initial_state"].detach().clone()
    expected = delta_rule(**inputs)
    with torch.set_grad_enabled(gradient):
        out, state = function(**inputs, **NORMED)
    assert len(calls) == 1
    assert torch.equal(inputs["initial_state"], before)
    close(out, expected[0])
    close(state, expected[1])
    if gradient:
        seeds = [torch.randn_like(x) for x in expected]
        leaves = list(inputs.values())
        for actual, correct in zip(
            torch.autograd.grad((out, state), leaves, seeds),
            torch.autograd.grad(expected, leaves, seeds),
            strict=True,
        ):
            close(actual, correct)


def test_one_step_of_as_many_sequences_as_heads_and_keys():
    """The decays (B, HV) could be taken for (HV, K)."""
    inputs = {n: torch.randn(HV, 1, HV, HV) for n in ("q", "k", "v")}
    inputs |= {"beta": torch.rand(HV, 1, HV), "g": torch.rand(HV, 1, HV).log()}
    expected = [delta_rule(**{n: x[b : b + 1] for n, x in inputs.items()})[0] for b in range(HV)]
    close(GATED[1](**inputs, **NORMED, scale=K**-0.5)[0], torch.cat(expected))


def test_steps_are_the_whole():
    for function in (*GATED, *KEYED):
        inputs = {n: x.detach() for n, x in random_inputs(function).items()}
        whole, last = function(**inputs, **NORMED)
        state, outs = inputs.pop("initial_state"), []
        for t in range(T):
            step = {n: x[:, t : t + 1] for n, x in inputs.items()}
            out, state = function(**step, initial_state=state, **NORMED)
            outs.append(out)
        close(torch.cat(outs, 1), whole)
        close(state, last)


@pytest.mark.parametrize("function", [*GATED, *KEYED], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["state_v_first", "transpose_state_layout"])
def test_states_the_other_way_round(function, name):
    inputs = {n: x.detach() for n, x in random_inputs(function).items()}
    out, state = function(**inputs, **NORMED)
    inputs["initial_state"] = inputs["initial_state"].mT.contiguous()
    turned, turned_state = function(**inputs, **NORMED, **{name: True})
    assert torch.equal(turned, out)
    assert torch.equal(turned_state, state.mT)
    assert turned_state.is_contiguous()


@pytest.mark.parametrize("function", GATED, ids=lambda f: f.__name__)
def test_gates_in_the_kernel(function):
    inputs = random_inputs(function)
    g, beta = torch.randn(B, T, HV), torch.randn(B, T, HV)
    A_log, dt_bias = torch.randn(HV), torch.randn(HV)
    inputs |= {"g": g, "beta": beta}
    options = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    out, _ = function(**inputs, **NORMED, **options, A_log=A_log, dt_bias=dt_bias)
    inputs |= {"g": -A_log.exp() * softplus(g + dt_bias), "beta": beta.sigmoid()}
    close(out, delta_rule(**inputs)[0])
    inputs |= {"g": g, "beta": beta}
    out, _ = function(**inputs, **NORMED, **options, A_log=A_log, allow_neg_eigval=True)
    inputs |= {"g": -A_log.exp() * softplus(g), "beta": 2 * beta.sigmoid()}
    close(out, delta_rule(**inputs)[0])


@pytest.mark.parametrize("function", [*GATED, *KEYED], ids=lambda f: f.__name__)
def test_gates_in_the_kernel_need_their_rate(function):
    with pytest.raises(ValueError, match="A_log is None, expected a tensor with use_gate_in_kern"):
        function(**random_inputs(function), use_gate_in_kernel=True)


@pytest.mark.parametrize("function", KEYED, ids=lambda f: f.__name__)
def test_gates_per_key_in_the_kernel(function):
    inputs = random_inputs(function)
    inputs["g"] = g = torch.randn(B, T, HV, K)
    A_log, dt_bias = torch.randn(HV), torch.randn(HV * K)
    options = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
    rate, g = A_log.exp()[:, None], g + dt_bias.view(HV, K)
    out, _ = function(**inputs, **NORMED, **options)
    close(out, delta_rule(**{**inputs, "g": -rate * softplus(g)})[0])
    out, _ = function(**inputs, **NORMED, **options, lower_bound=-5.0)
    close(out, delta_rule(**{**inputs, "g": -5 * (rate * g).sigmoid()})[0])


def test_decays_per_key_beside_those_per_head():
    inputs = random_inputs(KEYED[0])
    g, gk = torch.rand(B, T, HV).log(), inputs.pop("g")
    function = ops.fused_recurrent_gated_delta_rule
    close(function(**inputs, **NORMED, gk=gk)[0], delta_rule(**inputs, g=gk)[0])
    both = delta_rule(**inputs, g=gk + g[..., None])
    close(function(**inputs, **NORMED, g=g, gk=gk)[0], both[0])
    with pytest.raises(ValueError, match="gv"):
        function(**inputs, gv=inputs["v"])


def test_names_that_transformers_passes():
    """It drops those that a signature does not have."""
    wanted = {"g", "beta", "initial_state", "output_final_state", "cu_seqlens"}
    for function in (*GATED, *KEYED):
        names = inspect.signature(function).parameters
        assert names.keys() >= wanted | {"use_qk_l2norm_in_kernel"}
        assert [*names][:3] == ["q", "k", "v"]


# --- Modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
def test_gated_norm(activation):
    x, g = torch.randn(5, 12), torch.randn(5, 12)
    norm = modules.FusedRMSNormGated(12, eps=0.1, activation=activation)
    torch.nn.init.normal_(norm.weight)
    gate = torch.sigmoid(g) if activation == "sigmoid" else silu(g)
    close(norm(x, g), rms_norm(x, (12,), norm.weight, 0.1) * gate, 1e-6)
    residual = torch.randn(5, 12)
    out, total = norm(x, g, residual, prenorm=True)
    close(total, x + residual, 1e-6)
    close(out, rms_norm(x + residual, (12,), norm.weight, 0.1) * gate, 1e-6)
    assert norm(x.to(BF16), g.to(BF16)).dtype == BF16


def test_gated_norm_without_weight():
    x, g = torch.randn(5, 12), torch.randn(5, 12)
    norm = modules.FusedRMSNormGated(12, elementwise_affine=False)
    assert not norm.state_dict()
    close(norm(x, g), rms_norm(x, (12,), eps=1e-5) * silu(g), 1e-6)
    with pytest.raises(ValueError, match="'gelu'"):
        modules.FusedRMSNormGated(12, activation="gelu")


# --- install --------------------------------------------------------------------------------------


def test_install():
    """In another process: under the peer's names, the same objects."""
    run_python("""
        import pentad.compat
        assert "fla" in pentad.compat.install()
        import fla
        from fla.modules import FusedRMSNormGated
        from fla.ops.gated_delta_rule import (
            chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
        )
        from fla.ops.kda import chunk_kda
        from fla.ops import chunk_delta_rule
        import pentad.compat.fla.ops.gated_delta_rule as ours
        assert chunk_gated_delta_rule is ours.chunk_gated_delta_rule
        assert fla.__version__
    """)
