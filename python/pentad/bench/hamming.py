# SPDX-License-Identifier: Apache-2.0
"""pentad.hamming against faiss, usearch, NumKong, torch and numpy.

    pentad bench hamming [--quick] [--only TEXT] [--json FILE]

All codes are random. Expected answers come from a brute force that shares nothing with the
kernels. pentad and faiss break ties by the smaller id, so their ids must be the expected ones;
for the others the distances must be, and each id must really have its distance.

How the peers are used, where it is not obvious:

- faiss searches one query with one thread; it splits queries over threads, never the database.
- usearch (exact search) keeps every distance of a call before it picks k, so its memory grows with
  queries x codes, and so does its time per pair.
- NumKong has kernels only: no top-k, no threads. Here the codes are packed in blocks whose
  distances stay in cache, 2-3x faster than one large block, and dealt out to threads.
  "numkong, distances only" throws the distances away, and so bounds every top-k made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import hamming_model
from .hamming_data import distance_blocks, nearest, random_codes
from .harness import Call, Case, Contender, Family, Target

PACKAGES = ("torch", "faiss-cpu", "usearch", "numkong")

TARGETS = {
    "top 10, 1024 bits, 256 queries": Target("faiss", 5.0),
    "top 10, 256 bits, 256 queries": Target("faiss", 3.0),
    # 85 % of the speed at which the same bytes can be read at all.
    "top 10, 1024 bits, 1 query": Target("reading the codes", 0.85),
    "top 1000, 1024 bits, 32 queries": Target("faiss", 3.0),
}

# NumKong's best block of codes on a CPU with 1 MiB of L2 per core.
NUMKONG_BLOCK = 4096


# Inputs and expected answers ---------------------------------------------------------------------


@dataclass
class Search:
    """Inputs of a search and its expected answer: values and ids are (queries, k)."""

    queries: np.ndarray
    codes: np.ndarray
    k: int
    threads: int
    mask: np.ndarray | None
    values: np.ndarray
    ids: np.ndarray

    @property
    def bits(self) -> int:
        return self.codes.shape[1] * 8

    def work(self) -> dict[str, float]:
        pairs = len(self.queries) * len(self.codes)
        # One query is bound by memory, many by arithmetic: the first entry is the rate shown.
        amounts = {"pairs": pairs, "bytes": self.codes.nbytes}
        return amounts if len(self.queries) > 1 else dict(reversed(amounts.items()))


def search_setup(
    bits: int, queries: int, k: int, share: float | None = None
) -> Callable[[bool, int], Search]:
    """Setup of a search in a million codes, of which a random `share` is admitted by the filter."""

    def setup(quick: bool, threads: int) -> Search:
        rows = 20_000 if quick else 1_000_000
        codes = random_codes(rows, bits, seed=1)
        asked = random_codes(min(queries, 16) if quick else queries, bits, seed=2)
        mask = None if share is None else np.random.default_rng(3).random(rows) < share
        return Search(asked, codes, k, threads, mask, *nearest(asked, codes, k, mask))

    return setup


# Checks ------------------------------------------------------------------------------------------


def check_exact(inputs: Search, result: Any) -> None:
    values, ids = result
    np.testing.assert_array_equal(values, inputs.values, err_msg="distances")
    np.testing.assert_array_equal(ids, inputs.ids, err_msg="ids")


def check_any_ties(inputs: Search, result: Any) -> None:
    """The expected distances, and distinct ids that have them."""
    values, ids = (np.asarray(part) for part in result)
    np.testing.assert_array_equal(values, inputs.values, err_msg="distances")
    ids = ids.astype(np.int64)
    apart = np.bitwise_count(inputs.queries[:, None] ^ inputs.codes[ids]).sum(
        axis=2, dtype=np.int64
    )
    np.testing.assert_array_equal(apart, inputs.values, err_msg="distances of the ids returned")
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(), "an id is returned twice"


def check_block(inputs: Search, result: Any) -> None:
    """The distances of the block of codes that each thread computed last."""
    for start, distances in result:
        codes = inputs.codes[start : start + distances.shape[1]]
        expected = np.concatenate(
            [part for _, part in distance_blocks(inputs.queries, codes)], axis=1
        )
        np.testing.assert_array_equal(distances, expected)


def check_sum(inputs: Search, result: int) -> None:
    words = inputs.codes.reshape(-1).view(np.uint64)
    assert result == words.sum(), "sum of the words read"


# Top-k: contenders -------------------------------------------------------------------------------


def pentad_index(inputs: Search) -> Call:
    from pentad.hamming import BinaryIndex

    index = BinaryIndex(inputs.bits)
    index.add(inputs.codes)
    return lambda: index.search(inputs.queries, inputs.k, filter=inputs.mask)


def pentad_topk(inputs: Search) -> Call:
    from pentad.hamming import topk

    return lambda: topk(inputs.queries, inputs.codes, inputs.k, mask=inputs.mask)


def faiss_index(inputs: Search):
    import faiss

    index = faiss.IndexBinaryFlat(inputs.bits)
    index.add(inputs.codes)
    return faiss, index


def faiss_flat(inputs: Search) -> Call:
    _, index = faiss_index(inputs)
    return lambda: index.search(inputs.queries, inputs.k)


def faiss_bitmap(inputs: Search) -> Call:
    """The selector is made beforehand; pentad gets the plain mask in every call."""
    faiss, index = faiss_index(inputs)
    bitmap = np.packbits(inputs.mask, bitorder="little")
    parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bitmap))
    return lambda: index.search(inputs.queries, inputs.k, params=parameters)


def usearch_exact(inputs: Search) -> Call:
    from usearch.index import MetricKind, ScalarKind, search

    def call():
        matches = search(
            inputs.codes,
            inputs.queries,
            inputs.k,
            MetricKind.Hamming,
            exact=True,
            threads=inputs.threads,
            dtype=ScalarKind.B1,
        )
        # One query gives one row without the leading axis.
        shape = len(inputs.queries), -1
        return np.reshape(matches.distances, shape), np.reshape(matches.keys, shape)

    return call


class NumKongBlocks:
    """Codes packed in blocks dealt out to threads, each reusing one output per block width."""

    def __init__(self, queries: np.ndarray, codes: np.ndarray, threads: int):
        import numkong

        self.numkong, self.queries = numkong, queries
        blocks = [
            (start, numkong.hammings_pack(codes[start : start + NUMKONG_BLOCK]))
            for start in range(0, len(codes), NUMKONG_BLOCK)
        ]
        self.shares = [share for i in range(threads) if (share := blocks[i::threads])]
        self.outputs = [
            {
                block.width: numkong.zeros((len(queries), block.width), dtype="uint32")
                for _, block in share
            }
            for share in self.shares
        ]
        self.pool = ThreadPoolExecutor(threads)

    def distances(self, number: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first code, distances) of every block of one thread's share, valid until the next."""
        for start, block in self.shares[number]:
            output = self.outputs[number][block.width]
            self.numkong.hammings_packed(self.queries, block, out=output)
            yield start, np.asarray(output)

    def map(self, function: Callable[[int], Any]) -> list[Any]:
        """function(number of the share) for every share, each in a thread."""
        return list(self.pool.map(function, range(len(self.shares))))


