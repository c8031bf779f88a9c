# SPDX-License-Identifier: Apache-2.0
"""Sparse scores by the CUDA kernels: rows are checked and brought into one form where they are.

What is checked is what the CPU checks (``csrc/sparse/csr.h``), by operations of torch that end in a
few flags, and the host waits for these alone. While a graph is captured it cannot wait: rows are
then taken for checked, with terms that rise, and what is wrong makes scores undefined, no more.
"""

from typing import Any, NamedTuple

import torch

from pentad import _C
from pentad._arrays import is_numpy, on_device, to_numpy
from pentad._errors import DeviceError
from pentad.sparse import _csr

MOST_TABLE = 1 << 22  # terms of a table; of larger vocabularies those that occur are counted


class Side(NamedTuple):
    """Checked rows: terms rise in each, none twice.

    indptr (n + 1,) int64, terms (nnz,) int32, values (nnz,) float32; place (given,) int64 or None
    is where each given value stands.
    """

    indptr: Any
    terms: Any
    values: Any
    place: Any = None

    def to_caller(self, gradient):
        return gradient if self.place is None else gradient[self.place]


def score(queries, docs, pairs, columns):
    """Scores of the three arrays of either side, in float32."""
    q, d, columns = _sides(queries, docs, pairs, columns)
    like = q.values
    if pairs is None:
        out = like.new_empty((len(q.indptr) - 1, len(d.indptr) - 1))
        scratch = on_device(like, _C.sparse_score_scratch, out.shape[0], columns)
        _C.sparse_score_cuda(*q[:3], *d[:3], columns, out, *scratch)
        return out
    out = like.new_empty(len(pairs))
    query, doc = pairs.T.contiguous()
    _C.sparse_score_pairs_cuda(*q[:3], *d[:3], query, doc, out, *on_device(like))
    return out


def score_backward(d_out, queries, docs, pairs, columns, wanted):
    """The gradients of the given values of both sides, in float32, or None."""
    q, d, columns = _sides(queries, docs, pairs, columns)
    sides = q, d
    found = [
        torch.empty_like(side.values) if want else None
        for side, want in zip(sides, wanted, strict=True)
    ]
    if pairs is None:
        sizes = (*d_out.shape, len(q.terms), len(d.terms), columns)
        scratch = on_device(d_out, _C.sparse_score_backward_scratch, *sizes)
        _C.sparse_score_backward_cuda(d_out, *q[:3], *d[:3], columns, *found, *scratch)
    else:
        rows = pairs.T.contiguous()
        for i, (own, out) in enumerate(zip(sides, found, strict=True)):
            if out is not None:
                sorted_rows, order = torch.sort(rows[i], stable=True)
                every = torch.arange(len(own.indptr), device=d_out.device)
                starts = torch.searchsorted(sorted_rows, every)
                _C.sparse_score_pairs_backward_cuda(
                    d_out, *own[:3], *sides[1 - i][:3], starts, order, rows[1 - i], out,
                    *on_device(d_out),
                )  # fmt: skip
    return [
        None if grad is None else side.to_caller(grad)
        for side, grad in zip(sides, found, strict=True)
    ]


def checked(op, name, indptr, indices, values, columns) -> Side:
    """One argument's rows."""
    indptr = indptr.to(torch.int64)
    flags = torch.stack(_flags(indptr, indices, values, columns))
    bad, falls = (False, False) if _capturing(values) else flags.tolist()
    if bad:
        _refuse(op, name, indptr, indices, values, columns)
    return _formed(op, name, indptr, indices, values, columns, falls)


# --- Several buckets ------------------------------------------------------------------------------


def width(op, bucket, sides):
    """The columns of a bucket, where nobody named them for all."""
    parts = [
        _csr.parts_of(op, f"{name}[{bucket}]", side)
        for name, side in zip(("queries", "docs"), sides, strict=True)
    ]
    return max(_columns(part) for part in parts)


def _columns(part):
    if part.columns is not None:
        return part.columns
    return int(part.indices.max()) + 1 if len(part.indices) else 0


def stacked(op, name, parts, sizes):
    """CSR of the buckets side by side; a size of None is what the bucket says."""
    names = [f"{name}[{i}]" for i in range(len(parts))]
    is_numpy(op, **{n: part.values for n, part in zip(names, parts, strict=True)}, cuda=True)
    dtypes = {n: str(part.values.dtype) for n, part in zip(names, parts, strict=True)}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"[{op}] {name} have different dtypes: {dtypes}")
    counts = {n: len(part.indptr) - 1 for n, part in zip(names, parts, strict=True)}
    if len(set(counts.values())) > 1:
        raise ValueError(f"[{op}] {name} have different numbers of rows: {counts}")
    rows, indices, before = [], [], 0
    every = torch.arange(len(parts[0].indptr) - 1, device=parts[0].values.device)
    for i, (n, part, size) in enumerate(zip(names, parts, sizes, strict=True)):
        if None not in (size, part.columns) and size != part.columns:
            raise ValueError(f"[{op}] {n} has {part.columns} columns, expected {size}")
        size = _columns(part) if size is None else size
        checked(op, n, *part[:3], size)
        lengths = part.indptr.to(torch.int64).diff()
        row = torch.repeat_interleave(every, lengths, output_size=len(part.indices))
        rows.append(row * len(parts) + i)
        indices.append(part.indices.to(torch.int64) + before)
        before += size
    if before > _csr.MOST_COLUMNS:
        raise ValueError(
            f"[{op}] {name} have {before} columns in all, expected at most {_csr.MOST_COLUMNS}"
        )
    order = torch.sort(torch.cat(rows), stable=True).indices
    indptr = sum(part.indptr.to(torch.int64) for part in parts)
    values = torch.cat([part.values for part in parts])[order]
    return indptr, torch.cat(indices)[order].int(), values, before


