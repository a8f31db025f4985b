"""Test answers from Milvus: equal to those of this process, k kept under any filter, and what happens when it does not respond."""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from twotower.bundle import publish as publishing
from twotower.bundle.bundle import load_bundle
from twotower.bundle.publish import RemoteIndex, publish_milvus, with_milvus
from twotower.bundle.refresh import Refresher
from twotower.bundle.revision import add_items, remove_items
from twotower.cli import main
from twotower.errors import BusyError, DataError
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import HistoryEvent, Request
from twotower.search import milvus_index, milvus_store
from twotower.search.filters import milvus_expression
from twotower.search.milvus_store import MilvusStore, read_address
from twotower.serving.access import KEY_VARIABLE, Access
from twotower.serving.app import create_app
from twotower.serving.service import Service
from twotower.utils.config_serving import Limits

PATIENT_S = 60.0  # tests may run on a machine that is busy


@pytest.fixture(scope="module", autouse=True)
def milvus(lacking: Any) -> None:
    """Skip without Milvus Lite."""
    try:
        import milvus_lite  # noqa: F401
        import pymilvus  # noqa: F401
    except ImportError:
        lacking("needs pymilvus and milvus-lite: pip install two-tower-rec[milvus]")


@pytest.fixture(scope="module")
def remote(town_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recommender]:
    """Return a recommender whose vectors are in a file of Milvus Lite."""
    address = read_address(str(tmp_path_factory.mktemp("lite") / "town.db"))
    bundle = load_bundle(town_bundle)
    publish_milvus(bundle, address, exact=True)
    found = with_milvus(bundle, RemoteIndex(address, ef=32_768, search_s=PATIENT_S))
    yield Recommender(found)
    found.index.store.close()  # type: ignore[attr-defined]


