"""Decide who may do what: keys with roles, allowed hosts, and origins of other sites.

    read     recommendations, items, users, histories
    write    events, and changes of items
    admin    everything, reloads included

Keys are kept as SHA-256 hashes. A key has at least 16 characters and is random, so the hash cannot be reversed by guessing.
A file of keys has one key per line, as `twotower new-key` prints it:

    shop-frontend read sha256:9f86d08…
    till-7 write sha256:60303ae…

The file is read again when it changes, so keys are added and removed without a restart. A file with a mistake changes nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower.errors import ConfigError, TwoTowerError
from twotower.utils.console import log

READ, WRITE, ADMIN = ROLES = ("read", "write", "admin")
KEY_VARIABLE, KEYS_VARIABLE = "TWOTOWER_API_KEY", "TWOTOWER_API_KEYS"
SHORTEST_KEY = 16  # characters
LOOK_AGAIN_S = 1.0  # how often the file of keys is looked at
ALWAYS_OPEN = ("/health/", "/metrics", "/page/")
LINE = re.compile(r"(?P<name>[\w.@-]{1,64})\s+(?P<roles>[a-z,]+)\s+sha256:(?P<digest>[0-9a-f]{64})")
Keys = Mapping[str, frozenset[str]]
"""Roles by SHA-256 digest."""


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a request is refused."""

    status: int
    code: str
    text: str


class Access:
    """Checks requests before their bodies are read.

    Parameters
    ----------
    keys_file
        File of hashed keys.
    variables
        Environment: `TWOTOWER_API_KEY` is one key with all roles, `TWOTOWER_API_KEYS` has lines like the file, separated by `;`.
    public
        True: reading needs no key.
    hosts
        Names that the header `Host` may have, without port; `*.example.org` allows all names below. Empty: any.
    origins
        Origins of other sites whose pages may call this server, such as `https://shop.example.org`.

    Raises
    ------
    ConfigError
        A key is too short, or a line is not valid.

    Examples
    --------
    >>> access = Access(variables={"TWOTOWER_API_KEY": "correct-horse-battery"})
    >>> access.denial("/v1/recommend", "").status, access.denial("/v1/recommend", "Bearer correct-horse-battery")
    (401, None)
    """

    def __init__(
        self,
        *,
        keys_file: Path | None = None,
        variables: Mapping[str, str] | None = None,
        public: bool = False,
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
    ) -> None:
        self.public, self.origins = public, frozenset(origin.rstrip("/").lower() for origin in origins)
        self._hosts = frozenset(host.lower().strip("[]") for host in hosts)
        self._file, self._stamp, self._looked = keys_file, self._stamp_of(keys_file), time.monotonic()
        self._fixed = _of_variables(variables or {})
        self._keys: Keys = {**self._fixed, **read_keys(keys_file)}

    @property
    def has_keys(self) -> bool:
        """Return True if there is a key."""
        return bool(self._keys)

    def denial(self, path: str, authorization: str, method: str = "GET") -> Denial | None:
        """Return why a request for `path` is refused; None if its key (or none) suffices."""
        role = role_of(path, method)
        if role is None or (role == READ and self.public):
            return None
        keys = self._current()
        if not any(roles & {role, ADMIN} for roles in keys.values()):
            text = f"This needs a key with the role {role!r}, and the server has none. Set {KEY_VARIABLE} or use --api-keys."
            return Denial(403, "forbidden", text)
        scheme, _, key = authorization.partition(" ")
        roles = keys.get(digest_of(key.strip())) if scheme.lower() == "bearer" and key else None
        if roles is None:
            wrong = "wrong" if authorization else "missing"
            return Denial(401, "unauthorized", f"The API key is {wrong}. Send the header Authorization: Bearer KEY.")
        if not roles & {role, ADMIN}:
            return Denial(
                403, "forbidden", f"This key has the role {', '.join(sorted(roles))}; {role!r} is needed. Use another key."
            )
        return None

    def host_denial(self, path: str, host: str) -> Denial | None:
        """Return why a request with this `Host` is refused; health checks come under any name."""
        if not self._hosts or path.startswith(ALWAYS_OPEN):
            return None
        name = host.lower()
        name = name.partition("]")[0].strip("[") if name.startswith("[") else name.partition(":")[0]
        if name in self._hosts or any(f"*.{parent}" in self._hosts for parent in _parents(name)):
            return None
        return Denial(400, "host", f"The host {host[:80]!r} is not allowed. Start the server with --allowed-host {host[:80]}.")

    def origin_denial(self, method: str, origin: str, host: str) -> Denial | None:
        """Return why a request of another site's page is refused. Pages of this server send its own host."""
        if not origin or method in ("GET", "HEAD") or origin.lower() in self.origins:
            return None
        if origin.lower().partition("://")[2] == host.lower():
            return None
        return Denial(403, "origin", f"Pages of {origin[:80]!r} may not call this server. Use --allowed-origin to allow it.")

    def _current(self) -> Keys:
        """Return the keys, after reading a changed file."""
        if self._file is None or time.monotonic() < self._looked + LOOK_AGAIN_S:
            return self._keys
        self._looked = time.monotonic()
        stamp = self._stamp_of(self._file)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._keys = {**self._fixed, **read_keys(self._file)}
                log.info("read %d API keys again", len(self._keys))
            except (OSError, TwoTowerError) as error:
                log.error("the API keys stay as they were: %s", error)
        return self._keys

    @staticmethod
    def _stamp_of(file: Path | None) -> tuple[int, int, int] | None:
        try:
            found = os.stat(file) if file is not None else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found is not None else None


