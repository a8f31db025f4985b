"""Define the manifests of datasets, runs and bundles, and list the JSON schemas of all files.

A change of a manifest's meaning needs another `schema.FORMAT_VERSION` or `schema.BUNDLE_FORMAT`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from twotower.errors import DataError
from twotower.schema import BUNDLE_FORMAT, FORMAT_VERSION, FeatureSpec
from twotower.utils.config import DataConfig, PrepareConfig, ResolvedConfig
from twotower.utils.documents import (
    CalibrationRecord,
    Count,
    Document,
    Interval,
    RecipeRecord,
    Report,
    ReportSummary,
    parse_document,
)
from twotower.utils.types import Json


class DatasetSettings(Document):
    """The settings that a dataset was made with."""

    seed: int
    data: DataConfig
    prepare: PrepareConfig


class KeptCounts(Document):
    """Numbers of rows in a dataset."""

    events: Count
    """Events of users with an id."""
    train_events: Count
    valid_events: Count
    test_events: Count
    withheld_events: Count
    """Events of the training period that are hidden from training."""
    positive_events: Count
    """Events that may be targets."""
    anonymous_events: Count
    negative_events: dict[str, Count] = Field({})
    """Explicit negatives and impressions by event type; `events` does not count them."""
    items: Count
    users: Count


class DatasetCounts(Document):
    """Numbers of rows that `prepare` read, kept and dropped."""

    read: dict[str, Count]
    """By file."""
    files: dict[str, dict[str, Any]] = Field({})
    """By path: rows, lines, rejected and left out by reason, unused columns."""
    matched: dict[str, dict[str, Any]] = Field({})
    """By side, "item" or "user": events whose id is in its table, with examples of ids that are not."""
    times_s: dict[str, int] = Field({})
    """Time of the "first" and "last" event, in seconds since 1970."""
    kept: KeptCounts
    dropped: dict[str, dict[str, Count]]
    """By table and reason."""


class _Seeded(Document):
    """Entries that the manifests of datasets and runs share."""

    format: int = FORMAT_VERSION
    """Version of the format of datasets and runs."""
    seed: int


class DatasetManifest(_Seeded):
    """`manifest.json` of a dataset folder."""

    kind: Literal["dataset"] = "dataset"
    command: Literal["prepare"] = "prepare"
    config: DatasetSettings
    counts: DatasetCounts
    warnings: list[str] = Field([])
    """Warnings of `prepare`, as sentences."""
    event_types: list[str]
    """Names of the event types seen in training, with codes 1, 2, …"""
    negative_types: list[str] = Field([])
    """Names of the event types of explicit negatives and impressions, with codes 0, 1, …"""
    has_time: bool
    """false: times of events are only positions."""
    id_types: dict[str, str] = Field({})
    """By id column: the type of the ids in the raw data, as `utils.ids.id_type` names it; text if it is not listed."""
    cuts_s: dict[str, int]
    """First second of "valid" and "test" (split by time)."""
    n_items: Count
    n_users: Count
    n_train_items: Count
    """Items with a training event. Their rows come first."""
    n_train_users: Count
    """Users with a training event. Their rows come first."""
    features: list[FeatureSpec]
    """The declared static features."""
    hashes: dict[str, str]
    """SHA-256 by file."""


class BestValidation(Document):
    """Result of a training: its best validation."""

    metric: str
    value: float | None
    """null: there is no validation part."""
    step: Count
    """Step of the saved model."""
    total_steps: Count
    """Steps of the learning-rate schedule."""


class RefitSettings(Document):
    """Values that a refit takes from its run."""

    stop_frac: float = Field(gt=0, le=1)
    """Share of the steps after which training ends; the learning rate follows the full schedule."""
    baseline_settings: dict[str, dict[str, int | float]] = Field({})
    """Settings by name of the baseline; these baselines are not tuned."""
    priors: dict[str, Any] = Field({})
    """Fitted weights of a score, by name of the tensor; see `models.priors`."""


class UpdateRecord(Document):
    """The data that an update added, and a comparison with the model before it on the newest events."""

    number: Count
    """Updates since the run was trained, this one included."""
    data: str
    """Fingerprint of the dataset before."""
    new_events: Count
    new_users: Count
    new_items: Count
    metric: str
    before: float
    """Metric of the model before, with its items refreshed."""
    after: float
    difference: Interval
    """`after` minus `before`."""
    worse_frac: float
    """Share of the bootstrap resamples in which `difference` is below zero."""
    queries: Count
    """Validation queries, all of the newest events."""
    steps: Count


class RunManifest(_Seeded):
    """`manifest.json` of a run's folder."""

    kind: Literal["run"] = "run"
    command: Literal["train"] = "train"
    dataset: str
    """Folder of the dataset; relative to the folder of this manifest if `twotower run` wrote both."""
    data: str
    """Fingerprint of the dataset."""
    config: ResolvedConfig
    """Settings of the training, with all sizes."""
    best: BestValidation
    recipe: RecipeRecord | None
    """null: there was no race."""
    calibration: CalibrationRecord | None
    """null: there was nothing to fit the weights of a score on."""
    refit: RefitSettings | None
    """null: the run is not a refit."""
    update: UpdateRecord | None = None
    """null: the run is not an update."""


