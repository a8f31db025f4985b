"""Define `Report`, the evaluation of a model as text, frame, plot and page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa

from twotower.api.params import path_of
from twotower.errors import DataError, require
from twotower.evaluation.insights import insights
from twotower.evaluation.verdict import MAIN, title
from twotower.utils.documents import Report as Document
from twotower.utils.frames import Kind, as_kind


class Report:
    """The evaluation of a model and of the baselines on the test part.

    Attributes
    ----------
    data
        All of it, as in `report.json`.
    verdict
        One or two sentences: the model against the best baseline.
    sentences
        Relative differences, and the slices that a simpler system wins.
    """

    def __init__(self, data: Document, kind: Kind = "arrow") -> None:
        self.data, self._kind = data, kind
        self.verdict = data.verdict
        self.sentences = insights(data)

    @property
    def metric(self) -> str:
        """The metric that decides, such as "NDCG@10"."""
        return self.data.protocol.metric

    def frame(self) -> Any:
        """Return a row per system, the best first: "system", a column per metric, and "low" and "high" of the deciding metric."""
        systems = self.data.systems
        order = sorted(systems, key=lambda name: -systems[name][self.metric].value)
        names = [self.metric, *(name for name in systems[order[0]] if name != self.metric)]
        columns: dict[str, list[Any]] = {"system": [title(name) for name in order]}
        columns |= {name: [systems[system][name].value for system in order] for name in names[:1]}
        columns |= {end: [getattr(systems[system][self.metric], end) for system in order] for end in ("low", "high")}
        columns |= {name: [systems[system][name].value for system in order] for name in names[1:]}
        return as_kind(pa.table(columns), self._kind)

    def plot(self) -> Any:
        """Return a matplotlib figure: the systems with their 95 % intervals, training curves, and pictures of the data."""
        require("notebook", "matplotlib")
        from twotower.api.plots import figure

        return figure(self.data, self.metric)

    def save(self, path: Path | str) -> Path:
        """Write the report as one HTML page, which opens offline. Return its path.

        Raises
        ------
        DataError
            The file cannot be written.
        """
        from twotower.evaluation.report import render

        file = path_of(path, "The path")
        try:
            file.write_text(render(self.data), encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"Cannot write the report to {file}: {error.strerror}. Choose a file in a folder that exists."
            ) from None
        return file

    def __repr__(self) -> str:
        return "\n".join(["Report: " + self.verdict, *(f"- {sentence}" for sentence in self.sentences)])

    def _repr_html_(self) -> str:
        systems = self.data.systems
        order = sorted(systems, key=lambda name: -systems[name][self.metric].value)
        metrics = [self.metric, *(name for name in systems[order[0]] if name.endswith(self.metric.partition("@")[2]))]
        names = list(dict.fromkeys(metrics))
        rows = [_row([title(name), *(f"{systems[name][one].value:.4f}" for one in names)], bold=name == MAIN) for name in order]
        list_items = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.sentences)
        curves = "".join(_curve(self.data.curves, name) for name in (self.metric, "train_loss"))
        table = f"<table><thead>{_row(['system', *names], cell='th')}</thead><tbody>{''.join(rows)}</tbody></table>"
        return f"<h3>{escape(self.verdict)}</h3><ul>{list_items}</ul>{table}{curves}"


def _row(cells: Sequence[str], *, cell: str = "td", bold: bool = False) -> str:
    texts = [f"<b>{escape(text)}</b>" if bold else escape(text) for text in cells]
    return "<tr>" + "".join(f"<{cell}>{text}</{cell}>" for text in texts) + "</tr>"


def _curve(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Return a curve of the training log as an SVG of 300 × 80 units; nothing for fewer than two points."""
    points = [(float(row["step"]), float(row[name])) for row in rows if isinstance(row.get(name), int | float)]
    if len(points) < 2:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, width, low, height = min(xs), max(xs) - min(xs) or 1, min(ys), max(ys) - min(ys) or 1
    line = " ".join(f"{300 * (x - left) / width:.1f},{76 - 72 * (y - low) / height:.1f}" for x, y in points)
    drawn = f'<polyline points="{line}" fill="none" stroke="#2456c8" stroke-width="2"/>'
    label = f"{escape(name)}: {ys[0]:.4g} → {ys[-1]:.4g}"
    svg = f'<svg width="300" height="80">{drawn}</svg>'
    return f'<figure style="display:inline-block;margin:1em"><figcaption>{label}</figcaption>{svg}</figure>'
