"""Write an evaluation as `report.json` and `report.html`.

The JSON has sorted keys, so equal results give equal bytes. The page is one file: it works offline, without scripts, in light and
dark mode and on small screens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from twotower import __version__
from twotower.errors import DataError
from twotower.evaluation.insights import insights
from twotower.evaluation.pictures import drawn
from twotower.evaluation.verdict import TITLES, baselines_of
from twotower.utils.documents import Interval, Report, parse_document
from twotower.utils.metrics import METRICS
from twotower.utils.nouns import spoken, with_article
from twotower.utils.types import Json

CURVES = {
    "train_loss": "mean training loss",
    "loss": "loss",
    "lr": "learning rate",
    "learning_rate": "learning rate",
    "temperature": "temperature",
}
"""Columns of the training log that are plotted beside the deciding metric, and their titles."""
_MAIN = "two-tower"
_WIDTH, _HEIGHT = 300.0, 120.0
_BEYOND = {
    "coverage": ("coverage", "share of the catalogue that appears in at least one list"),
    "gini": ("Gini", "0: all items are shown equally often; 1: one item takes every position"),
    "novelty_bits": ("novelty, bits", "mean −log2 p of the items shown, where p is an item's share of the training events"),
    "popularity_lift": (
        "popularity lift",
        "mean popularity of the items shown divided by that of the histories' items, minus 1; 0: equally popular",
    ),
    "diversity": ("diversity", "mean Jaccard distance of categories within a list"),
}


def write_report(report: Report, out: Path) -> None:
    """Write `report.json` and `report.html` into the folder `out`, which is created if missing."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.json_values(), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    (out / "report.html").write_text(render(report), encoding="utf-8")


def read_report(path: Path) -> Report:
    """Return the report in a `report.json`.

    Raises
    ------
    DataError
        The file is not a report of this version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DataError(f"{path} is not readable JSON. Write it again with `twotower evaluate`.") from None
    return parse_document(Report, values, path)


def render(report: Report) -> str:
    """Return the HTML page."""
    template = files("twotower.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    noun = report.dataset.noun
    environment.filters |= {"spoken": lambda text: spoken(text, noun), "with_article": with_article}
    environment.filters |= {"title": _title, "figure": _figure, "signed": _signed, "count": lambda n: f"{n:,}"}
    metric = report.protocol.metric
    ranked = sorted(report.systems, key=lambda name: -report.systems[name][metric].value)
    columns = sorted(ranked, key=lambda name: (name == "oracle", name != _MAIN))
    return environment.from_string(template).render(
        report=report,
        metric=metric,
        main=_MAIN,
        tone=_tone(report, metric),
        ranked=ranked,
        bars=_strip({name: report.systems[name][metric] for name in ranked}),
        forest=_strip({name: d[metric] for name, d in _by_difference(report, metric)}),
        tables=_tables(report, metric, ranked),
        columns=columns,
        slices=_slices(report, columns),
        beyond=_beyond(report, ranked),
        plots=_plots(report.curves, metric),
        sentences=insights(report),
        pictures=[drawn(picture) for picture in report.pictures],
        written=f"twotower {__version__}, {date.today().isoformat()}",
    )


def _tone(report: Report, metric: str) -> str:
    """Return "good" if the model beats every baseline, "bad" if one beats it, else "neutral"."""
    differences = [report.differences[name][metric] for name in baselines_of(report.differences, _MAIN)]
    if not differences:
        return "neutral"
    if all(d.low > 0 for d in differences):
        return "good"
    return "bad" if any(d.high < 0 for d in differences) else "neutral"


def _by_difference(report: Report, metric: str) -> list[tuple[str, dict[str, Interval]]]:
    rivals = [pair for pair in report.differences.items() if pair[0] != "oracle"]  # the oracle would compress the scale
    return sorted(rivals, key=lambda pair: pair[1][metric].value)


def _strip(figures: Mapping[str, Interval]) -> Json:
    """Return the position of each system's value and interval, in percent of a common axis that contains zero, and the ticks."""
    if not figures:
        return {"rows": [], "ticks": [], "origin": 0.0}
    low = min([f.low for f in figures.values()] + [0.0])
    high = max([f.high for f in figures.values()] + [0.0])
    span = (high - low) or 1.0
    low, high = low - 0.02 * span * (low < 0), high + 0.02 * span

    def at(x: float) -> float:
        return round(100 * (x - low) / (high - low), 2)

    rows = [
        {"name": name, "at": at(f.value), "from": at(f.low), "width": round(at(f.high) - at(f.low), 2), **dict(f)}
        for name, f in figures.items()
    ]
    return {"rows": rows, "origin": at(0.0), "ticks": [{"at": at(t), "label": _tick(t)} for t in _ticks(low, high, 4)]}