def numkong_distances(inputs: Search) -> Call:
    blocks = NumKongBlocks(inputs.queries, inputs.codes, inputs.threads)

    def last_block(number: int):
        *_, last = blocks.distances(number)
        return last

    return lambda: blocks.map(last_block)


def numkong_argpartition(inputs: Search) -> Call:
    """Keep each block's k best, then the k best of those."""
    blocks = NumKongBlocks(inputs.queries, inputs.codes, inputs.threads)

    def smallest(distances: np.ndarray, k: int) -> np.ndarray:
        if k >= distances.shape[1]:
            return np.broadcast_to(np.arange(distances.shape[1]), distances.shape)
        return np.argpartition(distances, k - 1, axis=1)[:, :k]

    def share_best(number: int):
        values, ids = [], []
        for start, distances in blocks.distances(number):
            picked = smallest(distances, inputs.k)
            values.append(np.take_along_axis(distances, picked, axis=1))
            ids.append(picked + start)
        return np.concatenate(values, axis=1), np.concatenate(ids, axis=1)

    def call():
        found = blocks.map(share_best)
        values, ids = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
        picked = smallest(values, inputs.k)
        values, ids = (np.take_along_axis(part, picked, axis=1) for part in (values, ids))
        order = np.argsort(values, axis=1, kind="stable")
        return tuple(np.take_along_axis(part, order, axis=1) for part in (values, ids))

    return call


def read_codes(inputs: Search) -> Call:
    from pentad import _C

    flat = inputs.codes.reshape(-1)
    return lambda: _C.stream_read(flat)


TOPK = [
    Contender("pentad BinaryIndex", pentad_index, check_exact),
    Contender("pentad topk", pentad_topk, check_exact),
    Contender("faiss", faiss_flat, check_exact),
    Contender("usearch", usearch_exact, check_any_ties),
    Contender("numkong + numpy argpartition", numkong_argpartition, check_any_ties),
    Contender("numkong, distances only", numkong_distances, check_block),
]
READ = Contender("reading the codes", read_codes, check_sum)


def topk_case(bits: int, queries: int, k: int, *extra: Contender) -> Case:
    plural = "query" if queries == 1 else "queries"
    name = f"top {k}, {bits} bits, {queries} {plural}"
    return Case(name, search_setup(bits, queries, k), [*TOPK, *extra], Search.work, TARGETS[name])


def filter_case(share: float) -> Case:
    return Case(
        f"top 10 of {share:.0%}, 1024 bits, 32 queries",
        search_setup(1024, 32, 10, share),
        [
            Contender("pentad BinaryIndex", pentad_index, check_exact),
            Contender("pentad topk", pentad_topk, check_exact),
            Contender("faiss IDSelectorBitmap", faiss_bitmap, check_exact),
        ],
        Search.work,
    )


