# SPDX-License-Identifier: Apache-2.0
"""What the tests of documentation search share."""

import subprocess
import sys
import textwrap

from pentad.docsearch import corpus
from pentad.docsearch.installed import fingerprint

ABOUT = {"fingerprint": fingerprint(), "packages": [], "files": 0, "skipped": {}}


def read_library():
    """Real modules of the standard library."""
    return corpus.read(
        corpus.restrict(corpus.sources(), ["json", "gzip", "argparse", "pathlib", "zipfile"])
    ).passages


def check_light(docs, path):
    """A saved index is loaded and searched without heavy imports."""
    docs.save(path)
    code = f"""
        import sys
        from pentad.docsearch import DocIndex
        DocIndex.load({str(path)!r}).search("open a file")
        heavy = {{"sklearn", "scipy", "rich", "torch", "pentad.docsearch.corpus"}}
        sys.exit(", ".join(heavy & set(sys.modules)) or 0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
