"""Settings of the server: the section `serving`, and the same settings from the environment.

    serving: {port: 8443, workers: 2}      in YAML
    TWOTOWER_SERVING_PORT=8443             in the environment
    twotower serve BUNDLE --port 8443      on the command line

The command line comes before the environment, the environment before YAML, YAML before the defaults. A list in the environment is
separated by commas. An empty variable is the same as none. API keys are no settings: they are in `TWOTOWER_API_KEY`, or as hashes
in the file of `api_keys`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from twotower.errors import ConfigError, nearest
from twotower.utils.config_data import Settings

PREFIX = "TWOTOWER_SERVING_"
RESEMBLING = re.compile(r"TWOTOWER_SERV(?!ICE_)|TWOTOWER_SERVICE_(?!HOST$|PORT)")
"""Names that were meant as settings; an orchestrator sets TWOTOWER_SERVICE_HOST and _PORT for a service named twotower."""
INJECTED = re.compile(r"(tcp|udp)://")
"""What an orchestrator writes into TWOTOWER_PORT for a service named twotower."""
SMALL = 1e-9  # a rounding error of percentages
TILES = re.compile(r"https?://[\w.-]+(:\d+)?/[^\s\"'<>;,]+")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,?#*]+/?", re.IGNORECASE)
HOST_NAME = re.compile(r"(\*\.)?[\w-]+(\.[\w-]+)*")
PASSWORD = re.compile(r"(?<=://)[^@/]*@")


class Loop(Settings):
    """Storage of answers, events and bundle versions, and exploration."""

    keep_answers_days: float = Field(30.0, ge=0)
    """Days for which answers are logged, so that events can name them. 0: answers are not logged."""
    keep_events_days: float | None = Field(None, gt=0)
    """Days after which accepted events are deleted from the store. null: they are kept."""
    keep_versions: int = Field(3, ge=1, le=100)
    """Number of bundles that are kept beside the first one, in BUNDLE.versions, for a return to an earlier version."""
    explore: float = Field(0.0, ge=0, le=1)
    """Share of the positions of a list that is given to uncertain and new items. Their probability is logged with the answer."""


class Limits(Loop):
    """The limits of a server for its clients, and its waiting times."""

    head_bytes: int = Field(2**14, ge=256)
    """Maximum size of the request line with all headers."""
    max_headers: int = Field(100, ge=1)
    """Maximum number of headers of a request."""
    body_bytes: int = Field(2**20, ge=1)
    """Maximum size of a request body."""
    held_bytes_per_client: int = Field(16 * 2**20, ge=1)
    """Maximum size of the bodies that have arrived, and of the responses that have not been read, of one client."""
    held_bytes: int = Field(64 * 2**20, ge=1)
    """The same of all clients. With several workers, each has its part."""
    queue_timeout_s: float = Field(2.0, gt=0.1)
    """Maximum time in the queue. After that the request is rejected with 503."""
    header_timeout_s: float = Field(10.0, gt=0)
    """Maximum time for the request headers, from the opening of the connection or the first header byte."""
    request_s: float = Field(15.0, gt=0)
    """Maximum time for a whole request, including the arrival of its body."""
    write_timeout_s: float = Field(15.0, gt=0)
    """Time in which a client must read at least 16 KiB a second of a pending response."""
    keep_alive_s: float = Field(65.0, gt=0)
    """Maximum idle time between requests. Longer than that of common load balancers, so that the balancer closes first."""
    running_per_client: int = Field(4, ge=1)
    """Maximum number of requests of a client in progress, or two while other clients send some; further ones wait unread. With a
    rate of 0, none waits."""
    lookups: int = Field(64, ge=1)
    """Maximum number of lookups (such as searches by name) that run or wait."""
    waiting: int = Field(512, ge=1)
    """Maximum number of requests that wait for the worker thread; one client fills at most half."""
    max_batch: int = Field(32, ge=1)
    """Maximum number of requests computed at once; heavy ones count more."""
    rate: float = Field(100.0, ge=0)
    """Requests per second of each client. Each request of a batch counts, heavy ones more. 0: no limit."""
    burst: float | None = Field(None, ge=1)
    """Requests that a client may send at once after a pause. null: those of two seconds."""
    connections: int = Field(1024, ge=1)
    """Maximum number of open connections. With several workers, each has its part."""
    connections_per_client: int = Field(128, ge=1)
    """Maximum number of open connections of one client. Trusted proxies have as many as they like."""
    reserved_connections: int = Field(32, ge=1)
    """Connections above the maximum that may ask for health and metrics."""
    linger_s: float = Field(1.0, ge=0)
    """Time for a client to read a refusal before its connection closes."""
    drain_delay_s: float = Field(1.0, ge=0)
    """Time after SIGTERM in which readiness is down but everything is answered, so that load balancers notice."""
    drain_s: float = Field(8.0, ge=0)
    """Maximum time from SIGTERM to the end of all requests; the process ends at most 2 s later."""

    @property
    def bucket(self) -> float:
        """Return the size of the token bucket of a client."""
        return max(2 * self.rate, 1.0) if self.burst is None else self.burst


class ServingConfig(Limits):
    """The server: address, access, logs, processes and limits."""

    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on. 0.0.0.0: all of IPv4; "::": all of IPv6."""
    port: int = Field(8000, ge=0, le=65_535)
    """Port to listen on. 0: any free one; the log names it."""
    unix_socket: Path | None = None
    """Unix socket to listen on, in place of host and port. Its owner and group may connect."""
    root_path: str = Field("", pattern=r"^(/[^/?#\s]+)*$")
    """Path under which a proxy publishes the server, such as /recommender. Requests may come with it or without."""
    workers: int = Field(1, ge=1, le=256)
    """Processes that share the port and one copy of the bundle. About one for each core."""
    events: str | None = None
    """Store of accepted events: sqlite:PATH or redis://HOST:PORT/NUMBER. null: sqlite:BUNDLE.events.sqlite beside the bundle."""
    split: list[float] = Field([])
    """Shares of the users of two bundles, such as [90, 10]. A user stays with a bundle."""
    shadow: Path | None = None
    """A second bundle that computes the same lists, which users do not see. The metrics compare them."""
    refresh_s: float = Field(60.0, ge=0, le=86_400)
    """Seconds between two refreshes of the items with accepted events. 0: only on demand."""
    index: str | None = None
    """Vectors that `twotower publish` wrote: milvus://HOST:PORT/NAME, or a file of Milvus Lite. null: those of the bundle, in this
    process. Needs `workers: 1`."""
    index_ef: int = Field(512, ge=1, le=32_768)
    """Width of the search in the graph of `index`. Larger: better recall, and slower."""
    index_timeout_s: float = Field(1.4, gt=0)
    """Time in which `index` must answer a batch of requests. After that they are refused with 503."""
    api_keys: Path | None = None
    """File of keys written by `twotower new-key`. It is read again when it changes."""
    public: bool = False
    """Let everyone read recommendations, items, users and histories without a key."""
    allowed_hosts: list[str] = Field([])
    """Names that the header Host may have; "*.example.org": all names below. Empty: any, or on 127.0.0.1 the names of this
    machine."""
    allowed_origins: list[str] = Field([])
    """Sites, such as https://shop.example.org, whose pages may call the server."""
    trusted_proxies: list[str] = Field([])
    """Addresses or networks of proxies, whose X-Forwarded-For and X-Forwarded-Proto are believed."""
    trusted_key: Path | None = None
    """PEM file of an Ed25519 public key: only bundles signed for it are served."""
    tls_cert: Path | None = None
    """PEM file of the certificate. With `tls_key` the server speaks HTTPS. Both are read again when they change."""
    tls_key: Path | None = None
    """PEM file of the certificate's key."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important lines that are logged. Requests are "info"; refusals, too."""
    log_clients: Literal["full", "shortened", "none"] = "full"
    """Client addresses in log lines. "shortened": the first 24 bits of IPv4, 48 of IPv6."""
    map_tiles: str | None = None
    """Images of the ground for the map of the page: an address with {z}, {x} and {y}. null: the page draws its own."""
    map_attribution: str = ""
    """Text on the map that the server of `map_tiles` requires."""
    log_probes: bool = False
    """Log health checks and metrics, too. Without it, only those that fail."""

    @field_validator("map_tiles")
    @classmethod
    def _address_of_tiles(cls, url: str | None) -> str | None:
        if url is not None and not (TILES.fullmatch(url) and all(part in url for part in ("{z}", "{x}", "{y}"))):
            raise ValueError(f"invalid address {url[:80]!r}; expected one such as https://tiles.example.org/{{z}}/{{x}}/{{y}}.png")
        return url

    @field_validator("allowed_origins")
    @classmethod
    def _sites(cls, origins: list[str]) -> list[str]:
        for one in origins:
            if ORIGIN.fullmatch(one) is None:
                raise ValueError(f"{one[:80]!r} is not a site; expected its scheme and name, such as https://shop.example.org")
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _names(cls, hosts: list[str]) -> list[str]:
        for one in hosts:
            if HOST_NAME.fullmatch(one) is None and not _is_ipv6(one.strip("[]")):
                raise ValueError(
                    f"{one[:80]!r} is not a name of a host; expected one such as shop.example.org, without scheme or port"
                )
        return hosts

    @field_validator("split")
    @classmethod
    def _sums_to_all(cls, split: list[float]) -> list[float]:
        if split and not (len(split) == 2 and min(split) >= 0 and abs(sum(split) - 100) < SMALL):
            text = ",".join(f"{share:g}" for share in split)
            raise ValueError(f"the shares {text} must be two numbers of at least 0 that add up to 100, such as 90,10")
        return split

    @model_validator(mode="after")
    def _both_of_tls(self) -> ServingConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("only one of tls_cert and tls_key is given; TLS needs both")
        return self

    @model_validator(mode="after")
    def _one_process(self) -> ServingConfig:
        if self.index is not None and self.workers > 1:
            raise ValueError(
                f"workers is {self.workers} with an index outside this process; use workers: 1, and start more servers"
            )
        return self

    @field_serializer("events")
    def _without_password(self, events: str | None) -> str | None:
        return None if events is None else PASSWORD.sub("***@", events)