# --- The one form ---------------------------------------------------------------------------------


def _sides(queries, docs, pairs, columns):
    """Both sides, and how many terms there are to a table."""
    op = "sparse.score"
    if torch.float64 in (queries[2].dtype, docs[2].dtype):
        raise DeviceError(f"[{op}] there is no CUDA kernel for float64")
    given = [
        (name, indptr.to(torch.int64), indices, values)
        for name, (indptr, indices, values) in (("queries", queries), ("docs", docs))
    ]
    flags = [flag for _, *side in given for flag in _flags(*side, columns)]
    if pairs is not None:
        sizes = [len(side[1]) - 1 for side in given]
        beyond = (pairs[:, 0] >= sizes[0]) | (pairs[:, 1] >= sizes[1])
        flags.append(((pairs < 0).any(1) | beyond).any())
    raised = [False] * len(flags) if _capturing(given[0][3]) else torch.stack(flags).tolist()
    for side, bad in zip(given, raised[0:4:2], strict=True):
        if bad:
            _refuse(op, *side, columns)
    if pairs is not None and raised[4]:
        _refuse_pairs(op, pairs, sizes)
    sides = [
        _formed(op, *side, columns, falls) for side, falls in zip(given, raised[1:4:2], strict=True)
    ]
    if pairs is None and columns > MOST_TABLE:
        distinct, ranks = torch.unique(
            torch.cat([side.terms for side in sides]), return_inverse=True
        )
        parts = ranks.int().split([len(side.terms) for side in sides])
        sides = [side._replace(terms=part) for side, part in zip(sides, parts, strict=True)]
        columns = len(distinct)
    return *sides, columns


def _formed(op, name, indptr, indices, values, columns, falls):
    if falls:
        return _merged(op, name, indptr, indices, values, columns)
    return Side(indptr.contiguous(), _contiguous(indices, torch.int32), _contiguous(values))


def _capturing(tensor):
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _contiguous(tensor, dtype=torch.float32):
    return tensor.detach().to(dtype).contiguous()


def _flags(indptr, indices, values, columns):
    """Whether rows are to be refused, and whether terms do not rise."""
    n = len(indices)
    bad = (indptr[0] != 0) | (indptr[-1] != n) | (indptr.diff() < 0).any()
    if n == 0:
        return bad, torch.zeros_like(bad)
    bad = bad | ~values.isfinite().all() | (indices.min() < 0) | (indices.max() >= columns)
    begins = torch.zeros(n + 1, dtype=torch.bool, device=indices.device)
    begins.index_fill_(0, indptr.clamp(0, n), True)
    return bad, ((indices.diff() <= 0) & ~begins[1:n]).any()


def _refuse(op, name, indptr, indices, values, columns):
    """Raises what the CPU says of these rows."""
    arrays = (to_numpy(a.detach().cpu()) for a in (indptr, indices, values))
    dtype = str(values.dtype).removeprefix("torch.")
    _csr.canonical(op, name, *arrays, columns, dtype)
    raise ValueError(f"[{op}] {name} changed while they were read")


def _refuse_pairs(op, pairs, sizes):
    for column, (name, rows) in enumerate(zip(("query", "doc"), sizes, strict=True)):
        for row in pairs[:, column].tolist():
            if not 0 <= row < rows:
                raise ValueError(
                    f"[{op}] pairs have a {name} {row}, expected 0 to {rows - 1}, of {rows} rows"
                )


def _merged(op, name, indptr, indices, values, columns):
    """Sorted by term, equal terms summed in double in the caller's order."""
    n = len(indptr) - 1
    every = torch.arange(n + 1, device=indptr.device)
    row = torch.repeat_interleave(every[:n], indptr.diff(), output_size=len(indices))
    key, order = torch.sort((row << 31) + indices, stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key.diff() != 0
    starts = first.nonzero()[:, 0]
    lengths = torch.cat([starts, starts.new_tensor([len(key)])]).diff()
    sums = torch.segment_reduce(values.detach()[order].double(), "sum", lengths=lengths).float()
    if not sums.isfinite().all():
        _refuse(op, name, indptr, indices, values, columns)
    kept = key[starts]
    place = torch.empty_like(order)
    place[order] = first.cumsum(0) - 1
    terms = (kept & (2**31 - 1)).int()
    return Side(torch.searchsorted(kept >> 31, every), terms, sums, place)
