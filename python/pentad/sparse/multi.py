# SPDX-License-Identifier: Apache-2.0
"""Several sparse vectors for each row, one in each bucket, scored and searched as one."""

import numpy as np

from pentad._arrays import dtype_name, is_numpy, runs_cuda
from pentad._checks import check_count, check_sequence
from pentad.sparse._csr import MOST_COLUMNS, parts_of, rows_of
from pentad.sparse.score import score


def score_multi(queries, docs, *, vocab_sizes=None, pairs=None):
    """The sum over buckets of the inner products of sparse rows.

    With binary codes in every bucket, say the winners of several layers, it counts the winners that
    two rows share: the score of Jang et al. 2021, "Ultra-High Dimensional Sparse Representations
    with Binarization for Efficient Text Retrieval". It is the score of the rows that
    `stack_buckets` makes, summed as one.

    Parameters
    ----------
    queries : sequence of m sparse inputs (nq, V_i)
        One for each bucket, as `score` takes them; of one kind and dtype.
    docs : sequence of m sparse inputs (n, V_i)
        Bucket i of each row is scored with bucket i of each query.
    vocab_sizes : int or sequence of m ints, optional
        V_i; by default what the inputs say, or one more than the largest index.
    pairs : (p, 2) int64, optional
        (query, document): only their scores, as in `score`.

    Returns
    -------
    (nq, n), or (p,) with pairs
        Of the kind that `score` returns, with gradient to the values of both sides.

    Raises
    ------
    TypeError
        Inputs of different kinds or dtypes, or that are not sparse.
    ValueError
        Different numbers of buckets or rows, no bucket, columns that do not fit, and contents that
        `score` refuses.

    Examples
    --------
    >>> a = np.array([0, 2]), np.array([1, 5]), np.ones(2, np.float32)
    >>> b = np.array([0, 2]), np.array([0, 7]), np.ones(2, np.float32)
    >>> c = np.array([0, 2]), np.array([5, 7]), np.ones(2, np.float32)
    >>> pentad.sparse.score_multi([a, b], [c, b])
    array([[3.]], dtype=float32)
    """
    op = "sparse.score_multi"
    queries, docs = _buckets(op, "queries", queries), _buckets(op, "docs", docs)
    if len(queries) != len(docs):
        raise ValueError(f"[{op}] queries have {len(queries)} buckets but docs have {len(docs)}")
    sizes = _sizes(op, vocab_sizes, len(docs))
    widths = [
        _width(op, sides, size, i)
        for i, (*sides, size) in enumerate(zip(queries, docs, sizes, strict=True))
    ]
    stacked = (
        _stack(op, name, side, widths) for name, side in (("queries", queries), ("docs", docs))
    )
    return score(*stacked, pairs=pairs)


def stack_buckets(buckets, *, vocab_sizes=None):
    """Rows of several buckets as rows of one vocabulary, for `score` or a `SparseIndex`.

    The columns of a bucket come behind those of the buckets before it.

    Parameters
    ----------
    buckets : sequence of m sparse inputs (n, V_i)
        As `score` takes them; of one kind and dtype.
    vocab_sizes : int or sequence of m ints, optional
        V_i; by default what the inputs say, or one more than the largest index. Questions and
        documents must be given the same.

    Returns
    -------
    (indptr, indices, values, sum of V_i)
        CSR of the kind of the inputs, with gradient to their values; columns of a row in the
        order they came in.

    Raises
    ------
    TypeError
        Inputs of different kinds or dtypes, or that are not sparse.
    ValueError
        No bucket, different numbers of rows, columns that do not fit or are more than 2**31 - 1 in
        all, and contents that `score` refuses.

    Examples
    --------
    >>> a = np.array([0, 2]), np.array([1, 5]), np.ones(2, np.float32)
    >>> b = np.array([0, 1]), np.array([3]), np.ones(1, np.float32)
    >>> indptr, indices, values, columns = pentad.sparse.stack_buckets([a, b], vocab_sizes=8)
    >>> indices.tolist(), columns
    ([1, 5, 11], 16)
    """
    op = "sparse.stack_buckets"
    buckets = _buckets(op, "buckets", buckets)
    return _stack(op, "buckets", buckets, _sizes(op, vocab_sizes, len(buckets)))


