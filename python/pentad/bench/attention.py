# SPDX-License-Identifier: Apache-2.0
"""pentad.attention against torch's scaled_dot_product_attention (SDPA).

    pentad bench attention [--quick] [--only TEXT] [--json FILE]

Inputs are normal random numbers. Expected answers come from the plain definition in float64: all of
one head, gradients included, and some rows of every head. Shapes are B,H,S,D.

A multiply-add counts two, a causal problem half of the full one whatever a contender computes, the
backward pass five products to the forward's two. The bound of a case is what this machine
multiplies in registers in the dtype (bfloat16 pairs where the CPU has them, float32 for float16),
measured in the same run.

How torch is used, where it is not obvious:

- Where it has no argument for a feature, it is used in every way that a user has, and the fastest
  counts: for a window, a bool mask or all causal keys (which computes something else); for packed
  documents, padding with a mask or a call per document. Padding itself is not timed.
- With a bias that needs a gradient, SDPA takes the path that keeps the matrix.
- In decoding, SDPA gets the grouped heads by enable_gqa, or as queries of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from . import passes
from .attention_data import (
    Documents,
    Problem,
    assert_close,
    plain,
    random_documents,
    random_problem,
    visible,
)
from .harness import Call, Case, Contender, Family, Limit, Target
from .memory import Memory
from .passes import Op

PACKAGES = ("torch",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FORWARD = {"float32": 2.0, "bfloat16": 3.5}
SHORT_FORWARD = {"float32": 3.5, "bfloat16": 5.0}
TRAINING = {"float32": 1.8, "bfloat16": 2.5}
HALF_BACKWARD = 8.0
WINDOW = 10.0
DECODE_OF_READING = 0.70
MANY_SHORT = 3.0
TINY_SECONDS = 10e-6

LONG = [(1, 8, length, dim) for length in (1024, 2048, 4096) for dim in (64, 128)]
SHORT = [(8, 8, 256, 64), (4, 8, 512, 64)]

# What is timed: forward, both passes, the backward alone -----------------------------------------


def backward(op: Op, leaves, d_out) -> Call:
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = op(*leaves)
    return lambda: (out, *torch.autograd.grad(out, leaves, d_out, retain_graph=True))


PASSES = passes.PASSES | {"backward": backward}


# Dense problems ----------------------------------------------------------------------------------


def pentad_op(problem: Problem) -> Op:
    from pentad.attention import attention

    options: dict[str, Any] = {"causal": problem.causal}
    if problem.window is not None:
        options["window"] = (problem.window - 1, 0)

    def op(q, k, v, bias=None):
        return attention(q, k, v, bias=bias, **options)

    return op


def torch_op(problem: Problem) -> Op:
    """All keys, or all up to the query's own."""

    def op(q, k, v, bias=None):
        return sdpa(q, k, v, attn_mask=bias, is_causal=problem.causal)

    return op


def torch_masked_op(problem: Problem) -> Op:
    length = problem.q.shape[2]
    mask = visible(torch.arange(length), length, problem.causal, problem.window)
    return lambda q, k, v: sdpa(q, k, v, attn_mask=mask)


def dense_contender(name: str, what: str, make: Callable[[Problem], Op]) -> Contender:
    def prepare(problem: Problem) -> Call:
        return PASSES[what](make(problem), problem.leaves, problem.d_out)

    return Contender(name, prepare, lambda problem, result: problem.check(result))


def dense_setup(shape, dtype: str, solve: bool, bias: bool = False, **options):
    def setup(quick: bool, threads: int) -> Problem:
        batch, heads, length, dim = shape
        small = (min(batch, 2), heads, min(length, 256), dim) if quick else shape
        problem = random_problem(small, DTYPES[dtype], **options)
        if bias:
            square = (1, heads, small[2], small[2])
            generator = torch.Generator().manual_seed(2)
            problem.bias = torch.randn(square, generator=generator).to(DTYPES[dtype])
        problem.solve(solve)
        return problem

    return setup


def dense_case(
    what: str, shape, dtype: str, causal: bool, ratio: float | None, bias: bool = False
) -> Case:
    gradients = what != "forward"
    name = f"{what} {dtype} {','.join(map(str, shape))} {'causal' if causal else 'full'}"
    share = 5 / 7 if what == "backward" else 1
    return Case(
        name + (" with a learned bias" if bias else ""),
        dense_setup(shape, dtype, gradients, bias, causal=causal),
        [
            dense_contender("pentad", what, pentad_op),
            dense_contender("torch", what, torch_op),
        ],
        lambda problem: {"flop": problem.flop(gradients) * share},
        ratio and Target("torch", ratio),
        "bfloat16" if dtype == "bfloat16" else "float32",
    )


