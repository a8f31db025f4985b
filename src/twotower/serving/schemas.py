"""Define the JSON bodies of HTTP requests, with their bounds, and of HTTP responses. The OpenAPI document is made from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError, to_json

from twotower.retrieval.request import HistoryEvent, Request
from twotower.serving.cursors import Cursor, Next, depth
from twotower.serving.limits import (
    LAST_S,
    MAX_BATCH_HISTORY_EVENTS,
    MAX_BATCH_ITEMS,
    MAX_BATCH_REQUESTS,
    MAX_EXPLAINED_ITEMS,
    MAX_FILTER_CHARS,
    MAX_FILTER_JSON_BYTES,
    MAX_HISTORY_EVENTS,
    MAX_ID_CHARS,
    MAX_K,
)
from twotower.serving.schema_examples import ITEM, LIST, REQUEST

Id = Annotated[
    str,
    Field(min_length=1, max_length=MAX_ID_CHARS),
    BeforeValidator(lambda value: str(value) if isinstance(value, int) and not isinstance(value, bool) else value),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_ID_CHARS}, {"type": "integer"}]}),
]  # an integer is the same as its text
IdOut = str | int  # in the type that the id had in the raw data


def _whole(value: Any) -> Any:
    """Refuse texts and booleans, which Pydantic would turn into integers. In JSON Schema, 3.0 is an integer, too."""
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "Input should be an integer, not a boolean")
    if isinstance(value, str):
        raise PydanticCustomError("int_type", "Input should be an integer, not a text")
    return value


Moment = Annotated[int, Field(ge=0, le=LAST_S, description="Seconds since 1970."), BeforeValidator(_whole)]
Stars = Annotated[float, Field(ge=0, le=5, strict=True)]


def _bounded(value: dict[str, Any]) -> dict[str, Any]:
    if len(to_json(value)) > MAX_FILTER_JSON_BYTES:
        raise ValueError(f"the filter is too large: at most {MAX_FILTER_JSON_BYTES:,} bytes of JSON are allowed")
    return value


Filter = Annotated[str, Field(max_length=MAX_FILTER_CHARS)] | Annotated[dict[str, Any], AfterValidator(_bounded)]
AsOf = Annotated[
    int | None, Field(description="Items as of: events before this second count for them. null: events have no times.")
]
Latitude = Annotated[float, Field(ge=-90, le=90, strict=True)]
Longitude = Annotated[float, Field(ge=-180, le=180, strict=True)]


class Accepted(BaseModel):
    """Base class of request bodies. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid")


class HistoryEventIn(Accepted):
    """An event of a history."""

    item_id: Id
    time_s: Moment | None = None
    stars: Stars | None = None


class RecommendIn(Accepted):
    """A request for recommendations."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [REQUEST]})

    user: Id | None = Field(None, description="User id. For an unknown user only `history` is used.")
    history: Annotated[list[HistoryEventIn], FailFast()] = Field(
        [], max_length=MAX_HISTORY_EVENTS, description="Events, oldest first. They are added to the known events of the user."
    )
    k: Annotated[int, BeforeValidator(_whole)] = Field(10, ge=1, le=MAX_K, description="Number of items to return.")
    filter: Filter | None = Field(None, description="Condition that every recommended item meets: text or JSON.")
    near: tuple[Latitude, Longitude] | None = Field(None, description="Location of the request: latitude and longitude, degrees.")
    time_s: Moment | None = Field(
        None, description="Time of the request in seconds since 1970. Later events are ignored. Default: the end of the events."
    )
    exclude_seen: bool = Field(True, strict=True, description="Exclude items of the history. If false, they are ranked too.")
    diversity: float = Field(
        0.0, ge=0, le=1, strict=True, description="Diversity (MMR): penalises items similar to higher-ranked items."
    )
    popularity_bias: float = Field(
        0.0, ge=-1, le=1, strict=True, description="Popularity bias: below 0 favours rare items, above 0 popular items."
    )
    strict: bool = Field(
        False,
        strict=True,
        description="Reject a history with unknown items. If false, they are passed over and listed in `unknown_items`.",
    )
    cursor: Cursor = None
    explain: bool = Field(
        False,
        strict=True,
        description=f"Return the reasons of each score. At most {MAX_EXPLAINED_ITEMS} items per request can be explained.",
    )

    @model_validator(mode="after")
    def _few_explained(self) -> RecommendIn:
        return _explained([self], self)

    @cached_property
    def weight(self) -> int:
        """Return how much work the request is, in plain lists of ten: long lists, histories and explanations are more."""
        long = (depth(self.cursor) + self.k - 1) // 50 * (2 if self.diversity else 1)
        return 1 + long + len(self.history) // 100 + (1 + len(self.history) // 300) * (self.k // 2 if self.explain else 0)

    @property
    def identity(self) -> str:
        """Return what the list is about, whatever part of it is asked for."""
        return self.model_dump_json(exclude={"k", "cursor", "explain"}, exclude_defaults=True)

    def request(self, skip: int = 0, explore: float = 0.0) -> Request:
        """Return the request, for the items after the first `skip` of its list, in the form that a `Recommender` takes."""
        return Request(
            user=self.user,
            history=tuple(HistoryEvent(event.item_id, event.time_s, event.stars) for event in self.history),
            k=self.k,
            skip=skip,
            filter=self.filter,
            near=self.near,
            time_s=self.time_s,
            exclude_seen=self.exclude_seen,
            diversity=self.diversity,
            popularity_bias=self.popularity_bias,
            explain=self.explain,
            explore=explore,
        )


class BatchIn(Accepted):
    """Several requests for recommendations."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"requests": [REQUEST]}]})

    requests: Annotated[list[RecommendIn], FailFast()] = Field(min_length=1, max_length=MAX_BATCH_REQUESTS)

    @model_validator(mode="after")
    def _few_explained(self) -> BatchIn:
        items = sum(one.k for one in self.requests)
        if items > MAX_BATCH_ITEMS:
            raise ValueError(f"the requests ask for {items:,} items; at most {MAX_BATCH_ITEMS:,} items per batch are allowed")
        events = sum(len(one.history) for one in self.requests)
        if events > MAX_BATCH_HISTORY_EVENTS:
            raise ValueError(
                f"the histories have {events:,} events; at most {MAX_BATCH_HISTORY_EVENTS:,} events per batch are allowed"
            )
        return _explained(self.requests, self)


