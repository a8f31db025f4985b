"""Select the events of a dataset from raw interactions, and assign weights and splits.

The result is a `Selection`: tables of the engine with integers instead of ids. Which training events are kept depends only on
training events. With leave_one_out, the minimum counts refer to all events, as in the literature. All steps are Ibis expressions
(filters, joins, groups and windows) that every engine can compute, spilling to disk.
"""

from __future__ import annotations

from calendar import timegm
from dataclasses import dataclass, field
from datetime import date
from math import ceil
from typing import NoReturn

import ibis
import ibis.expr.types as ir

from twotower.data.matching import count_ids, match_ids
from twotower.data.sources.account import Match
from twotower.data.sources.engine import Engine, kept_below
from twotower.data.sources.raw_tables import POSITION, RAW_WEIGHT, RawTables
from twotower.errors import ConfigError, DataError, nearest
from twotower.schema import (
    EVENT_TYPE,
    ITEM_ID,
    NEGATIVE,
    ORDER,
    PART,
    POSITIVE,
    SPLIT,
    STARS,
    TEST,
    TIME,
    TRAIN,
    USER_ID,
    VALID,
    WITHHELD,
)
from twotower.utils.config import Config, SplitConfig

ITEM_KEY, USER_KEY = "item_key", "user_key"  # dense numbers in the order of the ids: cheap to join and sort
PREDEFINED_TEST = "predefined_test"  # True: the source's own test part
BY_TIME = (TIME, ORDER)
TOO_FEW = "too few training events"
IMPRESSION = "impression"  # the event type that is an impression by default, and need not occur
_LOTS = (1 << 31) - 1  # a prime; modulus of the pseudo-random numbers


@dataclass
class Stage:
    """The engine, the settings, and the counts of the steps so far.

    Attributes
    ----------
    matched
        "item" or "user" → events whose id is in that table.
    times_s
        "first" and "last" time of the interactions, in seconds since 1970; empty without times.
    dropped
        Numbers of events, users and items dropped, by reason.
    event_types
        Types that settings may name although no event has them.
    """

    engine: Engine
    config: Config
    raw: RawTables
    matched: dict[str, Match] = field(default_factory=dict)
    times_s: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=lambda: {"events": {}, "users": {}, "items": {}})
    event_types: tuple[str, ...] = ()

    def save(self, expression: ir.Table) -> ir.Table:
        """Compute `expression` once and return it as a table of the engine."""
        return self.engine.save(expression)

    def keep(self, before: ir.Table, after: ir.Table, reason: str) -> ir.Table:
        """Compute and return `after`, count the events it lacks under `reason`, and free `before`, which must not be used again."""
        kept = self.save(after)
        self.dropped["events"][reason] = row_count(before) - row_count(kept)
        for table in kept_below(before):
            self.engine.free(table)
        return kept


@dataclass(frozen=True)
class Selection:
    """The events, items and users of a dataset.

    Attributes
    ----------
    events
        item_key, user_key int64 (null: anonymous), time_s, order, event_type, stars, chars, weight, positive, negative, split.
        Explicit negatives and impressions (`negative`) have a user and count in no filter and no share.
    items, users
        (item_id, item_key) of every item that is kept, and (user_id, user_key) of every user that was read.
    cuts_s
        First second of the periods "valid" and "test"; empty if the split is not by time.
    """

    events: ir.Table
    items: ir.Table
    users: ir.Table
    cuts_s: dict[str, int]


def select_events(stage: Stage) -> Selection:
    """Return the selected events: number the ids, remove repeats, assign weights, split and filter."""
    _check_split(stage)
    items, users, events = _numbered(stage)
    events = _folded(stage, _weighed(stage, events))
    events, cuts = _split_before(stage, events)
    events, items = _filtered(stage, events, items)
    events = _withheld(stage, _split_after(stage, events))
    return Selection(events, items, users, cuts)


def is_training(events: ir.Table) -> ir.BooleanValue:
    """Return a condition: training events of users with an id, without explicit negatives and impressions."""
    return events[USER_KEY].notnull() & (events[SPLIT] == TRAIN) & ~events[NEGATIVE]


def row_count(table: ir.Table) -> int:
    """Compute and return the number of rows."""
    return int(table.count().to_pyarrow().as_py())


def _check_split(stage: Stage) -> None:
    split, raw = stage.config.prepare.split, stage.raw
    if split.kind == "time" and not raw.has_time:
        raise ConfigError("The events have no times, but prepare.split.kind is time. Set it to leave_one_out or predefined.")
    if split.kind != "time" and (isinstance(split.valid, date) or isinstance(split.test, date)):
        raise ConfigError(
            f"prepare.split.kind {split.kind} cannot be cut at the date {split.valid}. Dates need kind time. Set fractions."
        )
    if split.kind == "predefined" and split.test and not row_count(raw.interactions.filter(raw.interactions[PART] == "test")):
        raise ConfigError(
            "The data has no test part, but prepare.split.kind is predefined. Set data.sequences.test or another kind of split."
        )


