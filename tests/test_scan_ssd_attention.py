# SPDX-License-Identifier: Apache-2.0
"""The implicit attention of the heads of `ssd`, against its definition and against the scan."""

import importlib

import pytest

import pentad

torch = pytest.importorskip("torch")

from torch.nn.functional import softplus  # noqa: E402

from pentad.scan import ssd, ssd_attention_matrix  # noqa: E402

module = importlib.import_module("pentad.scan.ssd_attention_matrix")
B, L, H, G, N, P = 2, 19, 4, 2, 3, 5
OPTIONS = {
    "plain": {},
    "all": {"D": True, "dt_bias": True, "dt_softplus": True, "dt_limit": (0.3, 1.5)},
    "sequences": {"seq_idx": True, "D": True},
    "reverse": {"seq_idx": True, "reverse": True, "dt_softplus": True},
}
each_option = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The problems here are smaller than the waking of a thread."""
    threads(1)


@pytest.fixture
def narrow(monkeypatch):
    """Tiles of which the last is cut."""
    monkeypatch.setattr(module, "_SOURCES", (8, 8))


def problem(option, dtype=torch.float64):
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    given = {
        "dt": torch.rand(B, L, H, dtype=wide).to(dtype),
        "A": -torch.rand(H, dtype=wide),
        "B": torch.randn(B, L, G, N, dtype=wide).to(dtype),
        "C": torch.randn(B, L, G, N, dtype=wide).to(dtype),
        **OPTIONS[option],
    }
    for name in ("D", "dt_bias"):
        if name in given:
            given[name] = torch.randn(H, dtype=wide)
    if "seq_idx" in given:
        given["seq_idx"] = (torch.arange(L) // 7).repeat(B, 1)
    x = torch.randn(B, L, H, P, dtype=wide).to(dtype)
    return given, x


def definition(
    dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, dt_limit=(0, float("inf")),
    seq_idx=None, reverse=False,
):  # fmt: skip
    """alpha (B, H, L, L), an element at a time."""
    dt, A, B, C = (t.double() for t in (dt, A, B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    heads = dt.shape[2]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    rows = []
    for t in range(L):
        row = []
        for s in range(L):
            between = slice(t, s) if reverse else slice(s + 1, t + 1)
            seen = s >= t if reverse else s <= t
            alpha = (C[:, t] * B[:, s]).sum(-1) * dt[:, s] * torch.exp(A * dt[:, between].sum(1))
            if seq_idx is not None:
                alpha = alpha * (seq_idx[:, t] == seq_idx[:, s])[:, None]
            if D is not None and t == s:
                alpha = alpha + D
            row.append(alpha * seen)
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def reduced(contributions, reduce):
    """Over the dimensions 1 and 2 of (B, H, P, L, L)."""
    if reduce == "abs":
        return contributions.abs().mean((1, 2))
    if reduce == "norm":
        return torch.linalg.vector_norm(contributions, dim=(1, 2))
    return getattr(contributions, reduce)((1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_option
def test_each_head_is_the_definition(narrow, option, dtype):
    given, _ = problem(option, dtype)
    alpha = ssd_attention_matrix(**given, reduce=None)
    assert (alpha.dtype, alpha.shape) == (dtype, (B, H, L, L))
    close = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    if dtype == torch.bfloat16:  # but for the last rounding
        close["rtol"] += 2**-8
    torch.testing.assert_close(alpha.double(), definition(**given), **close)


@each_option
def test_it_gives_the_scan(option):
    given, x = problem(option)
    alpha = ssd_attention_matrix(**given, reduce=None)
    torch.testing.assert_close(torch.einsum("bhts,bshp->bthp", alpha, x), ssd(x, **given))


@pytest.mark.parametrize("with_x", [False, True])
@pytest.mark.parametrize("reduce", ["mean", "sum", "abs", "norm"])
@pytest.mark.parametrize("option", ["all", "reverse"])
def test_reductions(narrow, option, reduce, with_x):
    given, x = problem(option)
    alpha = definition(**given).unsqueeze(2)
    if with_x:
        alpha = alpha * x.permute(0, 2, 3, 1).unsqueeze(3)
    got = ssd_attention_matrix(**given, x=x if with_x else None, reduce=reduce)
    torch.testing.assert_close(got, reduced(alpha, reduce))


def test_gradients(narrow):
    given, x = problem("all")
    leaves = {k: t.requires_grad_() for k, t in (*given.items(), ("x", x)) if torch.is_tensor(t)}
    results = []
    for function in (
        lambda: ssd_attention_matrix(**given, x=x, reduce="norm"),
        lambda: reduced(
            definition(**given).unsqueeze(2) * x.permute(0, 2, 3, 1).unsqueeze(3), "norm"
        ),
    ):
        results.append(torch.autograd.grad(function().sin().sum(), list(leaves.values())))
    torch.testing.assert_close(*results)
    out = ssd_attention_matrix(**given).square().sum()
    (grad,) = torch.autograd.grad(out, given["dt"], create_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(grad.sum(), given["dt"])


def test_it_compiles():
    torch._dynamo.reset()
    given, x = problem("all", torch.float32)
    compiled = torch.compile(ssd_attention_matrix, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given, x=x), ssd_attention_matrix(**given, x=x))


def test_nothing_to_attend_to():
    given, _ = problem("plain")
    empty = {**given, **{name: given[name][:, :0] for name in ("dt", "B", "C")}}
    assert ssd_attention_matrix(**empty).shape == (B, 0, 0)
    assert ssd_attention_matrix(**empty, reduce=None).shape == (B, H, 0, 0)
    headless = {**given, "dt": given["dt"][..., :0], "A": given["A"][:0]}
    assert torch.equal(
        ssd_attention_matrix(**headless), torch.zeros(B, L, L, dtype=given["B"].dtype)
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reduce": "max"}, ValueError, "reduce is 'max'"),
        ({"reduce": ["sum"]}, ValueError, "reduce is ['sum']"),
        (
            {n: torch.zeros(B, L, G, 1025) for n in "BC"},
            ValueError,
            "B has 1025 keys, expected 1 to 1024",
        ),
        ({"reduce": None, "x": torch.zeros(B, L, H, P)}, ValueError, "x cannot be used"),
        ({"A": torch.zeros(3)}, ValueError, "B has 2 groups but A has 3 heads"),
        ({"dt": torch.zeros(B, L, 3)}, ValueError, "dt has shape (2, 19, 3)"),
        ({"C": torch.zeros(B, L, 1, N)}, ValueError, "C has shape (2, 19, 1, 3)"),
        ({"C": torch.zeros(B, L, G, N).double()}, TypeError, "C has dtype float64 but B has"),
        ({"x": torch.zeros(B, L, 3, P)}, ValueError, "x has shape (2, 19, 3, 5)"),
        ({"D": torch.zeros(H, P)}, ValueError, "D has shape (4, 5)"),
        ({"dt_limit": (1, 0)}, ValueError, "dt_limit is (1, 0)"),
        ({"seq_idx": torch.zeros(B, L)}, TypeError, "seq_idx has dtype float32"),
        ({"A": torch.zeros(H, device="meta")}, pentad.DeviceError, "A is on meta"),
    ],
)
def test_what_is_refused(changes, error, message):
    given, _ = problem("plain", torch.float32)
    with pytest.raises(error) as caught:
        ssd_attention_matrix(**{**given, **changes})
    assert str(caught.value).startswith(f"[ssd_attention_matrix] {message}")
