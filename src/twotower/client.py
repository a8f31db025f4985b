"""Define the client: one method for each operation of the HTTP API.

with Client("http://127.0.0.1:8000") as client:
    client.recommend(user="u_17", k=5, filter="price <= 2")["items"]
    client.add_event("u_17", "b_230", stars=5)
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, cast, overload
from urllib.parse import quote

from twotower import client_types as t
from twotower.client_types import EventIn, RecommendIn
from twotower.errors import ResponseError
from twotower.utils.http_transport import Query, Transport

__all__ = ["Client", "EventIn", "RecommendIn"]

KEY_VARIABLE = "TWOTOWER_API_KEY"
MAX_EVENTS = 1000  # of one HTTP request
Id = str | int


class Client:
    """A client of one server. Close it, or use it in a `with` block. Several threads can share it.

    Answers are dictionaries with the fields of the HTTP API. Requests are sent again after 429, 502, 503, 504 and lost connections:
    after the seconds of `Retry-After`, else after 0, 0.2, 0.4, 0.8 … s, with up to 0.1 s at random.

    Parameters
    ----------
    url
        Address of the server.
    key
        API key. Default: the environment variable `TWOTOWER_API_KEY`. To rotate it, assign to the attribute `key`.
    timeout_s
        Time to connect, and time without a byte of the response, for each attempt.
    retries
        Attempts after the first.
    max_wait_s
        Longest wait between two attempts.
    ca_file
        Certificates that a server may have, as a PEM file. Default: those of the system.

    Examples
    --------
    >>> client = Client("http://127.0.0.1:8000", retries=0)
    >>> client
    Client('http://127.0.0.1:8000')
    >>> client.close()
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        timeout_s: float = 5.0,
        retries: int = 4,
        max_wait_s: float = 10.0,
        ca_file: Path | None = None,
    ) -> None:
        self.key = key or os.environ.get(KEY_VARIABLE)
        self._transport = Transport(url, timeout_s=timeout_s, retries=retries, max_wait_s=max_wait_s, ca_file=ca_file)

    def __repr__(self) -> str:
        return f"Client({self._transport.url!r})"  # without the key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()

    def recommend(self, **request: Unpack[t.RecommendIn]) -> t.AnswerOut:
        """Return the best items for a user, a history or both.

        Raises
        ------
        ResponseError
            The server refused the request.
        UnreachableError
            The server does not respond.
        """
        return cast(t.AnswerOut, self._post("/v1/recommend", request))

    def recommend_batch(self, requests: Sequence[t.RecommendIn]) -> t.BatchOut:
        """Answer several requests from one bundle version. An answer has `error` if its request cannot be answered."""
        return cast(t.BatchOut, self._post("/v1/recommend:batch", {"requests": list(requests)}))

    def similar_items(self, item_id: Id, *, k: int = 10, filter: str | None = None, cursor: str | None = None) -> t.SimilarOut:
        """Return the items most similar to an item; `cursor`: those after a response with this `next`."""
        optional = [(name, value) for name, value in (("filter", filter), ("cursor", cursor)) if value is not None]
        query: Query = [("id", item_id), ("k", k), *optional]
        return cast(t.SimilarOut, self._get("/v1/similar", query))

    def search_items(self, q: str = "", *, limit: int = 20, cursor: str | None = None) -> t.ItemsOut:
        """Return items by part of their name; without `q` the most popular ones. `cursor`: see `similar_items`."""
        query: Query = [("q", q), ("limit", limit), *([] if cursor is None else [("cursor", cursor)])]
        return cast(t.ItemsOut, self._get("/v1/items", query))

    @overload
    def get_items(self, item_ids: Iterable[Id], *, columns: Literal[False] = False) -> list[t.ItemOut]: ...

    @overload
    def get_items(self, item_ids: Iterable[Id], *, columns: Literal[True]) -> list[t.ItemDetailOut]: ...

    def get_items(self, item_ids: Iterable[Id], *, columns: bool = False) -> list[t.ItemOut] | list[t.ItemDetailOut]:
        """Return the items with these ids, at most 100; with `columns`, with all their catalogue columns. Unknown ids are left out.

        Examples
        --------
        >>> [item["columns"]["price"] for item in Client().get_items(["b_230", "b_5"], columns=True)]  # doctest: +SKIP
        [2, 1]
        """
        query: Query = [*(("id", one) for one in item_ids), *([("columns", "true")] if columns else [])]
        return cast(list[t.ItemDetailOut], self._get("/v1/items", query)["items"])

    def get_item(self, item_id: Id) -> t.ItemDetailOut:
        """Return one item with all its catalogue columns."""
        name = quote(str(item_id), safe="").replace(".", "%2E")  # "..", unencoded, would lead elsewhere
        return cast(t.ItemDetailOut, self._get(f"/v1/items/{name}"))

    def get_columns(self) -> t.ColumnsOut:
        """Return the columns that filters can compare, with frequent values, and examples of filters."""
        return cast(t.ColumnsOut, self._get("/v1/columns"))

    def search_values(self, column: str, q: str = "", *, limit: int = 20) -> list[t.ValueOut]:
        """Return values of a column of texts or lists by part of them, frequent ones first."""
        return cast(t.ValuesOut, self._get("/v1/values", [("column", column), ("q", q), ("limit", limit)]))["values"]

    def search_users(self, q: str = "", *, limit: int = 20) -> list[t.UserOut]:
        """Return users by part of their id, ordered by number of events."""
        return cast(t.UsersOut, self._get("/v1/users", [("q", q), ("limit", limit)]))["users"]

    def get_random_user(self) -> t.UserOut:
        """Return a random user with a history."""
        return cast(t.UsersOut, self._get("/v1/users/random"))["users"][0]

    def get_history(self, user: Id) -> t.HistoryOut:
        """Return the events of a user, oldest first."""
        return cast(t.HistoryOut, self._get("/v1/history", [("user", user)]))

    def get_about(self) -> t.AboutOut:
        """Return the served bundle and the filters that it supports."""
        return cast(t.AboutOut, self._get("/v1/about"))

    def add_event(
        self,
        user: Id,
        item_id: Id,
        *,
        event_id: Id | None = None,
        time_s: int | None = None,
        event_type: str | None = None,
        stars: float | None = None,
    ) -> t.EventsOut:
        """Store one event. On return it is on disk and affects all later responses.

        Parameters
        ----------
        event_id
            Id of the event; a user's event of the same id counts once. Default: a random one, the same for all attempts.
        time_s
            Seconds since 1970. Default: the time of the server.
        """
        event: t.EventIn = {"event_id": event_id or uuid.uuid4().hex, "user": user, "item_id": item_id}
        given = {"time_s": time_s, "event_type": event_type, "stars": stars}
        event.update(cast(t.EventIn, {name: value for name, value in given.items() if value is not None}))
        return self.add_events([event])

    def add_events(self, events: Iterable[t.EventIn]) -> t.EventsOut:
        """Store events, a thousand per request. After an error, send all of them again: none counts twice.

        Examples
        --------
        >>> events = [{"event_id": "order-881-1", "user": "u_17", "item_id": "b_230"}]
        >>> Client().add_events(events)  # doctest: +SKIP
        {'accepted': 1, 'repeated': 0}
        """
        left, total = iter(events), t.EventsOut(accepted=0, repeated=0)
        while part := list(islice(left, MAX_EVENTS)):
            done = cast(t.EventsOut, self._post("/v1/events", {"events": part}))
            total = t.EventsOut(accepted=total["accepted"] + done["accepted"], repeated=total["repeated"] + done["repeated"])
        return total

    def change_items(
        self, items: Iterable[Mapping[str, Any]] = (), *, remove: Iterable[Id] = (), reset: Iterable[Id] = ()
    ) -> t.ItemsChangedOut:
        """Add, change or remove items, a thousand in all. On return it is on disk; it is served from the next refresh on.

        Parameters
        ----------
        items
            `item_id` and columns of the catalogue. Columns that are not given stay as they are.
        reset
            Items whose earlier changes are deleted.

        Examples
        --------
        >>> Client().change_items([{"item_id": "b_230", "price": 3}], remove=["b_17"])  # doctest: +SKIP
        {'accepted': 2, 'items_changed': 41}
        """
        body = {"items": [dict(item) for item in items], "remove": list(remove), "reset": list(reset)}
        return cast(t.ItemsChangedOut, self._post("/v1/items", body))

    def remove_item(self, item_id: Id) -> t.ItemsChangedOut:
        """Stop recommending an item, from the next refresh on. It still counts in histories."""
        return self.change_items(remove=[item_id])

    def reload_bundle(self, bundle: str | None = None) -> t.ReloadOut:
        """Serve another bundle, a folder of the server's machine, or read the current folder again. It is tried once."""
        return cast(t.ReloadOut, self._post("/admin/reload", {} if bundle is None else {"bundle": bundle}, repeat=False))

    def refresh_items(self) -> t.RefreshOut:
        """Bring the items up to date with the accepted events, now."""
        return cast(t.RefreshOut, self._post("/admin/refresh", None))

    def forget_user(self, user: Id) -> t.ForgottenOut:
        """Delete everything about a user."""
        body = self._transport.send("DELETE", "/v1/users", query=[("user", user)], key=self.key)
        return cast(t.ForgottenOut, self._read(body))

    def export_events_file(self, since: str | None = None) -> bytes:
        """Return the accepted events as a Parquet file."""
        return self._export("/v1/events/export", since)

    def export_answers_file(self, since: str | None = None) -> bytes:
        """Return the logged answers as a Parquet file."""
        return self._export("/v1/events/export/answers", since)

    def get_versions(self) -> t.VersionsOut:
        """Return the served versions with their shares, and the versions that are kept."""
        return cast(t.VersionsOut, self._get("/admin/versions"))

    def promote_version(self) -> t.ReloadOut:
        """Serve the second version alone. It is tried once."""
        return cast(t.ReloadOut, self._post("/admin/promote", None, repeat=False))

    def roll_back(self) -> t.ReloadOut:
        """Serve the version before; with two versions, the first one alone. It is tried once."""
        return cast(t.ReloadOut, self._post("/admin/rollback", None, repeat=False))

    def check_live(self) -> t.StateOut:
        """Return the state of the process. It is tried once."""
        return cast(t.StateOut, self._get("/health/live", repeat=False))

    def check_ready(self) -> t.StateOut:
        """Return the state of the server and of its event store; raise `ResponseError` if it is not ready. It is tried once."""
        return cast(t.StateOut, self._get("/health/ready", repeat=False))

    def get_metrics(self) -> str:
        """Return metrics in the Prometheus text format."""
        return self._transport.send("GET", "/metrics").decode()

    def _export(self, path: str, since: str | None) -> bytes:
        query: Query = [] if since is None else [("since", since)]
        return self._transport.send("GET", path, query=query, key=self.key)

    def _get(self, path: str, query: Query = (), *, repeat: bool = True) -> Any:
        return self._read(self._transport.send("GET", path, query=query, key=self.key, repeat=repeat))

    def _post(self, path: str, body: Any, *, repeat: bool = True) -> Any:
        return self._read(self._transport.send("POST", path, body=body, key=self.key, repeat=repeat))

    def _read(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except ValueError:
            text = f"{self._transport.url} answered with something other than JSON. Is it a server of `twotower serve`?"
            raise ResponseError(text, status=200, code="refused") from None
