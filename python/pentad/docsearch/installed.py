# SPDX-License-Identifier: Apache-2.0
"""Which distributions this interpreter has; apart from `corpus`, since every search asks."""

from __future__ import annotations

import os
import sys

PYTHON = f"Python {sys.version.split()[0]}"


def site_folders() -> list[str]:
    """The folders of this interpreter that hold installed distributions."""
    ends = ("site-packages", "dist-packages")
    return [folder for folder in dict.fromkeys(sys.path) if os.path.basename(folder) in ends]


def fingerprint(folders: list[str] | None = None) -> str:
    """Which Python this is and what is installed, names and versions, one per line.

    Folder names say it all, as in ``numpy-2.4.6.dist-info``; reading each METADATA takes 30 ms.
    """
    installed = set()
    for folder in site_folders() if folders is None else folders:
        try:
            entries = os.listdir(folder)
        except OSError:
            continue
        installed.update(e for e in entries if e.endswith((".dist-info", ".egg-info", ".egg")))
    return "\n".join([PYTHON, *sorted(installed)])
