"""Define the types of JSON files, and those of the report and of the recipe race.

`manifests.py` defines the manifests. A key that is not defined is an error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from twotower.errors import DataError
from twotower.utils.types import Json

Count = Annotated[int, Field(ge=0)]


def finite(value: Any) -> Any:
    """Return the value with None in place of numbers that JSON cannot represent, also inside dicts and lists."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figure = Annotated[float | None, BeforeValidator(finite)]
"""A number, or null if it is not defined."""


class Document(BaseModel):
    """Base class of every JSON file and its parts: immutable, an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, json_schema_serialization_defaults_required=True
    )

    def json_values(self) -> Json:
        """Return the content as plain JSON values."""
        return self.model_dump(mode="json")


Kind = TypeVar("Kind", bound=Document)


def parse_document(kind: type[Kind], values: Any, file: Path) -> Kind:
    """Return JSON values as a document.

    Raises
    ------
    DataError
        A value is missing, unknown or of another type; `file` names the file.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])[:80] or "the file"
        raise DataError(f"{file} is damaged or of another version: {where}: {problem['msg'][:120]}. Write it again.") from None


class RungResult(Document):
    """Result of a candidate of the recipe race at one comparison."""

    share: float
    """Share of the full training."""
    step: Count
    value: float
    """Validation metric."""
    seconds: float
    """Time since the comparison before."""


class RecipeCandidate(Document):
    """A candidate of the recipe race."""

    name: str
    settings: dict[str, Any]
    """Settings by dotted name that it adds to those of the user."""
    results: list[RungResult]
    seconds: float


class RecipeRecord(Document):
    """The recipe race: its candidates, and why one was chosen."""

    chosen: str
    why: str
    settings: dict[str, Any]
    """Settings of the chosen candidate."""
    metric: str
    tried: list[RecipeCandidate]
    seconds: float


class RepeatsRecord(Document):
    """The weights of an item of the history, where it may be recommended; see `models.history_terms`."""

    before: float
    """Validation metric without them, where seen items may be recommended."""
    after: float
    """Validation metric with them."""
    used: bool
    """false: they lower the metric, and count as zero."""
    weights: list[float]
    """In nats: of an item of the history, of the log of its events there, and of the log of one more than the events since."""


class TransitionsRecord(Document):
    """The weights of items after or before the last items of a history; see `models.history_terms`."""

    before: float
    """Validation metric without them."""
    after: float
    """Validation metric with them."""
    used: bool
    """false: they lower the metric, or do not raise the likelihood clearly, and count as zero."""
    weights: list[float]
    """In nats: of an item that comes after, of the log of its weight there, and the same of one that comes before."""


class HistoryRecord(Document):
    """The weights of a history beside the user tower."""

    recency: float
    """Weight of its last items in nats: that with the best validation metric, if such a weight raises the likelihood clearly."""
    by_recency: dict[str, float]
    """Validation metric by weight of the last items; only of 0 if the likelihood does not rise."""
    transitions: TransitionsRecord | None
    """null: the dataset has no lists of items after and before an item (`prepare.co_visited_items` is 0)."""
    repeats: RepeatsRecord | None
    """null: each item is kept once, which says nothing about repeats."""


class CalibrationRecord(Document):
    """The weights of a score, fitted on the validation part."""

    metric: str
    before: float
    """Validation metric with the weights of training."""
    after: float
    """Validation metric with the fitted weights."""
    used: bool
    """false: the fitted weights lower the metric; those of training are kept."""
    queries: Count
    """Validation queries that the weights were fitted on."""
    half_lives_days: list[float]
    """Half-lives of the popularities; 0: all events count the same."""
    distance_unit_km: float
    """Median distance of users from their targets; 1 without locations."""
    weights: dict[str, list[float]]
    """By the smallest number of events in a history: of the towers, of each log popularity (nats), with several half-lives of the
    novelty, and of half the squared distance (per km²)."""
    history: HistoryRecord | None
    """null: the events have no order."""


class Interval(Document):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class SliceGroup(Document):
    """Results on one group of queries."""

    queries: Count
    users: Count
    systems: dict[str, Interval]
    """The deciding metric by system."""
    differences: dict[str, Interval]
    """The model minus each other system."""


class ReportData(Document):
    """The dataset of an evaluation."""

    users: Count
    items: Count
    noun: str = "item"
    """Word for an item."""
    new_users: Count
    new_items: Count
    events: Count
    event_types: list[str]
    features: list[str]
    train_events: Count
    valid_events: Count
    test_events: Count
    withheld_events: Count


class Protocol(Document):
    """Protocol of an evaluation."""

    split: str
    part: str
    seen: Literal["masked", "unmasked"]
    """"masked": items of the history are not recommended."""
    queries: Count
    users: Count
    targets: Count
    seen_targets: Count = 0
    """Targets that are in the history of their query. Lists without seen items cannot have them."""
    catalogue: Count
    """Items that are ranked."""
    metric: str
    """The deciding metric."""
    ks: list[int]
    ties: str
    interval: str


class ReportSummary(Document):
    """The part of a report that a bundle keeps."""

    verdict: str
    protocol: Protocol
    dataset: ReportData
    systems: dict[str, dict[str, Interval]]
    """By system and metric."""
    differences: dict[str, dict[str, Interval]]
    """The model minus each other system, by system and metric."""
    refreshed_differences: dict[str, dict[str, Interval]] = Field({})
    """The model with a refreshed index minus each other system, by system and metric; empty if it was not evaluated."""
    beyond: dict[str, dict[str, Figure]]
    """Metrics beyond accuracy, by system."""


class Picture(Document):
    """A picture of the data."""

    title: str
    kind: Literal["line", "bars"]
    x: list[float | str]
    y: list[float]
    x_label: str
    y_label: str


class ExampleItem(Document):
    """An item of an example."""

    item: str | int
    name: str
    hit: bool
    """true: it is recommended, and came next."""


class Example(Document):
    """A user of the test part, with a list."""

    user: str | int
    history: list[ExampleItem]
    """The last events, the latest first."""
    recommended: list[ExampleItem]
    came_next: list[ExampleItem]


class Report(ReportSummary):
    """`report.json`: the evaluation of a model beside its baselines."""

    settings: dict[str, dict[str, Any]]
    """Settings by system."""
    left_out: dict[str, str]
    """Reasons by name of the baseline."""
    seconds: dict[str, float]
    """Time for all queries, by system."""
    slices: dict[str, dict[str, SliceGroup]]
    """By title and group."""
    popularity_tradeoff: list[dict[str, float]] = Field([])
    """Accuracy and coverage at several values of the popularity bias."""
    recipe: RecipeRecord | None = None
    calibration: CalibrationRecord | None = None
    curves: Annotated[list[dict[str, Any]], BeforeValidator(finite)] = Field([])
    """Rows of the training log."""
    advice: list[str] = Field([])
    """Health advice of the training."""
    pictures: list[Picture] = Field([])
    """Events a week, the long tail of the items, and the lengths of histories."""
    examples: list[Example] = Field([])
    """Lists of a few users."""

    def summary(self) -> ReportSummary:
        """Return the part that a bundle keeps."""
        return ReportSummary(**{name: getattr(self, name) for name in ReportSummary.model_fields})
