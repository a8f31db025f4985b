"""A small shop as frames: 200 customers of five tastes, 60 products of five brands, 3,000 orders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

BRANDS = ("Uji", "Assam", "Ceylon", "Yame", "Fujian")
FAST: dict[str, Any] = {
    "training": {"max_steps": 12, "recipe": "fixed", "eval_metric": "NDCG@10"},
    "evaluation": {"baselines": ["popular", "item_knn"], "tune_baselines": False, "bootstrap_resamples": 50, "refresh_days": None},
    "prepare": {"text_dim": 8},
}


def shop(*, whole: bool = False, users: int = 200, items: int = 60, events: int = 3000) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return orders and products; with `whole`, ids are integers, else texts such as "C0001" and "P0001"."""
    rng = np.random.default_rng(0)
    taste, brand = rng.integers(0, 5, users), rng.integers(0, 5, items)
    popular = rng.pareto(1.5, items) + 0.1
    buyer, bought = rng.integers(0, users, events), np.zeros(events, np.int64)
    for kind in range(5):
        mine = taste[buyer] == kind
        weight = popular * np.where(brand == kind, 8, 1)
        bought[mine] = rng.choice(items, mine.sum(), p=weight / weight.sum())
    moments = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.sort(rng.integers(0, 180 * 86_400, events)), unit="s")

    def ids(letter: str, rows: Any) -> Any:
        return rows + 1 if whole else [f"{letter}{row + 1:04}" for row in rows]

    orders = pd.DataFrame({"customer": ids("C", buyer), "product": ids("P", bought), "ordered_at": moments})
    products = pd.DataFrame(
        {
            "product": ids("P", np.arange(items)),
            "title": [f"Tea {number}" for number in range(items)],
            "brand": [BRANDS[kind] for kind in brand],
            "price": rng.integers(3, 40, items),
        }
    )
    return orders, products


NAMED: dict[str, Any] = {"user": "customer", "item": "product", "time": "ordered_at", "name": "title"}
