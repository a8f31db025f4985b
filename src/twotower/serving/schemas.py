"""The JSON of the HTTP interface: what is accepted, with its bounds, and what is answered; both are the OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic_core import to_json

from twotower.retrieval.request import HistoryEvent, Request
from twotower.serving.limits import (
    LAST_S,
    MAX_BATCH_ITEMS,
    MAX_BATCH_REQUESTS,
    MAX_EVENTS_PER_REQUEST,
    MAX_EXPLAINED_ITEMS,
    MAX_FILTER_CHARS,
    MAX_FILTER_JSON_BYTES,
    MAX_HISTORY_EVENTS,
    MAX_ID_CHARS,
    MAX_K,
)

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
Moment = Annotated[int, Field(ge=0, le=LAST_S, description="Seconds since 1970.")]
Stars = Annotated[float, Field(ge=0, le=5)]


def _bounded(value: dict[str, Any]) -> dict[str, Any]:
    if len(to_json(value)) > MAX_FILTER_JSON_BYTES:
        raise ValueError(f"a filter has at most {MAX_FILTER_JSON_BYTES:,} bytes of JSON")
    return value


Filter = Annotated[str, Field(max_length=MAX_FILTER_CHARS)] | Annotated[dict[str, Any], AfterValidator(_bounded)]
Latitude = Annotated[float, Field(ge=-90, le=90)]
Longitude = Annotated[float, Field(ge=-180, le=180)]

ASKED: JsonDict = {
    "user": "u_17",
    "history": [{"item_id": "b_230", "time_s": 1640995200, "stars": 5}],
    "k": 5,
    "filter": 'category == "Mexican" and price <= 2',
    "near": [27.95, -82.46],
}
SENT: JsonDict = {"events": [{"event_id": "01J9Z4-7", "user": "u_17", "item_id": "b_230", "time_s": 1640995200, "stars": 4}]}
ITEM: JsonDict = {
    "item_id": "b_5",
    "name": "Taqueria Sol",
    "categories": ["Restaurants", "Mexican"],
    "city": "Tampa",
    "latitude": 27.96,
    "longitude": -82.45,
}
REASON: JsonDict = {"kind": "visit", "name": "b_230", "label": "El Farol", "share": 0.21}
PLACE: JsonDict = {**ITEM, "rank": 1, "distance_km": 1.4, "score": 0.83, "reasons": [REASON]}
LIST: JsonDict = {
    "source": "model",
    "confidence": 0.77,
    "user_known": True,
    "items": [PLACE],
    "stages_ms": {"features": 0.4, "tower": 0.6, "search": 2.1, "describe": 0.2},
}


class Accepted(BaseModel):
    """Base of what is accepted: an unknown field is a mistake."""

    model_config = ConfigDict(extra="forbid")


class HistoryEventIn(Accepted):
    """A visit of a history."""

    item_id: Id
    time_s: Moment | None = None
    stars: Stars | None = None


class RecommendIn(Accepted):
    """Who asks, and for what."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [ASKED]})

    user: Id | None = Field(None, description="A user's id. One that nobody knows is no error: the history alone speaks then.")
    history: list[HistoryEventIn] = Field(
        [], max_length=MAX_HISTORY_EVENTS, description="Oldest first; after what is known of the user."
    )
    k: int = Field(10, ge=1, le=MAX_K, description="Length of the list.")
    filter: Filter | None = Field(None, description="Which items may be in the list: as text, or the same as JSON.")
    near: tuple[Latitude, Longitude] | None = Field(None, description="Where the request comes from: latitude, longitude.")
    time_s: Moment | None = Field(
        None, description="The moment of the question, its second included; without one, the end of what is known."
    )
    exclude_seen: bool = Field(True, description="Leave out the items of the history. Otherwise the last visited gain.")
    diversity: float = Field(0.0, ge=0, le=1, description="How much an item's likeness to those above it counts against it.")
    popularity: float = Field(0.0, ge=-1, le=1, description="Below zero the rarely visited gain, above zero the often visited.")
    explain: bool = Field(
        False, description=f"Say of each place what moved its score; of at most {MAX_EXPLAINED_ITEMS} in a request."
    )

    @model_validator(mode="after")
    def _few_explained(self) -> RecommendIn:
        return _explained([self], self)

    def request(self) -> Request:
        """The same for a `Recommender`."""
        return Request(
            user=self.user,
            history=tuple(HistoryEvent(event.item_id, event.time_s, event.stars) for event in self.history),
            k=self.k,
            filter=self.filter,
            near=self.near,
            time_s=self.time_s,
            exclude_seen=self.exclude_seen,
            diversity=self.diversity,
            popularity=self.popularity,
            explain=self.explain,
        )


