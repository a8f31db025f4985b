"""Read tables in long form, with one row for each property of an item: item, property, value, and the time of the snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir

from twotower.utils.config import LongFormConfig

SNAPSHOT = "source_snapshot"  # int64: time of a row in seconds since 1970


def spread(rows: ir.Table, form: LongFormConfig, wanted: Sequence[str]) -> ir.Table:
    """Return the rows with a column "raw PROPERTY" for each wanted property, null where the row has another one.

    Each row keeps its place, so that a bad value is the reject of its own line.
    """
    named, value = rows[f"raw {form.property}"].cast("string"), rows[f"raw {form.value}"].cast("string")
    return rows.mutate(**{f"raw {name}": ibis.ifelse(named == name, value, ibis.null("string")) for name in wanted})


def newest_values(rows: ir.Table, events: ir.Table, key: str, row: str, wanted: Sequence[str]) -> ir.Table:
    """Return one row of each id: the value of each property in its newest snapshot; of equal times, the last row counts.

    Ids of the events that no row has are ids without properties.
    """
    some = rows.filter(ibis.or_(*(rows[name].notnull() for name in wanted)))
    order = ibis.row_number().over(order_by=[some[SNAPSHOT], some[row]]) if SNAPSHOT in rows.columns else some[row]
    ranked = some.mutate(order.cast("int64").name("newest")).view()
    last = {name: ranked[name].last(order_by="newest") for name in wanted}
    values = ranked.group_by(key).aggregate(**last)
    known = rows.group_by(key).aggregate(**{row: rows[row].min()}).select(key, row)
    seen = events.select(key).distinct().anti_join(known, key).mutate(**{row: ibis.literal((1 << 62), "int64")})
    found = ibis.union(known, seen.select(key, row)).left_join(values, key)
    return found.select(key, row, *(name for name in rows.columns if name in wanted))
