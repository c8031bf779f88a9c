# SPDX-License-Identifier: Apache-2.0
"""Approximate search over product-quantized codes: an inverted file of lists around centroids."""

import numpy as np

from pentad._checks import check_count
from pentad._index import SearchResult
from pentad._lists import InvertedIndex
from pentad.pq import _exact, _rows, _scan
from pentad.pq.assign import assign, nearest
from pentad.pq.index import Fitted, QuantizedIndex
from pentad.pq.kmeans import kmeans
from pentad.pq.train import train_codebooks

_ROWS = 256  # per list that train its centroid, as `train_codebooks` takes them

# The best of a list's rows is about so many deviations better than its centroid: of n Gaussians the
# largest is near sqrt(2 log n), 3.3 to 3.7 for lists of 250 to 1,000. Lists to visit that have 95 %
# of the ten best of 75,000 embedded passages (of a million with copies): by the products with the
# centroids alone 34 (32), by cosines 26 (18), with 2 deviations 30 (21), 3: 26 (16), 4: 24 (14).
_REACH = 4.0


class IVFPQIndex(QuantizedIndex, InvertedIndex):
    """Search in the `nprobe` lists that are most promising for the query.

    Rows stand in the list of the nearest centroid and, with `residual`, their codes are those of
    what the centroid leaves of the vector (IVFADC: Jegou, Douze and Schmid 2011, "Product
    quantization for nearest neighbor search", section 4). The lists of the nearest centroids are
    visited; with inner products those where ``q . c + 4 |q| s`` is largest, s being the deviation
    of the list's rows from their centroid c: a wide list may have a better best row than a narrow
    one. Scores and order are exact over the lists that are visited, ties by smaller id, whatever
    the instruction set, threads and batch.

    Parameters
    ----------
    dim, M, nbits, metric, rotation, store
        As in `PQIndex`.
    lists : int
        At most 65,536. About the square root of the number of rows is a fair start.
    nprobe : int
        Lists visited per query; an attribute that may be set. ``nprobe = lists`` is exhaustive.
    residual : bool
        Whether codes are those of residuals.
    coarse_dims : int, optional
        Choose lists by the first `coarse_dims` dimensions alone (Rege et al. 2023, "AdANNS"); not
        with a rotation.

    Notes
    -----
    Every change rebuilds the lists, so add in large batches. Snapshots are as in `PQIndex`.

    Examples
    --------
    >>> import numpy as np
    >>> vectors = np.random.default_rng(0).standard_normal((2000, 32), np.float32)
    >>> index = pentad.pq.IVFPQIndex(32, M=8, nbits=4, lists=16, nprobe=4, store="int8")
    >>> index.train(vectors)
    >>> index.add(vectors)
    >>> index.search(vectors[:2], k=1, rescore="store").ids
    array([[0],
           [1]])
    """

    _kind = "pq.IVFPQIndex"
    _options = (
        *("dim", "M", "nbits", "metric", "rotation", "store"),
        *("lists", "nprobe", "residual", "coarse_dims"),
    )

    def __init__(
        self,
        dim: int,
        M: int,
        nbits: int = 8,
        *,
        lists: int,
        metric: str = "l2",
        rotation=None,
        store=None,
        nprobe: int = 8,
        residual: bool = True,
        coarse_dims=None,
    ):
        self._biased = bool(residual) and metric == "l2"
        factors = (_rows.FACTORS[1],) if self._biased else ()
        super().__init__(dim, M, nbits, metric, rotation, store, factors)
        op = self._op("__init__")
        if check_count(op, "lists", lists, 1) > 65536:
            raise ValueError(f"[{op}] lists is {lists}, at most 65536")
        if not isinstance(residual, (bool, np.bool_)):
            raise TypeError(f"[{op}] residual is {residual!r}, expected True or False")
        if coarse_dims is not None:
            coarse_dims = check_count(op, "coarse_dims", coarse_dims, 1)
            if coarse_dims > self.dim or rotation is not None:
                raise ValueError(
                    f"[{op}] coarse_dims is {coarse_dims}, at most {self.dim}, and none with a "
                    f"rotation"
                )
        self.residual, self.coarse_dims = bool(residual), coarse_dims
        self._begin_lists(lists, nprobe)

    @property
    def centroids(self):
        """(lists, dim) float32, of rotated vectors; None before training."""
        return None if self._trained is None else self._trained.centroids

    # --- Training and content ---------------------------------------------------------------------

    def _least_sample(self):
        return max(2**self.nbits, self.lists)

    def _fit(self, x, seed, iterations, progress):
        rng = np.random.default_rng(seed)
        coarse = x[:, : self.coarse_dims]
        sample = np.sort(rng.permutation(len(x))[: _ROWS * self.lists])
        renamed = None
        if progress is not None:

            def renamed(_, done, total):
                progress("lists", done, total)

        fitted = kmeans(
            coarse[sample], self.lists, iterations=iterations, seed=seed, progress=renamed
        ).centroids
        home = _nearest(coarse, fitted)
        centroids = fitted if self.coarse_dims is None else _means(x, home, fitted)
        rest = x - centroids[home]
        fitted = train_codebooks(
            *(rest if self.residual else x, self.M, self.nbits),
            rotation=self.rotation,
            iterations=iterations,
            seed=seed,
            progress=progress,
        )
        spread = (
            None if self.metric == "l2" else _spread(rest[:, : self.coarse_dims], home, self.lists)
        )
        if fitted.rotation is not None:
            centroids = _exact.rotated(centroids, fitted.rotation)
        return Fitted(fitted.codebooks, fitted.rotation, centroids, spread)

    def _encoded(self, x):
        home = _nearest(x[:, : self.coarse_dims], self.centroids[:, : self.coarse_dims])
        if self.residual:
            x = x - self.centroids[home]
        content = super()._encoded(x) | {"list": home}
        if self._biased:
            words = self._trained.codebooks[np.arange(self.M), content["codes"]]
            words = words.reshape(len(x), self.dim).astype(np.float64)
            bias = _exact.summed(words * (words + 2.0 * self.centroids[home]))
            content[_rows.FACTORS[1]] = bias.astype(np.float32)
        return content

    def _words(self, at):
        words = super()._words(at)
        if self.residual and len(at):
            words = words + self.centroids[self._state.home(at)]
        return words

    # --- Search -----------------------------------------------------------------------------------

    def _queries(self, given, nprobe):
        x = np.ascontiguousarray(self._rotated(given.floats)[:, : given.used])
        coarse = min(given.used, self.coarse_dims or self.dim)
        metric = "l2" if self.metric == "l2" else "ip"
        centroids = self.centroids[:, : given.used]
        if metric == "l2":
            lists, costs = _best_lists(x[:, :coarse], centroids[:, :coarse], metric, nprobe)
        else:
            spread, reach = self._trained.spread, _REACH * _lengths(x[:, :coarse])
            wide = np.column_stack([centroids[:, :coarse], spread])
            lists, costs = _best_lists(
                np.column_stack([x[:, :coarse], reach]), wide, metric, nprobe
            )
            costs += reach * spread[lists]
        if coarse < given.used:
            whole = _exact.squared_distances if metric == "l2" else _exact.inner_products
            costs = whole(x[:, None], centroids[lists])
            costs = costs if metric == "l2" else -costs
        # The rows' bias is of all dimensions: a prefix takes tables of q - c for each list.
        apart = self._biased and given.used < self.dim
        for part in self._parts(given, nprobe if apart else 1):
            q, table, offset = x[part], None, costs[part].reshape(-1) if self.residual else None
            if apart:
                q = (q[:, None] - centroids[lists[part]]).reshape(-1, given.used)
                table, offset = np.arange(len(q)), None
            ranges = _scan.Ranges(*self._state.ranges(lists[part]), table, offset)
            if self._biased and not apart:
                yield part, 2 * _scan.tables(q, self._trained.codebooks, "ip"), ranges
            else:
                yield part, self._tables(np.ascontiguousarray(q)), ranges

    def search(
        self, queries, k, *, filter=None, rescore=None, oversample=4, dims=None, nprobe=None
    ) -> SearchResult:
        """The k best rows of the visited lists; arguments and errors as in `PQIndex.search`.

        `nprobe` overrides the attribute for this call. With `dims`, lists too are chosen by the
        first `dims` dimensions.
        """
        view = self._view()
        nprobe = view._probes("search", nprobe)
        return view._search(queries, k, filter, rescore, oversample, dims, nprobe)

    def range_search(self, queries, radius, *, filter=None, dims=None, nprobe=None):
        """Rows of the visited lists within `radius`: (indptr, scores, ids).

        See `PQIndex.range_search`.
        """
        view = self._view()
        nprobe = view._probes("range_search", nprobe)
        return view._range_search(queries, radius, filter, dims, nprobe)

    # --- Files ------------------------------------------------------------------------------------

    def to_sections(self):
        """(meta, arrays) for a file that embeds this index; see `from_sections`."""
        return self._meta(), self._list_arrays() | self._trained_arrays()

    @classmethod
    def from_sections(cls, meta: dict, arrays: dict) -> "IVFPQIndex":
        """Rebuild an index from `to_sections`; raises FormatError where the parts do not fit."""
        sizes = cls._check_sizes(meta, arrays)
        index = cls._made(meta)
        shapes = {"centroids": (index.lists, index.dim)}
        if index.metric != "l2":
            shapes["spread"] = (index.lists,)
        also = ("codebooks", *shapes, *(("rotation",) if index.rotation else ()))
        index._restore(arrays, sizes, also)
        index._read_trained(arrays, shapes)
        index._check_rows()
        return index


