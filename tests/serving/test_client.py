"""Test the Python client against a running server, and against one that loses responses."""

from __future__ import annotations

import inspect
import io
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast, get_type_hints

import pyarrow.parquet as pq
import pytest

from twotower import client_types
from twotower.client import Client
from twotower.errors import ConfigError, ResponseError, UnreachableError
from twotower.serving.app import api_document

from .faulty_proxy import CUT, SILENT, Fault, FaultyProxy, faulty_proxy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(bundle: Path, load: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("client")
    with load.Server(bundle, f"sqlite:{folder / 'events.sqlite'}", folder / "log", "--rate", "0") as running:
        yield running


@pytest.fixture
def client(server: Any, load: Any) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{server.port}/", key=load.KEY) as client:
        yield client


@pytest.fixture
def opened() -> Iterator[Callable[..., Client]]:
    """Makes clients that are closed after the test."""
    with ExitStack() as stack:
        yield lambda *given, **settings: stack.enter_context(Client(*given, **settings))


@pytest.fixture
def proxy(server: Any) -> Iterator[FaultyProxy]:
    with faulty_proxy(server.port) as running:
        yield running


def test_the_client_has_every_operation() -> None:
    operations = {one["operationId"] for methods in api_document()["paths"].values() for one in methods.values()}
    methods = {name for name, _ in inspect.getmembers(Client, inspect.isfunction)}
    assert {name.removesuffix("_by_query") for name in operations} <= methods


def test_every_operation_gets_its_answer(client: Client) -> None:
    user = client.get_random_user()["user"]
    answer = client.recommend(user=user, k=3, explain=True)
    assert len(answer["items"]) == 3 and answer["source"] == "model" and answer["items"][0]["reasons"]
    first = answer["items"][0]["item_id"]
    good, bad = cast(Any, client).recommend_batch([{"user": user, "k": 3}, {"filter": "no such column == 1"}])["answers"]
    assert [one["item_id"] for one in good["items"]] == [one["item_id"] for one in answer["items"]]
    assert bad["error"]["code"] == "invalid"
    assert len(client.similar_items(first, k=4)["items"]) == 4
    assert client.similar_items(first, k=4, filter="within(0.001)")["items"] == []
    found = client.search_items(answer["items"][0]["name"], limit=5)
    assert first in {one["item_id"] for one in found["items"]}
    assert [one["item_id"] for one in client.get_items([first, "no such item"])] == [first]
    (full,) = client.get_items([first], columns=True)
    assert full == client.get_item(first)
    described = client.get_columns()
    assert {one["name"] for one in described["columns"]} >= {"categories", "price"} and described["examples"]
    assert client.recommend(filter=described["examples"][0])["items"]
    cities = client.search_values("city", limit=2)
    assert cities[0] in client.search_values("city", str(cities[0]["value"]).upper())
    assert client.get_item(first)["columns"] and client.get_history(user)["events"]
    assert user in {one["user"] for one in client.search_users(str(user))}
    assert client.get_about()["items"] > 0 and client.check_live()["status"] == "live"
    assert client.check_ready()["events"] == "ok" and "twotower_requests_total" in client.get_metrics()
    assert client.change_items([{"item_id": "new", "name": "A new item"}])["accepted"] == 1
    assert client.refresh_items()["items_changed"] == 1 and client.get_item("new")["name"] == "A new item"
    assert client.remove_item("new")["items_changed"] == 2
    assert client.reload_bundle()["version"] == client.get_about()["version"]


def test_what_is_known_of_a_user_is_exported_and_forgotten(client: Client) -> None:
    user, item = "to be forgotten / é", client.search_items(limit=1)["items"][0]["item_id"]
    before = datetime.now(UTC) - timedelta(days=1)
    client.add_event(user, item, event_type="tip")
    request_id = client.recommend(user=user, k=2)["request_id"]
    events = read_parquet(client.export_events_file())
    assert (user, item) in {(one["user_id"], one["item_id"]) for one in events}
    recent = read_parquet(client.export_events_file(since=before.isoformat()))
    assert (user, item) in {(one["user_id"], one["item_id"]) for one in recent}
    with pytest.raises(ResponseError, match="not between 1970 and now"):
        client.export_events_file(since="2099-01-01T00:00:00Z")
    deadline = time.monotonic() + 30
    while request_id not in {one["request_id"] for one in read_parquet(client.export_answers_file())}:  # logged in the background
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert client.forget_user(user)["events"] == 1
    left = [*read_parquet(client.export_events_file()), *read_parquet(client.export_answers_file())]
    assert user not in str(left) and request_id not in str(left)
    with pytest.raises(ResponseError, match="Unknown user"):
        client.get_history(user)


def test_two_versions_are_named_promoted_and_taken_back(bundles: tuple[Path, Path], load: Any, tmp_path: Path) -> None:
    one, other = (Path(shutil.copytree(bundle, tmp_path / bundle.name)) for bundle in bundles)
    options = ("--rate", "0", "--split", "80,20", str(other))
    with (
        load.Server(one, f"sqlite:{tmp_path / 'events.sqlite'}", tmp_path / "log", *options) as running,
        Client(f"http://127.0.0.1:{running.port}", key=load.KEY) as client,
    ):
        first, second = client.get_versions()["versions"]
        assert (first["share"], second["share"]) == (0.8, 0.2)
        assert client.promote_version()["version"] == second["version"]
        assert [version["version"] for version in client.get_versions()["versions"]] == [second["version"]]
        assert client.roll_back()["version"] == first["version"] == client.recommend(user="u")["version"]


def read_parquet(content: bytes) -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], pq.read_table(io.BytesIO(content)).to_pylist())


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a b?c#d&e=1", "é‿", "%2e%2e"])
def test_any_id_reaches_the_server(client: Client, name: str) -> None:
    with pytest.raises(ResponseError, match="Unknown item") as error:
        client.get_item(name)
    assert error.value.status == 404 and repr(name) in str(error.value)
    with pytest.raises(ResponseError, match="Unknown user"):
        client.get_history(name)
    client.add_event(name, client.search_items(limit=1)["items"][0]["item_id"])
    assert client.get_history(name)["user"] == name


