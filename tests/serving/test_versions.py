"""Test two versions at once: shares, shadow, outcomes by version, promotion, and the way back."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from twotower.cli import app, main
from twotower.errors import ConfigError, DataError
from twotower.serving.event_types import Event
from twotower.serving.freshness import place_of
from twotower.serving.model_version import Engine
from twotower.serving.outcomes import Outcomes, as_json, rate
from twotower.serving.server import trial_of
from twotower.serving.updater import Trial
from twotower.utils.config_serving import Limits, ServingConfig

Connect = Callable[..., AbstractContextManager[TestClient]]
Keyed = dict[str, str]


@pytest.fixture
def pair(bundles: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Return copies of two bundles: their server keeps versions beside them."""
    for source in bundles:
        shutil.copytree(source, tmp_path / source.name)
    return tmp_path / bundles[0].name, tmp_path / bundles[1].name


def version_of(client: TestClient, user: str | None = None) -> str:
    answer = client.post("/v1/recommend", json={"k": 2} if user is None else {"k": 2, "user": user})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["version"])


def served(client: TestClient, keyed: Keyed) -> Any:
    return client.get("/admin/versions", headers=keyed).json()


def test_the_place_of_a_user_is_even_and_always_the_same() -> None:
    places = np.array([place_of(f"u{n}") for n in range(20_000)])
    assert np.abs(np.histogram(places, 20, (0, 1))[0] - 1000).max() < 150 and place_of("ü 🍜") == place_of("ü 🍜")


def test_each_user_stays_with_a_version_and_shares_are_as_asked(connect: Connect, pair: tuple[Path, Path], keyed: Keyed) -> None:
    users = [f"guest-{n}" for n in range(400)]
    with connect(folder=pair[0], trial=Trial(pair[1], 0.3)) as client:
        first, second = (one["version"] for one in served(client, keyed)["versions"])
        requests = {"requests": [{"user": user, "k": 1} for user in users[:200]]}
        found = [one["version"] for one in client.post("/v1/recommend:batch", json=requests).json()["answers"]]
        again = [version_of(client, user) for user in users[:30]]
        assert found[:30] == again and {first, second} == set(found) and 0.2 < found.count(second) / 200 < 0.4
        assert version_of(client) == first, "nobody in particular"
        page = client.post("/v1/recommend", json={"user": users[found.index(second)], "k": 2}).json()
        more = client.post("/v1/recommend", json={"user": users[found.index(second)], "k": 2, "cursor": page["next"]})
        assert more.status_code == 200 and more.json()["version"] == second
        text = client.get("/metrics").text
        assert f'twotower_bundle{{version="{first}"}} 1.0' in text and f'twotower_bundle{{version="{second}"}} 1.0' in text
    with connect(folder=pair[0], trial=Trial(pair[1], 0.3)) as client:
        assert [version_of(client, user) for user in users[:30]] == again, "after a restart"


def test_outcomes_are_counted_by_version_with_intervals(connect: Connect, pair: tuple[Path, Path], keyed: Keyed) -> None:
    with connect(folder=pair[0], trial=Trial(pair[1], 0.5)) as client:
        clicks: dict[str, list[bool]] = {}
        for n in range(40):
            answer = client.post("/v1/recommend", json={"user": f"g{n}", "k": 3}).json()
            shown, name = [item["item_id"] for item in answer["items"]], answer["request_id"]
            events: list[dict[str, Any]] = [{"request_id": name, "shown": shown}]
            clicks.setdefault(answer["version"], []).append(n % 3 == 0)
            if n % 3 == 0:
                events += [{"request_id": name, "item_id": item} for item in shown[:2]]
            assert client.post("/v1/events", json={"events": events}, headers=keyed).status_code == 200
        state = served(client, keyed)
        for one in state["versions"]:
            values = np.array(clicks[one["version"]], float)
            found = one["outcomes"]
            assert found["lists"] == found["users"] == len(values) and found["events"]["impression"] == 3 * len(values)
            error = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
            expected = [values.mean(), max(values.mean() - error, 0), min(values.mean() + error, 1)]
            assert [found["click_through"][name] for name in ("value", "low", "high")] == pytest.approx(expected, abs=1e-5)
            assert found["outcomes_per_list"]["value"] == pytest.approx(2 * values.mean(), abs=1e-5)
        a, b = (np.mean(clicks[one["version"]]) for one in state["versions"])
        assert state["difference"]["value"] == pytest.approx(b - a, abs=1e-5)
        assert state["difference"]["low"] < state["difference"]["value"] < state["difference"]["high"]
        assert (
            f'twotower_list_events_total{{type="impression",version="{state["versions"][0]["version"]}"}}'
            in client.get("/metrics").text
        )
    with connect(folder=pair[0], trial=Trial(pair[1], 0.5)) as client:
        assert served(client, keyed) == state, "after a restart"


