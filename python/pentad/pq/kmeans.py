# SPDX-License-Identifier: Apache-2.0
"""k-means: native, deterministic, optionally with clusters of equal sizes."""

from typing import Any, NamedTuple

import numpy as np

from pentad import _C
from pentad._arrays import is_numpy, like, to_numpy
from pentad._checks import check_choice, check_count, check_floats
from pentad.pq.assign import METRICS, MOST_CENTROIDS, code_dtype, nearest

_LARGEST = 2.0**50  # of a component: its square, summed, is far from the end of float32


class KMeans(NamedTuple):
    """What `kmeans` found.

    Examples
    --------
    >>> import numpy as np
    >>> found = pentad.pq.kmeans(np.array([[0.0], [1.0]]), 2)
    >>> isinstance(found, pentad.pq.KMeans)
    True
    """

    centroids: Any
    assignment: Any
    distances: Any
    objective: float


def kmeans(x, k, *, metric="l2", iterations=10, seed=0, balanced=False, progress=None):
    """Cluster rows with Lloyd's algorithm, accelerated, from a k-means++ start.

    The start draws from up to 32 rows per centroid (Arthur and Vassilvitskii 2007); a centroid
    without rows takes the row farthest from its own. With squared distances, centroids go on beyond
    the means with Nesterov's momentum (Nesterov 1983; restarts as in O'Donoghue and Candes 2015),
    and the last iteration ends on the means: 10 iterations come as far as some 25 of Lloyd's. The
    result depends on the arguments alone, and the iterations end early where nothing changes any
    more.

    Parameters
    ----------
    x : (n, dim) float32, float16, bfloat16 or float64
        Trained on in float32.
    k : int
        1 to 65,536, at most n.
    metric : {"l2", "ip", "cosine"}
        Squared distance; the largest inner product, with means as centroids; spherical k-means
        (Dhillon and Modha 2001): rows and centroids are scaled to unit length.
    iterations : int
    seed : int
    balanced : bool
        Give every cluster floor(n / k) or ceil(n / k) rows: costs go through Sinkhorn's iterations
        (Cuturi 2013) and are rounded greedily. Takes memory for two (n, k) arrays of float32.
    progress : callable, optional
        Called as ``progress("k-means", done, iterations)``.

    Returns
    -------
    KMeans
        `centroids` (k, dim) float32; `assignment` (n,) uint8, int32 where k > 256, to the nearest
        centroid, or the balanced one; `distances` (n,) float32, the squared distance, minus the
        inner product, or 1 - cosine; `objective`, their sum.

    Raises
    ------
    ValueError
        For k above n, an unknown metric, another shape, NaN or infinity in `x`, and, for balanced
        clusters but those of cosine, a component beyond 2**50.
    TypeError
        For another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[0.0], [0.2], [5.0], [5.2]])
    >>> found = pentad.pq.kmeans(x, 2)
    >>> np.sort(found.centroids[:, 0].astype(float)).round(2).tolist()
    [0.1, 5.1]
    >>> round(found.objective, 3)
    0.04
    """
    op = "pq.kmeans"
    is_numpy(op, x=x)
    check_floats(op, x=x)
    check_choice(op, "metric", metric, METRICS)
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"[{op}] x has shape {tuple(x.shape)}, expected (n, dim)")
    k = check_count(op, "k", k, 1)
    if k > min(x.shape[0], MOST_CENTROIDS):
        raise ValueError(
            f"[{op}] k is {k}, but there are {x.shape[0]} rows (at most {MOST_CENTROIDS} centroids)"
        )
    iterations = check_count(op, "iterations", iterations)
    seed = check_count(op, "seed", seed)
    rows = as_float32(op, x, metric)
    if balanced:
        if max(rows.max(), -rows.min()) > _LARGEST:
            raise ValueError(f"[{op}] x holds a component beyond 2**50, which balanced cannot take")
        centroids, assignment = _balanced(rows, k, metric, iterations, seed, progress)
        distances = _costs(rows, centroids, metric, assignment)
    else:
        sets = rows[:, None]
        centroids = start(sets, k, seed)
        lloyd(sets, centroids, metric, iterations, progress and _stage(progress, "k-means"))
        codes, costs = nearest(sets, centroids, metric, distances=True)
        centroids, assignment, distances = centroids[0], codes[:, 0, 0], costs[:, 0, 0]
        if metric == "cosine":
            distances += 1
    objective = float(distances.sum(dtype=np.float64))
    return KMeans(like(x, centroids), like(x, assignment), like(x, distances), objective)


def _stage(progress, stage):
    return lambda done, total: progress(stage, done, total)


def as_float32(op, x, metric):
    """Rows in numpy, checked to be finite; of unit length (or zero) where `metric` is cosine."""
    with np.errstate(over="ignore"):
        rows = to_numpy(x).astype(np.float32, copy=False)
    # A sum of finite numbers may overflow, but costs no array of booleans.
    if not np.isfinite(rows.sum(dtype=np.float64)) and not np.isfinite(rows).all():
        raise ValueError(f"[{op}] x contains NaN or infinity")
    if metric == "cosine":
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))[:, None]
        rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0, casting="unsafe")
    return rows