def _buckets(op, name, buckets):
    if not isinstance(buckets, (list, tuple)) or any(getattr(x, "ndim", 2) == 1 for x in buckets):
        what = "one input" if isinstance(buckets, tuple) else type(buckets).__name__
        raise TypeError(
            f"[{op}] {name} is {what}, expected a list of sparse inputs, one for each bucket"
        )
    if not buckets:
        raise ValueError(f"[{op}] {name} has no bucket, expected at least one")
    return list(buckets)


def _sizes(op, sizes, count):
    if sizes is None:
        return [None] * count
    if not hasattr(sizes, "__len__"):
        return [check_count(op, "vocab_sizes", sizes)] * count
    sizes = [
        check_count(op, "vocab_sizes", size) for size in check_sequence(op, "vocab_sizes", sizes)
    ]
    if len(sizes) != count:
        raise ValueError(f"[{op}] vocab_sizes has {len(sizes)} numbers for {count} buckets")
    return sizes


def _width(op, sides, size, i):
    """The columns of a bucket on both sides."""
    if size is not None:
        return size
    for name, side in zip(("queries", "docs"), sides, strict=True):
        values = parts_of(op, f"{name}[{i}]", side).values
        if not isinstance(values, np.ndarray) and runs_cuda(values):
            from pentad.sparse import score_device

            return score_device.width(op, i, sides)
    return max(
        rows_of(op, f"{name}[{i}]", side).shape[1]
        for name, side in zip(("queries", "docs"), sides, strict=True)
    )


def _stack(op, name, buckets, sizes):
    """CSR of the buckets side by side; a size of None is what the bucket says."""
    names = [f"{name}[{i}]" for i in range(len(buckets))]
    parts = [parts_of(op, n, bucket) for n, bucket in zip(names, buckets, strict=True)]
    if not isinstance(parts[0].values, np.ndarray) and runs_cuda(parts[0].values):
        from pentad.sparse import score_device

        return score_device.stacked(op, name, parts, sizes)
    rows = [
        rows_of(op, n, bucket, vocab=size)
        for n, bucket, size in zip(names, buckets, sizes, strict=True)
    ]
    values = {n: part.values for n, part in zip(names, parts, strict=True)}
    numpy = is_numpy(op, **values)
    dtypes = {n: dtype_name(array) for n, array in values.items()}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"[{op}] {name} have different dtypes: {dtypes}")
    counts = {n: row.shape[0] for n, row in zip(names, rows, strict=True)}
    if len(set(counts.values())) > 1:
        raise ValueError(f"[{op}] {name} have different numbers of rows: {counts}")
    offsets = np.cumsum([0, *(row.shape[1] for row in rows)])
    if offsets[-1] > MOST_COLUMNS:
        raise ValueError(
            f"[{op}] {name} have {offsets[-1]} columns in all, expected at most {MOST_COLUMNS}"
        )
    indptr, order = _interleaved([np.asarray(part.indptr, np.int64) for part in parts])
    indices = np.concatenate(
        [np.asarray(p.indices, np.int64) + o for p, o in zip(parts, offsets[:-1], strict=True)]
    )[order].astype(np.int32)
    columns = int(offsets[-1])
    if numpy:
        return indptr, indices, np.concatenate(list(values.values()))[order], columns
    import torch

    merged = torch.cat(list(values.values()))[torch.from_numpy(order)]
    return torch.from_numpy(indptr), torch.from_numpy(indices), merged, columns


def _interleaved(indptrs):
    """(indptr, order): rows one behind the other, and which entry of all buckets stands where."""
    sizes = np.stack([np.diff(indptr) for indptr in indptrs], axis=1)  # (n, m)
    starts = np.cumsum(sizes.reshape(-1)).reshape(sizes.shape) - sizes
    order = np.empty(sizes.sum(), np.int64)
    before = 0
    for indptr, size, start in zip(indptrs, sizes.T, starts.T, strict=True):
        entries = np.arange(size.sum())
        order[np.repeat(start - indptr[:-1], size) + entries] = before + entries
        before += len(entries)
    return np.concatenate([[0], np.cumsum(sizes.sum(axis=1))]), order
