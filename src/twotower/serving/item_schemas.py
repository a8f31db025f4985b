"""Define the JSON of changes of items: their body with bounds, and the response."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from twotower.serving.limits import MAX_ITEMS_PER_REQUEST
from twotower.serving.schemas import Accepted, Id

EXAMPLE: Any = {
    "items": [
        {"item_id": "new-cafe", "name": "New Café", "categories": ["Coffee & Tea"], "latitude": 39.95, "longitude": -75.16},
        {"item_id": "b_230", "price": 3},
    ],
    "remove": ["b_17"],
}


class ItemIn(BaseModel):
    """An item: its id, and columns of the catalogue as further fields. Columns that are not sent stay."""

    model_config = ConfigDict(extra="allow")

    item_id: Id


class ItemsIn(Accepted):
    """Items to add, to change, to remove or to reset."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    items: Annotated[list[ItemIn], FailFast()] = Field([], description="New items, and new values of columns of known items.")
    remove: list[Id] = Field([], description="Items that are not recommended any more. They still count in histories.")
    reset: list[Id] = Field([], description="Items whose earlier changes are deleted: they are again as the bundle has them.")

    @model_validator(mode="after")
    def _bounded(self) -> ItemsIn:
        count = len(self.items) + len(self.remove) + len(self.reset)
        if not 1 <= count <= MAX_ITEMS_PER_REQUEST:
            raise ValueError(f"send from 1 to {MAX_ITEMS_PER_REQUEST:,} items")
        return self


class ItemsChangedOut(BaseModel):
    """What was stored. It is served from the next refresh of the items on."""

    accepted: int = Field(examples=[3], description="Items of the request.")
    items_changed: int = Field(examples=[41], description="How often items have been changed; health checks show what is served.")
