# SPDX-License-Identifier: Apache-2.0
"""Search over product-quantized codes, with rescoring, filters, removal and files."""

from typing import NamedTuple

import numpy as np

from pentad._arrays import is_numpy, like, to_numpy
from pentad._checks import FLOATS, check_choice, check_count, check_dtype
from pentad._errors import FormatError
from pentad._index import Flat, Index, SearchResult, check_rising
from pentad._rows import Rows, check_store, quantize
from pentad.pq import _exact, _rows, _scan
from pentad.pq.assign import assign
from pentad.pq.train import train_codebooks

METRICS = ("l2", "ip", "cosine")
ROTATIONS = (None, "opq", "random_hadamard")
_LARGEST = 2.0**50  # of a component: its square, summed, is far from the end of float32
_TABLES = 1 << 25  # bytes of tables at a time
_ROWS = 1 << 16  # that are coded at a time


class _Input:
    """Vectors in float32, normalised for cosine; or codes, where the method takes them.

    used : how many of the dimensions the scan compares
    """

    def __init__(self, index, op: str, array, name: str, widths, codes=False):
        is_numpy(op, traced=False, **{name: array})
        if array.ndim != 2:
            raise ValueError(
                f"[{op}] {name} have shape {tuple(array.shape)}, expected (n, {widths[0]})"
            )
        check_dtype(op, name, array, ("uint8", *FLOATS) if codes else FLOATS)
        self.codes = self.floats = None
        if str(array.dtype).endswith("uint8"):
            self.codes = np.ascontiguousarray(to_numpy(array))
            if array.shape[1] != index.M:
                raise ValueError(
                    f"[{op}] {name} are codes of {array.shape[1]} subspaces, M is {index.M}"
                )
            if index.nbits < 8 and (self.codes >> index.nbits).any():
                raise ValueError(f"[{op}] {name} hold a code beyond {index.nbits} bits")
            return
        if array.shape[1] not in widths:
            accepted = " or ".join(map(str, widths))
            raise ValueError(f"[{op}] {name} have {array.shape[1]} columns, expected {accepted}")
        self.used = min(widths[-1], array.shape[1])
        with np.errstate(over="ignore"):  # what exceeds float32 becomes infinite, refused below
            floats = np.ascontiguousarray(to_numpy(array), dtype=np.float32)
        largest = np.maximum(floats.max(initial=0), -floats.min(initial=0))
        if not np.isfinite(largest):
            raise ValueError(f"[{op}] {name} hold a NaN or an infinity")
        if index.metric == "cosine":
            floats = _exact.normalized(floats)
        elif largest > _LARGEST:
            raise ValueError(f"[{op}] {name} hold a component beyond 2**50")
        self.floats = floats

    def __len__(self) -> int:
        return len(self.codes if self.floats is None else self.floats)


class Fitted(NamedTuple):
    """What training gives an index. With a rotation, centroids are those of rotated vectors.

    codebooks : (M, K, dsub) float32
    rotation : (dim, dim) float32 or None
    centroids : (lists, dim) float32 or None
    spread : (lists,) float32 or None
        How far the rows of a list lie from its centroid, for metrics of inner products.
    """

    codebooks: np.ndarray
    rotation: np.ndarray | None = None
    centroids: np.ndarray | None = None
    spread: np.ndarray | None = None


