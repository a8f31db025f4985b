"""Run one process of the server: the only one, or a worker among several.

A worker is a copy of the supervisor (`supervisor.py`) and answers for the version that the supervisor had when it was made.
Messages between the two are JSON on a socket pair; a closed one means that the other has gone.

    worker → supervisor     {"ready": 1} · {"retired": 1} · {"reload": PATH or null, "id": 7} · {"refresh": 1, "id": 7}
                            {"promote": 1, "id": 7} · {"roll_back": 1, "id": 7} · {"forget": USER, "id": 7}
    supervisor → worker     {"retire": 1} · {"id": 7, "result": {…}} · {"id": 7, "error": "…", "busy": false}
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import uvloop

from twotower.serving.access import Access
from twotower.serving.app import create_app
from twotower.serving.clients import Clients
from twotower.serving.http_server import HttpServer
from twotower.serving.listening import Certificate
from twotower.serving.metrics_sum import MetricsFolder
from twotower.serving.parent_updates import ParentUpdates
from twotower.serving.prometheus import UPDATES
from twotower.serving.service import Service
from twotower.serving.shared_counts import SharedCounts
from twotower.serving.telemetry import Telemetry
from twotower.utils.config_serving import ServingConfig
from twotower.utils.console import log
from twotower.utils.hardware import keep_trimmed

RENEW_S = 1.0  # how often the certificate is looked at, and metrics are published
ANSWERS_S = 0.1  # time for other workers to publish their metrics
MESSAGE_BYTES = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Outfit:
    """The parts that every process of the server has."""

    config: ServingConfig
    access: Access
    clients: Clients
    tls: Certificate | None
    sockets: Sequence[socket.socket]


class Handover:
    """Passes connections to the workers that take over; see `http_server.Successors`."""

    def __init__(self) -> None:
        self._give, self._take = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._give.setblocking(False)
        self._take.setblocking(False)

    def give(self, descriptor: int) -> bool:
        """Pass a copy of a connected socket on. Return False if it must be tried again."""
        try:
            socket.send_fds(self._give, [b"c"], [descriptor])
        except OSError:  # many are on their way
            return False
        return True

    def receive(self, loop: asyncio.AbstractEventLoop, adopt: Callable[[socket.socket], None]) -> None:
        """Call `adopt` with every connection that another process passes on."""

        def one() -> None:
            try:
                _, descriptors, _, _ = socket.recv_fds(self._take, 1, 1)
            except OSError:  # another worker was faster
                return
            for descriptor in descriptors:
                adopt(socket.socket(fileno=descriptor))

        loop.add_reader(self._take, one)

    def receive_no_more(self, loop: asyncio.AbstractEventLoop) -> None:
        """Leave further connections to other processes."""
        loop.remove_reader(self._take)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """The place of a worker.

    Attributes
    ----------
    number
        Row in `counts`, and eventfd in `bells`.
    parent
        Process id of the supervisor.
    pipe
        Socket to the supervisor.
    bells
        One eventfd for each seat, rung to have its worker publish metrics.
    """

    number: int
    parent: int
    pipe: socket.socket
    counts: SharedCounts
    bells: Sequence[int]
    handover: Handover
    metrics: MetricsFolder


class Fleet:
    """The other workers, as one worker sees them; see `service.Fleet`."""

    def __init__(self, seat: Seat, service: Service) -> None:
        self._seat, self._service = seat, service

    @property
    def stopping(self) -> bool:
        """Return True once the server stops."""
        return bool(self._seat.counts.get("stopping"))

    @property
    def ready(self) -> int:
        """Return the number of workers that answer requests."""
        return self._seat.counts.ready

    async def metrics(self) -> bytes:
        """Return the metrics of all processes; of one that does not respond, the last ones it has published."""
        seat, asked_ns = self._seat, time.monotonic_ns()
        others = [one for one in seat.counts.seats() if one != seat.number]
        for one in others:
            os.eventfd_write(seat.bells[one], 1)
        self.publish()
        end = time.monotonic() + ANSWERS_S
        while any(seat.counts.published(one) < asked_ns for one in others) and time.monotonic() < end:
            await asyncio.sleep(0.001)
        return seat.metrics.text(self.ready)

    def publish(self) -> None:
        """Write the metrics of this process for the others."""
        self._seat.metrics.write(os.getpid(), self._service.meters.registry)
        self._seat.counts.publish(self._seat.number)


class Process:
    """An HTTP server in this process, which serves until SIGTERM or SIGINT.

    Parameters
    ----------
    seat
        The place of a worker; None: this process is the only one.
    """

    def __init__(self, outfit: Outfit, service: Service, seat: Seat | None = None) -> None:
        self._outfit, self._service, self._seat = outfit, service, seat
        self._signals: list[int] = []
        self._fleet = None if seat is None else Fleet(seat, service)
        service.fleet = self._fleet

    async def run(self, started: Callable[[], None]) -> None:
        """Serve; `started` is called when requests can be answered."""
        outfit, service, loop = self._outfit, self._service, asyncio.get_running_loop()
        self._stop, self._retire = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        app = create_app(service, outfit.access, outfit.clients, outfit.config)
        app.openapi()  # made on request, it would hold up everybody for 150 ms
        self._server = server = HttpServer(
            app,
            service.limits,
            outfit.clients,
            tls=None if outfit.tls is None else outfit.tls.context,
            root_path=outfit.config.root_path,
            successors=None if self._seat is None else self._seat.handover,
            on_refusal=service.meters.error,
            on_stop=self._on_stop,
        )
        service.meters.connections(lambda: server.open)
        async with app.router.lifespan_context(app):
            tasks = [loop.create_task(one) for one in self._tasks()]
            started()
            await server.serve(outfit.sockets, self._stop, delay=lambda: self._signals[:1] == [signal.SIGTERM])
            for task in tasks:
                task.cancel()
        if self._fleet is not None:
            self._fleet.publish()

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        self._stop.set()

    def _on_stop(self) -> None:
        self._service.stopping = not self._server.retired

    def _tasks(self) -> list[Coroutine[Any, Any, None]]:
        outfit, seat = self._outfit, self._seat
        tasks: list[Coroutine[Any, Any, None]] = [keep_trimmed()]
        if outfit.tls is not None:
            tasks.append(_renewing(outfit.tls))
        if seat is not None:
            tasks.append(self._listening(seat))
        return tasks

    async def _listening(self, seat: Seat) -> None:
        """Do what the supervisor says, and publish metrics when another worker asks, and every second."""
        loop, updates, fleet = asyncio.get_running_loop(), self._service.updates, self._fleet
        assert isinstance(updates, ParentUpdates)
        assert fleet is not None
        seat.pipe.setblocking(False)

        def on_message() -> None:
            try:
                received = seat.pipe.recv(MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:  # it has gone and left messages unread
                received = b""
            if not received:
                orphaned()
            elif (message := json.loads(received)).get("retire"):
                self._retire.set()
            else:
                updates.take(message)

        def orphaned() -> None:
            loop.remove_reader(seat.pipe)
            updates.gone()
            self._on_signal(signal.SIGINT)

        def on_bell() -> None:
            os.eventfd_read(seat.bells[seat.number])
            fleet.publish()

        loop.add_reader(seat.pipe, on_message)
        loop.add_reader(seat.bells[seat.number], on_bell)
        retiring = loop.create_task(self._retiring(seat))
        try:
            while True:
                if os.getppid() != seat.parent:  # a pipe that was reset may not say so
                    orphaned()
                fleet.publish()
                self._service.journal.listen()
                await asyncio.sleep(RENEW_S)
        finally:
            retiring.cancel()

    async def _retiring(self, seat: Seat) -> None:
        await self._retire.wait()
        await self._server.retire()
        seat.counts.set_ready(seat.number, ready=False)
        seat.pipe.send(b'{"retired": 1}')
        limits, updates = self._service.limits, self._service.updates
        while isinstance(updates, ParentUpdates) and updates.pending:  # they have no time limit
            await asyncio.sleep(ANSWERS_S)
        await self._server.emptied(limits.request_s + limits.drain_s)
        self._on_signal(signal.SIGINT)


@contextmanager
def _telemetry(service: Service, seat: Seat | None = None) -> Iterator[None]:
    """Send traces and metrics of this process while the block runs. The threads that do it would not survive a fork."""
    service.telemetry = telemetry = Telemetry.from_environment(os.environ, None if seat is None else seat.number)
    if telemetry is None:
        yield
        return
    telemetry.watch(service.meters, () if seat is None else UPDATES)
    try:
        yield
    finally:
        telemetry.close()


def run_worker(outfit: Outfit, service: Service, seat: Seat) -> NoReturn:
    """Serve as one of several processes, until stopped or until others take over."""
    code = 1

    def started() -> None:
        seat.counts.set_ready(seat.number, ready=True)
        seat.pipe.send(b'{"ready": 1}')

    try:
        with _telemetry(service, seat):
            uvloop.run(Process(outfit, service, seat).run(started))
        code = 0
    except Exception:
        log.exception("a worker has failed")
    os._exit(code)


def run_alone(outfit: Outfit, service: Service, started: Callable[[], None]) -> None:
    """Serve in this process."""
    with _telemetry(service):
        uvloop.run(Process(outfit, service).run(started))


async def _renewing(certificate: Certificate) -> None:
    while True:
        await asyncio.sleep(RENEW_S)
        certificate.renew()
