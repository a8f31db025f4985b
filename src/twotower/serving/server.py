"""Start the server from its options and run it until it is stopped."""

from __future__ import annotations

import os
import signal
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from twotower.errors import ConfigError
from twotower.serving.app import create_app
from twotower.serving.http_timeouts import with_timeouts
from twotower.serving.json_logs import setup_json_logs
from twotower.serving.limits import Limits
from twotower.serving.service import Service, freeze_garbage_collector
from twotower.utils.console import log

KEY_VARIABLE = "TWOTOWER_API_KEY"
SHORTEST_KEY = 16  # characters
SWITCH_S = 0.0005  # switch interval of the interpreter: a computing thread must not delay the event loop
DRAIN_S = 10  # time to finish open requests when stopping


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the server; see `twotower serve --help`."""

    bundle: Path
    host: str
    port: int
    events: str | None
    api_key_file: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    limits: Limits


def serve(options: Options) -> None:
    """Load the bundle, open the event store and serve until SIGTERM or SIGINT. SIGHUP reads the bundle again.

    Raises
    ------
    TwoTowerError
        An option is invalid, or the bundle or the event store cannot be opened.
    """
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError("Only one of --tls-cert and --tls-key is given. TLS needs both.")
    if options.tls_cert and options.tls_key:
        check_pair(options.tls_cert, options.tls_key)
    key = read_key(options.api_key_file)
    setup_json_logs()
    sys.setswitchinterval(SWITCH_S)
    bundle = options.bundle
    events = options.events or f"sqlite:{bundle.resolve().with_name(bundle.resolve().name + '.events.sqlite')}"
    service = Service(bundle, events, options.limits)
    log.info("serving %s, version %s, on %s port %d", bundle, service.current.engine.version, options.host, options.port)
    if key is None:
        log.info("no API key: write endpoints are disabled; set %s or use --api-key-file", KEY_VARIABLE)
    for ending in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again after the shutdown: exit with 0
        signal.signal(ending, _end)
    app = create_app(service, key)
    freeze_garbage_collector()
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
        http=with_timeouts(options.limits),
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=options.limits.connections,
        timeout_graceful_shutdown=DRAIN_S,
    )


def _end(*_: Any) -> None:
    raise SystemExit(0)


def check_pair(cert: Path, key: Path) -> None:
    """Check that the certificate and the key can be used for TLS.

    Raises
    ------
    ConfigError
        A file cannot be read, or the key does not match the certificate.
    """
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:  # what ssl raises is an OSError
        raise ConfigError(
            f"Cannot use {cert} and {key} for TLS: {error}. Expected a certificate and its key as PEM files."
        ) from None


def read_key(file: Path | None) -> str | None:
    """Return the API key from the file, else from the environment variable; None if neither is set.

    Raises
    ------
    ConfigError
        The key is shorter than 16 characters.
    """
    key = file.read_text(encoding="utf-8").strip() if file is not None else os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if len(key) < SHORTEST_KEY:
        raise ConfigError(f"The API key has {len(key)} characters; at least {SHORTEST_KEY} are required. Use a longer key.")
    return key