class QuantizedIndex(Index):
    """What the flat and the inverted index share: checks, codes, the order of results."""

    def __init__(self, dim, M, nbits, metric, rotation, store, factors=()):
        op = self._op("__init__")
        self.dim = check_count(op, "dim", dim, 1)
        self.M = check_count(op, "M", M, 1)
        if self.dim % self.M:
            raise ValueError(f"[{op}] dim is {dim}, which M = {M} subspaces do not divide")
        if check_count(op, "nbits", nbits) not in (4, 6, 8):
            raise ValueError(f"[{op}] nbits is {nbits!r}, expected 4, 6 or 8")
        self.nbits = int(nbits)
        check_choice(op, "metric", metric, METRICS)
        if rotation not in ROTATIONS:
            raise ValueError(
                f"[{op}] rotation is {rotation!r}, expected None, 'opq' or 'random_hadamard'"
            )
        check_store(op, store)
        self.metric, self.rotation, self.store = metric, rotation, store
        self._largest = metric != "l2"
        self._trained = None
        super().__init__(_rows.CodeLayout(self.dim, self.M, self.nbits, store, factors))

    @property
    def dsub(self) -> int:
        """Dimensions of a subspace."""
        return self.dim // self.M

    @property
    def codebooks(self):
        """(M, 2**nbits, dsub) float32, as `pentad.pq.lookup` takes them; None before training."""
        return None if self._trained is None else self._trained.codebooks

    @property
    def rotation_matrix(self):
        """(dim, dim) float32, codes are those of ``x @ rotation_matrix.T``; None without one."""
        return None if self._trained is None else self._trained.rotation

    # --- Training ---------------------------------------------------------------------------------

    def train(self, vectors, *, seed: int = 0, iterations: int = 10, progress=None) -> None:
        """Fit the codebooks to a sample of the vectors to come. The index must be empty.

        Parameters
        ----------
        vectors : (n, dim) float
            At least 2**nbits, and as many as there are lists; some 256 times that is a fair sample.
        seed : int
            The result depends on this and the vectors alone (with "opq" also on numpy's linear
            algebra, see `train_codebooks`).
        iterations : int
            Of k-means, see `kmeans`.
        progress : callable, optional
            Called with (stage, done, total).

        Raises
        ------
        ValueError, TypeError
            The index is unchanged.
        """
        op = self._op("train")
        given = self._input("train", vectors)
        least = self._least_sample()
        if len(given) < least:
            raise ValueError(f"[{op}] {len(given)} vectors, at least {least} are needed")
        iterations = check_count(op, "iterations", iterations)
        with self._writing:
            if len(self):
                raise ValueError(f"[{op}] the index already holds {len(self)} rows")
            self._trained = self._fit(given.floats, seed, iterations, progress)

    def _least_sample(self) -> int:
        return 2**self.nbits

    def _fit(self, x, seed, iterations, progress) -> Fitted:
        fitted = train_codebooks(
            *(x, self.M, self.nbits),
            rotation=self.rotation,
            iterations=iterations,
            seed=seed,
            progress=progress,
        )
        return Fitted(fitted.codebooks, fitted.rotation)

    def _ready(self, name):
        if self._trained is None:
            raise ValueError(f"[{self._op(name)}] the index is not trained; call train() first")

    # --- Content ----------------------------------------------------------------------------------

    def _input(self, name, array, what="vectors", dims=None) -> _Input:
        op = self._op(name)
        if dims is None:
            return _Input(self, op, array, what, (self.dim,), self._takes_codes(name))
        dims = check_count(op, "dims", dims, 1)
        if self.rotation is not None:
            raise ValueError(f"[{op}] dims is {dims}, but a rotation leaves no prefix to search by")
        if dims % self.dsub or dims > self.dim:
            raise ValueError(
                f"[{op}] dims is {dims}, expected a multiple of {self.dsub}, at most {self.dim}"
            )
        return _Input(self, op, array, what, (self.dim, dims))

    def _takes_codes(self, name) -> bool:
        return False

    def _rotated(self, x):
        rotation = self._trained.rotation
        return x if rotation is None else _exact.rotated(x, rotation)

    def _content(self, given) -> dict:
        if given.codes is not None:
            return {"codes": given.codes}
        x, starts = given.floats, range(0, max(len(given), 1), _ROWS)
        parts = [self._encoded(self._rotated(x[i : i + _ROWS])) for i in starts]
        encoded = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return encoded | quantize(x, self.store)

    def _encoded(self, x) -> dict:
        """Codes, and what else the rows of rotated vectors hold."""
        return {"codes": assign(x, self._trained.codebooks)}

    def _decoded(self, at):
        x = self._words(at)
        rotation = self._trained.rotation if self._trained else None
        return x if rotation is None else _exact.rotated(x, rotation.T)

    def _words(self, at):
        """The rotated vectors that the codes of rows stand for."""
        if not len(at):
            return np.zeros((0, self.dim), np.float32)
        codes = self._state.rows.codes(at)
        return self._trained.codebooks[np.arange(self.M), codes].reshape(len(at), self.dim)

    def add(self, vectors, ids=None) -> None:
        """Add rows.

        Parameters
        ----------
        vectors : (n, dim) float
            Components up to 2**50 (any, for cosine).
        ids : (n,) integers, optional
            Not negative, new, unique. By default the numbers after the largest present.

        Raises
        ------
        ValueError, TypeError
            The index is unchanged.
        """
        self._add(vectors, ids)

    def reconstruct(self, ids) -> np.ndarray:
        """What the index holds of `ids`: (n, dim) float32, stored vectors or else decoded ones.

        An id may be given more than once. For cosine they are the normalised vectors.
        """
        return self._reconstruct(ids)

    def codes(self, ids=None) -> np.ndarray:
        """(n, M) uint8 codes of `ids`, by default of all rows in their order."""
        return self._codes(ids)

    # --- Search -----------------------------------------------------------------------------------

    def _queries(self, given, nprobe):
        """(part, tables, ranges) of some queries at a time."""
        raise NotImplementedError

    def _parts(self, given, tables_per_query: int):
        """Slices of the queries whose tables take a bounded space."""
        size = tables_per_query * (given.used // self.dsub) * 2**self.nbits * 4
        step = max(1, _TABLES // size)
        return (slice(i, min(i + step, len(given))) for i in range(0, len(given), step))

    def _tables(self, x):
        books = self._trained.codebooks[: x.shape[1] // self.dsub]
        return _scan.tables(x, books, "l2" if self.metric == "l2" else "ip")

    def _as_scores(self, costs, given):
        """Costs are the scores of l2 and the negated ones of inner products."""
        return costs if self.metric == "l2" else 0 - costs

    def _search(self, queries, k, keep, rescore, oversample, dims, nprobe=None) -> SearchResult:
        op, rows = self._op("search"), self._state.rows
        self._ready("search")
        k = check_count(op, "k", k)
        by = self._rescored_by(op, rescore)
        oversample = check_count(op, "oversample", oversample, 1)
        given = self._input("search", queries, "queries", dims)
        mask = self._mask("search", keep)
        candidates = k if by is None else min(k * oversample, rows.count)
        costs = np.empty((len(given), candidates), np.float32)
        found = np.empty((len(given), candidates), np.int64)
        for part, tables, ranges in self._queries(given, nprobe):
            costs[part], found[part] = _rows.topk(rows, tables, candidates, mask, ranges)
        scores = self._as_scores(costs, given)
        if by is not None:
            scores, found = self._best(given, found, by, k)
        return SearchResult(like(queries, scores), like(queries, found))

    def _range_search(self, queries, radius, keep, dims, nprobe=None) -> tuple:
        self._ready("range_search")
        given = self._input("range_search", queries, "queries", dims)
        radius = self._radius(radius)
        mask = self._mask("range_search", keep)
        most = radius if self.metric == "l2" else -radius
        found = [
            _rows.range_search(self._state.rows, tables, most, mask, ranges)
            for _, tables, ranges in self._queries(given, nprobe)
        ]
        sizes = [np.zeros(1, np.int64), *(np.diff(indptr) for indptr, _, _ in found)]
        costs = [np.zeros(0, np.float32), *(costs for _, costs, _ in found)]
        ids = [np.zeros(0, np.int64), *(ids for _, _, ids in found)]
        result = (
            np.cumsum(np.concatenate(sizes)),
            self._as_scores(np.concatenate(costs), given),
            np.concatenate(ids),
        )
        return tuple(like(queries, part) for part in result)

    def _scores(self, rows, given, at, by):
        return _rows.rescore(rows, given.floats, at, self.metric == "l2")

    def rescore(self, queries, ids, *, by="store") -> SearchResult:
        """Order candidates, such as the ids of a search, by the metric with their stored vectors.

        ``search(q, k, rescore="store", oversample=m)`` is ``search(q, k * m)``, this, and its first
        k columns; apart, the two can be timed, or candidates of several searches merged.

        Parameters
        ----------
        queries : (nq, dim) float
        ids : (nq, c) int64
            -1 and unknown ids come last, as -1.
        by : {"store"}

        Returns
        -------
        SearchResult
            scores : (nq, c) float32, those of the metric. ids : (nq, c) int64, ties in rising
            order.
        """
        return self._rescore(queries, ids, by)

    # --- Files ------------------------------------------------------------------------------------

    def _trained_arrays(self) -> dict:
        parts = {} if self._trained is None else self._trained._asdict()
        return {name: part for name, part in parts.items() if part is not None}

    def _read_trained(self, arrays, shapes: dict) -> None:
        """What training gave, of these shapes, or nothing of it."""
        shapes = {"codebooks": (self.M, 2**self.nbits, self.dsub)} | shapes
        if self.rotation is not None:
            shapes["rotation"] = (self.dim, self.dim)
        if not shapes.keys() & arrays.keys():
            return
        for name, shape in shapes.items():
            part = arrays.get(name)
            if (
                part is None
                or part.shape != shape
                or part.dtype != np.float32
                or not (np.abs(part) <= _LARGEST).all()
            ):
                raise FormatError(f"section {name} does not fit the index")
        self._trained = Fitted(**{name: arrays[name] for name in shapes})

    def _check_rows(self) -> None:
        rows = self._state.rows
        if len(self) and self._trained is None:
            raise FormatError("the index holds rows but was not trained")
        rows.layout.check(rows)


class PQIndex(QuantizedIndex):
    """Exhaustive search over product-quantized codes.

    A vector is cut into M parts, each replaced by the nearest of 2**nbits centroids; a query is
    compared with the centroids, exactly (asymmetric distances: Jegou, Douze and Schmid 2011,
    "Product quantization for nearest neighbor search", equation 13). Results are those of a scan of
    all codes, ties by smaller id, whatever the instruction set, threads and batch.

    Parameters
    ----------
    dim : int
        A multiple of M.
    M : int
        Subspaces: a row takes ``M * nbits / 8`` bytes (6 bits take 8).
    nbits : {8, 6, 4}
        Of a code. 4 bits scan fastest.
    metric : {"l2", "ip", "cosine"}
        Squared distance, smaller first; inner product, larger first; that of vectors that are
        normalised as they come in, queries too. A zero vector stays zero.
    rotation : {None, "opq", "random_hadamard"}
        Turn vectors before they are cut: as training finds best (Ge et al. 2013, "Optimized product
        quantization"), or at random.
    store : {None, "float16", "int8"}
        Keep the vectors too, for rescoring.

    Notes
    -----
    Rows are kept in the order of their ids. Adding rising ids appends; other ids, `remove` and
    `update` copy the rows. A search works on the state that it found when it began, whatever other
    threads add or remove meanwhile; writers wait for each other.

    Examples
    --------
    >>> import numpy as np
    >>> vectors = np.random.default_rng(0).standard_normal((2000, 32), np.float32)
    >>> index = pentad.pq.PQIndex(32, M=8, nbits=4, store="float16")
    >>> index.train(vectors)
    >>> index.add(vectors)
    >>> index.search(vectors[:2], k=3, rescore="float16").ids[:, 0]
    array([0, 1])
    """

    _kind = "pq.PQIndex"
    _options = ("dim", "M", "nbits", "metric", "rotation", "store")

    def __init__(
        self, dim: int, M: int, nbits: int = 8, *, metric: str = "l2", rotation=None, store=None
    ):
        super().__init__(dim, M, nbits, metric, rotation, store)

    def set_codebooks(self, codebooks, rotation=None) -> None:
        """Use codebooks made elsewhere, such as a layer's, in place of `train`.

        Then `add` and `update` also take the codes alone, (n, M) uint8, unless vectors are stored.

        Parameters
        ----------
        codebooks : (M, 2**nbits, dsub) float
        rotation : (dim, dim) float, optional
            Orthogonal, where the index was made with one: codes are those of ``x @ rotation.T``.
        """
        op = self._op("set_codebooks")
        arrays = {"codebooks": codebooks}
        if rotation is not None:
            arrays["rotation"] = rotation
        if (rotation is None) != (self.rotation is None):
            raise ValueError(f"[{op}] rotation does not fit an index made with {self.rotation!r}")
        is_numpy(op, **arrays)
        for name, array in arrays.items():
            check_dtype(op, name, array, FLOATS)
            arrays[name] = np.array(to_numpy(array), np.float32, order="C")
        with self._writing:
            if len(self):
                raise ValueError(f"[{op}] the index already holds {len(self)} rows")
            try:
                self._read_trained(arrays, {})
            except FormatError:
                shape = (self.M, 2**self.nbits, self.dsub)
                raise ValueError(
                    f"[{op}] expected finite codebooks of shape {shape}, and a rotation of "
                    f"{(self.dim, self.dim)} where there is one"
                ) from None

    def _takes_codes(self, name):
        return name in ("add", "update") and self.store is None

    def _queries(self, given, nprobe=None):
        x = self._rotated(given.floats)[:, : given.used]
        for part in self._parts(given, 1):
            yield part, self._tables(np.ascontiguousarray(x[part])), None

    def search(
        self, queries, k, *, filter=None, rescore=None, oversample=4, dims=None
    ) -> SearchResult:
        """The k best rows of each query.

        Parameters
        ----------
        queries : (nq, dim) float, or (nq, dims)
        k : int
        filter : (n,) bool, or a list of ids, optional
            Rows that may be returned: a mask over the rows in the order of `ids`, or the ids
            themselves (unknown ones are passed over).
        rescore : {None, "store", "float16", "int8"}
            Take ``k * oversample`` candidates by their codes, then order them by the metric with
            their stored vectors: "store" or the type that is stored.
        oversample : int
        dims : int, optional
            Search by the first `dims` dimensions alone, a multiple of dsub, where there is no
            rotation; for vectors whose prefixes are embeddings (Kusupati et al. 2022, "Matryoshka
            representation learning"; Rege et al. 2023, "AdANNS"). Rescoring compares all columns
            that the queries have, and cosine normalises all of them.

        Returns
        -------
        SearchResult
            scores : (nq, k) float32, l2: squared distances, smaller first; else inner products,
            larger first. ids : (nq, k) int64, ties in rising order, -1 where fewer than k rows
            exist.

        Raises
        ------
        ValueError
            Also before `train`.
        """
        return self._view()._search(queries, k, filter, rescore, oversample, dims)

    def range_search(self, queries, radius, *, filter=None, dims=None):
        """Every row of a squared distance up to `radius`, or of an inner product of at least that.

        Other arguments as in `search`.

        Returns
        -------
        indptr : (nq + 1,) int64
            The rows of query q stand at ``indptr[q]`` to ``indptr[q + 1]``, ids rising.
        scores : (total,) float32
        ids : (total,) int64
        """
        return self._view()._range_search(queries, radius, filter, dims)

    def to_sections(self):
        """(meta, arrays) for a file that embeds this index; see `from_sections`.

        The arrays are the index's own: an `add` before they are written may change the last block.
        """
        return self._meta(), self._state.rows.arrays() | self._trained_arrays()

    @classmethod
    def from_sections(cls, meta: dict, arrays: dict) -> "PQIndex":
        """Rebuild an index from `to_sections`; the arrays are used as they are.

        Raises
        ------
        FormatError
            If they do not fit each other.
        """
        index = cls._made(meta)
        also = ("codebooks", "rotation") if index.rotation else ("codebooks",)
        index._state = Flat(Rows.from_arrays(index._layout, arrays, also))
        check_rising(index.ids)
        index._read_trained(arrays, {})
        index._check_rows()
        return index


__all__ = ["PQIndex", "QuantizedIndex"]
