# SPDX-License-Identifier: Apache-2.0
"""The pq benchmark's cases of product-key memory, beside the form in plain PyTorch.

That form is the one of the paper's implementation: two products, two searches for the best of a
half, the sums of all pairs of these, a search among them, and an embedding bag. Its gradient of the
values may be dense or sparse, and so may ours; each stands beside its like. Expected answers are
computed in float64 at the selection in float64; queries whose k-th score is no clear winner over
the next are not asked, so that every contender selects the same.

The bound is what this machine reads from memory: forward a row of values for each selected entry;
backward the selected rows once more, and the gradient of the values, which is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import embedding_bag

from .harness import Call, Case, Contender, Target
from .passes import PASSES, Op

TRAINING = 3.0
FORWARD = 3.0
CLEAR = 1e-4  # between the k-th score and the next, of scores of some units
TOLERANCE = 1e-4  # of the largest value of an answer


@dataclass
class Problem:
    """q (rows, heads, 2 half), subkeys (heads, 2, n, half), values (n n, width); the answers."""

    leaves: list[torch.Tensor]
    k: int
    d_out: torch.Tensor
    expected: dict[str, torch.Tensor]
    distinct: int

    def bytes(self, what: str, sparse: bool) -> float:
        q, _, values = self.leaves
        row = values.shape[1] * values.element_size()
        forward = q.shape[0] * q.shape[1] * self.k * row
        if what == "forward":
            return forward
        return forward + row * (self.distinct + (self.distinct if sparse else len(values)))


def scores(q: torch.Tensor, subkeys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = subkeys.shape[3]
    return (
        torch.einsum("bhd,hnd->bhn", q[..., :half], subkeys[:, 0]),
        torch.einsum("bhd,hnd->bhn", q[..., half:], subkeys[:, 1]),
    )


def best_pairs(first, second, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, indices) of the k best sums, (rows, heads, k)."""
    n, most = first.shape[-1], min(k, first.shape[-1])
    (first, i), (second, j) = first.topk(most, -1), second.topk(most, -1)
    sums = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)
    pairs = (i.unsqueeze(-1) * n + j.unsqueeze(-2)).flatten(-2)
    best, places = sums.topk(k, -1)
    return best, pairs.gather(-1, places)


def plain_lookup(q, subkeys, values, k: int, sparse: bool) -> torch.Tensor:
    best, indices = best_pairs(*scores(q, subkeys), k)
    return embedding_bag(
        indices.flatten(1),
        values,
        per_sample_weights=best.softmax(-1).flatten(1),
        mode="sum",
        sparse=sparse,
    )


def torch_op(k: int, sparse: bool) -> Op:
    return lambda *leaves: plain_lookup(*leaves, k, sparse)


def pentad_op(k: int, sparse: bool) -> Op:
    from pentad.pq import product_key_lookup

    return lambda *leaves: product_key_lookup(*leaves, k, sparse_grad=sparse)


def random_problem(rows: int, heads: int, n: int, k: int, half: int, width: int) -> Problem:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    subkeys, values = normal(heads, 2, n, half) * half**-0.5, normal(n * n, width)
    candidates = normal(rows + rows // 8 + 16, heads, 2 * half)
    kept = []
    for part in candidates.split(256):
        best, _ = best_pairs(*scores(part.double(), subkeys.double()), k + 1)
        kept.append(part[((best[..., k - 1] - best[..., k]) > CLEAR).all(-1)])
    q = torch.cat(kept)[:rows]
    assert len(q) == rows, "too few queries have a clear selection"
    leaves, d_out = [q, subkeys, values], normal(rows, width)
    doubles = [x.double().requires_grad_() for x in leaves]
    out = plain_lookup(*doubles, k, False)
    answers = torch.autograd.grad(out, doubles, d_out.double())
    names = ("d_q", "d_subkeys", "d_values")
    expected = {"out": out.detach(), **dict(zip(names, answers, strict=True))}
    distinct = int(answers[2].any(1).sum())
    return Problem(leaves, k, d_out, expected, distinct)


def check_problem(problem: Problem, results) -> None:
    for (name, answer), actual in zip(problem.expected.items(), results, strict=False):
        actual = actual.detach().to_dense() if actual.is_sparse else actual.detach()
        assert actual.shape == answer.shape, f"{name} is {actual.shape}, not {answer.shape}"
        error = max((a - b).abs().max() for a, b in zip(
            actual.split(1 << 14), answer.split(1 << 14), strict=True
        )) / answer.abs().max()  # fmt: skip
        assert error <= TOLERANCE, f"{name} is off by {error:.2g} of its largest value"


def setup(quick: bool, threads: int) -> Problem:
    return random_problem(64, 2, 32, 8, 16, 24) if quick else random_problem(
        4096, 4, 512, 32, 128, 256
    )  # fmt: skip


def prepared(what: str, make, sparse: bool, problem: Problem) -> Call:
    return PASSES[what](make(problem.k, sparse), problem.leaves, problem.d_out)


def lookup_case(what: str, sparse: bool, ratio: float) -> Case:
    gradient = "" if what == "forward" else f", {'sparse' if sparse else 'dense'} value gradient"
    return Case(
        f"product_key_lookup {what} float32 512^2 keys, k 32, 4 heads, 4096 rows{gradient}",
        setup,
        [
            Contender("pentad", partial(prepared, what, pentad_op, sparse), check_problem),
            Contender("torch", partial(prepared, what, torch_op, sparse), check_problem),
        ],
        lambda problem: {"bytes": problem.bytes(what, sparse)},
        Target("torch", ratio),
        "read",
    )


CASES = [
    lookup_case("training", False, TRAINING),
    lookup_case("training", True, TRAINING),
    lookup_case("forward", False, FORWARD),
]
