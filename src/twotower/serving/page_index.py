"""Serve the page itself. Its first response has all that a phone needs to show the first list: style, cards, and the answer.

The list is that of an unknown user without a history, which the page shows at first. Without it (reading needs a key, or the server
is overloaded), the page requests its list as it does for every other one. The template draws the cards; `page/recommended.js` fills
copies of the same card.
"""

from __future__ import annotations

import gzip
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from jinja2 import Environment, StrictUndefined
from pydantic_core import from_json

from twotower.errors import TwoTowerError
from twotower.serving.page_files import REVALIDATED, MapTiles, PageFiles, add_files
from twotower.serving.response_headers import accepts_gzip, policy, source_hash
from twotower.serving.schemas import RecommendIn
from twotower.utils.types import Json

TEMPLATE = "index.html.jinja"
STYLE, SCRIPT = "style.css", "early.js"
CATEGORIES = 3  # of a card
SMALLEST = 1e-300  # of scores that are divided by
GZIP_LEVEL = 6


@dataclass(frozen=True, slots=True)
class FirstList:
    """The first list of the page.

    Attributes
    ----------
    answer
        Response of `/v1/recommend`, as JSON.
    filters
        What the catalogue has; see `Browser.about`.
    """

    answer: bytes
    filters: Json


FirstLists = Callable[[dict[str, Any]], Awaitable[FirstList | None]]
"""Returns the first list for the state of a request; None: the page requests it."""


class PageIndex:
    """The page, with its style sheet and its first script inside.

    Parameters
    ----------
    page
        The other files.
    tiles
        Where the map gets images of the ground; None: it draws its own.
    """

    def __init__(self, page: PageFiles, tiles: MapTiles | None = None) -> None:
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(files("twotower.serving").joinpath(TEMPLATE).read_text(encoding="utf-8"))
        style, script = page.text(STYLE), page.text(SCRIPT)
        self._fixed = {"tag": page.tag, "tiles": tiles, "style": style, "script": script}
        images = tiles.origin if tiles is not None else ""
        self._policy = policy(images, scripts=source_hash(script), styles=source_hash(style))

    def response(self, first: FirstList | None, *, packed: bool) -> Response:
        """Return the page with its first list, with `packed` compressed."""
        answer = None if first is None else first.answer.replace(b"<", b"\\u003c").decode()
        filters, items = (None, []) if first is None else (first.filters, shown(from_json(first.answer)["items"]))
        text = self._template.render(**self._fixed, answer=answer, filters=filters, items=items)
        headers = {"cache-control": REVALIDATED, "vary": "accept-encoding", "content-security-policy": self._policy}
        if packed:
            headers["content-encoding"] = "gzip"
        content = gzip.compress(text.encode(), GZIP_LEVEL, mtime=0) if packed else text.encode()
        return Response(content, media_type="text/html", headers=headers)


def shown(items: list[Json]) -> list[Json]:
    """Return items with what their cards say: `summary`, and `share`, the score relative to the highest.

    Shares are None if the scores do not fall from the first item to the last.

    Examples
    --------
    >>> item = {"categories": ["Bars", "Food", "Pubs", "Tea"], "city": "Tampa", "score": 0.5}
    >>> [(one["summary"], one["share"]) for one in shown([item, {**item, "city": None, "score": 0.25}])]
    [('Bars, Food, Pubs · Tampa', 1.0), ('Bars, Food, Pubs', 0.5)]
    """
    scores = [item["score"] for item in items]
    ordered = None not in scores and scores == sorted(scores, reverse=True)
    best = max([SMALLEST, *scores]) if ordered else 1.0
    return [
        {
            **item,
            "summary": " · ".join(filter(None, [", ".join(item["categories"][:CATEGORIES]), item["city"]])),
            "share": round(max(0.0, item["score"] / best), 4) if ordered else None,
        }
        for item in items
    ]


def add_page(app: FastAPI, tiles: MapTiles | None, first_list: FirstLists) -> None:
    """Add the routes of the page and of its files."""
    page_files = PageFiles()
    index = PageIndex(page_files, tiles)
    add_files(app, page_files)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        first = await first_list(request.scope["state"])
        return index.response(first, packed=accepts_gzip(request.headers.get("accept-encoding", "").encode("latin-1")))


def first_lists(
    recommend: Callable[[RecommendIn, dict[str, Any]], Awaitable[bytes]],
    about: Callable[[], Awaitable[Json]],
    allowed: Callable[[str], bool],
) -> FirstLists:
    """Return a function that gets the first list.

    Parameters
    ----------
    recommend
        Answers a request for recommendations, given the state of the HTTP request.
    about
        Describes the bundle.
    allowed
        Returns True if a client gets the list with the page.
    """

    async def first(state: dict[str, Any]) -> FirstList | None:
        if not allowed(state["client"]):
            return None
        body = RecommendIn()
        state["asks_for"](1 + body.weight)
        try:
            return FirstList(await recommend(body, state), (await about())["filters"])
        except TwoTowerError:
            return None

    return first
