"""Hold the examples of requests and responses that the OpenAPI document shows."""

from __future__ import annotations

from pydantic.config import JsonDict

REQUEST: JsonDict = {
    "user": "u_17",
    "history": [{"item_id": "b_230", "time_s": 1640995200, "stars": 5}],
    "k": 5,
    "filter": 'category == "Mexican" and price <= 2',
    "near": [27.95, -82.46],
}
EVENTS: JsonDict = {"events": [{"event_id": "01J9Z4-7", "user": "u_17", "item_id": "b_230", "time_s": 1640995200, "stars": 4}]}
OUTCOMES: JsonDict = {
    "events": [
        {"request_id": "30d1303d8dd74074ba778aa1c51d1aaf", "shown": ["b_230", "b_5"]},
        {"request_id": "30d1303d8dd74074ba778aa1c51d1aaf", "item_id": "b_5", "event_type": "visit"},
    ]
}
ITEM: JsonDict = {
    "item_id": "b_5",
    "name": "Taqueria Sol",
    "categories": ["Restaurants", "Mexican"],
    "city": "Tampa",
    "latitude": 27.96,
    "longitude": -82.45,
}
REASON: JsonDict = {"kind": "event", "name": "b_230", "label": "El Farol", "contribution": 0.21}
RECOMMENDATION: JsonDict = {**ITEM, "rank": 1, "distance_km": 1.4, "score": 0.83, "reasons": [REASON]}
LIST: JsonDict = {
    "source": "model",
    "confidence": 0.77,
    "user_known": True,
    "unknown_items": [],
    "next": "YTFiMmMzLmQ0LjEw",
    "items": [RECOMMENDATION],
    "stages_ms": {"features": 0.4, "tower": 0.6, "search": 2.1, "describe": 0.2},
}
