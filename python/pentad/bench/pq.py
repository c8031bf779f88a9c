# SPDX-License-Identifier: Apache-2.0
"""pentad.pq against faiss, turbovec, ScaNN and torch.

    pentad bench pq [--quick] [--only TEXT] [--json FILE]

A million vectors of 128 dimensions, see `pq_data`; each index trains its own codebooks on the same
65,536 of them. What the indexes find is told beside the times, as the share of the ten nearest
vectors, on random and on real vectors. Ours must find the k least distances to the codes by their
definition; the others must return distinct rows at the distances that they name.

How the peers are used, where it is not obvious:

- faiss searches one query with one thread; it splits queries over threads, never the database.
- turbovec has no codes of 4 bits for several dimensions; beside M 64 stand its 2 bits for each of
  128, which take as many bytes. It gives inner products, and nothing is trained.
- ScaNN scans without a tree and without rescoring, with its anisotropic loss. It takes minutes to
  train, so it stands beside M 32 alone.
- faiss' k-means of the training takes a large part of a minute, and is timed in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import pq_data, pq_ivf, pq_product_keys
from .harness import Call, Case, Contender, Family, Target
from .memory import Memory
from .pq_data import DIM, Data, K

PACKAGES = ("torch", "faiss-cpu", "turbovec", "scann")

SCAN_4_BITS = 1.5
SCAN_8_BITS = 15.0
ONE_QUERY_4_BITS = 1.5
ONE_QUERY_8_BITS = 12.0
TRAIN = 4.0
ASSIGN = 5.0

# Search ------------------------------------------------------------------------------------------

Find = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Search:
    """The first `count` queries of `data`; recall is also told for the other `told`."""

    data: Data
    told: tuple[Data, ...]
    M: int
    nbits: int
    count: int
    threads: int

    @property
    def queries(self) -> np.ndarray:
        return self.data.queries[: self.count]

    def work(self) -> dict[str, float]:
        rows = self.count * len(self.data.vectors)
        return {"rows": rows, "lookups": rows * self.M}


class Searching:
    """The timed call of a contender: `find` is made of (data, M, nbits, threads)."""

    def __init__(self, make: Callable[..., Find], inputs: Search):
        self.make, self.inputs = make, inputs
        self.find = self._of(inputs.data)

    def _of(self, data: Data) -> Find:
        return self.make(data, self.inputs.M, self.inputs.nbits, self.inputs.threads)

    def __call__(self):
        return self.find(self.inputs.queries)

    def quality(self) -> dict[str, float]:
        return {
            f"recall@{K} {data.name}": data.recall(self._of(data)(data.queries)[1])
            for data in self.inputs.told
        }


def search_setup(name: str, M: int, nbits: int, count: int, quick: bool, threads: int) -> Search:
    rows = 20_000 if quick else 1_000_000
    random, real = pq_data.random_data(rows), pq_data.real_data(quick)
    data = random if name == "random" else pq_data.copied_data(quick, rows)
    told = (random, real) if name == "random" else (data,)
    return Search(data, told, M, nbits, min(count, 16) if quick else count, threads)


def check_definition(inputs: Search, result: Any) -> None:
    index = pentad_index(inputs.data, inputs.M, inputs.nbits)
    codes = index.codes()
    assert result[1].shape == (inputs.count, K)
    for query, scores, ids in list(zip(inputs.queries, *result, strict=True))[:2]:
        costs, rows = pq_data.definition(query, index.codebooks, codes, K)
        np.testing.assert_array_equal(scores, costs, err_msg="distances")
        np.testing.assert_array_equal(ids, rows, err_msg="ids")


def check_distinct(inputs: Search, result: Any) -> None:
    ids = np.asarray(result[1]).astype(np.int64)
    assert ids.shape == (inputs.count, K), f"{ids.shape} ids"
    inside = (ids >= 0) & (ids < len(inputs.data.vectors))
    assert inside.all(), "ids that do not exist"
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(), "an id is returned twice"


def check_faiss(inputs: Search, result: Any) -> None:
    """The distances to the codes, but for the bytes that fast-scan tables are rounded to."""
    check_distinct(inputs, result)
    index = faiss_index(inputs.data, inputs.M, inputs.nbits)
    distances, ids = result
    for query, named, found in zip(inputs.queries, distances, ids, strict=True):
        decoded = np.stack([index.reconstruct(int(i)) for i in found])
        actual = ((query - decoded) ** 2).sum(axis=1)
        # 255 steps for the widest of M tables, which add up to some 4 M / 255 at most.
        rounding = 4 * inputs.M / 255 if inputs.nbits == 4 else 1e-4
        np.testing.assert_allclose(named, actual, rtol=0, atol=rounding)


def check_products(inputs: Search, result: Any) -> None:
    """Estimates of the inner products, each within a quarter of its length-one vectors."""
    check_distinct(inputs, result)
    scores, ids = result
    actual = np.einsum("qd,qkd->qk", inputs.queries, inputs.data.vectors[ids.astype(np.int64)])
    np.testing.assert_allclose(scores, actual, rtol=0, atol=0.25)


@cache
def pentad_index(data: Data, M: int, nbits: int):
    from pentad.pq import PQIndex

    index = PQIndex(DIM, M, nbits)
    index.train(data.training)
    index.add(data.vectors)
    return index


def pentad_find(data: Data, M: int, nbits: int, threads: int) -> Find:
    index = pentad_index(data, M, nbits)
    return lambda queries: index.search(queries, K)


@cache
def faiss_index(data: Data, M: int, nbits: int):
    import faiss

    kind = faiss.IndexPQFastScan if nbits == 4 else faiss.IndexPQ
    index = kind(DIM, M, nbits)
    index.pq.cp.min_points_per_centroid = 1  # no warnings where vectors are few
    index.train(data.training)
    index.add(data.vectors)
    return index


def faiss_find(data: Data, M: int, nbits: int, threads: int) -> Find:
    index = faiss_index(data, M, nbits)
    return lambda queries: index.search(queries, K)


@cache
def turbovec_index(data: Data):
    from turbovec import TurboQuantIndex

    index = TurboQuantIndex(DIM, 2)
    index.add(data.vectors)
    return index


def turbovec_find(data: Data, M: int, nbits: int, threads: int) -> Find:
    index = turbovec_index(data)
    return lambda queries: index.search(queries, K)


@cache
def scann_searcher(data: Data, M: int, threads: int):
    from scann import scann_ops_pybind

    builder = scann_ops_pybind.builder(data.vectors, K, "dot_product")
    builder.score_ah(DIM // M, anisotropic_quantization_threshold=0.2)
    builder.set_n_training_threads(threads)
    searcher = builder.build()
    searcher.set_num_threads(threads)
    return searcher


def scann_find(data: Data, M: int, nbits: int, threads: int) -> Find:
    searcher = scann_searcher(data, M, threads)

    def find(queries):
        if len(queries) == 1:
            ids, products = (part[None] for part in searcher.search(queries[0]))
        else:
            ids, products = searcher.search_batched_parallel(queries)
        return products, ids

    return find


def search_case(
    M: int, nbits: int, count: int, ratio: float | None = None, data: str = "random"
) -> Case:
    faiss = "faiss IndexPQFastScan" if nbits == 4 else "faiss IndexPQ"
    contenders = [
        Contender("pentad PQIndex", partial(Searching, pentad_find), check_definition),
        Contender(faiss, partial(Searching, faiss_find), check_faiss),
    ]
    if (M, nbits) == (64, 4):
        prepare = partial(Searching, turbovec_find)
        contenders.append(Contender("turbovec, 2 bits a dimension", prepare, check_products))
    if (M, nbits, data) == (32, 4, "random"):
        prepare = partial(Searching, scann_find)
        contenders.append(Contender("scann score_ah", prepare, check_products))
    plural = "query" if count == 1 else "queries"
    where = "" if data == "random" else ", passages and their copies"
    told = ("random", "real") if data == "random" else (data,)
    return Case(
        f"top {K}, {nbits} bits, M {M}, {count} {plural}{where}",
        partial(search_setup, data, M, nbits, count),
        contenders,
        Search.work,
        ratio
        and Target(
            *(faiss, ratio),
            at_least=tuple(f"recall@{K} {name}" for name in told),
            answers=K * pq_data.QUERIES,
        ),
    )


# Training ----------------------------------------------------------------------------------------


def training_setup(quick: bool, threads: int) -> SimpleNamespace:
    rows = 2_000 if quick else 50_000
    return SimpleNamespace(x=pq_data.random_data(20_000 if quick else 1_000_000).vectors[:rows])


class Training:
    """Train 16 codebooks of 256 centroids: `codebooks` turns x into them."""

    def __init__(self, codebooks: Callable[[np.ndarray], np.ndarray], inputs: SimpleNamespace):
        self.codebooks, self.inputs = codebooks, inputs

    def __call__(self) -> np.ndarray:
        self.result = self.codebooks(self.inputs.x)
        return self.result

    def quality(self) -> dict[str, float]:
        return {"distortion": pq_data.distortion(self.inputs.x, self.result)}


def check_codebooks(inputs: SimpleNamespace, codebooks: np.ndarray) -> None:
    """Finite, and better than rows of x taken as they come would be."""
    assert codebooks.shape == (16, 256, 8), f"{codebooks.shape} codebooks"
    assert np.isfinite(codebooks).all(), "codebooks hold a NaN or an infinity"
    rows = inputs.x[:256].reshape(256, 16, 8).swapaxes(0, 1)
    actual, allowed = (pq_data.distortion(inputs.x, books) for books in (codebooks, rows))
    assert actual < allowed, f"distortion {actual:.4g}, of rows of x {allowed:.4g}"


def pentad_codebooks(iterations: int, x: np.ndarray) -> np.ndarray:
    from pentad.pq import train_codebooks

    return train_codebooks(x, 16, 8, iterations=iterations).codebooks


def faiss_codebooks() -> Callable[[np.ndarray], np.ndarray]:
    import faiss

    def train(x: np.ndarray) -> np.ndarray:
        quantizer = faiss.ProductQuantizer(DIM, 16, 8)
        quantizer.cp.niter = 25
        quantizer.cp.min_points_per_centroid = 1
        quantizer.train(x)
        return faiss.vector_to_array(quantizer.centroids).reshape(16, 256, 8)

    return train


def training_case(name: str, iterations: int, ratio: float | None) -> Case:
    """Ours with `iterations`, faiss with its 25."""
    return Case(
        f"train, 8 bits, M 16, 50,000 vectors, {name}",
        training_setup,
        [
            Contender(
                "pentad train_codebooks",
                partial(Training, partial(pentad_codebooks, iterations)),
                check_codebooks,
            ),
            Contender(
                "faiss ProductQuantizer.train",
                lambda inputs: Training(faiss_codebooks(), inputs),
                check_codebooks,
                once=True,
            ),
        ],
        # Products of our distances alone, a multiplication and an addition each.
        lambda inputs: {"flop": 2 * iterations * 256 * inputs.x.size},
        ratio and Target("faiss ProductQuantizer.train", ratio, at_most=("distortion",)),
        "float32",
    )


TRAININGS = [
    training_case("to the distortion of 25 of Lloyd's iterations", 10, TRAIN),
    training_case("25 iterations", 25, None),
]


# Assignment --------------------------------------------------------------------------------------


def assign_setup(quick: bool, threads: int) -> SimpleNamespace:
    """x (n, 64), centroids (K, 64), and the least squared distance of some rows."""
    rng = np.random.default_rng(4)
    n, k = (2_000, 300) if quick else (100_000, 4096)
    x, centroids = (rng.standard_normal((rows, 64), dtype=np.float32) for rows in (n, k))
    some = np.sort(rng.permutation(n)[:2000])
    squares = (centroids.astype(np.float64) ** 2).sum(axis=1)
    products = x[some].astype(np.float64) @ centroids.T.astype(np.float64)
    nearest = (squares - 2 * products).argmin(1)
    return SimpleNamespace(x=x, centroids=centroids, some=some, nearest=nearest)


def check_nearest(inputs: SimpleNamespace, codes: Any) -> None:
    np.testing.assert_array_equal(np.asarray(codes).reshape(-1)[inputs.some], inputs.nearest)


def check_nearly(inputs: SimpleNamespace, codes: Any) -> None:
    """The nearest but for rounding, which picks another where two are equally far."""
    codes = np.asarray(codes).reshape(-1)[inputs.some]
    rows = inputs.x[inputs.some].astype(np.float64)
    actual, least = (
        ((rows - inputs.centroids[which]) ** 2).sum(axis=1) for which in (codes, inputs.nearest)
    )
    np.testing.assert_allclose(actual, least, rtol=1e-5, atol=0)


def pentad_assign(inputs: SimpleNamespace) -> Call:
    from pentad.pq import assign

    return lambda: assign(inputs.x, inputs.centroids[None])


def torch_assign(rows: int | None, inputs: SimpleNamespace) -> Call:
    import torch

    x, centroids = torch.from_numpy(inputs.x), torch.from_numpy(inputs.centroids)

    def call():
        parts = x.split(rows or len(x))
        return torch.cat([torch.cdist(part, centroids).argmin(1) for part in parts])

    return call


def faiss_assign(inputs: SimpleNamespace) -> Call:
    import faiss

    index = faiss.IndexFlatL2(64)
    index.add(inputs.centroids)
    return lambda: index.search(inputs.x, 1)[1]


ASSIGNMENT = Case(
    "assign, n 100,000, d 64, K 4096",
    assign_setup,
    [
        Contender("pentad assign", pentad_assign, check_nearest),
        Contender("torch.cdist + argmin", partial(torch_assign, None), check_nearly),
        Contender("torch.cdist + argmin in parts", partial(torch_assign, 1024), check_nearly),
        Contender("faiss IndexFlatL2, k 1", faiss_assign, check_nearly),
    ],
    lambda inputs: {"flop": 2 * inputs.x.size * len(inputs.centroids)},
    Target("torch.cdist + argmin", ASSIGN),
    "float32",
)


# The cases ---------------------------------------------------------------------------------------

CASES = [
    *(search_case(M, 4, 256, SCAN_4_BITS) for M in (16, 32, 64)),
    search_case(32, 4, 1, ONE_QUERY_4_BITS),
    *(search_case(M, 8, 32, SCAN_8_BITS) for M in (16, 32)),
    *(search_case(M, 8, 1, ONE_QUERY_8_BITS) for M in (16, 32)),
    search_case(32, 4, 256, None, "copies"),
    search_case(16, 8, 32, None, "copies"),
    *TRAININGS,
    *pq_ivf.CASES,
    ASSIGNMENT,
    *pq_product_keys.CASES,
]

# Memory ------------------------------------------------------------------------------------------

MEMORY_DIM, CENTROIDS, ROWS = 64, 4096, 100_000
ALLOWED = "vectors, centroids and codes once more"


def memory_call(prepare: Callable[[SimpleNamespace], Call], rows: int) -> Call:
    rng = np.random.default_rng(1)
    centroids, x = (
        rng.standard_normal((n, MEMORY_DIM), dtype=np.float32) for n in (CENTROIDS, rows)
    )
    return prepare(SimpleNamespace(x=x, centroids=centroids))


MEMORY = [
    Memory(
        f"extra memory, assign, n {ROWS:,}, d {MEMORY_DIM}, K {CENTROIDS}",
        __name__,
        {
            "pentad": partial(memory_call, pentad_assign),
            "torch.cdist + argmin": partial(memory_call, partial(torch_assign, None)),
        },
        size=(ROWS,),
        small=(2_000,),
        warm=(64,),
        target=Target(ALLOWED, 1.0),
        allowed={ALLOWED: lambda rows: 4 * (rows * MEMORY_DIM + CENTROIDS * MEMORY_DIM + rows)},
    )
]

FAMILY = Family("pq", [*CASES, *MEMORY], PACKAGES, rounds=5, budget=2.0)
