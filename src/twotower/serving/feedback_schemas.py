"""Define the JSON of HTTP responses about feedback: forgotten users, and versions with their outcomes."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ForgottenOut(BaseModel):
    """What was deleted of a user. On response, the store does not hold the id, and no bundle of this server unless it is signed."""

    user: str = Field(examples=["u_17"])
    events: int = Field(examples=[12], description="Accepted events that were deleted.")
    in_bundle: bool = Field(
        examples=[False],
        description="A signed bundle still holds the id: the server cannot rewrite it. Run `twotower forget`, sign it and reload.",
    )


class RateOut(BaseModel):
    """A mean with its 95 % interval over users. The interval is null with fewer than two users."""

    value: float = Field(examples=[0.31])
    low: float | None = Field(examples=[0.29])
    high: float | None = Field(examples=[0.33])


class OutcomesOut(BaseModel):
    """What came of the lists of a version. A list counts once an impression or an outcome names it."""

    lists: int = Field(examples=[2210])
    users: int = Field(examples=[640])
    click_through: RateOut = Field(description="Share of the lists with an outcome.")
    outcomes_per_list: RateOut = Field(description="Outcomes of a list: all its events but impressions and dislikes.")
    events: dict[str, int] = Field(examples=[{"impression": 22100, "visit": 702}], description="Numbers by event type.")


class ServedOut(BaseModel):
    """A served version."""

    version: str = Field(examples=["67499b37599f"])
    bundle: str = Field(examples=["bundle"], description="Name of its folder.")
    role: str = Field(examples=["first"], description="`first`, `second`, or `shadow`: computed, but not shown.")
    share: float = Field(examples=[0.9], description="Share of the users whose lists it makes.")
    outcomes: OutcomesOut | None


class VersionsOut(BaseModel):
    """The served versions, the outcomes of all versions by name, and the versions to which the server can go back."""

    versions: list[ServedOut]
    outcomes: dict[str, OutcomesOut] = Field(description="By version, also of those that are no longer served.")
    difference: RateOut | None = Field(description="Click-through of the second version minus that of the first.")
    kept: list[str] = Field(examples=[["15c0f43823b2"]])
