"""Start the server from its settings and run it until it is stopped.

What can fail quickly is tried first: keys, certificate, address, event store. Only then is the bundle loaded.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from threadpoolctl import threadpool_limits

from twotower.bundle.publish import RemoteIndex
from twotower.bundle.sealed_folder import bundle_in, read_manifest
from twotower.bundle.signature import read_trusted_key
from twotower.errors import ConfigError
from twotower.search.milvus_store import read_address
from twotower.serving.access import KEY_VARIABLE, Access
from twotower.serving.clients import Clients
from twotower.serving.event_journal import Journal
from twotower.serving.event_store import lock_store, open_store
from twotower.serving.json_logs import setup_json_logs
from twotower.serving.late_store import opened_or_late
from twotower.serving.listening import Certificate, listen, listening
from twotower.serving.metrics_sum import MetricsFolder
from twotower.serving.parent_updates import ParentUpdates
from twotower.serving.prometheus import Meters
from twotower.serving.service import Service
from twotower.serving.supervisor import Supervisor
from twotower.serving.telemetry import Telemetry
from twotower.serving.updater import Trial, Updater, freeze_garbage_collector
from twotower.serving.worker import Outfit, Seat, run_alone, run_worker
from twotower.utils.config_serving import ServingConfig
from twotower.utils.console import log

SWITCH_S = 0.0005  # switch interval of the interpreter: a computing thread must not delay the event loop
LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(bundle: Path, config: ServingConfig, other: Path | None = None) -> NoReturn:
    """Check the settings, listen, load the bundle and serve until SIGTERM or SIGINT. SIGHUP reads the bundle again.

    Parameters
    ----------
    other
        A second bundle for a share of the users, see `ServingConfig.split`.

    Raises
    ------
    TwoTowerError
        A setting is invalid, or the bundle or the event store cannot be opened.
    """
    for ending in (signal.SIGTERM, signal.SIGINT):  # while the bundle is loaded
        signal.signal(ending, _end)
    trial = trial_of(config, other)
    access = access_of(config)
    clients = Clients(config, config.trusted_proxies, unix=config.unix_socket is not None)
    remote_index(config)  # a wrong address is refused now
    tls = Certificate(config.tls_cert, config.tls_key) if config.tls_cert and config.tls_key else None
    Telemetry.wanted(os.environ)  # a mistake fails here; each process that serves has its own
    if config.trusted_key is not None:
        read_trusted_key(config.trusted_key)
    read_manifest(bundle_in(bundle))  # before a file of events is created beside it
    events = config.events or f"sqlite:{bundle.resolve().with_name(bundle.resolve().name + '.events.sqlite')}"
    with ExitStack() as stack:
        sockets = stack.enter_context(listening(config.host, config.port, config.unix_socket))
        setup_json_logs(config.log_level)
        sys.setswitchinterval(SWITCH_S)
        outfit = Outfit(config=config, access=access, clients=clients, tls=tls, sockets=sockets)
        code = (_serve_alone if config.workers == 1 else _serve_together)(outfit, bundle, events, trial)
    logging.shutdown()
    os._exit(code)  # all is closed; to free a large bundle object by object would take seconds


def _serve_alone(outfit: Outfit, bundle: Path, events: str, trial: Trial) -> int:
    config = outfit.config
    service = Service(bundle, events, config, config.trusted_key, config.refresh_s, trial, remote_index(config))
    freeze_garbage_collector()
    run_alone(outfit, service, lambda: _tell(outfit, bundle, service.current.engine.version))
    return 0


def _serve_together(outfit: Outfit, bundle: Path, events: str, trial: Trial) -> int:
    config = outfit.config
    with ExitStack() as stack:
        stack.callback(lock_store(events))
        meters = Meters(lambda: 0.0, lambda: updater.journal.state == "ok")
        journal = Journal(open_store(events, shared=True), meters.skipped, follow=False)
        updater = Updater(bundle, journal, meters, config.trusted_key, config.refresh_s, trial, config)
        freeze_garbage_collector()
        listen(outfit.sockets)
        metrics = MetricsFolder(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twotower-"))))
        part = _part_of(config)

        def work(seat: Seat) -> NoReturn:
            _divide_cores(config.workers)
            store = opened_or_late(partial(open_store, events, shared=True), journal.follow_s)
            journal.in_another_process(store, seat.counts.news(seat.number))
            service = Service.of_worker(updater.current, journal, part, ParentUpdates(seat.pipe), events, updater.kept)
            run_worker(outfit, service, seat)

        supervisor = Supervisor(config, updater, metrics, work)
        return supervisor.run(lambda: _tell(outfit, bundle, updater.current.engine.version))


def _divide_cores(workers: int) -> None:
    """Let this process compute on its part of the cores, with PyTorch and with NumPy."""
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(threads)
    threadpool_limits(threads)


def _part_of(config: ServingConfig) -> ServingConfig:
    """Return the settings of one worker, which has its part of what all clients may use together."""
    parts = {name: math.ceil(getattr(config, name) / config.workers) for name in ("connections", "held_bytes", "waiting")}
    return config.model_copy(update=parts)


def remote_index(config: ServingConfig) -> RemoteIndex | None:
    """Return where vectors are searched; None: in this process.

    Raises
    ------
    ConfigError
        The address is none of Milvus.
    """
    if config.index is None:
        return None
    return RemoteIndex(read_address(config.index), config.index_ef, config.index_timeout_s)


def _tell(outfit: Outfit, bundle: Path, version: str) -> None:
    """Log that requests are answered."""
    config, name = outfit.config, outfit.sockets[0].getsockname()
    where = f"Unix socket {config.unix_socket}" if config.unix_socket else f"{config.host} port {name[1]}"
    log.info("serving %s, version %s, on %s", bundle, version, where)
    if not outfit.access.has_keys:
        log.info("no API key: events and reloads are refused; set %s or use --api-keys", KEY_VARIABLE)


def trial_of(config: ServingConfig, other: Path | None) -> Trial:
    """Return the second bundle that the command line and the settings name.

    Raises
    ------
    ConfigError
        The split has no second bundle, or the other way round.
    """
    if other is None and config.split:
        raise ConfigError("serving.split needs two bundles, and there is one. Run `twotower serve A B --split 90,10`.")
    if other is not None and not config.split:
        raise ConfigError(f"{other} is a second bundle without a share of the users. Add --split 90,10, or use --shadow {other}.")
    if other is not None and config.shadow is not None:
        raise ConfigError("A server has at most two bundles: remove --shadow, or the second bundle with --split.")
    if config.index is not None and (other is not None or config.shadow is not None):
        raise ConfigError("serving.index holds the vectors of one bundle. Remove --index, or the second bundle.")
    if other is not None:
        return Trial(other, config.split[1] / 100)
    return Trial(config.shadow)


def access_of(config: ServingConfig) -> Access:
    """Return keys, hosts and origins from settings and environment.

    Raises
    ------
    ConfigError
        Reading would be open to other machines, and `public` is not set.
    """
    local = config.unix_socket is None and config.host in LOCAL
    hosts = config.allowed_hosts or (LOCAL if local else ())
    keyed = Access(
        keys_file=config.api_keys, variables=os.environ, public=config.public, hosts=hosts, origins=config.allowed_origins
    )
    if keyed.has_keys or config.public:
        return keyed
    if not local:
        where = config.unix_socket or config.host
        raise ConfigError(
            f"Everyone who reaches {where} could read recommendations and histories: there is no API key. "
            "Use --api-keys, or --public to allow it."
        )
    return Access(public=True, hosts=hosts, origins=config.allowed_origins)


def _end(*_: Any) -> None:
    raise SystemExit(0)
