# SPDX-License-Identifier: Apache-2.0
"""Codebooks for product, residual and grouped quantization, and the rotations before them."""

from typing import Any, NamedTuple

import numpy as np

from pentad._arrays import is_numpy, like
from pentad._checks import check_choice, check_count, check_floats
from pentad.pq import _exact
from pentad.pq.assign import FORMS, METRICS, assign_kernel, nearest
from pentad.pq.kmeans import as_float32, lloyd, start

_ROTATIONS = ("opq", "random_hadamard")
_ROWS = 256  # per centroid; more rows move the centroids little
_OPQ_ROUNDS = 5  # per iteration: they are not accelerated


class Trained(NamedTuple):
    """What `train_codebooks` found: quantize ``x @ rotation.T``, or `x` where rotation is None.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((64, 8))
    >>> isinstance(pentad.pq.train_codebooks(x, 2, 4), pentad.pq.Trained)
    True
    """

    codebooks: Any
    rotation: Any


def train_codebooks(
    x,
    M,
    nbits,
    *,
    form="product",
    metric="l2",
    rotation=None,
    iterations=10,
    seed=0,
    progress=None,
):
    """Train M codebooks of 2^nbits centroids by k-means, on up to 256 rows per centroid.

    Parameters
    ----------
    x : (n, dim) float32, float16, bfloat16 or float64
        At least 2^nbits rows; more than 256 times as many are sampled.
    M : int
        Codebooks. In the product form it divides dim.
    nbits : int
        1 to 16.
    form : {"product", "residual", "grouped"}
        Of sub-vectors; of what the codebooks before left; of the whole rows, each from its own
        start.
    metric : {"l2", "ip", "cosine"}
        What the codes shall serve. All minimise the squared error of reconstruction; for "cosine"
        that of the rows scaled to unit length.
    rotation : {None, "opq", "random_hadamard"}
        Rotate the rows first: by the matrix that is optimised together with the codebooks (Ge, He,
        Ke and Sun 2013; the product form alone), or by random signs and Hadamard transforms. The
        bits of the former are those of numpy's linear algebra, and may differ between machines.
    iterations : int
        Of k-means. OPQ alternates five times as often before.
    seed : int
    progress : callable, optional
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    Trained
        `codebooks` (M, 2^nbits, dsub) float32, and `rotation` (dim, dim) float32, orthogonal, or
        None: codes are those of ``x @ rotation.T``.

    Raises
    ------
    ValueError
        For fewer rows than centroids, M that does not divide dim, an unknown form, metric or
        rotation, and NaN or infinity in `x`.
    TypeError
        For another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
    >>> codebooks, rotation = pentad.pq.train_codebooks(x, 4, 6, rotation="opq")
    >>> codebooks.shape, rotation.shape
    ((4, 64, 2), (8, 8))
    >>> pentad.pq.assign(x @ rotation.T, codebooks).shape
    (1000, 4)
    """
    op = "pq.train_codebooks"
    is_numpy(op, x=x)
    check_floats(op, x=x)
    check_choice(op, "form", form, FORMS)
    check_choice(op, "metric", metric, METRICS)
    if rotation is not None:
        check_choice(op, "rotation", rotation, _ROTATIONS)
    M = check_count(op, "M", M, 1)
    nbits = check_count(op, "nbits", nbits, 1)
    if nbits > 16:
        raise ValueError(f"[{op}] nbits is {nbits}, expected 1 to 16")
    iterations = check_count(op, "iterations", iterations)
    seed = check_count(op, "seed", seed)
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"[{op}] x has shape {tuple(x.shape)}, expected (n, dim)")
    n, dim = x.shape
    if form == "product" and dim % M:
        raise ValueError(f"[{op}] x has {dim} columns, which {M} codebooks do not divide")
    if n < 2**nbits:
        raise ValueError(f"[{op}] x has {n} rows, but {2**nbits} centroids need as many")
    if rotation == "opq" and form != "product":
        raise ValueError(f"[{op}] rotation 'opq' is for the form 'product', not {form!r}")

    rows = as_float32(op, _sample(x, _ROWS * 2**nbits, seed), metric)
    matrix = None
    if rotation == "random_hadamard":
        matrix = random_hadamard(dim, seed)
    elif rotation == "opq":
        matrix = _opq(rows, M, 2**nbits, _OPQ_ROUNDS * iterations, seed, progress)
    if matrix is not None:
        rows = _exact.rotated(rows, matrix)
    codebooks = _TRAIN[form](rows, M, 2**nbits, iterations, seed, progress)
    return Trained(like(x, codebooks), None if matrix is None else like(x, matrix))


