"""What is asked of a recommender and what it answers, in people's terms: from Python, from the command line and over HTTP alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

Source = Literal["model", "nearby", "recent"]


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One event of a history.

    Attributes
    ----------
    item_id
        The item visited.
    time_s
        Seconds since 1970; None where unknown: then it counts as a week before the next, the last as a week before the moment.
    stars
        0 to 5; None where none were given.
    event_type
        One of the bundle's kinds of events; None: the first.
    """

    item_id: str
    time_s: int | None = None
    stars: float | None = None
    event_type: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """Who asks, and for what.

    Attributes
    ----------
    user
        A known user's id. An unknown one is no error here: the history alone speaks then.
    history
        Visits, oldest first; of a known user they follow the bundle's own.
    k
        Length of the list.
    filter
        A filter, as text or as JSON; see `search.filters`.
    near
        Latitude and longitude in degrees the request comes from.
    time_s
        The moment of the question in seconds; only events before it count. None: the bundle's own, or just after the latest visit
        where that is later.
    exclude_seen
        Leave out the items of the history. Otherwise the last visited, and what is like them, gain; see
        `reranking.boost_recent_items`.
    diversity
        0 … 1: how much an item's likeness to those above it counts against it.
    popularity
        −1 … 1: below zero the rarely visited gain, above zero the often visited; 0 is the model as trained. Where nothing is known
        of who asks, the often visited come first whatever the dial.
    explain
        Say of each place what moved its score.
    """

    user: str | None = None
    history: tuple[HistoryEvent, ...] = ()
    k: int = 10
    filter: str | dict[str, Any] | None = None
    near: tuple[float, float] | None = None
    time_s: int | None = None
    exclude_seen: bool = True
    diversity: float = 0.0
    popularity: float = 0.0
    explain: bool = False


@dataclass(frozen=True, slots=True)
class Reason:
    """What moved a score: a visit of the history, a feature of the user, or a feature of the item.

    Attributes
    ----------
    kind
        "visit", "user" or "item".
    name
        The visited item's id, or the feature's name.
    label
        The visited item's name, or the feature in words.
    share
        Part of the inner product in the first order: gradient times input. It is shared out twice: over visits and features of the
        user, and over features of the item. What popularity adds to it is a feature of the item too.
    """

    kind: Literal["visit", "user", "item"]
    name: str
    label: str
    share: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended item in people's terms.

    Attributes
    ----------
    latitude, longitude
        Degrees; None where unknown.
    distance_km
        From where the request comes, else from the most central place of the history; None when either is unknown.
    score
        Inner product of user and item vector, and what the item's popularity adds to it, the dial at rest; of an answer that
        is not the model's, visits as a share of the greatest.
    reasons
        Largest first; empty unless asked for.
    """

    rank: int
    item_id: str
    name: str
    categories: list[str]
    city: str | None
    latitude: float | None
    longitude: float | None
    distance_km: float | None
    score: float
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The list, and how much to make of it.

    Attributes
    ----------
    items
        Best first; fewer than `k` only where the filter leaves fewer.
    source
        "model": from a history or a known user; "nearby" or "recent": nothing was known of who asks, and these are the places most
        visited lately around the request, or altogether.
    confidence
        0 … 1: how much was known of who asks: n / (n + 3) for a history of n events, 0 where nothing was known.
    user_known
        Whether the bundle knows the user.
    stages_ms
        Milliseconds by stage, of all requests that were answered together: "features", "filter", "tower",
        "search", "explain", "describe".
    selectivity
        Share of the items that pass the filter; None where there was none.
    """

    items: list[Recommendation]
    source: Source
    confidence: float
    user_known: bool
    stages_ms: dict[str, float] = field(default_factory=dict)
    selectivity: float | None = None


class Stages:
    """Milliseconds by stage, as an `Answer` tells them."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what happens inside towards a stage."""
        begun = perf_counter()
        try:
            yield
        finally:
            self.ms[name] = round(self.ms.get(name, 0.0) + 1000 * (perf_counter() - begun), 3)
