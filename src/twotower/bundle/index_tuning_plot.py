"""Plot recall against latency as a self-contained SVG file, for light and dark themes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from twotower.bundle.index_tuning import Measured

_LEFT, _TOP, _WIDTH, _HEIGHT = 60, 20, 520, 260
_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed")
_STYLE = (
    "text{font:12px sans-serif;fill:#222}line{stroke:#bbb}.chosen{fill:none;stroke:#222;stroke-width:2}"
    "@media(prefers-color-scheme:dark){svg{background:#16181d}text{fill:#ddd}line{stroke:#555}.chosen{stroke:#ddd}}"
)


def draw(rows: Sequence[Measured], chosen: Measured, recall: float) -> str:
    """Return the SVG: a dot for every setting, sized by its bytes, the requested recall as a line, the choice with a ring."""
    times = [math.log10(max(row.p50_ms, 1e-4)) for row in rows]
    first, last = math.floor(min(times)), math.ceil(max(times) + 1e-9)
    low = min([row.recall for row in rows] + [recall]) - 0.005
    biggest = max(row.bytes for row in rows)

    def x(ms: float) -> float:
        return round(_LEFT + _WIDTH * (math.log10(max(ms, 1e-4)) - first) / (last - first), 1)

    def y(value: float) -> float:
        return round(_TOP + _HEIGHT * (1 - value) / (1 - low), 1)

    kinds = list(dict.fromkeys(row.kind for row in rows))
    parts = [_line(x(10.0**first), y(recall), x(10.0**last), y(recall)), _text(_LEFT + _WIDTH + 6, y(recall) + 4, f"{recall:g}")]
    for power in range(first, last + 1):
        parts += [
            _line(x(10.0**power), _TOP, x(10.0**power), _TOP + _HEIGHT),
            _text(x(10.0**power) - 10, _TOP + _HEIGHT + 18, f"{10.0**power:g}"),
        ]
    for value in (low, (1 + low) / 2, 1.0):
        parts.append(_text(10, y(value) + 4, f"{value:.3f}"))
    for row in rows:
        about = escape(f"{row.kind} {row.settings}: recall {row.recall:.4f}, {row.p50_ms:.3f} ms, {row.bytes:,} bytes")
        radius = 3 + 7 * math.sqrt(row.bytes / biggest)
        position = f'cx="{x(row.p50_ms)}" cy="{y(row.recall)}"'
        colour = _COLOURS[kinds.index(row.kind) % len(_COLOURS)]
        parts.append(f'<circle {position} r="{radius:.1f}" fill="{colour}" fill-opacity="0.7"><title>{about}</title></circle>')
        if row == chosen:
            parts.append(f'<circle class="chosen" {position} r="{radius + 4:.1f}"/>')
    for number, kind in enumerate(kinds):
        at = _LEFT + 80 * number
        parts.append(f'<circle cx="{at}" cy="{_TOP + _HEIGHT + 48}" r="5" fill="{_COLOURS[number % len(_COLOURS)]}"/>')
        parts.append(_text(at + 10, _TOP + _HEIGHT + 52, escape(kind)))
    parts.append(_text(_LEFT, _TOP + _HEIGHT + 34, "x: milliseconds of a single query, one thread; y: recall; dot size: bytes"))
    size = f'viewBox="0 0 {_LEFT + _WIDTH + 50} {_TOP + _HEIGHT + 64}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{_STYLE}</style>{"".join(parts)}</svg>\n'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x}" y="{y}">{text}</text>'
