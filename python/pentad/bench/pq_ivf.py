# SPDX-License-Identifier: Apache-2.0
"""The pq benchmark's cases of inverted files: the fastest search that finds 0.9 of the ten nearest.

Every contender has as many lists, codes of the same size of what the centroids leave or of the
vectors themselves, and rescores its candidates with vectors that it stores. How many candidates it
takes and how many lists it visits are chosen for each on its own: the fewest lists that find 0.9
with so many candidates, and of these pairs the one that took least time before the rounds begin.
"""

from __future__ import annotations

import timeit
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import pq_data
from .harness import Case, Contender, Target, Unfit
from .pq_data import DIM, Data, K

RECALL = 0.9
RATIO = 1.3
PROBES = range(1, 129)
OVERSAMPLES = (2, 4, 8, 16, 32)

# (queries, lists to visit, candidates for each answer) -> (scores, ids)
Find = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Lists:
    data: Data
    lists: int

    def work(self) -> dict[str, float]:
        return {"queries": len(self.data.queries)}


class Tuned:
    """A search with the fastest setting that finds enough."""

    def __init__(self, make: Callable[[Lists], Find], inputs: Lists):
        self.find, self.inputs = make(inputs), inputs
        settings = []
        for oversample in OVERSAMPLES:
            probes = self._fewest(oversample)
            if probes is not None:
                find = partial(self.find, inputs.data.queries, probes, oversample)
                settings.append((min(timeit.repeat(find, number=1, repeat=3)), probes, oversample))
        if not settings:
            raise Unfit(f"no setting finds {RECALL} of the nearest")
        _, self.probes, self.oversample = min(settings)

    def _recall(self, probes: int, oversample: int) -> float:
        data = self.inputs.data
        return data.recall(self.find(data.queries, probes, oversample)[1])

    def _fewest(self, oversample: int) -> int | None:
        """Lists to visit so that enough is found; None where all are not enough."""
        probes = [count for count in PROBES if count <= self.inputs.lists]
        at = bisect_left(probes, True, key=lambda count: self._recall(count, oversample) >= RECALL)
        return probes[at] if at < len(probes) else None

    def __call__(self):
        return self.find(self.inputs.data.queries, self.probes, self.oversample)

    def quality(self) -> dict[str, float]:
        name = self.inputs.data.name
        return {
            f"recall@{K} {name}": self._recall(self.probes, self.oversample),
            "nprobe": self.probes,
            "oversample": self.oversample,
        }


def check_enough(inputs: Lists, result: Any) -> None:
    """Distinct ids, best first by their exact distances up to what the stored vectors lose."""
    scores, ids = result
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(), "an id is returned twice"
    recall = inputs.data.recall(ids)
    assert recall >= RECALL, f"recall@{K} is {recall:.3f}"
    actual = ((inputs.data.queries[:, None] - inputs.data.vectors[ids]) ** 2).sum(axis=2)
    np.testing.assert_allclose(scores, actual, rtol=0, atol=0.03, err_msg="distances")


def as_distances(products: np.ndarray) -> np.ndarray:
    """Squared distances of vectors of length one."""
    return 2 - 2 * products


def pentad_lists(M: int, nbits: int, inputs: Lists) -> Find:
    from pentad.pq import IVFPQIndex

    index = IVFPQIndex(DIM, M, nbits, metric="ip", lists=inputs.lists, store="int8")
    index.train(inputs.data.vectors)
    index.add(inputs.data.vectors)

    def find(queries, probes, oversample):
        products, ids = index.search(
            queries, K, nprobe=probes, rescore="store", oversample=oversample
        )
        return as_distances(products), ids

    return find


def faiss_lists(kind: str, M: int, nbits: int, products: bool, inputs: Lists) -> Find:
    import faiss

    metric = faiss.METRIC_INNER_PRODUCT if products else faiss.METRIC_L2
    coarse = faiss.IndexFlat(DIM, metric)
    base = getattr(faiss, kind)(coarse, DIM, inputs.lists, M, nbits, metric)
    base.by_residual = products or base.by_residual
    base.cp.min_points_per_centroid = base.pq.cp.min_points_per_centroid = 1
    store = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit, metric)
    index = faiss.IndexRefine(base, store)
    index.train(inputs.data.vectors)
    index.add(inputs.data.vectors)
    keep = coarse, base, store

    def find(queries, probes, oversample, keep=keep):
        inner = faiss.SearchParametersIVF(nprobe=probes)
        parameters = faiss.IndexRefineSearchParameters(k_factor=oversample, base_index_params=inner)
        scores, ids = index.search(queries, K, params=parameters)
        return as_distances(scores) if products else scores, ids

    return find


def scann_lists(threads_of: Callable[[], int], inputs: Lists) -> Find:
    from scann import scann_ops_pybind

    builder = scann_ops_pybind.builder(inputs.data.vectors, K, "dot_product")
    builder.tree(inputs.lists, 8, training_sample_size=len(inputs.data.vectors))
    builder.score_ah(4, anisotropic_quantization_threshold=0.2).reorder(K)
    builder.set_n_training_threads(threads_of())
    searcher = builder.build()
    searcher.set_num_threads(threads_of())

    def find(queries, probes, oversample):
        ids, products = searcher.search_batched_parallel(
            queries, pre_reorder_num_neighbors=K * oversample, leaves_to_search=probes
        )
        return as_distances(products), ids.astype(np.int64)

    return find


def pentad_threads() -> int:
    import pentad

    return pentad.num_threads()


def setup(copies: bool, quick: bool, threads: int) -> Lists:
    if copies:
        rows = 20_000 if quick else 1_000_000
        return Lists(pq_data.copied_data(quick, rows), 64 if quick else 1024)
    return Lists(pq_data.real_data(quick), 16 if quick else 256)


FAISS = {
    "faiss IndexIVFPQFastScan M 32 4 bits, refined": ("IndexIVFPQFastScan", 32, 4, False),
    "faiss the same of residuals, by products": ("IndexIVFPQFastScan", 32, 4, True),
    "faiss IndexIVFPQ M 16 8 bits, refined": ("IndexIVFPQ", 16, 8, False),
}


def lists_case(copies: bool) -> Case:
    contenders = [
        Contender(name, partial(Tuned, make), check_enough)
        for name, make in {
            "pentad IVFPQIndex M 32 4 bits": partial(pentad_lists, 32, 4),
            **{name: partial(faiss_lists, *options) for name, options in FAISS.items()},
            "scann tree, score_ah, reorder": partial(scann_lists, pentad_threads),
        }.items()
        if not (copies and name.startswith("scann"))
    ]
    what = "1,000,000 passages and copies" if copies else "the passages"
    return Case(
        f"recall@{K} {RECALL} by inverted lists, {what}, {pq_data.QUERIES} queries",
        partial(setup, copies),
        contenders,
        Lists.work,
        Target(tuple(FAISS), RATIO),
    )


CASES = [lists_case(False), lists_case(True)]