def start(x, k, seed):
    """k-means++ centroids (M, k, dsub) of x (n, M, dsub) float32."""
    centroids = np.empty((x.shape[1], k, x.shape[2]), np.float32)
    _C.pq_kmeans_start(x, seed % 2**64, centroids)
    return centroids


def lloyd(x, centroids, metric, iterations, progress=None):
    """Move `centroids` in place; ``progress(done, total)`` after every iteration."""
    codes = np.full((x.shape[1], x.shape[0]), -1, np.int32)
    # Accelerated, but for the last iteration, which ends on the means.
    before = centroids.copy() if metric == "l2" else None
    ahead = max(0, iterations - 1) if metric == "l2" else 0
    if progress is None:
        if not (ahead and _C.pq_kmeans_steps(x, metric, ahead, centroids, codes, before)):
            _C.pq_kmeans_steps(x, metric, iterations - ahead, centroids, codes)
        return
    for done in range(iterations):
        progress(done, iterations)
        momentum = before if done < ahead else None
        if _C.pq_kmeans_steps(x, metric, 1, centroids, codes, momentum):
            break
    progress(iterations, iterations)


# --- Balanced -------------------------------------------------------------------------------------

_SINKHORN_ROUNDS = 10
_SHARPNESS = 20  # the typical excess over a row's least cost, in units of the temperature


def _scores(rows, centroids, metric):
    """(n, k), the larger the nearer, up to a constant of each row."""
    if metric == "cosine":
        norms = np.sqrt((centroids**2).sum(1))
        return rows @ (centroids / np.where(norms > 0, norms, 1)[:, None]).T
    if metric == "ip":
        return rows @ centroids.T
    centre = centroids.mean(0)
    moved = centroids - centre
    return (rows - centre) @ (2 * moved).T - (moved**2).sum(1)


def _costs(rows, centroids, metric, assignment):
    own = centroids[assignment]
    if metric == "l2":
        difference = rows - own
        return np.einsum("ij,ij->i", difference, difference)
    products = np.einsum("ij,ij->i", rows, own)
    if metric == "ip":
        return -products
    norms = np.sqrt(np.einsum("ij,ij->i", own, own))
    return 1 - products / np.where(norms > 0, norms, 1)


def _log_sum(a, axis):
    top = a.max(axis, keepdims=True)
    return np.squeeze(top, axis) + np.log(np.exp(a - top).sum(axis))


def _balanced_assignment(scores):
    """Rows to clusters of floor(n / k) or ceil(n / k): Sinkhorn's plan, rounded."""
    n, k = scores.shape
    scores -= scores.max(1, keepdims=True)
    spread = float(-scores.mean(dtype=np.float64))
    if spread > 0:
        scores *= _SHARPNESS / spread
    price = np.zeros(k, np.float32)
    for _ in range(_SINKHORN_ROUNDS):  # alternately the rows' sums 1 and the columns' n / k
        plan = scores + price
        plan -= _log_sum(plan, 1)[:, None]
        price += np.float32(np.log(n / k)) - _log_sum(plan, 0)
    scores += price
    scores -= scores.max(1, keepdims=True)

    assignment = np.full(n, -1, np.int64)
    for room in (np.full(k, n // k), np.ones(k, np.int64)):
        places = min(int(room.sum()), int((assignment < 0).sum()))
        while places:
            left = np.flatnonzero(assignment < 0)
            open_ = np.where(room > 0, 0, -np.inf).astype(np.float32)
            masked = scores[left] + open_
            choice = masked.argmax(1)
            # By cluster, and within by what the row would lose, the surest first.
            order = np.lexsort((left, -masked[np.arange(len(left)), choice], choice))
            sizes = np.bincount(choice, minlength=k)
            rank = np.arange(len(left)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            taken = order[rank < room[choice[order]]]
            assignment[left[taken]] = choice[taken]
            room = room - np.bincount(choice[taken], minlength=k)
            places = min(int(room.sum()), int((assignment < 0).sum()))
    return assignment


def _balanced(rows, k, metric, iterations, seed, progress):
    centroids = start(rows[:, None], k, seed)[0]
    assignment = None
    for done in range(iterations):
        if progress:
            progress("k-means", done, iterations)
        found = _balanced_assignment(_scores(rows, centroids, metric))
        if assignment is not None and (found == assignment).all():
            break
        assignment = found
        sums = np.zeros(centroids.shape)
        np.add.at(sums, assignment, rows)
        if metric == "cosine":
            size = np.sqrt((sums**2).sum(1, keepdims=True))
        else:
            size = np.bincount(assignment, minlength=k)[:, None]
        centroids = np.where(size > 0, sums / np.where(size > 0, size, 1), centroids)
        centroids = centroids.astype(np.float32)
    else:  # the centroids have moved since, or never
        assignment = _balanced_assignment(_scores(rows, centroids, metric))
    if progress:
        progress("k-means", iterations, iterations)
    return centroids, assignment.astype(code_dtype(k))
