"""Run all stages on a simulated town and show recommendations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from twotower.data.dataset import Dataset
from twotower.pipeline.bundle_stages import as_table
from twotower.pipeline.stages import run_all, simulate_stage, verdict
from twotower.retrieval.recommender import Recommender
from twotower.schema import TEST
from twotower.utils.config import parse_config

SIZES = {"users": 2400, "businesses": 1200, "events": 48_000}


def demo(out: Path, *, seed: int, say: Callable[[str], None]) -> None:
    """Run all stages on a simulated town, then recommend ten items to a known user, to an unknown user, and with a filter."""
    raw = out / "raw"
    counts = simulate_stage(raw, **SIZES, seed=seed, impressions=False)
    say(f"A town with {', '.join(f'{count:,} {name}' for name, count in counts.items())}: {raw}")
    report = run_all(parse_config({"seed": seed, "data": {"source": "yelp", "path": str(raw)}}), out)
    assert report is not None
    recommender = Recommender.load(out / "bundle")
    user, items = _known_user(recommender.dataset)
    say(f"\nTop 10 for {user}, a known user:\n")
    say(as_table(recommender.recommend(user=user)))
    rows = recommender.dataset.item_rows(items)
    names = [recommender.details.describe(int(row))["name"] for row in rows]
    say(f"\nTop 10 for an unknown user with the history {', '.join(names[:-1])} and {names[-1]}:\n")
    say(as_table(recommender.recommend(history=items)))
    category = (recommender.details.describe(int(rows[-1]))["categories"] or ["Restaurants"])[0]
    condition = f'category == "{category}" and within(5)'
    say(f"\nTop 10 for the same user with the filter {condition}:\n")
    say(as_table(recommender.recommend(history=items, filter=condition)))
    say("\n" + verdict(report, out))


def _known_user(dataset: Dataset) -> tuple[str, list[str]]:
    """Return the id of a user with a typical history, and the last three items of another user."""
    events = dataset.events
    lengths = np.diff(events.offsets)
    seen_late = np.bincount(events.user_row[events.split == TEST], minlength=len(lengths)) > 0
    candidates = np.flatnonzero((lengths >= 8) & (lengths <= 30) & seen_late)
    if len(candidates) < 2:
        candidates = np.argsort(-lengths)[:2]
    first, second = int(candidates[0]), int(candidates[len(candidates) // 2])
    history = events.item_row[events.offsets[second] : events.offsets[second + 1]]
    return str(dataset.user_ids[first]), [str(dataset.item_ids[row]) for row in dict.fromkeys(history[::-1].tolist())][:3][::-1]
