# SPDX-License-Identifier: Apache-2.0
"""What the tests of the sparse index share: drawing vectors, and what the index must answer.

`Model` says in plain Python what an index of some documents answers, from dicts of term -> value.
"""

import numpy as np

VALUES = ("exact", "float16", "uint8")
LEVELS = {"ties": [0.5, 1, 2], "zeros": [0, 0, 1, 3], "odd": [1 / 3, 0.1, 7e-9, 300.7, 65504]}


def draw(rng, n, vocab, most=8, kind="odd", *, signs=False, start=0):
    """(indptr, indices, values): terms in any order, some twice, among 12 and the last of `vocab`.

    signs : half of the values are negative
    """
    sizes = rng.integers(0, most + 1, n)
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    terms = (start + rng.integers(0, 12, indptr[-1])) % vocab
    terms[rng.random(len(terms)) < 0.1] = vocab - 1
    values = rng.choice(LEVELS[kind], len(terms)).astype(np.float32)
    if kind == "odd":  # a sum of two stays below the largest float16
        values *= rng.random(len(terms)).astype(np.float32) / most
    if signs:
        values *= rng.choice(np.float32([-1, 1]), len(terms))
    return indptr, terms, values


def one_each(rng, n, vocab, kind="odd"):
    """As `draw`, but canonical: terms rise, none twice, none with the value 0."""
    rows = [{t: v for t, v in row.items() if v} for row in as_dicts(draw(rng, n, vocab, kind=kind))]
    return as_csr(rows)


def as_dicts(csr):
    """term -> float32 of each row: what is given twice is summed in double."""
    indptr, terms, values = csr[:3]
    rows = []
    for i in range(len(indptr) - 1):
        row = {}
        for j in range(indptr[i], indptr[i + 1]):
            row[int(terms[j])] = row.get(int(terms[j]), 0.0) + float(values[j])
        rows.append({t: np.float32(row[t]) for t in sorted(row)})
    return rows


def as_csr(rows):
    indptr = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    terms = np.array([t for row in rows for t in row], np.int32)
    return indptr, terms, np.array([v for row in rows for v in row.values()], np.float32)


def part(csr, rows):
    """The rows at these positions."""
    dicts = as_dicts(csr)
    return as_csr([dicts[i] for i in rows])


def stored(row, values):
    """What the index keeps of a document."""
    if values == "float16":
        kept = {t: np.float32(np.float16(v)) for t, v in row.items()}
    elif values == "uint8":
        largest = max(row.values(), default=np.float32(0))
        scale = max(largest / np.float32(255), np.finfo(np.float32).tiny)
        kept = {t: np.float32(np.rint(v / scale)) * scale for t, v in row.items()}
    else:
        kept = row
    return {t: v for t, v in kept.items() if v}


def score(query, document):
    total = 0.0
    for t in query:
        if t in document:
            total += float(query[t]) * float(document[t])
    return np.float32(total) + np.float32(0)


class Model:
    """Documents by id."""

    def __init__(self, values="exact", csr=None, ids=None):
        self.values, self.rows = values, {}
        if csr is not None:
            self.put(range(len(csr[0]) - 1) if ids is None else ids, csr)

    def put(self, ids, csr):
        for i, row in zip(ids, as_dicts(csr), strict=True):
            self.rows[int(i)] = stored(row, self.values)

    @property
    def ids(self):
        return np.array(sorted(self.rows), np.int64)

    def content(self, ids):
        return as_csr([self.rows[int(i)] for i in ids])

    def scores(self, queries):
        """(nq, n) float32, in the order of ids."""
        rows = [self.rows[int(i)] for i in self.ids]
        scores = [[score(q, row) for row in rows] for q in as_dicts(queries)]
        return np.array(scores, np.float32).reshape(len(queries[0]) - 1, len(rows))

    def search(self, queries, k, keep=None):
        return ranked(self.scores(queries), self.ids, k, keep)

    def range_search(self, queries, radius, keep=None):
        scores = self.scores(queries)
        near = scores.astype(np.float64) >= radius
        near &= np.broadcast_to(True if keep is None else keep, near.shape)
        q, at = np.nonzero(near)
        indptr = np.searchsorted(q, np.arange(len(scores) + 1)).astype(np.int64)
        return indptr, scores[q, at], self.ids[at]

    def rescore(self, queries, candidates):
        scores = np.full(candidates.shape, -np.inf, np.float32)
        found = np.full(candidates.shape, -1, np.int64)
        for q, query in enumerate(as_dicts(queries)):
            pairs = [
                (-score(query, self.rows[i]), i) for i in candidates[q].tolist() if i in self.rows
            ]
            for c, (value, i) in enumerate(sorted(pairs)):
                scores[q, c], found[q, c] = 0 - value, i
        return scores, found


def ranked(scores, ids, k, keep=None):
    """(scores, ids): the k largest scores of each row, ties by smaller id; `keep` is (n,)."""
    best = np.full((len(scores), k), -np.inf, np.float32)
    found = np.full((len(scores), k), -1, np.int64)
    allowed = np.arange(len(ids)) if keep is None else np.flatnonzero(keep)
    for q, row in enumerate(scores):
        order = allowed[np.lexsort((ids[allowed], -row[allowed]))][:k]
        best[q, : len(order)], found[q, : len(order)] = row[order], ids[order]
    return best, found


def only_right_scores(result, model, queries):
    """Whether a pruned search returned ids once, in order, each with its exact score."""
    scores, ids = model.scores(queries), model.ids
    for q, (row, found) in enumerate(zip(*result, strict=True)):
        real = found[found >= 0]
        if len(np.unique(real)) != len(real) or (row[found < 0] != -np.inf).any():
            return False
        if (row[: len(real)] != scores[q, np.searchsorted(ids, real)]).any():
            return False
        pairs = list(zip((-row[: len(real)]).tolist(), real.tolist(), strict=True))
        if pairs != sorted(pairs) or (found[: len(real)] < 0).any():
            return False
    return True