def test_lists_of_one_user_are_one_observation() -> None:
    values, user = np.array([1.0, 1, 1, 0, 0, 0]), np.array([0, 0, 0, 1, 1, 1])
    assert rate(values, user).error == pytest.approx(0.5) and rate(values, np.arange(6)).error == pytest.approx(0.2236, abs=1e-3)
    outcomes = Outcomes()
    for event_type in ("impression", "dislike", "buy", "buy"):
        outcomes.add(Event("x", "u", "i", 5, event_type, request_id="r", version="v"))
    outcomes.add(Event("x", "u", "i", 5, "buy"))
    found = as_json(outcomes.summary(lambda name: name == "buy")["v"])
    assert found["lists"] == 1 and found["outcomes_per_list"] == {"value": 2.0, "low": None, "high": None}


def test_promotion_and_the_way_back(connect: Connect, pair: tuple[Path, Path], keyed: Keyed) -> None:
    def post(path: str, **body: Any) -> Any:
        return client.post(path, headers=keyed, **body)

    with connect(folder=pair[0], trial=Trial(pair[1], 0.0)) as client:
        first, second = (one["version"] for one in served(client, keyed)["versions"])
        assert {version_of(client, f"u{n}") for n in range(20)} == {first}
        assert client.post("/admin/promote").status_code == 401
        assert post("/admin/promote").json() == {"version": second, "previous_version": first}
        assert {version_of(client, f"u{n}") for n in range(20)} == {second} and len(served(client, keyed)["versions"]) == 1
        refused = post("/admin/promote")
        assert refused.status_code == 422 and "no second version" in refused.text and version_of(client) == second
        shutil.rmtree(pair[0])  # its folder is gone, the kept version is not
        assert post("/admin/rollback").json() == {"version": first, "previous_version": second}
        assert version_of(client, "u1") == first
        refused = post("/admin/rollback")
        assert refused.status_code == 422 and "No version before" in refused.text and version_of(client) == first
        reloaded = post("/admin/reload", json={"bundle": str(pair[1])}).json()
        assert reloaded == {"version": second, "previous_version": first}
        assert served(client, keyed)["kept"][-2:] == [first, second]


def test_going_back_from_two_versions_leaves_the_first(connect: Connect, pair: tuple[Path, Path], keyed: Keyed) -> None:
    with connect(folder=pair[0], trial=Trial(pair[1], 1.0)) as client:
        first, second = (one["version"] for one in served(client, keyed)["versions"])
        assert version_of(client, "u1") == second
        client.post("/admin/rollback", headers=keyed)
        assert version_of(client, "u1") == first and len(served(client, keyed)["versions"]) == 1


def test_the_last_versions_are_kept(connect: Connect, pair: tuple[Path, Path], keyed: Keyed, tmp_path: Path) -> None:
    from twotower.bundle.revision import remove_items

    with connect(folder=pair[0], limits=Limits(rate=0, keep_versions=2)) as client:
        versions = [version_of(client)]
        for item in client.get("/v1/items", params={"limit": 4}).json()["items"]:
            remove_items(pair[0], [str(item["item_id"])])
            versions.append(client.post("/admin/reload", headers=keyed).json()["version"])
        assert served(client, keyed)["kept"] == versions[-3:]
        assert sorted(path.name for path in (tmp_path / "bundle1.versions").iterdir() if path.is_dir()) == sorted(versions[-3:])
        assert [client.post("/admin/rollback", headers=keyed).json()["version"] for _ in range(2)] == versions[-2:-4:-1]


