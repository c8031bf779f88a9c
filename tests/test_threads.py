# SPDX-License-Identifier: Apache-2.0
"""Threads: results for any number, one runtime per process, forks, callers side by side."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import METRICS, WITHOUT_TORCH, assert_same, codes, run_python, start_python

import pentad
from pentad import _C

H = pentad.hamming


def everything(rng, nq, n, dim):
    db, q = codes(rng, n, dim, "ties"), codes(rng, nq, dim)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((nq, dim), (nq, n)))
    keep = rng.random(n) < 0.7
    for metric in METRICS:
        yield H.distance(q, db, metric=metric)
        yield from H.topk(q, db, 30, metric=metric, mask=keep)
        yield from H.range_search(q, db, dim // 2, metric=metric)
    yield H.score(x, db)
    yield from H.topk_score(x, db, 30)
    yield H.weighted_sum(w, db, dim)
    yield H.pack(x)
    yield H.unpack(db, dim)
    yield H.permute(db, dim, 7)
    yield H.bundle(db, dim)
    index = H.BinaryIVFIndex(dim, 6, store="int8", nprobe=3)
    index.train(rng.standard_normal((20, dim)))
    index.add(rng.standard_normal((n, dim)))
    yield index.centroids
    yield from index.search(x, 20)
    yield from index.search(x, 20, rescore="store")


@pytest.mark.parametrize(("nq", "n", "dim"), [(1, 9000, 256), (3, 5000, 100), (600, 300, 70)])
def test_results_do_not_depend_on_the_number_of_threads(threads, nq, n, dim):
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        assert pentad.num_threads() == count
        results.append(list(everything(np.random.default_rng(0), nq, n, dim)))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert got.tobytes() == want.tobytes()


def test_every_task_runs_once(threads):
    for count in (1, 2, 5):
        threads(count)
        for tasks in (0, 1, 2, 7, 1000):
            assert _C.count_tasks(tasks) == tasks
    assert _C.count_tasks(-3) == 0


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None, 2**40])
def test_bad_numbers_of_threads(n):
    before = pentad.num_threads()
    with pytest.raises((ValueError, TypeError)):
        pentad.set_num_threads(n)
    assert pentad.num_threads() == before


# --- torch's runtime ------------------------------------------------------------------------------


def test_the_number_follows_torch_and_the_reverse(threads):
    torch = pytest.importorskip("torch")
    for count in (1, 3, 2):
        torch.set_num_threads(count)
        assert pentad.num_threads() == count
        threads(count + 1)
        assert torch.get_num_threads() == count + 1


def test_the_number_holds_in_new_threads(threads):
    torch = pytest.importorskip("torch")
    for set_number in (threads, torch.set_num_threads):
        for count in (1, 3):
            set_number(count)
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(pentad.num_threads).result() == count


def test_torch_imported_later_is_adopted():
    pytest.importorskip("torch")
    run_python(
        """
        import numpy as np
        import pentad
        codes = np.random.default_rng(0).integers(0, 256, (5000, 64)).astype(np.uint8)
        assert pentad.thread_runtime() == "own pool"
        pentad.set_num_threads(2)
        want = pentad.hamming.topk(codes[:3], codes, 9)
        import torch
        assert pentad.thread_runtime().startswith("openmp (lib"), pentad.thread_runtime()
        torch.set_num_threads(3)
        assert pentad.num_threads() == 3
        for a, b in zip(want, pentad.hamming.topk(codes[:3], codes, 9)):
            assert (a == b).all()
        """
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_mapped():
    pytest.importorskip("torch")
    script = """
        {first}
        {second}
        import numpy as np
        codes = np.zeros((5000, 64), np.uint8)
        pentad.hamming.topk(codes[:3], codes, 9)
        torch.ones(100_000).add(1)
        mapped = {{line.split()[-1] for line in open("/proc/self/maps") if "/" in line}}
        print(sum("libgomp" in path or "libomp" in path or "libiomp" in path for path in mapped))
        """
    for pair in (("import torch", "import pentad"), ("import pentad", "import torch")):
        assert run_python(script.format(first=pair[0], second=pair[1])) == "1"


# --- The own pool ---------------------------------------------------------------------------------


def test_the_own_pool_serves_without_torch():
    run_python(
        WITHOUT_TORCH
        + """
