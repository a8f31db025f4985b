"""Settings of the data: the raw files to read.

All settings are frozen pydantic models. `config.py` holds the other sections and reads the files.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from twotower.utils.registry import Names


class Settings(BaseModel):
    """Base class of every section: immutable; unknown keys, numbers that are not finite and flags as numbers are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, serialize_by_alias=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """Drop sections that are null, as when all their keys are commented out in YAML: they get their defaults."""
        if not isinstance(values, dict):
            return values
        sections = {name for name, field in cls.model_fields.items() if isinstance(field.annotation, type(BaseModel))}
        return {name: value for name, value in values.items() if value is not None or name not in sections}

    @field_validator("*", mode="before")
    @classmethod
    def _no_flags_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number belongs; pydantic would read 1 and 0."""
        types = _leaves(cls.model_fields[str(info.field_name)].annotation)
        inside = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
        if bool not in types and types & {int, float} and any(isinstance(one, bool) for one in inside):
            raise ValueError("input should be a number, not true or false")
        return value


def _leaves(annotation: Any) -> set[Any]:
    """Return the types that a type hint contains, such as {int, NoneType} of `list[int] | None`."""
    parts = get_args(annotation)
    return set().union(*map(_leaves, parts)) if parts and not isinstance(parts[0], str) else {annotation}


class ColumnConfig(Settings):
    """One feature of the items or users table (`tables` source)."""

    name: str = Field(min_length=1)
    """Name of the feature."""
    kind: Literal["categorical", "multi", "number", "geo", "hours", "text", "vector"]
    """Type of the feature. "categorical": one label; "multi": several labels; "number"; "geo": latitude and longitude; "hours":
    opening hours; "text"; "vector": a list of numbers."""
    columns: list[str] = []
    """Raw columns; empty: the column named like the feature. "geo" needs two: latitude, longitude."""
    separator: str = ","
    """Separator of the labels of a "multi" column that holds strings."""


class TableConfig(Settings):
    """The format of one table of the `tables` source."""

    separator: str | None = Field(None, min_length=1)
    """Separator of the columns of a text file: one or more characters, such as "::". null: found by trying."""
    columns: list[str] = []
    """Names of the columns of a text file without a header. Empty: its first line names them."""
    quote: str | None = Field(None, max_length=1)
    """Quotation mark of a text file; "": none, marks belong to the values. null: found by trying."""
    encoding: str | None = None
    """Encoding of a text or JSON file, such as "latin-1". null: UTF-8, or UTF-16 with a byte order mark."""
    comment: str | None = Field(None, min_length=1)
    """Lines of a text file that begin with this are skipped and counted. null: none."""
    partition_columns: list[str] = []
    """Columns taken from folder names such as `day=2023-01-03`. A column that the file itself has is never replaced."""

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, name: str | None) -> str | None:
        try:
            return name if name is None else codecs.lookup(name).name
        except LookupError:
            raise ValueError(f"unknown encoding {name!r}; examples: utf-8, latin-1, cp1252, utf-16-le, shift_jis") from None


class InteractionTableConfig(TableConfig):
    """The table of events: which user interacted with which item, and when."""

    path: Path
    """File, folder of Parquet parts, or glob of files, relative to `data.path`: text, Parquet or JSON."""
    user_id: str = "user_id"
    """Column of the user ids."""
    item_id: str = "item_id"
    """Column of the item ids."""
    time: str | None = None
    """Column of the event time: a date, a timestamp, or epoch seconds, milli-, micro- or nanoseconds. null: events are ordered as
    the rows are."""
    time_format: str | None = None
    """Pattern of the time, as in Python's strptime: "%d.%m.%Y %H:%M". "%s": any number is seconds since 1970. null: ISO 8601,
    epochs, dates as digits (20230109), and forms whose meaning is certain ("Tue Apr 03 18:00:09 +0000 2012")."""
    stars: str | None = None
    """Column of the rating. null: no ratings."""
    stars_scale: list[float] | None = Field(None, min_length=2, max_length=2)
    """Lowest and highest rating in the file, such as [1, 10]; ratings are rescaled to 1 to 5 stars. null: they are 0 to 5."""
    event_type: str | None = None
    """Column of the event type, such as "view" or "purchase". null: one type."""
    weight: str | None = None
    """Column of a weight of the event in the loss, 0 or more; multiplies `prepare.event_weights`. null: none."""
    quantity: str | None = None
    """Column of a number of pieces, 0 or more; the weight of the event grows with its logarithm, 1 + ln(quantity). null: none."""
    position: str | None = None
    """Column of the position (1 is first) at which an item was shown; an impression weighs 1 / position. null: none."""
    request: str | None = None
    """Column of the id of the list in which an item was shown; a choice from the list has the same id. null: none."""
    text: str | None = None
    """Column of the text that the user wrote; it becomes part of the item's text. null: none."""

    @field_validator("stars_scale")
    @classmethod
    def _ascending(cls, scale: list[float] | None) -> list[float] | None:
        if scale is not None and scale[0] >= scale[1]:
            raise ValueError(f"stars_scale must be the lowest, then the highest rating; got {scale}")
        return scale


