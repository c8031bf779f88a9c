# SPDX-License-Identifier: Apache-2.0
"""The sparse benchmark's cases with gradients: the SPLADE head, and scores of a batch.

The plain forms are those of sentence-transformers: its SpladePooling after a language model's head,
and torch.sparse.mm for scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from . import sparse_data
from .harness import Call, Case, Contender, Target
from .memory import Memory

HEAD = 2.0
SCORES = 5.0
BATCH, LENGTH, WIDTHS = 16, 128, (128, 768)
QUERIES, DOCUMENTS = 256, 4096

# The head ----------------------------------------------------------------------------------------


def head_inputs(batch: int, length: int, terms: int, width: int) -> SimpleNamespace:
    """Leaves, a mask, and the gradient of the result.

    One of some fifty results is above zero, as of a trained model.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias, d_out = (
        torch.randn(*shape, generator=generator)
        for shape in ((batch, length, width), (terms, width), (terms,), (batch, terms))
    )
    weight *= width**-0.5
    lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    return SimpleNamespace(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        bias=(0.1 * bias - 3.5).requires_grad_(),
        mask=(torch.arange(length) < lengths).long(),
        d_out=d_out,
    )


def head_setup(width: int, quick: bool, threads: int) -> SimpleNamespace:
    sizes = (2, 16, 3_000) if quick else (BATCH, LENGTH, sparse_data.VOCABULARY)
    return head_inputs(*sizes, width)


def pentad_head(hidden, weight, bias, mask):
    from pentad.sparse import splade_head

    return splade_head(hidden, weight, bias, mask)


def plain_head(hidden, weight, bias, mask):
    import torch

    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.log1p(torch.relu(logits * mask[..., None])).max(1).values


def training(head: Callable, inputs: SimpleNamespace) -> Call:
    """(result, gradients of the hidden states, the weights and the bias)"""
    import torch

    leaves = inputs.hidden, inputs.weight, inputs.bias

    def call():
        out = head(*leaves, inputs.mask)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs.d_out)

    return call


def check_head(inputs: SimpleNamespace, found: Any) -> None:
    """Against sums in float64, a passage at a time.

    Two word pieces whose logits differ by rounding have the gradient of either, so the gradients
    are compared where the largest logit is the largest by far; that is nearly everywhere.
    """
    import torch

    out, *gradients = found
    hidden, weight, bias = (
        x.detach().double() for x in (inputs.hidden, inputs.weight, inputs.bias)
    )
    expected = [torch.zeros_like(x) for x in (hidden, weight, bias)]
    unclear = torch.zeros(len(bias), dtype=torch.bool)
    for b, (states, kept) in enumerate(zip(hidden, inputs.mask.bool(), strict=True)):
        logits = states[kept] @ weight.T + bias
        two = logits.topk(2, dim=0)
        best, at = two.values[0], two.indices[0]
        torch.testing.assert_close(
            out[b].double(), best.clamp(min=0).log1p(), rtol=1e-4, atol=1e-5, msg="values"
        )
        unclear |= ((best - two.values[1] < 1e-5) & (best > -1e-5)) | (best.abs() < 1e-5)
        share = torch.where(best > 0, inputs.d_out[b] / (1 + best.clamp(min=0)), 0)
        at = kept.nonzero()[:, 0][at]
        expected[0][b].index_add_(0, at, share[:, None] * weight)
        expected[1] += share[:, None] * states[at]
        expected[2] += share
    assert unclear.float().mean() < 0.1, "too many logits are nearly equal to tell"
    for name, actual, wanted in zip(("weight", "bias"), gradients[1:], expected[1:], strict=True):
        difference = (actual.double() - wanted)[~unclear].abs().max()
        assert difference < 1e-3, f"the gradient of the {name} is off by {difference:.2g}"
    # One term of unclear choice moves that of the hidden states by its weights.
    moved = 4 * unclear.sum() * weight.abs().max() + 1e-3
    difference = (gradients[0].double() - expected[0]).abs().max()
    assert difference < moved, f"the gradient of the hidden states is off by {difference:.2g}"
    assert (gradients[0][inputs.mask == 0] == 0).all(), "gradients of padding"


HEADS = {"pentad": pentad_head, "plain torch": plain_head}


def head_case(width: int) -> Case:
    return Case(
        f"splade_head forward and backward, B {BATCH}, L {LENGTH}, V 30,522, H {width}",
        partial(head_setup, width),
        [Contender(name, partial(training, head), check_head) for name, head in HEADS.items()],
        # Of the logits alone, a multiplication and an addition each.
        lambda inputs: {"flop": 2 * inputs.hidden[..., 0].numel() * inputs.weight.numel()},
        Target("plain torch", HEAD),
        "float32",
    )


