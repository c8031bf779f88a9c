# SPDX-License-Identifier: Apache-2.0
"""The ways to search sparse vectors that the sparse benchmark compares.

Each takes queries in the form that it reads fastest, made before the time starts, and its answer is
turned into arrays after the time ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from . import sparse_data
from .sparse_data import K

Answer = tuple[np.ndarray, np.ndarray]  # scores and ids, (nq, k) both


def rows_of(queries: csr_array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(terms, weights) of each query."""
    for first, last in zip(queries.indptr, queries.indptr[1:], strict=False):
        yield queries.indices[first:last], queries.data[first:last]


@contextlib.contextmanager
def output_to(path: Path | str = os.devnull) -> Iterator[None]:
    """Standard output of native code goes to a file, or nowhere."""
    sys.stdout.flush()
    saved = os.dup(1)
    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)


def write_rows(path: Path, rows: csr_array) -> str:
    """A file that pyseismic-lsr reads: how many rows; of each its length, terms and values."""
    with path.open("wb") as file:
        file.write(np.uint32(rows.shape[0]).tobytes())
        for first in range(0, rows.shape[0], sparse_data.BLOCK):
            some = rows[first : first + sparse_data.BLOCK]
            lengths = np.diff(some.indptr)
            starts = 2 * some.indptr[:-1] + np.arange(len(lengths))
            words = np.empty(2 * some.nnz + len(lengths), np.uint32)
            words[starts] = lengths
            within = np.arange(some.nnz) - np.repeat(some.indptr[:-1], lengths)
            at = np.repeat(starts + 1, lengths) + within
            words[at] = some.indices
            words[at + np.repeat(lengths, lengths)] = some.data.view(np.uint32)
            file.write(words.tobytes())
    return str(path)


# Engines -----------------------------------------------------------------------------------------


class Engine:
    """One way to search. `build` and `find` are timed, `read`, `ask` and `answer` are not.

    outer, inner
        Settings for the search: every one of the first, and of each kind the least of the second
        that finds enough. None are chosen where a search is exact.
    slow
        A search takes so long that it is made once, for its time and its check.
    """

    slow = False
    outer: Sequence[Any] = ()
    inner: Sequence[Any] = ()

    def read(self, docs: csr_array, folder: Path) -> Any:
        """The documents in the form that `build` takes."""
        return docs

    def build(self, docs: Any) -> Any:
        raise NotImplementedError

    def size(self, index: Any, path: Path) -> int:
        """Bytes of the file that the index is saved to at `path`, or of its memory."""
        raise NotImplementedError

    def ask(self, queries: csr_array) -> Any:
        return queries

    def find(self, index: Any, asked: Any, k: int, *settings) -> Any:
        raise NotImplementedError

    def answer(self, found: Any) -> Answer:
        return found


@dataclass(frozen=True)
class Pentad(Engine):
    values: str = "exact"

    # Exact, or a query_cut and a block_factor; and alpha, of which less finds more. Without a
    # block_factor the windows of one query are searched by all threads.
    outer = (None, *product((None, 24, 16, 12, 10, 8), (0.0, 0.05, 0.1, 0.2, 0.3)))
    inner = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)

    def build(self, docs):
        from pentad.sparse import SparseIndex

        index = SparseIndex(docs.shape[1], values=self.values)
        index.add(docs)
        index.search(self.ask(docs[:1]), 1)  # what a first search does once
        return index

    def size(self, index, path):
        index.save(path)
        return path.stat().st_size

    def ask(self, queries):
        return queries.indptr, queries.indices, queries.data

    def find(self, index, asked, k, *settings):
        if not settings or settings[0] is None:
            return index.search(asked, k)
        (query_cut, block_factor), alpha = settings
        options = {"query_cut": query_cut, "block_factor": block_factor, "alpha": alpha}
        return index.search(asked, k, exact=False, **options)