def _sample(x, most, seed):
    if x.shape[0] <= most:
        return x
    chosen = np.sort(np.random.default_rng(seed).permutation(x.shape[0])[:most])
    if isinstance(x, np.ndarray):
        return x[chosen]
    import torch

    return x.detach()[torch.from_numpy(chosen)]


def _report(progress, stage, first=0, of=None):
    """Iterations of one of several k-means as a part of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(stage, first + done, of or total)


# --- Forms ----------------------------------------------------------------------------------------


def _product(rows, M, k, iterations, seed, progress):
    parts = rows.reshape(len(rows), M, -1)
    codebooks = start(parts, k, seed)
    lloyd(parts, codebooks, "l2", iterations, _report(progress, "training codebooks"))
    return codebooks


def _residual(rows, M, k, iterations, seed, progress):
    rest, codebooks = rows.copy(), []
    for level in range(M):
        book = start(rest[:, None], k, seed + level)
        report = _report(progress, "training codebooks", level * iterations, M * iterations)
        lloyd(rest[:, None], book, "l2", iterations, report)
        codes = nearest(rest[:, None], book, "l2")[0][:, 0, 0]
        rest -= book[0, codes]
        codebooks.append(book[0])
    return np.stack(codebooks)


def _grouped(rows, M, k, iterations, seed, progress):
    whole = np.broadcast_to(rows[:, None], (len(rows), M, rows.shape[1]))
    codebooks = start(whole, k, seed)
    lloyd(whole, codebooks, "l2", iterations, _report(progress, "training codebooks"))
    return codebooks


_TRAIN = {"product": _product, "residual": _residual, "grouped": _grouped}


# --- Rotations ------------------------------------------------------------------------------------


def random_hadamard(dim, seed):
    """A random orthogonal (dim, dim) float32 matrix of signs and normalised Hadamard transforms.

    Twice: signs, the transform of the first 2^p columns, 2^p being the largest power of two up to
    dim, and where that is not dim, signs and the transform of the last 2^p.
    """
    rng = np.random.default_rng(seed)
    size = 1 << (dim.bit_length() - 1)
    hadamard = np.ones((1, 1))
    while len(hadamard) < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]]) / np.sqrt(2)
    matrix = np.eye(dim)
    for block in (slice(0, size), slice(dim - size, dim)) * 2:
        matrix *= rng.choice([-1.0, 1.0], dim)[:, None]
        matrix[block] = hadamard @ matrix[block]
    return matrix.astype(np.float32)


def _eigenvalue_allocation(rows, M):
    """Principal directions, dealt to parts of like products of variances (section 4)."""
    covariance = np.cov(rows, rowvar=False, dtype=np.float64).reshape(rows.shape[1], -1)
    variances, directions = np.linalg.eigh(covariance)
    width = rows.shape[1] // M
    parts, weights = [[] for _ in range(M)], np.zeros(M)
    smallest = max(variances[-1], 0) * 1e-12 + np.finfo(np.float64).tiny
    logs = np.log(np.maximum(variances, smallest))
    for i in reversed(range(len(logs))):
        open_ = [m for m in range(M) if len(parts[m]) < width]
        m = min(open_, key=lambda m: (weights[m], m))
        parts[m].append(i)
        weights[m] += logs[i] - logs[0]
    return directions.T[np.concatenate(parts)]


def _opq(rows, M, k, rounds, seed, progress):
    """Alternate: the codebooks of the rotated rows, and the rotation onto what they decode to."""
    report = _report(progress, "finding the rotation") or (lambda done, total: None)
    matrix = _eigenvalue_allocation(rows, M).astype(np.float32)
    codebooks = None
    for done in range(rounds):
        report(done, rounds)
        rotated = (rows @ matrix.T).reshape(len(rows), M, -1)
        if codebooks is None:
            codebooks = start(rotated, k, seed)
        lloyd(rotated, codebooks, "l2", 1)
        codes = assign_kernel(rotated.reshape(rows.shape), codebooks, "l2", "product", 0)
        decoded = codebooks[np.arange(M), codes].reshape(rows.shape)
        # The orthogonal R of least |X R' - Y| is V U' for X' Y = U S V' (Schoenemann 1966).
        u, _, vt = np.linalg.svd((rows.T @ decoded).astype(np.float64))
        matrix = (u @ vt).T.astype(np.float32)
    report(rounds, rounds)
    return matrix
