"""Raw interactions → the events a dataset keeps, each with its weight and its split.

Enters: `RawTables` and the settings. Leaves: `Selection`, tables on the engine that hold numbers in place of ids.

Promise: whether a training event is kept depends on training events alone (leave-one-out, whose filters count all events as the
literature does, excepted). Everything here is an Ibis expression, computed by the engine, which spills to disk: filters, joins,
groups and windows that another engine can run as well.
"""

from __future__ import annotations

from calendar import timegm
from dataclasses import dataclass, field
from datetime import date
from math import ceil
from typing import NoReturn

import ibis
import ibis.expr.types as ir

from twotower.data.sources.engine import Engine, kept_below
from twotower.data.sources.raw_tables import RawTables
from twotower.errors import ConfigError, DataError, nearest
from twotower.schema import EVENT_TYPE, ITEM_ID, ORDER, PART, POSITIVE, SPLIT, STARS, TEST, TIME, TRAIN, USER_ID, VALID, WITHHELD
from twotower.utils.config import Config, SplitConfig

ITEM_KEY, USER_KEY = "item_key", "user_key"  # dense numbers in the order of the ids: joins and sorts on them are cheap
HELD = "held"  # the source's own test part
BY_TIME = (TIME, ORDER)
TOO_FEW = "too few training events"
_LOTS = (1 << 31) - 1  # prime


@dataclass
class Stage:
    """The engine, the settings, and how many events, users and items were dropped so far, and why."""

    engine: Engine
    config: Config
    raw: RawTables
    dropped: dict[str, dict[str, int]] = field(default_factory=lambda: {"events": {}, "users": {}, "items": {}})

    def save(self, expression: ir.Table) -> ir.Table:
        """Compute `expression` once, as a table of the engine."""
        return self.engine.save(expression)

    def keep(self, before: ir.Table, after: ir.Table, reason: str) -> ir.Table:
        """Compute `after`, count the events of `before` it lacks under `reason`, and free `before` (not to be used again)."""
        kept = self.save(after)
        self.dropped["events"][reason] = row_count(before) - row_count(kept)
        for table in kept_below(before):
            self.engine.free(table)
        return kept


@dataclass(frozen=True)
class Selection:
    """What is kept.

    Attributes
    ----------
    events
        item_key, user_key int64 (null: anonymous), time_s, order, event_type, stars, chars, weight, positive, split.
    items, users
        (item_id, item_key) of every item that was not dropped, and (user_id, user_key) of every user that was read.
    cuts_s
        First second of the periods "valid" and "test"; empty where the split is not by time.
    """

    events: ir.Table
    items: ir.Table
    users: ir.Table
    cuts_s: dict[str, int]


def select_events(stage: Stage) -> Selection:
    """Number the ids, fold repeats, weigh, split and filter."""
    _check_split(stage)
    items, users, events = _numbered(stage)
    events = _weighed(stage, _folded(stage, events))
    events, cuts = _split_before(stage, events)
    events, items = _filtered(stage, events, items)
    events = _withheld(stage, _split_after(stage, events))
    return Selection(events, items, users, cuts)


def is_training(events: ir.Table) -> ir.BooleanValue:
    """Training events of known users."""
    return events[USER_KEY].notnull() & (events[SPLIT] == TRAIN)


def row_count(table: ir.Table) -> int:
    """Number of rows, computed now."""
    return int(table.count().to_pyarrow().as_py())


def _check_split(stage: Stage) -> None:
    split, raw = stage.config.prepare.split, stage.raw
    if split.kind == "time" and not raw.has_time:
        raise ConfigError("A time split needs times. The events have none. Set prepare.split.kind to leave_one_out or predefined.")
    if split.kind != "time" and (isinstance(split.valid, date) or isinstance(split.test, date)):
        raise ConfigError(f"Dates cut a split by time alone. Got {split.valid} for prepare.split.kind: {split.kind}. Give shares.")
    if split.kind == "predefined" and split.test and not row_count(raw.interactions.filter(raw.interactions[PART] == "test")):
        raise ConfigError("A predefined split needs a test part. The data has none. Name data.sequences.test or change the split.")