class FromEnvironment(str):
    """A value of an environment variable, which error messages name.

    Attributes
    ----------
    variable
        Name of the variable.
    """

    variable: str

    def __new__(cls, value: str, variable: str) -> FromEnvironment:
        """Return `value`, which remembers the variable."""
        made = super().__new__(cls, value)
        made.variable = variable
        return made


def _is_ipv6(text: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


def serving_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of the server that the environment holds.

    Raises
    ------
    ConfigError
        A variable looks like a setting but is none.

    Examples
    --------
    >>> serving_settings({"TWOTOWER_SERVING_PORT": "8443", "TWOTOWER_SERVING_ALLOWED_HOSTS": "a.org,b.org", "HOME": "/root"})
    {'port': '8443', 'allowed_hosts': ['a.org', 'b.org']}
    """
    known = {variable_of(name): name for name in ServingConfig.model_fields}
    found: dict[str, Any] = {}
    for variable, value in environment.items():
        name = known.get(variable)
        if name is None:
            if _meant(variable, value):
                raise ConfigError(f"Unknown environment variable {variable!r}.{_near(variable, known)}")
        elif value.strip():
            given = FromEnvironment(value.strip(), variable)
            found[name] = _parts(given) if ServingConfig.model_fields[name].annotation in (list[str], list[float]) else given
    return found


def variable_of(name: str) -> str:
    """Return the environment variable of a setting of the server.

    Examples
    --------
    >>> variable_of("refresh_s")
    'TWOTOWER_SERVING_REFRESH_S'
    """
    return PREFIX + name.upper()


def _parts(given: FromEnvironment) -> list[FromEnvironment]:
    return [FromEnvironment(part.strip(), given.variable) for part in given.split(",") if part.strip()]


def _meant(variable: str, value: str) -> bool:
    """Return True for names such as TWOTOWER_SERVE_PORT and TWOTOWER_PORT."""
    name = variable.removeprefix("TWOTOWER_").lower()
    bare = variable.startswith("TWOTOWER_") and name in ServingConfig.model_fields and name != "api_keys"
    return variable.startswith(PREFIX) or RESEMBLING.match(variable) is not None or (bare and INJECTED.match(value) is None)


def _near(variable: str, known: Mapping[str, str]) -> str:
    bare = variable_of(variable.removeprefix("TWOTOWER_"))
    return f" Did you mean {bare!r}?" if bare in known else nearest(variable, known)
