# SPDX-License-Identifier: Apache-2.0
"""Fixtures of every test: fixed seeds, each instruction-set level, restored thread counts."""

import random
import sys
import zlib

import numpy as np
import pytest
from cases import DIM, codes
from hypothesis import HealthCheck, settings

import pentad

# Derandomized, so that a red run is red again; the fixtures that hypothesis warns about only choose
# an instruction set, which is the same for all examples.
settings.register_profile(
    "pentad",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("pentad")


def pytest_addoption(parser):
    parser.addoption(
        "--sample", type=int, default=1, metavar="N", help="run one test in N, always the same ones"
    )


def pytest_collection_modifyitems(config, items):
    every = config.getoption("--sample")
    chosen = [item for item in items if zlib.crc32(item.nodeid.encode()) % every == 0]
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


@pytest.fixture(autouse=True)
def _fixed_seeds(doctest_namespace):
    doctest_namespace.update(pentad=pentad, np=np)
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(20240607)


# CUDA kernels executed on the CPU have no levels: the best of the CPU's own stands beside them.
LEVELS = pentad.isa_available()[-1:] if pentad._C.cuda_on_host else pentad.isa_available()


@pytest.fixture(params=LEVELS)
def isa(request):
    """Runs the test once for each level that this CPU has."""
    before = pentad.isa()
    pentad._C.set_isa(request.param)
    yield request.param
    pentad._C.set_isa(before)


@pytest.fixture
def threads():
    """`pentad.set_num_threads`, undone afterwards."""
    before = pentad.num_threads()
    yield pentad.set_num_threads
    pentad.set_num_threads(before)


@pytest.fixture
def inputs(rng):
    """Arguments for `cases.CALLS`."""
    return {
        "x": rng.standard_normal((6, DIM)).astype(np.float32),
        "q": codes(rng, 6, DIM),
        "db": codes(rng, 60, DIM),
        "mask": rng.random(60) < 0.5,
        "w": rng.standard_normal((4, 60)).astype(np.float32),
        "votes": rng.integers(-2, 3, 60).astype(np.float32),
    }
