"""Test the TypeScript client: generated, typed, packed, and run by Node.js against a running server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .faulty_proxy import CUT, SILENT, Fault, FaultyProxy, faulty_proxy

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clients" / "typescript"
GENERATED = ("docs/openapi.json", "src/twotower/client_types.py", "clients/typescript/src/schema.ts")
Call = Callable[..., list[dict[str, Any]]]
RECOMMEND = ["POST", "/v1/recommend", {"body": {"k": 2}}]

pytestmark = pytest.mark.slow


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, lacking: Any) -> Path:
    """Return the folder of the built package, in which its own examples are built too."""
    if shutil.which("npm") is None:
        lacking("needs Node.js with npm")
    folder = tmp_path_factory.mktemp("typescript") / "package"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("node_modules", "dist", "built"))
    run("npm", "ci", "--no-audit", "--no-fund", cwd=folder)
    run("npm", "run", "build", cwd=folder)
    run("npm", "run", "check", cwd=folder)  # what the types should refuse is refused
    return folder


@pytest.fixture(scope="module")
def proxy(bundle: Path, load: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyProxy]:
    folder = tmp_path_factory.mktemp("typescript-server")
    with (
        load.Server(bundle, f"sqlite:{folder / 'events.sqlite'}", folder / "log", "--rate", "0") as server,
        faulty_proxy(server.port) as proxy,
    ):
        yield proxy


@pytest.fixture
def call(package: Path, proxy: FaultyProxy) -> Call:
    """Return a function that makes calls with the client and returns their results."""
    proxy.faults.clear()
    proxy.seen.clear()

    def calls(*calls: list[Any], abort_after_ms: int | None = None, **options: Any) -> list[dict[str, Any]]:
        given = {"options": {"baseUrl": proxy.url, **options}, "calls": calls}
        given |= {} if abort_after_ms is None else {"abortAfterMs": abort_after_ms}
        return [json.loads(line) for line in run("node", "test/call.js", json.dumps(given), cwd=package).splitlines()]

    return calls


def test_what_is_generated_is_up_to_date(tmp_path: Path, lacking: Any) -> None:
    if shutil.which("npx") is None:
        lacking("needs Node.js with npx")
    run(sys.executable, str(ROOT / "clients" / "generate.py"), "--root", str(tmp_path), cwd=ROOT)
    for name in GENERATED:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name} is out of date. Run `make clients`."


def test_the_example_runs(package: Path, proxy: FaultyProxy, load: Any) -> None:
    printed = json.loads(run("node", "test/built/example.js", proxy.url, load.KEY, cwd=package))
    assert printed == {"items": 3, "similar": 2, "stored": {"accepted": 1, "repeated": 0}}


def test_the_package_holds_what_it_needs(package: Path) -> None:
    (packed,) = json.loads(run("npm", "pack", "--dry-run", "--json", cwd=package))
    names = {one["path"] for one in packed["files"]}
    assert names == {
        "LICENSE",
        "README.md",
        "package.json",
        *(f"dist/{name}" for name in ("index.js", "index.d.ts", "schema.js", "schema.d.ts")),
    }
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{packed["version"]}"' in project
    assert (PACKAGE / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("fault", [(503, "1"), (429, "1"), (502, None), (504, None), CUT, SILENT], ids=str)
def test_what_passes_is_tried_again(call: Call, proxy: FaultyProxy, fault: Fault) -> None:
    proxy.faults[:] = [fault]
    (answer,) = call(RECOMMEND, timeoutMs=1000)
    assert answer["status"] == 200 and len(answer["data"]["items"]) == 2 and len(proxy.seen) == 2
    if isinstance(fault, tuple) and fault[1]:
        assert 1.0 <= proxy.waits_s[0] < 2.5


@pytest.mark.parametrize("status", [400, 401, 404, 422, 500])
def test_what_does_not_pass_is_not_tried_again(call: Call, proxy: FaultyProxy, status: int) -> None:
    proxy.faults[:] = [(status, "1")]
    (answer,) = call(RECOMMEND)
    assert answer["status"] == status and len(proxy.seen) == 1


def test_attempts_and_waits_end(call: Call, proxy: FaultyProxy) -> None:
    proxy.faults[:] = [(503, "3600")] * 3
    (answer,) = call(RECOMMEND, retries=2, maxWaitMs=50)
    assert answer["status"] == 503 and len(proxy.seen) == 3 and sum(proxy.waits_s) < 5
    proxy.seen.clear()
    proxy.faults[:] = [SILENT] * 2
    (answer,) = call(RECOMMEND, retries=1, timeoutMs=3000)
    assert "Timeout" in answer["thrown"] and len(proxy.seen) == 2


def test_a_call_can_be_aborted(call: Call, proxy: FaultyProxy) -> None:
    proxy.faults[:] = [(503, "9")]
    (answer,) = call(RECOMMEND, abort_after_ms=500)
    assert "Timeout" in answer["thrown"] and len(proxy.seen) == 1


def test_a_reload_is_tried_once_and_the_key_is_sent(call: Call, proxy: FaultyProxy, load: Any) -> None:
    proxy.faults[:] = [(503, "1")]
    refused, done = call(["POST", "/admin/reload", {}], ["POST", "/admin/refresh", {}], key=load.KEY)
    assert refused["status"] == 503 and done["status"] == 200 and len(proxy.seen) == 2
    assert {headers["authorization"] for _, _, headers, _ in proxy.seen} == {f"Bearer {load.KEY}"}


def test_an_event_whose_acknowledgement_is_lost_counts_once(call: Call, proxy: FaultyProxy, load: Any) -> None:
    (found,) = call(["GET", "/v1/items", {"params": {"query": {"limit": 1}}}])
    event = {"event_id": "one", "user": "a lost one", "item_id": found["data"]["items"][0]["item_id"]}
    proxy.faults[:] = [CUT]
    (stored,) = call(["POST", "/v1/events", {"body": {"events": [event]}}], key=load.KEY)
    assert stored["data"] == {"accepted": 0, "repeated": 1}


def test_an_error_has_the_text_of_the_server(call: Call) -> None:
    (answer,) = call(["POST", "/v1/recommend", {"body": {"filter": "no such column == 1"}}])
    assert answer["status"] == 422 and answer["error"]["error"]["code"] == "invalid" and answer["error"]["request_id"]
