"""A stand-in for the server, for working on the page alone: the HTTP API on a real bundle, answered without any care for speed.

    python tests/browser/double.py BUNDLE PORT

History, item vectors, filters and descriptions are the bundle's own; the dials and the reasons are only plausible: enough for the
page to have something to show. The real server takes its place in the tests as soon as it can be imported.
"""

from __future__ import annotations

import random
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

import twotower
from twotower.errors import RequestError
from twotower.retrieval.filters import distances_km
from twotower.retrieval.recommender import Recommender
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW, UNKNOWN

Json = dict[str, Any]
PAGE = Path(twotower.__file__).parent / "serving" / "page"
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'"
DEEP = 500


class Double:
    """Answers of one bundle."""

    def __init__(self, bundle: Path) -> None:
        self.r = Recommender.load(bundle)
        self.data, self.vectors = self.r.dataset, self.r.bundle.vectors.numpy()
        self.people = [str(user) for user in self.data.user_ids[FIRST_ROW:]]
        self.random = random.Random(0)
        count = np.log1p(self.data.item_train_count.astype(np.float32))
        self.popular = (count - count.mean()) / count.std()

    def brief(self, row: int) -> Json:
        facts = self.r.describe(row)
        at = self.r.filter.places[row - FIRST_ROW]
        known = bool(np.isfinite(at).all())
        categories = facts.get(self.r.filter.category or "") or []
        return {
            "item_id": facts["item_id"],
            "name": facts.get("name") or facts["item_id"],
            "categories": categories if isinstance(categories, list) else [categories],
            "city": facts.get("city"),
            "latitude": float(at[0]) if known else None,
            "longitude": float(at[1]) if known else None,
        }

    def row(self, item_id: str) -> int:
        row = int(self.data.item_rows([item_id])[0])
        if row == UNKNOWN:
            raise HTTPException(404, f"Every item must be in the catalogue. Found no {item_id!r}.")
        return row

    def queries(self, body: Json) -> tuple[Queries, bool]:
        user = int(self.data.user_rows([body["user"]])[0]) if body.get("user") else UNKNOWN
        own: list[int] = []
        if user != UNKNOWN:
            own = self.data.histories(np.array([user]), np.array([self.r.moment_s])).item_row.tolist()
        rows = [*own, *(self.row(visit["item_id"]) for visit in body.get("history") or [])]
        queries = Queries.of([rows], time_s=self.r.moment_s, user_rows=[user])
        if body.get("near"):
            queries = replace(queries, place=np.array([body["near"]], np.float32))
        return queries, user != UNKNOWN

    def recommend(self, body: Json) -> Json:
        began = time.perf_counter()
        queries, known = self.queries(body)
        k, seen = min(int(body.get("k", 10)), self.data.n_items - FIRST_ROW), len(queries.item_row)
        home = tuple(body["near"]) if body.get("near") else self.r._home(queries)
        allow = np.ones(self.data.n_items, np.bool_)
        if body.get("filter"):
            allow = self.r.filter.compile(body["filter"], home=home).copy()
        allow[:FIRST_ROW] = False
        if body.get("exclude_seen", True):
            allow[queries.item_row] = False
        filtered = time.perf_counter()
        if known or seen:
            source, user = "model", self.r.retriever.encode(queries).numpy()[0]
            cosine = self.vectors @ user
            order = self.order(cosine + 0.05 * float(body.get("popularity", 0)) * self.popular, allow, k, body.get("diversity", 0))
        else:
            source, user, cosine = ("nearby" if home else "recent"), None, self.popular / 10
            near = distances_km(self.r.filter.places, home) if home else None
            score = cosine if near is None else cosine - np.concatenate([[0, 0], np.nan_to_num(near, nan=99)]) / 10
            order = self.order(score, allow, k, 0)
        searched = time.perf_counter()
        items = []
        for rank, row in enumerate(order, 1):
            brief = self.brief(row)
            far = None
            if home is not None and brief["latitude"] is not None:
                far = round(float(distances_km(np.array([[brief["latitude"], brief["longitude"]]]), home)[0]), 2)
            reasons = self.reasons(row, queries) if body.get("explain") and user is not None else []
            items.append({"rank": rank, **brief, "distance_km": far, "score": round(float(cosine[row]), 4), "reasons": reasons})
        done = time.perf_counter()
        return {
            "source": source,
            "confidence": round(seen / (seen + 3), 3),
            "user_known": known,
            "items": items,
            "took_ms": round((done - began) * 1000, 2),
            "stages_ms": {
                "tower": round((searched - filtered) * 700, 2),
                "filter": round((filtered - began) * 1000, 2),
                "search": round((searched - filtered) * 300, 2),
                "describe": round((done - searched) * 1000, 2),
            },
        }

    def order(self, score: Any, allow: Any, k: int, diversity: float) -> list[int]:
        best = [int(row) for row in np.argsort(-np.where(allow, score, -np.inf), kind="stable")[: max(5 * k, 50)] if allow[row]]
        if not diversity:
            return best[:k]
        chosen: list[int] = []
        while best and len(chosen) < k:
            like = (self.vectors[best] @ self.vectors[chosen].T).max(1) if chosen else np.zeros(len(best))
            chosen.append(best.pop(int(np.argmax((1 - diversity) * score[best] - diversity * like))))
        return chosen

    def reasons(self, row: int, queries: Queries) -> list[Json]:
        rows = list(dict.fromkeys(queries.item_row.tolist()))[-50:]
        near = {one: float(self.vectors[one] @ self.vectors[row]) / len(rows) for one in rows}
        visits = [
            {"kind": "visit", "name": self.brief(one)["item_id"], "label": self.brief(one)["name"], "share": round(near[one], 4)}
            for one in sorted(rows, key=lambda one: -abs(near[one]))[:5]
        ]
        feature = {"kind": "item", "name": "categories", "label": "its categories", "share": 0.021}
        habit = {"kind": "user", "name": "since", "label": "how long the user has been around", "share": -0.006}
        return sorted([*visits, feature, habit], key=lambda reason: -abs(float(str(reason["share"]))))

    def similar(self, item_id: str, k: int, where: str | None) -> Json:
        row = self.row(item_id)
        allow = self.r.filter.compile(where).copy() if where else np.ones(self.data.n_items, np.bool_)
        allow[[0, 1, row]] = False
        cosine = self.vectors @ self.vectors[row]
        order = self.order(cosine, allow, k, 0)
        rest: Json = {"distance_km": None, "reasons": []}
        return {
            "items": [{"rank": n, **self.brief(i), "score": round(float(cosine[i]), 4), **rest} for n, i in enumerate(order, 1)]
        }

    def users(self, q: str, limit: int) -> Json:
        found = [user for user in self.people if q.lower() in user.lower()][:limit]
        return {"users": [{"user": user, "events": len(self.history(user)["events"])} for user in found]}

    def history(self, user: str) -> Json:
        row = self.data.user_rows([user])
        if row[0] == UNKNOWN:
            raise HTTPException(404, f"The user must be in the bundle. Found no {user!r}.")
        found = self.data.histories(row, np.array([self.r.moment_s]))
        events = [
            {**self.brief(int(item)), "time_s": int(at), "stars": None if np.isnan(stars) else float(stars)}
            for item, at, stars in zip(found.item_row, found.event_time_s, found.stars, strict=True)
        ]
        return {"user": user, "events": events}

    def items(self, q: str, limit: int) -> Json:
        names = self.data.items["name"].to_pylist() if "name" in self.data.items.column_names else self.data.item_ids.tolist()
        found = [n for n, name in enumerate(names) if q.lower() in str(name).lower()][:limit]
        return {"items": [self.brief(n + FIRST_ROW) for n in found]}

    def about(self) -> Json:
        flat = [c for one in range(FIRST_ROW, self.data.n_items) for c in self.brief(one)["categories"]]
        frequent = sorted(set(flat), key=lambda name: (-flat.count(name), name))[:50]
        return {
            "version": "double",
            "name": self.r.bundle.path.parent.name,
            "items": self.data.n_items - FIRST_ROW,
            "users": len(self.people),
            "metrics": self.r.bundle.manifest["metrics"],
            "filters": {
                "categories": frequent,
                "has_price": "price" in self.data.items.column_names,
                "has_places": bool(np.isfinite(self.r.filter.places).any()),
                "has_hours": self.r.filter._hours is not None,
            },
            "events_need_key": True,
        }