class BatchIn(Accepted):
    """Several requests at once."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"requests": [ASKED]}]})

    requests: list[RecommendIn] = Field(min_length=1, max_length=MAX_BATCH_REQUESTS)

    @model_validator(mode="after")
    def _few_explained(self) -> BatchIn:
        items = sum(one.k for one in self.requests)
        if items > MAX_BATCH_ITEMS:
            raise ValueError(f"at most {MAX_BATCH_ITEMS:,} places can be asked for at once; these requests ask for {items:,}")
        return _explained(self.requests, self)


Body = TypeVar("Body")


def _explained(requests: Sequence[RecommendIn], body: Body) -> Body:
    """The body, if what is to be explained can be within the time."""
    items = sum(one.k for one in requests if one.explain)
    if items > MAX_EXPLAINED_ITEMS:
        raise ValueError(f"at most {MAX_EXPLAINED_ITEMS} places can be explained at once; {items} are asked for")
    return body


class EventIn(Accepted):
    """Something that happened; the same `event_id` counts once, however often it is sent."""

    event_id: Id
    user: Id
    item_id: Id
    time_s: Moment | None = Field(None, description="Seconds since 1970; without one, now.")
    event_type: Id | None = Field(None, description="One of the bundle's kinds of events; without one, the first.")
    stars: Stars | None = None


class EventsIn(Accepted):
    """Events to keep."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [SENT]})

    events: list[EventIn] = Field(min_length=1, max_length=MAX_EVENTS_PER_REQUEST)


class ReloadIn(Accepted):
    """What to serve from now on."""

    bundle: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None, description="A folder on the server; without one, the folder served now, read again.", examples=["runs/yelp/bundle"]
    )


class ItemOut(BaseModel):
    """An item."""

    model_config = ConfigDict(json_schema_extra={"examples": [ITEM]})

    item_id: str
    name: str
    categories: list[str]
    city: str | None
    latitude: float | None
    longitude: float | None


class ItemDetailOut(ItemOut):
    """An item with every column the catalogue has of it."""

    columns: dict[str, Any]


class ReasonOut(BaseModel):
    """What moved a score."""

    kind: Literal["visit", "user", "item"]
    name: str
    label: str
    share: float = Field(description="What it adds to the score, to the first order; negative where it holds the place down.")


class RecommendationOut(ItemOut):
    """A recommended item."""

    rank: int
    distance_km: float | None
    score: float = Field(description="An inner product, and what the place's popularity adds; of a back-off, visits as a share.")
    reasons: list[ReasonOut]


class ListOut(BaseModel):
    """A list, and how much to make of it."""

    source: Literal["model", "nearby", "recent"]
    confidence: float
    user_known: bool
    items: list[RecommendationOut]
    stages_ms: dict[str, float]


class AnswerOut(ListOut):
    """The answer to one request."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"request_id": "5f0c", "version": "a1b2c3d4e5f6", "took_ms": 4.2, **LIST}]}
    )

    request_id: str
    version: str
    took_ms: float


class BatchOut(BaseModel):
    """The answers to several requests, in their order, all of one version."""

    request_id: str
    version: str
    took_ms: float
    answers: list[ListOut]


class ItemsOut(BaseModel):
    """Items."""

    items: list[ItemOut]


class SimilarOut(BaseModel):
    """Places like one."""

    version: str
    items: list[RecommendationOut]


class UserOut(BaseModel):
    """A user, and how many events are known."""

    user: str
    events: int


class UsersOut(BaseModel):
    """Users."""

    users: list[UserOut]


class HistoryEventOut(ItemOut):
    """An event of a history."""

    time_s: int | None
    stars: float | None
    event_type: str | None


class HistoryOut(BaseModel):
    """A user's events, oldest first."""

    user: str = Field(examples=["u_17"])
    events: list[HistoryEventOut]


class EventsOut(BaseModel):
    """What became of the events sent: all of them are on the disk now."""

    accepted: int = Field(examples=[1])
    repeated: int = Field(examples=[0])


class FiltersOut(BaseModel):
    """What a catalogue can be filtered by."""

    categories: list[str] = Field(examples=[["Restaurants", "Mexican"]])
    has_price: bool
    has_locations: bool
    has_hours: bool
    has_zones: bool = Field(description="Whether places say their time zone, so that open_now is by each one's own clock.")


class AboutOut(BaseModel):
    """What is served."""

    version: str = Field(examples=["15c0f43823b2"])
    name: str = Field(examples=["bundle"])
    items: int = Field(examples=[1500])
    users: int = Field(examples=[3000])
    metrics: dict[str, Any]
    filters: FiltersOut
    events_need_key: bool


class StateOut(BaseModel):
    """Whether the server lives, or is ready."""

    status: Literal["live", "ready"]
    version: str | None = None


class ReloadOut(BaseModel):
    """What is served now, and what was before."""

    version: str = Field(examples=["67499b37599f"])
    before: str = Field(examples=["7a8339d5a72d"])


class Mistake(BaseModel):
    """What must hold, what was found, what to do."""

    code: str
    message: str
    location: str | int | None = Field(
        None, description="The part of the request: a path in its JSON, or a character of its filter."
    )


class ErrorOut(BaseModel):
    """A request that was refused, or failed."""

    error: Mistake
    request_id: str
