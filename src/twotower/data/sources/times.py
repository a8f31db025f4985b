"""Read times: seconds since 1970 from text and numbers, the same from every format and on every engine.

Two steps read a column. `seconds` is an expression of the engine for the common forms: ISO 8601, and epochs. All other text goes
through `parse_time`, once for each distinct value. A form whose meaning is not certain is refused; `time_format` names it.
"""

from __future__ import annotations

import re
from calendar import timegm
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from functools import cache
from zoneinfo import ZoneInfo

import ibis
import ibis.expr.types as ir

from twotower.errors import ConfigError

FIRST_EPOCH_S = 315_532_800  # 1980: smaller numbers are dates as digits, days of Excel or counters, not epochs
LAST_S = 4_102_444_800  # 2100
SCALES = ((10**11, 1), (10**14, 10**3), (10**17, 10**6), (10**20, 10**9))  # below the first, a number is in the second per second
_PLAIN = r"^[0-9]{4}-[0-9]{2}(-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2})?)?)?$"
_ZONED = (
    r"^([0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?:[.,][0-9]+)? ?(?:Z|UTC|GMT|([+-][0-9]{2}):?([0-9]{2})?)?$"
)
_WHOLE = r"^[0-9]{9,19}([.][0-9]*)?$"
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_FIXED_ZONES = {
    **dict.fromkeys(("z", "utc", "ut", "gmt", "wet"), 0),
    **{"est": -5, "edt": -4, "cst": -6, "cdt": -5, "mst": -7, "mdt": -6, "pst": -8, "pdt": -7},  # RFC 2822
    **{"west": 1, "cet": 1, "cest": 2, "eet": 2, "eest": 3, "msk": 3, "jst": 9},
}


def seconds(text: ir.StringValue) -> ir.IntegerValue:
    """Return seconds since 1970 of ISO 8601 text or an epoch; null for other text. Fractions are rounded down."""
    plain = ibis.ifelse(text.length() == 7, text + ibis.literal("-01"), text)
    stamp = ibis.ifelse(text.re_search(_PLAIN), plain, ibis.null("string")).try_cast("timestamp").epoch_seconds().cast("int64")
    whole = ibis.ifelse(text.re_search(_WHOLE), text.re_extract(r"^[0-9]+", 0), ibis.null("string")).try_cast("int64")
    return stamp.coalesce(_zoned(text)).coalesce(epoch(whole))


def _zoned(text: ir.StringValue) -> ir.IntegerValue:
    """Return the seconds of ISO text with a fraction, or an offset from UTC, which is subtracted."""
    found = ibis.ifelse((text.length() > 16) & text.re_search(_ZONED), text, ibis.null("string"))
    hours, minutes = (found.re_extract(_ZONED, part).try_cast("int64").fill_null(0) for part in (2, 3))
    sign = ibis.ifelse(found.re_extract(_ZONED, 2).startswith("-"), -1, 1)
    base = found.re_extract(_ZONED, 1).nullif("").try_cast("timestamp").epoch_seconds().cast("int64")
    return ibis.ifelse(hours.abs() * 60 + minutes <= 15 * 60, base - hours * 3600 - sign * minutes * 60, ibis.null("int64"))


def epoch(whole: ir.IntegerValue) -> ir.IntegerValue:
    """Return the seconds of an epoch in s, ms, µs or ns, told apart by its magnitude; null if it is no plausible epoch."""
    value = ibis.cases(*((whole < below, _divided(whole, unit)) for below, unit in SCALES[:3]), else_=_divided(whole, SCALES[3][1]))
    hours = whole.between(1_970_010_100, 2_100_123_123)  # may be YYYYMMDDHH: `parse_time` looks at the digits
    return ibis.ifelse(value.between(FIRST_EPOCH_S, LAST_S) & ~hours, value, ibis.null("int64"))


def _divided(whole: ir.IntegerValue, unit: int) -> ir.IntegerValue:
    """Return the quotient rounded down. Engines divide as floats, which round 1577836800999999999 ns up."""
    return ((whole - whole % unit) / unit).round().cast("int64") if unit > 1 else whole


