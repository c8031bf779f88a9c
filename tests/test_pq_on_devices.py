# SPDX-License-Identifier: Apache-2.0
"""What functions compose of torch operations on a device gives the results of the CPU's kernels."""

import numpy as np
import pytest

from pentad import pq
from pentad.pq.assign import residual_of_tensors

torch = pytest.importorskip("torch")

from pentad.pq.adc_search_autograd import by_parts  # noqa: E402 -- needs torch
from pentad.pq.quantize_autograd import counted  # noqa: E402


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("masked", [False, True])
def test_topk_adc(rng, metric, masked):
    books = torch.from_numpy(rng.integers(-3, 4, (3, 9, 2)).astype(np.float32))
    codes = torch.from_numpy(rng.integers(0, 9, (200, 3)))
    queries = torch.from_numpy(rng.integers(-3, 4, (5, 6)).astype(np.float32))
    mask = torch.from_numpy(rng.random(200) < 0.4) if masked else None
    for k in (1, 20, 300):
        got = by_parts(queries, codes, books, k, metric, mask, chunk=350)
        want = pq.topk_adc(queries, codes, books, k, metric=metric, mask=mask)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    none = by_parts(queries, codes[:0], books, 2, metric, None)
    assert (none[1] == -1).all()


def test_residual_codes(rng):
    x = torch.from_numpy(rng.standard_normal((60, 5)).astype(np.float32))
    books = torch.from_numpy(rng.standard_normal((3, 17, 5)).astype(np.float32))
    want = pq.assign(x, books, form="residual")
    assert torch.equal(residual_of_tensors(x, books, "l2"), want)


def test_usage(rng):
    codes = torch.from_numpy(rng.integers(0, 7, (4, 30, 3)).astype(np.uint8))
    assert torch.equal(counted(codes, 7), pq.usage(codes, 7))
    codes[0, 0] = 200
    assert counted(codes, 7).sum() == codes.numel() - 3
