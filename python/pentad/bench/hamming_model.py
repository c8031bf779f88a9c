# SPDX-License-Identifier: Apache-2.0
"""Cases of pentad.hamming inside a model: float queries against bits, gradients, packing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from .hamming_data import random_codes, signs
from .harness import Call, Case, Contender


def close(expected: np.ndarray, actual: Any) -> None:
    """Equal up to the rounding of fp32 sums, relative to the largest value."""
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


# Float queries against bits ----------------------------------------------------------------------


def score_setup(quick: bool, threads: int) -> SimpleNamespace:
    """x (32, 1024) and 100,000 codes; scores and the gradient to x in float64."""
    rows = 2_000 if quick else 100_000
    codes = random_codes(rows, 1024, seed=1)
    generator = np.random.default_rng(2)
    x = generator.standard_normal((32, 1024), dtype=np.float32)
    upstream = generator.standard_normal((32, rows), dtype=np.float32)
    bits = signs(codes).astype(np.float64)
    scores = x @ bits.T
    return SimpleNamespace(
        x=x,
        codes=codes,
        upstream=upstream,
        k=10,
        scores=scores,
        gradient=upstream @ bits,
        best=-np.sort(-scores, axis=1)[:, :10],
    )


def score_work(inputs: SimpleNamespace) -> dict[str, float]:
    return {"pairs": len(inputs.x) * len(inputs.codes), "bytes": inputs.codes.nbytes}


def check_scores(inputs: SimpleNamespace, result: Any) -> None:
    close(inputs.scores, result.detach())


def check_gradient(inputs: SimpleNamespace, result: Any) -> None:
    close(inputs.gradient, result)


def check_best(inputs: SimpleNamespace, result: Any) -> None:
    scores, ids = (np.asarray(part) for part in result)
    close(inputs.best, scores)
    close(np.take_along_axis(inputs.scores, ids, axis=1), scores)


def torch_inputs(inputs: SimpleNamespace):
    import torch

    return tuple(map(torch.from_numpy, (inputs.x, inputs.codes, inputs.upstream)))


def torch_signs(codes):
    """+-1 in float32 from packed codes, as one writes it in torch."""
    import torch

    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    bits = codes.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1)
    return bits.flatten(-2).float().mul_(2).sub_(1)


def pentad_scorer(codes):
    from pentad.hamming import score

    return lambda x: score(x, codes)


def torch_scorer(codes):
    return lambda x: x @ torch_signs(codes).T


def torch_unpacked_scorer(codes):
    unpacked = torch_signs(codes)
    return lambda x: x @ unpacked.T


def forward(scorer) -> Callable[[SimpleNamespace], Call]:
    def prepare(inputs: SimpleNamespace) -> Call:
        x, codes, _ = torch_inputs(inputs)
        scores = scorer(codes)
        return lambda: scores(x)

    return prepare


def backward(scorer) -> Callable[[SimpleNamespace], Call]:
    """Forward and backward; the result is the gradient to x."""

    def prepare(inputs: SimpleNamespace) -> Call:
        x, codes, upstream = torch_inputs(inputs)
        scores = scorer(codes)

        def call():
            leaf = x.detach().requires_grad_()
            scores(leaf).backward(upstream)
            return leaf.grad

        return call

    return prepare


def best_of(scorer) -> Callable[[SimpleNamespace], Call]:
    def prepare(inputs: SimpleNamespace) -> Call:
        x, codes, _ = torch_inputs(inputs)
        scores = scorer(codes)
        return lambda: scores(x).topk(inputs.k)

    return prepare


def pentad_topk_score(inputs: SimpleNamespace) -> Call:
    from pentad.hamming import topk_score

    x, codes, _ = torch_inputs(inputs)
    return lambda: topk_score(x, codes, inputs.k)


def score_case(name: str, subject: Contender, use, check) -> Case:
    """The subject against the same use of scores computed by torch."""
    contenders = [
        subject,
        Contender("torch, unpack and matmul", use(torch_scorer), check),
        Contender("torch, unpacked before (32x memory)", use(torch_unpacked_scorer), check),
    ]
    return Case(name, score_setup, contenders, score_work)


# Packing -----------------------------------------------------------------------------------------


def pack_setup(quick: bool, threads: int) -> SimpleNamespace:
    rows = 1_000 if quick else 100_000
    x = np.random.default_rng(1).standard_normal((rows, 1024), dtype=np.float32)
    codes = np.packbits(x > 0, axis=1)
    return SimpleNamespace(x=x, codes=codes, signs=signs(codes))


def pack_work(inputs: SimpleNamespace) -> dict[str, float]:
    return {"bytes": inputs.x.nbytes}


def check_codes(inputs: SimpleNamespace, result: Any) -> None:
    np.testing.assert_array_equal(np.asarray(result), inputs.codes)


def check_signs(inputs: SimpleNamespace, result: Any) -> None:
    np.testing.assert_array_equal(np.asarray(result), inputs.signs)


def pentad_pack(inputs: SimpleNamespace) -> Call:
    from pentad.hamming import pack

    return lambda: pack(inputs.x)


def numpy_pack(inputs: SimpleNamespace) -> Call:
    return lambda: np.packbits(inputs.x > 0, axis=1)


def torch_pack(inputs: SimpleNamespace) -> Call:
    import torch

    x = torch.from_numpy(inputs.x)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)

    def call():
        bits = (x > 0).view(torch.uint8).unflatten(1, (-1, 8))
        return bits.bitwise_left_shift(shifts).sum(dim=2, dtype=torch.uint8)

    return call


def pentad_unpack(inputs: SimpleNamespace) -> Call:
    from pentad.hamming import unpack

    return lambda: unpack(inputs.codes, inputs.x.shape[1])


def numpy_unpack(inputs: SimpleNamespace) -> Call:
    return lambda: signs(inputs.codes)


def torch_unpack(inputs: SimpleNamespace) -> Call:
    import torch

    codes = torch.from_numpy(inputs.codes)
    return lambda: torch_signs(codes)


CASES = [
    score_case(
        "score, 32 x 100,000, 1024 bits",
        Contender("pentad score", forward(pentad_scorer), check_scores),
        forward,
        check_scores,
    ),
    score_case(
        "score forward and backward, 32 x 100,000, 1024 bits",
        Contender("pentad score", backward(pentad_scorer), check_gradient),
        backward,
        check_gradient,
    ),
    score_case(
        "top 10 by score, 32 x 100,000, 1024 bits",
        Contender("pentad topk_score", pentad_topk_score, check_best),
        best_of,
        check_best,
    ),
    Case(
        "pack, 100,000 x 1024 float32",
        pack_setup,
        [
            Contender("pentad pack", pentad_pack, check_codes),
            Contender("numpy packbits", numpy_pack, check_codes),
            Contender("torch", torch_pack, check_codes),
        ],
        pack_work,
    ),
    Case(
        "unpack, 100,000 x 1024 float32",
        pack_setup,
        [
            Contender("pentad unpack", pentad_unpack, check_signs),
            Contender("numpy unpackbits", numpy_unpack, check_signs),
            Contender("torch", torch_unpack, check_signs),
        ],
        pack_work,
    ),
]