def _tables(report: Report, metric: str, ranked: Sequence[str]) -> list[Json]:
    """Return one table per list length, the deciding one first and open; the best system of each column is marked."""
    lengths = sorted({int(name.partition("@")[2]) for name in report.systems[ranked[0]]})
    own = int(metric.partition("@")[2])
    tables = []
    for k in sorted(lengths, key=lambda k: (k != own, k)):
        names = [f"{name}@{k}" for name in METRICS if f"{name}@{k}" in report.systems[ranked[0]]]
        best = {name: _best(ranked, {s: report.systems[s][name].value for s in ranked}) for name in names}
        rows = [{"name": s, "cells": [{**dict(report.systems[s][n]), "best": best[n] == s} for n in names]} for s in ranked]
        tables.append({"k": k, "open": k == own, "columns": names, "rows": rows})
    return tables


def _slices(report: Report, columns: Sequence[str]) -> list[Json]:
    """Return one table per slice title: groups as rows, systems as columns; `share` is the percentage of the row's best value."""
    tables = []
    for title, groups in report.slices.items():
        rows = []
        for group, entry in groups.items():
            values = {name: entry.systems[name].value for name in columns}
            best = _best(columns, values)
            top = values[best] if best else 0.0
            cells = [
                {**dict(entry.systems[s]), "best": s == best, "share": round(100 * min(values[s] / top, 1)) if top > 0 else 0}
                for s in columns
            ]
            rows.append({"name": group, "queries": entry.queries, "users": entry.users, "cells": cells})
        tables.append({"title": title, "rows": rows})
    return tables


def _beyond(report: Report, ranked: Sequence[str]) -> Json:
    keys = list(dict.fromkeys(key for name in ranked for key in report.beyond[name]))
    columns = [
        {"title": _BEYOND[key.partition("@")[0]][0], "k": key.partition("@")[2], "help": _BEYOND[key.partition("@")[0]][1]}
        for key in keys
    ]
    return {"columns": columns, "rows": [{"name": s, "cells": [report.beyond[s].get(key) for key in keys]} for s in ranked]}


def _best(names: Sequence[str], values: Mapping[str, float]) -> str | None:
    rivals = [name for name in names if name != "oracle"]
    best = max(rivals, key=lambda name: values[name], default=None)
    return best if best is not None and values[best] > 0 else None


def _plots(curves: Sequence[Mapping[str, Any]], metric: str) -> list[Json]:
    """Return one plot per column, over the steps, in a box of 300 × 120 units."""
    plots = []
    for name in (metric, *CURVES):
        points = [(float(row["step"]), float(row[name])) for row in curves if isinstance(row.get(name), int | float)]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if len(points) < 2:
            continue
        (left, right), ys = (points[0][0], points[-1][0]), [y for _, y in points]
        low, high = min(ys), max(ys)
        span = (high - low) or abs(high) or 1.0
        low, high = low - 0.05 * span, high + 0.05 * span
        pixels = [(_WIDTH * (x - left) / ((right - left) or 1), _HEIGHT * (high - y) / (high - low)) for x, y in points]
        best = max(range(len(ys)), key=ys.__getitem__) if name == metric else None
        plots.append(
            {
                "title": CURVES.get(name, name),
                "path": " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels),
                "ticks": [{"at": round(_HEIGHT * (high - t) / (high - low), 1), "label": _tick(t)} for t in _ticks(low, high, 3)],
                "left": f"{left:,.0f}",
                "right": f"{right:,.0f}",
                "last": _tick(ys[-1]),
                "best": None
                if best is None
                else {"x": pixels[best][0], "y": pixels[best][1], "value": ys[best], "step": points[best][0]},
            }
        )
    return plots


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` + 1 round numbers in [low, high], as densely as possible."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * factor for factor in (1, 2, 5, 10, 20)):
        ticks = [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(ticks) <= most + 1:
            break
    return ticks


def _tick(value: float) -> str:
    return f"{value:.3g}".replace("-", "−") if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}".replace("-", "−")


def _figure(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _title(name: str) -> str:
    return TITLES.get(name, name).removeprefix("the ")
