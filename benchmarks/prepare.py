"""Measure `prepare` at the size of Yelp's full release, against a scan of the same files by the same engine.

The scan reads every key that `prepare` reads, each file once, and sums the lengths of the values. Both run in separate processes,
in turn, `--repeats` times; the figures are medians. `prepare` is measured with and without text features, and by stage.

The share of the account (counting the lines of files, comparing the ids of tables) is the median over pairs of runs, with and
without it. Prints a JSON line for each claim and appends it to benchmarks/results/prepare.jsonl.

    python benchmarks/prepare.py                # simulates a dump first: about 4 GB of disk and several minutes
    python benchmarks/prepare.py --raw DIR      # any release of Yelp's files
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, claim, tell

LARGE = {"users": 2_000_000, "businesses": 150_000, "events": 7_000_000}
KEYS = {  # what `prepare` reads of each file
    "business": "business_id name city state latitude longitude categories attributes hours",
    "review": "user_id business_id date text stars",
    "tip": "user_id business_id date text",
    "checkin": "business_id date time checkin_info",
    "user": "user_id yelping_since elite",
}
WORK = ("scan", "without account", "without text", "with text")
ALLOWED_RATIO, ALLOWED_GIB, ALLOWED_SHARE = 3.0, 4.0, 0.15
STAGES = "stages.json"
Figures = dict[str, float]  # "wall" and "cpu" in seconds, "peak" in GiB, and the seconds of every stage of `prepare` by its name


def main(words: list[str] | None = None) -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="folder of raw Yelp files; without it a town is simulated")
    parser.add_argument("--users", type=int, default=LARGE["users"])
    parser.add_argument("--businesses", type=int, default=LARGE["businesses"])
    parser.add_argument("--events", type=int, default=LARGE["events"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--account", action="store_true", help="measure the share of the account alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "prepare.jsonl")
    parser.add_argument("--child", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.child:
        _work(arguments.child, arguments.raw, arguments.out)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        raw = arguments.raw or _simulated(Path(folder) / "raw", arguments)
        chosen = WORK[1:3] if arguments.account else WORK
        found = _measured(raw, Path(folder), arguments.repeats, chosen)
        size = sum(file.stat().st_size for file in raw.glob("*") if file.is_file()) / 1e9
    _report(found, f"{size:.1f} GB of raw files", arguments)
    return 0


def _simulated(out: Path, arguments: argparse.Namespace) -> Path:
    from twotower.data.simulator.simulate import simulate

    simulate(out, users=arguments.users, businesses=arguments.businesses, events=arguments.events, seed=arguments.seed)
    (out / "town_truth.safetensors").unlink()  # not a raw file of Yelp
    return out


def _measured(raw: Path, folder: Path, repeats: int, chosen: Sequence[str]) -> dict[str, Figures]:
    """Return the medians of each kind of work, measured in turn, and of the share of the account over the pairs of runs."""
    runs: dict[str, list[Figures]] = {work: [] for work in WORK if work in chosen}
    for _ in range(repeats):
        for work in runs:
            runs[work].append(_child(work, raw, folder / "dataset"))
    found = {work: {name: median(run[name] for run in each) for name in each[0]} for work, each in runs.items()}
    pairs = zip(runs["without text"], runs["without account"], strict=True)
    found["without text"]["share"] = median(1 - without["cpu"] / full["cpu"] for full, without in pairs)
    return found


def _child(work: str, raw: Path, out: Path) -> Figures:
    """Run one kind of work in a separate process."""
    words = [sys.executable, __file__, "--child", work, "--raw", str(raw), "--out", str(out)]
    begin = time.perf_counter()
    child = subprocess.Popen(words)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{work} failed")
    wall = time.perf_counter() - begin
    stages = out.with_name(STAGES)
    spent = json.loads(stages.read_text()) if work != "scan" else {}
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss / _per_gib(), **spent}


def _per_gib() -> int:
    """Return the number of `ru_maxrss` units in a GiB: KiB on Linux, bytes on macOS."""
    return 2**30 if sys.platform == "darwin" else 2**20


def _work(work: str, raw: Path, out: Path) -> None:
    if work == "scan":
        _scan(raw)
        return
    from twotower.data.prepare import prepare
    from twotower.utils.config import parse_config

    if work == "without account":
        _without_account()
    text = {} if work == "with text" else {"text_dim": 0}
    begun = {"start": time.perf_counter()}
    prepare(
        parse_config({"data": {"path": str(raw)}, "prepare": text}),
        out,
        progress=lambda stage: begun.__setitem__(stage, time.perf_counter()),
    )
    ends = [*list(begun.values())[1:], time.perf_counter()]
    spent = {name: round(end - start, 2) for (name, start), end in zip(begun.items(), ends, strict=True)}
    out.with_name(STAGES).write_text(json.dumps(spent))


def _without_account() -> None:
    """Leave out what `prepare` does for its account alone: counting the lines of files, and comparing the ids of tables."""
    from twotower.data import selection
    from twotower.data.sources import json_files
    from twotower.data.sources.account import Match

    json_files.JsonFile.rows = lambda _, found=-1: found  # type: ignore[method-assign]
    selection.match_ids = lambda *_: Match(0, 0)
    selection.count_ids = lambda engine, events, key: engine.save(events.filter(events[key].notnull()).select(key).distinct())


def _scan(raw: Path) -> None:
    import duckdb

    con = duckdb.connect()
    for name, words in KEYS.items():
        keys = words.split()
        types = ", ".join(f"{key}: 'VARCHAR'" for key in keys)
        for file in sorted(raw.glob(f"*{name}*.json*")):
            source = f"read_json('{file}', columns = {{{types}}}, format = 'newline_delimited', ignore_errors = true)"
            con.execute(f"SELECT {', '.join(f'sum(length({key}))' for key in keys)} FROM {source}").fetchall()


def _report(found: dict[str, Figures], size: str, arguments: argparse.Namespace) -> None:
    def say(what: str, figure: float, unit: str, against: str, against_figure: float, **more: Any) -> None:
        tell(claim(f"{what} ({size})", figure, unit, against, against_figure, arguments.seed, **more), arguments.results)

    def stages(work: Figures) -> Figures:
        return {name: round(seconds, 2) for name, seconds in work.items() if name not in ("wall", "cpu", "peak", "start", "share")}

    bare, without = found["without text"], found["without account"]
    say("the account's share of prepare without text: processor seconds", bare["share"], "", "the limit set", ALLOWED_SHARE)
    say("prepare without text: processor seconds", bare["cpu"], "s", "without the account", without["cpu"])
    if arguments.account:
        return
    scan, full = found["scan"], found["with text"]
    scanned = "a bare scan of the same files by DuckDB"
    say("prepare without text: seconds", bare["wall"], "s", scanned, scan["wall"], stages_s=stages(bare))
    say("prepare without text: processor seconds", bare["cpu"], "s", scanned, scan["cpu"])
    say("prepare without text: peak memory", bare["peak"], "GiB", "the limit set", ALLOWED_GIB)
    text = full["cpu"] - bare["cpu"]  # a difference of two runs: CPU time varies less than wall time
    say("the text features alone: processor seconds", text, "s", scanned, scan["cpu"])
    say("prepare with text: seconds", full["wall"], "s", scanned, scan["wall"], stages_s=stages(full))
    say("prepare with text: peak memory", full["peak"], "GiB", "the limit set", ALLOWED_GIB)
    verdict = "within" if bare["wall"] <= ALLOWED_RATIO * scan["wall"] else "beyond"
    sys.stderr.write(f"prepare without text / bare scan = {bare['wall'] / scan['wall']:.2f}, {verdict} the {ALLOWED_RATIO:g} set\n")


if __name__ == "__main__":
    raise SystemExit(main())
