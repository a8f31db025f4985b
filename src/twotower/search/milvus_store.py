"""Reach collections of Milvus: a cluster by address, or Milvus Lite in a file. Each version of the vectors is a collection.

    milvus://host:19530/shop      an alias `shop` on a cluster, which stands for the newest version
    milvus+tls://host:443/shop    the same over TLS
    shop.db                       Milvus Lite, in this process; the alias is `items`

A new version is a collection of its own. It takes the alias once it is complete, at once, so a reader finds the old or the new one.
The version before stays for servers that still use it. Milvus is imported only when a store is used.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from twotower.errors import BusyError, ConfigError, DataError, TwoTowerError, require
from twotower.utils.console import log

T = TypeVar("T")
TOKEN = "TWOTOWER_MILVUS_TOKEN"
"""Environment variable with "user:password", or with an API key."""
CLUSTER = re.compile(r"milvus(\+tls)?://([\w.-]+|\[[0-9a-fA-F:]+\])(?::(\d{1,5}))?/([A-Za-z_]\w{0,199})")
LITE_ALIAS, PORT = "items", 19530
FORMAT = 1
SEARCH_S = 1.4  # time for a batch of searches: a server answers or refuses within 2 s
ADMIN_S = 60.0  # time for one step of a publication
RETRY_S = 1.0  # after a failure, one call in this time tries again; the others fail at once
LIMIT = 16_384  # items that Milvus returns for one query
FORM = "Write it as milvus://HOST:PORT/NAME, or as a file of Milvus Lite, such as shop.db."


@dataclass(frozen=True, slots=True)
class MilvusAddress:
    """Where a collection is: the address or file of the client, the alias, and the address as the user wrote it."""

    uri: str
    alias: str
    shown: str


def is_milvus(text: str) -> bool:
    """Return True if a text names Milvus, and not a file of another kind.

    Examples
    --------
    >>> is_milvus("milvus://host:19530/shop"), is_milvus("shop.db"), is_milvus("vectors.parquet")
    (True, True, False)
    """
    return text.startswith(("milvus:", "milvus+tls:")) or text.endswith(".db")


def read_address(text: str) -> MilvusAddress:
    """Return the address that a text names.

    Raises
    ------
    ConfigError
        The text is no address of Milvus, or has a password.

    Examples
    --------
    >>> read_address("milvus://host/shop").uri
    'http://host:19530'
    """
    if text.endswith(".db") and "://" not in text:
        return MilvusAddress(text, LITE_ALIAS, text)
    if "@" in text:
        raise ConfigError(
            f"The address of Milvus has a password, which every user of this machine can read. Set {TOKEN} to USER:PASSWORD."
        )
    found = CLUSTER.fullmatch(text)
    if found is None or int(found[3] or PORT) > 65_535:
        raise ConfigError(f"{text[:200]!r} is not an address of Milvus. {FORM} A name has letters, digits and underscores.")
    return MilvusAddress(f"{'https' if found[1] else 'http'}://{found[2]}:{found[3] or PORT}", found[4], text)


class MilvusStore:
    """The collections of one alias. Can be used from several threads.

    Parameters
    ----------
    search_s
        Time for a batch of searches, in seconds.

    Raises
    ------
    MissingExtraError
        pymilvus is not installed, or for a file milvus-lite.
    """

    def __init__(self, address: MilvusAddress, search_s: float = SEARCH_S) -> None:
        self.address, self.search_s = address, search_s
        self._file = "://" not in address.uri
        require("milvus", "pymilvus", *(["milvus_lite"] if self._file else []))
        self._lock = threading.Lock()
        self._client: Any = None
        self._pool = ThreadPoolExecutor(4, "milvus")
        self._down: str | None = None
        self._tried = 0.0  # time of the last call, in seconds of `time.monotonic`
        self._probe: Future[Any] | None = None

    @property
    def problem(self) -> str | None:
        """Return why the last call failed; None if it did not. If that is some time ago, ask again in the background."""
        if time.monotonic() - self._tried > RETRY_S and (self._probe is None or self._probe.done()):
            self._probe = self._pool.submit(self._ask_again)
        return self._down

    def search(self, collection: str, queries: Any, limit: int, expression: str, ef: int, deadline: float) -> list[list[int]]:
        """Return the rows of the best items of each query, best first, at most `limit`.

        Parameters
        ----------
        deadline
            Time by which Milvus must respond, in seconds of `time.monotonic`.

        Raises
        ------
        BusyError
            Milvus does not respond in time, or has not a moment ago.
        """
        params = {"metric_type": "IP", "params": {"ef": ef}}
        left = max(deadline - time.monotonic(), 0.001)

        def work(client: Any) -> Any:
            return client.search(
                collection, data=queries, limit=limit, filter=expression, search_params=params, output_fields=[], timeout=left
            )

        if self._down is not None and time.monotonic() - self._tried < RETRY_S:
            raise BusyError(self._down)
        found = self._timely(work, left)
        return [list(map(int, hits.ids)) for hits in found]

    def administer(self, work: Callable[[Any], T], doing: str) -> T:
        """Return what `work` returns for the client of Milvus.

        Raises
        ------
        DataError
            Milvus cannot be reached, or refuses.
        """
        try:
            return work(self._connected(ADMIN_S / 10))
        except TwoTowerError:
            raise
        except Exception as error:
            raise DataError(f"Cannot {doing} {self.address.shown}: {_reason(error)}. {self._advice()}") from None

    def current(self) -> tuple[str, dict[str, str]]:
        """Return the collection that the alias stands for, and its properties.

        Raises
        ------
        DataError
            There is none, or it is of another format.
        """

        def work(client: Any) -> tuple[str, dict[str, str]]:
            if not client.has_collection(self.address.alias, timeout=ADMIN_S):
                raise DataError(
                    f"{self.address.shown} has no vectors. Write them with `twotower publish BUNDLE --to {self.address.shown}`."
                )
            about = client.describe_collection(self.address.alias, timeout=ADMIN_S)
            return about["collection_name"], dict(about.get("properties") or {})

        name, properties = self.administer(work, "read")
        found = properties.get("twotower.format")
        if found != str(FORMAT):
            what = "was not written by twotower" if found is None else f"has the format {found}; this version reads {FORMAT}"
            raise DataError(f"{self.address.shown} {what}. Write it with `twotower publish BUNDLE --to {self.address.shown}`.")
        self.administer(lambda client: client.load_collection(name, timeout=ADMIN_S), "load")
        return name, properties

    def publish(self, schema: Any, index: Any, properties: Mapping[str, str], batches: Callable[[], Any], count: int) -> str:
        """Write a new version, give it the alias, and remove versions before the last one. Return the name of the collection.

        Parameters
        ----------
        batches
            Returns an iterator of lists of rows.
        count
            Number of rows in all batches.
        """
        alias, prefix = self.address.alias, f"{self.address.alias}_v"
        name = f"{prefix}{time.time_ns() // 1_000_000}"

        def work(client: Any) -> str:
            before = _alias_of(client, alias)
            if before is None and alias in client.list_collections(timeout=ADMIN_S):
                raise DataError(f"{self.address.shown} is a collection that twotower did not write. Choose another name.")
            try:
                client.create_collection(
                    name,
                    schema=schema,
                    index_params=index,
                    properties={**properties, "twotower.format": str(FORMAT)},
                    timeout=ADMIN_S,
                )
                for rows in batches():
                    client.insert(name, rows, timeout=ADMIN_S)
                client.flush(name, timeout=ADMIN_S)
                client.load_collection(name, timeout=ADMIN_S)
                found = client.query(name, filter="", output_fields=["count(*)"], timeout=ADMIN_S)[0]["count(*)"]
                if int(found) != count:
                    raise DataError(f"{self.address.shown} has {found} of {count} items after the upload. Publish again.")
                (client.create_alias if before is None else client.alter_alias)(name, alias, timeout=ADMIN_S)
            except BaseException:
                client.drop_collection(name, timeout=ADMIN_S)
                raise
            for old in client.list_collections(timeout=ADMIN_S):
                if re.fullmatch(re.escape(prefix) + r"\d{13}", old) and old not in (name, before):
                    client.drop_collection(old, timeout=ADMIN_S)
            return name

        return self.administer(work, "publish to")

    def close(self) -> None:
        """Close the connection; a file can then be opened by another process."""
        with self._locked(ADMIN_S):
            client, self._client = self._client, None
            if client is not None:
                client.close()
                if self._file:
                    from milvus_lite.server_manager import server_manager_instance

                    server_manager_instance.release_server(self.address.uri)

    def _connected(self, seconds: float) -> Any:
        with self._locked(seconds):
            if self._client is None:
                if self._file and not Path(self.address.uri).resolve().parent.is_dir():
                    raise DataError(f"The folder of {self.address.uri} does not exist. Create it, or use another path.")
                os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core writes to stderr about connections that it renews
                from pymilvus import MilvusClient

                if self._file:
                    importlib.import_module("milvus_lite.server_manager")  # makes its loggers
                for known in list(logging.root.manager.loggerDict):  # errors are raised; its log has long tracebacks
                    if known.startswith(("pymilvus", "milvus_lite", "grpc")):
                        logging.getLogger(known).disabled = True
                self._client = MilvusClient(self.address.uri, token=os.environ.get(TOKEN, ""), timeout=seconds, dedicated=True)
            return self._client

    @contextmanager
    def _locked(self, seconds: float) -> Iterator[None]:
        """Hold the lock of the client. Another thread may hang in a connection attempt, so do not wait longer than `seconds`."""
        if not self._lock.acquire(timeout=seconds):
            raise TimeoutError(f"no connection in {seconds:.3g} s")
        try:
            yield
        finally:
            self._lock.release()

    def _timely(self, work: Callable[[Any], T], seconds: float) -> T:
        """Return what `work` returns within a time; note whether Milvus responds."""
        task = self._pool.submit(lambda: work(self._connected(seconds)))
        try:
            found = task.result(seconds)
        except Exception as error:
            self._tried = time.monotonic()
            late = isinstance(error, NotInTime) or "DEADLINE_EXCEEDED" in str(error)
            reason = f"no response in {self.search_s:g} s" if late else _reason(error)
            if self._down is None:
                log.error("the index %s does not respond: %s", self.address.shown, reason)
            self._down = f"The index does not respond{f' ({reason})' if late else ''}. Try again later."  # clients see no address
            self._forget(task)
            raise BusyError(self._down) from None
        self._tried = time.monotonic()
        if self._down is not None:
            log.info("the index %s responds again", self.address.shown)
        self._down = None
        return found

    def _forget(self, stuck: Future[Any]) -> None:
        """Make new threads, so that calls that hang do not keep the next ones waiting."""
        if not stuck.done():
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = ThreadPoolExecutor(4, "milvus")

    def _ask_again(self) -> None:
        try:
            self._timely(lambda client: client.has_collection(self.address.alias, timeout=self.search_s), self.search_s)
        except BusyError:
            return

    def _advice(self) -> str:
        if self._file:
            return "Close other programs that use the file, or use a cluster: milvus://HOST:PORT/NAME."
        return f"Check the address, that Milvus runs, and {TOKEN} if it asks for a password."


def _alias_of(client: Any, alias: str) -> str | None:
    """Return the collection that an alias stands for; None if there is no such alias."""
    if not client.has_collection(alias, timeout=ADMIN_S):
        return None
    name = str(client.describe_collection(alias, timeout=ADMIN_S)["collection_name"])
    return None if name == alias else name


def _reason(error: BaseException) -> str:
    """Return what an error of Milvus says, on one line."""
    text = str(getattr(error, "message", "") or getattr(error, "details", lambda: "")() or error)
    if text == "Open local milvus failed":  # all that it says
        return "it is damaged, or another process has opened it"
    return " ".join(text.split())[:200].rstrip(".") or type(error).__name__