class EntityTableConfig(TableConfig):
    """The table of items or users. It has a file of its own, or is taken from the interactions."""

    path: Path | None = None
    """File, folder of Parquet parts, or glob of files, as for the interactions. Of files that repeat an id, the last one counts:
    name daily snapshots by their date."""
    from_: Literal["interactions"] | None = Field(None, alias="from")
    """"interactions": the columns are those of the interactions file, and `path` is left out. null: `path` is read."""
    value: Literal["first", "last"] = "last"
    """With `from: interactions`: the first or the last value of each column is kept for an id, in the order of the file."""

    @property
    def is_read(self) -> bool:
        """Return True if there is a table to read; False if only `noun` is set."""
        return self.path is not None or self.from_ is not None

    @model_validator(mode="after")
    def _one_origin(self) -> EntityTableConfig:
        values = self.model_dump(exclude={"noun"})
        bare = "noun" in self.model_fields_set and values == type(self).model_construct().model_dump(exclude={"noun"})
        if (self.path is None) == (self.from_ is None) and not bare:
            raise ValueError("set either path or `from: interactions`")
        return self


class LongFormConfig(Settings):
    """Columns of a table in long form, with one row for each property of an item."""

    property: str = "property"
    """Column of the names of the properties. `features` then name properties, not columns."""
    value: str = "value"
    """Column of the values."""
    time: str | None = None
    """Column of the time of a row, in the same formats as `data.interactions.time`: the newest value counts. null: the last row
    counts."""
    keep: list[str] = []
    """Properties kept for display and filters, which the model does not read."""


class ItemTableConfig(EntityTableConfig):
    """The table of items, which are recommended."""

    noun: str = Field("item", pattern=r"^[^\W\d_][\w -]{0,29}$")
    """Word for one of the items, such as "product", "song" or "place", in the page, lists, reasons and the report. It can be set
    without a table, for any source."""
    item_id: str = "item_id"
    """Column of the item ids."""
    name: str | None = None
    """Column of the display name. null: items are shown by id."""
    features: list[ColumnConfig] = []
    """Columns that become item features."""
    long_form: LongFormConfig | None = None
    """The file has one row for each property of an item. Items of the events without a row are items without properties. null: one
    row for each item."""
    other_columns: bool = True
    """Also keep the other columns of the file, for display and filters; the model does not read them."""

    @model_validator(mode="after")
    def _long_form_of_a_file(self) -> ItemTableConfig:
        if self.long_form is not None:
            if self.path is None:
                raise ValueError("long_form needs a file of its own: set path in place of `from: interactions`")
            if not (self.name or self.features or self.long_form.keep):
                raise ValueError("long_form reads only the properties that are named: set features, name or long_form.keep")
        return self


class UserTableConfig(EntityTableConfig):
    """The table of users."""

    user_id: str = "user_id"
    """Column of the user ids."""
    since: str | None = None
    """Column of the sign-up time, in the same formats as `data.interactions.time`. null: unknown."""
    features: list[ColumnConfig] = []
    """Columns that become user features."""


class SequencesConfig(Settings):
    """Sequence files as used in the literature: each line is "user item item …"."""

    train: Path = Path("Yelp.txt")
    """File of the sequences, relative to `data.path`."""
    test: Path | None = None
    """Second file of the same format; its items are the test part (with `prepare.split.kind: predefined`). null: none."""
    attributes: Path | None = None
    """JSON file that maps each item to a list of attribute ids, read as the multi-valued feature "categories". null: none."""
    items: Path | None = None
    """JSON-lines file with `item` and any of name, categories, city, latitude, longitude, for display and filters. null: none."""


class SessionsConfig(Settings):
    """JSON-lines file with one session or user a line, each with a list of events."""

    path: Path = Path("sessions.jsonl")
    """File, or glob of files, relative to `data.path`."""
    user_id: str = "session"
    """Key of the session or user."""
    events: str = "events"
    """Key of the list of events; each event is an object."""
    item_id: str = "aid"
    """Key of the item in an event."""
    time: str = "ts"
    """Key of the time in an event: ISO 8601, or epoch seconds, milli-, micro- or nanoseconds."""
    event_type: str | None = "type"
    """Key of the type in an event, such as "clicks" or "orders". null: one type."""


class DataConfig(Settings):
    """The raw data to read."""

    source: Annotated[str, Names("source", ("yelp", "tables", "sequences", "sessions"))] = "yelp"
    """Format of the raw files. "yelp": a Yelp release; "tables": your own tables; "sequences": one user per line; "sessions": JSON
    lines with a list of events each."""
    path: Path = Path("data/raw")
    """Folder of the raw files."""
    events: list[str] = ["review", "tip", "checkin", "impression"]
    """Yelp tables read as events, if present. Check-ins have no user: they count only towards an item's popularity. Only simulated
    towns have impressions."""
    max_reject_frac: float = Field(0.01, ge=0.0, le=1.0)
    """Largest allowed share of rejected rows of a file; above it, `prepare` fails."""
    include_closed: bool = False
    """Also recommend items whose column `is_open` is 0, such as Yelp's closed businesses. false: training uses
    them, and no bundle recommends them."""
    interactions: InteractionTableConfig | None = None
    """Table of events. Required by the `tables` source."""
    users: UserTableConfig | None = None
    """Table of users. null: users have ids only."""
    items: ItemTableConfig | None = None
    """Table of items. null: items have ids only."""
    sequences: SequencesConfig = SequencesConfig()
    sessions: SessionsConfig = SessionsConfig()
