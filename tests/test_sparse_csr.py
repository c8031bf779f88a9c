# SPDX-License-Identifier: Apache-2.0
"""Sparse rows in every form that callers have, brought into one; contents that are refused."""

import subprocess
import sys

import numpy as np
import pytest

from pentad.sparse import _csr
from pentad.sparse._csr import Rows, rows_of

sparse = pytest.importorskip("scipy.sparse")
torch = pytest.importorskip("torch")

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


def draw(rng, n, V, most, *, duplicates=False, ordered=False, dtype=np.float32):
    """(indptr, indices, values) of rows of 0 to `most` entries."""
    lengths = rng.integers(0, most + 1, n)
    rows = [
        rng.integers(0, V, k) if duplicates else rng.permutation(V)[:k]
        for k in np.minimum(lengths, V)
    ]
    if ordered:
        rows = [np.sort(row) for row in rows]
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.concatenate([*rows, np.zeros(0)]).astype(np.int64)
    return indptr, indices, rng.standard_normal(len(indices)).astype(dtype)


def want(indptr, indices, values, V):
    """By a dictionary per row, in plain Python."""
    wide = np.float64 if values.dtype == np.float64 else np.float32
    starts, terms, numbers = [0], [], []
    place = np.zeros(len(indices), np.int64)
    for i in range(len(indptr) - 1):
        sums = {}
        for at in range(indptr[i], indptr[i + 1]):
            sums[int(indices[at])] = sums.get(int(indices[at]), 0.0) + float(values[at])
        order = sorted(sums)
        for at in range(indptr[i], indptr[i + 1]):
            place[at] = starts[-1] + order.index(int(indices[at]))
        starts.append(starts[-1] + len(order))
        terms += order
        numbers += [sums[term] for term in order]
    return (np.array(starts), np.array(terms), np.array(numbers).astype(wide), place, V)


def check(rows, expected):
    indptr, indices, values, place, V = expected
    assert isinstance(rows, Rows)
    assert rows.indptr.dtype == np.int64
    assert rows.indices.dtype == np.int32
    assert rows.values.dtype == values.dtype
    np.testing.assert_array_equal(rows.indptr, indptr)
    np.testing.assert_array_equal(rows.indices, indices)
    np.testing.assert_array_equal(rows.values, values)  # bit for bit: one order of addition
    assert rows.shape == (len(indptr) - 1, V)
    numbers = np.arange(len(values)) + 0.5
    np.testing.assert_array_equal(rows.to_caller(numbers), numbers[place])


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_rows_in_any_order_with_duplicates(rng, dtype, duplicates, ordered):
    for n, V, most in ((0, 5, 3), (1, 1, 1), (7, 3, 9), (40, 1000, 60)):
        parts = draw(rng, n, V, most, duplicates=duplicates, ordered=ordered, dtype=dtype)
        check(rows_of("op", "x", (*parts, V)), want(*parts, V))


def test_many_entries_with_any_number_of_threads(rng, threads):
    parts = draw(rng, 3000, 500, 120, duplicates=True)
    assert len(parts[1]) > 4 << 15  # several pieces
    expected = want(*parts, 500)
    for count in (1, 2, 5):
        threads(count)
        check(rows_of("op", "x", (*parts, 500)), expected)


def test_what_is_in_the_form_is_not_copied(rng):
    indptr, indices, values = draw(rng, 9, 50, 20, ordered=True)
    indices = indices.astype(np.int32)
    rows = rows_of("op", "x", (indptr, indices, values, 50))
    assert rows.place is None
    assert np.shares_memory(rows.indices, indices)
    assert np.shares_memory(rows.values, values)


