"""From options to a server that runs until it is told to stop."""

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
SWITCH_S = 0.0005  # how long a computing thread may keep the interpreter from the one that answers
DRAIN_S = 10  # for requests under way when told to stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to serve; see `twotower serve --help`."""

    bundle: Path
    host: str
    port: int
    events: str | None
    api_key_file: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    limits: Limits


def serve(options: Options) -> None:
    """Load the bundle, open the store of events, and answer until SIGTERM or SIGINT; SIGHUP reads the bundle again.

    Raises
    ------
    TwoTowerError
        A setting, the bundle or the store of events is not what it must be.
    """
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError("TLS needs both --tls-cert and --tls-key. Only one is given.")
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
        log.info("no key: events and reloading are closed; set %s or use --api-key-file", KEY_VARIABLE)
    for ending in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when all is done: that is no failure
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
    """See that TLS can begin.

    Raises
    ------
    ConfigError
        One of the files cannot be read, or they do not belong together.
    """
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:  # what ssl raises is an OSError
        raise ConfigError(f"TLS needs a certificate and its key in PEM files. {cert}, {key}: {error}. Check both files.") from None


def read_key(file: Path | None) -> str | None:
    """The key from a file, else from the environment; None where there is none.

    Raises
    ------
    ConfigError
        It is shorter than 16 characters.
    """
    key = file.read_text(encoding="utf-8").strip() if file is not None else os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if len(key) < SHORTEST_KEY:
        raise ConfigError(f"A key must have at least {SHORTEST_KEY} characters. This one has {len(key)}. Take a longer one.")
    return key
