"""Account for every line and row of the input: what was read, rejected, left out and matched, by path and reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from twotower.errors import DataError

SHOWN_CHARS = 200  # characters written of a rejected row
SHOWN_REJECTS = 3
ADVICE = {
    " time": 'Set time_format to the form of the times, such as "%d.%m.%Y %H:%M", or "%s" for counters',
    "time_format": "Correct time_format",
    "-5 scale": "Set stars_scale to the lowest and highest rating",
    "repeats an earlier row": "If the file holds one row for each event, set `from: interactions` in place of path",
    "UTF-8": "Set the table's encoding",
    "not a row of": "Set the table's separator, quote or columns",
    "quot": "Set the table's quote",
}
AGAIN = (" (items)", " (users)")  # after the name of an interactions file that is also read as that table
MAX_NAMES = 12  # shown of the unused columns
MAX_FILES = 20
REPLACED = "a later file has the id again"  # of snapshots: not lost, since the newest row counts
LOST_FRAC = 0.01  # a larger share of lost rows is a warning


@dataclass
class FileAccount:
    """Counts of one file: `rows` = kept + `rejected` + `left_out`."""

    table: str = ""
    rows: int = 0
    lines: int | None = None  # of a text file; more than rows where values go over several lines
    skipped: dict[str, int] = field(default_factory=dict)  # lines that are no rows: header, blank, comments
    rejected: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the account without what is empty."""
        return {name: value for name, value in vars(self).items() if value or name == "rows"}


