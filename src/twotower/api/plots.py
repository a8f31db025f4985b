"""Draw a report with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twotower.evaluation.verdict import MAIN, title
from twotower.utils.documents import Interval, Picture, Report

OWN, OTHER = "#2456c8", "#8a93a3"
MAX_LABELS = 6


def figure(report: Report, metric: str) -> Figure:
    """Return a figure: the systems, the training curves and the pictures of the data, as far as the report has them."""
    curves = [name for name in (metric, "train_loss") if len(_points(report.curves, name)) > 1]
    pictures = report.pictures
    parts = 1 + len(curves) + len(pictures)
    drawn = plt.figure(figsize=(9, 2.6 * -(-parts // 2) + 0.4), layout="constrained")
    plt.close(drawn)  # a notebook shows what is returned, and nothing a second time
    grid = list(drawn.subplots(-(-parts // 2), 2, squeeze=False).flat)
    _systems(grid[0], report.systems, metric)
    for axes, name in zip(grid[1:], curves, strict=False):
        axes.plot(*zip(*_points(report.curves, name), strict=True), color=OWN)
        axes.set(title={"train_loss": "mean training loss"}.get(name, f"validation {name}"), xlabel="step")
    for axes, picture in zip(grid[1 + len(curves) :], pictures, strict=False):
        _picture(axes, picture)
    for axes in grid[parts:]:
        axes.set_axis_off()
    return drawn


def _systems(axes: Axes, systems: Mapping[str, Mapping[str, Interval]], metric: str) -> None:
    order = sorted(systems, key=lambda name: systems[name][metric].value)
    figures = [systems[name][metric] for name in order]
    values = [one.value for one in figures]
    ends = [[one.value - one.low for one in figures], [one.high - one.value for one in figures]]
    axes.barh([title(name) for name in order], values, xerr=ends, color=[OWN if name == MAIN else OTHER for name in order])
    axes.set(title=f"{metric}, 95 % interval")


def _picture(axes: Axes, picture: Picture) -> None:
    if picture.kind == "bars":
        axes.bar(picture.x, picture.y, color=OWN)
    else:
        axes.plot(picture.x, picture.y, color=OWN)
    if isinstance(picture.x[0], str) and len(picture.x) > MAX_LABELS:
        axes.set_xticks(range(0, len(picture.x), -(-len(picture.x) // MAX_LABELS)))
        axes.tick_params(axis="x", labelsize=7)
    axes.set(title=picture.title, xlabel=picture.x_label, ylabel=picture.y_label)


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[name])) for row in rows if isinstance(row.get(name), int | float)]
