"""Damage small files at random and read them with the readers of `prepare`: no traceback, no hang, no silent loss.

Each case is a table of at most 12 events in one form and compression, which is cut, gets flipped or foreign bytes, or is written in
another encoding. A case ends with one sentence, or with an account that adds up. Prints the number of cases by form, and appends it
to build/fuzz.jsonl.

    python benchmarks/fuzz.py --cases 100000            # in pieces: --first 0 --cases 10000
"""

from __future__ import annotations

import argparse
import bz2
import csv
import gzip
import io
import json
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from common import ROOT, commit, machine, tell

from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import DuckDBEngine
from twotower.data.sources.table_files import scan_files
from twotower.errors import TwoTowerError

LIMIT_S = 20
NAMES = ("user_id", "item_id", "time", "text")
LETTERS = "abcXYZ019 é漢😀'\"\\,;\t|:[]{}\n"
FOREIGN = [b'"', b"\n", b"\r", b"\xff", b"\x00", b",", b'""', b"\xef\xbb\xbf", b"\\", b"{", b"]", b"\r\n", b"'"]
Row = tuple[str, str, int, str]


def rows_of(rng: random.Random) -> list[Row]:
    """Return the rows of a case."""

    def word() -> str:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 8)))

    return [
        (word(), word(), rng.randint(315_532_800, 1_900_000_000), word() * rng.randint(1, 6)) for _ in range(rng.randint(1, 12))
    ]


def delimited(separator: str) -> Callable[[list[Row], random.Random], bytes]:
    """Return a writer of delimited text, in a random encoding."""

    def write(rows: list[Row], rng: random.Random) -> bytes:
        target = io.StringIO()
        quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC])
        writer = csv.writer(target, delimiter=separator, lineterminator=rng.choice(["\n", "\r\n", "\r"]), quoting=quoting)
        writer.writerow(NAMES)
        writer.writerows(rows)
        return target.getvalue().encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"]), "replace")

    return write


def json_lines(rows: list[Row], rng: random.Random) -> bytes:
    """Write JSON lines."""
    ascii_only = rng.random() < 0.5
    return "\n".join(json.dumps(dict(zip(NAMES, row, strict=True)), ensure_ascii=ascii_only) for row in rows).encode()


def json_array(rows: list[Row], rng: random.Random) -> bytes:
    """Write a JSON array."""
    return json.dumps([dict(zip(NAMES, row, strict=True)) for row in rows], indent=rng.choice([None, 0, 2])).encode()


def python_dicts(rows: list[Row], _: random.Random) -> bytes:
    """Write lines of Python dicts."""
    return "\n".join(repr(dict(zip(NAMES, row, strict=True))) for row in rows).encode()


def parquet(rows: list[Row], rng: random.Random) -> bytes:
    """Write Parquet."""
    target = io.BytesIO()
    columns = [pa.array([row[place] for row in rows]) for place in range(4)]
    columns[0] = columns[0].dictionary_encode() if rng.random() < 0.3 else columns[0]
    pq.write_table(pa.table(columns, list(NAMES)), target, compression=rng.choice(["none", "snappy", "zstd"]))
    return target.getvalue()


FORMS: dict[str, Callable[[list[Row], random.Random], bytes]] = {
    "csv": delimited(","),
    "tsv": delimited("\t"),
    "jsonl": json_lines,
    "array.json": json_array,
    "python.json": python_dicts,
    "parquet": parquet,
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return data that are cut, or have flipped or foreign bytes."""
    content = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        place = rng.randrange(len(content) + 1)
        content[place : place + rng.randint(0, 3)] = rng.choice([rng.randbytes(rng.randint(0, 3)), rng.choice(FOREIGN)])
    if content and rng.random() < 0.3:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.3 else content)


def check(path: Path, engine: Any, folder: Path) -> str:
    """Read a file; return "refused", "rejects" or "whole", or raise if rows are lost."""
    rejects = Rejects(folder / "rejects.jsonl", 1.0)
    try:
        (scan,) = scan_files(engine, [(path, path.name)], list(NAMES), "interactions", rejects)
        (part,) = scan.files
        kept = engine.save(scan.rows)
        found = int(kept.count().to_pyarrow().as_py())
        engine.free(kept)
        expected = part.expected(found) if part.expected else found
    except TwoTowerError as error:
        assert "\n" not in str(error), "a message of several lines"
        return "refused"
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("pyarrow", "_duckdb", "duckdb") or isinstance(error, OSError):
            return "refused"  # the source names the file: `reading`
        raise
    finally:
        rejects.close()
    if found != expected and path.suffix == ".parquet":
        return "refused"  # `prepare` says that the file has other rows than its footer
    assert found == expected, f"{found} rows of {expected}"
    return "rejects" if part.malformed() else "whole"


def main() -> int:
    """Read the cases, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first case: a case is always the same")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "fuzz.jsonl")
    arguments = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    faults: list[str] = []
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {LIMIT_S} s")))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        engine = DuckDBEngine(folder / "spill")
        for number in range(arguments.first, arguments.first + arguments.cases):
            rng = random.Random(number)
            form, packed = rng.choice(list(FORMS)), rng.choice(["", "", "", ".gz", ".bz2", ".zst"])
            packed = "" if form == "parquet" else packed
            data = FORMS[form](rows_of(rng), rng)
            data = damaged(PACKED[packed](data), rng) if rng.random() < 0.3 else PACKED[packed](damaged(data, rng))
            path = folder / f"e.{form}{packed}"
            path.write_bytes(data)
            signal.alarm(LIMIT_S)
            try:
                ended = check(path, engine, folder)
            except Exception:
                ended = "FAULT"
                faults.append(f"case {number}, {path.name}: {traceback.format_exc(limit=-2)}")
                sys.stderr.write(faults[-1] + "\n")
            signal.alarm(0)
            counts.setdefault(form + packed, Counter())[ended] += 1
            path.unlink()
            for left in (folder / "spill").glob("copy-*") if (folder / "spill").exists() else ():
                left.unlink()
    found = {name: dict(sorted(each.items())) for name, each in sorted(counts.items())}
    row = {"claim": "damaged files", "first": arguments.first, "cases": arguments.cases, "faults": len(faults), "ended": found}
    tell(row | {"machine": machine(), "commit": commit()}, arguments.results)
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
