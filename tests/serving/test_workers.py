"""Test a server of several processes: one port, one version, one store of events, one sum of metrics."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from twotower.errors import DataError
from twotower.serving.access import KEY_VARIABLE
from twotower.serving.event_journal import Journal
from twotower.serving.event_store import lock_store, open_store
from twotower.serving.event_types import Event
from twotower.serving.metrics_sum import MetricsFolder
from twotower.serving.shared_counts import SharedCounts
from twotower.serving.sqlite_store import SQLiteStore
from twotower.utils.console import log

KEY = "a-key-of-this-test"
MAX_PRIVATE_MB = 60


def test_an_event_that_one_process_acknowledges_is_seen_by_the_others_at_once(tmp_path: Path) -> None:
    url, counts = f"sqlite:{tmp_path / 'e'}", SharedCounts(3)
    journals = [Journal(open_store(url, shared=True), news=counts.news(seat)) for seat in range(3)]
    for number in range(30):
        journals[number % 3].append([[Event(str(number), "u", f"i{number}", number)]])
        assert [len(one.of("u")) for one in journals] == [number + 1] * 3
    assert journals[1].users() == ["u"]
    assert journals[0].append([[Event("7", "u", "i7", 7)]]) == [0], "sent again to another process"
    for one in journals:
        one.close()


def test_a_file_of_several_processes_is_used_by_one_server(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path / 'e'}"
    release = lock_store(url)
    with pytest.raises(DataError, match="used by another server"):
        lock_store(url)
    release()
    again, shared = lock_store(url), open_store(url, shared=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twotower.serving.sqlite_store._LOCK_WAIT_S", 0.1)
        with pytest.raises(DataError, match="used by another server"):
            SQLiteStore(tmp_path / "e")
    shared.close()
    again()
    assert (tmp_path / "e").stat().st_mode & 0o777 == 0o600


def test_the_counts_of_processes_are_added_and_never_fall(tmp_path: Path) -> None:
    folder = MetricsFolder(tmp_path)
    for number in (1, 2):
        registry = CollectorRegistry()
        Counter("twotower_requests", "", ["route"], registry=registry).labels('/a"b').inc(number)
        Gauge("twotower_waiting", "", registry=registry).set(number)
        Gauge("twotower_event_store_up", "", registry=registry).set(number - 1)
        Gauge("twotower_bundle", "", ["version"], registry=registry).labels("v").set(1)
        folder.write(number, registry)

    def value(name: str) -> float:
        return float(re.findall(rf"^{name}\S* (\S+)$", folder.text(2).decode(), re.M)[0])

    assert [value(name) for name in ("twotower_requests_total", "twotower_waiting", "twotower_bundle")] == [3, 3, 1]
    assert value("twotower_event_store_up") == 0 and value("twotower_workers") == 2
    folder.forget(2)
    assert value("twotower_requests_total") == 3 and value("twotower_waiting") == 1 and value("twotower_event_store_up") == 0


class Client:
    """One connection that is kept."""

    def __init__(self, port: int) -> None:
        self.wire = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {KEY}", "content-type": "application/json"}
        self.wire.request(method, path, None if body is None else json.dumps(body), headers)
        answer = self.wire.getresponse()
        read = answer.read()
        assert answer.getheader("connection") != "close"
        return answer.status, json.loads(read) if answer.getheader("content-type") == "application/json" else read.decode()


class Server:
    """A server of two workers."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.clients: list[Client] = []

    def connect(self, count: int) -> list[Client]:
        self.clients += [Client(self.port) for _ in range(count)]
        return self.clients[-count:]

    def once(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        client = Client(self.port)
        with closing(client.wire):
            return client.ask(method, path, body)

    def workers(self) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found]

    def until(self, right: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 150
        while not right():
            assert time.monotonic() < end and self.process.poll() is None, what
            time.sleep(0.05)

    def ready(self, count: int = 2) -> bool:
        with suppress(OSError, AssertionError, http.client.HTTPException):
            status, state = self.once("GET", "/health/ready")
            return bool(status == 200 and state["workers"] == count)
        return False


@pytest.fixture
def starting(load: Any, bundle: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Yield a server of two workers that has just been started; its parameter has more options."""
    port, log = load.free_port(), tmp_path / "log"
    options = {"port": port, "workers": 2, "events": f"sqlite:{tmp_path / 'e'}", "rate": 0, "refresh-s": 0}
    options |= getattr(request, "param", {})
    shutil.copytree(bundle, tmp_path / "bundle")  # a test may change it
    command = [sys.executable, "-m", "twotower", "serve", str(tmp_path / "bundle")]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, KEY_VARIABLE: KEY})
    server = Server(process, port, log)
    try:
        yield server
    finally:
        for client in server.clients:
            client.wire.close()
        process.kill()
        process.wait()


@pytest.fixture
def server(starting: Server) -> Server:
    """Return the server when both workers answer."""
    starting.until(starting.ready, "the server did not start")
    return starting


@pytest.mark.slow
def test_lists_go_on_while_the_event_store_cannot_be_opened(server: Server, tmp_path: Path) -> None:
    (client,) = server.connect(1)
    (item,) = client.ask("GET", "/v1/items?limit=1")[1]["items"]
    event = {"events": [{"event_id": "1", "user": "u", "item_id": item["item_id"]}]}
    assert client.ask("POST", "/v1/events", event)[0] == 200
    (tmp_path / "e").rename(tmp_path / "away")
    (tmp_path / "e").mkdir()
    for pid in (before := server.workers()):
        os.kill(pid, signal.SIGKILL)
    server.until(lambda: server.ready() and not set(before) & set(server.workers()), "no other workers start")
    assert server.once("POST", "/v1/recommend", {"user": "u", "k": 3})[0] == 200
    for path, body in (("/v1/events", event), ("/v1/items", {"remove": [item["item_id"]]})):
        status, answer = server.once("POST", path, body)
        assert status == 503 and "The event store cannot be opened; the log" in answer["error"]["message"]
    assert "cannot be opened" in server.once("GET", "/health/ready")[1]["events"]
    (tmp_path / "e").rmdir()
    (tmp_path / "away").rename(tmp_path / "e")
    server.until(lambda: server.once("POST", "/v1/items", {"remove": [item["item_id"]]})[0] == 200, "the store stays closed")
    assert "Is a directory" in server.log.read_text() and server.log.read_text().count("another one starts") <= 4


@pytest.mark.slow
def test_updates_reach_all_workers_and_break_no_connection(server: Server, bundles: tuple[Path, Path]) -> None:
    clients = server.connect(12)
    (item,) = clients[0].ask("GET", "/v1/items?limit=1")[1]["items"]
    for number in range(5):
        event = {"event_id": str(number), "user": f"u{number}", "item_id": item["item_id"]}
        assert clients[number].ask("POST", "/v1/events", {"events": [event]}) == (200, {"accepted": 1, "repeated": 0})
        assert {len(one.ask("GET", f"/v1/history?user=u{number}")[1]["events"]) for one in clients} == {1}
    status, refreshed = clients[3].ask("POST", "/admin/refresh")
    assert status == 200 and refreshed["events"]["counted"] == 5
    before = set(server.workers())
    for one in clients:
        _, answer = one.ask("POST", "/v1/recommend", {"user": "u1", "k": 1})
        assert (answer["version"], answer["as_of"]) == (refreshed["version"], refreshed["as_of"])
    changes = {"items": [{"item_id": "new", "name": "A new one"}], "remove": [item["item_id"]]}
    assert clients[6].ask("POST", "/v1/items", changes) == (200, {"accepted": 2, "items_changed": 1})
    assert clients[7].ask("POST", "/admin/refresh")[1]["items_changed"] == 1
    for one in clients:
        assert one.ask("GET", "/v1/items/new")[1]["name"] == "A new one"
        _, answer = one.ask("POST", "/v1/recommend", {"user": "u1", "k": 100, "exclude_seen": False})
        assert item["item_id"] not in {listed["item_id"] for listed in answer["items"]}
    status, reloaded = clients[4].ask("POST", "/admin/reload", {"bundle": str(bundles[1])})
    assert status == 200 and reloaded["previous_version"] == refreshed["version"] != reloaded["version"]
    assert {one.ask("POST", "/v1/recommend", {"k": 1})[1]["version"] for one in clients} == {reloaded["version"]}
    assert {one.ask("GET", "/health/ready")[1]["items_changed"] for one in clients} == {1}, "changes are on top of any bundle"
    server.until(lambda: len(server.workers()) == 2 and not before & set(server.workers()), "the old workers do not end")
    status, refusal = clients[5].ask("POST", "/admin/reload", {"bundle": "/nowhere"})
    assert status == 422 and "/nowhere" in refusal["error"]["message"]
    assert "reload refused" in server.log.read_text()
    assert {one.ask("POST", "/v1/recommend", {"k": 1})[1]["version"] for one in clients} == {reloaded["version"]}


@pytest.mark.slow
def test_a_dead_worker_is_replaced_and_no_count_falls(server: Server) -> None:
    def counted() -> float:
        text = server.once("GET", "/metrics")[1]
        assert "twotower_workers 2.0" in text
        return sum(map(float, re.findall(r'^twotower_requests_total\{route="/v1/recommend",.*\} (\S+)$', text, re.M)))

    for one in server.connect(10):
        assert one.ask("POST", "/v1/recommend", {"k": 1})[0] == 200
    assert counted() == 10
    time.sleep(1.5)  # what a killed worker counts in its last second is lost
    for victim in server.workers():
        os.kill(victim, signal.SIGKILL)
        server.until(lambda victim=victim: victim not in server.workers() and server.ready(), "no new worker")  # type: ignore[misc]
    assert counted() == 10
    assert "killed by SIGKILL; another one starts" in server.log.read_text()
    assert server.once("POST", "/v1/recommend", {"k": 1})[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("starting", [{"rate": 1}], indirect=True)
def test_workers_share_the_rate_of_a_client(server: Server) -> None:
    batch = {"requests": [{"k": 1}] * 100}  # uses up the rate of the next minute and a half
    assert server.once("POST", "/v1/recommend:batch", batch)[0] == 200
    for client in server.connect(6):
        assert client.ask("POST", "/v1/recommend", {"k": 1})[0] == 429


@pytest.mark.slow
def test_stopping_drains_all_workers(server: Server) -> None:
    for pid in server.workers():  # all of them share the memory of one bundle
        private = sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)))
        assert private < MAX_PRIVATE_MB * 1024
    clients = server.connect(6)
    for one in clients:
        one.wire.putrequest("POST", "/v1/recommend")
        one.wire.putheader("content-length", "7")
        one.wire.putheader("authorization", f"Bearer {KEY}")
        one.wire.endheaders()
    server.process.terminate()
    server.until(lambda: not server.ready(), "readiness stays up") if server.process.poll() is None else None
    for one in clients:
        one.wire.send(b'{"k":1}')
        answer = one.wire.getresponse()
        assert answer.status == 200 and answer.getheader("connection") == "close" and answer.read()
    assert server.process.wait(12) == 0 and not server.workers()
    assert "traceback" not in server.log.read_text().lower()


@pytest.mark.slow
def test_a_worker_that_answers_before_the_others_drains_too(starting: Server) -> None:
    starting.until(lambda: len(starting.workers()) == 2, "no workers")
    held = starting.workers()[1]
    os.kill(held, signal.SIGSTOP)
    starting.until(lambda: starting.ready(1), "the first worker does not answer")
    wire = starting.connect(1)[0].wire
    wire.putrequest("POST", "/v1/recommend")
    wire.putheader("content-length", "7")
    wire.putheader("authorization", f"Bearer {KEY}")
    wire.endheaders()
    starting.process.terminate()
    os.kill(held, signal.SIGCONT)
    wire.send(b'{"k":1}')
    assert wire.getresponse().status == 200
    assert starting.process.wait(12) == 0 and not starting.workers()


@pytest.mark.slow
def test_workers_end_when_their_supervisor_is_killed(server: Server) -> None:
    workers = server.workers()
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{one}").exists() for one in workers):
        assert time.monotonic() < end, "a worker goes on alone"
        time.sleep(0.1)


@pytest.mark.slow
def test_workers_end_when_their_supervisor_is_killed_with_messages_unread(server: Server) -> None:
    workers, (client,) = server.workers(), server.connect(1)
    server.process.send_signal(signal.SIGSTOP)
    client.wire.request("POST", "/admin/refresh", None, {"Authorization": f"Bearer {KEY}"})
    time.sleep(0.5)
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{one}").exists() for one in workers):
        assert time.monotonic() < end, "a worker goes on alone"
        time.sleep(0.1)
    with suppress(OSError, http.client.HTTPException):  # closed, if the answer was too late
        assert client.wire.getresponse().status == 503


@pytest.mark.slow
def test_what_is_asked_for_during_a_switch_is_done_afterwards(server: Server) -> None:
    users = [str(one["user"]) for one in server.once("GET", "/v1/users?limit=4")[1]["users"]]
    asked = [("POST", "/admin/reload"), *(("DELETE", f"/v1/users?user={user}") for user in users), ("POST", "/admin/refresh")] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        statuses = list(pool.map(lambda one: server.once(*one)[0], asked))
    assert set(statuses) == {200}
    assert {server.once("GET", f"/v1/history?user={user}")[0] for user in users} == {404}
    server.until(lambda: len(server.workers()) == 2, "workers stay behind")


def in_a_refresh(server: Server) -> set[int]:
    """Send an event, wait until a refresh starts workers, and return those of before."""
    (item,) = server.once("GET", "/v1/items?limit=1")[1]["items"]
    before = set(server.workers())
    assert server.once("POST", "/v1/events", {"events": [{"event_id": "1", "user": "u", "item_id": item["item_id"]}]})[0] == 200
    server.until(lambda: bool(set(server.workers()) - before), "no refresh")
    return before


@pytest.mark.slow
@pytest.mark.parametrize("starting", [{"refresh-s": 1}], indirect=True)
def test_a_worker_that_dies_in_a_background_refresh_changes_nothing(server: Server) -> None:
    before = in_a_refresh(server)
    for new in set(server.workers()) - before:
        os.kill(new, signal.SIGKILL)
    server.until(lambda: "its workers did not start" in server.log.read_text(), "the failure is not logged")
    assert before <= set(server.workers()) and server.ready()
    server.until(lambda: not before & set(server.workers()), "the refresh is not tried again")


@pytest.mark.slow
@pytest.mark.parametrize("starting", [{"refresh-s": 1}], indirect=True)
def test_stopping_in_a_background_refresh_ends_as_at_any_time(server: Server) -> None:
    in_a_refresh(server)
    server.process.terminate()
    assert server.process.wait(20) == 0 and not server.workers()
    text = server.log.read_text()
    assert "Traceback" not in text and '"error"' not in text


def test_metrics_that_cannot_be_written_are_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = MetricsFolder(tmp_path / "deleted")
    monkeypatch.setattr(log, "propagate", True)
    for _ in range(3):
        folder.write(1, CollectorRegistry())
        folder.forget(1)
    records = {id(one) for one in caplog.records if "metrics cannot be written" in one.getMessage()}
    assert len(records) == 1


@pytest.mark.slow
def test_lists_outcomes_and_forgotten_users_are_those_of_all_workers(server: Server) -> None:
    clients = server.connect(8)
    user = str(clients[0].ask("GET", "/v1/users?limit=1")[1]["users"][0]["user"])
    for number, one in enumerate(clients):
        _, answer = one.ask("POST", "/v1/recommend", {"user": user, "k": 2})
        shown = {"request_id": answer["request_id"], "shown": [item["item_id"] for item in answer["items"]]}
        assert clients[number - 1].ask("POST", "/v1/events", {"events": [shown]}) == (200, {"accepted": 2, "repeated": 0})
    versions = [one.ask("GET", "/admin/versions")[1] for one in clients]
    assert all(one == versions[0] for one in versions) and versions[0]["versions"][0]["outcomes"]["lists"] == len(clients)
    assert clients[2].ask("DELETE", f"/v1/users?user={user}") == (
        200,
        {"user": user, "events": 2 * len(clients), "in_bundle": False},
    )
    for one in server.connect(8) + clients:
        assert one.ask("GET", f"/v1/history?user={user}")[0] == 404
        assert one.ask("POST", "/v1/recommend", {"user": user, "k": 1})[1]["source"] == "recent"
    assert server.once("POST", "/admin/rollback")[0] == 422


def test_workers_divide_the_cores() -> None:
    program = """if True:
        import asyncio, os, time, torch
        from threadpoolctl import threadpool_info
        from twotower.serving.batching import Batcher
        from twotower.serving.server import _divide_cores

        async def threads_of_answers():
            batcher = Batcher("answers", max_waiting=1, max_batch=1)
            number, = await asyncio.gather(*batcher.submit(lambda _: [torch.get_num_threads()], [0], time.perf_counter() + 60))
            batcher.close()
            return number

        _divide_cores(os.cpu_count())
        print(asyncio.run(threads_of_answers()), *{one["num_threads"] for one in threadpool_info()})
    """
    environment = {name: value for name, value in os.environ.items() if "THREADS" not in name}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60, env=environment)
    assert done.stdout.split() == ["1", "1"]