@pytest.mark.parametrize("trouble", ["fails", "hangs"])
def test_a_shadow_never_touches_an_answer(
    connect: Connect, pair: tuple[Path, Path], keyed: Keyed, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    with connect(folder=pair[0], trial=Trial(pair[1])) as client:
        first, shadow = (one["version"] for one in served(client, keyed)["versions"])
        plain = client.post("/v1/recommend", json={"k": 3, "user": "u"}).json()["items"]
        until(client, 'twotower_shadow_answers_total{outcome="answered"} 1.0')
        assert "twotower_shadow_overlap_count 1.0" in client.get("/metrics").text
        right, release = Engine.answer, threading.Event()

        def answer(self: Engine, questions: Any) -> Any:
            if self.version == shadow and trouble == "fails":
                raise RuntimeError("of the shadow")
            if self.version == shadow:
                release.wait(60)
            return right(self, questions)

        monkeypatch.setattr(Engine, "answer", answer)
        try:
            for _ in range(70):
                found = client.post("/v1/recommend", json={"k": 3, "user": "u"}).json()
                assert found["version"] == first and found["items"] == plain
            until(client, f'twotower_shadow_answers_total{{outcome="{"failed" if trouble == "fails" else "dropped"}"}}')
        finally:
            release.set()
        assert client.get("/health/ready").status_code == 200
        assert client.post("/admin/promote", headers=keyed).json()["version"] == shadow


def until(client: TestClient, line: str) -> None:
    end = time.monotonic() + 20
    while not any(row.startswith(line) and not row.endswith(" 0.0") for row in client.get("/metrics").text.splitlines()):
        assert time.monotonic() < end, line
        time.sleep(0.02)


def test_refreshes_and_forgetting_reach_both_versions(connect: Connect, pair: tuple[Path, Path], keyed: Keyed) -> None:
    with connect(folder=pair[0], trial=Trial(pair[1], 0.5)) as client:
        user = str(client.get("/v1/users/random").json()["users"][0]["user"])
        items = [item["item_id"] for item in client.get("/v1/items", params={"limit": 3}).json()["items"]]
        events = [{"event_id": str(n), "user": f"g{n}", "item_id": item} for n, item in enumerate(items)]
        client.post("/v1/events", json={"events": events}, headers=keyed)
        client.post("/admin/refresh", headers=keyed)
        as_of = {client.post("/v1/recommend", json={"user": f"g{n}"}).json()["as_of"] for n in range(20)}
        assert len(as_of) == 1, "both versions are as of the last event"
        assert client.delete(f"/v1/users/{user}", headers=keyed).status_code == 200
        names = {one["version"] for one in served(client, keyed)["versions"]}
        assert len(names) == 2 and names <= set(served(client, keyed)["kept"])
    for folder in (*pair, *(pair[0].parent / "bundle1.versions").glob("*/dataset")):
        for path in folder.rglob("*"):
            assert not path.is_file() or user.encode() not in path.read_bytes()


@pytest.mark.parametrize("steps", [("promote",), ("rollback",), ("promote", "rollback"), ("reload",), ("reload", "rollback")])
def test_a_user_is_forgotten_in_folders_that_were_served_earlier(
    connect: Connect, pair: tuple[Path, Path], keyed: Keyed, steps: tuple[str, ...]
) -> None:
    trial = Trial() if "reload" in steps else Trial(pair[1], 0.5)
    with connect(folder=pair[0], trial=trial) as client:
        user = str(client.get("/v1/users/random").json()["users"][0]["user"])
        for step in steps:
            body = {"json": {"bundle": str(pair[1])}} if step == "reload" else {}
            assert client.post(f"/admin/{step}", headers=keyed, **body).status_code == 200, step
        assert client.delete(f"/v1/users/{user}", headers=keyed).status_code == 200
    files = [file for folder in pair for file in folder.parent.rglob("users.parquet")]
    assert len(files) >= 2
    for file in files:
        assert user not in pq.read_table(file).column("user_id").to_pylist(), file


def test_versions_of_different_catalogues_are_refused(
    connect: Connect, pair: tuple[Path, Path], keyed: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.serving.updater.MIN_SHARED_FRAC", 1.01)  # as if none were shared
    with pytest.raises(DataError, match="different catalogues: they share"), connect(folder=pair[0], trial=Trial(pair[1], 0.5)):
        pass
    monkeypatch.undo()
    with connect(folder=pair[0], trial=Trial(pair[1], 0.5)) as client:
        before = served(client, keyed)
        monkeypatch.setattr("twotower.serving.updater.MIN_SHARED_FRAC", 1.01)
        refused = client.post("/admin/reload", json={}, headers=keyed)
        assert refused.status_code == 422 and "different catalogues" in refused.text and served(client, keyed) == before


def test_one_version_twice_is_refused(connect: Connect, pair: tuple[Path, Path], keyed: Keyed, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pair[0], tmp_path / "copy"))
    for trial in (Trial(copy, 0.5), Trial(copy)):
        with pytest.raises(DataError, match=r"bundle1 and .*copy are the same version"), connect(folder=pair[0], trial=trial):
            pass
    with connect(folder=pair[0], trial=Trial(pair[1], 0.5)) as client:
        before = served(client, keyed)
        refused = client.post("/admin/reload", json={"bundle": str(pair[1])}, headers=keyed)
        assert refused.status_code == 422 and "are the same version" in refused.text and served(client, keyed) == before


@pytest.mark.parametrize("split", ["90,20", "100", "50,50,0", "-10,110", "ninety,ten", "nan,nan"])
def test_a_split_that_does_not_add_up_is_one_sentence(bundles: tuple[Path, Path], split: str, capsys: Any) -> None:
    assert main(["serve", str(bundles[0]), str(bundles[1]), "--split", split]) == 2
    said = capsys.readouterr().err
    assert ("a finite number" if "nan" in split else "90,10") in said and said.count("\n") == 1


def test_a_second_bundle_and_its_share_go_together(tmp_path: Path) -> None:
    other = tmp_path / "b"
    assert trial_of(ServingConfig(split=[80, 20]), other) == Trial(other, 0.2) and trial_of(ServingConfig(), None) == Trial()
    assert trial_of(ServingConfig(shadow=other), None) == Trial(other)
    for config, second in ((ServingConfig(split=[80, 20]), None), (ServingConfig(), other)):
        with pytest.raises(ConfigError, match="90,10"):
            trial_of(config, second)
    with pytest.raises(ConfigError, match="at most two"):
        trial_of(ServingConfig(split=[80, 20], shadow=other), other)
    assert "--split" in CliRunner().invoke(app, ["serve", "--help"]).output