def _numbered(stage: Stage) -> tuple[ir.Table, ir.Table, ir.Table]:
    """Return item keys, user keys, and the events of known items; free the interactions of the source."""
    raw, t = stage.raw, stage.raw.interactions
    items = stage.save(_keyed(raw.items.select(ITEM_ID), ITEM_ID, ITEM_KEY))
    counted = {key: count_ids(stage.engine, t, key) for key in (USER_ID, *((ITEM_ID,) if "items" in raw.described else ()))}
    users = stage.save(_keyed(counted[USER_ID].select(USER_ID), USER_ID, USER_KEY))
    for side, key in (("item", ITEM_ID), ("user", USER_ID)):
        if f"{side}s" in raw.described:
            stage.matched[side] = match_ids(stage.engine, counted[key], getattr(raw, f"{side}s"), key)
            stage.matched[side].check(side)
    for table in counted.values():
        stage.engine.free(table)
    if raw.has_time:
        found = t.aggregate(first=t[TIME].min(), last=t[TIME].max()).to_pyarrow().to_pylist()[0]
        stage.times_s = {name: value for name, value in found.items() if value is not None}
    narrow = t.mutate(predefined_test=(t[PART] == "test").fill_null(False)).drop(PART)
    joined = narrow.join(items, ITEM_ID).left_join(users, USER_ID).drop(USER_ID, ITEM_ID, f"{USER_ID}_right")
    events = stage.keep(t, joined, "item is not in the items table")
    if not raw.has_time:
        position = ibis.row_number().over(group_by=USER_KEY, order_by=[PREDEFINED_TEST, *BY_TIME])
        events = stage.save(events.mutate(time_s=position.cast("int64")))
    return items, users, events


def _folded(stage: Stage, events: ir.Table) -> ir.Table:
    if stage.config.prepare.duplicates == "keep":
        return events
    nth = ibis.row_number().over(group_by=[USER_KEY, ITEM_KEY, NEGATIVE], order_by=list(BY_TIME))
    first = events.mutate(nth=nth).filter(lambda e: (e.nth == 0) | e[USER_KEY].isnull() | e[NEGATIVE]).drop("nth")
    return stage.keep(events, first, "repeat of the same user and item")


def _weighed(stage: Stage, events: ir.Table) -> ir.Table:
    """Add `weight` (of a negative: its size), `positive` (a weight above 0, and enough stars or none) and `negative`."""
    prepare = stage.config.prepare
    weight: ir.Value = ibis.literal(1.0, "float32")
    impressions = {*prepare.impression_types} - {IMPRESSION}
    if prepare.event_weights or impressions:
        found = events.select(EVENT_TYPE).distinct().to_pyarrow()[EVENT_TYPE].to_pylist()
        known = {*found, *stage.config.data.events, *stage.event_types}
        for setting, names in (("event_weights", prepare.event_weights.keys()), ("impression_types", impressions)):
            for name in sorted(names - known):
                raise ConfigError(f"prepare.{setting} has the unknown event type {name!r}.{nearest(name, known)}")
    for name, value in sorted(prepare.event_weights.items()):
        weight = ibis.ifelse(events[EVENT_TYPE] == name, ibis.literal(value, "float32"), weight)
    least = prepare.positive_min_stars
    enough = ibis.literal(True) if least is None else events[STARS].isnull() | (events[STARS] >= least)
    impression = events[EVENT_TYPE].isin(prepare.impression_types) if prepare.impression_types else ibis.literal(False)
    most = prepare.negative_max_stars
    disliked = ibis.literal(False) if most is None else (events[STARS] <= most).fill_null(False)
    negative = impression | (weight < 0) | disliked
    position = events[POSITION].fill_null(1) if POSITION in events.columns else ibis.literal(1)
    weight = ibis.ifelse(impression, 1.0 / position, weight.abs()).cast("float32")
    if RAW_WEIGHT in events.columns:
        weight = (weight * events[RAW_WEIGHT].fill_null(1.0)).cast("float32")
    marked = events.mutate(weight=weight, positive=(weight > 0) & enough & ~negative, negative=negative)
    marked = marked.drop(*({RAW_WEIGHT} & set(events.columns)))
    if most is None and all(value >= 0 for value in prepare.event_weights.values()):
        return marked
    return stage.keep(events, marked.filter(~marked[NEGATIVE] | marked[USER_KEY].notnull()), "negative without a user")


