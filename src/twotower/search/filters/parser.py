"""Parse filters, written as text or as JSON, into a tree. The catalogue is not needed here.

    category == "Mexican" and price <= 2         {"and": [{"category": "Mexican"}, {"price": {"max": 2}}]}
    category in ["Mexican", "Thai"]              {"category": {"any": ["Mexican", "Thai"]}}        a list alone means "any"
    category == "Bars" and category == "Pubs"    {"category": {"all": ["Bars", "Pubs"]}}
    category not in ["Bars"]                     {"category": {"none": ["Bars"]}}
    stars >= 4 and price > 1 and price < 4       {"stars": {"min": 4}, "price": {"above": 1, "below": 4}}
    id in ["a", "b"] and not id == "c"           {"id": {"any": ["a", "b"], "none": ["c"]}}        allow list and deny list
    within(5) or within(27.95, -82.46, 5)        {"or": [{"within": 5}, {"within": {"km": 5, "near": [27.95, -82.46]}}]}
    open_at("Fri 19:30") or open_now             {"or": [{"open": "Fri 19:30"}, {"open": "now"}]}
    not seen                                     {"not": {"seen": true}}, or {"seen": false}
                                                 {"column": "open", "any": [1]}                    a column named like a keyword

All keys of a JSON object must hold; `{}` matches every item. Text is parsed with Python's grammar (`ast.parse`); only the forms
above are accepted, and nothing is executed. Equal filters give equal trees in both notations. Any input gives either a tree of at
most `MAX_PARTS` parts or a `RequestError` with the position of the error.
"""

from __future__ import annotations

import ast
import math
import re
from typing import Any

from twotower.errors import RequestError, nearest
from twotower.search.filters.tree import (
    MAX_QUOTED_CHARS,
    Among,
    And,
    Bound,
    Compared,
    Node,
    Not,
    Open,
    Or,
    Part,
    Seen,
    Value,
    Within,
    check_location,
    hour_of_week,
    join,
    walk,
)

MAX_CHARS = 20_000  # characters of a text; Python's parser is recursive
MAX_PARTS = 256
MAX_DEPTH = 64
BOUNDS: dict[str, Bound] = {"min": ">=", "max": "<=", "above": ">", "below": "<"}
CONDITIONS = ("any", "all", "none", *BOUNDS)
WORDS = ("and", "or", "not", "within", "open", "seen", "column")
"""Keywords of JSON filters. A column with such a name needs the key `column`."""
_COMPARE: dict[type[ast.cmpop], Bound] = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$")


def parse_filter(filter_: str | dict[str, Any]) -> Node:
    """Return the tree of a filter, given as text or as decoded JSON.

    Raises
    ------
    RequestError
        The filter is malformed or too large. The message and its `location` name the part.
    """
    try:
        tree = _Text(filter_).tree() if isinstance(filter_, str) else _json(filter_, "")
    except RecursionError:
        tree = None
    if tree is None or any(number >= MAX_PARTS or depth > MAX_DEPTH for number, (_, depth) in enumerate(walk(tree))):
        raise RequestError(
            f"The filter is too large. It may have at most {MAX_PARTS} parts, nested at most {MAX_DEPTH} deep.", location=""
        )
    return tree


def _within(km: Any, near: tuple[float, float] | None, at: Part) -> Within:
    if km < 0:
        raise RequestError(f"Got the distance {km} in {at}. It must be in km, 0 or more.", location=at.location)
    return Within(float(km), near, at)


def _is_value(value: Any) -> bool:
    return isinstance(value, str) or _is_number(value)