def check_all_causal_keys(problem: Problem, result: Any) -> None:
    """What torch computes without the window."""
    unlimited = Problem(problem.q, problem.k, problem.v, problem.d_out, causal=True)
    unlimited.solve(len(result) > 1)
    unlimited.check(result)


def window_case(what: str, dtype: str) -> Case:
    causal = dense_contender("torch, all causal keys", what, torch_op)
    return Case(
        f"{what} {dtype} 1,8,4096,64 window of 128",
        dense_setup((1, 8, 4096, 64), dtype, what != "forward", causal=True, window=128),
        [
            dense_contender("pentad", what, pentad_op),
            Contender(causal.name, causal.prepare, check_all_causal_keys),
            dense_contender("torch, bool mask", what, torch_masked_op),
        ],
        lambda problem: {"flop": problem.flop(what != "forward")},
        Target(("torch, all causal keys", "torch, bool mask"), WINDOW),
        dtype,
    )


# Decoding ----------------------------------------------------------------------------------------


def decode_setup(dtype: str, quick: bool, threads: int) -> SimpleNamespace:
    """One query of 32 heads, 8 heads of cached keys and values side by side in memory."""
    length = 1024 if quick else 16384
    generator = torch.Generator().manual_seed(1)
    q = torch.randn((1, 32, 1, 128), generator=generator).to(DTYPES[dtype])
    cache = torch.randn((2, 1, 8, length, 128), generator=generator).to(DTYPES[dtype])
    k, v = cache
    grouped = plain(q.view(1, 8, 4, 128).double(), k.double(), v.double())
    return SimpleNamespace(q=q, k=k, v=v, cache=cache, expected=grouped.view(1, 32, 1, 128))


def check_decode(inputs: SimpleNamespace, result: torch.Tensor) -> None:
    assert_close("out", result, inputs.expected)


def pentad_decode(inputs: SimpleNamespace) -> Call:
    from pentad.attention import decode

    return lambda: decode(inputs.q, inputs.k, inputs.v, inputs.k.shape[2])


def torch_decode(inputs: SimpleNamespace) -> Call:
    return torch.no_grad()(lambda: sdpa(inputs.q, inputs.k, inputs.v, enable_gqa=True))


def torch_grouped_decode(inputs: SimpleNamespace) -> Call:
    q = inputs.q.view(1, 8, 4, 128)
    return torch.no_grad()(lambda: sdpa(q, inputs.k, inputs.v).view(1, 32, 1, 128))


def read_cache(inputs: SimpleNamespace) -> Call:
    from pentad import _C

    flat = inputs.cache.view(-1).view(torch.uint8)
    return lambda: _C.stream_read(flat)


def check_read(inputs: SimpleNamespace, result: int) -> None:
    words = inputs.cache.view(-1).view(torch.int64)
    assert result == int(words.sum()) % 2**64, "the sum of the words is another"


def decode_case(dtype: str) -> Case:
    return Case(
        f"decode {dtype}, 1 query, 32/8 heads, 16384 keys, D 128",
        partial(decode_setup, dtype),
        [
            Contender("pentad decode", pentad_decode, check_decode),
            Contender("torch, enable_gqa", torch_decode, check_decode),
            Contender("torch, group as queries", torch_grouped_decode, check_decode),
            Contender("reading keys and values", read_cache, check_read),
        ],
        lambda inputs: {"bytes": inputs.cache.nbytes},
        Target("reading keys and values", DECODE_OF_READING),
        "read",
    )


# Packed documents --------------------------------------------------------------------------------


def documents_setup(quick: bool, threads: int) -> Documents:
    return random_documents(4 if quick else 32, 64 if quick else 512, heads=8, dim=64)


def check_documents(documents: Documents, result: Any) -> None:
    documents.check(result)


