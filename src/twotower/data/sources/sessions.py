"""Read JSON lines with one session each, {"session": 1, "events": [{"aid": 2, "ts": 1661200010000, "type": "clicks"}]}.

A session is a user. A line is a row of the account: it is read whole, or rejected whole.
"""

from __future__ import annotations

import ibis
import ibis.expr.types as ir

from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import ROW, Engine
from twotower.data.sources.other_columns import union
from twotower.data.sources.raw_tables import Check, RawTables, id_checks, ids_only, interactions, missing, quoted, screen
from twotower.data.sources.table_files import scan_json
from twotower.data.sources.table_paths import table_paths
from twotower.data.sources.times import LAST_S, seconds
from twotower.data.sources.values import as_id
from twotower.schema import ITEM_ID, USER_ID
from twotower.utils.config import DataConfig, SessionsConfig

EVENT = "event"  # event type of files without a key of types
EVENTS, SESSION_POSITION = "session_events", "session_position"
FILE_ORDERS, LINE_ORDERS = 1 << 50, 1 << 22  # room in `order` for the rows of one file, and for the events of one line


def read_sessions(config: DataConfig, engine: Engine, rejects: Rejects) -> RawTables:
    """Read the file of `config.sessions` and return the raw tables.

    Parameters
    ----------
    config
        The file is relative to `path`; the other settings of `sessions` name its keys.
    engine
        Receives the tables.
    rejects
        Receives lines that are not a JSON object with a session, or have an event without an item or a time.

    Returns
    -------
    RawTables
        Users are the sessions, and items those of the events; both have ids only.

    Raises
    ------
    DataError
        The file is missing or cannot be read.
    """
    settings = config.sessions
    parts, counts = [], dict[str, int]()
    for number, file in enumerate(table_paths(config.path, settings.path, "sessions")):
        scan = scan_json(engine, file, [settings.user_id, settings.events])
        user, events = as_id(scan.rows[settings.user_id]), _events(scan.rows[settings.events], settings)
        columns = {USER_ID: user, EVENTS: events}
        good, read = screen(engine, scan, _checks(scan.rows[settings.user_id], user, events, settings), columns, rejects=rejects)
        counts |= read
        flat = good.select(USER_ID, ROW, EVENTS).unnest(EVENTS, offset=SESSION_POSITION)
        event = flat[EVENTS]
        parts.append(
            interactions(
                flat,
                user_id=flat[USER_ID],
                item_id=event["item"],
                time_s=seconds(event["time"]),
                order=flat[ROW] * LINE_ORDERS + flat[SESSION_POSITION] + number * FILE_ORDERS,
                event_type=event["type"].fill_null(EVENT),
            )
        )
    rows = engine.save(union(parts))
    users, items = ids_only(engine, rows, USER_ID), ids_only(engine, rows, ITEM_ID)
    return RawTables(interactions=rows, users=users, items=items, features=(), has_time=True, counts=counts)


def _events(text: ir.StringValue, settings: SessionsConfig) -> ir.ArrayValue:
    """Return the events of JSON text as structs of item, time and type, all strings; null for other text."""
    elements = text.try_cast("json").cast("array<json>")

    def event(value: ir.JSONValue) -> ir.StructValue:
        kind = _plain(value[settings.event_type]) if settings.event_type else ibis.null("string")
        raw = _plain(value[settings.item_id])
        return ibis.struct({"item": as_id(raw), "raw": raw, "time": _plain(value[settings.time]), "type": kind})

    found: ir.ArrayValue = elements.map(event)
    return found


def _plain(value: ir.JSONValue) -> ir.StringValue:
    """Return a JSON string or number as text; null for null and for an empty string."""
    return value.str.coalesce(value.cast("string").nullif("null")).nullif("")


def _checks(session: ir.StringValue, user: ir.StringValue, events: ir.ArrayValue, settings: SessionsConfig) -> list[Check]:
    nameless = events.filter(lambda event: event["item"].isnull()).length() > 0
    untimed = events.filter(lambda event: ~seconds(event["time"]).between(0, LAST_S).fill_null(False))

    def no_id(event: ir.StructValue) -> ir.BooleanValue:
        return ibis.or_(*(bad.fill_null(False) for bad, _ in id_checks(event["raw"], event["item"], settings.item_id)))

    unnamed = events.filter(no_id)
    return [
        (missing(user) & events.isnull(), f"not a JSON object with {settings.user_id} and {settings.events}"),
        (missing(user), f"{settings.user_id} is missing"),
        *id_checks(session, user, settings.user_id),
        (events.isnull(), f"{settings.events} is not a list of objects"),
        (nameless, f"{settings.item_id} of an event is missing"),
        (unnamed.length() > 0, f"{settings.item_id} of an event is not an id: " + quoted(unnamed[0]["raw"])),
        (
            untimed.length() > 0,
            f"{settings.time} of an event is not a time in ISO 8601 or seconds: " + quoted(untimed[0]["time"].fill_null("")),
        ),
    ]
