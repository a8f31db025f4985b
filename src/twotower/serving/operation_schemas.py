"""Define the JSON of HTTP responses that describe the server and what it serves."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from twotower.serving.schemas import AsOf


class StateOut(BaseModel):
    """The state of the server."""

    status: Literal["live", "ready"]
    version: str | None = None
    as_of: AsOf = None
    events: str | None = Field(None, description="`ok`, or why the event store cannot take events. Recommendations go on.")


class ReloadOut(BaseModel):
    """The bundle version served now and the one served before."""

    version: str = Field(examples=["67499b37599f"])
    before: str = Field(examples=["7a8339d5a72d"])


class ItemEventsOut(BaseModel):
    """Counts of the accepted events by their effect."""

    counted: int = Field(examples=[5021], description="They changed their items.")
    in_bundle: int = Field(examples=[12], description="The bundle contains them already, or keeps no repeated events.")
    unknown_item: int = Field(examples=[0], description="The bundle does not know their item.")
    future: int = Field(examples=[0], description="Their time has not come yet.")


class RefreshOut(BaseModel):
    """The items as they are served now."""

    version: str = Field(examples=["67499b37599f"])
    as_of: AsOf
    events: ItemEventsOut
