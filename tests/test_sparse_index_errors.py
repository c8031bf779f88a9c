# SPDX-License-Identifier: Apache-2.0
"""What SparseIndex alone refuses, and that it changes nothing. See test_index_errors.py."""

import numpy as np
import pytest
from index_cases import assert_unchanged_by_refusals
from sparse_index_cases import as_csr, one_each

from pentad.sparse import SparseIndex

V = as_csr([{1: 1.0, 4: 2.0}, {19: 0.5}])
INDPTR, TERMS, W = V


def bent(indptr=INDPTR, terms=TERMS, values=W):
    return np.asarray(indptr), np.asarray(terms), np.asarray(values, np.float32)


REFUSED = {
    "add columns": (lambda i: i.add((*V, 21)), ValueError, r"add\] vectors has 21 columns.* 20"),
    "add a term": (lambda i: i.add(bent(terms=[1, 4, 20])), ValueError, "an index 20 past its 20"),
    "add a negative term": (lambda i: i.add(bent(terms=[1, 4, -1])), ValueError, "index -1"),
    "add a large term": (lambda i: i.add(bent(terms=[1, 4, 2**40])), ValueError, "past its 20"),
    "add descends": (lambda i: i.add(bent([0, 3, 2])), ValueError, "descends from 3 to 2"),
    "add begins": (lambda i: i.add(bent([1, 2, 3])), ValueError, "begins with 1"),
    "add ends": (lambda i: i.add(bent([0, 2, 4])), ValueError, "ends with 4"),
    "add NaN": (lambda i: i.add(bent(values=[1, np.nan, 1])), ValueError, "value NaN"),
    "add infinity": (lambda i: i.add(bent(values=[1, 1, np.inf])), ValueError, "value inf"),
    "add negative": (
        lambda i: i.add(bent(values=[1, 1, -0.5])),
        ValueError,
        r"vectors has the value -0\.5, expected none below 0: the bounds of inverted lists need",
    ),
    "add large": (lambda i: i.add(bent(values=[1, 1, 3e14])), ValueError, r"at most 2\*\*48"),
    "add double": (
        lambda i: i.add((INDPTR, TERMS, W * np.float64(1e300))),
        ValueError,
        r"at most 2\*\*48",
    ),
    "add dense": (lambda i: i.add(np.ones((2, 20))), TypeError, "a dense array, expected"),
    "add whole values": (
        lambda i: i.add((INDPTR, TERMS, W.astype(int))),
        TypeError,
        "values has dtype int64",
    ),
    "add broken terms": (
        lambda i: i.add((INDPTR, TERMS.astype(float), W)),
        TypeError,
        "indices has dtype float64",
    ),
    "search columns": (lambda i: i.search((*V, 5), 1), ValueError, r"search\] queries has 5"),
    "search NaN": (lambda i: i.search(bent(values=[1, 1, np.nan]), 1), ValueError, "NaN"),
    "search large": (lambda i: i.search(bent(values=[1, 1, -3e14]), 1), ValueError, r"2\*\*48"),
    "search double": (
        lambda i: i.search((INDPTR, TERMS, W * np.float64(1e300)), 1),
        ValueError,
        r"search\] queries has the value 2e\+300, expected at most 2\*\*48",
    ),
    "search uneven": (
        lambda i: i.search((INDPTR, TERMS, W[:-1]), 1),
        ValueError,
        r"search\] queries has \d+ indices but \d+ values",
    ),
    "search nothing": (
        lambda i: i.search((INDPTR[:0], TERMS[:0], W[:0]), 1),
        ValueError,
        r"search\] queries's indptr is empty",
    ),
    "search begins": (lambda i: i.search(bent([1, 2, 3]), 1), ValueError, "begins with 1"),
    "search past": (lambda i: i.search(bent(terms=[1, 4, 20]), 1), ValueError, "past its 20"),
    "search dense": (lambda i: i.search(np.ones((2, 20)), 1), TypeError, "a dense array"),
    "search exact": (lambda i: i.search(V, 1, exact=1), TypeError, "exact is 1, expected True"),
    "knob query_cut": (lambda i: i.search(V, 1, query_cut=3), ValueError, "query_cut is 3, but"),
    "knob factor": (lambda i: i.search(V, 1, block_factor=1.0), ValueError, "block_factor is 1.0"),
    "knob alpha": (
        lambda i: i.search(V, 1, exact=True, alpha=0.5),
        ValueError,
        "alpha is 0.5, but an exact search leaves nothing out",
    ),
    "update negative": (
        lambda i: i.update([1, 2], bent(values=[-1, 1, 1])),
        ValueError,
        r"update\] vectors has the value -1",
    ),
}
REFUSED |= {
    f"knob {name} {value!r}": (
        lambda i, name=name, value=value: i.search(V, 1, exact=False, **{name: value}),
        error,
        f"{name} is",
    )
    for name, value, error in (
        *(("query_cut", 0, ValueError), ("query_cut", -1, ValueError)),
        *(("query_cut", 1.5, TypeError), ("alpha", 0, ValueError), ("alpha", 1.01, ValueError)),
        *(("alpha", np.nan, ValueError), ("alpha", [1], TypeError), ("alpha", "x", TypeError)),
        *(("block_factor", -0.5, ValueError), ("block_factor", np.inf, ValueError)),
    )
}


@pytest.mark.parametrize("values", ["exact", "float16", "uint8"])
def test_refused_calls_change_nothing(rng, values):
    index = SparseIndex(20, values=values)
    index.add(one_each(rng, 10, 20))
    assert_unchanged_by_refusals(index, REFUSED.values(), one_each(rng, 4, 20), 0.1)


def test_values_beyond_float16():
    index = SparseIndex(20, values="float16")
    index.add(bent(values=[1, 1, 65504]))
    for value in (65504.01, 65520, 1e9):
        with pytest.raises(ValueError, match=r"expected at most 65504, the largest float16"):
            index.add(bent(values=[1, 1, value]))
    assert len(index) == 2


def test_duplicates_count_by_their_sum():
    index = SparseIndex(20)
    index.add(bent([0, 2, 3], [4, 4, 1], [3, -1, 1]))
    assert index.reconstruct([0])[2].tolist() == [2]
    with pytest.raises(ValueError, match="value -2"):
        index.add(bent([0, 2, 3], [4, 4, 1], [-3, 1, 1]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SparseIndex(0), ValueError, "vocab_size is 0"),
        (lambda: SparseIndex(-3), ValueError, "vocab_size is -3"),
        (lambda: SparseIndex(2**31), ValueError, r"2147483648, expected at most 2\*\*31 - 1"),
        (lambda: SparseIndex(8.0), TypeError, "vocab_size is 8.0"),
        (lambda: SparseIndex("x"), TypeError, "vocab_size is 'x'"),
        (lambda: SparseIndex(8, values="int8"), ValueError, "values is 'int8', expected one of"),
        (lambda: SparseIndex(8, values=None), ValueError, "values is None"),
        (lambda: SparseIndex(8, values=[]), ValueError, r"values is \[\]"),
    ],
)
def test_bad_construction(call, error, message):
    with pytest.raises(error, match=message):
        call()
