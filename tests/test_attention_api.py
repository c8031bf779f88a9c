# SPDX-License-Identifier: Apache-2.0
"""The functions of `pentad.attention` as torch sees them: errors, tracing, gradients, layouts."""

import re

import numpy as np
import pytest

import pentad

torch = pytest.importorskip("torch")

from pentad.attention import autograd  # noqa: E402

A = pentad.attention
B, HQ, HK, SQ, SK, D, DV = 2, 4, 2, 5, 7, 8, 6


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The problems here are smaller than the waking of a thread."""
    threads(1)


def operands(dtype=torch.float32, grad=False, sq=SQ, sk=SK):
    q, k, v = torch.randn(B, HQ, sq, D), torch.randn(B, HK, sk, D), torch.randn(B, HK, sk, DV)
    return [t.to(dtype).requires_grad_(grad) for t in (q, k, v)]


def packed(dtype=torch.float32, grad=False):
    q, k, v = torch.randn(9, HQ, D), torch.randn(11, HK, D), torch.randn(11, HK, DV)
    cu = {
        "cu_seqlens_q": torch.tensor([0, 4, 4, 9], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 5, 6, 11], dtype=torch.int32),
    }
    return [t.to(dtype).requires_grad_(grad) for t in (q, k, v)], cu


def grown(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


# Every option, as a function of the dtype of what is added to the scores.
OPTIONS = {
    "plain": lambda t: {},
    "causal": lambda t: {"causal": True},
    "top-left": lambda t: {"causal": "top_left"},
    "window": lambda t: {"window": (2, 1)},
    "window left": lambda t: {"window": (3, None), "causal": True},
    "scale": lambda t: {"scale": 0.3},
    "bias": lambda t: {"bias": grown(B, HQ, SQ, SK, dtype=t)},
    "bias of heads": lambda t: {"bias": grown(HQ, SQ, 1, dtype=t)},
    "bias of keys": lambda t: {"bias": grown(B, 1, 1, SK, dtype=t)},
    "bias bool": lambda t: {"bias": torch.rand(SQ, SK) > 0.3},
    "key bias": lambda t: {"key_bias": grown(B, HK, SK, dtype=t)},
    "both biases": lambda t: {"key_bias": grown(B, HK, SK, dtype=t), "bias": grown(HQ, 1, SK)},
    "block mask": lambda t: {"block_mask": A.BlockMask.sliding_window(SQ, SK, window=(2, 1))},
    "softcap": lambda t: {"softcap": 1.5},
    "alibi": lambda t: {"alibi_slopes": torch.rand(B, HQ)},
    "sink": lambda t: {"sink": grown(HQ, dtype=t)},
    "dropout": lambda t: {"dropout_p": 0.3},
    "lse": lambda t: {"return_lse": True, "causal": True},
    "key mass": lambda t: {"return_key_mass": True, "window": (1, 2)},
    "all results": lambda t: {"return_key_mass": True, "return_lse": True, "dropout_p": 0.2},
}
each_option = pytest.mark.parametrize("option", OPTIONS)


def total(result):
    """A number whose gradient goes through all results."""
    parts = result if isinstance(result, tuple) else (result,)
    return sum(((n + 2) * part).sin().sum() for n, part in enumerate(parts))


def leaves(*arguments):
    return [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]


def value_and_gradients(function, *arguments, **options):
    torch.manual_seed(5)  # of the dropout
    loss = total(function(*arguments, **options))
    return loss, *torch.autograd.grad(loss, leaves(*arguments, *options.values()))


# --- Errors ---------------------------------------------------------------------------------------

Q, K, V = operands()
LONG = torch.zeros(B, HQ, SQ, 513)
CU = torch.tensor([0, 5], dtype=torch.int32)
P = [torch.zeros(5, HQ, D), torch.zeros(7, HK, D), torch.zeros(7, HK, DV)]
CUS = {"cu_seqlens_q": CU, "cu_seqlens_k": torch.tensor([0, 7])}

BAD = {
    "numpy": ([np.zeros((1, 1, 1, 8), np.float32), K, V], {}, TypeError, "q is ndarray"),
    "list": ([Q, [1.0], V], {}, TypeError, "k is list, expected a torch tensor"),
    "integers": ([Q.long(), K, V], {}, TypeError, "q has dtype int64, expected float32"),
    "two dtypes": ([Q, K.bfloat16(), V], {}, TypeError, "k has dtype bfloat16 but q has float32"),
    "v dtype": ([Q, K, V.double()], {}, TypeError, "v has dtype float64 but q has float32"),
    "rank": ([Q[0], K, V], {}, ValueError, "q has shape (4, 5, 8), expected (B, H, S, D)"),
    "rank of v": ([Q, K, V[0]], {}, ValueError, "v has shape (2, 7, 6), expected (B, H, S, D)"),
    "head_dim": ([Q, V, V], {}, ValueError, "k has head_dim 6 but q has 8"),
    "batch": ([Q, K[:1], V], {}, ValueError, "k has batch 1 but q has 2"),
    "batch of v": ([Q, K, V[:1]], {}, ValueError, "v has batch 1 but q has 2"),
    "keys": ([Q, K, V[:, :, 1:]], {}, ValueError, "v has 6 keys but k has 7"),
    "heads of v": ([Q, K, V[:, 1:]], {}, ValueError, "v has 1 heads but k has 2"),
    "groups": ([Q[:, 1:], K, V], {}, ValueError, "q has 3 heads and k has 2"),
    "no heads": ([Q, K[:, :0], V[:, :0]], {}, ValueError, "k has 0, expected"),
    "wide": ([LONG, LONG, LONG], {}, ValueError, "q has head_dim 513, expected 1 to 512"),
    "wide v": ([Q, Q, LONG], {}, ValueError, "v has head_dim 513, expected 1 to 512"),
    "dimless": ([Q[..., :0], K[..., :0], V], {}, ValueError, "q has head_dim 0"),
    "meta": ([Q, K.to("meta"), V], {}, pentad.DeviceError, "k is on meta but q is on cpu"),
    "causal": ([Q, K, V], {"causal": "left"}, ValueError, "causal is 'left'"),
    "window": ([Q, K, V], {"window": 3}, ValueError, "window is 3, expected (left, right)"),
    "window of three": ([Q, K, V], {"window": (1, 2, 3)}, ValueError, "window is (1, 2, 3)"),
    "window float": ([Q, K, V], {"window": (1.5, 2)}, ValueError, "window is (1.5, 2)"),
    "window negative": ([Q, K, V], {"window": (-2, 0)}, ValueError, "expected at least 0"),
    "scale": ([Q, K, V], {"scale": torch.ones(())}, TypeError, "scale is a tensor"),
    "bias list": ([Q, K, V], {"bias": [0.0]}, TypeError, "bias is list"),
    "bias dtype": ([Q, K, V], {"bias": torch.zeros(5, 7).int()}, TypeError, "bias has dtype int32"),
    "bias shape": (
        [Q, K, V],
        {"bias": torch.zeros(3, 5, 7)},
        ValueError,
        "bias has shape (3, 5, 7), expected one that broadcasts to (2, 4, 5, 7)",
    ),
    "bias rank": ([Q, K, V], {"bias": torch.zeros(7)}, ValueError, "bias has shape (7,)"),
    "bias rank 5": ([Q, K, V], {"bias": torch.zeros(1, 1, 1, 5, 7)}, ValueError, "bias has shape"),
    "bias device": (
        [Q, K, V],
        {"bias": torch.zeros(5, 7, device="meta")},
        pentad.DeviceError,
        "bias is on meta",
    ),
    "bias packed": (P, {"bias": torch.zeros(5, 7), **CUS}, ValueError, "bias cannot be used with"),
    "key_bias dtype": (
        [Q, K, V],
        {"key_bias": torch.ones(2, 2, 7, dtype=torch.bool)},
        TypeError,
        "key_bias has dtype bool",
    ),
    "key_bias shape": (
        [Q, K, V],
        {"key_bias": torch.zeros(2, 7)},
        ValueError,
        "key_bias has shape (2, 7), expected (2, 4, 7) or (2, 2, 7)",
    ),
    "key_bias packed": (
        P,
        {"key_bias": torch.zeros(1, 2, 7), **CUS},
        ValueError,
        "expected (4, 7) or (2, 7)",
    ),
    "block_mask": ([Q, K, V], {"block_mask": Q}, TypeError, "block_mask is Tensor, expected a"),
    "block_mask size": (
        [Q, K, V],
        {"block_mask": lambda: A.BlockMask.sliding_window(5, 8, window=(2, 1))},
        ValueError,
        "block_mask is for 5 queries and 8 keys, but q has 5 and k has 7",
    ),
    "block_mask packed": (
        P,
        {"block_mask": lambda: A.BlockMask.sliding_window(5, 7, window=(2, 1)), **CUS},
        ValueError,
        "block_mask cannot be used with",
    ),
    "block_mask heads": (
        [Q, K, V],
        {"block_mask": lambda: A.BlockMask.from_dense(torch.ones(1, 3, 5, 7, dtype=torch.bool))},
        ValueError,
        "block_mask has batch 1 and 3 heads, expected 1 or 2, and 1 or 4",
    ),
    "softcap": ([Q, K, V], {"softcap": -1.0}, ValueError, "softcap is -1.0, expected 0"),
    "softcap nan": ([Q, K, V], {"softcap": float("nan")}, ValueError, "softcap is nan"),
    "alibi shape": (
        [Q, K, V],
        {"alibi_slopes": torch.zeros(2)},
        ValueError,
        "alibi_slopes has shape (2,), expected (4,) or (2, 4)",
    ),
    "alibi dtype": (
        [Q, K, V],
        {"alibi_slopes": torch.ones(4).int()},
        TypeError,
        "alibi_slopes has dtype int32",
    ),
    "alibi gradient": (
        [Q, K, V],
        {"alibi_slopes": torch.zeros(4, requires_grad=True)},
        ValueError,
        "alibi_slopes require a gradient",
    ),
    "sink shape": (
        [Q, K, V],
        {"sink": torch.zeros(2)},
        ValueError,
        "sink has shape (2,), expected",
    ),
    "sink number": ([Q, K, V], {"sink": 1.0}, TypeError, "sink is float, expected a torch tensor"),
    "dropout 1": ([Q, K, V], {"dropout_p": 1.0}, ValueError, "dropout_p is 1.0, expected 0 <="),
    "dropout negative": ([Q, K, V], {"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    "one cu": (P, {"cu_seqlens_q": CU}, ValueError, "cu_seqlens_k is None"),
    "other cu": (P, {"cu_seqlens_k": CU}, ValueError, "cu_seqlens_q is None"),
    "cu rank": ([Q, K, V], CUS, ValueError, "expected (total, H, D) with cu_seqlens"),
    "cu dtype": (P, {**CUS, "cu_seqlens_q": CU.float()}, TypeError, "cu_seqlens_q has dtype float"),
    "cu list": (P, {**CUS, "cu_seqlens_q": [0, 5]}, TypeError, "cu_seqlens_q is list"),
    "cu shape": (P, {**CUS, "cu_seqlens_q": CU[None]}, ValueError, "cu_seqlens_q has shape (1, 2)"),
    "cu counts": (
        P,
        {**CUS, "cu_seqlens_q": torch.tensor([0, 2, 5])},
        ValueError,
        "cu_seqlens_q has 3 entries but cu_seqlens_k has 2",
    ),
    "cu overruns": (P, {**CUS, "cu_seqlens_q": CU + CU}, ValueError, "cu_seqlens_q"),
    "cu falls short": (P, {**CUS, "cu_seqlens_k": CU}, ValueError, "cu_seqlens_k"),
    "cu starts late": (P, {**CUS, "cu_seqlens_k": CU + 2}, ValueError, "cu_seqlens_k"),
    "cu descends": (
        P,
        {"cu_seqlens_q": torch.tensor([0, 4, 3, 5]), "cu_seqlens_k": torch.tensor([0, 1, 2, 7])},
        ValueError,
        "cu_seqlens_q",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused_by_name(what):
    arguments, options, error, message = BAD[what]
    options = {n: o() if callable(o) and not torch.is_tensor(o) else o for n, o in options.items()}
    with pytest.raises(error, match=re.escape(message)) as caught:
        A.attention(*arguments, **options)
    assert str(caught.value).startswith("[attention]")


def test_slopes_that_require_a_gradient_pass_without_one():
    slopes = torch.rand(HQ, requires_grad=True)
    with torch.no_grad():
        A.attention(Q, K, V, alibi_slopes=slopes)


def test_devices_without_a_kernel():
    class Elsewhere(torch.Tensor):
        """Says it is on another device."""

        is_cpu = False
        device = torch.device("xpu", 0)

    q, k, v = (t.as_subclass(Elsewhere) for t in (Q, K, V))
    with pytest.raises(pentad.DeviceError, match="there is no xpu kernel"):
        A.attention(q, k, v)


@pytest.mark.parametrize("options", [{}, {"bias": torch.zeros(SQ, SK)}], ids=["plain", "bias"])
def test_forward_mode_is_refused_and_never_silently_zero(options):
    given = dict(zip("qkv", operands(), strict=True)) | options
    for name in given:
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(given[name], torch.ones_like(given[name]))
            with pytest.raises(NotImplementedError, match="forward mode AD"):
                A.attention(**given | {name: dual})


def test_a_second_derivative_is_refused_and_never_silently_zero():
    q, k, v = operands(grad=True)
    bias = grown(SQ, SK)
    out = A.attention(q, k, v, bias=bias)
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    for leaf in (q, k, v, bias):
        with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
            torch.autograd.grad(first.pow(2).sum(), leaf, retain_graph=True, allow_unused=True)


# --- Gradients ------------------------------------------------------------------------------------


@each_option
def test_gradcheck(option):
    inputs = operands(torch.float64, grad=True)
    options = OPTIONS[option](torch.float64)
    names = [n for n, o in options.items() if isinstance(o, torch.Tensor) and o.requires_grad]

    def call(q, k, v, *given):
        torch.manual_seed(5)
        return A.attention(q, k, v, **options | dict(zip(names, given, strict=True)))

    given = [options[n].detach().double().requires_grad_() for n in names]
    # Each entry of the Jacobians where there are most of them; else their products with vectors.
    fast = option not in ("both biases", "all results")
    assert torch.autograd.gradcheck(call, (*inputs, *given), atol=1e-6, fast_mode=fast)


@pytest.mark.parametrize("option", [{}, {"causal": True, "return_lse": True}, {"window": (2, 0)}])
def test_gradcheck_of_packed_sequences(option):
    inputs, cu = packed(torch.float64, grad=True)
    key_bias = torch.randn(HK, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: A.attention(q, k, v, key_bias=b, **cu, **option), (*inputs, key_bias)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_option
def test_gradients_have_the_shape_and_dtype_of_the_inputs(option, dtype):
    inputs = operands(dtype, grad=True)
    options = OPTIONS[option](torch.bfloat16)
    result = A.attention(*inputs, **options)
    parts = result if isinstance(result, tuple) else (result,)
    assert parts[0].dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(part.dtype == wide for part in parts[1:])
    given = leaves(*inputs, *options.values())
    for leaf, grad in zip(given, torch.autograd.grad(total(result), given), strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
        assert grad.isfinite().all()


def test_only_the_wanted_gradients():
    for wanted in range(1, 64):
        bits = [bool(wanted >> n & 1) for n in range(6)]
        torch.manual_seed(1)
        tensors = [*operands(), torch.randn(SQ, SK), torch.randn(B, HK, SK), torch.randn(HQ)]
        for tensor in tensors:
            tensor.requires_grad_()
        q, k, v, bias, key_bias, sink = tensors
        loss = total(A.attention(q, k, v, bias=bias, key_bias=key_bias, sink=sink))
        want = torch.autograd.grad(loss, tensors)
        q, k, v, bias, key_bias, sink = (
            t.detach().requires_grad_(b) for t, b in zip(tensors, bits, strict=True)
        )
        loss = total(A.attention(q, k, v, bias=bias, key_bias=key_bias, sink=sink))
        loss.backward()
        for leaf, bit, grad in zip((q, k, v, bias, key_bias, sink), bits, want, strict=True):
            assert (leaf.grad is not None) == bit
            if bit:
                torch.testing.assert_close(leaf.grad, grad)


def test_a_gradient_through_one_result_alone():
    q, k, v = operands(torch.float64, grad=True)
    out, lse, mass = A.attention(q, k, v, return_lse=True, return_key_mass=True)
    p = torch.softmax(q @ k.repeat_interleave(2, 1).mT * D**-0.5, -1)
    logits = q @ k.repeat_interleave(2, 1).mT * D**-0.5
    for got, want in (
        (out, p @ v.repeat_interleave(2, 1)),
        (lse, logits.logsumexp(-1)),
        (mass, p.sum(2)),
    ):
        weights = torch.randn_like(got)
        a = torch.autograd.grad(got, (q, k, v), weights, retain_graph=True, materialize_grads=True)
        b = torch.autograd.grad(want, (q, k, v), weights, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(a, b)


def test_a_bias_of_keys_is_a_key_bias():
    q, k, v = operands(grad=True)
    for heads in (1, HQ):
        for key_heads in (None, HK, HQ):
            bias, key_bias = grown(B, heads, 1, SK), key_heads and grown(B, key_heads, SK)
            want = bias.expand(B, HQ, SQ, SK).contiguous()
            if key_heads:
                want = want + key_bias.repeat_interleave(HQ // key_heads, 1)[:, :, None]
            given = [q, k, v, bias, *([key_bias] if key_heads else [])]
            got = A.attention(q, k, v, bias=bias, key_bias=key_bias)
            want = A.attention(q, k, v, bias=want)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(
                torch.autograd.grad(total(got), given), torch.autograd.grad(total(want), given)
            )


def test_no_graph_where_none_is_wanted():
    q, k, v = operands(grad=True)
    assert A.attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not A.attention(q, k, v).requires_grad
    with torch.inference_mode():
        assert A.attention(q, k, v).is_inference()
    assert not A.attention(*(t.detach() for t in (q, k, v)), return_lse=True)[1].requires_grad


def test_inputs_changed_after_the_forward_are_noticed():
    q, k, v = operands(grad=True)
    changed = k * 1
    out = A.attention(q, changed, v)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_torch_func_grad():
    q, k, v = operands(torch.float64)
    got = torch.func.grad(lambda q, k: A.attention(q, k, v, causal=True).sin().sum(), (0, 1))(q, k)
    q, k = q.requires_grad_(), k.requires_grad_()
    want = torch.autograd.grad(A.attention(q, k, v, causal=True).sin().sum(), (q, k))
    torch.testing.assert_close(got, want)


# --- Dropout's seed -------------------------------------------------------------------------------


def test_dropout_is_a_function_of_the_generator():
    generator = torch.Generator().manual_seed(7)
    state, default = generator.get_state(), torch.get_rng_state()
    first = A.attention(Q, K, V, dropout_p=0.5, generator=generator)
    second = A.attention(Q, K, V, dropout_p=0.5, generator=generator)
    generator.set_state(state)
    assert torch.equal(A.attention(Q, K, V, dropout_p=0.5, generator=generator), first)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), default)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(A.attention(Q, K, V, dropout_p=0.5))
    assert torch.equal(*draws)
    assert not torch.equal(torch.get_rng_state(), default)


def test_no_dropout_draws_nothing():
    state = torch.get_rng_state()
    A.attention(Q, K, V, dropout_p=0.0, return_lse=True)
    assert torch.equal(torch.get_rng_state(), state)


@each_option
def test_defaults_of_dtype_and_device_change_nothing(option):
    inputs, options = operands(), OPTIONS[option](torch.float32)
    torch.manual_seed(5)
    want = A.attention(*inputs, **options)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        torch.random.manual_seed(5)
        got = A.attention(*inputs, **options)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# --- Tracing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "dynamic"),
    [(option, False) for option in OPTIONS]
    + [(option, True) for option in ("window", "both biases", "block mask", "all results")],
)
def test_compiles_without_a_break(option, dynamic):
    torch._dynamo.reset()
    inputs, options = operands(grad=True), OPTIONS[option](torch.float32)

    def function(*arguments, **options):
        return A.attention(*arguments, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want = value_and_gradients(function, *inputs, **options)
    torch.testing.assert_close(value_and_gradients(compiled, *inputs, **options), want)
    with torch.no_grad():
        torch.manual_seed(5)
        torch.testing.assert_close(total(compiled(*inputs, **options)), want[0])


def test_compiled_code_takes_other_sizes():
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count)
    def function(q, k, v):
        return A.attention(q, k, v, causal=True, window=(3, 0))

    for sizes in ((5, 7), (6, 9), (8, 8), (12, 30), (31, 17)):
        inputs = operands(grad=True, sq=sizes[0], sk=sizes[1])
        got = function(*inputs)
        torch.testing.assert_close(got, A.attention(*inputs, causal=True, window=(3, 0)))
        got.sum().backward()
    assert count.frame_count <= 3


def test_compiles_packed_sequences():
    torch._dynamo.reset()
    inputs, cu = packed(grad=True)

    def function(*arguments):
        return A.attention(*arguments, causal=True, return_lse=True, **cu)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradients(compiled, *inputs), value_and_gradients(function, *inputs)
    )


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return A.attention(q, k, v, causal=True)

    program = torch.export.export(Model(), (Q, K, V))
    torch.testing.assert_close(program.module()(Q, K, V), A.attention(Q, K, V, causal=True))


def op_arguments(option, dtype=torch.float32):
    """What `attention` gives to the general operator."""
    caught = []
    original = autograd.forward
    try:
        autograd.forward = lambda *arguments: caught.append(arguments) or original(*arguments)
        options = {
            n: o.detach() if isinstance(o, torch.Tensor) else o
            for n, o in OPTIONS[option](dtype).items()
        }
        A.attention(*operands(dtype), **{"return_lse": True, **options})
    finally:
        autograd.forward = original
    return caught[0]


@each_option
def test_opcheck(option):
    arguments = op_arguments(option)
    torch.library.opcheck(autograd.forward, arguments)
    out, lse, mass = autograd.forward(*arguments)
    plain, key_mass, options = arguments[:7], arguments[7], arguments[8:]
    d_mass = torch.randn_like(mass) if key_mass else None
    wanted = [t is not None and t.dtype != torch.bool for t in (*plain[:3], *options[:3])]
    torch.library.opcheck(
        autograd.backward,
        (
            *(torch.randn_like(out), torch.randn_like(lse), d_mass, out, lse, wanted),
            *(*plain, *options),
        ),
    )


def test_opcheck_of_the_plain_operator():
    for inputs in (operands(), operands(torch.bfloat16)):
        torch.library.opcheck(autograd.plain, (*inputs, None, -1, 0, False))
        q = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
        torch.library.opcheck(autograd.plain, (q, *inputs[1:], 0.5, 3, 2, True))


@each_option
def test_fake_and_meta_tensors_give_what_real_ones_give(option):
    from torch._subclasses import FakeTensorMode

    options = OPTIONS[option](torch.float32)
    real = A.attention(*operands(), **options)
    real = real if isinstance(real, tuple) else (real,)
    results = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in operands()]
        results.append(A.attention(*fake, **options))
    if "block_mask" not in options:
        options = {n: o.to("meta") if torch.is_tensor(o) else o for n, o in options.items()}
        results.append(A.attention(*(t.to("meta") for t in operands()), **options))
    for result in results:
        result = result if isinstance(result, tuple) else (result,)
        for got, want in zip(result, real, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


# --- Kinds of tensors -----------------------------------------------------------------------------


def _strided(t):
    roomy = torch.full([n * 3 for n in t.shape], 1.0, dtype=t.dtype)
    return roomy[tuple(slice(1, None, 3) for _ in t.shape)].copy_(t)


VIEWS = {
    "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "reversed dims": lambda t: (
        t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))
    ),
    "strided": _strided,
    "offset": lambda t: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape),
    "negated": lambda t: (-t)._neg_view(),
    "parameter": lambda t: torch.nn.Parameter(t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("view", VIEWS)
def test_tensors_of_every_make(view, dtype):
    given = [*operands(dtype), torch.randn(B, HQ, SQ, SK, dtype=dtype), torch.randn(B, HK, SK)]
    viewed = [VIEWS[view](t.clone()) for t in given]
    assert all(torch.equal(a, b) for a, b in zip(viewed, given, strict=True))
    sink = torch.randn(HQ)
    results = []
    for q, k, v, bias, key_bias in (given, viewed):
        q, k, v, bias, key_bias = (t.detach().requires_grad_() for t in (q, k, v, bias, key_bias))
        options = {"bias": bias, "key_bias": key_bias, "sink": sink}
        results.append(value_and_gradients(A.attention, q, k, v, return_lse=True, **options))
    rough = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(*results, rtol=rough, atol=rough)


def test_expanded_inputs_and_gradients():
    base = [torch.randn(1, n, 1, d, requires_grad=True) for n, d in ((HQ, D), (HK, D), (HK, DV))]
    sizes = ((B, HQ, SQ, D), (B, HK, SK, D), (B, HK, SK, DV))
    views = [t.expand(*s) for t, s in zip(base, sizes, strict=True)]
    copies = [t.contiguous() for t in views]
    got, want = A.attention(*views), A.attention(*copies)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(  # the gradient of a sum has zero strides, too
        torch.autograd.grad(got.sum(), base), torch.autograd.grad(want.sum(), base)
    )


def test_the_layout_of_out_follows_q():
    q, k, v = operands()
    assert A.attention(q, k, v).is_contiguous()
    bshd = q.transpose(1, 2).contiguous().transpose(1, 2)
    of_qkv = torch.stack([q, q, q], 1).permute(0, 3, 1, 2, 4).contiguous()[:, :, 1].transpose(1, 2)
    for result in (
        A.attention(bshd, k, v),
        A.attention(bshd, k, v, return_lse=True)[0],
        A.attention(of_qkv, k, v),
    ):
        assert result.transpose(1, 2).is_contiguous()
        assert torch.equal(result, A.attention(q, k, v))
    assert A.attention(_strided(q), k, v).is_contiguous()
    (grad,) = torch.autograd.grad(A.attention(bshd.requires_grad_(), k, v).sum(), bshd)
    assert grad.stride() == bshd.stride()


def test_empty_sizes():
    for b, hq, sq, sk in ((0, 4, 3, 3), (1, 4, 0, 3), (1, 4, 3, 0), (1, 4, 0, 0)):
        q, k = torch.randn(b, hq, sq, D, requires_grad=True), torch.randn(b, 2, sk, D)
        out, lse = A.attention(q, k, k[..., :DV], causal=True, return_lse=True)
        assert out.shape == (b, hq, sq, DV)
        assert not out.any()
        assert (lse == -torch.inf).all()
        out.sum().backward()
        assert q.grad.shape == q.shape
        assert not q.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_what_torch_casts(dtype):
    q, k, v = operands(grad=True)
    with torch.autocast("cpu", dtype):
        out, lse = A.attention(q, k, v, return_lse=True)
        plain = A.attention(q.detach(), k.detach(), v.detach())
        mixed = A.attention(q.to(dtype), k, v)
    want = A.attention(q.to(dtype), k.to(dtype), v.to(dtype))
    for got in (out, plain, mixed):
        assert got.dtype == dtype
        assert torch.equal(got, want)
    assert lse.dtype == torch.float32
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        doubles = operands(torch.float64)
        assert A.attention(*doubles).dtype == torch.float64
