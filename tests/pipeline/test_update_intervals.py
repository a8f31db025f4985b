"""Test updates at intervals, beside a server that loads what they publish."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twotower.cli import main
from twotower.client import Client
from twotower.commands import training
from twotower.errors import UnreachableError

KEY = "a-key-for-these-tests"
ENVIRONMENT = {**os.environ, "TWOTOWER_API_KEY": KEY, "PYTHONUNBUFFERED": "1"}


def command(*parts: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "twotower", "--quiet", *map(str, parts)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip


def ready(client: Client) -> bool:
    try:
        return client.check_ready()["status"] == "ready"
    except UnreachableError:
        return False


def test_updates_at_intervals_reload_a_server_and_outlive_a_failure(
    shop_run: Path, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    new = tmp_path / "arrives"  # later than the first update
    server = command("serve", shop_run / "bundle", "--port", url.rpartition(":")[2])
    updates = command("update", shop_run, "--data", new, "--every", "0.0003", "--reload", url)
    assert server.stdout and updates.stdout and updates.stderr
    try:
        with Client(url, key=KEY) as client:
            while not ready(client):
                time.sleep(0.1)
            first = client.get_about()["version"]
        assert "No file or folder" in updates.stderr.readline()
        shutil.copytree(origin / "new", tmp_path / "arriving")
        (tmp_path / "arriving").rename(new)
        told = iter(updates.stdout.readline, "")
        assert any(line == f"Bundle: {shop_run / 'bundle'}\n" for line in told)
        served = next(line for line in told if line.startswith("Serving: version "))
        with Client(url, key=KEY) as client:
            assert first not in served and client.get_about()["version"] in served
        assert "Nothing was changed." in next(told)
        monkeypatch.delenv("TWOTOWER_API_KEY", raising=False)
        assert main(["update", str(shop_run), "--data", str(new), "--reload", url]) == 2
        said = capsys.readouterr().err
        assert "bundle is ready, but no server loaded it. Set TWOTOWER_API_KEY to a key of the server with the role admin." in said
    finally:
        for child in (updates, server):
            child.send_signal(signal.SIGINT)
        for child in (updates, server):
            try:
                child.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()
    assert updates.returncode == 130


def test_a_server_that_is_not_there_is_told_after_the_update(shop_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, nowhere = str(shop_run.parent / "new"), "http://127.0.0.1:1"
    assert main(["update", str(shop_run), "--data", new, "--reload", nowhere]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "bundle is ready, but no server loaded it. No answer from http://127.0.0.1:1" in said
    assert main(["update", str(shop_run), "--data", new, "--reload", "localhost:8000"]) == 2
    assert "is not the address of a server" in capsys.readouterr().err
    assert main(["update", str(shop_run), "--data", new, "--every", "1", "--out", "elsewhere"]) == 2
    assert "Leave out --out." in capsys.readouterr().err


def test_control_c_ends_updates_at_intervals_even_where_a_library_loses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def lose(*_: object) -> None:
        calls.append("update")
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            return

    monkeypatch.setattr(training, "_update_once", lose)
    before = signal.getsignal(signal.SIGINT)
    assert main(["update", "run", "--data", ".", "--every", "0.0001"]) == 130
    assert calls == ["update"] and signal.getsignal(signal.SIGINT) is before