class Lite:
    """Milvus Lite as a server of its own, which stands for a cluster."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.address = f"milvus://127.0.0.1:{self.port}/town"
        self._folder = folder
        self.start()

    def start(self) -> None:
        options = ["--data-dir", str(self._folder), "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "milvus_lite", "server", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < end and self._process.poll() is None
                time.sleep(0.1)

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[Lite]:
    server = Lite(tmp_path / "lite")
    yield server
    server.kill()


@contextmanager
def served(folder: Path, address: str, search_s: float, tmp_path: Path) -> Iterator[TestClient]:
    """Serve a bundle with an index in Milvus, in this process."""
    index = RemoteIndex(read_address(address), search_s=search_s)
    service = Service(folder, f"sqlite:{tmp_path / 'events.sqlite'}", Limits(rate=0), refresh_s=0, index=index)
    access = Access(variables={KEY_VARIABLE: "a-key-for-these-tests"}, public=True)
    with TestClient(create_app(service, access), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = "Bearer a-key-for-these-tests"
        yield client


def random_filter(draw: random.Random, recommender: Recommender) -> str | None:
    """Return a random filter over the columns of the town."""
    names = [str(one) for one in recommender.dataset.item_ids[2:]]
    leaf = [
        'category == "Restaurants"',
        'category not in ["Korean", "Bars"]',
        "price <= 2",
        "not price == 1",
        "stars >= 0" if "stars" in recommender.dataset.items.column_names else "price >= 1",
        'city != "St. Alban"',
        f"within({draw.choice([1, 4, 30])})",
        "seen",
        "open_now",
        'open_at("Fri 19:30")',
        'attribute == "WiFi=free"',
        f"id in {draw.sample(names, 12)}",
        f"id not in {draw.sample(names, 3)}",
    ]
    parts = [draw.choice(leaf) if draw.random() < 0.7 else f"not ({draw.choice(leaf)})" for _ in range(draw.randrange(4))]
    return draw.choice([" and ", " or "]).join(parts) or None


def asked(draw: random.Random, recommender: Recommender, count: int) -> list[Request]:
    """Return requests of known users and of random histories, with random filters, lengths and biases."""
    users = [str(one) for one in recommender.dataset.user_ids[2:]]
    items = [str(one) for one in recommender.dataset.item_ids[2:]]
    return [
        Request(
            user=draw.choice(users) if draw.random() < 0.7 else None,
            history=tuple(HistoryEvent(item) for item in draw.sample(items, draw.randrange(1, 6))),
            k=draw.choice([1, 5, 20, 500]),
            filter=random_filter(draw, recommender),
            near=draw.choice([None, (29.04, -118.02)]),
            time_s=draw.choice([None, 1_700_000_000]),
            exclude_seen=draw.random() < 0.7,
            popularity_bias=draw.choice([0.0, -0.8, 1.0]),
            diversity=draw.choice([0.0, 0.0, 0.4]),
        )
        for _ in range(count)
    ]


def assert_same_lists(one: Recommender, other: Recommender, requests: list[Request]) -> None:
    now = 1_700_000_000
    for start in range(0, len(requests), 50):
        part = requests[start : start + 50]
        for request, left, right in zip(part, one.find(part, now=now), other.find(part, now=now), strict=True):
            if isinstance(left, Exception) or isinstance(right, Exception):
                assert str(left) == str(right)
            else:
                np.testing.assert_array_equal(left.rows, right.rows, err_msg=str(request))
                np.testing.assert_allclose(left.scores, right.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("listed", "count"), [(1000, 60), (3, 60), pytest.param(3, 1000, marks=pytest.mark.slow)])
def test_lists_are_equal_at_full_effort(
    recommender: Recommender, remote: Recommender, monkeypatch: pytest.MonkeyPatch, listed: int, count: int
) -> None:
    monkeypatch.setattr(milvus_index, "MAX_ROWS", listed)  # 3: expressions of the filters, not lists of rows
    draw = random.Random(count + listed)
    assert_same_lists(recommender, remote, asked(draw, recommender, count))


def test_k_is_kept_where_expressions_say_too_little(
    recommender: Recommender, remote: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus_index, "MAX_ROWS", 0)
    monkeypatch.setattr(milvus_expression.StoredColumns, "expression", lambda *_: "")
    assert_same_lists(recommender, remote, asked(random.Random(4), recommender, 40))
    monkeypatch.setattr(milvus_index, "LIMIT", 16)  # Milvus returns too few, so the vectors of this process are scanned
    assert_same_lists(recommender, remote, asked(random.Random(5), recommender, 40))


def test_similar_items_are_equal(recommender: Recommender, remote: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_index, "MAX_ROWS", 3)
    for item in recommender.dataset.item_ids[2:40:7]:
        for filter_ in (None, "within(9)", 'category == "Restaurants"'):
            assert remote.similar(str(item), filter=filter_) == recommender.similar(str(item), filter=filter_)


def test_refreshed_items_are_found(town_bundle: Path, remote: Recommender) -> None:
    bundle, index = load_bundle(town_bundle), remote.index
    row = int(np.argmin(bundle.arrays.vectors[:, bundle.vectors.shape[1]][2:])) + 2
    item, n = str(bundle.dataset.item_ids[row]), 400
    lists = []
    for one in (bundle, replace(bundle, built=index)):
        refresher = Refresher(one)
        moment = bundle.moment_s + 5
        refresher.add([f"new{n}" for n in range(n)], [item] * n, [moment] * n, [None] * n, [5.0] * n)
        fresh = refresher.bundle_at(moment + 100)
        assert fresh is not None
        lists.append(Recommender(fresh))
    assert_same_lists(lists[0], lists[1], [Request(user=str(user), k=10) for user in bundle.dataset.user_ids[2:30]])


def test_versions_are_swapped_whole(town_bundle: Path, lite: Lite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(town_bundle, folder)
    with pytest.raises(DataError, match=r"has no vectors. Write them with `twotower publish BUNDLE --to milvus://"):
        with_milvus(load_bundle(folder), RemoteIndex(read_address(lite.address)))
    assert main(["publish", str(folder), "--to", lite.address]) == 0
    bundle, user = load_bundle(folder), str(load_bundle(folder).dataset.user_ids[5])
    with served(folder, lite.address, PATIENT_S, tmp_path) as client:
        assert client.get("/health/ready").json()["index"] == "ok"
        first = client.post("/v1/recommend", json={"user": user, "k": 20}).json()
        best = first["items"][0]["item_id"]
        remove_items(folder, [best])
        (tmp_path / "new.jsonl").write_text('{"item_id": "opened-today", "name": "Opened", "categories": ["Restaurants"]}\n')
        add_items(folder, tmp_path / "new.jsonl")
        refused = client.post("/admin/reload")
        assert refused.status_code == 422 and "has the vectors of version" in refused.json()["error"]["message"]
        assert client.post("/v1/recommend", json={"user": user, "k": 20}).json()["items"] == first["items"]

        uploads = publishing._uploads

        def cut(*given: Any) -> Any:
            yield next(uploads(*given))[:10]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(publishing, "_uploads", cut)
            with pytest.raises(KeyboardInterrupt):
                publish_milvus(load_bundle(folder), read_address(lite.address))
        store = MilvusStore(read_address(lite.address))
        assert store.current()[1]["twotower.seal"] == bundle.manifest.seal, "a cut publication changes nothing"
        publish_milvus(load_bundle(folder), read_address(lite.address))
        assert client.post("/v1/recommend", json={"user": user, "k": 20}).json()["items"] == first["items"]
        assert client.post("/admin/reload").status_code == 200
        after = [one["item_id"] for one in client.post("/v1/recommend", json={"user": user, "k": 500}).json()["items"]]
        assert best not in after and "opened-today" in after
        publish_milvus(load_bundle(folder), read_address(lite.address))
        kept = store.administer(lambda at: at.list_collections(), "read")
        assert len(kept) == 2, "the served version and the one before"
        store.close()


def test_exploration_is_equal(recommender: Recommender, remote: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(user=str(user), k=10, explore=0.5) for user in recommender.dataset.user_ids[2:12]]
    for one in (recommender, remote):
        monkeypatch.setattr(one, "rng", np.random.default_rng(3))
    own, others = recommender.answer(requests), remote.answer(requests)
    for here, there in zip(own, others, strict=True):
        assert [item.item_id for item in here.items] == [item.item_id for item in there.items]
        assert here.propensity == there.propensity and min(here.propensity) < 1


def test_a_user_is_forgotten_and_the_vectors_follow(town_bundle: Path, lite: Lite, tmp_path: Path) -> None:
    folder, address = tmp_path / "bundle", read_address(lite.address)
    shutil.copytree(town_bundle, folder)
    publish_milvus(load_bundle(folder), address, exact=True)
    user, other = (str(one) for one in load_bundle(folder).dataset.user_ids[[5, 7]])
    with served(folder, lite.address, PATIENT_S, tmp_path) as client:
        first = client.get("/health/ready").json()["version"]
        lite.kill()
        assert client.delete(f"/v1/users/{user}").status_code == 503
        lite.start()
        assert client.delete(f"/v1/users/{user}").status_code == 200
        again = client.get("/health/ready").json()["version"]
        assert again != first and client.get(f"/v1/users/{user}/history").status_code == 404
        lists = client.post("/v1/recommend", json={"user": other, "k": 20}).json()["items"]
    with served(folder, lite.address, PATIENT_S, tmp_path) as client:  # the bundle and the collection fit
        assert client.get("/health/ready").json()["version"] == again
        assert client.post("/v1/recommend", json={"user": other, "k": 20}).json()["items"] == lists
    assert [item["item_id"] for item in lists] == [
        str(item.item_id) for item in Recommender(load_bundle(folder)).answer([Request(user=other, k=20)])[0].items
    ]
    store = MilvusStore(address)
    assert '"exact": true' in store.current()[1]["twotower.about"]
    store.close()


def test_a_cluster_that_does_not_respond_is_a_503(town_bundle: Path, lite: Lite, tmp_path: Path) -> None:
    publish_milvus(load_bundle(town_bundle), read_address(lite.address))
    user = str(load_bundle(town_bundle).dataset.user_ids[5])

    def wait_for(client: TestClient, status: int) -> None:
        end = time.monotonic() + 60
        while client.get("/health/ready").status_code != status:
            assert time.monotonic() < end
            time.sleep(0.2)

    with served(town_bundle, lite.address, 1.4, tmp_path) as client:
        wait_for(client, 200)
        for stop, start in ((lite.pause, lite.go_on), (lite.kill, lite.start)):
            stop()
            wait_for(client, 503)  # also without requests
            for _ in range(3):
                found = client.post("/v1/recommend", json={"user": user, "k": 5})
                assert found.status_code == 503 and "Retry-After" in found.headers
                assert "does not respond" in found.json()["error"]["message"]
            assert client.post("/v1/recommend", json={"k": 5}).status_code == 200, "popular items need no index"
            start()
            wait_for(client, 200)


@pytest.mark.alone
def test_a_search_has_a_deadline(town_bundle: Path, lite: Lite) -> None:
    publish_milvus(load_bundle(town_bundle), read_address(lite.address))
    recommender = Recommender(with_milvus(load_bundle(town_bundle), RemoteIndex(read_address(lite.address), search_s=PATIENT_S)))
    user = str(recommender.dataset.user_ids[5])
    recommender.recommend(user=user)
    recommender.index.store.search_s = 0.5  # type: ignore[attr-defined]
    lite.pause()
    began = time.monotonic()
    with pytest.raises(BusyError, match=r"does not respond \(no response in 0.5 s\)"):
        recommender.recommend(user=user)
    took = time.monotonic() - began
    began = time.monotonic()
    with pytest.raises(BusyError):
        recommender.recommend(user=user)
    assert time.monotonic() - began < took, "the next one is refused at once"
    lite.go_on()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("milvus://", "is not an address of Milvus"),
        ("milvus://host:99999/town", "is not an address of Milvus"),
        ("milvus://host/to-wn", "letters, digits and underscores"),
        ("milvus://root:secret@host/town", "Set TWOTOWER_MILVUS_TOKEN to USER:PASSWORD"),
        ("vectors.csv", "It must end with .parquet or .db, or start with milvus://"),
        ("milvus://127.0.0.1:9/town", "Cannot publish to milvus://127.0.0.1:9/town"),
        ("no/such/folder/town.db", "The folder of no/such/folder/town.db does not exist"),
    ],
)
def test_mistakes_are_one_line(town_bundle: Path, target: str, said: str, capsys: Any) -> None:
    assert main(["publish", str(town_bundle), "--to", target]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1
    if target != "vectors.csv" and "such" not in target and "9/" not in target:
        assert main(["serve", str(town_bundle), "--index", target]) == 2
        assert said in capsys.readouterr().err
    assert main(["serve", str(town_bundle), "--index", "town.db", "--workers", "2"]) == 2
    assert "use workers: 1" in capsys.readouterr().err


def test_a_file_that_another_process_has_opened_is_one_line(town_bundle: Path, tmp_path: Path) -> None:
    file, program = tmp_path / "town.db", [sys.executable, "-m", "twotower"]
    hold = f"import time; from pymilvus import MilvusClient; held = MilvusClient({str(file)!r}); print(flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline()
            for words in (["publish", str(town_bundle), "--to", str(file)], ["serve", str(town_bundle), "--index", str(file)]):
                done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=120)
                lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
                assert done.returncode == 2 and len(lines) == 1, done.stderr
                assert "another process has opened it. Close other programs that use the file" in lines[0]
        finally:
            holder.kill()


def test_a_collection_of_others_stays(town_bundle: Path, tmp_path: Path) -> None:
    from pymilvus import MilvusClient

    address = read_address(str(tmp_path / "theirs.db"))
    client = MilvusClient(address.uri)
    client.create_collection(address.alias, dimension=4)
    with pytest.raises(DataError, match="is a collection that twotower did not write"):
        publish_milvus(load_bundle(town_bundle), address)
    with pytest.raises(DataError, match="was not written by twotower"):
        with_milvus(load_bundle(town_bundle), RemoteIndex(address))
    store = MilvusStore(address)
    assert store.administer(lambda at: at.list_collections(), "read") == [address.alias]
    store.close()


def test_another_format_is_named(town_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = read_address(str(tmp_path / "later.db"))
    with monkeypatch.context() as patch:
        patch.setattr(milvus_store, "FORMAT", 2)
        publish_milvus(load_bundle(town_bundle), address)
    with pytest.raises(DataError, match="has the format 2; this version reads 1"):
        with_milvus(load_bundle(town_bundle), RemoteIndex(address))


def test_without_pymilvus_one_line_names_the_extra(town_bundle: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr("twotower.errors.find_spec", lambda name: None if name == "pymilvus" else find(name))
    assert main(["publish", str(town_bundle), "--to", "town.db"]) == 2
    assert "Not installed: pymilvus. This needs the extra 'milvus'." in capsys.readouterr().err
