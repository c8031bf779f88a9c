# SPDX-License-Identifier: Apache-2.0
"""What the tests of indexes that several threads use share."""

import sys
import threading

_MODULES = (
    *("pentad/_index.py", "pentad/_lists.py", "hamming/index.py", "hamming/ivf.py"),
    *("pq/index.py", "pq/ivf.py"),
    *("sparse/index.py", "sparse/_documents.py"),
)


def run_beside(work, helpers):
    """Runs work() while each helper() repeats in a thread of its own; returns their results."""
    ended, results, errors = threading.Event(), [], []

    def repeat(helper):
        try:
            while True:
                last = ended.is_set()  # one more round after the end
                results.append(helper())
                if last:
                    return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(h,)) for h in helpers]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        ended.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert not errors, errors
    return results


def interrupted(call, change, at):
    """call(), with change() made just before its at-th bytecode in the modules of the indexes.

    Returns what call() gave or raised, and whether it lasted that long. What another thread may do
    at any moment is done here at every moment in turn.
    """
    left = [at]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.endswith(_MODULES):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left[0] -= 1
            if left[0] == 0:
                change()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = call()
    except ValueError as error:
        result = str(error)
    finally:
        sys.settrace(before)
    return result, left[0] <= 0
