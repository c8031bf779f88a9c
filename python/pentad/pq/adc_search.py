# SPDX-License-Identifier: Apache-2.0
"""The best rows of product codes for float queries, without the matrix of scores."""

import numpy as np

from pentad._arrays import is_numpy
from pentad._checks import FLOATS, check_choice, check_count, check_dtype
from pentad.pq import _scan
from pentad.pq.adc import METRICS, adc
from pentad.pq.lookup import INTEGERS

_CHUNK = 1 << 22  # scores at a time, where they are formed


def topk_adc(queries, codes, codebooks, k, *, metric="l2", mask=None):
    """The k rows of codes that `adc` scores best, exactly, without forming the (nq, n) scores.

    Tables of bytes bound every score from below, 64 rows at a time, and only rows whose bound is
    under the k-th best score so far are summed in float32 (``csrc/pq/code_scan.h``; the idea is
    Andre et al. 2015, "Cache locality is not enough", PQ Fast Scan). For repeated searches of the
    same codes use `PQIndex`, which keeps them in the layout that this function makes of them.

    Parameters
    ----------
    queries : (nq, M * width) float32, float16, bfloat16 or float64
        Taken in float32.
    codes : (n, M) of any integer dtype
    codebooks : (M, K, width) float32, float16, bfloat16 or float64
        Taken in float32. Beyond 256 rows, and for "cosine", scores are formed a part at a time.
    k : int
    metric : {"l2", "ip", "cosine"}
        As in `adc`.
    mask : (n,) bool, optional
        Rows that may be returned.

    Returns
    -------
    scores : (nq, k) float32
        Best first, the same bits as those of `adc`; not differentiable (gather from `adc` for
        that). Where fewer than k rows exist: inf for "l2", else -inf.
    ids : (nq, k) int64
        Row numbers, ties to the smaller; -1 where fewer than k rows exist.

    Raises
    ------
    ValueError
        For a code that has no row, sizes that do not match, or scores that are not finite. (On a
        CUDA device, where neither is looked at, rows that score NaN are left out.)
    TypeError
        For codes that are no integers, or queries and codebooks that are no floats.

    Examples
    --------
    >>> import numpy as np
    >>> codebooks = np.array([[[0.0], [2.0]], [[4.0], [6.0]]], np.float32)
    >>> codes = np.array([[0, 0], [0, 1], [1, 1]], np.uint8)
    >>> pentad.pq.topk_adc(np.array([[2.0, 6.0]], np.float32), codes, codebooks, 2)
    (array([[0., 4.]], dtype=float32), array([[2, 1]]))
    """
    op = "pq.topk_adc"
    given = {"queries": queries, "codes": codes, "codebooks": codebooks, "mask": mask}
    numpy = is_numpy(op, cuda=True, **given, optional=["mask"])
    check_choice(op, "metric", metric, METRICS)
    check_dtype(op, "queries", queries, FLOATS)
    check_dtype(op, "codebooks", codebooks, FLOATS)
    check_dtype(op, "codes", codes, INTEGERS)
    if codebooks.ndim != 3 or codebooks.shape[0] < 1 or codebooks.shape[1] < 1:
        raise ValueError(
            f"[{op}] codebooks have shape {tuple(codebooks.shape)}, expected (M, K, width)"
        )
    count, _, width = codebooks.shape
    if codes.ndim != 2 or codes.shape[1] != count:
        raise ValueError(f"[{op}] codes have shape {tuple(codes.shape)}, expected (n, {count})")
    if queries.ndim != 2 or queries.shape[1] != count * width:
        raise ValueError(
            f"[{op}] queries have shape {tuple(queries.shape)}, expected (nq, {count * width})"
        )
    if mask is not None:
        check_dtype(op, "mask", mask, ("bool",))
        if tuple(mask.shape) != (codes.shape[0],):
            raise ValueError(
                f"[{op}] mask has shape {tuple(mask.shape)}, expected ({codes.shape[0]},)"
            )
    k = check_count(op, "k", k)
    if numpy:
        with np.errstate(over="ignore"):  # an infinity shows in the scores
            queries = queries.astype(np.float32, copy=False)
            codebooks = codebooks.astype(np.float32, copy=False)
        return search(queries, codes, codebooks, k, metric, mask)
    from pentad.pq.adc_search_autograd import topk_adc_op

    return topk_adc_op(queries.detach().float(), codes, codebooks.detach().float(), k, metric, mask)


def search(queries, codes, codebooks, k, metric, mask):
    """As `topk_adc`, of checked numpy arrays."""
    entries = codebooks.shape[1]
    if metric == "cosine" or entries > 256:
        return _by_parts(queries, codes, codebooks, k, metric, mask)
    if codes.size and not 0 <= codes.min() <= codes.max() < entries:
        at = codes[(codes < 0) | (codes >= entries)][0]
        raise ValueError(f"[pq.topk_adc] codes hold {at}, expected 0 to {entries - 1}")
    nbits = 4 if entries <= 16 else 6 if entries <= 64 else 8
    tables = _scan.tables(queries, codebooks, metric)
    if not np.isfinite(tables).all():
        raise ValueError("[pq.topk_adc] a score is a NaN or an infinity")
    # Entries that no code names repeat the last, which leaves the range of values as it is.
    tables = np.pad(tables, ((0, 0), (0, 0), (0, 2**nbits - entries)), mode="edge")
    n, M = codes.shape
    blocks = np.zeros((-(-n // _scan.BLOCK), *_scan.block_shape(M, nbits)), np.uint8)
    _scan.to_blocks(codes.astype(np.uint8, copy=False), nbits, 0, blocks)
    mask = None if mask is None else np.ascontiguousarray(mask)
    costs, ids = _scan.topk(tables, None, blocks, nbits, M, n, None, mask, None, k)
    return (costs if metric == "l2" else 0 - costs), ids


def _by_parts(queries, codes, codebooks, k, metric, mask):
    worst = np.float32(np.inf if metric == "l2" else -np.inf)
    best = np.full((len(queries), k), worst, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    rows = np.arange(len(codes)) if mask is None else np.flatnonzero(mask)
    step = max(1, _CHUNK // max(len(queries), 1))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        scores = adc(queries, codes[part], codebooks, metric=metric)
        if not np.isfinite(scores).all():
            raise ValueError("[pq.topk_adc] a score is a NaN or an infinity")
        both = np.concatenate([best, scores], axis=1)
        named = np.concatenate([ids, np.broadcast_to(part, scores.shape)], axis=1)
        # Rows rise over the parts, so a stable order is that of (score, id); -1 comes last.
        order = np.argsort(both if metric == "l2" else -both, axis=1, kind="stable")[:, :k]
        best, ids = np.take_along_axis(both, order, 1), np.take_along_axis(named, order, 1)
    return best, ids


__all__ = ["topk_adc"]
