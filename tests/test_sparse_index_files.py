# SPDX-License-Identifier: Apache-2.0
"""What is particular to sparse indexes in files: windows, rows, values. See test_index_files.py."""

import numpy as np
import pytest
from cases import assert_same
from sparse_index_cases import one_each

import pentad
from pentad.sparse import SparseIndex

VOCAB = 40


def many(rng, n, values="exact", vocab=3000):
    """An index of n documents of four terms."""
    terms = np.sort(rng.integers(0, vocab // 4, (n, 4)) + np.arange(4) * (vocab // 4), axis=1)
    weights = rng.random((n, 4)).astype(np.float32) + 0.1
    index = SparseIndex(vocab, values=values)
    index.add((np.arange(n + 1) * 4, terms.reshape(-1), weights.reshape(-1)))
    return index


@pytest.mark.parametrize(
    ("values", "n"), [("exact", 140_000), ("float16", 140_000), ("uint8", 1_000_000)]
)
def test_a_file_of_several_windows(rng, tmp_path, values, n):
    path, index = tmp_path / "x", many(rng, n, values)
    index.save(path)
    queries = index.reconstruct([5, 70_000, n - 1])
    want = index.search(queries, 20)
    for mmap in (True, False):
        loaded = SparseIndex.load(path, mmap=mmap)
        assert_same(tuple(loaded.search(queries, 20)), tuple(want))
        loaded.add(index.reconstruct([n - 1]))  # builds the last window anew
        assert loaded.search(queries, 2, filter=[n - 1, n]).ids[2].tolist() == [n - 1, n]
    meta, arrays = index.to_sections()
    for name in [name for name in arrays if name.startswith("window")]:
        with pytest.raises(pentad.FormatError):
            SparseIndex.from_sections(meta, {k: v for k, v in arrays.items() if k != name})
    last = (n - 1) // 65536
    spare = {name: arrays[f"window{last}.{name}"] for name in ("terms", "starts", "scales")}
    for name, array in spare.items():  # of a window of documents that are not there
        with pytest.raises(pentad.FormatError, match=f"window{last + 1}.{name} is none of such"):
            SparseIndex.from_sections(meta, arrays | {f"window{last + 1}.{name}": array})


def test_rows_that_do_not_rise_are_refused(rng):
    index = SparseIndex(VOCAB)
    index.add(one_each(rng, 40, VOCAB))
    meta, arrays = index.to_sections()
    first = int(np.flatnonzero(np.diff(arrays["indptr"]) > 1)[0])  # a row of two terms or more
    at = arrays["indptr"][first]
    for two in ([1, 0], [0, 0]):
        bent = arrays["terms"].copy()
        bent[at : at + 2] = bent[at : at + 2][two]
        with pytest.raises(pentad.FormatError):
            SparseIndex.from_sections(meta, arrays | {"terms": bent})


@pytest.mark.parametrize("values", ["exact", "float16"])
def test_values_that_do_not_fit_are_refused(rng, values):
    index = SparseIndex(VOCAB, values=values)
    index.add(one_each(rng, 20, VOCAB))
    meta, arrays = index.to_sections()
    for value in (-1, np.nan, np.inf, *([3e14] if values == "exact" else [])):
        bent = arrays["values"].copy()
        bent[7] = value
        with pytest.raises(pentad.FormatError, match="section values"):
            SparseIndex.from_sections(meta, arrays | {"values": bent})
    scale = np.ones(20, np.float32)
    with pytest.raises(pentad.FormatError, match="section scale is none"):
        SparseIndex.from_sections(meta, arrays | {"scale": scale})


def test_a_larger_vocabulary_fits(rng):
    index = SparseIndex(VOCAB)
    index.add(one_each(rng, 40, VOCAB))
    meta, arrays = index.to_sections()
    SparseIndex.from_sections(meta | {"vocab_size": 2**31 - 1}, arrays)
