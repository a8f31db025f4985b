"""Change items while a server runs: check what a request asks for, and make the version that is served.

Changes are in the event store, by item and column, so they survive a restart and reach every server of the store. They are on top
of any bundle, also of one that is loaded later, until the same column is changed again or the changes of the item are reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.bundle.changed_items import ItemChange, changed, changed_row
from twotower.bundle.item_file import ItemReader
from twotower.errors import RequestError, clause
from twotower.schema import ITEM_ID, UNKNOWN
from twotower.serving.event_journal import Journal
from twotower.serving.model_version import Engine
from twotower.serving.part_error import part
from twotower.utils.console import log
from twotower.utils.types import Json


@dataclass(frozen=True, slots=True)
class ChangedEngine:
    """A loaded bundle with changed items.

    Attributes
    ----------
    times
        How often items had been changed.
    """

    engine: Engine
    times: int = 0


def with_changes(loaded: Engine, journal: Journal, *, remote: bool) -> ChangedEngine:
    """Return a bundle as it was loaded, with all changes of items that the store has.

    Changes that this bundle cannot have are passed over, with one line in the log.

    Parameters
    ----------
    remote
        The vectors are searched in another process: no change is served.
    """
    found = journal.item_changes(0)
    if found is None:
        return ChangedEngine(loaded)
    times, changes = found
    if remote:
        log.warning("%d changed items are not served: the vectors are in another process", len(changes))
        return ChangedEngine(loaded, times)
    try:
        bundle, problems = changed(loaded.recommender.bundle, changes)
        engine = loaded.with_items(bundle)
    except Exception:
        log.exception("changed items are not served with %s", loaded.name)
        return ChangedEngine(loaded, times)
    if problems:
        log.warning("%d changed items are not served with %s, such as %s", len(problems), loaded.name, problems[0])
    return ChangedEngine(engine, times)


def read_changes(engine: Engine, items: Sequence[Json], remove: Sequence[str], reset: Sequence[str]) -> dict[str, ItemChange]:
    """Return the changes that a request asks for, beside those to be deleted.

    Raises
    ------
    PartError
        An item is named twice, a column is not in the catalogue, or a value does not fit its column.
    """
    changes: dict[str, ItemChange] = {}
    named: set[str] = set()
    read, offered = ItemReader(engine.dataset.items.schema, engine.dataset.specs), engine.recommender.offered
    for number, row in enumerate(items):
        with part("items", number):
            item_id = _once(str(row[ITEM_ID]), named)
            at = engine.row(item_id)
            away = at != UNKNOWN and offered is not None and not offered[at]
            change = ItemChange({name: value for name, value in row.items() if name != ITEM_ID}, False if away else None)
            try:
                changed_row({}, item_id, change, read)
            except ValueError as error:
                raise RequestError(f"Invalid item {item_id!r}: {clause(error)}.") from None
            changes[item_id] = change
    for name, ids in (("remove", remove), ("reset", reset)):
        for number, item_id in enumerate(ids):
            with part(name, number):
                _once(item_id, named)
    return changes | {item_id: ItemChange({}, removed=True) for item_id in remove}


def _once(item_id: str, named: set[str]) -> str:
    if item_id in named:
        raise RequestError(f"Item {item_id!r} is named twice. Name it once.")
    named.add(item_id)
    return item_id
