"""Walk the whole circle with the real server: serve, events, refresh, export, update, reload, better lists."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from twotower.cli import main
from twotower.pipeline.stages import run_all
from twotower.serving.access import KEY_VARIABLE
from twotower.serving.event_store import open_store
from twotower.serving.stored_rows import every_event
from twotower.utils.config import parse_config

from .shop import FAST, shop

KEY = "a-key-of-this-test"
STREAM, TARGET = pd.Timedelta(days=60), pd.Timedelta(days=10)  # parts of the orders that the run does not have


class Server:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON of an answer, or its bytes."""
        headers = {"Authorization": f"Bearer {KEY}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            read = answer.read()
            return json.loads(read) if answer.headers["content-type"] == "application/json" else read

    def hits(self, targets: dict[str, set[str]]) -> float:
        """Return the mean number of the wanted items in the lists of users."""
        users, found = list(targets), []
        for start in range(0, len(users), 100):
            requests = [{"user": user, "k": 10, "exclude_seen": False} for user in users[start : start + 100]]
            found += self.ask("POST", "/v1/recommend:batch", {"requests": requests})["answers"]
        lists = [{item["item_id"] for item in one["items"]} for one in found]
        return sum(len(one & targets[user]) for user, one in zip(users, lists, strict=True)) / len(users)


@contextmanager
def serving(bundle: Path, log: Path) -> Iterator[Server]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "twotower", "serve", str(bundle), "--port", str(port), "--rate", "0", "--refresh-s", "0"]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, KEY_VARIABLE: KEY})
    server, end = Server(port), time.monotonic() + 150
    try:
        while True:
            with suppress(urllib.error.URLError, ConnectionError):
                server.ask("GET", "/health/ready")
                break
            assert time.monotonic() < end and process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame, dict[str, set[str]]]:
    """Return a run of a shop until two months ago, the orders since then, and what each customer orders in the last days.

    Since then, customers of odd numbers buy another brand.
    """
    root = tmp_path_factory.mktemp("circle")
    orders, products = shop(events=4000)
    orders["ordered_at"] += pd.Timestamp.now().floor("s") - pd.Timedelta(hours=1) - orders["ordered_at"].max()
    last = orders["ordered_at"].max()
    late = orders["ordered_at"] > last - STREAM
    other = {name: f"P{(int(name[1:]) + 29) % 60 + 1:04}" for name in products["product"]}
    odd = orders["customer"].str[1:].astype(int) % 2 == 1
    orders.loc[late & odd, "product"] = orders.loc[late & odd, "product"].map(other)
    orders[~late].to_csv(root / "orders.csv", index=False)
    products.to_csv(root / "products.csv", index=False)
    tower = {"embedding_dim": 16, "num_heads": 2}
    interactions = {"path": "orders.csv", "user_id": "customer", "item_id": "product", "time": "ordered_at"}
    items = {"path": "products.csv", "item_id": "product", "name": "title", "features": [{"name": "brand", "kind": "categorical"}]}
    settings: dict[str, Any] = {
        **FAST,
        "model": {"user_tower": tower},
        "training": {**FAST["training"], "max_steps": 40},
        "evaluation": {**FAST["evaluation"], "baselines": []},
        "data": {"source": "tables", "path": str(root), "interactions": interactions, "items": items},
    }
    run_all(parse_config(settings), root / "run")
    targets = orders[orders["ordered_at"] > last - TARGET].groupby("customer")["product"].agg(set).to_dict()
    return root, orders[late & (orders["ordered_at"] <= last - TARGET)], targets


@pytest.mark.slow
def test_the_whole_circle(world: tuple[Path, pd.DataFrame, dict[str, set[str]]], tmp_path: Path, capfd: Any) -> None:
    root, stream, targets = world
    run, log, export = root / "run", tmp_path / "log", tmp_path / "events.parquet"
    with serving(run / "bundle", log) as server:
        before, first = server.hits(targets), server.ask("POST", "/v1/recommend", {"k": 1})["version"]
        rows = list(zip(stream["customer"], stream["product"], stream["ordered_at"], strict=True))
        events = [
            {"event_id": f"o{n}", "user": user, "item_id": item, "time_s": int(at.timestamp())}
            for n, (user, item, at) in enumerate(rows)
        ]
        for start in range(0, len(events), 500):
            sent = server.ask("POST", "/v1/events", {"events": events[start : start + 500]})
            assert sent["repeated"] == 0
        answer = server.ask("POST", "/v1/recommend", {"user": "C0001", "k": 5})
        shown = [item["item_id"] for item in answer["items"]]
        named = [{"request_id": answer["request_id"], "shown": shown}, {"request_id": answer["request_id"], "item_id": shown[1]}]
        assert server.ask("POST", "/v1/events", {"events": named}) == {"accepted": 6, "repeated": 0}
        fresh = server.ask("POST", "/admin/refresh")
        assert fresh["events"]["counted"] == len(events) + 1 and fresh["events"]["negative"] == 5
        export.write_bytes(server.ask("GET", "/v1/events/export"))
        assert pq.read_table(export).num_rows == len(events) + 6
        assert main(["update", str(run), "--data", str(export)]) == 0, capfd.readouterr().err
        assert f"{len(events) + 1:,} new events" in capfd.readouterr().out
        reloaded = server.ask("POST", "/admin/reload", {"bundle": str(run / "bundle")})
        assert reloaded["previous_version"] == first != reloaded["version"]
        after = server.hits(targets)
        assert after > 1.05 * before, (before, after)
        last = {"event_id": "last", "user": "C0001", "item_id": shown[0]}
        assert server.ask("POST", "/v1/events", {"events": [last]})["accepted"] == 1, "the store has moved with the run"
        assert main(["update", str(run), "--events", f"sqlite:{run / 'bundle.events.sqlite'}"]) in (0, 2), "while it is served"
        assert (
            server.ask("POST", "/admin/rollback")["version"] == first
            and server.ask("POST", "/v1/recommend", {"k": 1})["version"] == first
        )
    store = open_store(f"sqlite:{run / 'bundle.events.sqlite'}")
    kept = [event for page in every_event(store) for event in page]
    store.close()
    assert len(kept) == len(events) + 7 and kept[-1].event_id == "last"
    assert "traceback" not in log.read_text().lower()
