"""Test that accepted events are on disk before they are acknowledged: no kill of a process shows that, only its system calls do."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from twotower.serving.sqlite_store import SQLiteStore

SCRIPT = """
import os, sys
from twotower.serving.event_journal import Journal
from twotower.serving.event_store import open_store
from twotower.serving.event_types import Event
journal = Journal(open_store(sys.argv[1]))
for i in range(5):
    assert journal.append([[Event(event_id=str(i), user="u", item_id="b", time_s=i)]]) == [1]
    os.write(1, b"acknowledged %d\\n" % i)
"""


def test_every_acknowledgement_follows_a_sync_of_what_was_written(tmp_path: Path, lacking: Callable[[str], NoReturn]) -> None:
    if shutil.which("strace") is None:
        lacking("needs strace")
    calls, command = tmp_path / "calls", [sys.executable, "-c", SCRIPT, f"sqlite:{tmp_path / 'events.sqlite'}"]
    trace = ["strace", "-f", "-y", "-e", "trace=write,pwrite64,fsync,fdatasync", "-o", str(calls)]
    ran = subprocess.run([*trace, *command], capture_output=True, text=True, check=False)
    if "ptrace" in ran.stderr and "not permitted" in ran.stderr:
        lacking("needs leave to trace system calls")
    assert ran.returncode == 0, ran.stderr
    written, acknowledged, unsynced = 0, 0, False
    for line in calls.read_text(errors="replace").splitlines():
        if re.search(r"pwrite64\(\d+<[^>]*events\.sqlite", line):
            written, unsynced = written + 1, True
        elif re.search(r"f(data)?sync\(\d+<[^>]*events\.sqlite-wal", line):
            unsynced = False
        elif "acknowledged" in line:
            acknowledged += 1
            assert written and not unsynced, f"{line}: not everything is on disk"
            written = 0
    assert acknowledged == 5


def test_the_store_syncs_every_commit_to_a_log(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "events.sqlite")
    settings = {name: store._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")}
    store.close()
    assert settings == {"synchronous": 2, "journal_mode": "wal"}, "2 is FULL"
