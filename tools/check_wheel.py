# SPDX-License-Identifier: Apache-2.0
"""Check a built wheel: its size, what its extension links, that it works beside numpy alone.

python tools/check_wheel.py dist/pentad-*.whl
"""

import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).parent.parent
LARGEST = 60e6  # bytes, with the CUDA kernels of every architecture
ALLOWED = re.compile(r"(libstdc\+\+|libgcc_s|lib(c|m|dl|pthread|rt)|ld-linux-.*)\.so\.\d+")


def linked(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        (name,) = [n for n in archive.namelist() if re.match(r"pentad/_C\..*\.so$", n)]
        with open(archive.extract(name, folder), "rb") as file:
            tags = list(ELFFile(file).get_section_by_name(".dynamic").iter_tags())
    needed = [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"]
    foreign = [name for name in needed if not ALLOWED.fullmatch(name)]
    assert not foreign, f"{wheel.name} needs {foreign}"
    paths = [tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
    assert not paths, f"{wheel.name} has {paths}"
    assert wheel.stat().st_size < LARGEST, f"{wheel.name} has {wheel.stat().st_size} bytes"
    print(f"{wheel.name} ({wheel.stat().st_size / 1e6:.1f} MB) needs {', '.join(needed)}; no RPATH")


def used(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", "numpy"], check=True)
        subprocess.run([*pip, "--no-index", "--no-deps", wheel.resolve()], check=True)
        subprocess.run([python, ROOT / "tools/smoke.py"], check=True, cwd=folder)


if __name__ == "__main__":
    wheel = Path(sys.argv[1])
    linked(wheel)
    used(wheel)
