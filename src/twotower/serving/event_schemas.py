"""Define the JSON of events: their bodies with bounds, and the response."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from twotower.serving.limits import MAX_EVENTS_PER_REQUEST, MAX_K
from twotower.serving.schema_examples import EVENTS, OUTCOMES
from twotower.serving.schemas import Accepted, Id, Moment, Stars


class EventIn(Accepted):
    """An event. Each counts once, so sending it again is safe.

    With `request_id`, it says what came of a list: an impression (`shown`, or an impression type), or an outcome.
    """

    event_id: Id | None = Field(None, description="Events of a user with the same id count once. Required without `request_id`.")
    user: Id | None = Field(None, description="Required without `request_id`. Default: the user of the list.")
    item_id: Id | None = Field(None, description="The item. Required unless `shown` is given.")
    time_s: Moment | None = Field(None, description="Seconds since 1970. Default: now.")
    event_type: Id | None = Field(
        None, description="One of the bundle's event types. Default: the first, and with `shown` that of impressions."
    )
    stars: Stars | None = None
    request_id: Id | None = Field(
        None, description="`request_id` of the answer with the list. Of a list, an item has each event type once."
    )
    position: int | None = Field(
        None, ge=1, le=MAX_K, strict=True, description="Where the item was shown, from 1. Default: its rank."
    )
    shown: list[Id] | None = Field(
        None, min_length=1, max_length=MAX_K, description="Items of the list that were shown, in their order: one impression each."
    )

    @model_validator(mode="after")
    def _complete(self) -> EventIn:
        if self.request_id is None and (self.event_id is None or self.user is None):
            raise ValueError("an event without request_id needs event_id and user")
        if self.request_id is None and (self.position is not None or self.shown is not None):
            raise ValueError("position and shown belong to a list; send its request_id, too")
        if (self.item_id is None) == (self.shown is None):
            raise ValueError("send either item_id or shown")
        if self.shown is not None and (self.position is not None or len(set(self.shown)) < len(self.shown)):
            raise ValueError("shown names each item once, in the order of their positions, and goes without position")
        return self


class EventsIn(Accepted):
    """Events to store."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EVENTS, OUTCOMES]})

    events: Annotated[list[EventIn], FailFast()] = Field(min_length=1, max_length=MAX_EVENTS_PER_REQUEST)

    @model_validator(mode="after")
    def _few_shown(self) -> EventsIn:
        total = sum(len(event.shown or "1") for event in self.events)
        if total > MAX_EVENTS_PER_REQUEST:
            raise ValueError(
                f"the request has {total:,} events with the shown items; at most {MAX_EVENTS_PER_REQUEST:,} are allowed"
            )
        return self


class EventsOut(BaseModel):
    """The number of new and of repeated events. All of them are stored on disk."""

    accepted: int = Field(examples=[1])
    repeated: int = Field(examples=[0])
