"""Say in words what a report means: relative differences, and where a simpler system wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower.evaluation.verdict import MAIN, title

MIN_QUERIES = 30  # a slice with fewer says little


def insights(report: Mapping[str, Any]) -> list[str]:
    """Return sentences: the model against every baseline, and the slices that a baseline wins.

    Parameters
    ----------
    report
        As returned by `evaluator.judge`; "slices" may be missing.

    Examples
    --------
    >>> systems = {"two-tower": {"NDCG@10": {"value": 0.12}}, "ease": {"NDCG@10": {"value": 0.1}}}
    >>> insights({"protocol": {"metric": "NDCG@10"}, "systems": systems, "slices": {}})
    ['NDCG@10 is 20 % higher than that of EASE (0.1200 against 0.1000).']
    """
    metric = report["protocol"]["metric"]
    values = {name: figures[metric]["value"] for name, figures in report["systems"].items()}
    if MAIN not in values:
        return []
    own = values[MAIN]
    rivals = sorted((name for name in values if name != "oracle" and not name.startswith(MAIN)), key=lambda name: -values[name])
    sentences = [_against(metric, own, title(name), values[name]) for name in rivals[:3]]
    return [*sentences, *_won_by_others(report.get("slices", {}), rivals, metric)]


def relative(own: float, other: float) -> str:
    """Return how much higher a value is than another one, in words.

    Examples
    --------
    >>> relative(0.09, 0.1), relative(0.1, 0.1)
    ('10 % lower than', 'equal to')
    """
    if other <= 0:
        return "above" if own > 0 else "equal to"
    percent = round(100 * (own / other - 1))
    if percent == 0:
        return "equal to"
    return f"{abs(percent)} % {'higher' if percent > 0 else 'lower'} than"


def _against(metric: str, own: float, name: str, other: float) -> str:
    return f"{metric} is {relative(own, other)} that of {name} ({own:.4f} against {other:.4f})."


def _won_by_others(slices: Mapping[str, Any], rivals: list[str], metric: str) -> list[str]:
    found = []
    for subject, groups in slices.items():
        for group, entry in groups.items():
            ahead = [name for name in rivals if entry["differences"].get(name, {"high": 0.0})["high"] < 0]
            values = {name: entry["systems"][name]["value"] for name in ahead}
            if ahead and entry["queries"] >= MIN_QUERIES:
                best, own = max(ahead, key=lambda name: values[name]), entry["systems"][MAIN]["value"]
                said = f"{title(best)} is better on {subject}, {group} ({values[best]:.4f} {metric} against {own:.4f})."
                found.append((values[best] - own, said))
    return [sentence for _, sentence in sorted(found, reverse=True)[:5]]
