"""Compare the ids of the interactions with those of the items and users tables."""

from __future__ import annotations

import ibis
import ibis.expr.types as ir

from twotower.data.sources.account import Match
from twotower.data.sources.engine import Engine

_COUNT = "n_events"


def match_ids(engine: Engine, counted: ir.Table, table: ir.Table, key: str) -> Match:
    """Return how many events have an id of a table.

    Parameters
    ----------
    counted
        `key` and `n_events` of every distinct id of the interactions.
    table
        The table, with the column `key`.

    Returns
    -------
    Match
        With examples only if an id is unknown.
    """
    ids = table.select(key)
    known = _total(counted.semi_join(ids, key))
    events = _total(counted)
    if known == events:
        return Match(known, events)
    unknown = engine.save(counted.anti_join(ids, key))
    example = unknown.order_by([ibis.desc(_COUNT), key]).limit(1).to_pyarrow()[key].to_pylist()[0]
    other = table.select(key).order_by(key).limit(1).to_pyarrow()[key].to_pylist()
    pairs = unknown.mutate(form=_form(unknown[key])).join(ids.mutate(other=ids[key], form=_form(ids[key])).drop(key), "form")
    alike = engine.save(pairs.group_by(key).aggregate(other=pairs["other"].min()))
    first = alike.order_by(key).limit(1).to_pyarrow().to_pylist()
    found = int(alike.count().to_pyarrow().as_py())
    engine.free(unknown)
    return Match(known, events, example, other[0] if other else None, found, (first[0][key], first[0]["other"]) if first else None)


def count_ids(engine: Engine, events: ir.Table, key: str) -> ir.Table:
    """Return `key` and `n_events` of every distinct id of the interactions."""
    given = events.filter(events[key].notnull())
    return engine.save(given.group_by(key).aggregate(**{_COUNT: given.count()}))


def _total(counted: ir.Table) -> int:
    return int(counted[_COUNT].sum().to_pyarrow().as_py() or 0)


def _form(ids: ir.StringValue) -> ir.StringValue:
    """Return ids without what is often lost on the way: case, blanks, leading zeros, and ".0"."""
    return ids.strip().lower().re_replace(r"[.]0+$", "").re_replace(r"^0+([^.])", r"\1")
