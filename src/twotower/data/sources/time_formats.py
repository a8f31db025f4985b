"""Find the format of times from examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product

from twotower.data.sources.times import FIRST_EPOCH_S, parse_time

ISO = re.compile(
    r"^\d{4}-\d{1,2}-\d{1,2}([T ]\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?( ?[AaPp][Mm])?"
    r"( ?(Z|[A-Z]{2,5}|(UTC|GMT)?[+-]\d{2}(:?\d{2})?|[A-Z][a-z]+/[A-Z][A-Za-z_]+))?)?$"
)
DATES = (
    *("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y/%m/%d", "%Y.%m.%d", "%Y %m %d"),
    *("%d.%m.%y", "%d/%m/%y", "%m/%d/%y", "%d-%m-%y", "%m-%d-%y", "%d-%b-%Y", "%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y"),
    *("%d-%b-%y", "%m %d, %Y", "%Y年%m月%d日", "%d. %B %Y", "%a, %d %b %Y", "%A, %d %B %Y", "%b %d %Y"),
)
CLOCKS = (
    "",
    " %H:%M",
    " %H:%M:%S",
    " %H:%M:%S.%f",
    " %I:%M %p",
    " %I:%M:%S %p",
    " %H:%M:%S %z",
    "T%H:%M:%S",
    ", %H:%M",
    ", %I:%M %p",
)
WHOLE = ("%a %b %d %H:%M:%S %z %Y", "%a %b %d %H:%M:%S %Y", "%d/%b/%Y:%H:%M:%S %z", "%Y%m%dT%H%M%S", "%Y%m%dT%H%M%SZ")
EPOCHS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
FROM_S, TO_S = 788_918_400, 1_893_456_000  # 1995 to 2030: what epoch seconds of events are expected to be
TRIED = 200


@dataclass(frozen=True)
class TimeFormat:
    """Format of a column of times.

    Attributes
    ----------
    what
        In words: "ISO dates", "epoch seconds", "numbers like 20230109", or the strptime format.
    formats
        strptime formats that read all values; empty if the reader needs none. More than one: the values do not tell them apart.
    """

    what: str
    formats: tuple[str, ...] = ()


def time_format_of_texts(values: Sequence[str]) -> TimeFormat | None:
    """Return the format of texts; None if they are no times.

    Examples
    --------
    >>> time_format_of_texts(["31.01.2023 08:15", "01.02.2023 09:00"])
    TimeFormat(what='%d.%m.%Y %H:%M', formats=('%d.%m.%Y %H:%M',))
    >>> time_format_of_texts(["03/04/2023"]).formats
    ('%d/%m/%Y', '%m/%d/%Y')
    """
    tried = list(dict.fromkeys(values))[:TRIED]
    if not tried:
        return None
    if _most(ISO.match(value) is not None for value in tried):
        return TimeFormat("ISO dates" if all(len(value) <= 10 for value in tried) else "ISO times")
    if not any(c.isdigit() for c in tried[0]):
        return None
    if _most(_certain(value) for value in tried):
        return TimeFormat("times")
    candidates = [*WHOLE, *(date + clock for date, clock in product(DATES, CLOCKS))]
    fits = tuple(form for form in candidates if _parses(tried[0], form) and _most(_parses(value, form) for value in tried))
    if any("%y" not in form for form in fits):
        fits = tuple(form for form in fits if "%y" not in form)
    fits = tuple(form for form in fits if not ("%B" in form and form.replace("%B", "%b") in fits))
    return TimeFormat(fits[0], fits) if fits else None


def time_format_of_numbers(values: Sequence[float], *, named: bool) -> TimeFormat | None:
    """Return how whole numbers are written as times, or None; `named`: the column is called like a time.

    Examples
    --------
    >>> time_format_of_numbers([978300019, 1046454590], named=True).what
    'epoch seconds'
    >>> time_format_of_numbers([20180920, 20200922], named=True).what
    'numbers like 20180920'
    >>> time_format_of_numbers([202309], named=True).formats
    ('%Y%m',)
    """
    low, high = min(values), max(values)
    for unit, factor in EPOCHS.items():
        if (FIRST_EPOCH_S if named else FROM_S) * factor <= low and high <= TO_S * factor:
            return TimeFormat(f"epoch {unit}")
    some = [str(int(value)) for value in list(dict.fromkeys(values))[:TRIED]]
    form = {6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}.get(len(some[0]))
    if form and (named or form == "%Y%m%d") and _most(len(text) == len(some[0]) and _parses(text, form) for text in some):
        return TimeFormat(form, (form,)) if form == "%Y%m" else TimeFormat(f"numbers like {some[0]}")
    return None


def _certain(value: str) -> bool:
    """Return True if the reader knows the form without a `time_format`."""
    try:
        parse_time(value)
    except ValueError:
        return False
    return True


def _parses(value: str, form: str) -> bool:
    try:
        datetime.strptime(value.strip(), form)
    except ValueError:
        return False
    return True


def _most(flags: object) -> bool:
    found = list(flags)  # type: ignore[call-overload]
    return bool(found) and sum(found) >= 0.98 * len(found)