def test_one_row_out_of_order_is_found(rng):
    """Wherever it stands: between rows that begin below the end of the one before."""
    indptr, indices, values = draw(rng, 30, 9, 4, ordered=True)
    starts = [i for i in range(len(indptr) - 1) if indptr[i + 1] - indptr[i] >= 2]
    assert rows_of("op", "x", (indptr, indices, values)).place is None
    for i in starts:
        turned = indices.copy()
        turned[indptr[i]], turned[indptr[i] + 1] = indices[indptr[i] + 1], indices[indptr[i]]
        check(rows_of("op", "x", (indptr, turned, values, 9)), want(indptr, turned, values, 9))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_indices_of_every_dtype(rng, dtype):
    parts = draw(rng, 6, 100, 12, duplicates=True)
    parts = parts[0].astype(dtype), parts[1].astype(dtype), parts[2]
    check(rows_of("op", "x", (*parts, 100)), want(*parts, 100))
    check(rows_of("op", "x", (*map(torch.from_numpy, parts), 100)), want(*parts, 100))


def test_strided_and_read_only_arrays(rng):
    parts = draw(rng, 6, 100, 12, duplicates=True)
    apart = [np.stack([a, a + 1], 1)[:, 0] for a in parts]
    for array in apart:
        array.flags.writeable = False
    check(rows_of("op", "x", (*apart, 100)), want(*parts, 100))


def test_columns_from_the_indices_the_tuple_or_the_call(rng):
    parts = np.array([0, 2]), np.array([7, 3]), np.ones(2, np.float32)
    assert rows_of("op", "x", parts).shape == (1, 8)
    assert rows_of("op", "x", parts, vocab=20).shape == (1, 20)
    assert rows_of("op", "x", (*parts, 9)).shape == (1, 9)
    none = np.array([0]), np.array([], np.int64), np.array([], np.float32)
    assert rows_of("op", "x", none).shape == (0, 0)
    with pytest.raises(ValueError, match=r"\[op\] x has 9 columns, expected 20"):
        rows_of("op", "x", (*parts, 9), vocab=20)


def test_the_last_column_of_the_most(rng):
    most = 2**31 - 1
    parts = np.array([0, 2]), np.array([most - 1, 0]), np.array([1, 2], np.float32)
    rows = rows_of("op", "x", (*parts, most))
    assert rows.shape == (1, most)
    np.testing.assert_array_equal(rows.indices, [0, most - 1])
    with pytest.raises(ValueError, match=f"an index {most} past its {most} columns"):
        rows_of("op", "x", (parts[0], parts[1] + 1, parts[2]))
    with pytest.raises(ValueError, match=f"{2**31} columns, expected at most {most}"):
        rows_of("op", "x", (*parts, 2**31))


def test_a_descent_anywhere_in_a_long_row_is_found():
    """Also from one piece of 32768 entries to the next."""
    indices, values = np.arange(70_000), np.ones(70_000, np.float32)
    for at in (1, 32_767, 32_768, 32_769, 65_536, 69_999):
        turned = indices.copy()
        turned[at - 1 : at + 1] = [at, at - 1]
        rows = rows_of("op", "x", (np.array([0, 70_000]), turned, values))
        np.testing.assert_array_equal(rows.indices, indices)
        np.testing.assert_array_equal(rows.place, turned)
        rows = rows_of("op", "x", (np.array([0, at, 70_000]), turned, values))
        assert rows.place is None  # from row to row a descent is none


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_and_least_numbers_are_kept(dtype):
    least, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    values = torch.tensor([most, -most, least, least / 4, -0.0], dtype=dtype)
    for indices in (torch.arange(5), torch.arange(5).flip(0)):
        rows = rows_of("op", "x", (torch.tensor([0, 5]), indices, values))
        np.testing.assert_array_equal(rows.to_caller(rows.values), values.double().numpy())


# --- Other kinds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["matrix", "array"])
@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"])
def test_scipy_of_every_format(rng, form, kind):
    dense = np.where(rng.random((7, 11)) < 0.3, rng.standard_normal((7, 11)), 0)
    dense = dense.astype(np.float32)
    x = getattr(sparse, f"{form}_{kind}")(dense)
    rows = rows_of("op", "x", x)
    back = sparse.csr_array((rows.values, rows.indices, rows.indptr), rows.shape).toarray()
    np.testing.assert_array_equal(back, dense)


