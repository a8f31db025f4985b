"""Define the requests and answers of a recommender. Python, the command line and HTTP use the same types."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

from twotower.utils.ids import Id

Source = Literal["model", "nearby", "recent"]


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One event of a history.

    Attributes
    ----------
    item_id
        Id of the item; an integer is the same as its text.
    time_s
        Seconds since 1970; None: unknown, taken as one week before the next event (the last: before the time of the request).
    stars
        Rating from 0 to 5; None: no rating.
    event_type
        One of the bundle's event types; None: the first. An explicit negative, such as a dislike, is not part of the history, and
        its item is not recommended. An impression has no effect.
    """

    item_id: Id
    time_s: int | None = None
    stars: float | None = None
    event_type: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A request for recommendations.

    Attributes
    ----------
    user
        User id; an integer is the same as its text. An unknown user is not an error: only the history is used.
    history
        Events, oldest first. For a known user they are added after the events of the bundle.
    k, skip
        Number of items to return, and of better ones to pass over. Not with diversity, whose list depends on its length.
    filter
        A filter, as text or as JSON; see `search.filters`.
    near
        Location of the request: latitude and longitude in degrees.
    time_s
        Time of the request in seconds; only events before it count. None: the time of the bundle, or just after the latest event of
        the history if that is later.
    exclude_seen
        Exclude the items of the history, and disliked ones. If False, they are ranked too, those of the history by weights
        learned from how users repeat; see `models.history_terms`.
    diversity
        0 … 1: penalty for items that are similar to higher-ranked items (MMR).
    popularity_bias
        −1 … 1: popularity bias. Negative values favour rare items, positive values popular items; 0 is the model as trained.
        Has no effect if neither user nor history is known.
    explain
        Return the reasons of each score.
    explore
        0 … 1: share of the positions that is given to uncertain and new items; see `retrieval.exploration`. Only the first part of
        a list explores.
    """

    user: Id | None = None
    history: tuple[HistoryEvent, ...] = ()
    k: int = 10
    skip: int = 0
    filter: str | dict[str, Any] | None = None
    near: tuple[float, float] | None = None
    time_s: int | None = None
    exclude_seen: bool = True
    diversity: float = 0.0
    popularity_bias: float = 0.0
    explain: bool = False
    explore: float = 0.0


@dataclass(frozen=True, slots=True)
class Reason:
    """A reason for a score: an event of the history, a feature of the user or a feature of the item.

    Attributes
    ----------
    kind
        "event", "user" or "item".
    name
        Id of the item of the event, or name of the feature.
    label
        Name of the item of the event, or the feature in words.
    contribution
        First-order contribution to the inner product: gradient times input. The inner product is attributed twice: to events and
        user features, and to item features. The popularity term counts as an item feature.
    """

    kind: Literal["event", "user", "item"]
    name: str
    label: str
    contribution: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended item.

    Attributes
    ----------
    item_id
        Id of the item, in the type that it had in the raw data.
    latitude, longitude
        Degrees; None where unknown.
    distance_km
        Distance from the location of the request, else from the most central location of the history; None if unknown.
    score
        Inner product of user and item vector, and the bonus of an item that has one, without the popularity bias of the request. If
        the source is not the model: recent events relative to the most popular item.
    reasons
        Reasons, largest first; empty unless requested.
    """

    rank: int
    item_id: Id
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
    """A list of recommendations with its source and confidence.

    Attributes
    ----------
    items
        Best first; fewer than `k` only if fewer items match the filter.
    source
        "model": from a known user or a history. "nearby", "recent": neither is known, and these are the items with the most recent
        events, near the request or overall.
    confidence
        n / (n + 3) for a history of n events; 0 if the source is not the model.
    user_known
        True if the user is in the bundle.
    stages_ms
        Milliseconds by stage, for all requests answered together: "features", "filter", "tower", "search", "explain", "describe".
    selectivity
        Share of the items that match the filter; None without a filter.
    stages_began
        Time at which each stage began first, in seconds of `time.perf_counter`.
    propensity
        Probability with which the list has each item; below 1 if the request explores.
    """

    items: list[Recommendation]
    source: Source
    confidence: float
    user_known: bool
    stages_ms: dict[str, float] = field(default_factory=dict)
    selectivity: float | None = None
    stages_began: dict[str, float] = field(default_factory=dict, compare=False)
    propensity: tuple[float, ...] = ()


class Stages:
    """Measures the beginning and the milliseconds of each stage for an `Answer`."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self.began: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        begun = perf_counter()
        self.began.setdefault(name, begun)
        try:
            yield
        finally:
            self.ms[name] = round(self.ms.get(name, 0.0) + 1000 * (perf_counter() - begun), 3)
