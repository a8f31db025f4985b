"""Write logs in many forms, and guess what they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from twotower.data.sources.file_form import read_sample
from twotower.data.sources.guess import DatasetGuess, guess_dataset

N = 400
START = datetime(2023, 1, 25, 13, 5, 9, tzinfo=UTC)
RNG = random.Random(5)
USERS = [f"C{RNG.randrange(30):04d}" for _ in range(N)]
ITEMS = [f"P{RNG.randrange(50):04d}" for _ in range(N)]
WHEN = [START + timedelta(hours=7 * n) for n in range(N)]
STARS = [RNG.randint(1, 5) for _ in range(N)]
CITIES = ["Wien", "Graz", "Linz"]


def write(
    path: Path, rows: Sequence[Sequence[object]], header: list[str] | None, separator: str = ",", encoding: str = "utf-8"
) -> Path:
    lines = [separator.join(map(str, row)) for row in [*([header] if header else []), *rows]]
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return path


def events(times: Callable[[datetime], object] = lambda at: at.strftime("%Y-%m-%d %H:%M:%S")) -> list[list[object]]:
    return [[user, item, times(at), stars] for user, item, at, stars in zip(USERS, ITEMS, WHEN, STARS, strict=True)]


def guess(*paths: Path, **named: str) -> DatasetGuess:
    return guess_dataset([read_sample(path) for path in paths], **named)


def roles(found: DatasetGuess) -> dict[str, str | None]:
    assert found.interactions is not None and not found.questions, found.questions
    return {role: found.interactions.column(role) for role in ("user", "item", "time", "rating")}
