# SPDX-License-Identifier: Apache-2.0
"""Search in the documentation of everything that is installed.

`corpus` reads docstrings, `encoders` turn texts into vectors, `indexes` are the kinds of index,
`engine` builds one, keeps it in one file and searches it, `present` prints; `pentad.cli` is the
command line.
"""

from .encoders import ENCODERS, LsaEncoder, MiniLmEncoder
from .engine import Answer, DocIndex, Hit, default_path, recall
from .indexes import INDEXES
from .passages import Passage

__all__ = [
    "ENCODERS",
    "INDEXES",
    "Answer",
    "DocIndex",
    "Hit",
    "LsaEncoder",
    "MiniLmEncoder",
    "Passage",
    "default_path",
    "recall",
]
