"""Settings of the data: where raw tables come from, and how a dataset is made of them.

Frozen pydantic models, as all settings; `config.py` holds the other sections and reads the files.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from twotower.utils.registry import Names


class Settings(BaseModel):
    """Base of every section: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """A section whose keys are all commented out is null in YAML: it has its defaults."""
        if not isinstance(values, dict):
            return values
        sections = {name for name, field in cls.model_fields.items() if isinstance(field.annotation, type(BaseModel))}
        return {name: value for name, value in values.items() if value is not None or name not in sections}


class ColumnConfig(Settings):
    """One declared feature column of a user's own table (`tables` source)."""

    name: str = Field(min_length=1)
    """Name of the feature."""
    kind: Literal["categorical", "multi", "number", "geo", "hours", "text", "vector"]
    """How the column is read. "categorical": one label; "multi": several labels; "number"; "geo": latitude and longitude; "hours":
    opening hours; "text"; "vector": a list of numbers."""
    columns: list[str] = []
    """Raw columns; defaults to the feature's own name. Two (latitude, longitude) for "geo"."""
    separator: str = ","
    """Splits a "multi" column that is a string."""


class TableConfig(Settings):
    """One table of the `tables` source: a CSV, Parquet or JSON-lines file (or glob). Values of other keys name its columns."""

    path: Path
    """Relative to `data.path`."""


class InteractionTableConfig(TableConfig):
    """Who met what, and when."""

    user_id: str = "user_id"
    """Column of the users' ids."""
    item_id: str = "item_id"
    """Column of the items' ids."""
    time: str | None = None
    """A date, a timestamp, or epoch seconds / milliseconds. None: the order of the rows."""
    stars: str | None = None
    """0 to 5."""
    event_type: str | None = None
    """Column of the kind of event, as "view" or "purchase"."""
    text: str | None = None
    """What the user wrote: part of the item's text."""


class ItemTableConfig(TableConfig):
    """What is recommended."""

    item_id: str = "item_id"
    """Column of the items' ids."""
    name: str | None = None
    """Shown to people."""
    features: list[ColumnConfig] = []
    """Columns that become features of the items."""
    other_columns: bool = True
    """Keep the other columns of the file too, for display and filters; no model reads them."""


class UserTableConfig(TableConfig):
    """Whom it is recommended to."""

    user_id: str = "user_id"
    """Column of the users' ids."""
    since: str | None = None
    """When they became users, in the forms of `InteractionTableConfig.time`."""
    features: list[ColumnConfig] = []
    """Columns that become features of the users."""


class SequencesConfig(Settings):
    """Files of the literature: "user item item …" a line."""

    train: Path = Path("Yelp.txt")
    """Relative to `data.path`."""
    test: Path | None = None
    """A second file of the same form: its items are the test part (use `prepare.split.kind: predefined`)."""
    attributes: Path | None = None
    """JSON object: item → list of attribute ids, read as the multi-valued feature "categories"."""
    items: Path | None = None
    """JSON lines with `item` and any of name, categories, city, latitude, longitude: shown to people and used by filters."""


class DataConfig(Settings):
    """Where raw data comes from."""

    source: Annotated[str, Names("source", ("yelp", "tables", "sequences"))] = "yelp"
    """Kind of the raw files. "yelp": a Yelp release; "tables": your own tables; "sequences": one user per line."""
    path: Path = Path("data/raw")
    """Folder of the raw files."""
    events: list[str] = ["review", "tip", "checkin"]
    """Yelp tables read as events, when present. Check-ins carry no user: they count towards an item's popularity only."""
    max_reject_frac: float = Field(0.01, ge=0.0, le=1.0)
    """Larger shares of unreadable rows are an error."""
    interactions: InteractionTableConfig | None = None
    """Table of the events. Required for the `tables` source."""
    users: UserTableConfig | None = None
    """Table of the users. null: users are known by their ids alone."""
    items: ItemTableConfig | None = None
    """Table of the items. null: items are known by their ids alone."""
    sequences: SequencesConfig = SequencesConfig()


class SplitConfig(Settings):
    """How held-out events are chosen. A part of 0 is none, and its events are training's, under every kind of split."""

    kind: Literal["time", "leave_one_out", "predefined"] = "time"
    """"time": one cut for everybody; "leave_one_out": each user's last event is test, the one before validation (users with
    at least three events); "predefined": the source's own test part, and a random `valid` share of the rest."""
    valid: float | date = 0.1
    """"time": share of the events, or first day of the validation period. "predefined": share of each user's events. Without this
    part training goes on to the end of its schedule."""
    test: float | date = 0.1
    """"time": share of the events, or first day of the test period (that of validation: no validation). Without this part nothing
    is judged."""

    withhold_user_frac: float = Field(0.0, ge=0, lt=1)
    """Share of the users, drawn by lot, whom training never sees, as if they came later: their events are only histories."""
    withhold_item_frac: float = Field(0.0, ge=0, lt=1)
    """Share of the items whose training events are withheld, as if they opened later."""

    @property
    def has_valid(self) -> bool:
        """Whether there is to be a validation part."""
        return bool(self.valid) and not (isinstance(self.valid, date) and self.valid == self.test)

    @model_validator(mode="after")
    def _same_type(self) -> SplitConfig:
        if isinstance(self.valid, date) != isinstance(self.test, date):
            raise ValueError("valid and test must both be fractions or both be dates")
        if isinstance(self.valid, date) and isinstance(self.test, date) and self.valid > self.test:
            raise ValueError("valid must be no day after test")
        if isinstance(self.valid, float) and isinstance(self.test, float):
            if not (0 <= self.valid < 1 and 0 <= self.test < 1):
                raise ValueError(f"valid and test must be at least 0 and below 1; got {self.valid} and {self.test}")
            if self.valid + self.test >= 1:
                raise ValueError("valid + test must leave something to train on (sum below 1)")
        return self


class PrepareConfig(Settings):
    """From raw tables to a dataset."""

    engine: Literal["duckdb", "spark"] = "duckdb"
    """What computes the tables: DuckDB in this process, or Spark (extra `spark`) where a cluster is needed. Equal row for row."""
    spark_master: str = "local[*]"
    """Where Spark runs."""

    positive_min_stars: float | None = Field(None, ge=0, le=5)
    """Events with fewer stars are history, never targets. None: every event is a target. Events without stars always are."""
    event_weights: dict[str, float] = {}
    """Weight of an event type in the loss; 1 unless named here. 0: history only."""
    duplicates: Literal["keep", "keep_first"] = "keep"
    """"keep_first" keeps the first event of each (user, item)."""
    min_user_events: int = Field(1, ge=1)
    """Users with fewer events in the training period are dropped; see `min_item_events`."""
    min_item_events: int = Field(1, ge=1)
    """Users and items with fewer events in the training period are dropped; those first seen after it are new, and stay.
    (leave_one_out: counted over all events, as the literature does.)"""
    k_core: bool = False
    """Repeat both minimum counts until nothing changes."""
    split: SplitConfig = SplitConfig()
    text_dim: int = Field(32, ge=0)
    """Width of the text vectors; 0 leaves text out."""
    text_max_chars: int = Field(2000, ge=0)
    """Review text kept per item, from before the cut. 0: the name alone."""
    co_visited_items: int = Field(20, ge=0)
    """Items that the same users visit in training, so many of them a feature of each item; 0: none."""
    exclude_features: list[str] = []
    """Names of features to leave out."""
