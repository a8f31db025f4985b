"""Test how a server process starts and ends: what it tries first, its exit codes, and what happens to requests in progress."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from twotower.cli import main
from twotower.serving.access import KEY_VARIABLE

pytestmark = pytest.mark.alone


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line of an invalid start."""
    assert main(["serve", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("twotower: error: ") and not output.out
    return line


@pytest.fixture(autouse=True)
def handlers() -> Any:
    """Put the signal handlers back that `serve` sets."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_without_a_bundle_gets_no_file_of_events(tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    assert "is not a bundle" in refused(capsys, tmp_path / "nothing", "--port", 0, "--public", "--workers", workers)
    assert not list(tmp_path.iterdir())


def test_what_can_fail_at_once_fails_before_the_bundle_is_loaded(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from twotower.serving.model_version import Engine

    def loaded(*_: Any) -> Any:
        raise AssertionError("the bundle was loaded")

    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr(Engine, "load", loaded)
    store = ("--events", f"sqlite:{tmp_path / 'e'}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: Address already in use" in refused(capsys, bundle, "--port", port, *store)
    assert "Cannot listen on 192.0.2.1" in refused(capsys, bundle, "--host", "192.0.2.1", "--public", *store)
    (tmp_path / "keys").write_bytes(b"\xff\x00key")
    assert "is not a text file" in refused(capsys, bundle, "--port", 0, "--api-keys", tmp_path / "keys", *store)
    assert "needs both" in refused(capsys, bundle, "--port", 0, "--tls-cert", tmp_path / "c", *store)
    assert "as PEM files" in refused(capsys, bundle, "--port", 0, "--tls-cert", tmp_path / "c", "--tls-key", tmp_path / "c", *store)
    assert "Choose a writable path" in refused(capsys, bundle, "--port", 0, "--events", f"sqlite:{tmp_path / 'no' / 'e'}")
    assert "is not the address of a proxy" in refused(capsys, bundle, "--port", 0, "--trusted-proxy", "everyone", *store)
    (tmp_path / "pub").write_text("no key")
    assert "has no public Ed25519 key" in refused(capsys, bundle, "--port", 0, "--trusted-key", tmp_path / "pub", *store)
    line = refused(capsys, bundle, "--host", "0.0.0.0", "--port", 0, *store)
    assert "there is no API key" in line and "--public" in line


def test_a_password_on_the_command_line_is_refused_and_never_printed(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refused(capsys, bundle, "--port", 0, "--events", "redis://:secret-word@127.0.0.1:1")
    assert "TWOTOWER_SERVING_EVENTS" in line and "secret-word" not in line
    for wrong in ("redis://:secret-word@127.0.0.1:1", "rediss//:secret-word@127.0.0.1", "redis://:secret-word"):
        monkeypatch.setenv("TWOTOWER_SERVING_EVENTS", wrong)
        assert "secret-word" not in refused(capsys, bundle, "--port", 0)


def start(bundle: Path, tmp_path: Path, port: int, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "twotower", "serve", str(bundle), "--port", str(port), "--events", f"sqlite:{tmp_path / 'e'}"]
    with (tmp_path / "log").open("ab") as log:
        return subprocess.Popen([*command, *options], stderr=log, env={**os.environ, KEY_VARIABLE: "a-key-of-this-test"})


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def answer(port: int, head: bytes, body: bytes = b"", then: Sequence[bytes] = ()) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 15) as client:
        client.sendall(head + b"connection: close\r\n\r\n" + body)
        for part in then:
            client.sendall(part)
        parts = []
        while part := client.recv(65_536):
            parts.append(part)
    return b"".join(parts)


READY = b"GET /health/ready HTTP/1.1\r\nhost: localhost\r\n"


def wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            if b" 200 OK" in answer(port, READY):
                return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("the server did not start")


@pytest.mark.slow
def test_stopping_lowers_readiness_first_and_ends_in_time_without_a_traceback(load: Any, bundle: Path, tmp_path: Path) -> None:
    port = load.free_port()
    process = start(bundle, tmp_path, port, "--public")
    wait_until_ready(port, process)
    hanging = socket.create_connection(("127.0.0.1", port))
    hanging.sendall(b"POST /v1/recommend HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
    began = time.monotonic()
    process.terminate()
    end = time.monotonic() + 5
    while b" 200 OK" in (state := answer(port, READY)):
        assert time.monotonic() < end
    assert b" 503 " in state and b"the server is stopping" in state
    asked = answer(port, b"POST /v1/recommend HTTP/1.1\r\nhost: localhost\r\ncontent-length: 7\r\n", b'{"k":1}')
    assert b" 200 OK" in asked, "late requests are answered"
    assert process.wait(30) == 0 and time.monotonic() - began < 11
    assert not any("traceback" in line for line in lines(tmp_path))
    hanging.close()


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [0.2, 0.7, 1.5])
def test_a_signal_while_starting_ends_it_without_a_traceback(load: Any, bundle: Path, tmp_path: Path, wait_s: float) -> None:
    process = start(bundle, tmp_path, load.free_port())
    time.sleep(wait_s)
    process.terminate()
    assert process.wait(30) in (0, -signal.SIGTERM)
    assert "Traceback" not in (tmp_path / "log").read_text() and "traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_frozen_redis_is_a_503_within_two_seconds_and_is_reported(
    load: Any, bundle: Path, redis_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, redis = redis_server
    monkeypatch.setenv("TWOTOWER_SERVING_EVENTS", url)
    port = load.free_port()
    command = [sys.executable, "-m", "twotower", "serve", str(bundle), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, KEY_VARIABLE: "a-key-of-this-test"})
    try:
        wait_until_ready(port, process)
        key = b"authorization: Bearer a-key-of-this-test\r\n"
        found = answer(port, b"GET /v1/items?limit=1 HTTP/1.1\r\nhost: localhost\r\n" + key)
        item = json.loads(found.partition(b"\r\n\r\n")[2])["items"][0]["item_id"]

        def event(number: int) -> tuple[bytes, float]:
            body = json.dumps({"events": [{"event_id": str(number), "user": "u", "item_id": item}]}).encode()
            began = time.monotonic()
            head = b"POST /v1/events HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n" % len(body)
            return answer(port, head + key, body), time.monotonic() - began

        assert b'"accepted":1' in event(0)[0]
        os.kill(redis, signal.SIGSTOP)
        for number in (1, 2, 3):
            said, took_s = event(number)
            assert b" 503 " in said and took_s < 2.0
        state = answer(port, READY)
        assert b" 200 OK" in state and b'"events":"ok"' not in state
        assert b"twotower_event_store_up 0.0" in answer(port, b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n")
        os.kill(redis, signal.SIGCONT)
        end = time.monotonic() + 20
        while b'"events":"ok"' not in answer(port, READY):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert b" 200 OK" in event(9)[0]
    finally:
        os.kill(redis, signal.SIGCONT)
        process.kill()
        process.wait()