Body = TypeVar("Body")


def _explained(requests: Sequence[RecommendIn], body: Body) -> Body:
    """Return the body. Raise a ValueError if more items are to be explained than one request allows."""
    items = sum(one.k for one in requests if one.explain)
    if items > MAX_EXPLAINED_ITEMS:
        raise ValueError(f"explanations are requested for {items} items; at most {MAX_EXPLAINED_ITEMS} items are allowed")
    return body


class ReloadIn(Accepted):
    """The bundle to serve."""

    bundle: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None, description="Folder on the server. Default: the current folder, which is read again.", examples=["runs/yelp/bundle"]
    )


class ItemOut(BaseModel):
    """An item."""

    model_config = ConfigDict(json_schema_extra={"examples": [ITEM]})

    item_id: IdOut
    name: str
    categories: list[str]
    city: str | None
    latitude: float | None
    longitude: float | None


class ItemDetailOut(ItemOut):
    """An item with all its catalogue columns."""

    columns: dict[str, Any]


class ReasonOut(BaseModel):
    """A reason for a score: an event of the history, a feature of the user or a feature of the item."""

    kind: Literal["event", "user", "item"]
    name: str
    label: str
    contribution: float = Field(description="First-order contribution to the score; negative if it lowers the score.")


class RecommendationOut(ItemOut):
    """A recommended item."""

    rank: int
    distance_km: float | None
    score: float = Field(
        description="Inner product of both vectors, and the bonus of an item that has one. If `source` is not `model`: relative "
        "recent events."
    )
    reasons: list[ReasonOut]
    propensity: float = Field(1.0, description="Probability with which the list has this item; below 1 if the server explores.")


class ListOut(BaseModel):
    """A list of recommendations with its source and confidence."""

    source: Literal["model", "nearby", "recent"]
    confidence: float
    user_known: bool
    unknown_items: list[str] = Field(description="Items of the history that the bundle does not know; they were passed over.")
    next: Next
    items: list[RecommendationOut]
    stages_ms: dict[str, float]


class AnswerOut(ListOut):
    """The response to one request."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"request_id": "5f0c", "version": "a1b2c3d4e5f6", "as_of": 1640995200, "took_ms": 4.2, **LIST}]
        }
    )

    request_id: str
    version: str
    as_of: AsOf
    took_ms: float


Code = Literal[
    "malformed", "host", "origin", "not_found", "method_not_allowed", "too_large", "encoding", "invalid", "refused",
    "unauthorized", "forbidden", "rate", "timeout", "busy", "internal",
]  # fmt: skip


class ErrorDetail(BaseModel):
    """The error: what is wrong, what is allowed and what to do."""

    code: Code = Field(description="Kind of the error. `invalid`: the request is well-formed but cannot be answered.")
    message: str = Field(examples=["Unknown item 'b_231'. Search for valid ids with GET /v1/items?q=TEXT."])
    location: str | int | None = Field(
        None, description="Part of the request that is wrong: a path in its JSON, or a character position in its filter."
    )


class NamedListOut(ListOut):
    """A list of a batch."""

    request_id: str = Field(examples=["5f0c.0"], description="Name of this list for events.")
    version: str = Field(description="Version that made the list.")


class FailedOut(BaseModel):
    """A request of a batch that cannot be answered. The others are."""

    error: ErrorDetail


class BatchOut(BaseModel):
    """The responses to several requests, in request order. Without a split, all come from the same bundle version."""

    request_id: str
    version: str
    as_of: AsOf
    took_ms: float
    answers: list[NamedListOut | FailedOut]


class ItemsOut(BaseModel):
    """Items."""

    next: Next
    items: list[ItemOut | ItemDetailOut]


class SimilarOut(BaseModel):
    """The items most similar to an item."""

    version: str
    as_of: AsOf
    next: Next
    items: list[RecommendationOut]


class UserOut(BaseModel):
    """A user and the number of its known events."""

    user: IdOut
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

    user: IdOut = Field(examples=["u_17"])
    events: list[HistoryEventOut]


class ErrorOut(BaseModel):
    """The response to a request that was rejected or failed."""

    error: ErrorDetail
    request_id: str
