# SPDX-License-Identifier: Apache-2.0
"""What a search of sparse documents answers, in plain numpy: the definition of `_search`.

Documents stand at positions 0 to n - 1. The score of a query and a document is the sum in double,
over their common terms in rising order, of the products of their values, rounded to float32.
"""

from typing import NamedTuple

import numpy as np

from pentad._errors import FormatError

WINDOW = 1 << 16  # documents whose inverted lists stand together
_CHUNK = 1 << 22  # values scored at a time


class Forward(NamedTuple):
    """The documents, row by row: the value of an entry is `values`, times `scale` of its row.

    indptr : (n + 1,) int64
    terms : (nnz,) int32, rising in each row
    values : (nnz,) float32, float16 or uint8, not negative
    scale : (n,) float32, or None for floats
    """

    indptr: np.ndarray
    terms: np.ndarray
    values: np.ndarray
    scale: np.ndarray | None = None


class Window(NamedTuple):
    """Inverted lists of at most `WINDOW` documents, opaque but for their types.

    terms : (T,) int32, rising
    starts : (T + 1,) int64
    scales : (T,) float32
    postings : (bytes,) uint8
    """

    terms: np.ndarray
    starts: np.ndarray
    scales: np.ndarray
    postings: np.ndarray


class Options(NamedTuple):
    """What a pruned search may leave out; by default nothing. Its scores are exact all the same.

    query_cut : int or None
        Look up so many terms of a query in a window, those that may add most; None for all.
    block_factor : float
        Pass over the list of a term in a window where the most that it adds is below this share of
        the k-th best bound so far.
    alpha : float, in (0, 1]
        Score documents whose bound, over the terms that were looked up, is at least this share of
        the k-th best bound so far.
    """

    query_cut: int | None = None
    block_factor: float = 0.0
    alpha: float = 1.0


def build(forward: Forward, first: int, last: int) -> Window:
    """The inverted lists of the positions [first, last). Here: lengths and largest values."""
    part = slice(forward.indptr[first], forward.indptr[last])
    order = np.argsort(forward.terms[part], kind="stable")
    terms, starts = np.unique(forward.terms[part][order], return_index=True)
    values = _values(forward, first, last)[order]
    scales = np.maximum.reduceat(values, starts) if len(terms) else values
    starts = np.append(starts, len(order)).astype(np.int64)
    return Window(terms, starts, scales.astype(np.float32), np.zeros(0, np.uint8))


def check(window: Window, count: int) -> None:
    """Raises FormatError unless the lists of `count` documents can be read within their bounds."""
    terms, starts, scales, postings = window
    sizes = np.diff(starts)
    if (
        (len(starts), len(scales), len(postings)) != (len(terms) + 1, len(terms), 0)
        or (np.diff(terms) <= 0).any()
        or (terms[:1] < 0).any()
        or starts[0]
        or (sizes <= 0).any()
        or (sizes > count).any()
        or not (np.isfinite(scales) & (scales >= 0)).all()
    ):
        raise FormatError("the inverted lists of the index are malformed")


def topk(windows, forward: Forward, queries, mask, k: int, options: Options | None):
    """The k best positions of each query: the largest score first, then the smaller position.

    Queries are (indptr (nq + 1,) int64, terms (nnz,) int32, rising in each row, values (nnz,)
    float32).

    Every document that the mask admits is a candidate; one without a common term scores 0.
    `options` may leave documents out; here they leave out none.

    Returns
    -------
    scores : (nq, k) float32, -inf where there are fewer than k
    positions : (nq, k) int64, -1 there
    """
    nq, n = len(queries[0]) - 1, len(forward.indptr) - 1
    scores = np.full((nq, k), -np.inf, np.float32)
    positions = np.full((nq, k), -1, np.int64)
    allowed = np.arange(n) if mask is None else np.flatnonzero(mask)
    for q in range(nq):
        every = _scores(forward, *_query(queries, q))[allowed]
        best = np.argsort(-every, kind="stable")[:k]
        scores[q, : len(best)] = every[best]
        positions[q, : len(best)] = allowed[best]
    return scores, positions


def scores_at(forward: Forward, queries, positions: np.ndarray) -> np.ndarray:
    """(nq, c) float32: scores of the documents at `positions`, -inf where that is -1."""
    scores = np.full(positions.shape, -np.inf, np.float32)
    for q, row in enumerate(positions):
        terms, weights = _query(queries, q)
        for c in np.flatnonzero(row >= 0):
            at = int(row[c])
            scores[q, c] = _part_scores(forward, terms, weights, at, at + 1)[0]
    return scores


def _query(queries, q):
    indptr, terms, values = queries
    part = slice(indptr[q], indptr[q + 1])
    return terms[part], values[part].astype(np.float64)


def _scores(forward, terms, weights):
    """(n,) float32, of one query."""
    n = len(forward.indptr) - 1
    scores, first = np.empty(n, np.float32), 0
    while first < n:
        full = np.searchsorted(forward.indptr, forward.indptr[first] + _CHUNK, side="right") - 1
        last = min(max(int(full), first + 1), n)
        scores[first:last] = _part_scores(forward, terms, weights, first, last)
        first = last
    return scores


def _part_scores(forward, terms, weights, first, last):
    """Scores of the positions [first, last). `bincount` adds one product after the other."""
    sizes = np.diff(forward.indptr[first : last + 1])
    if not len(terms):
        return np.zeros(len(sizes), np.float32)
    have = forward.terms[forward.indptr[first] : forward.indptr[last]]
    at = np.minimum(np.searchsorted(terms, have), len(terms) - 1)
    common = terms[at] == have
    products = weights[at[common]] * _values(forward, first, last)[common]
    rows = np.repeat(np.arange(len(sizes)), sizes)[common]
    return np.bincount(rows, products, len(sizes)).astype(np.float32) + np.float32(0)  # no -0


def _values(forward, first, last):
    """float32, as stored."""
    values = forward.values[forward.indptr[first] : forward.indptr[last]].astype(np.float32)
    if forward.scale is None:
        return values
    return values * np.repeat(forward.scale[first:last], np.diff(forward.indptr[first : last + 1]))


__all__ = [
    *("WINDOW", "Forward", "Options", "Window"),
    *("build", "check", "scores_at", "topk"),
]