@dataclass(frozen=True)
class Seismic(Engine):
    """Without a graph of neighbours; queries of a batch come from a file, as its API has it."""

    n_postings: int = 3500

    outer = (5, 8, 12, 20, 40)
    # Its factor of the heap: the less, the more blocks it looks into.
    inner = (2.0, 1.5, 1.2, *(step / 20 for step in range(20, 3, -1)))

    def read(self, docs, folder):
        return write_rows(folder / "documents.bin", docs)

    def build(self, docs):
        from seismic import SeismicIndexRaw

        with output_to():
            return SeismicIndexRaw.build(docs, n_postings=self.n_postings)

    def size(self, index, path):
        # Its file is written by way of a copy, for which there may be no memory.
        with output_to(path):
            index.print_space_usage_byte()
        return int(re.search(r"Total: (\d+) Bytes", path.read_text())[1])

    def ask(self, queries):
        if queries.shape[0] == 1:
            return queries.indices.astype(np.int32), queries.data
        return write_rows(Path(tempfile.mkdtemp()) / "queries.bin", queries)

    def find(self, index, asked, k, *settings):
        query_cut, heap_factor = settings
        if isinstance(asked, tuple):
            return [index.search(*asked, k, query_cut, heap_factor, 0, True)]
        return index.batch_search(asked, k, query_cut, heap_factor, 0, True)

    def answer(self, found):
        scores = np.full((len(found), K), -np.inf, np.float32)
        ids = np.full((len(found), K), -1)
        for row, pairs in enumerate(found):
            for at, (score, number) in enumerate(pairs):
                scores[row, at], ids[row, at] = score, number
        return scores, ids


@dataclass(frozen=True)
class Bmp(Engine):
    """Whole numbers alone: it keeps bytes, and scales the largest weight of a query to 32."""

    def build(self, docs):
        from bmp import Indexer, Searcher

        with tempfile.TemporaryDirectory() as folder, output_to():
            path = str(Path(folder) / "index")
            indexer = Indexer(path, bsize=32, compress_range=False)
            for number, (terms, values) in enumerate(rows_of(docs)):
                texts = map(str, terms.tolist())
                vector = dict(zip(texts, values.astype(int).tolist(), strict=True))
                indexer.add_document(str(number), vector)
            indexer.finish()
            return Searcher(path), os.path.getsize(path)

    def size(self, index, path):
        return index[1]

    def ask(self, queries):
        return [
            dict(zip(map(str, terms.tolist()), weights.tolist(), strict=True))
            for terms, weights in rows_of(queries)
        ]

    def find(self, index, asked, k, *settings):
        return [index[0].search(query, k=k, alpha=1.0, beta=1.0) for query in asked]

    def answer(self, found):
        scores = np.array([scores for _, scores in found], np.float32)
        return scores, np.array([list(map(int, ids)) for ids, _ in found])


def sparse_bytes(matrix: csr_array) -> int:
    return matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes


@dataclass(frozen=True)
class Scipy(Engine):
    """The product of the queries with the transposed documents, and the best of its rows."""

    top: bool = True

    def build(self, docs):
        return docs.T.tocsr()

    def size(self, index, path):
        return sparse_bytes(index)

    def find(self, index, asked, k, *settings):
        scores = asked @ index
        if not self.top:
            return scores
        best = []
        for first, last in zip(scores.indptr, scores.indptr[1:], strict=False):
            row = scores.data[first:last]
            at = np.argpartition(-row, k)[:k] if len(row) > k else np.arange(len(row))
            at = at[np.argsort(-row[at], kind="stable")]
            best.append((row[at], scores.indices[first:last][at]))
        return best

    def answer(self, found):
        if not self.top:  # the whole product
            scores = found.toarray()
            ids = np.argsort(-scores, axis=1, kind="stable")[:, :K]
            return np.take_along_axis(scores, ids, axis=1), ids
        return tuple(np.stack(part) for part in zip(*found, strict=True))


@dataclass(frozen=True)
class Torch(Engine):
    """As util.dot_score of sentence-transformers: the sparse product, then all of it dense."""

    slow = True

    def build(self, docs):
        return self.ask(docs)

    def size(self, index, path):
        return index.values().nbytes + index.indices().nbytes

    def ask(self, queries):
        import torch

        coordinates = np.stack(queries.tocoo().coords)
        values = torch.from_numpy(queries.data)
        return torch.sparse_coo_tensor(
            torch.from_numpy(coordinates), values, queries.shape, check_invariants=False
        ).coalesce()

    def find(self, index, asked, k, *settings):
        import torch

        return torch.mm(asked, index.transpose(0, 1)).to_dense().topk(k)

    def answer(self, found):
        return found.values.numpy(), found.indices.numpy()


def answer(engine: Engine, found: list) -> Answer:
    """The answers of several calls as one."""
    parts = [engine.answer(part) for part in found]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
