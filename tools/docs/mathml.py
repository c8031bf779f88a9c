# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: formulas become MathML while the site is built; reading needs no script.

`pymdownx.arithmatex` finds them and marks them as ``\\(...\\)`` and ``\\[...\\]``.
"""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL
)


def on_page_content(page_html: str, **_) -> str:
    return _FORMULA.sub(_mathml, page_html)


def _mathml(found: re.Match) -> str:
    tag, inline, block = found.groups()
    formula = convert(
        html.unescape(inline or block).strip(), display="inline" if inline else "block"
    )
    if "\\" in formula:  # a command that the converter does not know is left as it is
        raise PluginError(f"no MathML for {inline or block}")
    return f'<{tag} class="formula">{formula}</{tag}>'
