"""Start the server from its options and run it until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from twotower.bundle.signature import read_trusted_key
from twotower.errors import ConfigError
from twotower.serving.access import KEY_VARIABLE, Access
from twotower.serving.app import create_app
from twotower.serving.clients import Clients
from twotower.serving.http_server import HttpServer, bound_sockets
from twotower.serving.json_logs import setup_json_logs
from twotower.serving.limits import Limits
from twotower.serving.service import Service, freeze_garbage_collector
from twotower.serving.telemetry import Telemetry
from twotower.utils.console import log

SWITCH_S = 0.0005  # switch interval of the interpreter: a computing thread must not delay the event loop
LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the server; see `twotower serve --help`."""

    bundle: Path
    host: str
    port: int
    events: str | None
    api_keys: Path | None
    public: bool
    allowed_hosts: tuple[str, ...]
    allowed_origins: tuple[str, ...]
    trusted_proxies: tuple[str, ...]
    trusted_key: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    refresh_s: float
    limits: Limits


def serve(options: Options) -> None:
    """Check the options, listen, load the bundle and serve until SIGTERM or SIGINT. SIGHUP reads the bundle again.

    Fast checks come first: keys, certificate, port, event store.

    Raises
    ------
    TwoTowerError
        An option is invalid, or the bundle or the event store cannot be opened.
    """
    for ending in (signal.SIGTERM, signal.SIGINT):  # while the bundle is loaded
        signal.signal(ending, _end)
    access, clients, tls = access_of(options), Clients(options.limits, options.trusted_proxies), tls_of(options)
    telemetry = Telemetry.from_environment(os.environ)
    if options.trusted_key is not None:
        read_trusted_key(options.trusted_key)
    bundle = options.bundle
    events = options.events or f"sqlite:{bundle.resolve().with_name(bundle.resolve().name + '.events.sqlite')}"
    with ExitStack() as stack:
        sockets = [stack.enter_context(one) for one in bound_sockets(options.host, options.port)]
        setup_json_logs()
        sys.setswitchinterval(SWITCH_S)
        service = Service(bundle, events, options.limits, options.trusted_key, options.refresh_s)
        if telemetry is not None:
            stack.callback(telemetry.close)
            telemetry.watch(service.meters)
        service.telemetry = telemetry
        freeze_garbage_collector()
        uvloop.run(_run(options, service, access, clients, tls, sockets))
    logging.shutdown()
    os._exit(0)  # all is closed; to free a large bundle object by object would take seconds


async def _run(
    options: Options,
    service: Service,
    access: Access,
    clients: Clients,
    tls: ssl.SSLContext | None,
    sockets: list[socket.socket],
) -> None:
    app, stop, ended = create_app(service, access, clients), asyncio.Event(), list[int]()

    def on_stop() -> None:
        service.stopping = True

    def on_signal(number: int) -> None:
        ended.append(number)
        stop.set()

    for ending in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(ending, on_signal, ending)
    server = HttpServer(app, options.limits, clients, tls=tls, on_refusal=service.meters.error, on_stop=on_stop)
    service.meters.connections(lambda: server.open)
    async with app.router.lifespan_context(app):
        version, port = service.current.engine.version, sockets[0].getsockname()[1]
        log.info("serving %s, version %s, on %s port %d", options.bundle, version, options.host, port)
        if not access.has_keys:
            log.info("no API key: events and reloads are refused; set %s or use --api-keys", KEY_VARIABLE)
        await server.serve(sockets, stop, delay=lambda: ended[:1] == [signal.SIGTERM])


def access_of(options: Options) -> Access:
    """Return keys, hosts and origins from options and environment.

    Raises
    ------
    ConfigError
        Reading would be open to other machines, and `--public` is not given.
    """
    local = options.host in LOCAL
    hosts = options.allowed_hosts or (LOCAL if local else ())
    keyed = Access(
        keys_file=options.api_keys, variables=os.environ, public=options.public, hosts=hosts, origins=options.allowed_origins
    )
    if keyed.has_keys or options.public:
        return keyed
    if not local:
        raise ConfigError(
            f"Everyone who reaches {options.host} could read recommendations and histories: there is no API key. "
            "Use --api-keys, or --public to allow it."
        )
    return Access(public=True, hosts=hosts, origins=options.allowed_origins)


def tls_of(options: Options) -> ssl.SSLContext | None:
    """Return the TLS settings; None without a certificate.

    Raises
    ------
    ConfigError
        A file is missing or cannot be read, or the key does not match the certificate.
    """
    cert, key = options.tls_cert, options.tls_key
    if (cert is None) != (key is None):
        raise ConfigError("Only one of --tls-cert and --tls-key is given. TLS needs both.")
    if cert is None or key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:  # what ssl raises is an OSError
        raise ConfigError(
            f"Cannot use {cert} and {key} for TLS: {error}. Expected a certificate and its key as PEM files."
        ) from None
    return context


def _end(*_: Any) -> None:
    raise SystemExit(0)