def _nearest(x, centroids):
    """The list of each vector, (n,) int64."""
    if not len(x):
        return np.zeros(0, np.int64)
    x, books = np.ascontiguousarray(x), np.ascontiguousarray(centroids[None])
    return assign(x, books)[:, 0].astype(np.int64)


def _best_lists(x, centroids, metric, count):
    """(n, count) int64 lists and their float32 costs."""
    lists, costs = nearest(x[:, None], centroids[None], metric, count, distances=True)
    return lists[:, 0].astype(np.int64), costs[:, 0]


def _lengths(x):
    """(n, 1) float32."""
    return np.sqrt(_exact.inner_products(x, x)[:, None])


def _spread(rest, home, lists):
    """(lists,) float32: how far rows are from their centroid, root mean squares over dimensions."""
    squares = np.bincount(home, np.einsum("ij,ij->i", rest, rest), lists)
    count = np.maximum(np.bincount(home, minlength=lists), 1)
    return np.sqrt(squares / count / rest.shape[1]).astype(np.float32)


def _means(x, home, prefix):
    """Centroids of all dimensions: the means of the lists, behind what was fitted."""
    count = np.maximum(np.bincount(home, minlength=len(prefix)), 1)
    rest = [np.bincount(home, column, len(prefix)) / count for column in x[:, prefix.shape[1] :].T]
    return np.column_stack([prefix, *rest]).astype(np.float32)


__all__ = ["IVFPQIndex"]
