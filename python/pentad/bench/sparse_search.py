# SPDX-License-Identifier: Apache-2.0
"""The sparse benchmark's cases of search: exact, at a given recall, BM25, and the build.

An index is built once for all cases; what its build took, and its bytes for every non-zero of the
documents, stand beside every search in it.
"""

from __future__ import annotations

import tempfile
import time
import timeit
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from pentad.docsearch import splade

from . import sparse_data
from .harness import Call, Case, Contender, Target, Unfit
from .sparse_data import Data, K
from .sparse_engines import Bmp, Engine, Pentad, Scipy, Seismic, Torch, answer, rows_of

EXACT_BATCH = 10.0
EXACT_SINGLE, EXACT_SINGLE_BMP = 8.0, 2.0
AT_RECALL = 2.0
BUILD = 10.0
BM25 = 3.0
MANY = 1_000_000
# Of drawn documents, whose lists are long: with its default of 3,500 postings a list, a million
# would take a quarter of an hour to build.
MANY_SEISMIC = Seismic(n_postings=1000)
SPLADE_SEISMIC = Seismic()

# Indexes and what they took ----------------------------------------------------------------------


@dataclass
class Built:
    index: Any
    seconds: float
    bytes_a_posting: float


_built: dict[tuple[Engine, str, int], Built] = {}


def built(engine: Engine, data: Data) -> Built:
    key = engine, data.name, data.docs.shape[0]
    if key not in _built:
        with tempfile.TemporaryDirectory() as folder:
            docs = engine.read(data.docs, Path(folder))
            start = time.perf_counter()
            index = engine.build(docs)
            keep(engine, data, index, time.perf_counter() - start)
    return _built[key]


