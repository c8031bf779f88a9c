# SPDX-License-Identifier: Apache-2.0
"""What the tests of the demo run in other processes: apart, as those import the whole file."""

import os


def failing(report):
    report("a stage", 1, 2)
    raise ValueError("two\nlines")


def leaving(report):
    os._exit(7)
