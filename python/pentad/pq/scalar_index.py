# SPDX-License-Identifier: Apache-2.0
"""Search over vectors whose every component is rounded to a few bits; nothing is trained."""

import numpy as np

from pentad._checks import check_count
from pentad.pq import _exact
from pentad.pq._free import FreeIndex, as_constants


class ScalarIndex(FreeIndex):
    """Exhaustive search over components of 8 or 4 bits, at a scale for each vector.

    Vectors are turned at random, which makes their components alike whatever the data, and each
    component is rounded to the nearest of 2**nbits levels at even distances, the outermost of which
    lie at the vector's largest component; the scale that is kept is then the one of least squares.
    (Turning before rounding: Ashkboos et al. 2024, "QuaRot".) For Gaussian components the 16 levels
    of 4 bits lose about 1 % of the energy, the 256 of 8 bits 0.005 %.

    Scores are those of the decoded vectors, see `pentad.pq.PQIndex` for what is shared: ties by
    smaller id (of the costs before a query's constant is added), the same bits whatever the
    instruction set, threads and batch.

    Parameters
    ----------
    dim : int
        At most 4096.
    nbits : {8, 4}
        Of a component: a row takes ``dim * nbits / 8`` bytes, and 8 for its scale. 4 bits scan
        several times as fast.
    metric : {"l2", "ip", "cosine"}
    store : {None, "float16", "int8"}
        Keep the vectors too, for rescoring.
    seed : int
        Of the rotation.

    Examples
    --------
    >>> import numpy as np
    >>> vectors = np.random.default_rng(0).standard_normal((500, 24), np.float32)
    >>> index = pentad.pq.ScalarIndex(24, nbits=4)
    >>> index.add(vectors)
    >>> index.search(vectors[:3], k=2).ids[:, 0]
    array([0, 1, 2])
    """

    _kind = "pq.ScalarIndex"
    _options = ("dim", "nbits", "metric", "store", "seed")

    def __init__(self, dim: int, nbits: int = 8, *, metric: str = "l2", store=None, seed: int = 0):
        op = self._op("__init__")
        if check_count(op, "nbits", nbits) not in (4, 8):
            raise ValueError(f"[{op}] nbits is {nbits!r}, expected 4 or 8")
        super().__init__(dim, int(nbits), 1, metric, store, seed)

    def _books(self):
        levels = np.arange(2**self.nbits, dtype=np.float32) - (2**self.nbits - 1) / 2
        return np.broadcast_to(levels[:, None], (self.M, len(levels), 1)).copy()

    def _coded(self, y):
        half = (2**self.nbits - 1) / 2
        y = y.astype(np.float64)
        step = np.abs(y).max(axis=1, initial=0)[:, None] / half
        codes = np.rint(np.divide(y, step, out=np.zeros_like(y), where=step > 0) + half)
        levels = np.clip(codes, 0, 2 * half) - half
        squares = _exact.summed(levels * levels)  # of halves of odd numbers: not zero
        scale = (np.maximum(_exact.summed(y * levels), 0) / squares).astype(np.float32)
        bias = np.zeros(len(y))
        if self.metric == "l2":  # the square of the decoded vector
            bias = scale.astype(np.float64) ** 2 * squares
        codes = (levels + half).astype(np.uint8)
        return {"codes": codes, "code_scale": scale, "code_bias": bias.astype(np.float32)}

    def _asked(self, x):
        """-2 <q - centre, decoded> beside |q - centre|^2; or -<q, decoded> beside -<q, centre>."""
        if self.metric == "l2":
            y = self._rotated(x)
            y64 = y.astype(np.float64)
            return 2 * y, as_constants(_exact.summed(y64 * y64))
        y = self._turn(x)
        return y, as_constants(-_exact.summed(x.astype(np.float64) * self.centre))


__all__ = ["ScalarIndex"]
