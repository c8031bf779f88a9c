# SPDX-License-Identifier: Apache-2.0
"""Search in the documentation of everything installed, in every kind of index, beside brute force.

Each index is asked every question, one at a time. Brute force means: the same vectors, every inner
product, by numpy or scipy. Recall is the share of the ten best that the index finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..docsearch import DocIndex, LsaEncoder, Passage, indexes, splade
from ..docsearch.installed import PYTHON, fingerprint
from ..docsearch.lexical import WordIndex
from ..docsearch.passages import PassageTable
from ..sparse import SparseIndex
from . import plots
from .questions import CHECKED, QUESTIONS
from .stage import Context, Result, Table

K = 10
OVERSAMPLE = 20  # candidates rescored for each answer wanted
ROUNDS = 3
TIE = 1e-5  # scores that differ by less, relative to them, are those of equal texts
LEAST_RECALL = 0.9  # of rescored candidates; the others are exact, or not promised anything


class Asked(NamedTuple):
    """One way to search and how it did. `ids` (questions, at most K): positions in `passages`."""

    name: str
    passages: Sequence[Passage]
    ids: list[np.ndarray]
    recall: float
    milliseconds: float
    nbytes: float

    def right(self, questions: Sequence[str]) -> list[bool | None]:
        """Whether one of the expected answers was found; None where no passage is one."""
        found = []
        for question, ids in zip(questions, self.ids, strict=True):
            names = QUESTIONS[question]
            possible = any(passage.name.startswith(names) for passage in self.passages)
            hit = any(self.passages[i].name.startswith(names) for i in ids)
            found.append(hit if possible else None)
        return found


def run(context: Context) -> Result:
    passages = context.passages
    questions = list(QUESTIONS)
    result = Result("Search")
    asked = [*by_vectors(context, passages, questions), *by_words(context, passages, questions)]
    if splade.available():
        rows, encoding = by_splade(context, passages, questions)
        asked += rows
        remark = (
            "SPLADE holds only a part of the passages, the standard library's modules and what "
            f"stands directly in them, as its model took {encoding:.0f} ms for each; its figures "
            "do not compare with those above."
        )
    else:
        remark = (
            f"SPLADE is left out: its model is in the package {splade.PACKAGE}, not installed here."
        )

    result.about = (
        f"{len(passages):,} passages of documentation, {len(questions)} questions, asked one at a "
        f"time; the {K} best of each are compared with those that brute force finds in the same "
        "vectors."
    )
    check(result, asked, questions)
    result.tables += [comparison(asked, questions, remark), answers(asked, questions)]
    result.figures["search"] = plots.bars(
        [way.name for way in asked],
        {
            "recall@10 against brute force": [way.recall for way in asked],
            "ms a question": [way.milliseconds for way in asked],
            "bytes a passage": [way.nbytes for way in asked],
        },
        logarithmic=("ms a question", "bytes a passage"),
        muted=[BRUTE in way.name for way in asked],
    )
    result.files.append(context.out / "documentation.pentad")
    return result


BRUTE = "brute force"


def by_vectors(context: Context, passages, questions) -> list[Asked]:
    """PQ and binary codes of the vectors that latent semantic analysis gives."""
    encoder, vectors = LsaEncoder.fit(passages, context.progress)
    queries = list(encoder.encode(questions)[:, None])
    truth = np.concatenate(queries) @ vectors.T

    def best(query):
        return largest(vectors @ query[0])

    asked = [ask(f"float32, {BRUTE}", passages, best, queries, truth, vectors.nbytes)]
    made = {}
    for kind in ("pq", "binary"):
        context.progress(f"building the {kind} index", 0, 1)
        index = made[kind] = indexes.make(kind, vectors)
        arrays = index.to_sections()[1]
        kept = sum(arrays[name].nbytes for name in ("vectors", "scale"))  # int8, to rescore by
        size = sum(array.nbytes for array in arrays.values())
        context.progress(f"building the {kind} index", 1, 1)
        name = {"pq": "PQ", "binary": "binary"}[kind]
        for more, options in (
            ("", {}),
            (", rescored", {"rescore": "store", "oversample": OVERSAMPLE}),
        ):

            def search(query, index=index, options=options):
                return index.search(query, K, **options).ids[0]

            nbytes = size if more else size - kept
            asked.append(ask(name + more, passages, search, queries, truth, nbytes))
    save(context, passages, encoder, made["binary"])
    return asked


def by_words(context: Context, passages, questions) -> list[Asked]:
    """The words of the passages, weighed by BM25."""
    words = WordIndex.of(passages, context.progress)
    return by_terms(
        "BM25", passages, words.index, [words.encode(question) for question in questions]
    )


def by_splade(context: Context, passages, questions) -> tuple[list[Asked], float]:
    """The word pieces that a small language model finds in, and adds to, some of the passages.

    And the milliseconds that encoding one of them took.
    """
    some = top_of_library(passages)[: 200 if context.small else None]
    model = splade.SpladeTiny()
    start = time.perf_counter()
    rows = model.encode([f"{p.name}: {p.text}" for p in some], context.progress)
    encoding = 1000 * (time.perf_counter() - start) / len(some)
    index = SparseIndex(rows.shape[1])
    index.add(rows)
    queries = model.encode(questions)
    parts = [queries[i : i + 1] for i in range(len(questions))]
    queries = [(row.indptr, row.indices, row.data, row.shape[1]) for row in parts]
    return by_terms("SPLADE", some, index, queries), encoding


def top_of_library(passages) -> list[Passage]:
    """The standard library's modules and what stands directly in them.

    Two and a half thousand passages, which most questions are about; the model would take twenty
    minutes for all that is installed.
    """
    own = (p for p in passages if p.distribution == PYTHON and p.kind != "topic")
    return [p for p in own if p.name.count(".") <= 1]


def by_terms(name: str, passages, index: SparseIndex, queries) -> list[Asked]:
    """An index of sparse rows beside scipy's product with all of them."""
    import scipy.sparse

    indptr, terms, values, columns = index.reconstruct(index.ids)
    rows = scipy.sparse.csr_array((values, terms, indptr), (len(index), columns))

    def dense(query):
        vector = np.zeros(columns, np.float32)
        vector[query[1]] = query[2]
        return vector

    def best(query):
        return largest(rows @ dense(query))

    def search(query):
        return index.search(query, K).ids[0]

    truth = np.stack([rows.astype(np.float64) @ dense(query) for query in queries])
    size = sum(array.nbytes for array in index.to_sections()[1].values())
    held = rows.data.nbytes + rows.indices.nbytes + rows.indptr.nbytes
    return [
        ask(f"{name}, {BRUTE}", passages, best, queries, truth, held),
        ask(name, passages, search, queries, truth, size),
    ]


