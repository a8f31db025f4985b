"""Define the list of one request as item rows, from which an answer is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from twotower.retrieval.item_details import Home
from twotower.retrieval.request import Reason, Source
from twotower.retrieval.request_reader import ParsedRequest
from twotower.utils.types import Float, Float64, Int


@dataclass(slots=True)
class RankedRows:
    """The list of one request, as item rows.

    Attributes
    ----------
    rows, scores
        int64 [n], float32 [n]: item rows in list order, and their scores without the popularity bias of the request. For the
        fallback of unknown users: recent events relative to the most popular item.
    home
        Origin of the distances.
    selectivity
        Share of the items that match the filter; None without a filter.
    pool, propensity
        Items that exploration may show, and the probability with which the list has each item; None without exploration.
    """

    parsed: ParsedRequest
    source: Source
    rows: Int
    scores: Float
    home: Home
    selectivity: float | None = None
    reasons: list[tuple[Reason, ...]] = field(default_factory=list)
    pool: Int | None = None
    propensity: Float64 | None = None