# Range search ------------------------------------------------------------------------------------


def range_setup(quick: bool, threads: int) -> Search:
    """A radius that admits about one code in ten thousand; ids hold one array per query."""
    codes = random_codes(20_000 if quick else 1_000_000, 1024, seed=1)
    queries = random_codes(8 if quick else 32, 1024, seed=2)
    radius = 452
    found = [(start, distances <= radius) for start, distances in distance_blocks(queries, codes)]
    ids = [
        np.concatenate([np.flatnonzero(hits[row]) + start for start, hits in found])
        for row in range(len(queries))
    ]
    return Search(queries, codes, radius, threads, None, values=None, ids=ids)


def check_range(inputs: Search, result: Any) -> None:
    bounds, values, ids = result
    bounds = np.asarray(bounds, dtype=np.int64)
    expected = np.cumsum([0, *map(len, inputs.ids)])
    np.testing.assert_array_equal(bounds, expected, err_msg="row bounds")
    for row, query in enumerate(inputs.queries):
        part = slice(bounds[row], bounds[row + 1])
        order = np.argsort(ids[part])
        np.testing.assert_array_equal(
            ids[part][order], inputs.ids[row], err_msg=f"ids of row {row}"
        )
        apart = np.bitwise_count(query ^ inputs.codes[inputs.ids[row]]).sum(axis=1)
        np.testing.assert_array_equal(values[part][order], apart, err_msg=f"values of row {row}")


def pentad_index_range(inputs: Search) -> Call:
    from pentad.hamming import BinaryIndex

    index = BinaryIndex(inputs.bits)
    index.add(inputs.codes)
    return lambda: index.range_search(inputs.queries, inputs.k)


def pentad_range(inputs: Search) -> Call:
    from pentad.hamming import range_search

    return lambda: range_search(inputs.queries, inputs.codes, inputs.k)


def faiss_range(inputs: Search) -> Call:
    """faiss admits distances below the radius, pentad up to it."""
    _, index = faiss_index(inputs)
    return lambda: index.range_search(inputs.queries, inputs.k + 1)


# Distance matrix ---------------------------------------------------------------------------------


def matrix_setup(quick: bool, threads: int) -> Search:
    rows, columns = (64, 1024) if quick else (1024, 16384)
    a, b = random_codes(rows, 1024, seed=1), random_codes(columns, 1024, seed=2)
    expected = np.concatenate([part for _, part in distance_blocks(a, b)], axis=1)
    return Search(a, b, 0, threads, None, values=expected, ids=None)


def check_matrix(inputs: Search, result: Any) -> None:
    np.testing.assert_array_equal(np.asarray(result), inputs.values)


def pentad_matrix(inputs: Search) -> Call:
    from pentad.hamming import distance

    return lambda: distance(inputs.queries, inputs.codes)


def numkong_matrix(inputs: Search) -> Call:
    """Packing is part of the call: codes come in rows, as they do for the others."""
    import numkong

    pool = ThreadPoolExecutor(inputs.threads)
    bounds = np.linspace(0, len(inputs.queries), inputs.threads + 1).astype(int).tolist()

    def call():
        packed = numkong.hammings_pack(inputs.codes)
        out = numkong.zeros((len(inputs.queries), len(inputs.codes)), dtype="uint32")

        def rows(start: int, end: int) -> None:
            numkong.hammings_packed(inputs.queries, packed, out=out, start_row=start, end_row=end)

        list(pool.map(rows, bounds[:-1], bounds[1:]))
        return out

    return call


def faiss_matrix(inputs: Search) -> Call:
    import faiss

    rows, columns = len(inputs.queries), len(inputs.codes)
    a, b = faiss.swig_ptr(inputs.queries), faiss.swig_ptr(inputs.codes)

    def call():
        out = np.empty((rows, columns), dtype=np.int32)
        faiss.hammings(a, b, rows, columns, inputs.bits // 8, faiss.swig_ptr(out))
        return out

    return call


CASES = [
    topk_case(1024, 256, 10),
    topk_case(256, 256, 10),
    topk_case(1024, 1, 10, READ),
    topk_case(1024, 32, 1000),
    filter_case(0.01),
    filter_case(0.50),
    Case(
        "range search, 1024 bits, 32 queries",
        range_setup,
        [
            Contender("pentad BinaryIndex", pentad_index_range, check_range),
            Contender("pentad range_search", pentad_range, check_range),
            Contender("faiss", faiss_range, check_range),
        ],
        Search.work,
    ),
    Case(
        "distance matrix, 1024 x 16384, 1024 bits",
        matrix_setup,
        [
            Contender("pentad distance", pentad_matrix, check_matrix),
            Contender("numkong", numkong_matrix, check_matrix),
            Contender("faiss hammings (one thread)", faiss_matrix, check_matrix),
        ],
        Search.work,
    ),
    *hamming_model.CASES,
]

FAMILY = Family("hamming", CASES, PACKAGES)
