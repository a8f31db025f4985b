"""One sentence that says whether the model is worth having.

Enters: the figures of all systems and the intervals of the differences. Leaves: the verdict. Promised: "better" only where the
whole 95 % interval is above zero; the oracle, which no system can match, is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping

from twotower.evaluation.bootstrap import Interval

TITLES = {
    "popular": "popularity",
    "recent": "recent popularity",
    "nearby": "nearby popularity",
    "repeat": "repeat visits",
    "item_knn": "item-kNN",
    "content_knn": "content-kNN",
    "ease": "EASE",
    "ials": "iALS",
    "oracle": "the oracle",
}
"""Names for people; a system that is not here goes by its own."""


def verdict(figures: Mapping[str, float], differences: Mapping[str, Mapping[str, Interval]], main: str, metric: str) -> str:
    """One sentence: the main system against the best baseline, and against iALS when that is another one.

    `figures` holds `metric` of every system, `differences` main minus each other one.
    """
    rivals = sorted((name for name in figures if name != "oracle" and not _same(name, main)), key=lambda name: -figures[name])
    if main not in figures:
        best = f"the best baseline is {title(rivals[0])} with {figures[rivals[0]]:.4f} {metric}" if rivals else "nothing else ran"
        return f"No model was judged; {best}."
    if not rivals:
        return f"{main} reaches {figures[main]:.4f} {metric}; no baseline was judged."
    clauses = [_clause(rivals[0], ", the best baseline,", differences, metric)]
    if "ials" in rivals[1:]:
        clauses.append(_clause("ials", "", differences, metric))
    return f"{main} is {', and '.join(clauses)}."


def _clause(rival: str, role: str, differences: Mapping[str, Mapping[str, Interval]], metric: str) -> str:
    d = differences[rival][metric]
    low, high = (f"{x:.4f}".replace("-", "−") for x in (d["low"], d["high"]))
    interval = f"95 % interval {low} to {high}"
    if d["low"] > 0:
        return f"better than {title(rival)}{role} by {d['value']:.4f} {metric}, {interval}"
    sign = "lower" if d["value"] < 0 else "higher"
    return f"not better than {title(rival)}{role.rstrip(',')}: {sign} by {abs(d['value']):.4f} {metric}, {interval}"


def refreshed(main: str, days: float) -> str:
    """Return the name of the main system whose index is made anew every so many days."""
    return f"{main}, refreshed every {days:g} days"


def _same(name: str, main: str) -> bool:
    """Return whether a system is the main one, or the main one refreshed: no rival of itself."""
    return name == main or name.startswith(f"{main}, refreshed")


def title(name: str) -> str:
    return TITLES.get(name, name)