def _numbered(stage: Stage) -> tuple[ir.Table, ir.Table, ir.Table]:
    """Item keys, user keys, and the events of known items; what the source kept of the interactions is freed."""
    raw, t = stage.raw, stage.raw.interactions
    items = stage.save(_keyed(raw.items.select(ITEM_ID), ITEM_ID, ITEM_KEY))
    users = stage.save(_keyed(t.filter(t[USER_ID].notnull()).select(USER_ID).distinct(), USER_ID, USER_KEY))
    narrow = t.mutate(held=(t[PART] == "test").fill_null(False)).drop(PART)
    joined = narrow.join(items, ITEM_ID).left_join(users, USER_ID).drop(USER_ID, ITEM_ID, f"{USER_ID}_right")
    events = stage.keep(t, joined, "item is not in the items table")
    if not raw.has_time:
        position = ibis.row_number().over(group_by=USER_KEY, order_by=[HELD, *BY_TIME])
        events = stage.save(events.mutate(time_s=position.cast("int64")))
    return items, users, events


def _folded(stage: Stage, events: ir.Table) -> ir.Table:
    if stage.config.prepare.duplicates == "keep":
        return events
    nth = ibis.row_number().over(group_by=[USER_KEY, ITEM_KEY], order_by=list(BY_TIME))
    first = events.mutate(nth=nth).filter(lambda e: (e.nth == 0) | e[USER_KEY].isnull()).drop("nth")
    return stage.keep(events, first, "repeat of the same user and item")


def _weighed(stage: Stage, events: ir.Table) -> ir.Table:
    """Add weight and positive: enough stars, or none at all, and a weight above 0."""
    prepare = stage.config.prepare
    weight: ir.Value = ibis.literal(1.0, "float32")
    if prepare.event_weights:
        known = {*events.select(EVENT_TYPE).distinct().to_pyarrow()[EVENT_TYPE].to_pylist(), *stage.config.data.events}
        for name in sorted(prepare.event_weights.keys() - known):
            raise ConfigError(f"prepare.event_weights names event types of the data. Got {name!r}.{nearest(name, known)}")
    for name, value in sorted(prepare.event_weights.items()):
        weight = ibis.ifelse(events[EVENT_TYPE] == name, ibis.literal(value, "float32"), weight)
    least = prepare.positive_min_stars
    enough = ibis.literal(True) if least is None else events[STARS].isnull() | (events[STARS] >= least)
    return events.mutate(weight=weight, positive=(weight > 0) & enough)


def _split_before(stage: Stage, events: ir.Table) -> tuple[ir.Table, dict[str, int]]:
    """Add the split where it does not depend on the filters; leave-one-out begins with everything in training."""
    split = stage.config.prepare.split
    known = events.filter(events[USER_KEY].notnull())
    if split.kind == "time":
        cuts = _cuts(split, known)
        past = [(events[TIME] >= cuts[name]).cast("int8") for name in ("valid", "test")]
        return events.mutate(split=(past[0] + past[1]).cast("int8")), cuts
    events = stage.keep(events, known, "no user, and no split by time to place it")
    if split.kind == "leave_one_out":
        return events.mutate(split=ibis.literal(TRAIN, "int8")), {}
    lot = _lot(events[ORDER], stage.config.seed)
    rank = ibis.row_number().over(group_by=[USER_KEY, HELD], order_by=[lot, events[ORDER]])
    size = events.count().over(group_by=[USER_KEY, HELD])
    drawn = rank < (size * split.valid + 1e-9).floor()  # a share of 0.29 of 100 events is 29, not 28
    code = ibis.ifelse(events[HELD], TEST if split.test else TRAIN, ibis.ifelse(drawn, VALID, TRAIN)).cast("int8")
    return stage.save(events.mutate(split=code)), {}


def _lot(order: ir.Value, seed: int) -> ir.Value:
    """A number below `_LOTS` drawn for each event, or key, by plain arithmetic: the hash functions of engines differ."""
    first = ((order + 1 + seed * 7919) * 48271) % _LOTS
    return (((first * first) % _LOTS + first) * 69621) % _LOTS


def _cuts(split: SplitConfig, events: ir.Table) -> dict[str, int]:
    """First second of the validation and of the test period."""
    if isinstance(split.valid, date) or isinstance(split.test, date):
        return {name: timegm(getattr(split, name).timetuple()) for name in ("valid", "test")}
    time = events[TIME]
    asked = {"valid": time.quantile(1 - split.valid - split.test), "test": time.quantile(1 - split.test), "last": time.max()}
    found = events.aggregate(**asked).to_pyarrow().to_pylist()[0]
    if found["last"] is None:
        return {"valid": 0, "test": 0}
    test = ceil(found["test"]) if split.test else found["last"] + 1
    return {"valid": ceil(found["valid"]) if split.valid else test, "test": test}


