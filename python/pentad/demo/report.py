# SPDX-License-Identifier: Apache-2.0
"""What the stages found: briefly at the terminal, and as one HTML file with its pictures inside."""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import io
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import pentad

from .stage import Result

NAME = "demo-report.html"


def show(results: Sequence[Result], out: Path) -> None:
    """The summary, on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for result in results:
        state = "[red]failed[/]" if result.failures else f"[dim]{result.seconds:.0f} s[/]"
        console.print(f"\n[bold]{result.title}[/]  {state}")
        if result.about:
            console.print(result.about, style="dim", markup=False)
        for table in result.tables:
            if not table.brief:
                continue
            drawn = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
            for i, column in enumerate(table.columns):
                drawn.add_column(column, justify="left" if i == 0 or table.prose else "right")
            for row in table.rows:
                drawn.add_row(*row)
            console.print(drawn)
        for failure in result.failures:
            console.print(failure, style="red", markup=False)
    console.print(f"\nThe report: {out / NAME}", markup=False, soft_wrap=True)


def write(results: Sequence[Result], out: Path) -> Path:
    """`NAME` in the folder, and each picture as a PNG beside it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pentad.demo", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    pictures = {}
    for result in results:
        for name, figure in result.figures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            (out / f"{name}.png").write_bytes(buffer.getvalue())
            pictures[name] = base64.b64encode(buffer.getvalue()).decode()
    html = environment.get_template("report.html").render(
        results=results, pictures=pictures, facts=facts(), seconds=sum(r.seconds for r in results)
    )
    (out / NAME).write_text(html, encoding="utf-8")
    return out / NAME


def facts() -> dict[str, str]:
    """Where and with what the figures were measured."""
    packages = ("pentad", "torch", "transformers", "numpy")
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {pentad.num_threads()} threads, "
        f"instructions {pentad.isa()}",
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "date": datetime.date.today().isoformat(),
    }
