# SPDX-License-Identifier: Apache-2.0
"""BinaryIVFIndex: training, and searches that visit a part of the lists."""

import numpy as np
import pytest
from cases import METRICS, assert_same, codes
from hamming_index_cases import make

from pentad.hamming import BinaryIndex, BinaryIVFIndex, reference


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nprobe", [1, 3, 12, 100])
def test_probed_lists_are_searched_exactly(rng, isa, metric, nprobe):
    rows, queries = codes(rng, 900, 60), codes(rng, 9, 60)
    index = BinaryIVFIndex(60, 12, metric=metric, nprobe=2)
    index.train(rows[:300])
    index.add(rows)
    home = reference.topk(rows, index.centroids, 1)[1][:, 0]
    visited = reference.topk(queries, index.centroids, min(nprobe, 12))[1]
    chosen = rng.random(900) < 0.5
    for keep in (None, chosen):
        found = index.search(queries, 15, nprobe=nprobe, filter=keep)
        hits = index.range_search(queries, 20, nprobe=nprobe, filter=keep)
        for q in range(len(queries)):
            allowed = np.isin(home, visited[q]) & (True if keep is None else keep)
            want = reference.topk(queries[q : q + 1], rows, 15, metric, allowed)
            assert_same((found.scores[q : q + 1], found.ids[q : q + 1]), want)
            _, values, ids = reference.range_search(queries[q : q + 1], rows, 20, metric, allowed)
            part = slice(hits[0][q], hits[0][q + 1])
            assert_same((hits[1][part], hits[2][part]), (values, ids))
    index.nprobe = nprobe
    assert_same(tuple(index.search(queries, 15)), tuple(index.search(queries, 15, nprobe=nprobe)))
    with pytest.raises(ValueError, match="nprobe is 0"):
        index.search(queries, 1, nprobe=0)


def test_nprobe_is_checked_when_set(tmp_path):
    index = make(BinaryIVFIndex, 16)
    for value, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="nprobe is"):
            index.nprobe = value
    index.nprobe = np.int64(3)
    index.save(tmp_path / "x")
    assert BinaryIVFIndex.load(tmp_path / "x").nprobe == 3


def test_training_is_deterministic_and_helps(rng):
    centres = codes(rng, 8, 128)
    noise = np.packbits(rng.random((800, 128)) < 0.08, axis=1)
    rows = centres[rng.integers(0, 8, 800)] ^ noise

    def cost(index):
        return int(reference.distance(rows, index.centroids).min(1).sum())

    fitted = []
    for seed, iterations in ((0, 10), (0, 10), (1, 10), (0, 0)):
        index = BinaryIVFIndex(128, 8)
        index.train(rows, seed=seed, iterations=iterations)
        fitted.append(index)
    assert_same(fitted[0].centroids, fitted[1].centroids)
    assert cost(fitted[0]) < cost(fitted[3])
    index = fitted[0]
    index.add(rows)
    exact = BinaryIndex(128)
    exact.add(rows)
    same = index.search(rows[:50], 10, nprobe=2).ids == exact.search(rows[:50], 10).ids
    assert same.mean() > 0.7


@pytest.mark.parametrize("rows", [1, 3])
def test_training_on_few_distinct_rows(rng, rows):
    distinct = codes(rng, rows, 40)
    index = BinaryIVFIndex(40, 6, nprobe=6)
    index.train(distinct[rng.integers(0, rows, 30)])
    index.add(np.repeat(distinct, 4, 0))
    want = reference.topk(distinct, np.repeat(distinct, 4, 0), 5)
    assert_same(tuple(index.search(distinct, 5)), want)
