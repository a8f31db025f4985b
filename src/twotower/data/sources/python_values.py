"""Read values as Python prints them: literals, and the names and calls that `repr` writes, such as nan and datetime(2024, 5, 1)."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

_NAMES: dict[str, Any] = {"nan": None, "NaN": None, "NaT": None, "NA": None, "null": None, "true": True, "false": False}
_NAMES |= {"inf": math.inf, "Infinity": math.inf, "utc": UTC, "UTC": UTC}


def _first(value: Any, *_: Any, **__: Any) -> Any:
    """Return the value inside a number, id, array or list of NumPy, pandas, MongoDB or the standard library."""
    return value


def _timestamp(text: str, tz: Any = None, **_: Any) -> str:
    """Return what pandas prints, with its offset in the text; a zone beside a text without one is added."""
    zoned = tz is None or datetime.fromisoformat(text).tzinfo is not None
    return text if zoned else datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(str(tz))).isoformat()


_CALLS: dict[str, Callable[..., Any]] = {
    **{"datetime": datetime, "date": date, "timedelta": timedelta, "timezone": timezone, "ZoneInfo": lambda key: ZoneInfo(key)},
    **{"Timestamp": _timestamp, "tzutc": lambda: UTC, "Decimal": Decimal, "UUID": UUID, "OrderedDict": dict, "dict": dict},
    **{"set": set, "frozenset": frozenset, "list": list, "tuple": tuple, "str": str, "int": int, "float": float},
    **dict.fromkeys(("array", "deque", "ObjectId", "ISODate", "NumberLong", "NumberInt", "str_", "bool_", "Int64"), _first),
    **dict.fromkeys((f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)), _first),
}


def python_value(text: str) -> Any:
    """Return the value that Python prints as `text`. Nothing is executed: only the known names and calls are values.

    NaN, NaT and null are None. Dates, times, decimals and UUIDs become texts.

    Raises
    ------
    ValueError
        The text is something else.

    Examples
    --------
    >>> python_value("{'a': nan, 'b': datetime.datetime(2024, 5, 1, 18, 30), 'c': array([1, 2])}")
    {'a': None, 'b': '2024-05-01T18:30:00', 'c': [1, 2]}
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
        if "..." in text and any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(tree)):
            raise ValueError("it was shortened")
        try:
            return ast.literal_eval(tree)
        except ValueError:
            return _value(tree.body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError, ArithmeticError, KeyError, OSError) as error:
        raise ValueError(f"is not a value of Python: {type(error).__name__}") from None


def _value(node: ast.expr) -> Any:
    found = _raw(node)
    if isinstance(found, (datetime, date)):
        return found.isoformat()
    if isinstance(found, float) and not math.isfinite(found):
        return None if math.isnan(found) else str(found)  # JSON has neither
    return str(found) if isinstance(found, (Decimal, UUID)) else found


def _raw(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.Name(name) | ast.Attribute(attr=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, operand):
            return -_raw(operand) if isinstance(sign, ast.USub) else _raw(operand)
        case ast.List(parts):
            return [_value(part) for part in parts]
        case ast.Tuple(parts):
            return tuple(_value(part) for part in parts)
        case ast.Set(parts):
            return {_value(part) for part in parts}
        case ast.Dict(keys, values) if None not in keys:
            return {_value(key): _value(value) for key, value in zip(keys, values, strict=True) if key is not None}
        case ast.Call(ast.Name(name) | ast.Attribute(attr=name), arguments, named) if name in _CALLS:
            words = {word.arg: _raw(word.value) for word in named if word.arg and word.arg != "dtype"}
            return _CALLS[name](*(_raw(argument) for argument in arguments), **words)
    raise ValueError(ast.dump(node)[:60])