def test_scipy_coo_with_duplicates_in_any_order(rng):
    row, column = rng.integers(0, 6, 90), rng.integers(0, 8, 90)
    values = rng.standard_normal(90)
    rows = rows_of("op", "x", sparse.coo_array((values, (row, column)), (6, 8)))
    order = np.argsort(row, kind="stable")
    indptr = np.searchsorted(row[order], np.arange(7))
    indptr, indices, sums, place, V = want(indptr, column[order], values[order], 8)
    back = np.empty_like(place)
    back[order] = place
    check(rows, (indptr, indices, sums, back, V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_torch_of_every_layout_and_dtype(rng, dtype):
    indptr, indices, values = draw(rng, 6, 20, 15, duplicates=True)
    values = torch.from_numpy(values).to(dtype)
    wide = values.double() if dtype == torch.float64 else values.float()
    expected = want(indptr, indices, wide.numpy(), 20)
    row = np.repeat(np.arange(6), np.diff(indptr))
    as_csr = torch.sparse_csr_tensor(indptr, indices, values, (6, 20), check_invariants=False)
    as_coo = torch.sparse_coo_tensor(np.stack([row, indices]), values, (6, 20))
    parts = torch.from_numpy(indptr), torch.from_numpy(indices), values, 20
    for x in (as_csr, as_coo, parts):
        rows = rows_of("op", "x", x)
        assert rows.dtype == str(dtype).removeprefix("torch.")
        check(rows, expected)


def test_torch_coo_in_any_order(rng):
    row, column = rng.integers(0, 6, 90), rng.integers(0, 8, 90)
    values = torch.from_numpy(rng.standard_normal(90))
    x = torch.sparse_coo_tensor(np.stack([row, column]), values, (6, 8))
    rows = rows_of("op", "x", x)
    back = sparse.csr_array((rows.values, rows.indices, rows.indptr), rows.shape).toarray()
    np.testing.assert_allclose(back, x.to_dense().numpy(), rtol=1e-14)  # another order of addition
    np.testing.assert_array_equal(rows.to_caller(rows.indices), column)
    again = rows_of("op", "x", x.coalesce())
    assert again.place is None
    np.testing.assert_array_equal(again.indices, rows.indices)
    np.testing.assert_array_equal(again.indptr, rows.indptr)


# --- Refused --------------------------------------------------------------------------------------

FINE = {"indptr": [0, 2, 3], "indices": [1, 3, 0], "values": [1.0, 2.0, 3.0]}


def altered(**parts):
    parts = FINE | parts
    floats = np.asarray(parts["values"], np.float32)
    return np.asarray(parts["indptr"]), np.asarray(parts["indices"]), floats, 4


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"indptr": [1, 2, 3]}, "x has an indptr that begins with 1, expected 0"),
        ({"indptr": [0, 3, 2]}, "x has an indptr that descends from 3 to 2"),
        ({"indptr": [0, -1, 3]}, "x has an indptr that descends from 0 to -1"),
        ({"indptr": [0, 2, 2]}, "x has an indptr that ends with 2, expected 3"),
        ({"indptr": [0, 2, 9]}, "x has an indptr that ends with 9, expected 3"),
        ({"indptr": np.array([0, 2, 2**63 + 3], np.uint64)}, "indptr that descends from 2 to -"),
        ({"indptr": np.zeros(0, np.int64)}, "x's indptr is empty"),
        ({"indices": [1, 4, 0]}, "x has an index 4 past its 4 columns"),
        ({"indices": [1, 2**32, 0]}, f"x has an index {2**32} past its 4 columns"),
        ({"indices": [1, -1, 0]}, "x has the index -1, expected none below 0"),
        ({"indices": [1, 3]}, "x has 2 indices but 3 values"),
        ({"indices": [[1, 3, 0]]}, r"x's indices have shape \(1, 3\), expected one axis"),
        ({"values": [1, np.nan, 0]}, "x has the value NaN, expected finite ones"),
        ({"values": [1, 2, -np.inf]}, "x has the value -infinity, expected finite ones"),
        ({"indices": [2, 2, 0], "values": [3e38, 3e38, 0]}, "duplicates whose sum is not finite"),
    ],
)
def test_contents_that_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        rows_of("op", "x", altered(**parts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(dtype, bad):
    """Also far behind, in the last of several pieces."""
    values = torch.ones(100_000, dtype=dtype)
    parts = torch.tensor([0, 50_000, 100_000]), torch.arange(100_000) % 50_000, values
    assert rows_of("op", "x", parts).place is None
    values[99_999] = bad
    with pytest.raises(ValueError, match="x has the value"):
        rows_of("op", "x", parts)


@pytest.mark.parametrize("at", [0, 40_000, 99_999])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_bad_index_in_any_piece(at, dtype):
    indices = np.arange(100_000, dtype=dtype)
    indices[at] = -5
    with pytest.raises(ValueError, match="x has the index -5"):
        rows_of("op", "x", (np.array([0, 100_000]), indices, np.ones(100_000, np.float32)))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((2, 3), np.float32), r"\[op\] x is a dense array, expected a torch sparse CSR"),
        (torch.ones(2, 3), "x is a dense tensor, expected"),
        ([[1, 2]], "x is list, expected"),
        ((np.array([0.0]), np.array([0]), np.ones(1)), "x's indptr has dtype float64"),
        ((np.array([0, 1]), np.array([0.0]), np.ones(1)), "x's indices has dtype float64"),
        ((np.array([0, 1]), np.array([0]), np.ones(1, int)), "x's values has dtype int64"),
        ((np.array([0, 1]), torch.tensor([0]), np.ones(1)), "mix numpy arrays and torch tensors"),
        (([0, 1], [0], [1.0]), "x's indptr is list, expected a torch tensor or numpy array"),
    ],
)
def test_kinds_and_dtypes_that_are_refused(x, message):
    with pytest.raises(TypeError, match=message):
        rows_of("op", "x", x)