import os, threading
import numpy as np
import pentad
assert pentad.thread_runtime() == "own pool"
assert pentad.num_threads() == len(os.sched_getaffinity(0))
codes = np.random.default_rng(0).integers(0, 256, (9000, 64)).astype(np.uint8)
results = []
for n in (1, 2, 3, 8, 2):
    pentad.set_num_threads(n)
    assert pentad.num_threads() == n
    results.append(pentad.hamming.topk(codes[:3], codes, 50))
    assert len(os.listdir("/proc/self/task")) >= min(n, 2)
for other in results[1:]:
    assert all((a == b).all() for a, b in zip(results[0], other))

def search():
    for _ in range(30):
        found = pentad.hamming.topk(codes[:3], codes, 50)
        assert all((a == b).all() for a, b in zip(results[0], found))
    ended.append(True)

ended = []
callers = [threading.Thread(target=search) for _ in range(4)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
assert len(ended) == 4
"""
    )


@pytest.mark.parametrize(
    ("text", "number"), [("1", 1), ("3", 3), ("0", None), ("-2", None), ("x", None), ("", None)]
)
def test_environment_sets_the_number(text, number):
    script = "import os\nimport pentad\nprint(pentad.num_threads(), len(os.sched_getaffinity(0)))"
    got, cores = map(int, run_python(WITHOUT_TORCH + script, PENTAD_NUM_THREADS=text).split())
    assert got == (cores if number is None else number)


def test_torch_goes_before_the_environment():
    pytest.importorskip("torch")
    script = "import torch, pentad\nprint(pentad.num_threads(), torch.get_num_threads())"
    ours, torchs = run_python(script, PENTAD_NUM_THREADS="7").split()
    assert ours == torchs


def test_a_new_thread_changes_nothing_for_the_others():
    pytest.importorskip("torch")
    run_python(
        """
        import threading
        import pentad
        import torch

        seen = []
        for count in (1, 3, 1):
            torch.set_num_threads(count)
            thread = threading.Thread(target=lambda: seen.append(pentad.num_threads()))
            thread.start()
            thread.join()
            assert seen[-1] == count, (count, seen)
            assert pentad.num_threads() == count == torch.get_num_threads()
        """
    )


# --- Forks ----------------------------------------------------------------------------------------

FORK = """
import os, sys
import numpy as np
import pentad
pentad.set_num_threads(3)
codes = np.random.default_rng(0).integers(0, 256, (9000, 64)).astype(np.uint8)
index = pentad.hamming.BinaryIndex(512)
index.add(codes)

def answers():
    found = *pentad.hamming.topk(codes[:5], codes, 20), *index.search(codes[:5], 20)
    return [a.tobytes() for a in (*found, pentad.hamming.unpack(codes, 512))]

want = answers()
for generation in range(2):  # the child forks again
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        assert answers() == want  # the parent goes on
        sys.stdout.flush()
        if generation:
            os._exit(0)
        sys.exit(0)
    assert answers() == want
    assert pentad._C.count_tasks(100) == 100
    pentad.set_num_threads(2)
    assert pentad.num_threads() == 2
    assert answers() == want
    assert pentad.thread_runtime() == "own pool"
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("torch_too", [False, True], ids=["alone", "with torch"])
def test_a_forked_child_computes(torch_too):
    if torch_too:
        pytest.importorskip("torch")
        # The child must not touch OpenMP's team: it does not exist there.
        run_python("import torch\ntorch.ones(200_000).exp().sum()\n" + FORK, timeout=60)
    else:
        run_python(WITHOUT_TORCH + FORK, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_computes():
    run_python(
        WITHOUT_TORCH
        + """
import os, threading, warnings
import numpy as np
import pentad
warnings.simplefilter("ignore")  # Python warns of forks beside threads
pentad.set_num_threads(3)
codes = np.random.default_rng(0).integers(0, 256, (4000, 64)).astype(np.uint8)
want = pentad.hamming.topk(codes[:9], codes, 5)[1]
stop = threading.Event()

def busy():
    while not stop.is_set():
        pentad.hamming.topk(codes[:9], codes, 5)

thread = threading.Thread(target=busy)
thread.start()
try:
    for _ in range(20):
        child = os.fork()
        if not child:
            same = (pentad.hamming.topk(codes[:9], codes, 5)[1] == want).all()
            os._exit(0 if same else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
finally:
    stop.set()
    thread.join()
""",
        timeout=60,
    )


def test_a_multiprocessing_pool_of_forks():
    run_python(
        """
        import multiprocessing, os, warnings
        warnings.simplefilter("ignore")
        import numpy as np
        import pentad
        codes = np.random.default_rng(0).integers(0, 256, (3000, 64)).astype(np.uint8)

        def search(i):
            return pentad.hamming.topk(codes[i : i + 1], codes, 3)[1]

        want = [search(i) for i in range(8)]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            got = pool.map(search, range(8))
        assert all((a == b).all() for a, b in zip(got, want))
        """,
        timeout=60,
    )


# --- Callers side by side -------------------------------------------------------------------------


def test_callers_in_several_threads(rng, threads):
    db, q = codes(rng, 4000, 100), codes(rng, 5, 100)
    x = rng.standard_normal((5, 100)).astype(np.float32)
    threads(2)
    calls = {
        "topk": lambda: H.topk(q, db, 9),
        "distance": lambda: (H.distance(q, db),),
        "score": lambda: (H.score(x, db),),
        "range": lambda: H.range_search(q, db, 40),
        "count": lambda: (np.array(_C.count_tasks(50)),),
    }
    wants = {name: call() for name, call in calls.items()}

    def work(number):
        for i in range(20):
            name = list(calls)[(i + number) % len(calls)]
            assert_same(calls[name](), wants[name])
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_torch_and_pentad_in_turns(rng, threads):
    torch = pytest.importorskip("torch")
    db = torch.from_numpy(codes(rng, 3000, 64))
    x = torch.randn(20, 64)
    threads(2)
    want = H.score(x, db)
    total = want.sum()

    def work(_):
        for _ in range(10):
            got = H.score(x, db)
            assert torch.equal(got, want)
            assert torch.equal(got.sum(), total)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_kernels_release_the_lock_of_python(rng, threads):
    """A Python thread makes progress while a kernel runs in another."""
    threads(1)
    db, q = codes(rng, 20_000, 1024), codes(rng, 400, 1024)
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = ticks[0]
        H.topk(q, db, 10)
        during = ticks[0] - before
    finally:
        stop.set()
        thread.join()
    assert during > 100


def test_a_failure_in_a_task_reaches_the_caller_once(rng, threads):
    threads(3)
    x = rng.standard_normal((5000, 64)).astype(np.float32)
    x[4321, 10] = np.nan
    for _ in range(3):
        with pytest.raises(ValueError, match="NaN"):
            H.pack(x)
    assert_same(H.pack(x[:4321]), np.packbits(x[:4321] > 0, axis=1))


# --- What the extension links ---------------------------------------------------------------------


def dynamic_section():
    elffile = pytest.importorskip("elftools.elf.elffile")
    with open(_C.__file__, "rb") as file:
        section = elffile.ELFFile(file).get_section_by_name(".dynamic")
        tags = [(t.entry.d_tag, getattr(t, "needed", None)) for t in section.iter_tags()]
    return tags


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_the_extension_links_only_the_system():
    tags = dynamic_section()
    needed = [name for tag, name in tags if tag == "DT_NEEDED"]
    assert needed
    allowed = ("libc.so", "libstdc++.so", "libm.so", "libgcc_s.so", "ld-linux", "libpthread.so",
               "libdl.so", "librt.so")  # fmt: skip
    assert not [name for name in needed if not name.startswith(allowed)]
    assert not {"DT_RPATH", "DT_RUNPATH", "DT_TEXTREL"} & {tag for tag, _ in tags}


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_the_extension_exports_only_its_initialiser():
    elffile = pytest.importorskip("elftools.elf.elffile")
    with open(_C.__file__, "rb") as file:
        symbols = elffile.ELFFile(file).get_section_by_name(".dynsym")
        exported = [
            s.name
            for s in symbols.iter_symbols()
            if s.entry.st_shndx != "SHN_UNDEF" and s.entry.st_info.bind == "STB_GLOBAL"
        ]
    assert exported == ["PyInit__C"]


def test_an_interpreter_that_used_threads_exits_cleanly():
    done = start_python(
        WITHOUT_TORCH
        + """
import numpy as np
import pentad
pentad.set_num_threads(4)
codes = np.zeros((9000, 64), np.uint8)
pentad.hamming.topk(codes[:3], codes, 9)
""",
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