def _is_number(value: Any) -> bool:
    """Return True for a finite number that a float can hold; False for booleans."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


class _Text:
    """Parses one text."""

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        self.before = len(text) - len(text.lstrip())
        self.lines = _LINE.findall(self.text) or [""]

    def tree(self) -> Node:
        """Return the tree of the whole text."""
        if len(self.text) > MAX_CHARS:
            raise RequestError(
                f"The filter has {len(self.text):,} characters; at most {MAX_CHARS:,} are allowed. Write long lists as JSON.",
                location=MAX_CHARS + 1,
            )
        try:
            return self._visit(ast.parse(self.text, mode="eval").body)
        except (SyntaxError, ValueError, MemoryError) as error:
            location = self.before + self._blamed(error) + 1
            quoted = self.text if len(self.text) <= MAX_QUOTED_CHARS else self.text[:MAX_QUOTED_CHARS] + "…"
            reason = getattr(error, "msg", None) or str(error) or "it is nested too deep"
            rule = 'Write filters like `category == "Mexican" and within(5)`.'
            raise RequestError(
                f"Cannot read filter {quoted!r} at character {location}: {reason}. {rule}", location=location
            ) from None

    def _visit(self, node: ast.expr) -> Node:
        if isinstance(node, ast.BoolOp):
            return join(And if isinstance(node.op, ast.And) else Or, [self._visit(value) for value in node.values])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return Not(self._visit(node.operand))
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.left, ast.Name):
            return self._compare(node.left.id, node.ops[0], self._literal(node.comparators[0]), self._part(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._call(node.func.id, [self._literal(value) for value in node.args], self._part(node))
        if isinstance(node, ast.Name) and node.id in ("seen", "open_now"):
            return Seen() if node.id == "seen" else Open(None, self._part(node))
        part = self._part(node)
        raise RequestError(
            f"Found {part}. Allowed in a filter: comparisons, within(…), open_at(…), open_now, seen, and, or, not.",
            location=part.location,
        )

    def _compare(self, name: str, op: ast.cmpop, value: Value | list[Value], part: Part) -> Node:
        if isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn):
            among = Among(name, tuple(value) if isinstance(value, list) else (value,), part)
            return Not(among) if isinstance(op, ast.NotEq | ast.NotIn) else among
        if type(op) in _COMPARE and not isinstance(value, list):
            return Compared(name, _COMPARE[type(op)], value, part)
        raise RequestError(f"Found {part}. Use one of == != in not in < <= > >= with a matching value.", location=part.location)

    def _call(self, name: str, values: list[Any], part: Part) -> Node:
        if name == "within" and len(values) in (1, 3) and all(_is_number(value) for value in values):
            return _within(values[-1], check_location(values[:-1], part) if len(values) == 3 else None, part)
        if name == "open_at" and len(values) == 1 and isinstance(values[0], str):
            return Open(hour_of_week(values[0], part), part)
        raise RequestError(
            f'Found {part}. Allowed calls: within(km), within(latitude, longitude, km), open_at("Fri 19:30").',
            location=part.location,
        )

    def _literal(self, node: ast.expr) -> Any:
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError, MemoryError, OverflowError):
            value = None
        listed = list(value) if isinstance(value, list | tuple | set) else [value]
        if all(_is_value(each) for each in listed):
            return listed if isinstance(value, list | tuple | set) else value
        part = self._part(node)
        raise RequestError(f"Found {part}. A value must be a text in quotes, a number or a list of them.", location=part.location)

    def _part(self, node: ast.expr) -> Part:
        start = self._offset(node.lineno, self._characters(node.lineno, node.col_offset))
        end = self._offset(node.end_lineno, self._characters(node.end_lineno, node.end_col_offset))
        return Part(self.before + start + 1, " ".join(self.text[start : min(end, start + MAX_QUOTED_CHARS)].split()))

    def _characters(self, line: int | None, column: int | None) -> int:
        """Return the characters of a line before a column, which Python's parser counts in bytes."""
        return len(self.lines[(line or 1) - 1].encode()[:column].decode())

    def _blamed(self, error: Exception) -> int:
        if not isinstance(error, SyntaxError):
            return 0
        return self._offset(error.lineno, error.offset - 1) if error.offset else len(self.text)  # 0: the text ends too early

    def _offset(self, line: int | None, column: int) -> int:
        return min(sum(map(len, self.lines[: (line or 1) - 1])) + column, len(self.text))


