"""Test that loading a bundle with any file contents gives a bundle or one `DataError`.

`TWOTOWER_FUZZ_CASES` says how many cases of each of the five kinds are tried: with 20000 they are 10^5, in an hour of a core.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from twotower.bundle.bundle import load_bundle
from twotower.bundle.sealed_folder import MANIFEST
from twotower.errors import DataError

from ..documents import seal_again

CASES = int(os.environ.get("TWOTOWER_FUZZ_CASES", "12"))
BRISK = {"deadline": None, "suppress_health_check": list(HealthCheck)}
NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-3, 300) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.just("../../x")
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5
)


@pytest.fixture(scope="module")
def scratch(town_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(town_bundle, tmp_path_factory.mktemp("fuzz") / "bundle"))


def outcome(folder: Path) -> str:
    """ "ok" or "refused"; anything else fails the test."""
    try:
        load_bundle(folder)
    except DataError as error:
        assert "\n" not in str(error)
        return "refused"
    return "ok"


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Return the bytes with some changed, removed or cut off, mostly near the start, where formats have their headers."""
    place = st.one_of(st.integers(0, min(600, len(content) - 1)), st.integers(0, len(content) - 1))
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = min(data.draw(place), max(len(changed) - 1, 0))
        match data.draw(st.sampled_from(["flip", "cut", "drop", "insert"])):
            case "flip":
                changed[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case "cut":
                del changed[at:]
            case "drop":
                del changed[at : at + data.draw(st.integers(1, 9))]
            case _:
                changed[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    return bytes(changed)


@pytest.mark.parametrize("sealed_again", [False, True], ids=["as found", "sealed again"])
def test_bytes(scratch: Path, sealed_again: bool) -> None:
    names = sorted(path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file())
    manifest_text = (scratch / MANIFEST).read_text()

    @settings(max_examples=CASES, **BRISK)
    @given(st.sampled_from(names), st.data())
    def check(name: str, data: st.DataObject) -> None:
        if sealed_again:
            assume(name != MANIFEST)
        whole = (scratch / name).read_bytes()
        broken = damaged(whole, data)
        try:
            (scratch / name).write_bytes(broken)
            if sealed_again:
                seal_again(scratch, json.loads(manifest_text))
            found = outcome(scratch)
            assert sealed_again or found == ("ok" if broken == whole else "refused") or name == MANIFEST
        finally:
            (scratch / name).write_bytes(whole)
            (scratch / MANIFEST).write_text(manifest_text)

    check()
    assert outcome(scratch) == "ok"


@pytest.mark.parametrize("name", [MANIFEST, f"dataset/{MANIFEST}", "dataset/encoders.json"])
def test_values_of_json(scratch: Path, name: str) -> None:
    text = {part: (scratch / part).read_text() for part in (name, MANIFEST)}

    @settings(max_examples=CASES, **BRISK)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        body = json.loads(text[name])
        node: Any = body
        while True:  # walk down to a leaf or stop on the way, and put something else there
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys))
            child = node[key]
            if not (isinstance(child, (dict, list)) and child and data.draw(st.integers(0, 4))):
                break
            node = child
        node[key] = data.draw(VALUES)
        try:
            (scratch / name).write_text(json.dumps(body))
            seal_again(scratch, body if name == MANIFEST else json.loads(text[MANIFEST]))
            outcome(scratch)
        finally:
            for part, whole in text.items():
                (scratch / part).write_text(whole)

    check()
    assert outcome(scratch) == "ok"
