"""Summarise an evaluation in a few sentences: better than a baseline, worse, or a tie.

"Better" means that the 95 % interval of the difference is above zero, "worse" that it is below zero. Otherwise the verdict is
a tie. The oracle is an upper bound and is not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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


Differences = Mapping[str, Mapping[str, Interval]]
"""A system minus others: {other system: {metric: interval}}."""


def verdict(
    figures: Mapping[str, float], differences: Differences, main: str, metric: str, refreshed_differences: Differences | None = None
) -> str:
    """Return the verdict: the main system against the best baseline, against iALS, and every other baseline that is better.

    Parameters
    ----------
    figures
        Value of `metric` for every system.
    differences
        Main minus every other system.
    refreshed_differences
        Main with a refreshed index minus every other system: a sentence about the best baseline. None: not evaluated.

    Examples
    --------
    >>> gaps = {"ease": {"NDCG@10": Interval(value=0.014, low=-0.001, high=0.031)}}
    >>> verdict({"two-tower": 0.064, "ease": 0.05}, gaps, "two-tower", "NDCG@10")
    'A tie with EASE, the best baseline (+0.0140 NDCG@10; the interval includes zero).'
    """
    rivals = sorted(baselines_of(figures, main), key=lambda name: -figures[name])
    if main not in figures:
        best = f"The best baseline is {title(rivals[0])} ({figures[rivals[0]]:.4f} {metric})" if rivals else "Nothing else ran"
        return f"No model was evaluated. {best}."
    if not rivals:
        return f"{main} reaches {figures[main]:.4f} {metric}. No baseline was evaluated."
    told = [rivals[0]] if "ials" not in rivals[1:] else [rivals[0], "ials"]
    sentences = [_sentence(name, ", the best baseline" if name == rivals[0] else "", differences, metric) for name in told]
    if ahead := [title(name) for name in rivals if name not in told and differences[name][metric].high < 0]:
        also = any(sentence.startswith("Worse") for sentence in sentences)
        sentences.append(f"{'Also worse' if also else 'Worse'} than {_listed(ahead)}.")
    if refreshed_differences:
        sentence = _sentence(rivals[0], "", refreshed_differences, metric)
        sentences.append(f"With a refreshed index: {sentence[0].lower()}{sentence[1:]}")
    return " ".join(sentences)


def _sentence(rival: str, role: str, differences: Differences, metric: str) -> str:
    d = differences[rival][metric]
    if d.low == d.high == 0:
        return f"A tie with {title(rival)}{role} (no difference in {metric})."
    if d.low <= 0 <= d.high:
        return f"A tie with {title(rival)}{role} ({signed(d.value)} {metric}; the interval includes zero)."
    interval = f"95 % interval {signed(d.low)} to {signed(d.high)}" if d.low < d.high else "the same for every user: no interval"
    sizes = f"{signed(d.value)} {metric}; {interval}"
    return f"{'Better' if d.low > 0 else 'Worse'} than {title(rival)}{role} ({sizes})."


def signed(value: float) -> str:
    """Return a difference with its sign and four decimals; with up to six if fewer would show zero.

    Examples
    --------
    >>> signed(-0.01234), signed(0.00003), signed(0.0)
    ('−0.0123', '+0.00003', '+0.0000')
    """
    decimals = next((n for n in (4, 5, 6) if round(value, n)), 4)
    return f"{value:+.{decimals}f}".replace("-", "−")


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def refreshed(main: str, days: float) -> str:
    """Return the name of the main system with an index that is rebuilt every `days` days.

    Examples
    --------
    >>> refreshed("two-tower", 1), refreshed("two-tower", 7.0)
    ('two-tower, refreshed every day', 'two-tower, refreshed every 7 days')
    """
    return f"{main}, refreshed every {'day' if days == 1 else f'{days:g} days'}"


def baselines_of(names: Iterable[str], main: str) -> list[str]:
    """Return the systems that the main one is judged by: neither itself, also refreshed, nor the oracle."""
    return [name for name in names if name not in (main, "oracle") and not is_refreshed(name, main)]


def is_refreshed(name: str, main: str) -> bool:
    """Return True if a system is the main one with a refreshed index."""
    return name.startswith(f"{main}, refreshed")


def title(name: str) -> str:
    """Return the display name of a system."""
    return TITLES.get(name, name)
