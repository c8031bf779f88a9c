# SPDX-License-Identifier: Apache-2.0
"""Print the requirements of the named extras in pyproject.toml, one a line, without the package.

pip has no way to install a project's dependencies before the project itself is built.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, whose pip carries it
    from pip._vendor import tomli as tomllib


def requirements(project: dict, extra: str) -> list[str]:
    """Those of one extra, with references to the project's other extras resolved."""
    found = []
    for line in project["optional-dependencies"][extra]:
        reference = re.fullmatch(rf"{project['name']}\[(.+)\]", line)
        if reference:
            for other in reference[1].split(","):
                found += requirements(project, other.strip())
        else:
            found.append(line)
    return found


if __name__ == "__main__":
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]
    lines = list(project["dependencies"])
    for name in sys.argv[1:]:
        lines += requirements(project, name)
    print("\n".join(dict.fromkeys(lines)))
