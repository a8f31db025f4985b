"""Test lists for all users: equal to single requests, and equal after an interruption."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from twotower.cli import main
from twotower.errors import RequestError
from twotower.retrieval import recommend_all as module
from twotower.retrieval.recommend_all import recommend_all
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Request


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 64)


def test_lists_equal_those_of_single_requests(town_bundle: Path, recommender: Recommender, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "lists" / "all.parquet"
    arguments = ["--all", "--out", str(out), "--k", "4", "--filter", 'category == "Restaurants" and within(9)']
    (tmp_path / "lists").mkdir()
    assert main(["recommend", str(town_bundle), *arguments]) == 0
    users = recommender.dataset.user_ids[2:]
    assert capsys.readouterr().out == f"{out}: {len(users)} users\n"
    assert [path.name for path in out.parent.iterdir()] == ["all.parquet"]
    rows = pq.read_table(out).to_pylist()
    by_user: dict[str, list[str]] = {}
    for row in rows:
        by_user.setdefault(row["user_id"], []).append(row["item_id"])
        assert row["rank"] == len(by_user[row["user_id"]])
    for user in users[::9]:
        alone = recommender.recommend(user=str(user), k=4, filter='category == "Restaurants" and within(9)')
        assert by_user.get(str(user), []) == [place.item_id for place in alone]


def test_what_was_cut_off_goes_on(recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out, request = tmp_path / "whole.parquet", tmp_path / "out.parquet", Request(k=5)
    recommend_all(recommender, whole, request)
    asked: list[int] = []
    find, clock = recommender.find, count(1_000)
    moments = set()

    def watched(requests: Any, now: int | None = None, **named: Any) -> Any:
        asked.append(len(requests))
        moments.add(now)
        return find(requests, now=now, **named)

    monkeypatch.setattr(recommender, "find", watched)
    monkeypatch.setattr("twotower.retrieval.recommend_all.time", lambda: next(clock))

    def stop(_label: str, done: int, _total: int) -> None:
        if done >= 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recommend_all(recommender, out, request, report=stop)
    assert not out.exists() and sum(asked) == 1 + 128, "the request itself is tried first"
    asked.clear()
    users = recommend_all(recommender, out, request)
    assert sum(asked) == 1 + users - 128
    assert out.read_bytes() == whole.read_bytes()
    assert moments == {None, 1_000}, "now is the same for all users, also after an interruption"

    with pytest.raises(KeyboardInterrupt):
        recommend_all(recommender, out, request, report=stop)
    asked.clear()
    recommend_all(recommender, out, Request(k=6))  # another question: nothing of the first is taken over
    assert sum(asked) == 1 + users and pq.read_metadata(out).num_rows == 6 * users


@pytest.mark.parametrize(
    "arguments",
    [["--all"], ["--out", "x.parquet"], ["--all", "--out", "x.parquet", "--user", "u"], ["--all", "--out", ".", "--k", "2"]],
)
def test_mistakes(town_bundle: Path, tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recommend", str(town_bundle), *arguments]) == 2
    assert not list(tmp_path.iterdir())


def test_a_malformed_filter_leaves_no_file(recommender: Recommender, tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        recommend_all(recommender, tmp_path / "out.parquet", Request(filter="("))
    assert not (tmp_path / "out.parquet").exists()


def test_a_history_without_locations_has_no_items_within_a_radius(recommender: Recommender, tmp_path: Path) -> None:
    home = recommender._home
    lost = set(recommender.dataset.user_ids[2:5])
    rows = recommender.dataset.user_rows(sorted(lost))
    histories = [recommender.reader.read(Request(user=user)).history.item_row.tolist() for user in sorted(lost)]
    recommender._home = lambda row: None if row.tolist() in histories else home(row)  # type: ignore[method-assign]
    try:
        users = recommend_all(recommender, tmp_path / "near.parquet", Request(k=3, filter="within(500)"))
    finally:
        del recommender._home
    listed = set(pq.read_table(tmp_path / "near.parquet")["user_id"].to_pylist())
    assert len(rows) == 3 and not lost & listed and len(listed) > users / 2
    with pytest.raises(RequestError):
        recommend_all(recommender, tmp_path / "bad.parquet", Request(filter="within("))