def keep(engine: Engine, data: Data, index: Any, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = engine.size(index, Path(folder) / "index")
    _built[engine, data.name, data.docs.shape[0]] = Built(index, seconds, size / data.docs.nnz)


def usage(call: Call) -> tuple[float, float]:
    """(CPU seconds of a call, CPU seconds over wall seconds) over calls that last a while."""
    call()
    time.sleep(0.02)  # threads of the call before may still spin
    start, cpu_start, calls = time.perf_counter(), time.process_time(), 0
    while (seconds := time.perf_counter() - start) < 0.05:
        call()
        calls += 1
    spent = time.process_time() - cpu_start
    return spent / calls, spent / seconds


@dataclass(frozen=True, eq=False)
class Search:
    """All queries of `data` at once, or `single`: one after the other."""

    data: Data
    k: int
    single: bool = False
    recall: float | None = None
    whole: Data | None = None  # the same documents, the queries whose recall settings must have

    def asked(self, engine: Engine) -> list:
        """The queries in the form that the engine reads, a call each."""
        queries = self.data.queries
        parts = [queries[[row]] for row in range(queries.shape[0])] if self.single else [queries]
        return [engine.ask(part) for part in parts]

    def work(self) -> dict[str, float]:
        queries, postings = self.data.queries.shape[0], self.data.postings()
        if self.recall:
            return {"queries": queries, "postings": postings}
        return {"postings": postings, "queries": queries}


class Searching:
    """The timed call: a search by an engine, with the settings that `settings` says."""

    settings: tuple = ()

    def __init__(self, engine: Engine, inputs: Search):
        self.engine, self.inputs = engine, inputs
        self.built = built(engine, inputs.data)
        self.asked = inputs.asked(engine)

    def __call__(self) -> list:
        return self.found(*self.settings)

    def found(self, *settings) -> list:
        find, index, k = self.engine.find, self.built.index, self.inputs.k
        return [find(index, asked, k, *settings) for asked in self.asked]

    def quality(self) -> dict[str, float]:
        build = {"build s": self.built.seconds, "bytes/posting": self.built.bytes_a_posting}
        if self.engine.slow:
            return build
        spent, cores = usage(self)
        qualities = build | {"cores": cores}
        if self.inputs.k == K:
            ids = answer(self.engine, self())[1]
            qualities = {f"recall@{K}": self.inputs.data.recall(ids)} | qualities
        if not self.inputs.recall and isinstance(self.engine, Pentad):
            qualities["postings/ns a core"] = self.inputs.data.postings() / spent / 1e9
        return qualities


class Tuned(Searching):
    """A search with the fastest setting that finds enough."""

    def __init__(self, engine: Engine, inputs: Search):
        super().__init__(engine, inputs)
        self.settings = self.chosen()

    def chosen(self) -> tuple:
        """(outer, inner): of each outer setting the least inner one that finds enough of the
        whole, and of these pairs the one that takes least time for what is asked, in the best of
        three runs.
        """
        engine, inputs, times = self.engine, self.inputs, []
        recall, last = partial(recall_of, engine, inputs.whole), engine.inner[-1]
        for outer in engine.outer:
            if recall(outer, last) < inputs.recall:
                continue
            at = bisect_left(
                engine.inner,
                True,
                key=lambda inner, outer=outer: recall(outer, inner) >= inputs.recall,
            )
            settings = outer, engine.inner[at]
            seconds = min(timeit.repeat(partial(self.found, *settings), number=1, repeat=3))
            times.append((seconds, len(times), settings))
        if not times:
            best = max(recall(outer, last) for outer in engine.outer)
            raise Unfit(f"no setting finds {inputs.recall} of the best; at most {best:.3f}")
        return min(times)[2]

    def quality(self):
        qualities = super().quality()
        outer, inner = self.settings
        if not isinstance(self.engine, Pentad):
            knobs = {"query_cut": outer, "heap_factor": inner}
        elif outer is None:
            knobs = {"exact": 1}
        else:
            knobs = {"query_cut": outer[0], "block_factor": outer[1], "alpha": inner}
            knobs = {name: value for name, value in knobs.items() if value is not None}
        # Of all queries, of which the settings must find enough.
        qualities[f"recall@{K}"] = recall_of(self.engine, self.inputs.whole, outer, inner)
        return qualities | knobs


_found: dict[tuple, float] = {}


def recall_of(engine: Engine, data: Data, *settings) -> float:
    key = engine, data.name, data.docs.shape, data.queries.shape, *settings
    if key not in _found:
        found = engine.find(built(engine, data).index, engine.ask(data.queries), K, *settings)
        _found[key] = data.recall(engine.answer(found)[1])
    return _found[key]


# Checks ------------------------------------------------------------------------------------------


def distinct(ids: np.ndarray) -> None:
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(), "an id is returned twice"


def check_definition(engine: Engine, inputs: Search, found: Any) -> None:
    """Scores, ids and the order of equal scores, as the definition has them."""
    scores, ids = answer(engine, found)
    expected = inputs.data.answer(inputs.k)
    np.testing.assert_array_equal(scores, expected[0], err_msg="scores")
    np.testing.assert_array_equal(ids, expected[1], err_msg="ids")


def check_exact(engine: Engine, tolerance: float, inputs: Search, found: Any) -> None:
    """The largest scores, of documents that have them; equal ones in any order."""
    scores, ids = answer(engine, found)
    distinct(ids)
    expected = inputs.data.answer(K if scores.shape[1] == K else inputs.k)[0]
    np.testing.assert_allclose(scores, expected, rtol=tolerance, atol=1e-6, err_msg="best")
    actual = inputs.data.scores(ids)
    np.testing.assert_allclose(scores, actual, rtol=tolerance, atol=1e-6, err_msg="scores")


def check_bmp(inputs: Search, found: Any) -> None:
    """Right scores of what it found; of a thousand it misses some, though it prunes safely."""
    scores, ids = answer(Bmp(), found)
    distinct(ids)
    np.testing.assert_array_equal(scores, inputs.data.scores(ids), err_msg="scores")
    least = inputs.data.answer(inputs.k)[0][:, -1:]
    share = (scores >= least).mean()
    assert share >= 0.95, f"finds {share:.3f} of the best"


def check_enough(engine: Engine, tolerance: float, inputs: Search, found: Any) -> None:
    """Distinct documents, enough of them right, each with its score."""
    scores, ids = answer(engine, found)
    distinct(ids)
    assert (ids >= 0).all(), "too few documents"
    np.testing.assert_allclose(
        scores, inputs.data.scores(ids), rtol=tolerance, atol=tolerance, err_msg="scores"
    )
    assert (np.diff(scores, axis=1) <= 0).all(), "not the best first"
    if not inputs.single:
        recall = inputs.data.recall(ids)
        assert recall >= inputs.recall, f"recall@{K} is {recall:.3f}"


# The cases ---------------------------------------------------------------------------------------


def exact_setup(
    data: Callable[[int], Data], count: int, k: int, single: bool, quick: bool, threads: int
) -> Search:
    whole = data(4_000 if quick else 200_000)
    count = min(count, 8) if quick else count
    return Search(whole.first(count), min(k, 100) if quick else k, single)


def exact_case(count: int, k: int, single: bool) -> Case:
    scipy, alone = Scipy(), Scipy(top=False)
    contenders = [
        Contender("pentad", partial(Searching, Pentad()), partial(check_definition, Pentad())),
        Contender(
            "pentad, values as bytes",
            partial(Searching, Pentad("uint8")),
            check_bytes,
        ),
        Contender(
            "scipy CSR product alone", partial(Searching, alone), partial(check_exact, alone, 1e-5)
        ),
        Contender(
            "scipy CSR product, top k", partial(Searching, scipy), partial(check_exact, scipy, 1e-5)
        ),
    ]
    if not single:
        engine = Torch()
        contenders.append(
            Contender(
                "torch.mm, dense result, topk",
                partial(Searching, engine),
                partial(check_exact, engine, 1e-5),
                once=True,
            )
        )
    how = f"{count} queries{' one at a time' if single else ''}"
    return Case(
        f"exact top {k:,}, 200,000 documents, {how}",
        partial(exact_setup, sparse_data.zipf, count, k, single),
        contenders,
        Search.work,
        Target("scipy CSR product alone", EXACT_SINGLE if single else EXACT_BATCH),
    )


def check_bytes(inputs: Search, found: Any) -> None:
    """Exact for values that are rounded to bytes: each within half a step of its own largest."""
    scores, ids = answer(Pentad(), found)
    distinct(ids)
    actual = inputs.data.scores(ids)
    largest = np.array([weights.sum() for _, weights in rows_of(inputs.data.queries)])
    allowed = largest * inputs.data.docs.data.max() / 255
    assert (abs(scores - actual) <= allowed[:, None]).all(), "scores"


def bmp_case(k: int) -> Case:
    return Case(
        f"exact top {k:,}, 200,000 documents of whole numbers, 100 queries one at a time",
        partial(exact_setup, sparse_data.whole_numbers, 100, k, True),
        [
            Contender("pentad", partial(Searching, Pentad()), partial(check_definition, Pentad())),
            Contender("bmp, alpha 1", partial(Searching, Bmp()), check_bmp),
        ],
        Search.work,
        Target("bmp, alpha 1", EXACT_SINGLE_BMP),
    )


def recall_setup(name: str, recall: float, single: bool, quick: bool, threads: int) -> Search:
    if name == "splade":
        whole = sparse_data.splade(quick)
    else:
        whole = sparse_data.zipf(2_000 if quick else MANY)
    if quick:
        whole = whole.first(32)
    count = 8 if quick and single else 100 if single else whole.queries.shape[0]
    return Search(whole.first(count), K, single, recall, whole)


def recall_case(name: str, recall: float, single: bool) -> Case:
    what = "SPLADE vectors of the passages" if name == "splade" else f"{MANY:,} documents"
    peer = SPLADE_SEISMIC if name == "splade" else MANY_SEISMIC
    return Case(
        f"recall@{K} {recall}, {what}, {'100 queries one at a time' if single else '256 queries'}",
        partial(recall_setup, name, recall, single),
        [
            Contender("pentad", partial(Tuned, Pentad()), partial(check_enough, Pentad(), 0.0)),
            Contender("pyseismic-lsr", partial(Tuned, peer), partial(check_enough, peer, 4e-3)),
        ],
        Search.work,
        Target("pyseismic-lsr", AT_RECALL),
    )


class Building:
    """Build an index of documents that were read before; `check_built` keeps it for searches."""

    def __init__(self, engine: Engine, data: Data):
        self.engine, self.data = engine, data
        self.folder = tempfile.TemporaryDirectory()
        self.docs = engine.read(data.docs, Path(self.folder.name))

    def __call__(self) -> tuple[Any, float]:
        start = time.perf_counter()
        return self.engine.build(self.docs), time.perf_counter() - start

    def quality(self) -> dict[str, float]:
        return {"bytes/posting": built(self.engine, self.data).bytes_a_posting}


def check_built(engine: Engine, data: Data, made: tuple[Any, float]) -> None:
    """It finds documents by their own vectors."""
    index, seconds = made
    keep(engine, data, index, seconds)
    asked = engine.ask(data.docs[[7]])
    settings = (engine.outer[-1], engine.inner[-1]) if engine.outer else ()
    ids = engine.answer(engine.find(index, asked, K, *settings))[1]
    assert 7 in ids[0], "a document is not found by its own vector"


BUILD_CASE = Case(
    f"build, {MANY:,} documents",
    lambda quick, threads: sparse_data.zipf(2_000 if quick else MANY),
    [
        Contender(name, partial(Building, engine), partial(check_built, engine), once=True)
        for name, engine in {"pentad": Pentad(), "pyseismic-lsr": MANY_SEISMIC}.items()
    ],
    lambda data: {"postings": data.docs.nnz},
    Target("pyseismic-lsr", BUILD),
)


# BM25 --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Words:
    """Numbers of words, and the impacts that ours makes of them."""

    documents: list[list[int]]
    queries: list[list[int]]
    vocabulary: dict[str, int]
    data: Data
    single: bool
    threads: int

    def work(self) -> dict[str, float]:
        return {"queries": len(self.queries), "postings": self.data.postings()}


def words_setup(single: bool, quick: bool, threads: int) -> Words:
    from pentad.sparse import bm25

    documents, queries, vocabulary = sparse_data.words(quick)
    weights = bm25(documents)
    docs, asked = (
        csr_array((values, indices, starts), (len(starts) - 1, weights.vocab_size))
        for starts, indices, values, *_ in (weights.docs, weights.encode(queries))
    )
    return Words(documents, queries, vocabulary, Data("bm25", docs, asked), single, threads)


def pentad_words(inputs: Words) -> Call:
    return Searching(Pentad(), Search(inputs.data, K, inputs.single))


def check_words(inputs: Words, found: Any) -> None:
    check_definition(Pentad(), Search(inputs.data, K), found)


class Bm25s:
    """Its numba backend, which is given numbers of words as well."""

    def __init__(self, inputs: Words):
        import bm25s
        import numba  # noqa: F401
        from bm25s.tokenization import Tokenized

        self.index = bm25s.BM25(method="lucene", backend="numba")
        corpus = Tokenized(inputs.documents, inputs.vocabulary)
        start = time.perf_counter()
        self.index.index(corpus, show_progress=False)
        self.seconds = time.perf_counter() - start
        self.parts = [inputs.queries]
        self.threads = inputs.threads
        if inputs.single:
            self.parts, self.threads = [[query] for query in inputs.queries], 0
        self.data = inputs.data

    def __call__(self) -> list:
        return [
            self.index.retrieve(part, k=K, show_progress=False, n_threads=self.threads)
            for part in self.parts
        ]

    def quality(self) -> dict[str, float]:
        arrays = (self.index.scores[name] for name in ("data", "indices", "indptr"))
        size = sum(array.nbytes for array in arrays) / len(self.index.scores["data"])
        return {"build s": self.seconds, "bytes/posting": size, "cores": usage(self)[1]}


def check_bm25s(inputs: Words, found: list) -> None:
    """The scores that the definition has, in float32 sums."""
    scores, ids = (
        np.concatenate([getattr(part, name) for part in found]) for name in ("scores", "documents")
    )
    expected = inputs.data.answer(K)[0]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5, err_msg="best")
    actual = inputs.data.scores(ids.astype(np.int64))
    np.testing.assert_allclose(scores, actual, rtol=1e-5, atol=1e-5, err_msg="scores")


def words_case(single: bool) -> Case:
    return Case(
        f"BM25, the passages, top {K}, 256 queries{' one at a time' if single else ''}",
        partial(words_setup, single),
        [
            Contender("pentad", pentad_words, check_words),
            Contender("bm25s numba", Bm25s, check_bm25s),
        ],
        Words.work,
        Target("bm25s numba", BM25),
    )


CASES = [
    exact_case(100, K, False),
    exact_case(100, K, True),
    exact_case(100, 1000, True),
    bmp_case(K),
    bmp_case(1000),
    words_case(False),
    words_case(True),
    BUILD_CASE,
    *(
        recall_case(name, recall, single)
        for name in (("splade", "zipf") if splade.available() else ("zipf",))
        for recall in (0.95, 0.99)
        for single in (False, True)
    ),
]