@pytest.mark.filterwarnings("ignore:Sparse CSC tensor support is in beta")
def test_columns_first_are_refused():
    with pytest.raises(TypeError, match="x is a sparse_csc tensor, expected"):
        rows_of("op", "x", torch.eye(2).to_sparse_csc())


def test_shapes_that_are_refused():
    with pytest.raises(ValueError, match="x is a tuple of 2, expected"):
        rows_of("op", "x", (np.array([0]), np.array([0])))
    with pytest.raises(ValueError, match=r"x has shape \(2, 2, 2\), expected \(rows, columns\)"):
        rows_of("op", "x", torch.ones(2, 2, 2).to_sparse())
    with pytest.raises(ValueError, match="x has 1 dense axes"):
        rows_of("op", "x", torch.ones(2, 2).to_sparse(1))
    with pytest.raises(ValueError, match=r"x has shape \(3,\), expected"):
        rows_of("op", "x", sparse.coo_array(np.ones(3)))


def test_nothing_is_changed():
    parts = altered(indices=[3, 1, 0])
    before = [np.copy(a) for a in parts]
    rows_of("op", "x", parts)
    for one, other in zip(parts, before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_neither_torch_nor_scipy_is_imported():
    code = (
        "import sys, numpy as np, pentad.sparse\n"
        "x = np.array([0, 1]), np.array([0]), np.ones(1, np.float32)\n"
        "assert pentad.sparse.score(x, x).item() == 1\n"
        "assert not {'torch', 'scipy'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_merge_into_arrays_of_another_size_is_refused():
    """The entry itself: nothing may write past an output."""
    indptr, indices, values, columns = altered(indices=[3, 1, 0])
    outs = [np.empty(3, np.int64), np.empty(3, np.int32), np.empty(3, np.float32)]
    given = ("op", "x", indptr, indices, values, columns)
    assert _csr._C.sparse_merge(*given, *outs, np.empty(3, np.int64)) == 3
    for i in range(4):
        args = [*outs, np.empty(3, np.int64)]
        args[i] = args[i][:2]
        with pytest.raises(ValueError, match=r"\[op\]"):
            _csr._C.sparse_merge(*given, *args)
