"""Start a server as a separate process, and generate load from one asyncio loop that uses little CPU time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY = "only-for-measuring-0123456789"
ENDED = (OSError, EOFError, asyncio.IncompleteReadError)
"""What a client sees of a server that was killed."""


class Server:
    """A running `twotower serve`; ready when the constructor returns.

    Parameters
    ----------
    log
        File that gets its log lines.
    options
        More of the command line.
    wait
        Whether to wait until it is ready.
    variables
        More of the environment.
    """

    def __init__(
        self, bundle: Path, events: str, log: Path, *options: str, start_s: float = 120, wait: bool = True, **variables: str
    ) -> None:
        self.port, self.log = free_port(), log
        command = [sys.executable, "-m", "twotower", "serve", str(bundle), "--port", str(self.port), "--events", events, "--public"]
        began = time.perf_counter()
        with log.open("ab") as target:
            self.process = subprocess.Popen(
                [*command, *options], stdout=target, stderr=target, env={**os.environ, "TWOTOWER_API_KEY": KEY, **variables}
            )
        while wait and not self._ready():
            if self.process.poll() is not None or time.perf_counter() > began + start_s:
                self.process.kill()
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.02)
        self.start_s = time.perf_counter() - began

    def get(self, path: str) -> tuple[int, bytes]:
        """Return status and body of a GET request."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.status, answer.read()

    def processor_s(self) -> float:
        """Return the processor seconds of the process, all threads."""
        return time.clock_gettime((~self.process.pid << 3) | 2)  # what clock_getcpuclockid(3) returns on Linux

    def memory_mb(self) -> float:
        """Return the resident memory in MB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("the process tells nothing of its memory")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait, and return the exit code."""
        self.process.send_signal(how)
        return self.process.wait(60)

    def _ready(self) -> bool:
        try:
            return self.get("/health/ready")[0] == 200
        except OSError:
            return False


@dataclass
class Load:
    """Result of a load: seconds from the due time of each request to its response (refusals separately), and counts by status."""

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    refused_s: list[float] = field(default_factory=list)
    took_s: float = 0.0

    def note(self, due: float, status: int) -> None:
        """Record one response."""
        self.seconds.append(time.perf_counter() - due)
        if status in (429, 503):
            self.refused_s.append(self.seconds[-1])
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def ms(self, share: float) -> float:
        """Return a quantile of the latency in ms."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    @property
    def rate(self) -> float:
        """Responses per second."""
        return len(self.seconds) / self.took_s


class Wire:
    """One keep-alive connection: a minimal HTTP/1.1 client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, raw: bytes) -> tuple[int, bytes]:
        """Send a request and return status and body of the response."""
        self._writer.write(raw)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return int(head[9:12]), await self._reader.readexactly(length)


@asynccontextmanager
async def wire(port: int) -> AsyncIterator[Wire]:
    """Open a connection to a server on this machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


def post(path: str, body: Any) -> bytes:
    """Return the bytes of a POST request."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


async def closed(port: int, requests: Sequence[bytes], *, connections: int, seconds: float) -> Load:
    """Send requests in a closed loop on each connection: the maximum throughput."""
    load, began = Load(), time.perf_counter()

    async def one(number: int) -> None:
        async with wire(port) as connection:
            at = number
            while (due := time.perf_counter()) < began + seconds:
                status, _ = await connection.ask(requests[at % len(requests)])
                load.note(due, status)
                at += connections

    await asyncio.gather(*(one(number) for number in range(connections)))
    load.took_s = time.perf_counter() - began
    return load


async def at_rate(port: int, requests: Sequence[bytes], *, rate: float, seconds: float, connections: int = 64) -> Load:
    """Send requests at a constant rate (open loop). Waiting for a free connection counts as latency."""
    load, began = Load(), time.perf_counter()
    dues: asyncio.Queue[tuple[int, float]] = asyncio.Queue()

    async def one() -> None:
        async with wire(port) as connection:
            while True:
                number, due = await dues.get()
                status, _ = await connection.ask(requests[number % len(requests)])
                load.note(due, status)
                dues.task_done()

    tasks = [asyncio.create_task(one()) for _ in range(connections)]
    for number in range(int(rate * seconds)):
        due = began + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        dues.put_nowait((number, due))
    await asyncio.wait_for(dues.join(), 60)
    load.took_s = time.perf_counter() - began
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return load


def median_ms(run: Callable[[int], Any], times: int) -> float:
    """Return the median milliseconds of `run(0)`, `run(1)`, …."""
    spent = []
    for number in range(times):
        began = time.perf_counter()
        run(number)
        spent.append(time.perf_counter() - began)
    return 1000 * sorted(spent)[times // 2]


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
