# SPDX-License-Identifier: Apache-2.0
"""``python -m pentad`` is the command ``pentad``."""

import sys

from .cli import main

if __name__ == "__main__":  # processes that read files import this module again
    sys.exit(main())
