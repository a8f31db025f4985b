"""Measure how `twotower prepare` and `twotower inspect` take inputs of extreme size: time, peak memory, and how they end.

Each input is written at half its size and at its size; a time that grows more than `ALLOWED_GROWTH` times is not linear. Each
command runs in a process of its own. It must end with a dataset (0) or with one sentence (2). Prints a JSON line for each and
appends it to build/limits.jsonl.

    python benchmarks/limits.py                       # all inputs: some minutes, 2 GB of disk
    python benchmarks/limits.py --only columns-csv
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from common import ROOT, Row, commit, machine, tell

from twotower.cli import main as main_of_commands

ALLOWED_GROWTH, ALLOWED_GIB, ALLOWED_S = 2.6, 4.0, 900
START_S, MIB = 1_600_000_000, 1 << 20
HEADER = "user_id,item_id,time\n"
GROWING: list[Path] = []  # files that get more lines while they are read
Write = Callable[[Path, int], None]  # the path of the file without a suffix is given by the name


def event(n: int) -> str:
    """Return a line of events."""
    return f"u{n % 1009},i{n % 503},{START_S + n * 37}\n"


def as_json(n: int, **more: Any) -> str:
    """Return a JSON line of an event."""
    return json.dumps({"user_id": f"u{n % 1009}", "item_id": f"i{n % 503}", "time": START_S + n * 37, **more}) + "\n"


def few(form: Callable[..., str] = event) -> Iterator[str]:
    """Yield the lines of 2,000 events."""
    yield from (form(n) for n in range(2000))


def text(path: Path, *parts: Iterator[str] | str) -> None:
    """Write lines, compressed if the name says so."""
    with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else path.open("w") as target:
        for part in parts:
            target.writelines([part] if isinstance(part, str) else part)


def one_user(path: Path, n: int) -> None:
    text(path, HEADER, (f"u{'0' if k % 50 else k},i{k % 5003},{START_S + k * 37}\n" for k in range(n)))


def long_line(path: Path, n: int) -> None:
    text(path, HEADER, few(), "u1,i1," + "9" * n + "\n", few())


def long_json(path: Path, n: int) -> None:
    text(path, few(as_json), as_json(0, text="x" * n), few(as_json))


def columns_csv(path: Path, n: int) -> None:
    names, cells = ",".join(f"c{k}" for k in range(n)), ",1" * n
    text(path, HEADER[:-1] + "," + names + "\n", (event(k)[:-1] + cells + "\n" for k in range(100)))


def columns_json(path: Path, n: int) -> None:
    more = {f"c{k}": 1 for k in range(n)}
    text(path, (as_json(k, **more) for k in range(100)))


def columns_parquet(path: Path, n: int) -> None:
    data = {
        "user_id": [f"u{k}" for k in range(100)],
        "item_id": [f"i{k}" for k in range(100)],
        "time": list(range(START_S, START_S + 100)),
    }
    pq.write_table(pa.table(data | {f"c{k}": pa.array([1] * 100, pa.int8()) for k in range(n)}), path)


def columns_items(path: Path, n: int) -> None:
    text(path, HEADER, few())
    names = ",".join(f"c{k}" for k in range(n))
    text(path.with_name("items.csv"), f"item_id,{names}\n", (f"i{k}" + ",1" * n + "\n" for k in range(100)))


def no_header(path: Path, n: int) -> None:
    text(path, ("\n" if k % 2 else "# a comment\n" for k in range(n)), HEADER, few())


def duplicates(path: Path, n: int) -> None:
    text(path, HEADER, few(), (event(7) for _ in range(n)))


def duplicate_items(path: Path, n: int) -> None:
    text(path, HEADER, few())
    text(path.with_name("items.csv"), "item_id,colour\n", (f"i{k},red\n" for k in range(503)), ("i7,red\n" for _ in range(n)))


def long_id(path: Path, n: int) -> None:
    text(path, HEADER, few(), f"{'x' * n},i1,{START_S}\n", f"u1,{'y' * n},{START_S}\n", few())


def deep(path: Path, n: int) -> None:
    text(path, few(as_json), as_json(0)[:-2] + ', "deep": ' + "[" * n + "]" * n + "}\n", few(as_json))


def deep_python(path: Path, n: int) -> None:
    rows = (repr(json.loads(line)) + "\n" for line in few(as_json))
    text(path, rows, repr(json.loads(as_json(0)))[:-1] + ", 'deep': " + "[" * n + "]" * n + "}\n")


def deep_list(path: Path, n: int) -> None:
    text(path, "user_id;item_id;time\n", (line.replace(",", ";") for line in few()))
    items = (f"i{k};['a', 'b']\n" for k in range(503))
    text(path.with_name("items.csv"), "item_id;tags\n", items, "x;" + "[" * n + "'a'" + "]" * n + "\n")


def row_groups(path: Path, n: int) -> None:
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("time", pa.int64())])
    with pq.ParquetWriter(path, schema) as target:
        for k in range(n):
            target.write_table(pa.table([[f"u{k % 1009}"], [f"i{k % 503}"], [START_S + k * 37]], schema=schema))


def no_newline(path: Path, n: int) -> None:
    text(path, "user_id,item_id,time", ",u1,i1,1600000000" * (n // 17))


def packed(path: Path, parts: Iterator[tuple[str, int]]) -> None:
    """Write texts, each repeated, as packed pieces one after another: a file of 20 GB is written at the cost of one piece."""
    pack = gzip.compress if path.suffix == ".gz" else lambda data: bytes(pa.compress(data, "zstd", asbytes=True))
    with path.open("wb") as target:
        for piece, repeats in parts:
            target.writelines([pack(piece.encode())] * repeats)


def bomb(path: Path, n: int) -> None:
    packed(path, iter([("0" * MIB, n // MIB)]))


def bomb_blank(path: Path, n: int) -> None:
    packed(path, iter([(HEADER + "".join(few()), 1), ("\n" * MIB, n // MIB)]))


def bomb_rows(path: Path, n: int) -> None:
    block = "".join(few()) * 40
    packed(path, iter([(HEADER, 1), (block, n // len(block))]))


def open_quote(path: Path, n: int) -> None:
    text(path, HEADER, few(), ((f'u{k},"i{k % 503},{START_S + k}\n' if k % 3 == 0 else event(k)) for k in range(n)))


def json_array(path: Path, n: int) -> None:
    text(path, "[", ",\n".join(as_json(k)[:-1] for k in range(n)), "]")


def json_one_line(path: Path, n: int) -> None:
    text(path, "[", ",".join(as_json(k)[:-1] for k in range(n)), "]")


def json_cut(path: Path, n: int) -> None:
    text(path, "[\n", ",\n".join(as_json(k)[:-1] for k in range(n)), ',\n{"user_id": "u1", "ite')


def json_bad(path: Path, n: int) -> None:
    text(path, few(as_json), ("{broken\n" for _ in range(n)), few(as_json))


def growing(path: Path, n: int) -> None:
    text(path, HEADER, (event(k) for k in range(n)))
    GROWING.append(path)


def many_files(path: Path, n: int) -> None:
    path.mkdir()
    for k in range(n):
        (path / f"part-{k:06}.csv").write_text(HEADER + "".join(event(k * 5 + m) for m in range(5)))


def bad_times(path: Path, n: int) -> None:
    text(
        path,
        HEADER,
        (f"u{k % 1009},i{k % 503},May {k % 28 + 1} 2021 {k // 3600 % 24:02}:{k // 60 % 60:02}:{k % 60:02}\n" for k in range(n)),
    )


CASES: dict[str, tuple[str, int, Write]] = {  # file, size, and how it is written
    "one-user": ("e.csv", 1_000_000, one_user),
    "line-csv": ("e.csv", 100 * MIB, long_line),
    "line-csv-gz": ("e.csv.gz", 100 * MIB, long_line),
    "line-json": ("e.jsonl", 100 * MIB, long_json),
    "line-json-20": ("e.jsonl", 20 * MIB, long_json),
    "line-json-gz": ("e.jsonl.gz", 100 * MIB, long_json),
    "columns-csv": ("e.csv", 100_000, columns_csv),
    "columns-json": ("e.jsonl", 100_000, columns_json),
    "columns-parquet": ("e.parquet", 100_000, columns_parquet),
    "columns-items": ("e.csv", 100_000, columns_items),
    "no-header": ("e.csv", 1_000_000, no_header),
    "duplicates": ("e.csv", 1_000_000, duplicates),
    "duplicate-items": ("e.csv", 1_000_000, duplicate_items),
    "long-id": ("e.csv", MIB, long_id),
    "deep-json": ("e.jsonl", 100_000, deep),
    "deep-python": ("e.json", 100_000, deep_python),
    "deep-list": ("e.csv", 100_000, deep_list),
    "row-groups": ("e.parquet", 100_000, row_groups),
    "no-newline": ("e.csv", 100 * MIB, no_newline),
    "bomb": ("e.csv.gz", 20 << 30, bomb),
    "bomb-zst": ("e.csv.zst", 20 << 30, bomb),
    "bomb-json": ("e.jsonl.gz", 20 << 30, bomb),
    "bomb-blank": ("e.csv.gz", 20 << 30, bomb_blank),
    "bomb-blank-zst": ("e.csv.zst", 20 << 30, bomb_blank),
    "bomb-rows": ("e.csv.gz", 2 << 30, bomb_rows),
    "open-quote": ("e.csv", 600_000, open_quote),
    "json-array": ("e.json", 600_000, json_array),
    "json-one-line": ("e.json", 300_000, json_one_line),
    "json-cut": ("e.json", 600_000, json_cut),
    "json-bad": ("e.jsonl", 1_000_000, json_bad),
    "many-files": ("parts", 2000, many_files),
    "growing": ("e.csv", 600_000, growing),
    "other-times": ("e.csv", 600_000, bad_times),
}


def settings(folder: Path, name: str, case: str) -> Path:
    """Write a configuration for the file of a case, and return its path."""
    interactions: dict[str, Any] = {"path": name, "time": "time"}
    if case == "no-header":
        interactions["comment"] = "#"
    data: dict[str, Any] = {"source": "tables", "path": str(folder), "interactions": interactions, "max_reject_frac": 1.0}
    if (folder / "items.csv").exists():
        data["items"] = {"path": "items.csv"}
        if case == "deep-list":
            data["items"]["features"] = [{"name": "tags", "kind": "multi"}]
    file = folder / "cfg.yaml"
    file.write_text(yaml.safe_dump({"data": data, "prepare": {"split": {"kind": "time"}}}))
    return file


def measured(words: list[str], log: Path) -> Row:
    """Return processor seconds, peak memory, exit code and last line of a command, which runs in a fork of this process."""
    child = os.fork()
    if not child:
        _run(words, log)
    killer = threading.Timer(ALLOWED_S, os.kill, (child, signal.SIGKILL))
    killer.start()
    ended = threading.Event()
    writer = threading.Thread(target=_append, args=(ended,))
    writer.start()
    _, status, usage = os.wait4(child, 0)
    ended.set()
    writer.join()
    killer.cancel()
    lines = log.read_text(errors="replace").splitlines()
    gib = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    end = next((line for line in lines if "error:" in line), lines[-1] if lines else "")
    failed = any(line.startswith("Traceback") for line in lines)
    cpu = round(usage.ru_utime + usage.ru_stime, 2)
    return {"cpu_s": cpu, "gib": round(gib, 2), "exit": os.waitstatus_to_exitcode(status), "traceback": failed, "end": end[:300]}


def _append(ended: threading.Event) -> None:
    """Add lines to the growing files until the event."""
    while GROWING and not ended.wait(0.005):
        with GROWING[-1].open("a") as target:
            target.writelines(event(k) for k in range(100))


def _run(words: list[str], log: Path) -> NoReturn:
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    code = 1
    try:
        code = main_of_commands(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def compare(case: str, command: str, small: Row, large: Row) -> Row:
    """Return the row of a case: its figures, and whether it kept the limits."""
    growth = large["cpu_s"] / max(small["cpu_s"], 1.0)
    right = large["exit"] in (0, 2) and not large["traceback"] and growth <= ALLOWED_GROWTH and large["gib"] <= ALLOWED_GIB
    return {
        "claim": f"{command} of {case}",
        "right": right,
        **large,
        "half": {name: small[name] for name in ("cpu_s", "gib", "exit")},
    }


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--commands", nargs="*", choices=("prepare", "inspect"), default=["prepare", "inspect"])
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "limits.jsonl")
    parser.add_argument("--address-gib", type=int, default=12, help="limit of the address space of a command")
    arguments = parser.parse_args()
    for case in arguments.only:
        name, size, write = CASES[case]
        found: dict[str, list[Row]] = {command: [] for command in arguments.commands}
        for n in (size // 2, size):
            GROWING.clear()
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                write(folder / name, n)
                config = settings(folder, name, case)
                words = {
                    "prepare": ["--config", str(config), "--out", str(folder / "out")],
                    "inspect": [str(folder / name), "--time", "time"],
                }
                resource.setrlimit(resource.RLIMIT_AS, (arguments.address_gib << 30, resource.RLIM_INFINITY))
                for command in arguments.commands:
                    found[command].append(measured([command, *words[command]], folder / "log.txt"))
        for command, (small, large) in found.items():
            row = compare(case, command, small, large) | {"size": size, "machine": machine(), "commit": commit()}
            tell(row, arguments.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
