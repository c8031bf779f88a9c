# SPDX-License-Identifier: Apache-2.0
"""Cost against sequence length, and against the number of vectors or documents searched.

    pentad bench curves [--quick] [--only TEXT] [--json FILE]

A curve is measured from its smallest size to its largest, and its contenders take turns at each
size as in any case. A peer leaves the curve at the size where it would take more than SLOW seconds,
by its growth so far, or more memory than MOST_MEMORY; that is told there. Calls of a large part of
a second are made once: the call whose answer is checked is the one that is timed.

Searches are of one query, so that reading all codes once bounds them (while the codes are larger
than the caches; smaller ones are read faster than memory can be).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from . import attention, hamming, pq_data, scan, scan_matrix, sparse_data, sparse_search
from .attention_data import plain, visible
from .curves_data import DIM, Vectors, long_problem, random_vectors
from .harness import Call, Case, Contender, Family, Inputs, Options, run_case
from .scan_data import FLOP_PER_STATE, random_scan
from .scan_matrix_data import chunked_ssd, random_ssd
from .sparse_data import K
from .sparse_engines import Pentad, Scipy

PACKAGES = ("torch", "mambapy", "transformers", "faiss-cpu", "usearch", "numkong", "scipy")

SLOW = 10.0
ONCE = 0.5
MOST_MEMORY = 4 << 30

LENGTHS = tuple(1 << exponent for exponent in range(9, 17))  # 512 to 65,536
SMALL_LENGTHS = (64, 128)
COUNTS = (10_000, 100_000, 1_000_000, 10_000_000)
SMALL_COUNTS = (1_000, 2_000)


@dataclass(frozen=True)
class Curve:
    """One question at several sizes; the first contender is the subject, and never leaves.

    axis
        What the size counts.
    setup
        (size, threads) -> inputs.
    needs
        By contender, the bytes that it takes at a size.
    """

    name: str
    axis: str
    sizes: tuple[int, ...]
    small: tuple[int, ...]
    setup: Callable[[int, int], Inputs]
    contenders: Sequence[Contender]
    work: Callable[[Inputs], dict[str, float]]
    bound: str | None = None
    needs: dict[str, Callable[[int], float]] = field(default_factory=dict)

    def run(self, options: Options) -> list[dict[str, Any]]:
        times: dict[str, list[tuple[int, float]]] = {c.name: [] for c in self.contenders}
        running, records = list(self.contenders), []
        for size in self.small if options.quick else self.sizes:
            expected = {c.name: extrapolated(times[c.name], size) for c in running}
            once = expected[running[0].name] > ONCE
            entered, left = [], []
            for contender in running:
                needed = self.needs.get(contender.name, lambda size: 0)(size)
                why = reason(expected[contender.name], needed)
                if why and contender is not running[0]:
                    left.append({"name": contender.name, "status": "left", "detail": why})
                else:
                    slow = once or expected[contender.name] > ONCE
                    entered.append(replace(contender, once=slow))
            case = Case(
                f"{self.name}, {self.axis} {size:,}",
                lambda quick, threads, size=size: self.setup(size, threads),
                entered,
                self.work,
                bound=self.bound,
            )
            record = run_case(case, options.quick, options.threads, options.rounds, options.budget)
            for one in record["contenders"]:
                if "median_s" in one:
                    times[one["name"]].append((size, one["median_s"]))
            names = {one["name"] for one in record["contenders"] if one["status"] == "ok"}
            # A subject that fails stays, for the failure to be told at every size.
            running = [c for c in running if c is running[0] or c.name in names]
            record["contenders"] += left
            records.append(record | {"curve": self.name, "axis": self.axis, "size": size})
        return records


def extrapolated(times: Sequence[tuple[int, float]], size: int) -> float:
    """Seconds at a size, in proportion or by the growth between the last two sizes."""
    if not times:
        return 0.0
    last, seconds = times[-1]
    growth = 1.0
    if len(times) > 1:
        before, less = times[-2]
        growth = max(math.log(seconds / less) / math.log(last / before), 1.0)
    return seconds * (size / last) ** growth


def reason(seconds: float, needed: float) -> str:
    """Why a peer leaves the curve; empty where it does not."""
    if seconds > SLOW:
        return f"would take some {seconds:.2g} s"
    return f"would take {needed / 2**30:.1f} GiB" if needed > MOST_MEMORY else ""


def check_problem(problem: Any, results: Any) -> None:
    problem.check(results)


# Attention ---------------------------------------------------------------------------------------


def plain_op(problem):
    seen = visible(torch.arange(problem.q.shape[2]), problem.q.shape[2], True, None)
    return lambda q, k, v: plain(q, k, v, seen)


def attention_curve(what: str) -> Curve:
    ops = {"pentad": attention.pentad_op, "torch SDPA": attention.torch_op, "plain torch": plain_op}
    matrices = attention.PLAIN_MATRICES[what] + 1
    return Curve(
        f"attention {what}, float32 1,1,L,64 causal",
        "L",
        LENGTHS,
        SMALL_LENGTHS,
        lambda length, threads: long_problem(length, what == "training"),
        [attention.dense_contender(name, what, op) for name, op in ops.items()],
        lambda problem: {"flop": problem.flop(what == "training")},
        "float32",
        {"plain torch": lambda length: matrices * 4 * length**2},
    )


# Scans -------------------------------------------------------------------------------------------

CHANNELS, STATES = 128, 16


def scan_curve(what: str) -> Curve:
    contenders = [
        Contender("pentad", partial(scan.pentad_scan, what), check_problem),
        Contender("mambapy", partial(scan.mambapy_scan, what), scan.check_turned),
        Contender("transformers' loop", partial(scan.transformers_scan, what), check_problem),
    ]
    states = CHANNELS * STATES * 4
    return Curve(
        f"selective_scan {what}, float32 1,{CHANNELS},L N {STATES}",
        "L",
        LENGTHS,
        SMALL_LENGTHS,
        lambda length, threads: random_scan(1, CHANNELS, length, STATES, torch.float32),
        contenders,
        lambda problem: {
            "states": problem.states,
            "flop": problem.states * FLOP_PER_STATE[what],
        },
        "float32",
        # Its powers of two of the length, of all states, several times over.
        {"mambapy": lambda length: 12 * states * length},
    )


def ssd_curve(what: str) -> Curve:
    ways = {
        "pentad": scan_matrix.pentad_ssd,
        "torch, in chunks": lambda: chunked_ssd,
        "transformers, its chunk 256": partial(scan_matrix.transformers_ssd, 256),
    }
    return Curve(
        f"ssd {what}, float32 1,L,4,64 N 64",
        "L",
        LENGTHS,
        SMALL_LENGTHS,
        lambda length, threads: random_ssd(1, length, 4, 64, 64),
        [
            Contender(name, partial(scan_matrix.prepared, what, make), check_problem)
            for name, make in ways.items()
        ],
        lambda problem: {"flop": problem.flop[what]},
        "float32",
        # Its products of all channels and states for each pair of steps of a chunk.
        {"transformers, its chunk 256": lambda length: 4 * 4 * 256 * 64 * 3 * length},
    )


# Searches ----------------------------------------------------------------------------------------

CODE_PARTS = 16


def pentad_codes(inputs: Vectors) -> Call:
    from pentad.pq import PQIndex

    index = PQIndex(DIM, CODE_PARTS, inputs.bits)
    index.train(inputs.vectors[: pq_data.TRAINING])
    index.add(inputs.vectors)

    def call():
        return (*index.search(inputs.query, K), index)

    return call


def faiss_codes(inputs: Vectors) -> Call:
    import faiss

    kind = faiss.IndexPQFastScan if inputs.bits == 4 else faiss.IndexPQ
    index = kind(DIM, CODE_PARTS, inputs.bits)
    index.pq.cp.min_points_per_centroid = 1  # no warnings where vectors are few
    index.train(inputs.vectors[: pq_data.TRAINING])
    index.add(inputs.vectors)

    def call():
        return (*index.search(inputs.query, K), index)

    return call


def check_pentad_codes(inputs: Vectors, result: Any) -> None:
    scores, ids, index = result
    costs, rows = pq_data.definition(inputs.query[0], index.codebooks, index.codes(), K)
    np.testing.assert_array_equal(scores[0], costs, err_msg="distances")
    np.testing.assert_array_equal(ids[0], rows, err_msg="ids")


def check_faiss_codes(inputs: Vectors, result: Any) -> None:
    """Distinct rows, at distances to their codes but for the bytes of fast-scan tables."""
    (named,), (ids,), index = result
    assert len(set(ids)) == K, "an id is returned twice"
    decoded = np.stack([index.reconstruct(int(i)) for i in ids])
    actual = ((inputs.query - decoded) ** 2).sum(axis=1)
    rounding = 4 * CODE_PARTS / 255 if inputs.bits == 4 else 1e-4
    np.testing.assert_allclose(named, actual, rtol=0, atol=rounding)


def pq_curve(bits: int) -> Curve:
    return Curve(
        f"pq top {K}, {bits} bits, M {CODE_PARTS}, 1 query",
        "codes",
        COUNTS,
        SMALL_COUNTS,
        lambda rows, threads: random_vectors(rows, bits),
        [
            Contender("pentad PQIndex", pentad_codes, check_pentad_codes),
            Contender(
                "faiss IndexPQFastScan" if bits == 4 else "faiss IndexPQ",
                faiss_codes,
                check_faiss_codes,
            ),
        ],
        lambda inputs: {"bytes": len(inputs.vectors) * CODE_PARTS * bits / 8},
        "read",
    )


def binary_codes(rows: int, threads: int) -> hamming.Search:
    """The ten nearest by counting bits: of equally far ones the smaller ids."""
    codes = hamming.random_codes(rows, 256, seed=1)
    query = hamming.random_codes(1, 256, seed=2)
    apart = np.bitwise_count(codes.view(np.uint64) ^ query.view(np.uint64)).sum(1, np.int64)
    keys = np.sort(np.partition(apart << 32 | np.arange(rows), K - 1)[:K])[None]
    return hamming.Search(
        query, codes, K, threads, None, (keys >> 32).astype(np.int32), keys & 0xFFFFFFFF
    )


def hamming_curve() -> Curve:
    kept = ("pentad BinaryIndex", "faiss", "usearch", "numkong + numpy argpartition")
    return Curve(
        f"hamming top {K}, 256 bits, 1 query",
        "codes",
        COUNTS,
        SMALL_COUNTS,
        binary_codes,
        [c for c in hamming.TOPK if c.name in kept],
        lambda inputs: {"bytes": inputs.codes.nbytes},
        "read",
    )


def sparse_curve() -> Curve:
    """Ten times fewer than of codes: a document takes 960 bytes before it is indexed."""
    exact, product = Pentad(), Scipy()
    return Curve(
        f"sparse exact top {K}, 120 terms a document, 32 queries one at a time",
        "documents",
        COUNTS[:-1],
        SMALL_COUNTS,
        lambda rows, threads: sparse_search.Search(sparse_data.zipf(rows).first(32), K, True),
        [
            Contender(
                "pentad",
                partial(sparse_search.Searching, exact),
                partial(sparse_search.check_definition, exact),
            ),
            Contender(
                "scipy CSR product, top k",
                partial(sparse_search.Searching, product),
                partial(sparse_search.check_exact, product, 1e-5),
            ),
        ],
        sparse_search.Search.work,
    )


CURVES = [
    *(attention_curve(what) for what in ("forward", "training")),
    *(scan_curve(what) for what in ("forward", "training")),
    *(ssd_curve(what) for what in ("forward", "training")),
    *(pq_curve(bits) for bits in (4, 8)),
    hamming_curve(),
    sparse_curve(),
]

FAMILY = Family("curves", CURVES, PACKAGES, rounds=3, budget=1.0)