def parse_time(text: str, pattern: str | None = None) -> int:
    """Return the seconds since 1970 of a time in any form whose meaning is certain, or in the form of `pattern`.

    Parameters
    ----------
    text
        The time.
    pattern
        As in Python's `strptime`, with English names; "%s" reads any number as seconds. None: the form is recognised.

    Raises
    ------
    ValueError
        The text is not a time, or is outside 1970 to 2100; the message says why.

    Examples
    --------
    >>> parse_time("Tue Apr 03 18:00:09 +0000 2012"), parse_time("20230109"), parse_time("03.01.2023", "%d.%m.%Y")
    (1333476009, 1673222400, 1672704000)
    """
    text = text.strip()
    found = _matched(text, pattern) if pattern else _recognised(text)
    if found is None:
        expected = f"does not fit time_format {pattern!r}" if pattern else "is not a time"
        raise ValueError(f"{expected}: {text[:60]!r}")
    if not 0 <= found <= LAST_S:
        raise ValueError(f"is {'before 1970' if found < 0 else 'after 2100'}: {text[:60]!r}")
    return found


_DATE = (
    r"(?P<Y>\d{4})(?P<dash>[-/.])(?P<m>\d{1,2})(?P=dash)(?P<d>\d{1,2})",
    r"(?P<Y>\d{4})(?P<m>\d{2})(?P<d>\d{2})",
    r"(?:(?P<a>[A-Za-z]{3,9})\.?,?\s+)?(?P<d>\d{1,2})(?:st|nd|rd|th)?[\s-](?P<b>[A-Za-z]{3,9})\.?,?[\s-](?P<Y>\d{4})",
    r"(?:(?P<a>[A-Za-z]{3,9})\.?,?\s+)?(?P<b>[A-Za-z]{3,9})\.?\s+(?P<d>\d{1,2})(?:st|nd|rd|th)?,?\s+(?P<Y>\d{4})",
)
_CLOCK = r"(?P<H>\d{1,2}):(?P<M>\d{2})(?::(?P<S>\d{2})(?:[.,]\d+)?)?(?:\s*(?P<p>[AaPp])\.?[Mm]\b\.?)?"
_COMPACT = r"(?P<H>\d{2})(?P<M>\d{2})(?:(?P<S>\d{2})(?:[.,]\d+)?)?"
_ZONE = (
    r"(?P<Z>Z|(?:UTC|GMT)?\s?[+-]\d{1,2}(?::?\d{2})?|[A-Za-z][A-Za-z_]*(?:/[A-Za-z0-9_+-]+)*)?(?:\s?[\[(](?P<B>[\w/ +-]+)[\])])?"
)
_FORMS = tuple(
    re.compile(form)
    for date in _DATE
    for form in (date, rf"{date}(?:[T ]|,?\s+){_CLOCK}\s*{_ZONE}", rf"{date}T{_COMPACT}\s*{_ZONE}")
) + tuple(
    re.compile(rf"(?:(?P<a>[A-Za-z]{{3,9}}),?\s+)?(?P<b>[A-Za-z]{{3,9}})\.?\s+(?P<d>\d{{1,2}})\s+{_CLOCK}\s+{zone}(?P<Y>\d{{4}})")
    for zone in ("", _ZONE.removesuffix(r"?(?:\s?[\[(](?P<B>[\w/ +-]+)[\])])?") + r"\s+")
)
_DIGITS = {6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}


def _recognised(text: str) -> int | None:
    number = re.fullmatch(r"(-?\d{1,20})(?:\.\d*)?|-?\d+(?:\.\d*)?[eE]\+?\d{1,2}", text)
    if number:
        return _number(int(number[1]) if number[1] else int(float(text)), text)
    for form in _FORMS:
        match = form.fullmatch(text)
        if match:
            return _joined(match.groupdict())
    return None


