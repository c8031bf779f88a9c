# SPDX-License-Identifier: Apache-2.0
"""Sparse scores and their gradients as plain Python: the definitions.

Sides are `pentad.sparse._csr.Rows`. Sums are in double, over rising terms, rows or pairs.
"""

import numpy as np


def _row(side, i):
    """{term: position of its value}, rising."""
    begin, end = int(side.indptr[i]), int(side.indptr[i + 1])
    return {int(side.indices[at]): at for at in range(begin, end)}


def score(queries, docs, pairs=None):
    """(nq, n), or (p,) for pairs (p, 2), before the rounding to the result's dtype."""
    if pairs is None:
        n, m = queries.shape[0], docs.shape[0]
        every = np.array([(b, d) for b in range(n) for d in range(m)], np.int64).reshape(-1, 2)
        return score(queries, docs, every).reshape(n, m)
    out = np.zeros(len(pairs))
    for p, (b, d) in enumerate(pairs):
        query, doc = _row(queries, b), _row(docs, d)
        total = 0.0
        for term, at in query.items():
            if term in doc:
                total += float(queries.values[at]) * float(docs.values[doc[term]])
        out[p] = total + 0.0  # no -0
    return out


def score_backward(queries, docs, d_out, pairs=None):
    """The gradients of both sides' values, in double."""
    if pairs is None:
        n, m = queries.shape[0], docs.shape[0]
        pairs = np.array([(b, d) for b in range(n) for d in range(m)], np.int64).reshape(-1, 2)
        d_out = np.asarray(d_out).reshape(-1)
    d_queries, d_docs = np.zeros(len(queries.values)), np.zeros(len(docs.values))
    for (b, d), g in zip(pairs, d_out, strict=True):
        query, doc = _row(queries, b), _row(docs, d)
        for term in query.keys() & doc.keys():
            d_queries[query[term]] += float(g) * float(docs.values[doc[term]])
            d_docs[doc[term]] += float(g) * float(queries.values[query[term]])
    return d_queries, d_docs
