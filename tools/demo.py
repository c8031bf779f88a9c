# SPDX-License-Identifier: Apache-2.0
"""The main job on real input: index the documentation of everything installed, then ask.

python tools/demo.py            # all packages
python tools/demo.py --small    # four modules of the standard library, for a smoke run
"""

import subprocess
import sys
from pathlib import Path

QUESTIONS = {
    "open a gzip file for writing": "gzip.",
    "parse json from a string": "json",
    "find all files that match a pattern": "",
    "inverse of a matrix": "",
}
SMALL = ["json", "gzip", "glob", "pathlib"]


def pentad(*arguments: str, capture: bool = False) -> str:
    command = [sys.executable, "-m", "pentad", *arguments]
    print(f"$ pentad {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE if capture else None
    )
    if capture:
        print(done.stdout, flush=True)
    return done.stdout


def main() -> int:
    small = "--small" in sys.argv[1:]
    index = Path("build", "demo-small.pentad" if small else "demo.pentad")
    index.parent.mkdir(exist_ok=True)
    pentad("info")
    pentad("index", "--out", str(index), *[a for p in SMALL if small for a in ("--package", p)])
    for question, expected in QUESTIONS.items():
        answer = pentad("search", question, "-k", "5", "--file", str(index), capture=True)
        if expected not in answer:
            print(f"expected a name with '{expected}' among the answers", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
