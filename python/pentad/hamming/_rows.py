# SPDX-License-Identifier: Apache-2.0
"""The rows of an index: blocked codes, ids and stored vectors, and the search over them."""

import dataclasses

import numpy as np

from pentad import _C
from pentad._arrays import aligned_zeros
from pentad._errors import FormatError
from pentad.hamming import _kernels

BLOCK = _C.hamming_block_rows
STORES = (None, "int8", "float16")


def padded(rows: int) -> int:
    """Rows rounded up to whole blocks."""
    return -(-rows // BLOCK) * BLOCK


def quantize(vectors: np.ndarray, store):
    """The stored form of float32 vectors: (int8, scale), (float16, None) or (None, None).

    int8 is symmetric per vector: x ~ scale * q with scale = max|x| / 127.
    """
    if store is None:
        return None, None
    if store == "float16":
        return np.clip(vectors, -65504, 65504).astype(np.float16), None
    largest = np.abs(vectors).max(axis=1, initial=0.0)
    # No scale below the normal numbers: its few bits would round q past 127, or be zero.
    scale = np.maximum(largest / 127, np.finfo(np.float32).tiny)
    return np.rint(vectors / scale[:, None]).astype(np.int8), scale


@dataclasses.dataclass(frozen=True)
class Rows:
    """One state of an index. Never changed where a search may look: writers publish a new one.

    blocks : (capacity / 32, words, 32) uint16, see csrc/hamming/hamming.h
    ones : (capacity,) uint16, popcounts, for jaccard only
    ids : (capacity,) int64
    vectors : (capacity, dim) int8 or float16, scale : (capacity,) float32, where vectors are stored
    """

    count: int
    bytes: int
    blocks: np.ndarray
    ones: np.ndarray | None
    ids: np.ndarray
    vectors: np.ndarray | None
    scale: np.ndarray | None

    @classmethod
    def empty(cls, capacity: int, dim: int, metric: str, store) -> "Rows":
        width, capacity = -(-dim // 8), padded(capacity)
        return cls(
            count=0,
            bytes=width,
            blocks=aligned_zeros((capacity // BLOCK, _C.hamming_words(width), BLOCK), np.uint16),
            ones=np.zeros(capacity, np.uint16) if metric == "jaccard" else None,
            ids=np.zeros(capacity, np.int64),
            vectors=np.zeros((capacity, dim), store) if store else None,
            scale=np.zeros(capacity, np.float32) if store == "int8" else None,
        )

    @property
    def capacity(self) -> int:
        return len(self.ids)

    def grown(self, capacity: int) -> "Rows":
        """A copy with room for `capacity` rows."""
        capacity = padded(capacity)

        def copy(array, length):
            if array is None:
                return None
            out = aligned_zeros((length, *array.shape[1:]), array.dtype)
            out[: len(array)] = array[:length]
            return out

        return dataclasses.replace(
            self,
            blocks=copy(self.blocks, capacity // BLOCK),
            **{
                name: copy(getattr(self, name), capacity)
                for name in ("ones", "ids", "vectors", "scale")
            },
        )

    def write(self, first: int, codes, ids, vectors, scale) -> None:
        """Fill rows [first, first + n) that no published state counts yet."""
        _C.hamming_to_blocks(codes, first, self.blocks, self.ones)
        rows = slice(first, first + len(ids))
        self.ids[rows] = ids
        if self.vectors is not None:
            self.vectors[rows] = vectors
        if self.scale is not None:
            self.scale[rows] = scale

    def codes(self, positions: np.ndarray) -> np.ndarray:
        """(n, bytes) uint8, the row-major codes at `positions`."""
        out = np.empty((len(positions), self.bytes), np.uint8)
        _C.hamming_from_blocks(self.blocks, self.count, np.ascontiguousarray(positions), out)
        return out

    def content(self, positions: np.ndarray):
        """(codes, ids, vectors, scale) at `positions`, as `write` takes them."""
        return (
            self.codes(positions),
            self.ids[positions],
            None if self.vectors is None else self.vectors[positions],
            None if self.scale is None else self.scale[positions],
        )

    # --- Search -----------------------------------------------------------------------------------

    def _where(self, mask, ids, ranges):
        ids = self.ids[: self.count] if ids else None
        return (self.blocks, self.count, self.ones_used, mask, ids, *(ranges or (None, None, None)))

    @property
    def ones_used(self):
        return None if self.ones is None else self.ones[: self.count]

    def topk(self, codes, k, metric, mask=None, *, ids=False, ranges=None):
        """(values, positions), or with ids=True (values, ids); the order is (value, that)."""
        values = np.empty((len(codes), k), _kernels.value_dtype(metric))
        found = np.empty((len(codes), k), np.int64)
        _C.hamming_topk(codes, *self._where(mask, ids, ranges), metric, values, found)
        return values, found

    def range_search(self, codes, radius, metric, mask=None, *, ids=True, ranges=None):
        found = _C.hamming_range(codes, *self._where(mask, ids, ranges), metric, radius)
        return _kernels.write_range(codes, found, metric)

    def rescore(self, x, positions, mode: str) -> np.ndarray:
        """float32 scores of the candidate positions (nq, c); -inf where the position is -1."""
        out = np.empty(positions.shape, np.float32)
        if mode == "bits":
            _C.hamming_score_candidates(x, self.blocks, self.count, positions, out)
        else:
            vectors = self.vectors[: self.count]
            scale = None if self.scale is None else self.scale[: self.count]
            _C.hamming_dot_candidates(x, vectors, scale, positions, out)
        return out

    # --- Files ------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        used = {"blocks": self.blocks[: padded(self.count) // BLOCK]}
        for name in ("ones", "ids", "vectors", "scale"):
            if getattr(self, name) is not None:
                used[name] = getattr(self, name)[: self.count]
        return used

    @classmethod
    def from_arrays(cls, arrays: dict, dim: int, metric: str, store) -> "Rows":
        """Raises FormatError where the arrays do not fit each other."""
        expected = cls.empty(0, dim, metric, store)
        values, count = {}, arrays["ids"].size if "ids" in arrays else 0
        for name in ("blocks", "ones", "ids", "vectors", "scale"):
            want = getattr(expected, name)
            have = arrays.get(name)
            if want is None and have is None:
                values[name] = None
                continue
            rows = padded(count) // BLOCK if name == "blocks" else count
            if (
                want is None
                or have is None
                or have.dtype != want.dtype
                or have.shape != (rows, *want.shape[1:])
            ):
                raise FormatError(
                    f"section {name} does not fit an index of dim {dim}, {count} rows"
                )
            values[name] = have
        return cls(count=count, bytes=expected.bytes, **values)


def best_scores(scores, ids, k):
    """The k best of scored candidates (nq, c) by (score, id), as (scores, ids) padded with -1."""
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    short = ((0, 0), (0, k - order.shape[1]))
    return (
        np.pad(np.take_along_axis(scores, order, 1), short, constant_values=-np.inf),
        np.pad(np.take_along_axis(ids, order, 1), short, constant_values=-1),
    )