def test_an_error_says_what_the_server_says(client: Client, opened: Callable[..., Client]) -> None:
    with pytest.raises(ResponseError) as error:
        client.recommend(filter={"and": [{"price": {"mx": 2}}]})
    assert (error.value.status, error.value.code, error.value.location) == (422, "invalid", "filter.and[0].price.mx")
    assert error.value.request_id and "Did you mean 'max'?" in str(error.value)
    keyless = opened(client._transport.url)
    with pytest.raises(ResponseError) as error:
        keyless.add_event("u", "i")
    assert error.value.status == 401 and error.value.code == "unauthorized"


def test_a_cursor_goes_on_where_a_list_ended(client: Client) -> None:
    item = client.search_items(limit=1)["items"][0]["item_id"]
    parts: list[Callable[[int, str | None], Any]] = [
        lambda count, cursor: client.recommend(k=count, cursor=cursor),
        lambda count, cursor: client.similar_items(item, k=count, cursor=cursor),
        lambda count, cursor: client.search_items(limit=count, cursor=cursor),
    ]
    for part in parts:
        first = part(3, None)
        both = [*first["items"], *part(3, first["next"])["items"]]
        assert [one["item_id"] for one in both] == [one["item_id"] for one in part(6, None)["items"]]


def test_an_event_whose_acknowledgement_is_lost_counts_once(proxy: FaultyProxy, load: Any, opened: Callable[..., Client]) -> None:
    client = opened(proxy.url, key=load.KEY)
    item = client.search_items(limit=1)["items"][0]["item_id"]
    proxy.faults[:] = [CUT, CUT]
    assert client.add_event("a lost one", item) == {"accepted": 0, "repeated": 1}
    assert len(client.get_history("a lost one")["events"]) == 1
    bodies = {body for _, path, _, body in proxy.seen if path == "/v1/events"}
    assert len(bodies) == 1  # the same id at every attempt


def test_many_events_go_in_parts_and_again_without_harm(client: Client) -> None:
    item = client.search_items(limit=1)["items"][0]["item_id"]
    events: list[client_types.EventIn] = [{"event_id": f"e{n}", "user": "busy", "item_id": item, "time_s": n} for n in range(1001)]
    assert client.add_events(iter(events)) == {"accepted": 1001, "repeated": 0}
    assert client.add_events(events) == {"accepted": 0, "repeated": 1001}
    assert client.add_events([]) == {"accepted": 0, "repeated": 0}