# Scores ------------------------------------------------------------------------------------------


def scores_setup(quick: bool, threads: int) -> SimpleNamespace:
    queries, documents = (16, 200) if quick else (QUERIES, DOCUMENTS)
    data = sparse_data.zipf(documents).first(queries)
    d_out = np.random.default_rng(7).standard_normal((queries, documents), dtype=np.float32)
    return SimpleNamespace(queries=data.queries, docs=data.docs, d_out=d_out)


def tensor_of(rows: csr_array, layout: str) -> tuple[Callable, Any]:
    """(values -> sparse tensor, or what ours reads in its place; values)"""
    import torch

    starts, columns = (torch.from_numpy(x.astype(np.int64)) for x in (rows.indptr, rows.indices))
    options = {"size": rows.shape, "check_invariants": False}
    if layout == "parts":

        def make(values):
            return starts, columns, values, rows.shape[1]
    else:
        at = torch.stack([torch.arange(rows.shape[0]).repeat_interleave(starts.diff()), columns])
        make = partial(torch.sparse_coo_tensor, at, is_coalesced=True, **options)
    return make, torch.from_numpy(rows.data)


def score_gradients(scores: Callable, layout: str, inputs: SimpleNamespace) -> Call:
    """(scores, gradients of the queries' and of the documents' values)"""
    import torch

    d_out = torch.from_numpy(inputs.d_out)
    sides = [tensor_of(rows, layout) for rows in (inputs.queries, inputs.docs)]

    def call():
        leaves = [values.detach().requires_grad_() for _, values in sides]
        out = scores(*(make(leaf) for (make, _), leaf in zip(sides, leaves, strict=True)))
        return out.detach(), *torch.autograd.grad(out, leaves, d_out)

    return call


def pentad_scores(queries, docs):
    from pentad.sparse import score

    return score(queries, docs)


def sparse_product(queries, docs):
    import torch

    return torch.sparse.mm(queries, docs.t()).to_dense()


def dense_product(queries, docs):
    """Of a sparse and a dense matrix, which torch has a gradient for that is sparse."""
    import torch

    return torch.sparse.mm(queries, docs.to_dense().t())


def check_scores(inputs: SimpleNamespace, found: Any) -> None:
    out, d_queries, d_docs = (part.double().numpy() for part in found)
    queries, docs = (rows.astype(np.float64) for rows in (inputs.queries, inputs.docs))
    np.testing.assert_allclose(out, (queries @ docs.T).toarray(), rtol=1e-4, atol=1e-4)
    d_out = inputs.d_out.astype(np.float64)
    for name, actual, rows, wanted in (
        ("queries", d_queries, queries, d_out @ docs),
        ("documents", d_docs, docs, d_out.T @ queries),
    ):
        lengths = np.diff(rows.indptr)
        kept = wanted[np.repeat(np.arange(len(lengths)), lengths), rows.indices]
        np.testing.assert_allclose(actual, kept, rtol=1e-3, atol=2e-3, err_msg=name)


SCORES_CASE = Case(
    f"scores and their gradient, {QUERIES} x {DOCUMENTS} documents",
    scores_setup,
    [
        Contender("pentad score", partial(score_gradients, pentad_scores, "parts"), check_scores),
        Contender(
            "pentad score of COO tensors",
            partial(score_gradients, pentad_scores, "coo"),
            check_scores,
        ),
        Contender(
            "torch.sparse.mm of two sparse",
            partial(score_gradients, sparse_product, "coo"),
            check_scores,
            once=True,
        ),
        Contender(
            "torch.sparse.mm of sparse and dense",
            partial(score_gradients, dense_product, "coo"),
            check_scores,
        ),
    ],
    lambda inputs: {
        "postings": float(
            np.bincount(inputs.docs.indices, minlength=inputs.docs.shape[1])[
                inputs.queries.indices
            ].sum()
        )
    },
    Target(("torch.sparse.mm of two sparse", "torch.sparse.mm of sparse and dense"), SCORES),
)

CASES = [*(head_case(width) for width in WIDTHS), SCORES_CASE]

# Memory ------------------------------------------------------------------------------------------

SAVING = 10.0


def memory_call(head, width: int, batch: int, length: int, terms: int) -> Call:
    return training(head, head_inputs(batch, length, terms, width))


MEMORY = [
    Memory(
        f"extra memory, splade_head, B {BATCH}, L {LENGTH}, V 30,522, H {width}",
        __name__,
        {name: partial(memory_call, head, width) for name, head in HEADS.items()},
        size=(BATCH, LENGTH, sparse_data.VOCABULARY),
        small=(1, LENGTH, sparse_data.VOCABULARY),
        warm=(1, 8, 100),
        target=Target("plain torch", SAVING),
    )
    for width in WIDTHS
]
