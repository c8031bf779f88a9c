# SPDX-License-Identifier: Apache-2.0
"""Every kind of index, to hold each to the contract that all of them share: test_index*.py."""

import dataclasses
from collections.abc import Callable

import hamming_index_cases
import numpy as np
import pq_free_cases
import pq_index_cases
import pytest
import sparse_index_cases
from cases import assert_same

from pentad.hamming import BinaryIndex, BinaryIVFIndex
from pentad.pq import IVFPQIndex, PQIndex, RaBitQIndex, ScalarIndex
from pentad.sparse import SparseIndex

DIM = 12


@dataclasses.dataclass(frozen=True)
class Kind:
    """How an index of a class is made, and what it is given.

    make : (**options) -> an empty index, as if trained; an inverted one visits every list
    files : options of which each makes other files, the last one every section there may be
    radius : of a range search that finds some of `draw`
    draw : (rng, n) -> vectors, those that are given to the index and those that are asked for
    part : (vectors, positions) -> some of them
    quickly : options of `train`
    """

    cls: type
    make: Callable
    files: tuple
    radius: float
    draw: Callable = lambda rng, n: hamming_index_cases.whole_vectors(rng, n, DIM)
    part: Callable = lambda vectors, at: vectors[np.asarray(at, np.int64)]
    quickly: dict = dataclasses.field(default_factory=lambda: {"iterations": 0})

    @property
    def stores(self) -> bool:
        """Whether it keeps vectors beside what it searches by, for rescoring."""
        return self.cls is not SparseIndex

    def full(self):
        """An empty index with every section that there may be."""
        return self.make(**self.files[-1])

    def filled(self, vectors, ids, **options):
        index = self.make(**(options or self.files[-1]))
        index.add(vectors, ids)
        return index


def _hamming(cls):
    files = tuple(
        {"metric": metric, "store": store}
        for metric, store in (("hamming", None), ("and", "float16"), ("jaccard", "int8"))
    )
    return Kind(cls, lambda **options: hamming_index_cases.make(cls, DIM, **options), files, 3)


def _pq(cls):
    def make(nbits=6, **options):
        options = {"spread": 20, "rng": np.random.default_rng(5)} | options
        return pq_index_cases.make(cls, DIM, 4, nbits, **options)

    files = (
        {"metric": "ip", "nbits": 4},
        {"metric": "cosine", "nbits": 8, "store": "float16", "rotation": True},
        {"metric": "l2", "nbits": 6, "store": "int8", "rotation": True},
    )
    return Kind(cls, make, files, 3e4)


def _free(name):
    def make(centre=True, **options):
        index = pq_free_cases.make(name, DIM, **options)
        if centre:
            index.train(np.linspace(-3, 4, 5 * DIM).reshape(5, DIM))
        return index

    files = (
        {"metric": "ip", "centre": False},
        {"metric": "cosine", "store": "float16", "seed": 3},
        {"metric": "l2", "store": "int8", "seed": 3},
    )
    cls = RaBitQIndex if name == "rabitq" else ScalarIndex
    return Kind(cls, make, files, 3e4, quickly={})


def _sparse():
    return Kind(
        SparseIndex,
        lambda **options: SparseIndex(40, **options),
        tuple({"values": values} for values in sparse_index_cases.VALUES),
        0.01,
        draw=lambda rng, n: sparse_index_cases.one_each(rng, n, 40),
        part=sparse_index_cases.part,
    )


KINDS = {
    "binary": _hamming(BinaryIndex),
    "binary lists": _hamming(BinaryIVFIndex),
    "pq": _pq(PQIndex),
    "pq lists": _pq(IVFPQIndex),
    "scalar": _free("scalar 8"),
    "rabitq": _free("rabitq"),
    "sparse": _sparse(),
}

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_file = pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, id=f"{name} {'-'.join(map(str, options.values()))}")
        for name, kind in KINDS.items()
        for options in kind.files
    ],
)


def arrays_of(result):
    """The arrays of a result, whatever is returned: one, a tuple of them, rows in CSR."""
    parts = result if isinstance(result, tuple) else (result,)
    return tuple(np.asarray(part) for part in parts)


def bits(result):
    """Every bit of a result; of an error, its text."""
    if isinstance(result, str):
        return result
    return tuple((part.shape, part.tobytes()) for part in arrays_of(result))


def assert_unchanged_by_refusals(index, refused, queries, radius, *given):
    """Each of `refused`, (call, error, message), raises and leaves answers and content alone.

    Calls take the index and what else is given.
    """

    def state():
        found = *index.search(queries, 12), *index.range_search(queries, radius)
        parts = *arrays_of(index.reconstruct(index.ids)), *index.to_sections()[1].values()
        return (*found, index.ids, *(part.copy() for part in parts))

    before = state()
    for call, error, message in refused:
        with pytest.raises(error, match=message):
            call(index, *given)
        assert_same(state(), before)
