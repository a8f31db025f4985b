"""Fixtures: a small bundle, servers in this process (without sockets) and servers as separate processes."""

from __future__ import annotations

import importlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from twotower.pipeline.stages import train_stage
from twotower.serving.access import KEY_VARIABLE, Access
from twotower.serving.app import create_app
from twotower.serving.server import SWITCH_S
from twotower.serving.service import REFRESH_S, Service
from twotower.serving.telemetry import Telemetry
from twotower.serving.updater import Trial
from twotower.utils.config import parse_config
from twotower.utils.config_serving import Limits

from ..conftest import TOWER

ROOT = Path(__file__).parents[2]
KEY = "a-key-for-these-tests"
PATIENT = Limits(rate=0, queue_timeout_s=60)  # a test of another thing than the deadline passes on a slow machine too


@pytest.fixture(scope="session")
def bundles(town: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two bundles of the town, from models trained for one step with different seeds. Treat them as read-only."""
    out = tmp_path_factory.mktemp("bundles")
    for seed in (1, 2):
        settings = {"model": {"user_tower": TOWER, "item_tower": TOWER}, "training": {"max_steps": 1}, "seed": seed}
        train_stage(parse_config(settings), town.folder, out / f"run{seed}", bundle=out / f"bundle{seed}")
    return out / "bundle1", out / "bundle2"


@pytest.fixture(scope="session")
def bundle(bundles: tuple[Path, Path]) -> Path:
    """Return the first bundle."""
    return bundles[0]


@pytest.fixture(scope="session")
def keyed() -> dict[str, str]:
    """Return headers with the API key."""
    return {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def connect(bundle: Path, tmp_path: Path) -> Callable[..., AbstractContextManager[TestClient]]:
    """Return a function that starts a server in this process and returns a client. The server ends with the block."""

    before = sys.getswitchinterval()

    @contextmanager
    def start(
        *,
        folder: Path = bundle,
        events: str | None = None,
        key: str | None = KEY,
        limits: Limits | None = None,
        public: bool = True,
        refresh_s: float = REFRESH_S,
        trial: Trial | None = None,
        telemetry: Telemetry | None = None,
        trusted_key: Path | None = None,
    ) -> Iterator[TestClient]:
        store = events or f"sqlite:{tmp_path / 'events.sqlite'}"
        service = Service(folder, store, limits or PATIENT, trusted_key, refresh_s=refresh_s, trial=trial)
        service.telemetry = telemetry
        sys.setswitchinterval(SWITCH_S)
        try:
            access = Access(variables={} if key is None else {KEY_VARIABLE: key}, public=public)
            with TestClient(create_app(service, access), raise_server_exceptions=False) as client:
                yield client
        finally:
            sys.setswitchinterval(before)

    return start


@pytest.fixture
def client(connect: Callable[..., AbstractContextManager[TestClient]]) -> Iterator[TestClient]:
    """Return a client of a server without accepted events."""
    with connect() as client:
        yield client


@pytest.fixture(scope="session")
def strength() -> Iterator[Any]:
    """benchmarks/serving_strength.py, whose ways to try a server are used here in small."""
    names = ("common", "serving_load", "serving_strength")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("serving_strength")
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def load(strength: Any) -> Any:
    """benchmarks/serving_load.py."""
    return sys.modules[strength.Server.__module__]


@contextmanager
def running_redis(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield address and process id of a Redis server that syncs before it responds."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "appendonly": "yes", "appendfsync": "always", "save": ""}
    command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < end, "Redis did not start"
                time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}", server.pid
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory, lacking: Any) -> Iterator[str]:
    """Yield the address of a Redis server that syncs before it responds."""
    if shutil.which("redis-server") is None:
        lacking("needs redis-server")
    with running_redis(tmp_path_factory.mktemp("redis")) as (url, _):
        yield url


@pytest.fixture
def redis_server(tmp_path: Path, lacking: Any) -> Iterator[tuple[str, int]]:
    """Yield address and process id of a Redis server of this test alone."""
    if shutil.which("redis-server") is None:
        lacking("needs redis-server")
    with running_redis(tmp_path) as found:
        yield found


def some_items(client: TestClient, n: int) -> list[str]:
    return [item["item_id"] for item in client.get("/v1/items", params={"limit": n}).json()["items"]]


def ranked(client: TestClient, **body: Any) -> list[str]:
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 200, answer.text
    return [place["item_id"] for place in answer.json()["items"]]


def send(client: TestClient, headers: dict[str, str], *events: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/v1/events", json={"events": events}, headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found
