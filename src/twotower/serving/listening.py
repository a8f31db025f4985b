"""Bind the sockets of a server before anything else is loaded, and keep its certificate up to date."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from twotower.errors import ConfigError, clause
from twotower.utils.console import log

BACKLOG = 65_535  # the kernel takes at most net.core.somaxconn; a full queue would delay others by a second and more
SOCKET_RIGHTS = 0o660


@contextmanager
def listening(host: str, port: int, unix_socket: Path | None) -> Iterator[list[socket.socket]]:
    """Yield bound sockets, which do not listen yet; at the end they are closed, and the file of a Unix socket is removed.

    Raises
    ------
    ConfigError
        An address cannot be used.
    """
    if unix_socket is None:
        found = bound_sockets(host, port)
        try:
            yield found
        finally:
            for one in found:
                one.close()
        return
    with _bound_path(unix_socket) as one:
        made = os.getpid(), unix_socket.stat().st_ino
        try:
            yield [one]
        finally:
            with suppress(OSError):
                if made == (os.getpid(), unix_socket.stat().st_ino):
                    unix_socket.unlink()


def bound_sockets(host: str, port: int) -> list[socket.socket]:
    """Return a socket for each address of `host`. They do not listen yet: a taken port is found before the bundle is loaded.

    Raises
    ------
    ConfigError
        An address cannot be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"Cannot listen on {host!r}: {clause(error)}. Use an address of this machine with --host.") from None
    bound: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(found if port else found[:1]):
        made = socket.socket(family, kind, protocol)
        bound.append(made)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and len(found) > 1:  # such as ::1 of localhost on a machine without IPv6
                bound.pop().close()
                continue
            for one in bound:
                one.close()
            text = f"Cannot listen on {host} port {port}: {error.strerror}. Stop the other server, or use --host and --port."
            raise ConfigError(text) from None
    if not bound:
        raise ConfigError(f"Cannot listen on {host}: it has no address on this machine. Use another --host.")
    return bound


class Certificate:
    """The certificate of a server, which new connections get renewed without a restart.

    Files that do not fit together, as while they are being written, change nothing.

    Attributes
    ----------
    context
        TLS settings of new connections.

    Raises
    ------
    ConfigError
        A file is missing or cannot be read, or the key does not match the certificate.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._files = cert, key
        self._stamps = [_stamp(file) for file in self._files]
        self.context = self._read(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))

    def renew(self) -> bool:
        """Read the files again if they have changed. Return True if new connections get another certificate."""
        stamps = [_stamp(file) for file in self._files]
        if stamps == self._stamps:
            return False
        self._stamps = stamps
        try:
            self._read(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # a half-renewed certificate fits no key
            self._read(self.context)
        except ConfigError as error:
            log.error("the TLS certificate stays as it was: %s", error)
            return False
        log.info("read the TLS certificate %s again", self._files[0])
        return True

    def _read(self, context: ssl.SSLContext) -> ssl.SSLContext:
        cert, key = self._files
        try:
            context.load_cert_chain(cert, key, password=lambda: "")
        except (OSError, ValueError) as error:  # what ssl raises is an OSError
            raise ConfigError(
                f"Cannot use {cert} and {key} for TLS: {clause(error)}. Expected a certificate and its key as PEM files."
            ) from None
        return context


@contextmanager
def _bound_path(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        try:
            _remove_dead(path)
            made.bind(str(path))
            os.chmod(path, SOCKET_RIGHTS)
        except OSError as error:
            text = f"Cannot listen on the Unix socket {path}: {error.strerror or error}. Use another --unix-socket."
            raise ConfigError(text) from None
        yield made


def _remove_dead(path: Path) -> None:
    """Remove the socket of a server that was killed.

    Raises
    ------
    OSError
        The path is no socket, or a server listens on it.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "a file is there")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another server uses it")


def listen(sockets: Sequence[socket.socket]) -> None:
    """Let bound sockets listen.

    Raises
    ------
    ConfigError
        Another server, which was starting at the same time, listens now.
    """
    for one in sockets:
        one.setblocking(False)
        try:
            one.listen(BACKLOG)
        except OSError as error:
            where = one.getsockname()
            raise ConfigError(
                f"Cannot listen on {where}: {error.strerror}. Stop the other server, or use another --port."
            ) from None


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
