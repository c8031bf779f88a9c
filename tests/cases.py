# SPDX-License-Identifier: Apache-2.0
"""What several test files need: codes of every kind, memory layouts, comparison, processes."""

import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import pentad
from pentad import hamming as H

METRICS = ("hamming", "jaccard", "and")
KINDS = ("random", "ties", "sparse", "dense", "extreme")
LAYOUTS = ("plain", "fortran", "reversed", "strided", "unaligned")
MASKS = (None, "random", "none", "one", "all")

# For what a build that executes the CUDA kernels on the CPU cannot show: the bits of the CPU's own
# kernels, their threads and memory, and sizes that lane-by-lane execution takes too long over.
cpu_kernels_only = pytest.mark.skipif(
    pentad._C.cuda_on_host,
    reason="about the CPU's own kernels, or too large for lane by lane",
)


def codes(rng, n, dim, kind="random"):
    """(n, ceil(dim / 8)) codes with clean padding. "ties": drawn from three distinct rows."""
    if kind == "ties":
        return codes(rng, 3, dim)[rng.integers(0, 3, n)]
    if kind == "extreme":  # all zeros or all ones
        bits = np.repeat(rng.random((n, 1)) < 0.5, dim, axis=1)
    else:
        bits = rng.random((n, dim)) < {"random": 0.5, "sparse": 0.03, "dense": 0.97}[kind]
    return np.packbits(bits, axis=1).reshape(n, -(-dim // 8))


def mask(rng, n, kind):
    if kind is None:
        return None
    chosen = {"random": rng.random(n) < 0.4, "none": np.zeros(n, bool), "all": np.ones(n, bool)}
    if kind == "one":
        one = np.zeros(n, bool)
        one[rng.integers(0, n, min(n, 1))] = True
        return one
    return chosen[kind]


def laid_out(array, layout):
    """An equal array in other memory."""
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "reversed":
        flip = (slice(None, None, -1),) * array.ndim
        return np.ascontiguousarray(array[flip])[flip]
    if layout == "strided":
        steps = tuple(range(2, 2 + array.ndim))
        roomy = np.full(tuple(n * s for n, s in zip(array.shape, steps, strict=True)), 77).astype(
            array.dtype
        )
        view = roomy[tuple(slice(None, None, s) for s in steps)]
        view[...] = array
        return view
    if layout == "unaligned":
        memory = np.zeros(array.nbytes + 1, np.uint8)
        view = memory[1:].view(array.dtype).reshape(array.shape)
        view[...] = array
        return view
    return array


def assert_same(got, want):
    """Equal in type, shape and every bit; `got` and `want` are arrays or tuples of them."""
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)
        return
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    np.testing.assert_array_equal(got, want)


def run_python(script, *, timeout=120, **environment):
    """stdout of a fresh interpreter that ran `script`; fails the test unless it exits with 0."""
    done = start_python(script, timeout=timeout, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def start_python(script, *, timeout=120, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PENTAD_")} | environment
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
    )


# Put before a script: the named modules cannot be imported in it.
WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "sklearn", "rich"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""


DIM = 77

# Every function of pentad.hamming, as a function of the fixture `inputs`.
CALLS = {
    "pack": lambda i: H.pack(i["x"]),
    "pack threshold": lambda i: H.pack(i["x"], 0.5),
    "unpack": lambda i: H.unpack(i["q"], DIM),
    "distance": lambda i: H.distance(i["q"], i["db"]),
    "distance jaccard": lambda i: H.distance(i["q"], i["db"], metric="jaccard"),
    "intersection": lambda i: H.intersection(i["q"], i["db"]),
    "topk": lambda i: H.topk(i["q"], i["db"], 7),
    "topk jaccard": lambda i: H.topk(i["q"], i["db"], 70, metric="jaccard"),
    "topk and": lambda i: H.topk(i["q"], i["db"], 5, metric="and"),
    "topk mask": lambda i: H.topk(i["q"], i["db"], 50, mask=i["mask"]),
    "range": lambda i: H.range_search(i["q"], i["db"], 37.5),
    "range mask": lambda i: H.range_search(i["q"], i["db"], 0.7, metric="jaccard", mask=i["mask"]),
    "score": lambda i: H.score(i["x"], i["db"]),
    "topk_score": lambda i: H.topk_score(i["x"], i["db"], 9),
    "topk_score mask": lambda i: H.topk_score(i["x"], i["db"], 60, mask=i["mask"]),
    "weighted_sum": lambda i: H.weighted_sum(i["w"], i["db"], DIM),
    "ste": lambda i: H.binarize(i["x"]),
    "tanh": lambda i: H.binarize(i["x"], "tanh", 0.5),
    "bind": lambda i: H.bind(i["q"][:, None], i["db"]),
    "bundle": lambda i: H.bundle(i["db"], DIM),
    "bundle weights": lambda i: H.bundle(i["db"], DIM, weights=i["votes"], ties="one"),
    "bundle zero": lambda i: H.bundle(i["db"][:4], DIM, ties="zero"),
    "permute": lambda i: H.permute(i["q"], DIM, 13),
}


def arguments_of(entry):
    """The names of an extension's entry, but for those that only CUDA kernels take."""
    signature = re.search(r"\((.*?)\) ->", entry.__doc__)[1]
    names = [part.split(":")[0] for part in signature.split(", ") if ":" in part]
    return [name for name in names if name not in ("scratch", "stream")]
