"""Simulate a town and write it in the format of Yelp's 2022 release, with the true preferences in a separate file.

The files are yelp_academic_dataset_{business,review,tip,checkin,user}.json and town_truth.safetensors. The same arguments give the
same bytes. Memory grows with the numbers of ids and parameters, not with text.

It has the quirks of the release: every attribute is a string ("True", "None", "u'free'", dict literals); attributes, hours and
categories may be null; cities are dirty; hours have unpadded minutes and "0:0-0:0"; elite holds "20,20" for 2020; friends is "None"
or very long; rows have no order; the aggregated stars and counts include future events.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.simulator import vocabulary as words
from twotower.data.simulator.builder import build_town, random_ids
from twotower.data.simulator.businesses import business_lines
from twotower.data.simulator.impressions import draw_lists
from twotower.data.simulator.town import END_S, WEEK_S, Truth
from twotower.data.simulator.visits import Visits, draw_visits
from twotower.errors import ConfigError
from twotower.schema import DAY_S, TRUTH_FILE
from twotower.utils.types import Array

__all__ = ["Truth", "simulate"]

Rng = np.random.Generator
BLOCK = 100_000  # rows of text in memory
TIP_SHARE = 0.12
PREFIX = "yelp_academic_dataset_"
COMPLIMENTS = ("hot", "more", "profile", "cute", "list", "note", "plain", "cool", "funny", "writer", "photos")


def simulate(
    out: Path,
    *,
    users: int = 3000,
    businesses: int = 1500,
    events: int = 60_000,
    seed: int = 0,
    impressions: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Simulate a town from 2010 to January 2022, write it to the folder `out`, and return the numbers of rows.

    Parameters
    ----------
    out
        Folder for the raw files and town_truth.safetensors (see `Truth.load`). Created if missing; files are overwritten.
    users, businesses, events
        Numbers to simulate. `events` counts reviews and tips, at least one per user; anonymous check-ins are additional.
    seed
        At least 0.
    impressions
        Also write the lists that were shown to users (see `impressions`), and a tip for each choice from a list. The other rows are
        the same without them.
    progress
        Called with (events done, events); drawing counts for one half and writing for the other.

    Returns
    -------
    dict
        Rows written: "businesses", "users", "reviews", "tips", "checkins" (visits, not lines), and "impressions" if there are any.

    Raises
    ------
    ConfigError
        A size is too small, or `out` is a file.
    """
    _check(out, users, businesses, events, seed)
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    truth = build_town(users, businesses, rng)
    tell = progress or (lambda _done, _total: None)
    visits = _draw(truth, events, rng, tell)
    is_tip = rng.random(events) < TIP_SHARE
    with (out / f"{PREFIX}review.json").open("wb") as reviews, (out / f"{PREFIX}tip.json").open("wb") as tips:
        _write_visits(truth, visits, is_tip, reviews, tips, rng, tell)
    with (out / f"{PREFIX}checkin.json").open("wb") as file:
        checkins = _write_checkins(truth, visits, file, rng)
    with (out / f"{PREFIX}business.json").open("w", encoding="utf-8") as file_of_text:
        file_of_text.writelines(business_lines(truth, *_count_and_mean(visits.item, visits.stars, ~is_tip, businesses), rng))
    with (out / f"{PREFIX}user.json").open("wb") as file:
        _write_users(truth, visits, *_count_and_mean(visits.user, visits.stars, ~is_tip, users), file, rng)
    truth.save(out / TRUTH_FILE)
    (out / f"{PREFIX}impression.json").unlink(missing_ok=True)  # of another town in the same folder
    impression_counts = _write_lists(truth, visits, out, np.random.default_rng([seed, 1])) if impressions else {}
    tell(events, events)
    n_tips = int(is_tip.sum()) + impression_counts.pop("choices", 0)
    return {
        "businesses": businesses,
        "users": users,
        "reviews": int((~is_tip).sum()),
        "tips": n_tips,
        "checkins": checkins,
        **impression_counts,
    }


