# SPDX-License-Identifier: Apache-2.0
"""Passages, and the tables of strings that keep many of them in a mapped file.

A table is one blob of UTF-8 bytes and the offsets between its strings: opening one reads nothing,
and asking for one string touches only its own bytes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("module", "class", "function", "topic")

Progress = Callable[[str, int, int], None]  # stage, done, total; total 0 where it cannot be told


def watched(items: Sequence, stage: str, progress: Progress) -> Iterator:
    """The items, telling ``progress`` about every hundredth part of them."""
    step = max(1, len(items) // 100)
    for done, item in enumerate(items, 1):
        yield item
        if done % step == 0 or done == len(items):
            progress(stage, done, len(items))


class Passage(NamedTuple):
    """One docstring and where it is written.

    ``name`` is the import path (``gzip.open``), ``line`` that of the ``def`` or ``class`` (0 where
    there is no source), ``copies`` how many more objects of that name carry the very same text.
    """

    name: str
    kind: str
    distribution: str
    file: str
    line: int
    text: str
    copies: int = 0

    @property
    def first_line(self) -> str:
        """The first line that says something; some texts begin with a rule."""
        lines = self.text.splitlines()
        return next((line.strip() for line in lines if any(map(str.isalnum, line))), "")

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


def is_within(name: str, package: str) -> bool:
    """Whether the import path ``name`` is ``package`` or inside it."""
    return name.startswith(package) and name[len(package) :][:1] in ("", ".")


def is_distribution(label: str, package: str) -> bool:
    """Whether ``label``, a distribution's name and version, is the one called ``package``."""
    return _canonical(label.split(" ")[0]) == _canonical(package)


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


class Strings:
    """An immutable list of strings in two arrays: ``blob`` uint8, ``offsets`` int64 (n + 1,)."""

    def __init__(self, blob: np.ndarray, offsets: np.ndarray):
        self.blob, self.offsets = blob, offsets

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        # A docstring may spell a lone surrogate, which UTF-8 cannot: it becomes a question mark.
        encoded = [string.encode("utf-8", "replace") for string in strings]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(data) for data in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def data(self, i: int) -> bytes:
        return self.blob[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def __getitem__(self, i: int) -> str:
        # "replace", so that a file damaged after it was checked still prints.
        return self.data(i).decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        blob, offsets = self.blob.tobytes(), self.offsets.tolist()
        for first, last in itertools.pairwise(offsets):
            yield blob[first:last].decode("utf-8", "replace")

    def find(self, string: str) -> int:
        """Position of ``string`` in a table sorted by its bytes, -1 where it has none."""
        wanted = string.encode("utf-8", "replace")
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.data(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self.data(low) == wanted else -1


class PassageTable:
    """The passages of an index file as columns; ``table[i]`` decodes one passage."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self._arrays = arrays
        self.names = self._strings("names")
        self.texts = self._strings("texts")
        self.files = self._strings("files")
        self.distributions = self._strings("distributions")

    def _strings(self, column: str) -> Strings:
        return Strings(self._arrays[column], self._arrays[f"{column}.offsets"])

    @classmethod
    def of(cls, passages: list[Passage]) -> PassageTable:
        files, file = _distinct(passage.file for passage in passages)
        distributions, distribution = _distinct(passage.distribution for passage in passages)
        tables = {
            "names": Strings.of(passage.name for passage in passages),
            "texts": Strings.of(passage.text for passage in passages),
            "files": Strings.of(files),
            "distributions": Strings.of(distributions),
        }
        arrays = {
            "file": file,
            "distribution": distribution,
            "kind": np.array([KINDS.index(passage.kind) for passage in passages], np.uint8),
            "line": np.array([passage.line for passage in passages], np.int32),
            "copies": np.array([passage.copies for passage in passages], np.int32),
        }
        for column, strings in tables.items():
            arrays[column], arrays[f"{column}.offsets"] = strings.blob, strings.offsets
        return cls(arrays)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The columns by name, as they go into a file."""
        return self._arrays

    def of_packages(self, packages: Iterable[str]) -> np.ndarray:
        """Which passages belong to any of the packages, bool (n,).

        A package is an import path or a distribution.

        Raises
        ------
        LookupError
            Where a package has no passage.
        """
        names, labels = list(self.names), list(self.distributions)
        chosen = np.zeros(len(self), bool)
        for package in packages:
            fits = np.array([is_distribution(label, package) for label in labels], bool)
            fitting = fits[self._arrays["distribution"]]
            fitting |= np.array([is_within(name, package) for name in names], bool)
            if not fitting.any():
                raise LookupError(f"the index has no package called {package!r}")
            chosen |= fitting
        return chosen

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Passage:
        row = self._arrays
        return Passage(
            name=self.names[i],
            kind=KINDS[row["kind"][i]],
            distribution=self.distributions[row["distribution"][i]],
            file=self.files[row["file"][i]],
            line=int(row["line"][i]),
            text=self.texts[i],
            copies=int(row["copies"][i]),
        )


def _distinct(values: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """The distinct values in order of appearance, and which of them each value is (int32)."""
    number: dict[str, int] = {}
    column = [number.setdefault(value, len(number)) for value in values]
    return list(number), np.array(column, np.int32)
