# SPDX-License-Identifier: Apache-2.0
"""Search by sign bits with an unbiased estimate of products; nothing is trained."""

import numpy as np

from pentad.pq import _exact
from pentad.pq._free import FreeIndex, as_constants

_SIGNS = 4  # in a code


class RaBitQIndex(FreeIndex):
    """Exhaustive search over one sign bit for each dimension (Gao and Long 2024, "RaBitQ").

    With r = R (x - centre), R a random rotation, the code of x is the signs of r. Where s is the
    vector of these signs, the product with a turned query y = R (q - centre) is estimated by

        <r, y>  ~  <s, y> * |r|^2 / <s, r>

    which is equation 12 of the paper, with r / |r| and s / sqrt(dim) as its o and o_bar: without
    bias over the rotations, and off by about 0.76 |r| |y| / sqrt(dim). Scores are
    |r|^2 + |y|^2 - 2 <r, y> for l2, and <r, y> + <r, R centre> + <q, centre> for inner products, in
    estimates that may lie below zero or beyond the true bounds.

    The query is not rounded, as it is in the paper: tables of four signs hold float32 sums. Signs
    alone find few of the nearest, so keep vectors and rescore: ``store="int8"`` and
    ``search(..., rescore="store", oversample=10)``.

    Parameters
    ----------
    dim : int
        At most 4096; some hundred dimensions make good estimates.
    metric : {"l2", "ip", "cosine"}
    store : {None, "float16", "int8"}
        Keep the vectors too, for rescoring.
    seed : int
        Of the rotation.

    Notes
    -----
    The centre is zero unless `train` puts it at the mean of a sample. Ties, snapshots and threads
    are as in `pentad.pq.ScalarIndex`. A row takes ``dim / 8`` bytes, and 8 for its factors.

    Examples
    --------
    >>> import numpy as np
    >>> vectors = np.random.default_rng(0).standard_normal((500, 64), np.float32)
    >>> index = pentad.pq.RaBitQIndex(64, store="int8")
    >>> index.add(vectors)
    >>> index.search(vectors[:3], k=1, rescore="store", oversample=20).ids[:, 0]
    array([0, 1, 2])
    """

    _kind = "pq.RaBitQIndex"

    def __init__(self, dim: int, *, metric: str = "l2", store=None, seed: int = 0):
        super().__init__(dim, 4, _SIGNS, metric, store, seed)

    def _books(self):
        bits = np.arange(2**_SIGNS)[:, None] >> np.arange(_SIGNS) & 1
        signs = np.where(bits, 1, -1).astype(np.float32)
        return np.broadcast_to(signs, (self.M, *signs.shape)).copy()

    def _coded(self, y):
        bits = self._padded(y).reshape(len(y), self.M, _SIGNS) >= 0
        codes = (bits << np.arange(_SIGNS)).sum(axis=2).astype(np.uint8)
        y = y.astype(np.float64)
        square, total = _exact.summed(y * y), _exact.summed(np.abs(y))
        scale = np.divide(square, total, out=np.zeros_like(square), where=total > 0)
        bias = square
        if self.metric != "l2":
            turned = self._turn(self.centre[None]).astype(np.float64)
            bias = -_exact.summed(y * turned)
        factors = scale.astype(np.float32), bias.astype(np.float32)
        return {"codes": codes, "code_scale": factors[0], "code_bias": factors[1]}

    def _asked(self, x):
        """-2 <r, y> beside |y|^2; or -<r, y> beside -<q, centre>."""
        y = self._rotated(x)
        if self.metric == "l2":
            y64 = y.astype(np.float64)
            return 2 * y, as_constants(_exact.summed(y64 * y64))
        return y, as_constants(-_exact.summed(x.astype(np.float64) * self.centre))


__all__ = ["RaBitQIndex"]