def role_of(path: str, method: str = "GET") -> str | None:
    """Return the role that a request needs; None: no key.

    Examples
    --------
    >>> role_of("/v1/users/u_17/history"), role_of("/v1/users/u_17", "DELETE"), role_of("/v1/items", "POST")
    ('read', 'admin', 'write')
    """
    if method == "DELETE" and path.startswith("/v1/users"):
        return ADMIN
    if path.startswith("/v1/events") or (path.startswith("/v1/items") and method in ("POST", "DELETE")):
        return WRITE
    if path.startswith("/admin"):
        return ADMIN
    return READ if path.startswith("/v1/") else None


def digest_of(key: str) -> str:
    """Return the SHA-256 hash of a key as hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key(name: str, roles: Sequence[str]) -> tuple[str, str]:
    """Return a new key and its line for the file of keys."""
    key = secrets.token_urlsafe(32)
    line = f"{name} {','.join(dict.fromkeys(roles))} sha256:{digest_of(key)}"
    if LINE.fullmatch(line) is None:
        raise ConfigError(f"Invalid name {name[:80]!r}. Use up to 64 letters, digits and any of . _ @ -.")
    return key, line


def parse_keys(lines: Sequence[str], where: str) -> dict[str, frozenset[str]]:
    """Return the roles by digest of lines of hashed keys. Empty lines and lines that begin with # are skipped.

    Raises
    ------
    ConfigError
        A line is not valid. The message never contains the line.
    """
    keys: dict[str, frozenset[str]] = {}
    for number, line in enumerate((line.strip() for line in lines), 1):
        if not line or line.startswith("#"):
            continue
        found = LINE.fullmatch(line)
        if found is None or not set(found["roles"].split(",")) <= set(ROLES):
            raise ConfigError(
                f"{where}, line {number} is not a key. Expected NAME ROLES sha256:HASH, with roles {', '.join(ROLES)}. "
                "Write one with `twotower new-key`."
            )
        keys[found["digest"]] = frozenset(found["roles"].split(","))
    return keys


def _of_variables(variables: Mapping[str, str]) -> dict[str, frozenset[str]]:
    keys = parse_keys(variables.get(KEYS_VARIABLE, "").replace(";", "\n").splitlines(), KEYS_VARIABLE)
    key = variables.get(KEY_VARIABLE)
    if key is not None:
        if len(key) < SHORTEST_KEY:
            text = (
                f"The API key in {KEY_VARIABLE} has {len(key)} characters; at least {SHORTEST_KEY} are required. Use a longer key."
            )
            raise ConfigError(text)
        keys[digest_of(key)] = frozenset(ROLES)
    return keys


def read_keys(file: Path | None) -> dict[str, frozenset[str]]:
    """Return the roles by digest of a file of hashed keys; none without a file.

    Raises
    ------
    ConfigError
        The file cannot be read, or is not a file of keys.
    """
    if file is None:
        return {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(
            f"{file} is not a text file. Expected one hashed key per line. Write one with `twotower new-key`."
        ) from None
    except OSError as error:
        raise ConfigError(f"Cannot read the keys in {file}: {error.strerror}. Check the path and its permissions.") from None
    return parse_keys(lines, str(file))


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(1, len(parts))]
