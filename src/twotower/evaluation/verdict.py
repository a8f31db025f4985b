"""Summarise an evaluation in one or two sentences: better than a baseline, worse, or a tie.

"Better" means that the 95 % interval of the difference is above zero, "worse" that it is below zero. Otherwise the verdict is
a tie. The oracle is an upper bound and is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping

from twotower.utils.documents import Interval

MAIN = "two-tower"
"""Name of the model among the systems of a report."""
TITLES = {
    "popular": "popularity",
    "recent": "recent popularity",
    "nearby": "nearby popularity",
    "repeat": "last items",
    "transitions": "next after the last",
    "item_knn": "item-kNN",
    "content_knn": "content-kNN",
    "ease": "EASE",
    "ials": "iALS",
    "oracle": "the oracle",
}
"""Display names; other systems have their own name."""


def verdict(figures: Mapping[str, float], differences: Mapping[str, Mapping[str, Interval]], main: str, metric: str) -> str:
    """Return the verdict: the main system against the best baseline, and against iALS if that is another one.

    Parameters
    ----------
    figures
        Value of `metric` for every system.
    differences
        Main minus every other system, with intervals: {system: {metric: interval}}.

    Examples
    --------
    >>> gaps = {"ease": {"NDCG@10": Interval(value=0.014, low=-0.001, high=0.031)}}
    >>> verdict({"two-tower": 0.064, "ease": 0.05}, gaps, "two-tower", "NDCG@10")
    'A tie with EASE, the best baseline (+0.0140 NDCG@10; the interval crosses zero).'
    """
    rivals = sorted((name for name in figures if name != "oracle" and not _same(name, main)), key=lambda name: -figures[name])
    if main not in figures:
        best = f"The best baseline is {title(rivals[0])} ({figures[rivals[0]]:.4f} {metric})" if rivals else "Nothing else ran"
        return f"No model was evaluated. {best}."
    if not rivals:
        return f"{main} reaches {figures[main]:.4f} {metric}. No baseline was evaluated."
    sentences = [_sentence(rivals[0], ", the best baseline", differences, metric)]
    if "ials" in rivals[1:]:
        sentences.append(_sentence("ials", "", differences, metric))
    return " ".join(sentences)


def _sentence(rival: str, role: str, differences: Mapping[str, Mapping[str, Interval]], metric: str) -> str:
    d = differences[rival][metric]
    value, low, high = (f"{x:+.4f}".replace("-", "−") for x in (d.value, d.low, d.high))
    if d.low <= 0 <= d.high:
        return f"A tie with {title(rival)}{role} ({value} {metric}; the interval crosses zero)."
    return f"{'Better' if d.low > 0 else 'Worse'} than {title(rival)}{role} ({value} {metric}; 95 % interval {low} to {high})."


def refreshed(main: str, days: float) -> str:
    """Return the name of the main system with an index that is rebuilt every `days` days."""
    return f"{main}, refreshed every {days:g} days"


def _same(name: str, main: str) -> bool:
    """Return True if a system is the main one, with or without a refreshed index: it is not compared with itself."""
    return name == main or name.startswith(f"{main}, refreshed")


def title(name: str) -> str:
    """Return the display name of a system."""
    return TITLES.get(name, name)
