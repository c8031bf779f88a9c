# SPDX-License-Identifier: Apache-2.0
"""What every kind of index refuses alike, and that a refused call changes nothing."""

import numpy as np
import pytest
from index_cases import DIM, assert_unchanged_by_refusals, each_file, each_kind

V = np.ones((2, DIM), np.float32)
NAN = np.where(np.eye(2, DIM), np.nan, 1).astype(np.float32)

# Calls with an index and two vectors of its kind.
REFUSED = {
    "add ids length": (lambda i, v: i.add(v, [90]), ValueError, "1 ids for 2 rows"),
    "add ids twice": (lambda i, v: i.add(v, [90, 90]), ValueError, "90 is given twice"),
    "add ids taken": (lambda i, v: i.add(v, [90, 4]), ValueError, "id 4 is already"),
    "add ids negative": (lambda i, v: i.add(v, [90, -1]), ValueError, "-1 is negative"),
    "add ids float": (lambda i, v: i.add(v, [90.0, 91.0]), TypeError, "dtype float64"),
    "add ids bool": (lambda i, v: i.add(v, [True, False]), TypeError, "dtype bool"),
    "add ids text": (lambda i, v: i.add(v, ["a", "b"]), TypeError, "dtype"),
    "add ids rank": (lambda i, v: i.add(v, [[90, 91]]), ValueError, "one dimension"),
    "add ids scalar": (lambda i, v: i.add(v, 90), ValueError, "one dimension"),
    "add ids huge": (lambda i, v: i.add(v, np.array([90, 2**63], "u8")), ValueError, "exceeds"),
    "add ids beyond": (lambda i, v: i.add(v, [90, 2**64]), TypeError, "dtype object"),
    "add a list": (lambda i, v: i.add([[1.0] * DIM]), TypeError, "list"),
    "add None": (lambda i, v: i.add(None), TypeError, "NoneType"),
    "search k": (lambda i, v: i.search(v, -1), ValueError, r"search\] k is -1"),
    "search float k": (lambda i, v: i.search(v, 1.0), TypeError, "k is 1.0"),
    "search list": (lambda i, v: i.search([[0, 0, 0]], 1), TypeError, "list"),
    "filter length": (lambda i, v: i.search(v, 1, filter=np.ones(3, bool)), ValueError, "filter"),
    "filter rank": (
        lambda i, v: i.search(v, 1, filter=np.ones((10, 1), bool)),
        ValueError,
        r"filter has shape \(10, 1\), expected \(10,\)",
    ),
    "filter float": (lambda i, v: i.search(v, 1, filter=[1.5]), TypeError, "dtype float64"),
    "filter negative": (lambda i, v: i.search(v, 1, filter=[-2]), ValueError, "negative"),
    "search beyond memory": (lambda i, v: i.search(v, 2**42), MemoryError, None),
    "range NaN": (lambda i, v: i.range_search(v, np.nan), ValueError, "radius is NaN"),
    "range text": (lambda i, v: i.range_search(v, "x"), TypeError, "radius is 'x', expected a num"),
    "range filter": (
        lambda i, v: i.range_search(v, 1, filter=np.ones(3, bool)),
        ValueError,
        r"range_search\] filter",
    ),
    "remove twice": (lambda i, v: i.remove([1, 1]), ValueError, "1 is given twice"),
    "remove negative": (lambda i, v: i.remove([-1]), ValueError, "negative"),
    "remove float": (lambda i, v: i.remove([1.0]), TypeError, "dtype float64"),
    "remove scalar": (lambda i, v: i.remove(1), ValueError, "one dimension"),
    "update unknown": (lambda i, v: i.update([1, 99], v), ValueError, "99 is not in the index"),
    "update length": (lambda i, v: i.update([1], v), ValueError, r"update\] 1 ids for 2 rows"),
    "update twice": (lambda i, v: i.update([1, 1], v), ValueError, "given twice"),
    "reconstruct unknown": (lambda i, v: i.reconstruct([99]), ValueError, "99 is not in the index"),
    "reconstruct scalar": (lambda i, v: i.reconstruct(1), ValueError, "one dimension"),
    "save nowhere": (lambda i, v: i.save("/nonexistent/folder/x"), FileNotFoundError, None),
}

