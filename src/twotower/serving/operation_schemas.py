"""Define the JSON of HTTP responses that describe the server and what it serves."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from twotower.serving.schemas import AsOf


class StateOut(BaseModel):
    """The state of the server."""

    status: Literal["live", "ready"]
    version: str | None = None
    as_of: AsOf = None
    items_changed: int | None = Field(None, description="How often the served items were changed; see `POST /v1/items`.")
    events: str | None = Field(None, description="`ok`, or why the event store cannot take events. Recommendations go on.")
    index: str | None = Field(None, description="`ok`, if the vectors are searched in another process; see `serving.index`.")
    workers: int | None = Field(None, description="Processes that answer requests.")


class ReloadOut(BaseModel):
    """The bundle version served now and the one served before."""

    version: str = Field(examples=["67499b37599f"])
    previous_version: str = Field(examples=["7a8339d5a72d"])


class ItemEventsOut(BaseModel):
    """Counts of the accepted events by their effect."""

    counted: int = Field(examples=[5021], description="They changed their items.")
    in_bundle: int = Field(examples=[12], description="The bundle contains them already, or keeps no repeated events.")
    negative: int = Field(examples=[3], description="Explicit negatives and impressions, which change no item.")
    unknown_item: int = Field(examples=[0], description="The bundle does not know their item.")
    future: int = Field(examples=[0], description="Their time has not come yet.")


class RefreshOut(BaseModel):
    """The items as they are served now."""

    version: str = Field(examples=["67499b37599f"])
    as_of: AsOf
    items_changed: int = Field(examples=[41], description="How often the served items were changed; see `POST /v1/items`.")
    events: ItemEventsOut


class FiltersOut(BaseModel):
    """The filters that the catalogue supports."""

    categories: list[str] = Field(examples=[["Restaurants", "Mexican"]])
    has_amounts: bool = Field(description="True if prices are other numbers.")
    has_price: bool
    has_locations: bool
    has_hours: bool
    has_zones: bool = Field(description="True if items have a time zone: `open_now` then uses the local time of each item.")
    example: str = Field(examples=['brand == "Uji" and price <= 20'], description="A filter of the catalogue's own columns.")


class AboutOut(BaseModel):
    """The bundle that is served."""

    version: str = Field(examples=["15c0f43823b2"])
    name: str = Field(examples=["bundle"])
    items: int = Field(examples=[1500])
    users: int = Field(examples=[3000])
    noun: str = Field(examples=["item"], description="Word for an item, as `data.items.noun` says.")
    nouns: str = Field(examples=["items"], description="Its plural.")
    metrics: dict[str, Any]
    filters: FiltersOut
