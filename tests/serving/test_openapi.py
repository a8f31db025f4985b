"""Test the OpenAPI document, from which clients are generated: complete, the same every time, and committed."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from twotower.serving import error_handlers, schemas
from twotower.serving.app import api_document

ROOT = Path(__file__).parents[2]
SOURCES = "\n".join(path.read_text() for path in sorted((ROOT / "src" / "twotower" / "serving").glob("*.py")))
OPERATION_IDS = {
    *("recommend", "recommend_batch", "similar_items", "similar_items_by_query"),
    *(
        "search_items",
        "get_item",
        "get_columns",
        "search_values",
        "search_users",
        "get_random_user",
        "get_history",
        "get_history_by_query",
        "get_about",
    ),
    *("add_events", "reload_bundle", "refresh_items", "check_live", "check_ready", "get_metrics"),
}
OPEN = {"check_live", "check_ready", "get_metrics"}  # routes without the key


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return api_document()


@pytest.fixture(scope="module")
def operations(document: dict[str, Any]) -> dict[str, Any]:
    return {one["operationId"]: one for methods in document["paths"].values() for one in methods.values()}


def test_the_committed_document_is_that_of_the_server(document: dict[str, Any]) -> None:
    committed = json.loads((ROOT / "docs" / "openapi.json").read_text())
    assert committed == document, "docs/openapi.json is out of date. Run `make clients`."
    assert json.dumps(committed) == json.dumps(document), "the order of docs/openapi.json differs. Run `make clients`."


def test_operation_ids_read_like_functions(operations: dict[str, Any]) -> None:
    assert operations.keys() >= OPERATION_IDS
    for name, one in operations.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
        assert one["description"].endswith(".") and len(one["tags"]) == 1, name


def test_every_route_has_its_answer_and_its_errors(document: dict[str, Any], operations: dict[str, Any]) -> None:
    shared = document["components"]["responses"]
    for name, one in operations.items():
        answers = one["responses"]
        (content,) = answers["200"]["content"].values()
        assert content["schema"], name
        if name not in OPEN:
            assert {"400", "401", "403", "408", "413", "415", "422", "429", "500", "503"} <= answers.keys() and one["security"]
        assert {answers[status]["$ref"].rpartition("/")[2] for status in answers if status >= "400"} <= shared.keys()
    for name, answer in shared.items():
        assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorOut"}
        assert ("Retry-After" in answer["headers"]) == (name in ("Error429", "Error503"))


def test_every_reference_leads_somewhere_and_every_schema_is_used(document: dict[str, Any]) -> None:
    used = {tuple(ref.split("/")[2:]) for ref in re.findall(r'"#(/components/[^"]+)"', json.dumps(document))}
    made = {(kind, name) for kind in ("schemas", "responses") for name in document["components"][kind]}
    assert used == made


def test_every_code_of_an_error_is_in_the_schema(document: dict[str, Any]) -> None:
    written = set(re.findall(r'(?:Denial|Refusal|refuse)\(\s*\d+, "([a-z_]+)"', SOURCES))
    written |= set(re.findall(r'\bcode(?:: str)? ?= ?"([a-z_]+)"', SOURCES)) | set(re.findall(r'"code": "([a-z_]+)"', SOURCES))
    written |= set(re.findall(r'(?:_error\(request, \d+,|error_body\() ?"([a-z_]+)"', SOURCES)) | set(error_handlers.CODES.values())
    allowed = set(typing.get_args(schemas.Code))
    assert len(written) > 10 and written <= allowed, written - allowed
    assert set(document["components"]["schemas"]["ErrorDetail"]["properties"]["code"]["enum"]) == allowed