def largest(scores: np.ndarray) -> np.ndarray:
    """Positions of the K largest, best first."""
    best = np.argpartition(-scores, min(K, len(scores) - 1))[:K]
    return best[np.argsort(-scores[best], kind="stable")]


def ask(name: str, passages, search: Callable[[Any], np.ndarray], queries, truth, nbytes) -> Asked:
    """Every query in turn, some rounds; the time is the median over all of them."""
    ids, seconds = [], []
    for _ in range(ROUNDS):
        ids = []
        for query in queries:
            start = time.perf_counter()
            found = search(query)
            seconds.append(time.perf_counter() - start)
            ids.append(found[found >= 0])
    recalls = []
    for found, scores in zip(ids, truth, strict=True):
        bound = scores[largest(scores)[-1]]
        good = scores[found] >= bound - TIE * abs(bound)
        recalls.append(good.sum() / min(K, len(scores)))
    milliseconds = 1000 * float(np.median(seconds))
    size = nbytes / max(len(passages), 1)
    return Asked(name, passages, ids, float(np.mean(recalls)), milliseconds, size)


def check(result: Result, asked: Sequence[Asked], questions) -> None:
    for way in asked:
        exact = BRUTE in way.name or way.name in ("BM25", "SPLADE")
        least = 1.0 if exact else LEAST_RECALL if "rescored" in way.name else 0.0
        result.check(
            way.recall >= least, f"{way.name}: recall@{K} is {way.recall:.3f}, below {least}"
        )
    for way in asked:
        if "rescored" not in way.name:
            continue
        for question, ids in zip(questions, way.ids, strict=True):
            words = CHECKED.get(question, ("",))
            names = [way.passages[i].name.lower() for i in ids[:5]]
            right = any(word in name for word in words for name in names)
            if not right and any(word in p.name.lower() for p in way.passages for word in words):
                result.check(False, f"{way.name}: no right answer to '{question}' in {names}")


def comparison(asked: Sequence[Asked], questions, remark: str) -> Table:
    rows = []
    for way in asked:
        right = [found for found in way.right(questions) if found is not None]
        rows.append(
            [
                way.name,
                f"{len(way.passages):,}",
                f"{way.recall:.3f}",
                f"{way.milliseconds:.2f}",
                f"{way.nbytes:,.0f}",
                f"{sum(right)}/{len(right)}",
            ]
        )
    note = (
        f"Questions are encoded before the clock starts. PQ and binary codes are 64 bytes; "
        f"rescored: {OVERSAMPLE} candidates for each answer are compared again by int8 vectors. "
        "BM25 and SPLADE are exact. Answered: an answer that was noted beforehand is "
        f"among the first {K}, of the questions that have one here; what else is installed may "
        f"answer as well. {remark} To go on asking: pentad search --file documentation.pentad, "
        "in the folder of this report."
    )
    columns = ["index", "passages", f"recall@{K}", "ms/question", "bytes/passage"]
    return Table("Indexes", [*columns, "answered"], rows, note)


def answers(asked: Sequence[Asked], questions) -> Table:
    """The first answer of each index to each question."""
    shown = [way for way in asked if BRUTE not in way.name and way.name not in ("PQ", "binary")]
    rows = []
    for i, question in enumerate(questions):
        first = [way.passages[way.ids[i][0]].name if len(way.ids[i]) else "-" for way in shown]
        rows.append([question, *first])
    columns = ["question", *(way.name for way in shown)]
    return Table("First answers", columns, rows, prose=True, brief=False)


def save(context: Context, passages, encoder, index) -> None:
    """For questions of one's own, with ``pentad search --file``."""
    about = {"files": 0, "skipped": {}, "packages": context.packages}
    about |= {"fingerprint": fingerprint(), "kind": "binary"}
    docs = DocIndex(PassageTable.of(passages), encoder, index, about)
    docs.save(context.out / "documentation.pentad")