def _number(whole: int, text: str) -> int:
    digits = str(whole)
    if whole >= 0 and len(digits) in _DIGITS and len(digits) > 6:
        as_date = _matched(digits, _DIGITS[len(digits)])
        if as_date is not None and 0 <= as_date <= LAST_S:
            return as_date
    value = next((whole // unit for below, unit in SCALES if whole < below), LAST_S + 1)
    if whole < 0 or value >= FIRST_EPOCH_S:
        return value
    raise ValueError(f"is not a plausible time: as seconds it is in {1970 + value // 31_556_952}: {text[:60]!r}")


_PARTS = {
    **{"Y": r"(?P<Y>\d{4})", "m": r"(?P<m>\d{1,2})", "d": r"(?P<d>\d{1,2})", "H": r"(?P<H>\d{1,2})", "M": r"(?P<M>\d{1,2})"},
    **{"S": r"(?P<S>\d{1,2})", "f": r"\d+", "y": r"(?P<y>\d{2})", "I": r"(?P<H>\d{1,2})", "p": r"(?P<p>[AaPp])\.?[Mm]\.?"},
    **{"b": r"(?P<b>[A-Za-z]{3,9})\.?", "B": r"(?P<b>[A-Za-z]{3,9})", "a": r"[A-Za-z]{2,9}\.?", "A": r"[A-Za-z]{3,9}"},
    **{"z": r"(?P<Z>Z|[+-]\d{2}:?\d{2})", "Z": r"(?P<Z>[A-Za-z][\w/+-]*)", "j": r"(?P<j>\d{1,3})", "%": "%"},
}
_SHORT = {"F": "%Y-%m-%d", "T": "%H:%M:%S", "D": "%m/%d/%y", "R": "%H:%M", "e": "%d", "h": "%b"}


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a `strptime` pattern.

    Raises
    ------
    ConfigError
        The pattern has an unknown directive, or no year, or a part twice.
    """
    for short, long in _SHORT.items():
        pattern = pattern.replace(f"%{short}", long)
    parts: list[str] = []
    for literal, directive in re.findall(r"([^%]+)|%(.?)", pattern):
        if not literal and directive not in _PARTS:
            known = ", ".join(f"%{name}" for name in _PARTS)
            raise ConfigError(
                f"data.interactions.time_format {pattern!r} has the unknown directive '%{directive}'. Known: {known}, %s."
            )
        # A pattern's digits stand side by side in "%Y%m%d": then each part has its full width.
        parts.append(re.sub(r"\s+", r"\\s+", re.escape(literal).replace("\\ ", " ")) if literal else _PARTS[directive])
    if not re.search(r"%[YyDF]", pattern):
        raise ConfigError(f"data.interactions.time_format {pattern!r} has no year. Add %Y or %y.")
    whole = "".join(parts)
    if re.search(r"%\w%", pattern):
        whole = whole.replace(r"\d{1,2}", r"\d{2}")
    try:
        return re.compile(whole)
    except re.error:
        raise ConfigError(f"data.interactions.time_format {pattern!r} names a part twice. Name each once.") from None


def check_pattern(pattern: str | None) -> None:
    """Raise `ConfigError` if a `time_format` is invalid."""
    if pattern and pattern != "%s":
        _compiled(pattern)


def _matched(text: str, pattern: str) -> int | None:
    if pattern == "%s":
        return int(float(text)) if re.fullmatch(r"-?\d+(\.\d*)?", text) else None
    match = _compiled(pattern).fullmatch(text)
    return _joined(match.groupdict()) if match else None


def _joined(part: dict[str, str | None]) -> int | None:
    """Return the seconds of the parts of a time; None if they are no date, time and zone."""
    year = int(part.get("Y") or 0) or _century(int(part.get("y") or 0))
    name = (part.get("b") or "")[:3].lower()
    if name and name not in _MONTHS:
        return None
    month = _MONTHS.index(name) + 1 if name else int(part.get("m") or 1)
    hour, half = int(part.get("H") or 0), (part.get("p") or "").lower()
    if half:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + 12 * (half == "p")
    try:
        clock = datetime(year, month, int(part.get("d") or 1), hour, int(part.get("M") or 0), min(int(part.get("S") or 0), 59))
        clock += timedelta(days=int(part["j"] or 1) - 1) if part.get("j") else timedelta()
        zone = _zone(part.get("Z") or part.get("B") or "UTC")
        return None if zone is None else timegm(clock.replace(tzinfo=zone).astimezone(UTC).timetuple())
    except (ValueError, OverflowError):
        return None


def _century(year: int) -> int:
    return year + (1900 if year >= 69 else 2000)


@cache
def _zone(name: str) -> tzinfo | None:
    """Return a zone by offset ("-05:00", "UTC+2"), abbreviation ("EST") or name ("America/New_York"); None if it is unknown."""
    offset = re.fullmatch(r"(?:UTC|GMT)?\s?([+-])(\d{1,2}):?(\d{2})?", name)
    if offset:
        minutes = int(offset[2]) * 60 + int(offset[3] or 0)
        return timezone(timedelta(minutes=minutes if offset[1] == "+" else -minutes)) if minutes <= 15 * 60 else None
    if name.lower() in _FIXED_ZONES:
        return timezone(timedelta(hours=_FIXED_ZONES[name.lower()]))
    try:
        return ZoneInfo(name) if "/" in name else None
    except (KeyError, ValueError, OSError):
        return None
