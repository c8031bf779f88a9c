# SPDX-License-Identifier: Apache-2.0
"""Sparse vectors to search, and what a search in them must find by definition.

- "zipf": documents of 120 terms and queries of 40 over a vocabulary of 30,522. A term of rank r is
  drawn with probability proportional to 1 / (r + 20), none twice, which makes a term of a query
  occur in a tenth of the documents; values are log-normal, exp(N(ln 0.58, 0.6)), at most 4. The
  documents of a smaller collection are the first of a larger one.
- "bytes": the same with whole numbers in the place of values, 1 to 255 in documents and 1 to 32 in
  queries, which every peer scores without rounding.
- "splade": the passages of the installed documentation as a SPLADE model of two layers encodes
  them, and first lines of 256 of them as queries (`pentad.docsearch.splade`).
- words of the same passages and queries, for BM25.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from scipy.sparse import csr_array

from .machine import cache_folder

VOCABULARY = 30_522
TERMS, QUERY_TERMS = 120, 40
QUERIES = 256
K = 10
# Scores of float16 and of float32 values differ by rounding, and equal docstrings have equal ones.
TIE = 1e-5
BLOCK = 1 << 16  # documents that are drawn, or scored, at once


@dataclass(frozen=True, eq=False)
class Data:
    """docs (n, V) and queries (nq, V) in float32, the terms of each row rising."""

    name: str
    docs: csr_array
    queries: csr_array
    _answers: dict = field(default_factory=dict)

    def first(self, count: int) -> Data:
        """The same documents, the first `count` queries."""
        return Data(self.name, self.docs, self.queries[:count], self._answers)

    def answer(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores, ids), (nq, k) both: the k largest scores, of equal ones the smaller ids."""
        count = self.queries.shape[0]
        if k not in self._answers or len(self._answers[k][0]) < count:
            self._answers[k] = definition(self.queries, self.docs, k)
        scores, ids = self._answers[k]
        return scores[:count], ids[:count]

    def recall(self, ids: np.ndarray) -> float:
        """The share of `ids` (nq, 10) whose scores are among the ten largest of their query."""
        ids = np.asarray(ids, dtype=np.int64)
        assert ids.shape == (self.queries.shape[0], K), f"{ids.shape} ids"
        scores = self.scores(np.maximum(ids, 0))
        found = (scores >= self.answer(K)[0][:, -1:] * (1 - TIE)) & (ids >= 0)
        return float(found.mean())

    def scores(self, ids: np.ndarray) -> np.ndarray:
        """Scores of documents (nq, c) by their definition."""
        rows = np.repeat(np.arange(len(ids)), ids.shape[1])
        some = self.docs[ids.reshape(-1)]
        lengths = np.diff(some.indptr)
        weights = dense(self.queries)[np.repeat(rows, lengths), some.indices]
        entries = np.repeat(np.arange(len(rows)), lengths)
        sums = np.bincount(entries, weights * some.data, minlength=len(rows))
        return sums.reshape(ids.shape).astype(np.float32)

    def postings(self) -> int:
        """Pairs of a query's term and a document that has it: what a full search adds up."""
        lengths = np.bincount(self.docs.indices, minlength=self.docs.shape[1])
        return int(lengths[self.queries.indices].sum())


def dense(rows: csr_array) -> np.ndarray:
    return rows.toarray().astype(np.float64)


def score_blocks(queries: csr_array, docs: csr_array) -> Iterator[tuple[int, np.ndarray]]:
    """(first document, scores (nq, block) float32): sums of doubles over rising terms, rounded.

    Products of float32 values are exact in float64, and scipy adds them in the order of the terms.
    """
    asked = queries.astype(np.float64)
    for first in range(0, docs.shape[0], BLOCK):
        block = docs[first : first + BLOCK].astype(np.float64).T
        yield first, (asked @ block.tocsr()).toarray().astype(np.float32) + np.float32(0)