# Of those that take dense vectors and may store them.
REFUSED_DENSE = {
    "add columns": (lambda i, v: i.add(V[:, 1:]), ValueError, r"add\].* have 11 columns"),
    "add rank": (lambda i, v: i.add(V[0]), ValueError, "shape"),
    "add dtype": (lambda i, v: i.add(V.astype(np.int32)), TypeError, "dtype int32"),
    "add objects": (lambda i, v: i.add(V.astype(object)), TypeError, "dtype object"),
    "add structures": (lambda i, v: i.add(np.zeros((2, DIM), [("a", "f4")])), TypeError, "dtype"),
    "add big-endian": (lambda i, v: i.add(V.astype(">f4")), TypeError, "dtype >f4"),
    "add NaN": (lambda i, v: i.add(NAN), ValueError, "NaN"),
    "search columns": (lambda i, v: i.search(V[:, :5], 1), ValueError, "5 columns"),
    "search rank": (lambda i, v: i.search(V[0], 1), ValueError, "shape"),
    "search NaN": (lambda i, v: i.search(NAN, 1), ValueError, "NaN"),
    "search infinity": (lambda i, v: i.search(V * np.inf, 1), ValueError, "infinity"),
    "search rescore": (lambda i, v: i.search(v, 1, rescore="all"), ValueError, "rescore is 'all'"),
    "search oversample": (lambda i, v: i.search(v, 1, oversample=0), ValueError, "oversample is 0"),
    "oversample type": (lambda i, v: i.search(v, 1, oversample=1.5), TypeError, "oversample"),
    "range queries": (lambda i, v: i.range_search(V[:, :5], 1), ValueError, "5 columns"),
    "update columns": (lambda i, v: i.update([1, 2], V[:, :3]), ValueError, r"update\].*3 columns"),
    "update NaN": (lambda i, v: i.update([1, 2], NAN), ValueError, "NaN"),
    "update dtype": (lambda i, v: i.update([1, 2], V.astype(int)), TypeError, "dtype int64"),
    "codes unknown": (lambda i, v: i.codes([99]), ValueError, "99 is not in the index"),
    "rescore by": (lambda i, v: i.rescore(v, [[1]], by="all"), ValueError, "by is 'all'"),
}


@each_file
def test_refused_calls_change_nothing(rng, kind, options):
    index = kind.filled(kind.draw(rng, 10), np.arange(10), **options)
    refused = (REFUSED | (REFUSED_DENSE if kind.stores else {})).values()
    vectors, queries = kind.draw(rng, 2), kind.draw(rng, 4)
    assert_unchanged_by_refusals(index, refused, queries, kind.radius, vectors)


@each_kind
def test_rescore_refuses(rng, kind):
    vectors, ids = kind.draw(rng, 2), np.zeros((2, 1), np.int64)
    index = kind.filled(vectors, [0, 1])
    with pytest.raises(TypeError, match="int32"):
        index.rescore(vectors, ids.astype(np.int32))
    for wrong in (ids[:1], ids[0]):
        with pytest.raises(ValueError, match=r"expected \(2, c\)"):
            index.rescore(vectors, wrong)
    if kind.stores:
        with pytest.raises(ValueError, match="rescore='float16' but the index stores int8"):
            index.search(vectors, 1, rescore="float16")
        index = kind.filled(vectors, [0, 1], **kind.files[0])
        with pytest.raises(ValueError, match="by='store' but the index was made with store=None"):
            index.rescore(vectors, ids)
        with pytest.raises(ValueError, match="rescore='store' but the index was made with store=N"):
            index.search(vectors, 1, rescore="store")
