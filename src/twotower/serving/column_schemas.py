"""Define the JSON of HTTP responses that describe the columns of the catalogue."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ValueOut(BaseModel):
    """A value of a column, and the number of items that have it."""

    value: str | float = Field(examples=["Mexican"])
    items: int = Field(examples=[120])


class ValuesOut(BaseModel):
    """Values of a column, frequent ones first."""

    values: list[ValueOut]


class ColumnOut(BaseModel):
    """A column that a filter can compare."""

    name: str = Field(examples=["price"])
    kind: Literal["text", "number", "list"]
    items: int = Field(description="Number of items with a value.", examples=[1380])
    min: float | None = Field(description="Least number.", examples=[1])
    max: float | None = Field(description="Largest number.", examples=[4])
    values: list[ValueOut] = Field(description="Frequent values; of numbers, all if they are few.")
    has_more: bool = Field(description="True if there are more values; see `/v1/values`.")


class ColumnsOut(BaseModel):
    """The columns that filters can compare, and examples of filters."""

    columns: list[ColumnOut]
    examples: list[str] = Field(
        description="Filters that some items pass.", examples=[['category == "Mexican"', 'category == "Mexican" and price <= 2']]
    )
