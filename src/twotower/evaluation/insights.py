"""Describe a report in sentences: relative differences, targets that cannot be found, and slices in which a baseline is better."""

from __future__ import annotations

from collections.abc import Mapping

from twotower.evaluation.verdict import MAIN, baselines_of, title
from twotower.utils.documents import Report, ReportSummary, SliceGroup

MIN_USERS = 30
"""A slice of fewer users is too noisy."""
MANY_SEEN = 0.1
"""Share of targets in the histories that is worth a sentence."""


def insights(report: ReportSummary) -> list[str]:
    """Return sentences: the model against the best baselines, targets that cannot be found, and slices that a baseline wins.

    Parameters
    ----------
    report
        A report, or the summary in a bundle, which has no slices.
    """
    metric = report.protocol.metric
    values = {name: figures[metric].value for name, figures in report.systems.items()}
    if MAIN not in values:
        return []
    own, protocol = values[MAIN], report.protocol
    unreachable = seen_targets(protocol.seen_targets, protocol.targets, "test") if protocol.seen == "masked" else []
    rivals = sorted(baselines_of(values, MAIN), key=lambda name: -values[name])
    sentences = [_against(metric, own, title(name), values[name]) for name in rivals[:3]]
    return [*sentences, *unreachable, *(_won_by_others(report.slices, rivals, metric) if isinstance(report, Report) else [])]


def seen_targets(seen: int, targets: int, part: str) -> list[str]:
    """Return a sentence about the targets that are in the history of their query; none if they are fewer than `MANY_SEEN`."""
    if seen < MANY_SEEN * targets or not targets:
        return []
    return [
        f"{100 * seen / targets:.0f} % of the {targets:,} {part} targets are in the history of their query. Lists leave out seen "
        "items, so these targets cannot be found. If users come back to items, set evaluation.exclude_seen: false."
    ]


def relative(own: float, other: float) -> str:
    """Return the relative difference of two values as text.

    Examples
    --------
    >>> relative(0.09, 0.1), relative(0.1, 0.1), relative(0.1001, 0.1)
    ('10 % lower than', 'equal to', 'within 0.5 % of')
    """
    if own == other:
        return "equal to"
    if other <= 0:
        return "above"
    percent = round(100 * (own / other - 1))
    if percent == 0:
        return "within 0.5 % of"
    return f"{abs(percent)} % {'higher' if percent > 0 else 'lower'} than"


def _against(metric: str, own: float, name: str, other: float) -> str:
    return f"{metric} is {relative(own, other)} that of {name} ({own:.4f} against {other:.4f})."


def _won_by_others(slices: Mapping[str, Mapping[str, SliceGroup]], rivals: list[str], metric: str) -> list[str]:
    found = []
    for subject, groups in slices.items():
        for group, entry in groups.items():
            ahead = [name for name in rivals if name in entry.differences and entry.differences[name].high < 0]
            if ahead and entry.users >= MIN_USERS:
                values = {name: entry.systems[name].value for name in (*ahead, MAIN)}
                best, own = max(ahead, key=lambda name: values[name]), values[MAIN]
                text = f"{title(best)} is better on {subject}, {group} ({values[best]:.4f} {metric} against {own:.4f})."
                found.append((values[best] - own, text))
    return [sentence for _, sentence in sorted(found, reverse=True)[:5]]