def _json(node: Any, path: str) -> Node:
    if not isinstance(node, dict):
        raise _wrong('A JSON filter must be an object such as {"price": {"max": 2}}', node, path)
    if "column" in node:
        if not isinstance(node["column"], str):
            raise _wrong("column must be the name of a column", node["column"], _key(path, "column"))
        return _condition(node["column"], {key: value for key, value in node.items() if key != "column"}, path)
    return join(And, [_entry(key, value, _key(path, key)) for key, value in node.items()])


def _entry(key: Any, value: Any, path: str) -> Node:
    if key in ("and", "or"):
        if not isinstance(value, list):
            raise _wrong(f"{key} must be a list of filters", value, path)
        return join(And if key == "and" else Or, [_json(part, f"{path}[{number}]") for number, part in enumerate(value)])
    if key == "not":
        return Not(_json(value, path))
    if key == "seen":
        if not isinstance(value, bool):
            raise _wrong("seen must be true or false", value, path)
        return Seen() if value else Not(Seen())
    if key == "open":
        if not isinstance(value, str):
            raise _wrong('open must be "now" or a time such as "Fri 19:30"', value, path)
        at = Part(path, value)
        return Open(None if value.strip().lower() == "now" else hour_of_week(value, at), at)
    return _around(value, path) if key == "within" else _condition(str(key), value, path)


def _around(value: Any, path: str) -> Node:
    around = value if isinstance(value, dict) else {"km": value}
    for key in around:
        if key not in ("km", "near"):
            inner = _key(path, key)
            raise RequestError(f"Unknown key {inner}. within has the keys km and near.", location=inner)
    at = Part(_key(path, "km") if isinstance(value, dict) else path, "within")
    if not _is_number(km := around.get("km")):
        raise _wrong("The distance of within must be in km, 0 or more", km, str(at.location))
    near = around.get("near")
    inner = _key(path, "near")
    if near is not None and not (isinstance(near, list | tuple) and len(near) == 2 and all(map(_is_number, near))):
        raise _wrong("near must be a list of latitude and longitude", near, inner)
    return _within(km, None if near is None else check_location(near, Part(inner, "near")), at)


def _condition(column: str, value: Any, path: str) -> Node:
    if not isinstance(value, dict):
        return Among(column, _values(value, path), Part(path, column))
    parts: list[Node] = []
    for key, wanted in value.items():
        inner = _key(path, key)
        at = Part(inner, column)
        if key in BOUNDS:
            if not _is_number(wanted):
                raise _wrong(f"{key} must be a number", wanted, inner)
            parts.append(Compared(column, BOUNDS[key], wanted, at))
        elif key == "all":
            parts.append(join(And, [Among(column, (each,), at) for each in _values(wanted, inner)]))
        elif key in CONDITIONS:
            among = Among(column, _values(wanted, inner), at)
            parts.append(among if key == "any" else Not(among))
        else:
            raise RequestError(f"Unknown condition at {inner}.{nearest(str(key)[:MAX_QUOTED_CHARS], CONDITIONS)}", location=inner)
    if not parts:
        raise _wrong(f"A condition must be a value, a list, or an object of {', '.join(CONDITIONS)}", value, path)
    return join(And, parts)


def _values(value: Any, path: str) -> tuple[Value, ...]:
    listed = list(value) if isinstance(value, list | tuple) else [value]
    for number, each in enumerate(listed):
        if not _is_value(each):
            at = f"{path}[{number}]" if isinstance(value, list | tuple) else path
            raise _wrong("A value must be a text, a number or a list of them", each, at)
    return tuple(listed)


def _key(path: str, key: Any) -> str:
    name = str(key)[:MAX_QUOTED_CHARS]
    if not name.isidentifier():
        return f"{path}[{name!r}]"
    return f"{path}.{name}" if path else name


def _wrong(rule: str, found: Any, path: str) -> RequestError:
    plain = isinstance(found, str | bool | float | None) or _is_number(found)
    quoted = repr(found)[:MAX_QUOTED_CHARS] if plain else f"a {type(found).__name__}"
    return RequestError(f"Got {quoted} at {Part(path, '')}. {rule}.", location=path)
