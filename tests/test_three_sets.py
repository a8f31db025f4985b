"""The ten lines of the first page on three sets, a shop, a town and MovieLens, from pandas and from polars, with equal answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import polars as pl
import pytest

from .shop import FAST, shop
from .test_api_page import ten_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Set(NamedTuple):
    """Two tables, and what stands for the names of the shop in the ten lines."""

    events: pd.DataFrame
    items: pd.DataFrame
    columns: dict[str, str]
    condition: str


def small_shop() -> Set:
    orders, products = shop()
    names = ("customer", "product", "ordered_at", "title")
    return Set(orders, products, {name: name for name in names}, 'brand == "Uji" and price <= 20')


def town(folder: Path) -> Set:
    from twotower.data.simulator.simulate import simulate

    simulate(folder, users=200, businesses=120, events=4000, seed=3)
    rows = {}
    for name, kept in {
        "review": ("user_id", "business_id", "date"),
        "business": ("business_id", "name", "city", "latitude", "longitude", "stars"),
    }.items():
        (file,) = folder.glob(f"*_{name}.json")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        rows[name] = pd.DataFrame([{key: line[key] for key in kept} for line in lines])
    columns = {"customer": "user_id", "product": "business_id", "ordered_at": "date", "title": "name"}
    city = rows["business"]["city"].mode()[0]
    return Set(rows["review"], rows["business"], columns, f'city == "{city}" and stars >= 2')


def movies() -> Set:
    """Ratings in the form of MovieLens 100K: integers as ids, seconds since 1970, genres as columns of 0 and 1."""
    rng = np.random.default_rng(0)
    n = 5000
    events = pd.DataFrame(
        {
            "user id": rng.integers(1, 200, n),
            "item id": rng.zipf(1.4, n) % 150 + 1,
            "rating": rng.integers(1, 6, n),
            "timestamp": np.sort(rng.integers(874_724_710, 893_286_638, n)),
        }
    ).drop_duplicates(["user id", "item id"])
    items = pd.DataFrame({"movie id": range(1, 151), "movie title": [f"Film {one} ({1930 + one % 60})" for one in range(150)]})
    for genre in ("Action", "Comedy", "Drama"):
        items[genre] = rng.integers(0, 2, len(items))
    columns = {"customer": "user id", "product": "item id", "ordered_at": "timestamp", "title": "movie title"}
    return Set(events, items, columns, "Action == 1")


def movielens(folder: Path) -> Set:
    """MovieLens 100K, from the package that carries it."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "recbole==1.2.1"]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        events, items = (
            pd.read_csv(archive.open(f"recbole/dataset_example/ml-100k/ml-100k.{name}"), sep="\t") for name in ("inter", "item")
        )
    for frame in (events, items):
        frame.columns = [name.partition(":")[0] for name in frame.columns]
    items["release_year"] = pd.to_numeric(items["release_year"], errors="coerce")  # one is "V", which polars' reader refuses
    columns = {"customer": "user_id", "product": "item_id", "ordered_at": "timestamp", "title": "movie_title"}
    return Set(events, items, columns, "release_year >= 1990")


def answers(found: Set, folder: Path, library: str) -> dict[str, pd.DataFrame]:
    """Run the ten lines, printed for the shop, with the names of a set, and return its answers as pandas frames."""
    folder.mkdir()
    found.events.to_csv(folder / "orders.csv", index=False)
    found.items.to_csv(folder / "products.csv", index=False)
    users, items = (found.events[found.columns[role]].tolist() for role in ("customer", "product"))
    code = ten_lines("README.md").replace('brand == "Uji" and price <= 20', found.condition.replace("'", "\\'"))
    for role, column in found.columns.items():
        code = code.replace(f'="{role}"', f'="{column}"')
    for old, new in {"C0001": users[0], "C0002": users[1], "P0001": items[0], "P0005": items[1]}.items():
        code = code.replace(f'"{old}"', repr(new))
    code = code.replace("tt.Model(seed=0)", "tt.Model(seed=0, verbose=0, **FAST)")
    lines = code.splitlines()
    for number, line in enumerate(lines):  # what a notebook shows is kept
        call = line.partition("  #")[0]
        if call.startswith("model.") and not call.startswith("model.save"):
            lines[number] = f"shown.append({call})"
        if call.startswith("model.save"):
            reopened = code.rpartition("tt.load")[2].strip()
            lines[number] = f"{call}; shown.append(tt.load{reopened})"
    if library == "polars":
        lines = [line.replace("import pandas as pd", "import polars as pl").replace("pd.read", "pl.read") for line in lines]
    names: dict[str, Any] = {"FAST": FAST, "shown": []}
    here = Path.cwd()
    os.chdir(folder)
    try:
        exec("\n".join(lines), names)
    finally:
        os.chdir(here)
    report, *frames = names["shown"]
    kind = pl.DataFrame if library == "polars" else pd.DataFrame
    assert all(isinstance(frame, kind) for frame in frames) and report.verdict and len(frames) == 4
    told = dict(zip(("users", "history", "similar", "reopened"), frames, strict=True))
    found_ids = [set(told["users"]["item"].to_list()), set(names["ids"].tolist())]
    assert found_ids[0] <= found_ids[1] <= set(found.items.iloc[:, 0].tolist()), "ids have the type of the frame"
    return {name: frame.to_pandas() if library == "polars" else frame for name, frame in told.items()}


@pytest.mark.parametrize("name", ["shop", "town", "movies", "movielens"])
def test_the_ten_lines_give_equal_answers(name: str, tmp_path: Path) -> None:
    made = {
        "shop": small_shop,
        "town": lambda: town(tmp_path / "raw"),
        "movies": movies,
        "movielens": lambda: movielens(tmp_path / "raw"),
    }
    found = made[name]()
    one, other = (answers(found, tmp_path / library, library) for library in ("pandas", "polars"))
    for part, frame in one.items():
        pd.testing.assert_frame_equal(frame, other[part], check_dtype=False)
    assert one["users"]["user"].nunique() == 2 and (one["users"].groupby("user").size() == 10).all()
    assert len(one["history"]) and len(one["similar"]) == 5 and len(one["reopened"]) == 10
