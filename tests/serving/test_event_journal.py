"""Test the events that a journal has in memory: complete, ordered by time, then by arrival."""

from __future__ import annotations

from pathlib import Path

from twotower.retrieval.request import HistoryEvent
from twotower.serving.event_journal import Journal
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Event


def test_events_are_kept_complete_and_in_order(tmp_path: Path) -> None:
    journal = Journal(open_store(f"sqlite:{tmp_path / 'events.sqlite'}"))
    sent = [("first", 0, 4.5, "tip"), ("later", 9, None, None), ("second", 0, None, "review"), ("middle", 1, 1.0, None)]
    groups = [
        [Event(event_id=item, user="u", item_id=item, time_s=at, event_type=kind, stars=stars)] for item, at, stars, kind in sent
    ]
    assert journal.append(groups) == [1, 1, 1, 1]
    assert list(journal.of("u")) == [
        HistoryEvent("first", 0, 4.5, "tip"),
        HistoryEvent("second", 0, None, "review"),
        HistoryEvent("middle", 1, 1.0, None),
        HistoryEvent("later", 9, None, None),
    ]
    assert journal.users() == ["u"]
    journal.close()