def _split_before(stage: Stage, events: ir.Table) -> tuple[ir.Table, dict[str, int]]:
    """Add the split if it does not depend on the filters; leave_one_out starts with all events in training."""
    split = stage.config.prepare.split
    known = events.filter(events[USER_KEY].notnull())
    if split.kind == "time":
        cuts = _cuts(split, known.filter(~known[NEGATIVE]))
        past = [(events[TIME] >= cuts[name]).cast("int8") for name in ("valid", "test")]
        return events.mutate(split=(past[0] + past[1]).cast("int8")), cuts
    events = stage.keep(events, known, "no user; only a split by time uses it")
    if split.kind == "leave_one_out":
        return events.mutate(split=ibis.literal(TRAIN, "int8")), {}
    lot = _lot(events[ORDER], stage.config.seed)
    rank = ibis.row_number().over(group_by=[USER_KEY, PREDEFINED_TEST, NEGATIVE], order_by=[lot, events[ORDER]])
    size = events.count().over(group_by=[USER_KEY, PREDEFINED_TEST, NEGATIVE])
    drawn = ~events[NEGATIVE] & (rank < (size * split.valid + 1e-9).floor())  # 1e-9: a share of 0.29 of 100 events is 29, not 28
    code = ibis.ifelse(events[PREDEFINED_TEST], TEST if split.test else TRAIN, ibis.ifelse(drawn, VALID, TRAIN)).cast("int8")
    return stage.save(events.mutate(split=code)), {}


def _lot(order: ir.Value, seed: int) -> ir.Value:
    """Return a pseudo-random number below `_LOTS` per event or key. Hash functions would differ between engines."""
    first = ((order + 1 + seed * 7919) * 48271) % _LOTS
    return (((first * first) % _LOTS + first) * 69621) % _LOTS


def _cuts(split: SplitConfig, events: ir.Table) -> dict[str, int]:
    """Return the first second of the validation period and of the test period."""
    if isinstance(split.valid, date) or isinstance(split.test, date):
        return {name: timegm(getattr(split, name).timetuple()) for name in ("valid", "test")}
    time = events[TIME]
    cuts = {"valid": time.quantile(1 - split.valid - split.test), "test": time.quantile(1 - split.test), "last": time.max()}
    found = events.aggregate(**cuts).to_pyarrow().to_pylist()[0]
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
        _refuse(stage, _why_none(stage, row_count(events)))
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
        _refuse(stage, f"all {size:,} were dropped by {limits}. Lower prepare.min_user_events or min_item_events,")
    return rest, items.anti_join(lost_items, ITEM_KEY)


def _why_none(stage: Stage, size: int) -> str:
    """Return why none of `size` events is in the training part, and what helps."""
    first, last = (stage.times_s.get(name) for name in ("first", "last"))
    if stage.config.prepare.split.kind == "time" and size > 1 and first is not None and first == last:
        return (
            f"all {size:,} events have the same time, so a split by time cannot keep some for training. If the rows are in order, "
            'leave the times out (--time none); else set prepare.split.kind to "leave_one_out",'
        )
    if size == 1:
        return "there is one event, and the split holds it out. Change prepare.split"
    return f"none of the {size:,} events belongs to a user with an id in the training part. Change prepare.split"


def _frequent(stage: Stage, pairs: ir.Table, size: int) -> tuple[ir.Table, ir.Table]:
    """Return the keys of users and items with enough events; with k_core, after repeating both filters until stable."""
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
    raise DataError(f"No training events are left: {what} or add raw data{before}.")


def _split_after(stage: Stage, events: ir.Table) -> ir.Table:
    """Add the leave_one_out split after the filters, for users with at least three positive events.

    A user's last positive event and later ones are test; the positive event before it and those in between are validation.
    Without a test part, validation starts at the last positive event. Parts that the settings lack stay in training.
    """
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
    """Mark the training events of random shares of the users and items as withheld."""
    split, drawn = stage.config.prepare.split, ibis.literal(False)
    for number, (key, share) in enumerate(((USER_KEY, split.withhold_user_frac), (ITEM_KEY, split.withhold_item_frac))):
        if share:
            drawn = drawn | (_lot(events[key], stage.config.seed + 1 + number) < int(share * _LOTS)).fill_null(False)
    if not (split.withhold_user_frac or split.withhold_item_frac):
        return events
    kept = stage.save(events.mutate(split=ibis.ifelse(drawn & (events[SPLIT] == TRAIN), WITHHELD, events[SPLIT]).cast("int8")))
    if not row_count(kept.filter(is_training(kept))):
        _refuse(stage, "prepare.split.withhold_user_frac and withhold_item_frac hide all. Lower them")
    return kept


def _keyed(ids: ir.Table, name: str, key: str) -> ir.Table:
    return ids.mutate(ibis.row_number().over(order_by=name).cast("int64").name(key))


def _at_least(pairs: ir.Table, key: str, least: int) -> ir.Table:
    counted = pairs.group_by(key).aggregate(n=pairs.count())
    return counted.filter(counted.n >= least).select(key)
