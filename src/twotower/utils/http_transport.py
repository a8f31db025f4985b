"""Send one HTTP request: pooled connections, timeouts, retries, and errors as exceptions."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from twotower.errors import ConfigError, ResponseError, UnreachableError, require

require("client", "urllib3")

from urllib3 import BaseHTTPResponse, PoolManager, Retry, Timeout  # noqa: E402 - after the check
from urllib3.exceptions import HTTPError  # noqa: E402

RETRIED = (429, 502, 503, 504)  # statuses after which the same request may succeed
BACKOFF_S, JITTER_S = 0.1, 0.1  # first wait without Retry-After, and the random part of every wait
FIRST_ERROR = 300  # statuses from here on; redirects are not followed, since they could carry the key to another host
CONNECTIONS = 16  # kept open for the threads of one client
MAX_SHOWN = 200  # characters of an answer that is not JSON

Query = Sequence[tuple[str, str | int]]


class JitteredRetry(Retry):
    """A `Retry` that adds a random part to every wait, so that refused clients do not return at the same moment."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        """Return the seconds to wait after a response; None if it does not say."""
        wait_s = super().get_retry_after(response)
        return None if wait_s is None else wait_s + random.uniform(0, JITTER_S)


class Transport:
    """Sends requests to one server; can be used from several threads.

    Parameters
    ----------
    timeout_s
        Time to connect, and time without a byte of the response, for each attempt.
    retries
        Attempts after the first.
    max_wait_s
        Longest wait between two attempts.
    """

    def __init__(self, url: str, *, timeout_s: float, retries: int, max_wait_s: float, ca_file: Path | None) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ConfigError(f"{url!r} is not the address of a server. Expected one such as http://127.0.0.1:8000.")
        self.url = url.rstrip("/")
        self._retry = JitteredRetry(
            total=retries,
            status_forcelist=RETRIED,
            allowed_methods=None,  # all routes but reloads can be called again
            backoff_factor=BACKOFF_S,
            backoff_jitter=JITTER_S,
            backoff_max=max_wait_s,
            retry_after_max=max_wait_s,  # type: ignore[arg-type]  # a number of seconds
            redirect=False,
            raise_on_status=False,
        )
        timeout, certificates = Timeout(connect=timeout_s, read=timeout_s), None if ca_file is None else str(ca_file)
        self._pool = PoolManager(maxsize=CONNECTIONS, timeout=timeout, ca_certs=certificates)

    def send(
        self, method: str, path: str, *, query: Query = (), body: Any = None, key: str | None = None, repeat: bool = True
    ) -> bytes:
        """Return the body of the response.

        Parameters
        ----------
        path
            Path below the address of the server, percent-encoded.
        repeat
            False: try once.

        Raises
        ------
        ResponseError
            The server refused the request, the last attempt included.
        UnreachableError
            No attempt got a response.
        """
        headers = {"accept": "application/json", "accept-encoding": "gzip"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        data = None
        if body is not None:
            data = json.dumps(body, ensure_ascii=False).encode()
            headers["content-type"] = "application/json"
        _add_trace(headers)
        target = self.url + path + (f"?{urlencode(query)}" if query else "")
        retry = self._retry if repeat else self._retry.new(total=0)
        try:
            response = self._pool.request(method, target, body=data, headers=headers, retries=retry)
        except HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise UnreachableError(f"No answer from {self.url}: {reason}. Check the address and that the server runs.") from error
        if response.status >= FIRST_ERROR:
            raise _refusal(response, self.url)
        return response.data

    def close(self) -> None:
        """Close all connections."""
        self._pool.clear()


def _refusal(response: BaseHTTPResponse, url: str) -> ResponseError:
    """Return the error of a response, which a proxy may have written instead of the server."""
    try:
        body: Mapping[str, Any] = json.loads(response.data)
        error = body["error"]
        return ResponseError(
            error["message"],
            status=response.status,
            code=error["code"],
            location=error.get("location"),
            request_id=body.get("request_id") or None,
        )
    except (ValueError, KeyError, TypeError):
        text = response.data[:MAX_SHOWN].decode("utf-8", "replace")
        return ResponseError(f"{url} answered with status {response.status}: {text}", status=response.status, code="refused")


def _add_trace(headers: dict[str, str]) -> None:
    """Add the `traceparent` of the current span, if the program uses OpenTelemetry."""
    if "opentelemetry" in sys.modules:
        from opentelemetry.propagate import inject

        inject(headers)