def _filtered(stage: Stage, events: ir.Table, items: ir.Table) -> tuple[ir.Table, ir.Table]:
    """Drop users and items with too few training events, from the events and from the items."""
    prepare = stage.config.prepare
    trained = events.filter(is_training(events)).select(USER_KEY, ITEM_KEY)
    size = row_count(trained)
    if not size:
        _refuse(stage, f"{row_count(events):,} events were found, none of a known user in the training part. Move prepare.split")
    if prepare.min_user_events == prepare.min_item_events == 1:
        return events, items
    pairs = stage.save(trained)
    users_left, items_left = _frequent(stage, pairs, size)
    lost_users = stage.save(pairs.select(USER_KEY).distinct().anti_join(users_left, USER_KEY))
    lost_items = stage.save(pairs.select(ITEM_KEY).distinct().anti_join(items_left, ITEM_KEY))
    stage.dropped["users"][TOO_FEW], stage.dropped["items"][TOO_FEW] = row_count(lost_users), row_count(lost_items)
    rest = stage.keep(events, events.anti_join(lost_users, USER_KEY), f"user has {TOO_FEW}")
    rest = stage.keep(rest, rest.anti_join(lost_items, ITEM_KEY), f"item has {TOO_FEW}")
    if not row_count(rest.filter(is_training(rest))):
        limits = f"min_user_events {prepare.min_user_events}, min_item_events {prepare.min_item_events}, k_core {prepare.k_core}"
        _refuse(stage, f"{size:,} were found, {limits} left none. Lower prepare.min_…_events")
    return rest, items.anti_join(lost_items, ITEM_KEY)


def _frequent(stage: Stage, pairs: ir.Table, size: int) -> tuple[ir.Table, ir.Table]:
    """Keys of the users and items with enough events; under k-core, with enough events among each other."""
    prepare, left = stage.config.prepare, pairs
    while True:
        users = _at_least(left, USER_KEY, prepare.min_user_events)
        items = _at_least(left, ITEM_KEY, prepare.min_item_events)
        if not prepare.k_core:
            return users, items
        fewer = stage.save(left.semi_join(users, USER_KEY).semi_join(items, ITEM_KEY))
        before, size = size, row_count(fewer)
        if size == before:
            return users, items
        if left is not pairs:
            stage.engine.free(left)
        left = fewer


def _refuse(stage: Stage, what: str) -> NoReturn:
    dropped = [f"{n:,} dropped because {reason}" for reason, n in stage.dropped["events"].items() if n]
    before = f" ({'; '.join(dropped)})" if dropped else ""
    raise DataError(f"A dataset needs training events: {what} or read more raw data{before}.")


def _split_after(stage: Stage, events: ir.Table) -> ir.Table:
    """Leave-one-out, on what the filters left: from a user's last positive event on is test, from the one before validation,
    where the settings have such a part; without a test part the last is validation's."""
    if stage.config.prepare.split.kind != "leave_one_out":
        return events
    positive = events[POSITIVE].cast("int64")
    so_far = positive.sum().over(ibis.cumulative_window(group_by=USER_KEY, order_by=list(BY_TIME)))
    total = positive.sum().over(group_by=USER_KEY)
    split = stage.config.prepare.split
    valid = VALID if split.valid else TRAIN
    last, before = (TEST, valid) if split.test else (valid, TRAIN)
    later = ibis.ifelse(so_far == total, last, ibis.ifelse(so_far == total - 1, before, TRAIN))
    return stage.save(events.mutate(split=ibis.ifelse(total >= 3, later, TRAIN).cast("int8")))


def _withheld(stage: Stage, events: ir.Table) -> ir.Table:
    """Keep the training events of a share of the users and of the items from training."""
    split, drawn = stage.config.prepare.split, ibis.literal(False)
    for number, (key, share) in enumerate(((USER_KEY, split.withhold_user_frac), (ITEM_KEY, split.withhold_item_frac))):
        if share:
            drawn = drawn | (_lot(events[key], stage.config.seed + 1 + number) < int(share * _LOTS)).fill_null(False)
    if not (split.withhold_user_frac or split.withhold_item_frac):
        return events
    kept = stage.save(events.mutate(split=ibis.ifelse(drawn & (events[SPLIT] == TRAIN), WITHHELD, events[SPLIT]).cast("int8")))
    if not row_count(kept.filter(is_training(kept))):
        _refuse(stage, "prepare.split.withhold_user_frac and withhold_item_frac left none. Lower them")
    return kept


def _keyed(ids: ir.Table, name: str, key: str) -> ir.Table:
    return ids.mutate(ibis.row_number().over(order_by=name).cast("int64").name(key))


def _at_least(pairs: ir.Table, key: str, least: int) -> ir.Table:
    counted = pairs.group_by(key).aggregate(n=pairs.count())
    return counted.filter(counted.n >= least).select(key)