class Rejects:
    """Account of a source's files. Rejected rows are written to `path` as they are found; without any, no file is written.

    Parameters
    ----------
    path
        JSON lines {"file", "line" (from 1), "reason", "text" (first 200 characters)}.
    max_frac
        Largest allowed share of rejected rows of a file.
    """

    def __init__(self, path: Path, max_frac: float) -> None:
        self.path, self.max_frac = path, max_frac
        self.files: dict[str, FileAccount] = {}
        self.notes: list[str] = []  # warnings for the screen
        self._first: dict[str, list[str]] = {}
        self._file: IO[str] | None = None

    @property
    def rejected(self) -> dict[str, int]:
        """Number of rejected rows by file, where there are any."""
        return {name: sum(file.rejected.values()) for name, file in self.files.items() if file.rejected}

    def of(self, file: str) -> FileAccount:
        """Return the account of a file, a new one at its first use."""
        return self.files.setdefault(file, FileAccount())

    def add(self, file: str, line: int, reason: str, text: str) -> None:
        """Record a bad row."""
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        row = {"file": file, "line": line, "reason": reason, "text": text[:SHOWN_CHARS]}
        self._file.write(json.dumps(row) + "\n")
        rejected, kind = self.of(file).rejected, reason_kind(reason)
        rejected[kind] = rejected.get(kind, 0) + 1
        first = self._first.setdefault(file, [])
        if len(first) < SHOWN_REJECTS:
            first.append(f"{file}:{line} {reason}")

    def total(self, file: str, rows_read: int) -> None:
        """Record the number of rows of a file, including bad ones."""
        self.of(file).rows += rows_read

    def check(self) -> None:
        """Close the file of rejects.

        Raises
        ------
        DataError
            More than `max_frac` of a file's rows were rejected; the first three are shown.
        """
        self.close()
        for file, count in self.rejected.items():
            rows = max(self.files[file].rows, count)
            if count > self.max_frac * rows:
                raise DataError(
                    f"{file} has {count:,} unreadable rows of {rows:,} ({count / rows:.2%}): {'; '.join(self._first[file])}. "
                    f"At most {self.max_frac:.2%} are allowed. {_advice(self._first[file][0])} or raise data.max_reject_frac."
                )

    def warnings(self) -> list[str]:
        """Return what the user should know: files of which more than `LOST_FRAC` was lost, and the notes of the source."""
        found = []
        for name, file in self.files.items():
            left_out = {reason: count for reason, count in file.left_out.items() if reason != REPLACED}
            for part, word in ((file.rejected, "rejected"), (left_out, "left out")):
                lost = sum(part.values())
                if lost > LOST_FRAC * file.rows:
                    why = max(part, key=lambda reason: part[reason])
                    found.append(
                        f"{name}: {lost:,} of {file.rows:,} rows were {word} ({lost / max(file.rows, 1):.1%}), mostly: {why}"
                    )
        if len(found) > MAX_FILES:
            found[MAX_FILES:] = [f"{len(found) - MAX_FILES:,} more files lost more than {LOST_FRAC:.0%} of their rows"]
        return [*found, *self.notes]

    def close(self) -> None:
        """Close the file of rejects."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _advice(reason: str) -> str:
    """Return what may help against the most frequent kinds of bad rows."""
    found = next((advice for sign, advice in ADVICE.items() if sign in reason), None)
    return f"{found}, correct the file," if found else "Correct the file"


def reason_kind(reason: str) -> str:
    """Return a reason without the value that it shows.

    Examples
    --------
    >>> reason_kind("t is not a time: 'soon'"), reason_kind("stars must be from 1 to 5, not '9'")
    ('t is not a time', 'stars must be from 1 to 5')
    """
    return re.split(r": |,? not '|[.;] | '", reason)[0]


@dataclass(frozen=True)
class Match:
    """Share of the events whose id is in a table, with one id of each side that is not in the other.

    Attributes
    ----------
    known, events
        Events with an id in the table, and all events with an id.
    alike
        Pairs (id of the events, id of the table) that differ only in case, blanks, leading zeros or ".0".
    """

    known: int
    events: int
    unknown_example: str | None = None
    table_example: str | None = None
    alike: int = 0
    alike_example: tuple[str, str] | None = None

    def check(self, side: str) -> None:
        """Raise `DataError` if no event has an id of the table of a side, "item" or "user"."""
        if self.events and not self.known:
            raise DataError(
                f"No id of the {self.events:,} events is in the {side}s table: the events have {self.unknown_example!r}, "
                f"the table has {self.table_example!r}. Ids must be equal in both. Name the right columns, or write the ids alike."
            )

    def warnings(self, side: str) -> list[str]:
        """Return what the user should know about unmatched ids."""
        found = []
        lost = self.events - self.known
        if lost > LOST_FRAC * self.events:
            found.append(
                f"{lost:,} of {self.events:,} events ({lost / self.events:.1%}) have {side} ids that the {side}s table lacks, such "
                f"as {self.unknown_example!r}; the table has {self.table_example!r}"
            )
        if self.alike and self.alike_example:
            one, other = self.alike_example
            found.append(f"{self.alike:,} {side} ids look alike in both tables but differ, such as {one!r} and {other!r}")
        return found


def account_table(counts: dict[str, Any]) -> list[str]:
    """Return the account of `manifest.json` (its key "counts") as lines of a short table for the screen."""
    rows = [("file", "rows", "rejected", "left out")]
    whole = [name for name, file in counts["files"].items() if not file.get("rejected") and not file.get("left_out")]
    hidden = set(whole[max(0, MAX_FILES - len(counts["files"]) + len(whole)) :] if len(counts["files"]) > MAX_FILES else [])
    listed = dict([(name, file) for name, file in counts["files"].items() if name not in hidden][:MAX_FILES])
    for name, file in listed.items():
        lost = [sum(file.get(part, {}).values()) for part in ("rejected", "left_out")]
        rows.append((name, f"{file['rows']:,}", *(f"{count:,}" for count in lost)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"  {row[0]:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    if len(counts["files"]) > len(listed):
        lines.append(f"  … and {len(counts['files']) - len(listed):,} more files; manifest.json has all")
    for name, file in listed.items():
        for part, word in (("rejected", "rejected"), ("left_out", "left out")):
            lines += [f"  {name}: {count:,} {word}: {reason}" for reason, count in file.get(part, {}).items()]
    for what, reasons in counts["dropped"].items():
        lines += [f"  dropped {count:,} {what}: {reason}" for reason, count in reasons.items() if count]
    if negatives := counts.get("kept", {}).get("negative_events"):
        lines.append("  kept as negatives: " + ", ".join(f"{count:,} {name}" for name, count in negatives.items()))
    for side, match in counts["matched"].items():
        share = match["known"] / max(match["events"], 1)
        lines.append(f"  events whose {side} is in the {side}s table: {match['known']:,} of {match['events']:,} ({share:.1%})")
    if counts["times_s"]:
        first, last = (datetime.fromtimestamp(counts["times_s"][name], UTC) for name in ("first", "last"))
        lines.append(f"  first and last time: {first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S} UTC")
    unused: dict[str, dict[str, None]] = {}
    for name, file in counts["files"].items():
        if not name.endswith(AGAIN):  # of a file that is read for several tables, what none of them uses
            again = [counts["files"][name + mark] for mark in AGAIN if name + mark in counts["files"]]
            left = [
                column for column in file.get("unused_columns", []) if all(column in one.get("unused_columns", ()) for one in again)
            ]
            unused.setdefault(file.get("table", ""), {}).update(dict.fromkeys(left))
    for table, columns in unused.items():
        names = list(columns)
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            lines.append(f"  unused columns of {table}: {', '.join(names[:MAX_NAMES])}{more}")
    return lines


OnReject = Callable[[int, str, str], None]  # line, reason, text