class TrainingProgress(Document):
    """State of a training when its model was saved."""

    epoch: Count
    step_in_epoch: Count
    step: Count
    total_steps: Count
    """Steps of the learning-rate schedule."""
    examples: Count
    best: float | None
    """Best validation metric; null without a validation part."""
    best_step: Count
    validations_since_best: Count
    earlier_steps: Count = 0
    """Steps of the trainings that it goes on from."""


class IndexRecord(Document):
    """The index that `twotower tune-index` built. The measurements are null after the bundle's items have changed."""

    kind: str
    settings: dict[str, Any]
    recall: float | None = None
    p50_ms: float | None = None
    bytes: Count | None = None
    k: Count | None = None
    """List length of the measurement."""
    users: Count | None = None
    """Users of the measurement."""


class PriorsRecord(Document):
    """Weights of what a score holds beside the towers; see `models.priors`."""

    groups: list[Count]
    """Smallest number of events in a history, by group of users."""
    half_lives_days: list[float]
    """Half-lives of the popularities; 0: all events count the same."""
    weights: list[list[float]]
    """By group: of the towers, of each log popularity (nats), with several half-lives of the novelty, and of half the squared
    distance (per km²)."""
    centre_km: list[float]
    """Origin of the coordinates of locations."""
    unlocated_km2: float
    """Half the squared distance that an item without a location counts as."""
    recency: float
    """Weight of the last items of the history, in nats; see `models.history_terms`."""
    repeats: list[float]
    """Weights of an item of the history where it may be recommended, in nats; see `models.history_terms`."""
    transitions: list[float]
    """Weights of an item after or before the last items of the history, in nats; see `models.history_terms`."""
    temperature: float


class BundleManifest(Document):
    """`manifest.json` of a bundle."""

    format: int = BUNDLE_FORMAT
    """Version of the format of bundles."""
    kind: Literal["bundle"] = "bundle"
    config: ResolvedConfig
    data: str
    """Fingerprint of the dataset."""
    features: list[FeatureSpec]
    moment_s: int
    """Time of the item vectors, in seconds."""
    training: TrainingProgress
    metrics: BestValidation | None = None
    priors: PriorsRecord
    """Weights of what a score holds beside the towers."""
    report: ReportSummary | None = None
    frame: str | None = None
    """Library of the frames that the model was fitted on, and so of its answers in Python. null: it was made from files."""
    index: IndexRecord | None = None
    """null: the search is exact."""
    revision: Count = 0
    """Number of times that items were added or removed."""
    hashes: dict[str, str] = Field({})
    """SHA-256 by file."""
    seal: str = ""
    """SHA-256 of the manifest itself without this key."""


DOCUMENTS: dict[str, type[Document]] = {
    "report": Report,
    "dataset": DatasetManifest,
    "run": RunManifest,
    "bundle": BundleManifest,
}


Manifest = TypeVar("Manifest", DatasetManifest, RunManifest)


def open_manifest(kind: type[Manifest], folder: Path, advice: str) -> Manifest:
    """Return the manifest of a folder.

    Raises
    ------
    DataError
        The folder has none, or one of another kind or format; `advice` says how to make one.
    """
    name, file = kind.model_fields["kind"].default, folder / "manifest.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DataError(f"{folder} is not a {name}: it has no readable manifest.json. {advice}") from None
    found = values.get("kind") if isinstance(values, dict) else None
    if found != name:
        raise DataError(f"{folder} is not a {name}: its manifest.json has kind {str(found)[:40]!r}, expected {name!r}. {advice}")
    if values.get("format") != FORMAT_VERSION:
        found = str(values.get("format"))[:20]
        raise DataError(f"The {name} {folder} has format {found}; this version reads format {FORMAT_VERSION}. {advice}")
    return parse_document(kind, values, file)


def document_schema(name: str) -> Json:
    """Return the JSON schema of a document of `DOCUMENTS`. A `format` of another number has another schema.

    Examples
    --------
    >>> document_schema("run")["properties"]["kind"]["const"]
    'run'
    """
    schema = DOCUMENTS[name].model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