def _check(out: Path, users: int, businesses: int, events: int, seed: int) -> None:
    for name, value, least in (("users", users, 1), ("businesses", businesses, 50), ("events", events, users), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            why = " (every user has at least one)" if name == "events" else ""
            raise ConfigError(f"--{name} {value!r} is not allowed. It must be a whole number of at least {least}{why}.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file. A town is written to a folder. Choose another --out.")


def _draw(truth: Truth, events: int, rng: Rng, tell: Callable[[int, int], None]) -> Visits:
    """Draw all visits into preallocated arrays, sorted by (user, time)."""
    whole = Visits(np.empty(events, np.int32), np.empty(events, np.int32), np.empty(events, np.int64), np.empty(events, np.int8))
    done = 0
    for piece in draw_visits(truth, events, rng):
        stop = done + len(piece.user)
        for name in ("user", "item", "time_s", "stars"):
            getattr(whole, name)[done:stop] = getattr(piece, name)
        done = stop
        tell(done // 2, events)
    return whole


def _write_visits(
    truth: Truth, visits: Visits, is_tip: Array, reviews: BinaryIO, tips: BinaryIO, rng: Rng, tell: Callable[[int, int], None]
) -> None:
    """Write reviews and tips in a random order, block by block."""
    order = rng.permutation(len(visits.user)).astype(np.int32 if len(visits.user) < 2**31 else np.int64)
    texts = _Texts(truth)
    for start in range(0, len(order), BLOCK):
        for tip, file in ((False, reviews), (True, tips)):
            at = order[start : start + BLOCK]
            at = at[is_tip[at] == tip]
            item, stars, time_s = visits.item[at], visits.stars[at], visits.time_s[at]
            if tip:
                _write_tips(truth, visits.user[at], item, time_s, file, texts, rng)
                continue
            parts = ['{"review_id": "', _strings(random_ids(len(at), rng)), '", "user_id": "']
            parts += [_strings(truth.user_id[visits.user[at]]), '", "business_id": "', _strings(truth.item_id[item])]
            parts += ['", "stars": ', _take([f"{s}.0" for s in range(6)], stars)]
            for name, rate in (("useful", 0.5), ("funny", 0.3), ("cool", 0.35)):
                parts += [f', "{name}": ', _rare(len(at), rate, rng)]
            parts += [', "text": "', *texts.review(item, stars, time_s, rng), '", "date": "', _dates(time_s), '"}\n']
            _write(file, len(at), parts)
        tell((len(order) + min(len(order), start + BLOCK)) // 2, len(order))


class _Texts:
    """Text of reviews and tips, in columns that `_write` joins; words follow category, taste, price and stars."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.nouns = [word for category in words.categories() for word in category.words]  # four for each category

    def review(self, item: Array, stars: Array, time_s: Array, rng: Rng) -> list[Any]:
        """Return an opening, two words of the category, a style, a price and a closing."""
        n, level = len(item), stars.astype(np.int64) - 1
        first, second = rng.integers(0, 4, (2, n))
        praise = [[pair[side] for pair in row] for row in words.PRAISE for side in (0, 1)]
        pick = rng.random(n)
        again = rng.random(n)
        dimension = rng.integers(0, len(words.STYLE), n)
        end = dimension * 2 + (self.truth.item_latent[item, dimension] > 0)
        styles = [row for pair in words.STYLE for row in pair]
        price = self.truth.item_price[item].astype(np.int64)
        return [
            _take(words.OPENINGS, rng.integers(0, len(words.OPENINGS), n)),
            _pick(praise, level * 2, pick), self._noun(item, first), _pick(praise, level * 2 + 1, pick), " ",
            _pick(praise, level * 2, again), self._noun(item, second), _pick(praise, level * 2 + 1, again), " ",
            _pick(styles, end, rng.random(n)), " Came with ",
            _take([str(k) for k in range(1, 13)], rng.integers(0, 12, n)), " on a ",
            _take(("Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"), time_s // DAY_S % 7), ". ",
            _pick(words.PRICE, price, rng.random(n)), " ", _pick(words.CLOSINGS, level, rng.random(n)),
        ]  # fmt: skip

    def tip(self, item: Array, rng: Rng) -> list[Any]:
        """Return one sentence about a word of the category."""
        n = len(item)
        return [
            _take(words.TIPS, rng.integers(0, len(words.TIPS), n)),
            self._noun(item, rng.integers(0, 4, n)),
            _take(words.TIP_ENDS, rng.integers(0, len(words.TIP_ENDS), n)),
        ]

    def _noun(self, item: Array, which: Array) -> pa.Array:
        return _take(self.nouns, self.truth.item_category[item] * 4 + which)


def _write_checkins(truth: Truth, visits: Visits, file: BinaryIO, rng: Rng) -> int:
    """Write anonymous check-ins: copies of visits, up to eight weeks later at about the same hour, while the item is open."""
    shadow = np.flatnonzero(rng.random(len(visits.user)) < 0.5)
    item = visits.item[shadow]
    time_s = visits.time_s[shadow] + rng.integers(1, 9, len(shadow)) * WEEK_S + rng.integers(-1800, 1800, len(shadow))
    keep = time_s < np.minimum(truth.item_close_s[item], END_S)
    item, time_s = item[keep], time_s[keep]
    order = np.lexsort((time_s, item))
    item, time_s = item[order], time_s[order]
    edges = np.searchsorted(item, np.arange(len(truth.item_id) + 1))
    start = 0
    while start < len(truth.item_id):  # items whose check-ins fill a block
        stop = max(start + 1, int(np.searchsorted(edges, edges[start] + BLOCK, side="right")) - 1)
        a, b = edges[start], edges[stop]
        dates = pa.ListArray.from_arrays(pa.array((edges[start : stop + 1] - a).astype(np.int32)), _dates(time_s[a:b]))
        has = np.flatnonzero(np.diff(edges[start : stop + 1]) > 0)
        parts = [
            '{"business_id": "',
            _strings(truth.item_id[start:stop][has]),
            '", "date": "',
            pc.binary_join(dates, ", ").take(pa.array(has)),
            '"}\n',
        ]
        _write(file, len(has), parts)
        start = stop
    return len(item)


def _write_lists(truth: Truth, visits: Visits, out: Path, rng: Rng) -> dict[str, int]:
    """Write the shown lists, and a tip for each choice, some minutes later; return the numbers of shown items and of choices."""
    lists = draw_lists(truth, visits, rng)
    request, picked = random_ids(len(lists.user), rng), np.flatnonzero(lists.chosen >= 0)
    item, time_s = lists.item[picked, lists.chosen[picked]], lists.time_s[picked] + rng.integers(30, 600, len(picked))
    with (out / f"{PREFIX}tip.json").open("ab") as tips:
        _write_tips(truth, lists.user[picked], item, time_s, tips, _Texts(truth), rng)
    row, column = np.nonzero(lists.item >= 0)
    with (out / f"{PREFIX}impression.json").open("wb") as file:
        for start in range(0, len(row), BLOCK):
            at, place = row[start : start + BLOCK], column[start : start + BLOCK]
            parts: list[Any] = [
                '{"request_id": "',
                _strings(request[at]),
                '", "user_id": "',
                _strings(truth.user_id[lists.user[at]]),
            ]
            parts += ['", "business_id": "', _strings(truth.item_id[lists.item[at, place]]), '", "position": ', _numbers(place + 1)]
            parts += [', "chosen": ', _take(["false", "true"], lists.chosen[at] == place)]
            parts += [', "date": "', _dates(lists.time_s[at]), '"}\n']
            _write(file, len(at), parts)
    return {"impressions": len(row), "choices": len(picked)}


def _write_tips(truth: Truth, user: Array, item: Array, time_s: Array, file: BinaryIO, texts: _Texts, rng: Rng) -> None:
    parts = ['{"user_id": "', _strings(truth.user_id[user]), '", "business_id": "', _strings(truth.item_id[item])]
    parts += ['", "text": "', *texts.tip(item, rng)]
    parts += ['", "date": "', _dates(time_s), '", "compliment_count": ', _rare(len(item), 0.03, rng), "}\n"]
    _write(file, len(item), parts)


def _write_users(truth: Truth, visits: Visits, count: Array, mean: Array, file: BinaryIO, rng: Rng) -> None:
    n_users = len(truth.user_id)
    ends = np.searchsorted(visits.user, np.arange(n_users + 1))
    first, last = (visits.time_s[at].astype("M8[s]").astype("M8[Y]").astype(np.int64) + 1970 for at in (ends[:-1], ends[1:] - 1))
    for a in range(0, n_users, BLOCK // 5):
        b = min(n_users, a + BLOCK // 5)
        n, activity = b - a, count[a:b]
        parts: list[Any] = [
            '{"user_id": "',
            _strings(truth.user_id[a:b]),
            '", "name": "',
            _take(words.FIRST_NAMES, rng.integers(0, len(words.FIRST_NAMES), n)),
        ]
        parts += ['", "review_count": ', _numbers(activity), ', "yelping_since": "', _dates(truth.user_join_s[a:b]), '"']
        for name in ("useful", "funny", "cool"):
            parts += [f', "{name}": ', _numbers(rng.poisson(activity * 0.7))]
        parts += [', "elite": "', _elite(first[a:b], last[a:b], activity, rng), '", "friends": "', _friends(truth, a, b, rng)]
        parts += [
            '", "fans": ',
            _numbers(rng.poisson(activity * 0.05)),
            ', "average_stars": ',
            _take([f"{k / 100:.2f}" for k in range(501)], np.rint(mean[a:b] * 100)),
        ]
        for name in COMPLIMENTS:
            parts += [f', "compliment_{name}": ', _numbers(rng.poisson(activity * 0.04))]
        _write(file, n, [*parts, "}\n"])


def _count_and_mean(row: Array, stars: Array, counted: Array, n: int) -> tuple[Array, Array]:
    """Return number and mean of the stars of rows 0 … n - 1, over the whole release."""
    count = np.bincount(row, counted, n).astype(np.int64)
    return count, np.bincount(row, stars * counted, n) / np.maximum(count, 1)


def _elite(first: Array, last: Array, activity: Array, rng: Rng) -> pa.Array:
    """Return elite years for one active user in three: the years after the first visit; 2020 is "20,20", as in the release."""
    chosen = (activity >= 15) & (last > first) & (rng.random(len(first)) < 0.35)
    years = range(2010, 2024)
    spans = ["", *(",".join("20,20" if y == 2020 else str(y) for y in range(low, high + 1)) for low in years for high in years)]
    return _take(spans, np.where(chosen, 1 + (first + 1 - 2010) * len(years) + np.minimum(last, 2023) - 2010, 0))


def _friends(truth: Truth, start: int, stop: int, rng: Rng) -> pa.Array:
    """Return "None" for two users in five, else a list of other users; a few lists have thousands."""
    n, total = stop - start, len(truth.user_id)
    many = np.where(rng.random(n) < 0.4, 0, np.minimum(1 + 6 * rng.pareto(1.3, n), min(5_000, total - 1))).astype(np.int64)
    many = np.minimum(many, total - 1)
    offsets = np.r_[0, np.cumsum(many)]
    step = np.arange(offsets[-1]) - np.repeat(offsets[:-1], many)
    who = (np.repeat(np.arange(start, stop) + 1, many) + step) % total
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), _strings(truth.user_id[who]).cast(pa.large_string()))
    return pc.if_else(
        pa.array(many > 0), pc.binary_join(lists, pa.scalar(", ", pa.large_string())), pa.scalar("None", pa.large_string())
    ).cast(pa.string())


def _write(file: BinaryIO, n: int, parts: list[Any]) -> None:
    """Join columns (Arrow strings of length n, or constants) row by row and write the bytes."""
    if n:
        joined = pc.binary_join_element_wise(*(pa.scalar(part) if isinstance(part, str) else part for part in parts), "")
        for chunk in joined.chunks if isinstance(joined, pa.ChunkedArray) else [joined]:
            file.write(chunk.buffers()[2])


def _strings(ids: Array) -> pa.StringArray:
    """Return fixed-width bytes as Arrow strings, without a copy per row."""
    width = ids.dtype.itemsize
    offsets = np.arange(len(ids) + 1, dtype=np.int32) * width
    return pa.StringArray.from_buffers(len(ids), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(ids)))


def _take(values: Any, index: Array) -> pa.Array:
    return pa.array(list(values), pa.string()).take(pa.array(np.asarray(index, np.int64)))


def _pick(rows: Any, row: Array, u: Array) -> pa.Array:
    """Return, from list `row` of `rows`, the entry at the share `u` of its length."""
    lengths = np.array([len(values) for values in rows])
    start = np.cumsum(lengths) - lengths
    return _take([value for values in rows for value in values], start[row] + (u * lengths[row]).astype(np.int64))


def _dates(time_s: Array) -> pa.Array:
    return pa.array(time_s.astype("M8[s]")).cast(pa.string())


def _numbers(values: Array) -> pa.Array:
    return pa.array(values.astype(np.int64)).cast(pa.string())


def _rare(n: int, rate: float, rng: Rng) -> pa.Array:
    return _numbers(rng.geometric(1 / (1 + rate), n) - 1)
