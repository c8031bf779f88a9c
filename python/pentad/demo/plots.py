# SPDX-License-Identifier: Apache-2.0
"""The demo's pictures, by matplotlib, for the report and as PNGs."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

OURS, OTHERS, INK, FAINT = "#0f766e", "#a8a29e", "#292524", "#e7e5e4"


def bars(
    names: Sequence[str],
    panels: dict[str, Sequence[float]],
    logarithmic: Sequence[str] = (),
    muted: Sequence[bool] = (),
) -> Figure:
    """Horizontal bars with their figures: a panel for each measure, a bar for each name."""
    figure = _figure(11, 0.9 + 0.36 * len(names))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places = range(len(names) - 1, -1, -1)  # the first on top
    faded = muted or [False] * len(names)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        drawn = axis.barh(places, values, color=[OTHERS if m else OURS for m in faded], height=0.66)
        axis.bar_label(drawn, [_short(v) for v in values], padding=4, fontsize=9, color=INK)
        scale = ", log scale" if title in logarithmic else ""
        axis.set_title(title + scale, fontsize=10.5, color=INK, loc="left")
        axis.set_yticks(list(places), names)
        if scale:
            axis.set_xscale("log")
            axis.set_xlim(min(values) / 2, max(values) * 8)
        else:
            axis.set_xlim(0, max(values) * 1.22)
        axis.set_xticks([], minor=False)
        axis.set_xticks([], minor=True)
        _plain(axis, ("top", "right", "bottom"))
        axis.tick_params(length=0)
    return figure


def pairs(groups: Sequence[str], panels: dict[str, dict[str, Sequence[float]]]) -> Figure:
    """Upright bars side by side: a panel for each measure, in it each series over the groups."""
    figure = _figure(11, 3.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, series) in zip(axes, panels.items(), strict=True):
        width = 0.8 / len(series)
        for i, (name, values) in enumerate(series.items()):
            places = [x + (i - (len(series) - 1) / 2) * width for x in range(len(groups))]
            color = OURS if name == "pentad" else OTHERS
            drawn = axis.bar(places, values, width * 0.94, color=color, label=name)
            axis.bar_label(drawn, [_short(v) for v in values], padding=3, fontsize=9, color=INK)
        axis.set_title(title, fontsize=10.5, color=INK, loc="left")
        axis.set_xticks(range(len(groups)), groups)
        axis.set_yticks([])
        axis.set_ylim(0, 1.18 * max(max(values) for values in series.values()))
        _plain(axis, ("top", "right", "left"))
        axis.tick_params(length=0)
    axes[-1].legend(frameon=False, fontsize=9, loc="best")
    return figure


def losses(ours: Sequence[float], plain: Sequence[float], held_out: float) -> Figure:
    """The loss of each step, and of the twin's first ones on top of it."""
    figure = _figure(11, 3.6)
    whole, first = figure.subplots(1, 2, width_ratios=(2.2, 1))
    smooth, running, share = [], ours[0], min(20 / len(ours), 0.5)
    for loss in ours:
        running += share * (loss - running)
        smooth.append(running)
    steps = range(1, len(ours) + 1)
    whole.plot(steps, ours, color=OURS, alpha=0.3, linewidth=1)
    whole.plot(steps, smooth, color=OURS, linewidth=2, label="training, smoothed")
    whole.axhline(held_out, color=INK, linewidth=1, linestyle=":", label="unseen text, at the end")
    whole.set_title("bits a byte over the training", fontsize=10.5, color=INK, loc="left")
    count = range(1, len(plain) + 1)
    first.plot(count, ours[: len(plain)], color=OURS, linewidth=2, label="pentad")
    first.plot(count, plain, "o", mfc="none", mec=INK, markersize=8, label="plain PyTorch")
    first.set_title(f"the first {len(plain)} steps", fontsize=10.5, color=INK, loc="left")
    first.set_xticks(list(count))
    for axis in (whole, first):
        axis.set_xlabel("step", fontsize=9)
        axis.grid(axis="y", color=FAINT)
        axis.legend(frameon=False, fontsize=9)
        _plain(axis, ("top", "right"))
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure((width, height), dpi=130, layout="constrained", facecolor="white")


def _plain(axis, without: Sequence[str]) -> None:
    for side in without:
        axis.spines[side].set_visible(False)
    for spine in axis.spines.values():
        spine.set_color(OTHERS)
    axis.tick_params(colors=INK, labelsize=9.5)
    axis.set_axisbelow(True)


def _short(value: float) -> str:
    """Three digits: 0.987, 12.3, 1,240."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
