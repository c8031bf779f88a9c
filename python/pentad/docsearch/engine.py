# SPDX-License-Identifier: Apache-2.0
"""An index of documentation: passages, their encoder and an index, together in one file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import _file
from .._errors import FormatError
from . import indexes
from .encoders import ENCODERS, require
from .fusion import reciprocal_rank_fusion
from .installed import fingerprint
from .passages import Passage, PassageTable, Progress

KIND = "docsearch"
RESCORE = indexes.modes("binary")  # of other kinds: without "bits"

# Candidates rescored for each answer wanted. Recall@10 of "store" over 62,500 passages: 0.956 with
# 4, 0.990 with 10, 0.997 with 20 ("bits" 0.79, "none" 0.69). Finding 10 takes 0.10 ms, finding and
# rescoring 200 takes 0.23 ms.
OVERSAMPLE = 20

# Of each ranking, at least, where two are merged. Of 38 questions 66 % have a right answer among
# the first three with 10, 71 % with 30 to 1000.
MERGED = 30


class Hit(NamedTuple):
    """One answer; a larger score is better, but unrescored ones of "binary" are distances.

    Those of "sparse" are of BM25, those of "hybrid" of reciprocal rank fusion.
    """

    score: float
    passage: Passage


class Answer(NamedTuple):
    """The hits, best first, and the seconds that each stage took."""

    hits: list[Hit]
    seconds: dict[str, float]


class DocIndex:
    """Passages that can be searched.

    Examples
    --------
    >>> from pentad.docsearch import DocIndex
    >>> docs = DocIndex.build(["json"])
    >>> docs.search("deserialize from a file").hits[0].passage.name
    'json.load'
    """

    def __init__(self, passages: PassageTable, encoder, index, about: dict, words=None):
        self.passages, self.encoder, self.index, self.about = passages, encoder, index, about
        self.words = words  # "sparse" has these alone, "hybrid" beside the others

    @classmethod
    def build(
        cls,
        packages: Sequence[str] = (),
        *,
        encoder: str = "lsa",
        index: str = "binary",
        folders: list[str] | None = None,
        processes: int = 1,
        progress: Progress | None = None,
    ) -> DocIndex:
        """Read, encode and index the documentation of what is installed.

        Parameters
        ----------
        packages : sequence of str
            Import paths or distributions to restrict to; empty for all.
        encoder : str
            ``"lsa"`` or ``"minilm"``; not used for ``"sparse"``.
        index : str
            Its kind: ``"binary"``, ``"pq"``, ``"scalar"`` or ``"rabitq"`` for vectors, ``"sparse"``
            for words, ranked by BM25, or ``"hybrid"`` for both, their rankings merged.
        folders : list of str, optional
            Folders of distributions, in place of this interpreter's and its standard library.
        processes : int
            How many processes read the source files.
        progress : callable, optional
            Called with (stage, done, total); total 0 where it cannot be told.

        Raises
        ------
        LookupError
            A package that is not installed.
        ModuleNotFoundError
            What the encoder needs is not installed.
        ValueError
            An unknown encoder or kind of index, nothing to index, or too little to train it.
        """
        from . import corpus  # only here: its imports take 20 ms, a search without them 100

        if encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {encoder!r}")
        indexes.check(index)
        if indexes.has_vectors(index):
            require(ENCODERS[encoder])
        sources = corpus.sources(folders)
        if packages:
            sources = corpus.restrict(sources, packages)
        found = corpus.read(sources, processes=processes, progress=progress)
        if not found.passages:
            raise ValueError("there are no docstrings to index")
        fitted = vectors = None
        if indexes.has_vectors(index):
            fitted, vectors = ENCODERS[encoder].fit(found.passages, progress)
        about = {
            "files": found.files,
            "skipped": dict(found.skipped),
            "packages": list(packages),
            "fingerprint": fingerprint(folders),
        }
        return cls.of(found.passages, fitted, vectors, about, index, progress)

    @classmethod
    def of(
        cls,
        passages: list[Passage],
        encoder,
        vectors: np.ndarray | None,
        about: dict,
        index: str = "binary",
        progress: Progress | None = None,
    ) -> DocIndex:
        """Index ``passages`` by their encoder's ``vectors``, float32 (len(passages), dim).

        Both None for "sparse".
        """
        indexes.check(index)
        made = words = None
        if indexes.has_vectors(index):
            made = indexes.make(index, vectors, progress)
        if indexes.has_words(index):
            from .lexical import WordIndex

            words = WordIndex.of(passages, progress)
        return cls(PassageTable.of(passages), encoder, made, {**about, "kind": index}, words)

    @property
    def kind(self) -> str:
        """Of the index, such as "binary"."""
        return self.about.get("kind", "binary")

    def search(
        self,
        question: str,
        k: int = 10,
        *,
        rescore: str = "store",
        packages: Sequence[str] = (),
    ) -> Answer:
        """The ``k`` passages that are most about ``question``.

        Parameters
        ----------
        question : str
        k : int
            At least 1.
        rescore : str
            What the candidates found by their codes are scored with again: ``"store"`` the int8
            vectors, ``"none"`` nothing; for a binary index also ``"bits"``, the codes against the
            float question. Scores of words are exact and stay.
        packages : sequence of str
            Import paths or distributions to search in; empty for all.

        Raises
        ------
        LookupError
            A package of which the index has no passage.
        ValueError
            An empty question, ``k`` below 1, an unknown ``rescore``.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        modes = indexes.modes(self.kind)
        if rescore not in modes:
            where = "" if self.kind == "binary" else f" for an index of kind {self.kind!r}"
            raise ValueError(f"rescore must be one of {', '.join(modes)}{where}, got {rescore!r}")
        clock = _Clock()
        query = None if self.encoder is None else self.encoder.encode([question])
        terms = None if self.words is None else self.words.encode(question)
        clock.lap("encode")
        keep = self.passages.of_packages(packages) if packages else None
        k = min(k, len(self.passages))
        hybrid = self.kind == "hybrid"
        depth = min(max(k, MERGED), len(self.passages)) if hybrid else k
        rankings = []
        if query is not None and query.any():  # else no word of it is known
            rankings.append(self._by_vectors(query, depth, modes[rescore], keep, clock))
        if terms is not None and len(terms[1]):
            rankings.append(self.words.search(terms, depth, keep))
            clock.lap("sparse search")
        if not rankings:
            return Answer([], clock.seconds)
        scores, rows = rankings[0]
        if hybrid:
            scores, rows = reciprocal_rank_fusion([ranked for _, ranked in rankings])
        try:
            hits = [
                Hit(score, self.passages[row])
                for score, row in zip(scores[:k].tolist(), rows[:k].tolist(), strict=True)
            ]
        except IndexError as error:
            raise FormatError("the index names passages that it does not hold") from error
        if hybrid:
            clock.lap("merge")
        return Answer(hits, clock.seconds)

    def _by_vectors(self, query, k: int, mode: str | None, keep, clock: _Clock):
        """(scores, positions) of the ``k`` passages nearest to the vector, best first."""
        found = self.index.search(
            query,
            k if mode is None else min(k * OVERSAMPLE, len(self.passages)),
            filter=keep,
        )
        clock.lap(f"{'binary' if self.kind == 'hybrid' else self.kind} search")
        if mode is not None:
            found = self.index.rescore(query, found.ids, by=mode)
        scores, rows = (part[0, :k] for part in found)
        scores, rows = scores[rows >= 0], rows[rows >= 0]
        if mode is not None:
            clock.lap("rescore")
        return scores, rows

    @property
    def stale(self) -> bool:
        """Whether other distributions are installed now than when the index was built."""
        return self.about["fingerprint"] != fingerprint()

    def save(self, path: str | os.PathLike) -> None:
        """Write everything to one file, atomically."""
        about, parts = {**self.about, "encoder": None}, {"passages": self.passages.arrays}
        if self.encoder is not None:
            about["encoder"], parts["encoder"] = self.encoder.name, self.encoder.sections()
            about["index"], parts["index"] = self.index.to_sections()
        if self.words is not None:
            about["words"], parts["words"] = self.words.to_sections()
        arrays = {f"{part}/{name}": a for part, named in parts.items() for name, a in named.items()}
        _file.write(path, KIND, about, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike, *, verify: bool = True) -> DocIndex:
        """Map a file written by `save`.

        Its header and sizes are always checked. ``verify`` compares every byte with its checksum:
        25 ms for the 104 MB of a full index, and never a silently wrong answer.

        Raises
        ------
        FormatError
            Not such a file, or a damaged one.
        FileNotFoundError
        """
        about, arrays = _file.read(path, KIND, mmap=True, verify=verify)
        parts: dict[str, dict[str, np.ndarray]]
        parts = {"passages": {}, "encoder": {}, "index": {}, "words": {}}
        try:
            for name, array in arrays.items():
                part, _, section = name.partition("/")
                parts[part][section] = array
            kind = about.get("kind", "binary")
            encoder = index = words = None
            if indexes.has_vectors(kind):
                encoder = ENCODERS[about["encoder"]].from_sections(parts["encoder"])
                index = indexes.from_sections(kind, about["index"], parts["index"])
            if indexes.has_words(kind):
                from .lexical import WordIndex

                words = WordIndex.from_sections(about["words"], parts["words"])
            return cls(PassageTable(parts["passages"]), encoder, index, about, words)
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path} is malformed: {error!r}") from error


class _Clock:
    """The seconds that each stage took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What went by since the lap before was this."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


def default_path(encoder: str = "lsa", index: str = "binary") -> Path:
    """Where the index of everything installed is kept: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parts = [encoder] if indexes.has_vectors(index) else []
    name = "-".join(parts if index == "binary" else [*parts, index])
    return Path(cache) / "pentad" / f"docs-{name}.pentad"


def recall(
    docs: DocIndex,
    vectors: np.ndarray,
    questions: Sequence[str],
    k: int = 10,
    *,
    rescore: str = "store",
) -> float:
    """The share of the true ``k`` best passages that the index finds, over all ``questions``.

    True is what every float product with ``vectors`` says, the ones the index was built from. Of
    "hybrid" it is the share that the vectors find.

    Raises
    ------
    ValueError
        The index has no vectors.
    """
    if docs.index is None:
        raise ValueError(f"an index of kind {docs.kind!r} has no vectors to compare with")
    queries = docs.encoder.encode(questions)
    k = min(k, len(vectors))
    found = docs.index.search(
        queries, k, rescore=indexes.modes(docs.kind)[rescore], oversample=OVERSAMPLE
    ).ids
    best = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, best, strict=True)]))
