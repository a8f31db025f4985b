"""A proxy before a real server that loses, refuses and delays requests as a test asks."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

CUT, SILENT = "cut", "silent"
"""Faults: the server answers, but the answer is lost; nothing is ever answered. A status and a Retry-After is a refusal."""
Fault = str | tuple[int, str | None]


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to a port; `faults` holds what goes wrong with the next ones."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.faults = port, list[Fault]()
        self.seen: list[tuple[float, str, dict[str, str], bytes]] = []  # time, path, headers, body
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def waits_s(self) -> list[float]:
        """Return the seconds between the requests."""
        times = [one[0] for one in self.seen]
        return [later - earlier for earlier, later in pairwise(times)]


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Write nothing."""

    def do_GET(self) -> None:
        """Pass a request on, unless a fault is due."""
        proxy = self.server
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        proxy.seen.append((time.monotonic(), self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        fault = proxy.faults.pop(0) if proxy.faults else None
        if isinstance(fault, tuple):
            status, wait = fault
            self._answer(status, {} if wait is None else {"Retry-After": wait}, b"<h1>a proxy's page</h1>")
        elif fault == SILENT:
            time.sleep(3)
            self.close_connection = True
        else:
            upstream = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            read = answer.read()
            upstream.close()
            if fault == CUT:
                self.close_connection = True
                return
            self._answer(answer.status, dict(answer.getheaders()), read)

    do_POST = do_GET

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def faulty_proxy(port: int) -> Iterator[FaultyProxy]:
    """Run a proxy before a server on this machine."""
    proxy = FaultyProxy(port)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