def definition(queries: csr_array, docs: csr_array, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = [np.empty(0, np.float32)] * queries.shape[0]
    ids = [np.empty(0, np.int64)] * queries.shape[0]
    for first, block in score_blocks(queries, docs):
        count = min(k, block.shape[1])
        for row, new in enumerate(block):
            least = np.partition(new, -count)[-count]
            if len(scores[row]) == k:
                least = max(least, scores[row][-1])
            near = np.flatnonzero(new >= least)
            both = np.concatenate([scores[row], new[near]])
            order = np.argsort(-both, kind="stable")[:k]  # ids rise among equals
            scores[row] = both[order]
            ids[row] = np.concatenate([ids[row], near + first])[order]
    return np.stack(scores), np.stack(ids)


# Drawn vectors -----------------------------------------------------------------------------------


def zipf_terms(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """(rows, count) different terms of each row, rising; the commonest terms have no order."""
    weights = 1 / (20 + np.arange(VOCABULARY))
    steps = 1 << 22
    ranks = np.searchsorted(
        np.cumsum(weights) / weights.sum(), (np.arange(steps) + 0.5) / steps, side="left"
    )
    table = np.random.default_rng(5).permutation(VOCABULARY).astype(np.int32)[ranks]
    drawn = count + 16 + count // 3
    terms = table[rng.integers(0, steps, (rows, drawn), dtype=np.int32)]
    # Of equal terms of a row the first drawn counts, and of the others the first `count` drawn.
    keys = np.sort(terms * 512 + np.arange(drawn, dtype=np.int32), axis=1)
    again = keys[:, 1:] >> 9 == keys[:, :-1] >> 9
    order = (keys & 511) << 16 | keys >> 9
    order[:, 1:][again] = np.iinfo(np.int32).max
    order.sort(axis=1)
    assert (order[:, count - 1] < np.iinfo(np.int32).max).all(), "too few different terms drawn"
    return np.sort(order[:, :count] & 0xFFFF, axis=1)


def zipf_rows(seed: int, rows: int, count: int) -> csr_array:
    indices = np.empty((rows, count), np.int32)
    values = np.empty((rows, count), np.float32)
    for first in range(0, rows, BLOCK):
        # Whole blocks, each of a seed of its own, so that fewer rows are the first of more.
        rng, some = np.random.default_rng([seed, first]), slice(first, first + BLOCK)
        wanted = min(BLOCK, rows - first)
        drawn = BLOCK if rows > QUERIES else rows
        indices[some] = zipf_terms(rng, drawn, count)[:wanted]
        normal = rng.standard_normal((drawn, count), dtype=np.float32)[:wanted]
        values[some] = np.minimum(np.float32(0.58) * np.exp(np.float32(0.6) * normal), 4)
    starts = np.arange(rows + 1, dtype=np.int64) * count
    return csr_array((values.reshape(-1), indices.reshape(-1), starts), (rows, VOCABULARY))


@cache
def zipf(rows: int) -> Data:
    return Data("zipf", zipf_rows(1, rows, TERMS), zipf_rows(2, QUERIES, QUERY_TERMS))


@cache
def whole_numbers(rows: int) -> Data:
    data = zipf(rows)
    docs, queries = data.docs.copy(), data.queries.copy()
    docs.data = np.clip(np.rint(docs.data * np.float32(255 / 4)), 1, 255)
    for weights in np.split(queries.data, queries.indptr[1:-1]):
        weights[:] = np.clip(np.rint(weights * (32 / weights.max())), 1, 32)
    return Data("bytes", docs, queries)


# The documentation -------------------------------------------------------------------------------


@cache
def texts(quick: bool) -> tuple[list[str], list[str]]:
    """(documents, queries): passages with their names, and the first lines of some of them."""
    from pentad.docsearch import corpus

    sources = corpus.sources()
    if quick:
        sources = corpus.restrict(sources, ["numpy", "json"])
    passages = corpus.read(sources).passages
    long = [p.first_line for p in passages if len(p.first_line.split()) >= 4]
    chosen = np.random.default_rng(6).permutation(len(long))[:QUERIES]
    return [f"{p.name}: {p.text}" for p in passages], [long[i] for i in chosen]


@cache
def words(quick: bool) -> tuple[list[list[int]], list[list[int]], dict[str, int]]:
    """(documents, queries, vocabulary): numbers of words, of queries those that documents have."""
    from pentad.docsearch.words import words

    documents, queries = ([words(text) for text in part] for part in texts(quick))
    vocabulary: dict[str, int] = {}
    numbers = [[vocabulary.setdefault(w, len(vocabulary)) for w in text] for text in documents]
    known = [[vocabulary[w] for w in text if w in vocabulary] for text in queries]
    return numbers, known, vocabulary


@cache
def splade(quick: bool) -> Data:
    """Encoded once, in half an hour of two cores, and kept: of what was installed then."""
    from pentad.docsearch.splade import SpladeTiny

    path = cache_folder() / "splade.npz"
    names = ("data", "indices", "indptr")
    if not quick and path.exists():
        with np.load(path) as file:
            docs, queries = (
                csr_array(
                    tuple(file[f"{part}_{name}"] for name in names),
                    (len(file[f"{part}_indptr"]) - 1, VOCABULARY),
                )
                for part in ("docs", "queries")
            )
        return Data("splade", docs, queries)
    documents, queries = texts(quick)
    if quick:
        documents, queries = documents[:200], queries[:32]
    model = SpladeTiny()
    data = Data("splade", model.encode(documents), model.encode(queries))
    if not quick:
        parts = {"docs": data.docs, "queries": data.queries}
        arrays = {f"{p}_{name}": getattr(rows, name) for p, rows in parts.items() for name in names}
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
    return data
