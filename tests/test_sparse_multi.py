# SPDX-License-Identifier: Apache-2.0
"""Several buckets: scores as the sum over them, one vocabulary for the index, gradients."""

import numpy as np
import pytest

from pentad.sparse import SparseIndex, score, score_multi, stack_buckets

SIZES = [30, 7, 1, 500]


def rows(n, columns, seed, dtype=np.float32):
    """(indptr, indices, values, columns) with empty rows, unsorted rows and duplicates."""
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 6, n) * (random.random(n) < 0.8)
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    indices = random.integers(0, columns, indptr[-1])
    return indptr, indices, random.integers(-8, 9, indptr[-1]).astype(dtype) / 8, columns


def dense(row):
    indptr, indices, values, columns = (np.asarray(part) for part in row)
    result = np.zeros((len(indptr) - 1, columns))
    np.add.at(result, (np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), indices), values)
    return result


@pytest.fixture(scope="module")
def buckets():
    queries = [rows(9, size, 10 + i) for i, size in enumerate(SIZES)]
    return queries, [rows(40, size, 20 + i) for i, size in enumerate(SIZES)]


def test_scores_are_summed_over_buckets(buckets):
    queries, docs = buckets
    # Sums of products of eighths are exact in float32.
    expected = sum(dense(q) @ dense(d).T for q, d in zip(queries, docs, strict=True))
    found = score_multi(queries, docs)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32
    assert np.abs(expected).max() > 1
    pairs = np.array([[0, 3], [8, 39], [4, 4]])
    np.testing.assert_array_equal(
        score_multi(queries, docs, pairs=pairs), expected[pairs[:, 0], pairs[:, 1]]
    )
    one = score_multi(queries[:1], docs[:1])
    np.testing.assert_array_equal(one, score(queries[0], docs[0]))


