# SPDX-License-Identifier: Apache-2.0
"""Measure the errors of operations beside those of plain PyTorch; write docs/numerics.md's table.

Each operation gets random inputs, rounded to a dtype. The truth is the definition in float64 on the
same rounded inputs. An error is the largest deviation from it, divided by the truth's largest
magnitude; of gradients, the largest over all inputs. Plain PyTorch computes the same formula in the
dtype (its scans are loops in float32, rounded at the end, as those of the peers' references are).

Exits with 1 where an error is beyond its budget: twice plain PyTorch's, gradients three times; or,
where plain PyTorch is nearly exact, 8 units in the last place of the dtype.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import log_softmax, normalize

import pentad
from pentad import attention, hamming, pq, scan, sparse
from pentad.attention import reference as attention_reference
from pentad.scan import reference as scan_reference
from pentad.scan import scan2d_reference

PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"
BEGIN, END = "<!-- numerics:begin -->", "<!-- numerics:end -->"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUDGETS = (2.0, 3.0)  # times plain PyTorch's error: of results, of gradients


class Case(NamedTuple):
    family: str
    name: str
    ours: Callable  # of the inputs
    plain: Callable  # the same formula in PyTorch, in the inputs' dtype
    inputs: Callable  # of nothing: float64 tensors
    gradients: bool = True
    parameters: tuple[int, ...] = ()  # inputs that stay float32 beside half dtypes


def cases() -> list[Case]:
    return [*_attention(), *_scan(), *_pq(), *_hamming(), *_sparse()]


def _normal(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


def _uniform(*shape, low=0.0, high=1.0):
    return torch.rand(*shape, dtype=torch.float64) * (high - low) + low


# --- Attention ------------------------------------------------------------------------------------


def _attention():
    def qkv():
        return _normal(1, 4, 300, 64), _normal(1, 2, 300, 64), _normal(1, 2, 300, 64)

    options = {
        "full": {},
        "causal": {"causal": True},
        "window 64, softcap 20": {"causal": True, "window": (64, 0), "softcap": 20.0},
    }
    for name, option in options.items():
        yield Case(
            "Attention",
            f"`attention`, {name}",
            lambda q, k, v, option=option: attention.attention(q, k, v, **option),
            lambda q, k, v, option=option: attention_reference.attention(q, k, v, **option),
            qkv,
        )
    bias = {"causal": True}
    yield Case(
        "Attention",
        "`attention`, causal, learned bias",
        lambda q, k, v, b: attention.attention(q, k, v, bias=b, **bias),
        lambda q, k, v, b: attention_reference.attention(q, k, v, bias=b, **bias),
        lambda: (*qkv(), _normal(4, 300, 300)),
    )
    yield Case(
        "Attention",
        "`decode`, 1 token of 2,000",
        lambda q, k, v: attention.decode(q, k, v, 2000),
        lambda q, k, v: attention_reference.attention(q, k, v),
        lambda: (_normal(2, 8, 1, 64), _normal(2, 2, 2000, 64), _normal(2, 2, 2000, 64)),
        gradients=False,
    )


# --- Scan -----------------------------------------------------------------------------------------


def _scan():
    L = 256

    def selective():
        u, delta = _normal(2, 32, L), _normal(2, 32, L)
        return u, delta, -_uniform(32, 16, low=0.5, high=8), _normal(2, 16, L), _normal(2, 16, L)

    def ours_and_reference(name, family="Scan", label=None, module=scan_reference, **options):
        op, definition = getattr(scan, name), getattr(module, name)
        return (
            family,
            label or f"`{name}`",
            lambda *inputs: op(*inputs, **options),
            lambda *inputs: definition(*inputs, **options),
        )

    yield Case(
        *ours_and_reference("selective_scan", delta_softplus=True), selective, parameters=(2,)
    )
    yield Case(
        *ours_and_reference("linear_recurrence"),
        lambda: (_uniform(2, 32, L, low=0.5), _normal(2, 32, L)),
    )
    yield Case(
        *ours_and_reference("causal_conv1d", activation="silu"),
        lambda: (_normal(2, 64, L), _normal(64, 4), _normal(64)),
    )

    def heads(keys=64):
        return _normal(1, L, 4, keys), _normal(1, L, 4, keys)

    yield Case(
        *ours_and_reference("ssd"),
        lambda: (
            _normal(1, L, 4, 32),
            _uniform(1, L, 4),
            -_uniform(4),
            _normal(1, L, 1, 64),
            _normal(1, L, 1, 64),
        ),
        parameters=(2,),
    )
    yield Case(
        "Scan",
        "`linear_attention`, decay per key",
        lambda q, k, v, g: scan.linear_attention(q, k, v, decay=g, log_space=True),
        lambda q, k, v, g: scan_reference.linear_attention(q, k, v, decay=g, log_space=True),
        lambda: (*heads(), _normal(1, L, 4, 32), -_uniform(1, L, 4, 64)),
    )
    yield Case(
        *ours_and_reference("delta_rule"),
        lambda: (
            *(normalize(t, dim=-1) for t in heads()),
            _normal(1, L, 4, 32),
            _uniform(1, L, 4),
        ),
    )
    yield Case(
        *ours_and_reference("scan2d", module=scan2d_reference, delta_softplus=True),
        lambda: (
            _normal(1, 16, 12, 12),
            _normal(1, 4, 16, 12, 12),
            -_uniform(4, 16, 8, low=0.5, high=4),
            _normal(1, 4, 8, 12, 12),
            _normal(1, 4, 8, 12, 12),
        ),
        parameters=(2,),
    )


# --- PQ -------------------------------------------------------------------------------------------


def _pq():
    codes = torch.randint(256, (500, 8), dtype=torch.uint8)
    books = codes.long(), torch.arange(8)

    def decode(codebooks):
        return codebooks[books[1], books[0]]  # (500, 8, width)

    yield Case(
        "PQ",
        "`adc`, inner product",
        lambda x, c: pq.adc(x, codes, c, metric="ip"),
        lambda x, c: x @ decode(c).flatten(1).T,
        lambda: (_normal(20, 64), _normal(8, 256, 8)),
    )
    yield Case(
        "PQ",
        "`lookup`, weighted sum",
        lambda c, w: pq.lookup(codes, c, combine="sum", weights=w),
        lambda c, w: (decode(c) * w[..., None]).sum(1),
        lambda: (_normal(8, 256, 16), _normal(500, 8)),
    )
    yield Case(
        "PQ",
        "`soft_assign`",
        pq.soft_assign,
        lambda x, c: log_softmax(-(x.unflatten(-1, (8, 1, 8)) - c).square().sum(-1), -1).exp(),
        lambda: (_normal(50, 64), _normal(8, 64, 8)),
    )

    def product_keys(q, subkeys, values):
        halves = q.unflatten(-1, (2, -1)).transpose(0, 2).transpose(0, 1)  # (heads, 2, rows, half)
        first, second = (halves @ subkeys.transpose(-1, -2)).unbind(1)
        scores = (first[..., :, None] + second[..., None, :]).flatten(-2)
        best, at = scores.topk(16)
        return (best.softmax(-1)[..., None] * values[at]).sum(2).sum(0)

    yield Case(
        "PQ",
        "`product_key_lookup`",
        lambda q, s, v: pq.product_key_lookup(q, s, v, 16),
        product_keys,
        lambda: (_normal(40, 2, 32, scale=0.3), _normal(2, 2, 32, 16), _normal(1024, 32)),
    )


# --- Hamming --------------------------------------------------------------------------------------


def _hamming():
    codes = hamming.pack(torch.randn(1000, 256))
    signs = hamming.unpack(codes, 256)
    yield Case(
        "Hamming",
        "`score`",
        lambda x: hamming.score(x, codes),
        lambda x: x @ signs.to(x.dtype).T,
        lambda: (_normal(20, 256),),
    )
    yield Case(
        "Hamming",
        "`weighted_sum`",
        lambda w: hamming.weighted_sum(w, codes, dim=256),
        lambda w: w @ signs.to(w.dtype),
        lambda: (_normal(20, 1000).softmax(-1),),
    )


# --- Sparse ---------------------------------------------------------------------------------------


def _sparse():
    def rows(count, seed):
        dense = torch.rand(count, 2000, generator=torch.Generator().manual_seed(seed))
        row, column = (dense < 0.03).nonzero().unbind(1)
        return torch.searchsorted(row, torch.arange(count + 1)), column

    (qp, qi), (dp, di) = rows(20, 0), rows(100, 1)

    def dense(indptr, indices, values):
        row = torch.repeat_interleave(torch.arange(len(indptr) - 1), indptr.diff())
        return values.new_zeros(len(indptr) - 1, 2000).index_put((row, indices), values)

    yield Case(
        "Sparse",
        "`score`",
        lambda q, d: sparse.score((qp, qi, q, 2000), (dp, di, d, 2000)),
        lambda q, d: dense(qp, qi, q) @ dense(dp, di, d).T,
        lambda: (_uniform(len(qi)), _uniform(len(di))),
    )
    yield Case(
        "Sparse",
        "`splade_head`",
        sparse.splade_head,
        lambda h, w, b: (h @ w.T + b).relu().log1p().amax(1),
        lambda: (_normal(4, 32, 128), _normal(1000, 128, scale=0.1), _normal(1000)),
    )


# --- Measuring ------------------------------------------------------------------------------------


def measure(case: Case, dtype: torch.dtype) -> tuple:
    """((ours, plain) error of the result, the same of the gradients or None)."""
    torch.manual_seed(0)
    inputs = [
        t.to(torch.float32 if i in case.parameters else dtype) for i, t in enumerate(case.inputs())
    ]
    ours = _values(case.ours, inputs, case.gradients)
    plain = _values(case.plain, inputs, case.gradients)
    truth = _values(case.plain, [t.double() for t in inputs], case.gradients)
    result = tuple(_error(found[:1], truth[:1]) for found in (ours, plain))
    if not case.gradients:
        return result, None
    return result, tuple(_error(found[1:], truth[1:]) for found in (ours, plain))


def _values(function, inputs, gradients) -> list[torch.Tensor]:
    """The result, then the gradients of all inputs from one random gradient of the result."""
    inputs = [t.detach().requires_grad_(gradients) for t in inputs]
    out = function(*inputs)
    if not gradients:
        return [out.detach()]
    d_out = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d_out = d_out.bfloat16().half().to(out.dtype)  # numbers that every dtype has
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def _error(found, truth) -> float:
    return max(
        ((f.double() - t).abs().max() / t.abs().max()).item()
        for f, t in zip(found, truth, strict=True)
    )


def within(dtype, pair, budget) -> bool:
    ours, plain = pair
    return ours <= max(budget * plain, 8 * torch.finfo(dtype).eps)


def table(measured) -> list[str]:
    """Markdown, a table for each family."""
    lines, family = [], None
    for case, dtype, result, gradients in measured:
        if case.family != family:
            family = case.family
            lines += [
                f"\n### {family}\n",
                "| operation | dtype | result | plain | ratio | gradients | plain | ratio |",
                "|---|---|--:|--:|--:|--:|--:|--:|",
            ]
        cells = [case.name, str(dtype).removeprefix("torch.")]
        for pair in (result, gradients):
            cells += ["-"] * 3 if pair is None else [*map(_short, pair), _ratio(*pair)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _short(error):
    return "0" if error == 0 else f"{error:.1e}"


def _ratio(ours, plain):
    return "-" if plain == 0 else f"{ours / plain:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="measure only, write nothing")
    options = parser.parse_args()
    measured, beyond = [], 0
    torch.manual_seed(0)
    for case in cases():
        for dtype in DTYPES:
            result, gradients = measure(case, dtype)
            measured.append((case, dtype, result, gradients))
            for what, pair, budget in zip(
                ("result", "gradients"), (result, gradients), BUDGETS, strict=True
            ):
                if pair is not None and not within(dtype, pair, budget):
                    beyond += 1
                    print(f"{case.name} {dtype}: {what} off by {pair[0]:.1e}, plain {pair[1]:.1e}")
    note = (
        f"\nMeasured {time.strftime('%Y-%m-%d')} at level {pentad.isa()}, torch "
        f"{torch.__version__}, by `make numerics`."
    )
    if not options.check:
        text = PAGE.read_text()
        head, rest = text.split(BEGIN)
        tail = rest.split(END)[1]
        PAGE.write_text("\n".join([head + BEGIN, *table(measured), note, END]) + tail)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