@pytest.mark.parametrize("fault", [(503, "1"), (429, "1"), (502, None), (504, None), CUT, SILENT], ids=str)
def test_what_passes_is_tried_again(proxy: FaultyProxy, fault: Fault, opened: Callable[..., Client]) -> None:
    client = opened(proxy.url, timeout_s=1)
    proxy.faults[:] = [fault]
    assert client.recommend(k=2)["items"]
    assert len(proxy.seen) == 2
    if isinstance(fault, tuple) and fault[1]:
        assert 1.0 <= proxy.waits_s[0] < 2.5


def test_waits_grow_differ_and_end(proxy: FaultyProxy, opened: Callable[..., Client]) -> None:
    proxy.faults[:] = [(503, None)] * 9
    with pytest.raises(ResponseError, match="a proxy's page") as error:
        opened(proxy.url, retries=3).recommend()
    assert error.value.status == 503 and len(proxy.seen) == 4
    assert proxy.waits_s[1] >= 0.2 and proxy.waits_s[2] >= 0.4
    proxy.seen.clear()
    with pytest.raises(ResponseError):
        opened(proxy.url, retries=2, max_wait_s=0.01).recommend()
    assert sum(proxy.waits_s) < 1
    proxy.faults[:] = [(503, "3600")]
    proxy.seen.clear()
    assert opened(proxy.url, max_wait_s=0.2).recommend()["items"] and proxy.waits_s[0] < 2  # no client waits for an hour


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422, 500])
def test_what_does_not_pass_is_not_tried_again(proxy: FaultyProxy, status: int, opened: Callable[..., Client]) -> None:
    proxy.faults[:] = [(status, "1")]
    with pytest.raises(ResponseError) as error:
        opened(proxy.url).recommend()
    assert error.value.status == status and len(proxy.seen) == 1


def test_a_reload_is_tried_once(proxy: FaultyProxy, load: Any, opened: Callable[..., Client]) -> None:
    proxy.faults[:] = [(503, "1")]
    with pytest.raises(ResponseError):
        opened(proxy.url, key=load.KEY).reload_bundle()
    assert len(proxy.seen) == 1


def test_a_server_that_is_not_there(load: Any, opened: Callable[..., Client]) -> None:
    client = opened(f"http://127.0.0.1:{load.free_port()}", retries=1)
    with pytest.raises(UnreachableError, match="Check the address") as error:
        client.recommend()
    assert "\n" not in str(error.value)
    for wrong in ("localhost:8000", "ftp://x", "http://", ""):
        with pytest.raises(ConfigError, match="not the address"):
            opened(wrong)


def test_a_key_is_read_sent_and_never_shown(
    proxy: FaultyProxy, load: Any, monkeypatch: pytest.MonkeyPatch, opened: Callable[..., Client]
) -> None:
    monkeypatch.setenv("TWOTOWER_API_KEY", "wrong-but-long-enough")
    client = opened(proxy.url)
    with pytest.raises(ResponseError) as error:
        client.refresh_items()
    assert error.value.status in (401, 403)
    client.key = load.KEY
    assert client.refresh_items()["version"]
    assert [headers["authorization"] for _, _, headers, _ in proxy.seen] == ["Bearer wrong-but-long-enough", f"Bearer {load.KEY}"]
    assert load.KEY not in repr(client) + str(vars(error.value)) + str(error.value)


def test_the_examples_of_the_page_run(client: Client, server: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_API_KEY", load.KEY)
    first, second = (str(one["item_id"]) for one in client.search_items(limit=2)["items"])
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "clients.md").read_text(), flags=re.S | re.M)
    known: dict[str, Any] = {}
    for block in blocks:
        for there, here in (("Srn23y90U5Q4jCisDGcPuT", first), ("b_230", first), ("b_5", second), (":8000", f":{server.port}")):
            block = block.replace(there, here)
        exec(block.replace("Client() as", f'Client("http://127.0.0.1:{server.port}") as'), known)
    assert known["answer"]["items"] and len(known["ids"](client, "u_17")) == 20
    assert len(client.get_history("u_18")["events"]) == 1


def test_a_body_has_the_names_of_the_request() -> None:
    assert (
        get_type_hints(client_types.RecommendIn).keys()
        == api_document()["components"]["schemas"]["RecommendIn"]["properties"].keys()
    )


def test_the_client_imports_nothing_heavy() -> None:
    program = "import sys, twotower.client; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"torch", "numpy", "pyarrow", "pydantic", "fastapi", "opentelemetry"} and "urllib3" in loaded
