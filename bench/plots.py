# SPDX-License-Identifier: Apache-2.0
"""The pictures of the benchmark report; each holds the digest of the figures that it shows."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from pentad.bench.harness import BOUNDS, bound_rate

Cases = list[dict[str, Any]]
INK = "#333333"
OURS = "#b3261e"
PEERS = ("#4477aa", "#66a182", "#aa7744", "#8866aa", "#777777")
TARGET = "#111111"


def by_curve(results: dict[str, Any]) -> dict[str, Cases]:
    return {name: list(cases) for name, cases in groupby(results["cases"], lambda c: c["curve"])}


def is_ours(record: dict[str, Any]) -> bool:
    return record["name"].startswith("pentad") or record["name"].endswith(" on pentad")


def digest_in(path: Path) -> str | None:
    """The digest that a picture holds."""
    found = re.search("figures ([0-9a-f]{64})", path.read_text()) if path.exists() else None
    return found and found[1]


class Picture:
    """`figures` is everything that the picture shows."""

    figures: Any

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.figures, sort_keys=True).encode()).hexdigest()

    def plot(self):
        """A figure of matplotlib."""
        raise NotImplementedError

    def draw(self, path: Path) -> None:
        import matplotlib

        # The same figures give the same file, with text that can be read and searched.
        settings = {
            "svg.hashsalt": "pentad",
            "svg.fonttype": "none",
            "font.size": 8,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.facecolor": "white",
        }
        with matplotlib.rc_context(settings):
            about = {"Date": None, "Description": f"figures {self.digest}"}
            self.plot().savefig(path, format="svg", metadata=about, bbox_inches="tight")


def new_figure(width: float, height: float):
    """Without pyplot, which keeps figures and looks for a screen."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


class Ratios(Picture):
    """A bar for each peer of each case: its cost by ours, with the target where there is one."""

    def __init__(self, groups: dict[str, Cases]):
        self.figures = [
            [group, case["name"], self._bars(case)]
            for group, cases in groups.items()
            for case in cases
            if self._bars(case)
        ]

    @staticmethod
    def _bars(case: dict[str, Any]) -> list[list[Any]]:
        """name, ratio, target ratio or None"""
        target = case.get("target", {})
        return [
            [
                r["name"],
                r["ratio"],
                target.get("ratio") if r["name"] == target.get("against") else None,
            ]
            for r in case["contenders"][1:]
            if r.get("ratio") and not is_ours(r)
        ]

    def plot(self):
        rows = sum(len(bars) + 1 for _, _, bars in self.figures)
        rows += len({group for group, *_ in self.figures if group})
        figure = new_figure(7.5, 0.155 * rows + 0.6)
        axes = figure.add_subplot()
        y, last = 0, ""
        for group, name, bars in self.figures:
            if group != last:
                axes.text(1.05, y, group, weight="bold", va="center", size=9)
                last, y = group, y + 1
            axes.text(1.05, y, name, va="center", size=7)
            for row, (peer, ratio, target) in enumerate(bars, y + 1):
                colour = PEERS[(row - y - 1) % len(PEERS)] if ratio >= 1 else OURS
                axes.barh(row, ratio - 1, left=1, height=0.8, color=colour)
                if target:
                    axes.vlines(target, row - 0.5, row + 0.5, color=TARGET, lw=2)
                end = 1.06 * max(ratio, target or 1, 1)
                axes.text(end, row, f"{ratio:.3g}x  {peer}", va="center", size=7)
            y += len(bars) + 1
        ratios = [ratio for _, _, bars in self.figures for _, ratio, _ in bars]
        left = min(0.8, min(ratios, default=1) / 1.3)
        axes.axvline(1, color=INK, lw=1)
        axes.set_xscale("log")
        axes.set_xlim(left, max([*ratios, 10]) * 12)
        axes.set_ylim(y, -1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("cost of the peer / ours (black mark: target; red: the peer costs less)")
        return figure


class Curves(Picture):
    """Seconds against size, a panel for each curve, with the limit that the machine sets."""

    def __init__(self, results: dict[str, Any]):
        self.figures = [
            [name, cases[0]["axis"], self._lines(cases), self._limit(cases, results["machine"])]
            for name, cases in by_curve(results).items()
        ]

    @staticmethod
    def _lines(cases: Cases) -> dict[str, list[list[float]]]:
        lines: dict[str, list[list[float]]] = {}
        for case in cases:
            for record in case["contenders"]:
                if "median_s" in record:
                    point = [case["size"], record["median_s"]]
                    lines.setdefault(record["name"], []).append(point)
        return lines

    @staticmethod
    def _limit(cases: Cases, machine: dict[str, Any]) -> list[list[float]]:
        """Seconds of the work at the speed that bounds it."""
        return [
            [case["size"], case["work"][BOUNDS[case["bound"]]] / bound_rate(case["bound"], machine)]
            for case in cases
            if "bound" in case
        ]

    def plot(self):
        columns = 2
        rows = -(-len(self.figures) // columns)
        figure = new_figure(8.5, 2.3 * rows)
        for number, (name, axis, lines, limit) in enumerate(self.figures, 1):
            axes = figure.add_subplot(rows, columns, number)
            for at, (contender, points) in enumerate(lines.items()):
                colour = PEERS[(at - 1) % len(PEERS)] if at else OURS
                axes.plot(
                    *zip(*points, strict=True), "o-", ms=3, lw=1.2, color=colour, label=contender
                )
            if limit:
                axes.plot(*zip(*limit, strict=True), "--", color=INK, lw=1, label="limit")
            axes.set_xscale("log", base=2 if axis == "L" else 10)
            axes.set_yscale("log")
            axes.set_title(name, size=8)
            axes.set_xlabel(axis, labelpad=1)
            axes.set_ylabel("s", rotation=0)
            axes.legend(frameon=False, fontsize=6.5)
        return figure