def make_app(bundle: Path) -> FastAPI:
    """The routes that the page calls."""
    double, app = Double(bundle), FastAPI()

    def failed(status: int, code: str, message: str) -> JSONResponse:
        return JSONResponse({"error": {"code": code, "message": message}, "request_id": uuid.uuid4().hex}, status)

    @app.exception_handler(RequestError)
    def refused(_: Request, error: RequestError) -> JSONResponse:
        return failed(422, "invalid_request", str(error))

    @app.exception_handler(HTTPException)
    def missing(_: Request, error: HTTPException) -> JSONResponse:
        return failed(error.status_code, "not_found", str(error.detail))

    @app.middleware("http")
    async def policy(request: Request, call: Any) -> Response:
        answer: Response = await call(request)
        answer.headers["Content-Security-Policy"] = POLICY
        return answer

    app.get("/health/ready")(lambda: {"status": "ready"})
    app.get("/v1/about")(double.about)
    app.get("/v1/items")(lambda q="", limit=20: double.items(str(q), int(limit)))
    app.get("/v1/items/{item_id}")(
        lambda item_id: {**double.brief(double.row(item_id)), "facts": double.r.describe(double.row(item_id))}
    )
    app.get("/v1/items/{item_id}/similar")(lambda item_id, k=10, filter=None: double.similar(item_id, int(k), filter))
    app.get("/v1/users")(lambda q="", limit=20: double.users(str(q), int(limit)))

    @app.get("/v1/users/random")
    def drawn() -> Json:
        user = double.random.choice(double.people)
        return {"users": [{"user": user, "events": len(double.history(user)["events"])}]}

    app.get("/v1/users/{user}/history")(lambda user: double.history(user))

    @app.post("/v1/recommend")
    def recommend(body: Json) -> Json:
        return {"request_id": uuid.uuid4().hex, "version": "double", **double.recommend(body)}

    app.mount("/page", StaticFiles(directory=PAGE))
    app.get("/")(lambda: FileResponse(PAGE / "index.html"))
    return app


if __name__ == "__main__":
    uvicorn.run(make_app(Path(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
