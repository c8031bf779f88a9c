# SPDX-License-Identifier: Apache-2.0
"""The rows of an index: blocked codes and, beside them, ids and stored vectors."""

import dataclasses

import numpy as np

from pentad import _C
from pentad._arrays import aligned_zeros
from pentad._errors import FormatError

STORES = (None, "int8", "float16")
_LARGEST_SCALE = np.finfo(np.float32).max / 127


def check_store(op: str, store) -> None:
    if store not in STORES:
        raise ValueError(f"[{op}] store is {store!r}, expected one of None, 'int8', 'float16'")


def stored_columns(dim: int, store) -> dict:
    """The columns of `Layout.columns` that keep vectors."""
    columns = {} if store is None else {"vectors": ((dim,), store)}
    return columns | ({"scale": ((), "float32")} if store == "int8" else {})


def quantize(vectors: np.ndarray, store) -> dict[str, np.ndarray]:
    """The columns that keep float32 `vectors`; none for store=None.

    int8 is symmetric per vector: x ~ scale * q with scale = max|x| / 127.
    """
    if store is None:
        return {}
    if store == "float16":
        return {"vectors": np.clip(vectors, -65504, 65504).astype(np.float16)}
    largest = np.abs(vectors).max(axis=1, initial=0.0)
    # No scale below the normal numbers: its few bits would round q past 127, or be zero.
    scale = np.maximum(largest / 127, np.finfo(np.float32).tiny)
    return {"vectors": np.rint(vectors / scale[:, None]).astype(np.int8), "scale": scale}


class Layout:
    """What a row holds, for the rows of every index of one kind.

    block : int
        Rows per block.
    blocks : (shape, dtype)
        Of one block of codes.
    columns : dict of name -> (shape, dtype)
        What stands beside the codes, per row: "ids" always, "vectors" and "scale" as
        `stored_columns` says, and what the kind adds. They are sections of the file in this order.
    """

    block: int
    blocks: tuple
    columns: dict

    def write(self, rows: "Rows", first: int, codes: np.ndarray) -> None:
        """Write row-major codes, and the columns derived from them, to rows [first, first + n)."""
        raise NotImplementedError

    def read(self, rows: "Rows", positions: np.ndarray) -> np.ndarray:
        """The row-major codes at `positions`, a contiguous int64 array."""
        raise NotImplementedError

    def padded(self, count: int) -> int:
        """Rows rounded up to whole blocks."""
        return -(-count // self.block) * self.block


@dataclasses.dataclass(frozen=True)
class Rows:
    """One state of an index. Never changed where a search may look: writers publish a new one.

    What is written to rows and read from them is their `content`: a dict of "codes", row-major, and
    of the columns.

    blocks : (capacity / layout.block, ...)
    columns : dict of (capacity, ...)
    """

    layout: Layout
    count: int
    blocks: np.ndarray
    columns: dict[str, np.ndarray]

    @classmethod
    def empty(cls, layout: Layout, capacity: int = 0) -> "Rows":
        capacity = layout.padded(capacity)
        shape, dtype = layout.blocks
        return cls(
            layout=layout,
            count=0,
            blocks=aligned_zeros((capacity // layout.block, *shape), dtype),
            columns={
                name: aligned_zeros((capacity, *shape), dtype)
                for name, (shape, dtype) in layout.columns.items()
            },
        )

    @classmethod
    def of(cls, layout: Layout, content: dict) -> "Rows":
        """Rows that hold `content` and nothing else."""
        count = len(content["ids"])
        rows = cls.empty(layout, count)
        rows.write(0, content)
        return rows.counting(count)

    @property
    def capacity(self) -> int:
        return len(self.columns["ids"])

    def used(self, name: str):
        """The column of the rows that count; None where this kind of index has none."""
        column = self.columns.get(name)
        return None if column is None else column[: self.count]

    @property
    def ids(self) -> np.ndarray:
        return self.used("ids")

    def counting(self, count: int) -> "Rows":
        return dataclasses.replace(self, count=count)

    def grown(self, capacity: int) -> "Rows":
        """A copy with room for `capacity` rows."""
        capacity = self.layout.padded(capacity)

        def copy(array, length):
            out = aligned_zeros((length, *array.shape[1:]), array.dtype)
            out[: len(array)] = array[:length]
            return out

        return dataclasses.replace(
            self,
            blocks=copy(self.blocks, capacity // self.layout.block),
            columns={name: copy(column, capacity) for name, column in self.columns.items()},
        )

    def write(self, first: int, content: dict) -> None:
        """Fill rows [first, first + n) that no published state counts yet."""
        rows = slice(first, first + len(content["ids"]))
        for name in self.columns.keys() & content.keys():
            self.columns[name][rows] = content[name]
        self.layout.write(self, first, content["codes"])

    def codes(self, positions: np.ndarray) -> np.ndarray:
        return self.layout.read(self, np.ascontiguousarray(positions))

    def content(self, positions: np.ndarray) -> dict:
        columns = {name: column[positions] for name, column in self.columns.items()}
        return {"codes": self.codes(positions)} | columns

    def vectors(self, positions: np.ndarray) -> np.ndarray:
        """The stored vectors, (*positions.shape, dim) float32."""
        vectors = self.columns["vectors"][positions].astype(np.float32)
        scale = self.columns.get("scale")
        return vectors if scale is None else vectors * scale[positions][..., None]

    # --- Files ------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        used = self.blocks[: self.layout.padded(self.count) // self.layout.block]
        return {"blocks": used} | {name: self.used(name) for name in self.columns}

    @classmethod
    def from_arrays(cls, layout: Layout, arrays: dict, also=()) -> "Rows":
        """Raises FormatError where the arrays do not fit each other, or are none of an index.

        `also` names those that are read elsewhere.
        """
        count = arrays["ids"].size if "ids" in arrays else 0
        shape, dtype = layout.blocks
        wanted = {"blocks": ((layout.padded(count) // layout.block, *shape), dtype)}
        wanted |= {
            name: ((count, *shape), dtype) for name, (shape, dtype) in layout.columns.items()
        }
        for name, (shape, dtype) in wanted.items():
            have = arrays.get(name)
            if have is None or have.dtype != np.dtype(dtype) or have.shape != shape:
                raise FormatError(f"section {name} does not fit an index of {count} rows")
        unknown = arrays.keys() - wanted.keys() - set(also)
        if unknown:
            raise FormatError(f"section {min(unknown)} is none of such an index")
        columns = {name: arrays[name] for name in layout.columns}
        scale = columns.get("scale")
        if scale is not None and not ((scale >= 0) & (scale <= _LARGEST_SCALE)).all():
            raise FormatError("the scales of stored vectors are negative or not finite")
        return cls(layout=layout, count=count, blocks=arrays["blocks"], columns=columns)


def best_scores(scores, ids, k, *, largest=True):
    """The k best of scored candidates (nq, c) by (score, id), as (scores, ids) padded with -1.

    Candidates of id -1 have the worst score.
    """
    best = np.full((len(scores), k), -np.inf if largest else np.inf, np.float32)
    best_ids = np.full((len(scores), k), -1, np.int64)
    _C.best_of(np.ascontiguousarray(scores), np.ascontiguousarray(ids), largest, best, best_ids)
    return best, best_ids
