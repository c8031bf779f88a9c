# SPDX-License-Identifier: Apache-2.0
"""Search in the documentation of everything that is installed.

`corpus` reads docstrings, `encoders` turn texts into vectors, `engine` builds the index, keeps it
in one file and searches it, `present` prints; `pentad.cli` is the command line.
"""

from .encoders import ENCODERS, LsaEncoder, MiniLmEncoder
from .engine import Answer, DocIndex, Hit, default_path, recall
from .passages import Passage

__all__ = [
    "ENCODERS",
    "Answer",
    "DocIndex",
    "Hit",
    "LsaEncoder",
    "MiniLmEncoder",
    "Passage",
    "default_path",
    "recall",
]