def packed_attention(what: str, documents: Documents) -> Call:
    from pentad.attention import attention

    ends = [0, *(end for _, end in documents.bounds)]
    bounds = torch.tensor(ends, dtype=torch.int32)
    *leaves, d_out = documents.packed
    op = partial(attention, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    return PASSES[what](op, leaves, d_out)


def padded_sdpa(what: str, documents: Documents) -> Call:
    *leaves, d_out = documents.padded
    lengths = torch.tensor(documents.lengths)
    mask = (torch.arange(leaves[0].shape[2]) < lengths[:, None])[:, None, None]
    return PASSES[what](lambda q, k, v: sdpa(q, k, v, attn_mask=mask), leaves, d_out)


def sdpa_per_document(what: str, documents: Documents) -> Call:
    *leaves, d_out = documents.packed

    def op(q, k, v):
        parts = []
        for begin, end in documents.bounds:
            one = (x[begin:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            parts.append(sdpa(*one).squeeze(0).transpose(0, 1))
        return torch.cat(parts)

    return PASSES[what](op, leaves, d_out)


def documents_case(what: str) -> Case:
    contenders = {
        "pentad, packed": packed_attention,
        "torch, padded with a mask": padded_sdpa,
        "torch, a call per document": sdpa_per_document,
    }
    return Case(
        f"{what} float32, 32 documents of 1 to 512, H 8, D 64",
        documents_setup,
        [
            Contender(name, partial(prepare, what), check_documents)
            for name, prepare in contenders.items()
        ],
        lambda documents: {"flop": documents.flop(what != "forward")},
        bound="float32",
    )


# Small calls -------------------------------------------------------------------------------------


def tiny_case() -> Case:
    return Case(
        "a call on 1,1,1,8 without gradients",
        dense_setup((1, 1, 1, 8), "float32", False),
        [
            dense_contender("pentad", "forward", pentad_op),
            dense_contender("torch", "forward", torch_op),
        ],
        lambda problem: {"calls": 1},
        Limit(TINY_SECONDS),
    )


# The cases ---------------------------------------------------------------------------------------

BOTH = ("float32", "bfloat16")

CASES = [
    *(
        dense_case("forward", shape, dtype, causal, FORWARD[dtype])
        for dtype in BOTH
        for shape in LONG
        for causal in (False, True)
    ),
    dense_case("forward", (1, 8, 1024, 64), "float16", False, None),
    *(
        dense_case("forward", shape, dtype, True, SHORT_FORWARD[dtype])
        for dtype in BOTH
        for shape in SHORT
    ),
    *(
        dense_case("training", shape, dtype, causal, TRAINING[dtype])
        for dtype in BOTH
        for shape in LONG
        if shape != (1, 8, 4096, 128)
        for causal in (False, True)
    ),
    *(
        dense_case("training", shape, dtype, True, TRAINING[dtype])
        for dtype in BOTH
        for shape in SHORT
    ),
    *(
        dense_case("backward", (1, 8, 1024, 64), "float16", causal, HALF_BACKWARD)
        for causal in (False, True)
    ),
    *(window_case("forward", dtype) for dtype in BOTH),
    *(decode_case(dtype) for dtype in BOTH),
    *(
        dense_case(what, (64, 8, 49, 32), dtype, False, MANY_SHORT)
        for what in ("forward", "training")
        for dtype in BOTH
    ),
    dense_case("training", (4, 8, 512, 64), "float32", False, None, bias=True),
    documents_case("forward"),
    documents_case("training"),
    tiny_case(),
]

# Memory ------------------------------------------------------------------------------------------

MEMORY_LENGTH = 16384
# The savings that Rabe and Staats (arXiv 2112.05682) report at this length, over softmax(q k^T) v
# with the matrix in memory, forward and with gradients.
SAVINGS = {"forward": 59.0, "training": 32.0}
# Matrices of scores that the plain computation holds at once.
PLAIN_MATRICES = {"forward": 2, "training": 3}


def memory_call(what: str, make: Callable[[Problem], Op], length: int) -> Call:
    problem = random_problem((1, 1, length, 64), torch.float32)
    return PASSES[what](make(problem), problem.leaves, problem.d_out)


def memory_case(what: str) -> Memory:
    ways = {"pentad": pentad_op, "plain torch": lambda problem: plain, "torch SDPA": torch_op}
    return Memory(
        f"extra memory, {what} float32 1,1,{MEMORY_LENGTH},64 full",
        __name__,
        {name: partial(memory_call, what, make) for name, make in ways.items()},
        size=(MEMORY_LENGTH,),
        small=(1024,),
        warm=(64,),
        target=Target("plain torch", SAVINGS[what]),
        needs={"plain torch": lambda length: PLAIN_MATRICES[what] * 4 * length**2},
    )


MEMORY = [memory_case(what) for what in SAVINGS]

FAMILY = Family("attention", [*CASES, *MEMORY], PACKAGES, rounds=5, budget=2.5)
