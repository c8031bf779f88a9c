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
from .installed import fingerprint
from .passages import Passage, PassageTable, Progress

KIND = "docsearch"
RESCORE = indexes.modes("binary")  # of other kinds: without "bits"

# Candidates rescored for each answer wanted. Recall@10 of "store" over 62,500 passages: 0.956 with
# 4, 0.990 with 10, 0.997 with 20 ("bits" 0.79, "none" 0.69). Finding 10 takes 0.10 ms, finding and
# rescoring 200 takes 0.23 ms.
OVERSAMPLE = 20


class Hit(NamedTuple):
    """One answer; a larger score is better, but unrescored ones of "binary" are distances."""

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

    def __init__(self, passages: PassageTable, encoder, index, about: dict):
        self.passages, self.encoder, self.index, self.about = passages, encoder, index, about

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
            ``"lsa"`` or ``"minilm"``.
        index : str
            Its kind: ``"binary"``, ``"pq"``, ``"scalar"`` or ``"rabitq"``.
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
        require(ENCODERS[encoder])
        sources = corpus.sources(folders)
        if packages:
            sources = corpus.restrict(sources, packages)
        found = corpus.read(sources, processes=processes, progress=progress)
        if not found.passages:
            raise ValueError("there are no docstrings to index")
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
        vectors: np.ndarray,
        about: dict,
        index: str = "binary",
        progress: Progress | None = None,
    ) -> DocIndex:
        """Index ``passages`` by their encoder's ``vectors``, float32 (len(passages), dim)."""
        made = indexes.make(index, vectors, progress)
        return cls(PassageTable.of(passages), encoder, made, {**about, "kind": index})

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
            float question.
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
        start = time.perf_counter()
        query = self.encoder.encode([question])
        encoded = time.perf_counter()
        if not query.any():  # not one known word
            return Answer([], {"encode": encoded - start})
        mode = modes[rescore]
        k = min(k, len(self.passages))
        found = self.index.search(
            query,
            k if mode is None else min(k * OVERSAMPLE, len(self.passages)),
            filter=self.passages.of_packages(packages) if packages else None,
        )
        searched = time.perf_counter()
        if mode is not None:
            found = self.index.rescore(query, found.ids, by=mode)
        try:
            hits = [
                Hit(score, self.passages[row])
                for score, row in zip(*(part[0, :k].tolist() for part in found), strict=True)
                if row >= 0
            ]
        except IndexError as error:
            raise FormatError("the index names passages that it does not hold") from error
        seconds = {"encode": encoded - start, f"{self.kind} search": searched - encoded}
        if mode is not None:
            seconds["rescore"] = time.perf_counter() - searched
        return Answer(hits, seconds)

    @property
    def stale(self) -> bool:
        """Whether other distributions are installed now than when the index was built."""
        return self.about["fingerprint"] != fingerprint()

    def save(self, path: str | os.PathLike) -> None:
        """Write everything to one file, atomically."""
        meta, arrays = self.index.to_sections()
        parts = {
            "passages": self.passages.arrays,
            "encoder": self.encoder.sections(),
            "index": arrays,
        }
        _file.write(
            path,
            KIND,
            {**self.about, "encoder": self.encoder.name, "index": meta},
            {f"{part}/{name}": a for part, arrays in parts.items() for name, a in arrays.items()},
        )

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
        parts: dict[str, dict[str, np.ndarray]] = {"passages": {}, "encoder": {}, "index": {}}
        try:
            for name, array in arrays.items():
                part, _, section = name.partition("/")
                parts[part][section] = array
            encoder = ENCODERS[about["encoder"]].from_sections(parts["encoder"])
            kind = about.get("kind", "binary")
            index = indexes.from_sections(kind, about["index"], parts["index"])
            return cls(PassageTable(parts["passages"]), encoder, index, about)
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path} is malformed: {error!r}") from error


def default_path(encoder: str = "lsa", index: str = "binary") -> Path:
    """Where the index of everything installed is kept: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = encoder if index == "binary" else f"{encoder}-{index}"
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

    True is what every float product with ``vectors`` says, the ones the index was built from.
    """
    queries = docs.encoder.encode(questions)
    k = min(k, len(vectors))
    found = docs.index.search(
        queries, k, rescore=indexes.modes(docs.kind)[rescore], oversample=OVERSAMPLE
    ).ids
    best = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, best, strict=True)]))
