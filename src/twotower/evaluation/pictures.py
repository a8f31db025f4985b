"""Compute what the pictures of a dataset show: events a week, the long tail of the items, and the lengths of histories."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from twotower.data.dataset import Dataset
from twotower.schema import DAY_S, FIRST_ROW
from twotower.utils.documents import Picture
from twotower.utils.nouns import plural
from twotower.utils.types import Json

WEEK_S = 7 * DAY_S
MAX_POINTS = 104
LENGTHS = (1, 2, 3, 5, 10, 20, 50, 100)
"""Lower ends of the groups of history lengths."""


def pictures(dataset: Dataset) -> list[Picture]:
    """Return the pictures of a dataset.

    All events count, those of the validation and test parts included. A dataset without times has no events a week.
    """
    drawn = [_long_tail(dataset), _history_lengths(dataset)]
    return [_events_a_week(dataset), *drawn] if dataset.has_time and len(dataset.events) else drawn


def _events_a_week(dataset: Dataset) -> Picture:
    """Count events by week; several weeks together where there are too many."""
    time_s = dataset.events.time_s
    first, weeks = int(time_s.min()), int((time_s.max() - time_s.min()) // WEEK_S) + 1
    together = -(-weeks // MAX_POINTS)
    counts = np.bincount((time_s - first) // (together * WEEK_S))
    days = [str(np.datetime64(first + number * together * WEEK_S, "s").astype("datetime64[D]")) for number in range(len(counts))]
    title = "events a week" if together == 1 else f"events in {together} weeks"
    return Picture(title=title, kind="line", x=days, y=counts.tolist(), x_label="week", y_label="events")


def _long_tail(dataset: Dataset) -> Picture:
    """Return the share of all events that the most popular items have, at shares of the catalogue."""
    counts = np.sort(np.diff(dataset.item_events.offsets)[FIRST_ROW:])[::-1]
    total = max(int(counts.sum()), 1)
    shares = np.linspace(0, 1, 51)
    covered = np.append(0, np.cumsum(counts))[np.round(shares * len(counts)).astype(int)] / total
    x, y = (100 * shares).round(1).tolist(), (100 * covered).round(2).tolist()
    x_label = f"most popular {plural(dataset.noun)}, % of the catalogue"
    return Picture(title="long tail: share of the events", kind="line", x=x, y=y, x_label=x_label, y_label="events, %")


def _history_lengths(dataset: Dataset) -> Picture:
    """Count users by the length of their history."""
    lengths = np.diff(dataset.events.offsets)[FIRST_ROW:]
    counts = np.histogram(lengths, bins=[*LENGTHS, np.iinfo(np.int64).max])[0]
    ends = [f"{low}" if high - low == 1 else f"{low}–{high - 1}" for low, high in pairwise(LENGTHS)]
    x = [*ends, f"{LENGTHS[-1]}+"]
    return Picture(title="history lengths", kind="bars", x=x, y=counts.tolist(), x_label="events of a user", y_label="users")


def drawn(picture: Picture, width: float = 300, height: float = 120) -> Json:
    """Return a picture in a box of `width` × `height` units: "path" of a line, or "bars", and the labels of the axes."""
    x, y, line = picture.x, picture.y, picture.kind == "line"
    top = max([*y, 1e-9])
    step = width / max(len(y) - line, 1)
    up = [round(height * (1 - value / top), 1) for value in y]
    bars = [
        {
            "x": round(number * step + 1, 1),
            "y": at,
            "width": round(step - 2, 1),
            "height": round(height - at, 1),
            "label": label,
            "value": value,
        }
        for number, (at, label, value) in enumerate(zip(up, x, y, strict=True))
    ]
    return {
        "title": picture.title,
        "x_label": picture.x_label,
        "y_label": picture.y_label,
        "path": " ".join(f"{number * step:.1f},{at}" for number, at in enumerate(up)) if line else "",
        "bars": [] if line else bars,
        "left": x[0] if x else "",
        "right": x[-1] if x else "",
        "top": f"{top:,.4g}" if top < 1000 else f"{top:,.0f}",
    }