def test_stacked_rows_are_the_rows_side_by_side(buckets):
    docs = buckets[1]
    stacked = stack_buckets(docs)
    assert stacked[3] == sum(SIZES)
    np.testing.assert_array_equal(dense(stacked), np.hstack([dense(bucket) for bucket in docs]))
    assert [part.dtype for part in stacked[:3]] == [np.int64, np.int32, np.float32]
    bare = [bucket[:3] for bucket in docs]
    wider = stack_buckets(bare, vocab_sizes=600)
    assert wider[3] == 2400
    np.testing.assert_array_equal(dense(wider)[:, 1200:1201], dense(docs[2]))
    listed = stack_buckets(bare, vocab_sizes=SIZES)
    for a, b in zip(listed, stacked, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sides_that_do_not_name_their_columns(buckets):
    """Take the wider of the two in every bucket."""
    queries, docs = ([bucket[:3] for bucket in side] for side in buckets)
    np.testing.assert_array_equal(score_multi(queries, docs), score_multi(*buckets))
    a = np.array([0, 1]), np.array([9]), np.ones(1, np.float32)
    b = np.array([0, 1]), np.array([2]), np.ones(1, np.float32)
    assert score_multi([b, b], [a, b]).tolist() == [[1]]
    assert score_multi([a, b], [b, a]).tolist() == [[0]], "no column of one bucket is another's"


def test_binary_codes_count_common_winners_and_are_searched():
    random = np.random.default_rng(0)

    def winners(n):
        """k of 64 columns in each of 3 buckets, and the sets of them."""
        sets = [[random.permutation(64)[:9] for _ in range(n)] for _ in range(3)]
        indptr = np.arange(0, 9 * n + 1, 9)
        return [(indptr, np.concatenate(s), np.ones(9 * n, np.float32), 64) for s in sets], sets

    queries, query_sets = winners(4)
    docs, doc_sets = winners(80)
    expected = np.array(
        [
            [sum(len(np.intersect1d(q[i], d[j])) for q, d in zip(query_sets, doc_sets, strict=True))
             for j in range(80)]
            for i in range(4)
        ]
    )  # fmt: skip
    np.testing.assert_array_equal(score_multi(queries, docs), expected)
    index = SparseIndex(3 * 64, values="uint8")
    index.add(stack_buckets(docs))
    found = index.search(stack_buckets(queries), 10)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_array_equal(found.scores, np.take_along_axis(expected, order, 1))


def test_scipy_and_every_format_of_it(buckets):
    sparse = pytest.importorskip("scipy.sparse")
    queries, docs = buckets
    expected = score_multi(queries, docs)
    forms = ["csr", "csc", "coo", "lil"]
    given = [
        [
            sparse.csr_array(dense(b).astype(np.float32)).asformat(f)
            for b, f in zip(s, forms, strict=True)
        ]
        for s in (queries, docs)
    ]
    np.testing.assert_array_equal(score_multi(*given), expected)


def test_gradients():
    torch = pytest.importorskip("torch")
    queries = [rows(4, size, 30 + i, np.float64) for i, size in enumerate((12, 5))]
    docs = [rows(6, size, 40 + i, np.float64) for i, size in enumerate((12, 5))]
    values = [torch.from_numpy(b[2]).requires_grad_() for b in (*queries, *docs)]
    assert all(len(v) for v in values)

    def run(*values):
        sides = [(*b[:2], v, b[3]) for b, v in zip((*queries, *docs), values, strict=True)]
        sides = [
            tuple(torch.from_numpy(p) if isinstance(p, np.ndarray) else p for p in s) for s in sides
        ]
        return score_multi(sides[:2], sides[2:])

    assert torch.autograd.gradcheck(run, values)
    expected = sum(dense(q) @ dense(d).T for q, d in zip(queries, docs, strict=True))
    np.testing.assert_allclose(run(*values).detach(), expected, rtol=1e-12)
    tensors = [torch.from_numpy(dense(b)).to_sparse().requires_grad_() for b in (*queries, *docs)]
    out = score_multi(tensors[:2], tensors[2:])
    np.testing.assert_allclose(out.detach(), expected, rtol=1e-12)
    out.sum().backward()
    total = dense(docs[1]).sum(0)
    kept = dense(queries[1]) != 0
    np.testing.assert_allclose(tensors[1].grad.to_dense(), kept * total, rtol=1e-12)


@pytest.mark.parametrize(
    ("queries", "docs", "options", "error", "complaint"),
    [
        ([], [], {}, ValueError, "queries has no bucket"),
        ("a", "aa", {}, ValueError, "queries have 1 buckets but docs have 2"),
        ("aa", "as", {}, ValueError, "docs have different numbers of rows"),
        ("ad", "aa", {}, TypeError, "queries have different dtypes"),
        ("a", "a", {"vocab_sizes": 9}, ValueError, r"queries\[0\] has 10 columns, expected 9"),
        ("ab", "ab", {}, ValueError, "2147483657 columns in all, expected at most 2147483647"),
        ("aa", "aa", {"vocab_sizes": [10]}, ValueError, "vocab_sizes has 1 numbers for 2 buckets"),
        ("a", "a", {"vocab_sizes": "x"}, TypeError, "vocab_sizes is 'x', expected an integer"),
        ("an", "aa", {}, ValueError, r"queries\[1\]"),
    ],
)
def test_what_does_not_fit(queries, docs, options, error, complaint):
    named = {
        "a": rows(3, 10, 0),
        "b": rows(3, 2**31 - 1, 0),
        "d": rows(3, 10, 0, np.float64),
        "s": rows(2, 10, 1),
        "n": (np.array([0, 1, 1, 1]), np.array([0]), np.array([np.nan], np.float32), 10),
    }
    with pytest.raises(error, match=rf"\[sparse.score_multi\] .*{complaint}"):
        score_multi([named[b] for b in queries], [named[b] for b in docs], **options)


def test_what_is_no_list_of_buckets():
    one = rows(3, 10, 0)
    with pytest.raises(TypeError, match=r"\[sparse.stack_buckets\] buckets is one input"):
        stack_buckets(one)
    with pytest.raises(TypeError, match=r"\[sparse.stack_buckets\] buckets is ndarray"):
        stack_buckets(np.zeros((2, 3)))
    with pytest.raises(TypeError, match=r"buckets\[0\] is a dense array"):
        stack_buckets([np.zeros((2, 3))])
