"""Test what an operator sees and sets: log lines, renewed certificates, Unix sockets, files that others cannot read."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from twotower.errors import ConfigError
from twotower.serving.access import Access
from twotower.serving.app import create_app
from twotower.serving.json_logs import JsonFormatter, setup_json_logs
from twotower.serving.listening import Certificate, bound_sockets, listen, listening
from twotower.serving.server import access_of
from twotower.serving.service import Service
from twotower.utils.config_serving import Limits, ServingConfig
from twotower.utils.console import log

from .test_http_connection import GET, running


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Yield the log lines of the package as they are written."""
    found, before, level = io.StringIO(), log.handlers, log.level
    handler = logging.StreamHandler(found)
    handler.setFormatter(JsonFormatter())
    log.handlers = [handler]
    log.setLevel("INFO")
    yield found
    log.handlers = before
    log.setLevel(level)


def logged(bundle: Path, folder: Path, lines: io.StringIO, **settings: Any) -> list[dict[str, Any]]:
    """Return the lines of a request, a health check and a failed one."""
    service = Service(bundle, f"sqlite:{folder / 'e'}", Limits(rate=0), refresh_s=0)
    app = create_app(service, Access(public=True), config=ServingConfig(**settings))
    with TestClient(app, client=("203.0.113.77", 5)) as client:
        lines.truncate(0)
        lines.seek(0)
        client.post("/v1/recommend", json={"k": 1})
        client.get("/health/ready")
        client.get("/metrics")
        service.stopping = True
        client.get("/health/ready")
    return [json.loads(line) for line in lines.getvalue().splitlines()]


@pytest.mark.parametrize(("shown", "client"), [("full", "203.0.113.77"), ("shortened", "203.0.113.0/24"), ("none", None)])
def test_client_addresses_are_shortened_on_request(
    bundle: Path, tmp_path: Path, lines: io.StringIO, shown: str, client: str | None
) -> None:
    found = logged(bundle, tmp_path, lines, log_clients=shown)
    assert [line.get("client") for line in found] == [client] * len(found)
    assert shown == "full" or "203.0.113.77" not in lines.getvalue()


def test_health_checks_have_a_line_only_if_they_fail_or_if_asked_for(bundle: Path, tmp_path: Path, lines: io.StringIO) -> None:
    found = [(line["route"], line["status"]) for line in logged(bundle, tmp_path, lines)]
    assert found == [("/v1/recommend", 200), ("/health/ready", 503)]
    found = [(line["route"], line["status"]) for line in logged(bundle, tmp_path, lines, log_probes=True)]
    assert found == [("/v1/recommend", 200), ("/health/ready", 200), ("/metrics", 200), ("/health/ready", 503)]


def test_the_least_important_lines_can_be_left_out() -> None:
    handlers, level = log.handlers, log.level
    try:
        setup_json_logs("warning")
        assert not log.isEnabledFor(logging.INFO) and log.isEnabledFor(logging.WARNING)
    finally:
        log.handlers = handlers
        log.setLevel(level)


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-days", "2"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *subject]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


def test_a_renewed_certificate_is_taken_without_a_restart(tmp_path: Path) -> None:
    certificate = Certificate(*make_certificate(tmp_path, "one.example.org"))

    def name(port: int) -> str:
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", port), 10) as plain, trusting.wrap_socket(plain) as client:
            client.sendall(GET)
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            return str(ssl.DER_cert_to_PEM_cert(client.getpeercert(binary_form=True) or b""))

    with running(tls=certificate.context) as server:
        first = name(server.port)
        assert not certificate.renew() and name(server.port) == first, "nothing has changed"
        (tmp_path / "key.pem").write_text("half a k")
        assert not certificate.renew() and name(server.port) == first, "a key that is being written changes nothing"
        make_certificate(tmp_path, "two.example.org")
        assert certificate.renew() and name(server.port) != first


def test_a_unix_socket_is_for_its_owner_and_group_and_takes_the_place_of_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening("", 0, path) as (one,):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        listen([one])
        with pytest.raises(ConfigError, match="another server uses it"), listening("", 0, path):
            raise AssertionError("two servers on one socket")
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listening("", 0, path):
        pass
    path.write_text("a file")
    with pytest.raises(ConfigError, match="a file is there"), listening("", 0, path):
        raise AssertionError("a file was replaced")
    assert path.read_text() == "a file"


def test_what_a_unix_socket_publishes_needs_a_key_or_public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWOTOWER_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="there is no API key"):
        access_of(ServingConfig(unix_socket=tmp_path / "s"))
    assert access_of(ServingConfig(unix_socket=tmp_path / "s", public=True)).public


def test_two_servers_that_start_at_once_do_not_share_a_port() -> None:
    (one,) = bound_sockets("127.0.0.1", 0)
    with one:
        port = one.getsockname()[1]
        try:
            (other,) = bound_sockets("127.0.0.1", port)
        except ConfigError:
            return  # the system has refused it at once
        with other:
            listen([one])
            with pytest.raises(ConfigError, match="Stop the other server"):
                listen([other])


def test_what_the_server_writes_is_readable_by_its_owner_only(bundle: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        service = Service(bundle, f"sqlite:{tmp_path / 'e'}", Limits(rate=0), refresh_s=0)
        service.close()
        from twotower.cli import main

        assert main(["new-key", "till", "--role", "write", "--into", str(tmp_path / "keys")]) == 0
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
