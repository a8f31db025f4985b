"""Implement the commands that need only a bundle: lists for all users, index tuning, recommendations as text.

They need no extra.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from twotower.bundle.index_tuning import Measured, tune_index
from twotower.bundle.index_tuning_plot import draw
from twotower.retrieval.recommend_all import recommend_all
from twotower.retrieval.recommend_on_spark import recommend_on_spark
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Recommendation, Request
from twotower.utils.console import progress


def recommend_all_stage(bundle: Path, out: Path, request: Request) -> int:
    """Write the lists of all users of a bundle to the Parquet file `out`, and return the number of users."""
    with progress() as report:
        return recommend_all(Recommender.load(bundle), out, request, report=report)


def recommend_on_spark_stage(bundle: Path, out: str, request: Request, *, master: str | None, overwrite: bool) -> int:
    """Write the lists of all users of a bundle to the folder `out` on Spark, and return the number of users."""
    with progress() as report:
        return recommend_on_spark(bundle, out, request, master=master, overwrite=overwrite, report=report)


def tune_index_stage(bundle: Path, *, recall: float, k: int, kinds: list[str], plot: Path, say: Callable[[str], None]) -> Measured:
    """Measure indexes on a bundle, add the best one and write `plot`; each result is passed to `say` when it is measured."""
    say(f"{'index':8} {'recall':>7} {'p50, ms':>9} {'MB':>9}  settings")

    def tell(row: Measured) -> None:
        settings = ", ".join(f"{name} {value:g}" for name, value in row.settings.items() if name != "balance")
        say(f"{row.kind:8} {row.recall:7.4f} {row.p50_ms:9.3f} {row.bytes / 1e6:9.2f}  {settings}")

    best, rows = tune_index(bundle, recall=recall, k=k, kinds=kinds, tell=tell)
    plot.parent.mkdir(parents=True, exist_ok=True)
    plot.write_text(draw(rows, best, recall), encoding="utf-8")
    return best


def as_table(items: list[Recommendation], noun: str = "item") -> str:
    """Return recommendations as text, one per line, without columns that have no content."""
    if not items:
        return f"Nothing to recommend: no {noun} matches the request."
    columns = {
        "rank": [str(item.rank) for item in items],
        noun: [item.name[:32] for item in items],
        "categories": [", ".join(item.categories)[:40] for item in items],
        "city": [item.city or "" for item in items],
        "km": ["" if item.distance_km is None else f"{item.distance_km:.1f}" for item in items],
        "score": [f"{item.score:.3f}" for item in items],
    }
    filled = {name: texts for name, texts in columns.items() if any(texts)}
    table = Table(box=None, pad_edge=False)
    for name in filled:
        table.add_column(name, justify="right" if name in ("rank", "km", "score") else "left", no_wrap=True, overflow="ellipsis")
    for row in zip(*filled.values(), strict=True):
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=120, color_system=None, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
