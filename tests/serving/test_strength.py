"""Test a server process: signals, kills, overload, mixed load, and all requests that its OpenAPI document allows."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

Folders = tuple[Path, Path]
EXAMPLES = 25  # of each route


@pytest.mark.slow
def test_signals_reload_and_end_it_and_log_lines_are_json(strength: Any, bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with strength.Server(bundle, f"sqlite:{tmp_path / 'e'}", log) as server:
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 30
        while "now serving" not in log.read_text() and time.monotonic() < end:
            time.sleep(0.02)
        assert json.loads(server.get("/v1/about")[1])["name"] == bundle.name
        assert server.end() == 0
    said = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["level"] for line in said} == {"info"}
    assert [line["message"].split(",")[0] for line in said if "serving" in line["message"]] == [
        f"serving {bundle}",
        f"now serving {bundle}",
    ]


@pytest.mark.slow
def test_with_files_for_it_it_speaks_https(load: Any, bundle: Path, tmp_path: Path, lacking: Any) -> None:
    if shutil.which("openssl") is None:
        lacking("needs openssl")
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", load.free_port()
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    subprocess.run(
        [*make, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    command = [sys.executable, "-m", "twotower", "--quiet", "serve", bundle, "--port", port, "--events", f"sqlite:{tmp_path / 'e'}"]
    server = subprocess.Popen(list(map(str, [*command, "--tls-cert", certificate, "--tls-key", key])))
    trusting, end = ssl.create_default_context(cafile=certificate), time.monotonic() + 60
    try:
        while True:
            try:
                with urllib.request.urlopen(f"https://127.0.0.1:{port}/health/live", context=trusting) as answer:
                    assert answer.status == 200 and answer.headers["strict-transport-security"]
                    break
            except urllib.error.URLError:
                assert time.monotonic() < end and server.poll() is None
                time.sleep(0.05)
    finally:
        server.terminate()
        assert server.wait(30) == 0


@pytest.mark.slow
@pytest.mark.parametrize("store", ["sqlite", "redis"])
def test_killed_again_and_again_under_events_nothing_acknowledged_is_lost(
    strength: Any, bundle: Path, tmp_path: Path, store: str, request: pytest.FixtureRequest
) -> None:
    events = request.getfixturevalue("redis_url") if store == "redis" else ""
    found = strength.kill_often(bundle, tmp_path, 8, seed=1, events=events)
    assert found["lost"] == 0 and found["acknowledged"] > 100 and found["tracebacks"] == 0
    assert 0 < found["while_starting"] < 8


@pytest.mark.slow
def test_mixed_load_has_no_failure(strength: Any, bundles: Folders, tmp_path: Path) -> None:
    found = asyncio.run(strength.mix(bundles, tmp_path, 0.15, 0))
    assert found["failed"] == 0 and found["reloads"] >= 2, found
    assert {"recommend 200", "event 200", "bad 422", "reload 200"} == set(found["statuses"])


@pytest.mark.slow
def test_overload_is_refused_quickly_and_passes(strength: Any, bundle: Path, tmp_path: Path) -> None:
    found = asyncio.run(strength.overload(bundle, tmp_path, 2.0))
    assert found["refused"] > 0 and set(found["statuses"]) <= {200, 503}
    assert set(found["after_statuses"]) == {200}, "it recovers"


@pytest.mark.slow
def test_nothing_that_its_description_allows_makes_it_fail(load: Any, bundle: Path, tmp_path: Path) -> None:
    import schemathesis
    import schemathesis.specs.openapi.checks as conforms
    from schemathesis.checks import not_a_server_error

    headers, seen = {"Authorization": f"Bearer {load.KEY}"}, set()
    wanted = [
        not_a_server_error,
        conforms.status_code_conformance,
        conforms.content_type_conformance,
        conforms.response_schema_conformance,
    ]
    with load.Server(bundle, f"sqlite:{tmp_path / 'e'}", tmp_path / "log", "--rate", "0") as server:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
        for found in schema.get_all_operations():

            @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
            @given(found.ok().as_strategy())
            def check(case: Any) -> None:
                answer = case.call_and_validate(headers=headers, checks=wanted)
                seen.add((case.path, answer.status_code))

            check()
        assert server.end() == 0
    assert {path for path, status in seen if status == 200} >= {"/v1/recommend", "/v1/recommend:batch", "/v1/items", "/v1/about"}
    assert "traceback" not in (tmp_path / "log").read_text()
