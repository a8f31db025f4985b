"""Write docs/results.md from benchmarks/results/*.jsonl.

    python benchmarks/report.py            # write it
    python benchmarks/report.py --check    # exit 1 if the page is out of date

The page shows the rows with the latest settings of each dataset, and the latest row of each claim. Published figures
(benchmarks/published.jsonl) have separate tables, with their source.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import QUALITY_SETS, RESULTS, ROOT, Row

from twotower.errors import DataError, TwoTowerError

PAGE = ROOT / "docs" / "results.md"
PUBLISHED = ROOT / "benchmarks" / "published.jsonl"
SHOWN = ("NDCG", "HitRate", "Recall")
CLAIM = ("claim", "figure", "unit", "against", "against_figure", "ratio", "seed", "machine", "commit")
BESIDES = (
    *(
        "at_rate",
        "p50",
        "p99",
        "cpu_p50",
        "cpu_p99",
        "timed",
        "read_mb",
        "candidates",
        "recall",
        "bytes",
        "lost",
        "interval",
        "requests",
        "refused",
        "failed",
        "reloads",
        "epoch",
        "cpu_s",
    ),
    *("while_starting", "tracebacks", "places_traded_in", "start_s", "memory_mb", "examples_per_s", "users_a_second"),
)
RIVAL, MIN_SLICE_USERS = "ials", 500  # of the table by slice
GPU = ("gpu_part", "ok", "failed", "machine", "torch", "commit", "date", "seconds")
QUALITY = ("set", "protocol", "system", "metrics", "seed", "machine", "commit", "seconds", "config_hash")
HEAD = """# Results

Written by `python benchmarks/report.py` from the rows that the scripts in `benchmarks/` append to `benchmarks/results/`; never by
hand. How figures are made is in [evaluation.md](evaluation.md); what did not help is in [log.md](log.md).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is not up to date")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    try:
        text = render(given.results)
    except TwoTowerError as error:
        sys.stderr.write(f"report: error: {error}\n")
        return 2
    if given.check:
        current = given.page.read_text(encoding="utf-8") if given.page.is_file() else ""
        return 0 if current == text else 1
    given.page.write_text(text, encoding="utf-8")
    return 0


def render(results: Path, published: Path = PUBLISHED) -> str:
    """Return the page as text; the same rows give the same page."""
    files = {file.stem: read_rows(file) for file in sorted(results.glob("*.jsonl"))}
    rows = [row for found in files.values() for row in found if "claim" not in row and "gpu_part" not in row]
    parts = [HEAD.rstrip()]
    for name in QUALITY_SETS:
        measured = latest_settings([row for row in rows if row["set"] == name])
        if measured:
            parts.append(_quality_section(name, measured, [row for row in read_rows(published) if row["set"] == name]))
    parts += [_claims_section(name, claims) for name, found in files.items() if (claims := [r for r in found if "claim" in r])]
    on_gpu = [row for found in files.values() for row in found if "gpu_part" in row]
    parts += [_gpu_section(on_gpu)] if on_gpu else []
    return "\n\n".join(parts) + "\n"


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a JSON-lines file.

    Raises
    ------
    DataError
        A line is neither a claim, nor a part of `gpu.py`, nor a quality row, nor (with "source") a published one.
    """
    rows: list[Row] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            kinds = {"claim": CLAIM, "gpu_part": GPU, "source": ("set", "protocol", "system", "metrics", "source")}
            kind = next((keys for key, keys in kinds.items() if key in row), QUALITY)
            missing = [key for key in kind if key not in row]
        except (ValueError, TypeError):
            missing = ["a JSON object"]
        if missing:
            raise DataError(f"A result must be a whole row. {file.name}:{number} lacks {', '.join(missing)}. Measure again.")
        rows.append(row)
    return rows


def _gpu_section(rows: Sequence[Row]) -> str:
    """Return the section of `gpu.py`: one line per part and machine, from its latest row."""
    latest = {(row["gpu_part"], row["machine"]): row for row in rows}
    body = []
    for (part, _), row in latest.items():
        state = {True: "holds", False: "does not hold", None: "measured"}[row["ok"]]
        figures = "; ".join(f"{name} {_figures(value)}" for name, value in row.items() if name not in GPU)
        body.append([part, state, figures, str(row["machine"]), str(row["torch"]), f"{row['date']}, {row['commit']}"])
    modules = "`gpu_right.py`, `gpu_fits.py`, `gpu_fast.py` or `gpu_whole.py`"
    head = f"`python benchmarks/gpu.py`; what each part asks is in the docstring of its function in `benchmarks/`: {modules}."
    table = _table(["part", "promise", "figures", "machine", "PyTorch", "date, commit"], body)
    return "\n".join(["## gpu", "", head, "", *table])


def _figures(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_figures(one)}" for name, one in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_figure, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def latest_settings(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the settings of the last row: the latest one of each system and seed, refits separately."""
    kept = {(row["system"], row["seed"], _refit(row)): row for row in rows if row["config_hash"] == rows[-1]["config_hash"]}
    return list(kept.values())


def quality_table(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table with one line per system, best first: the mean ± standard deviation over the seeds."""
    columns = _columns(rows)
    by_system: dict[str, list[Row]] = {}
    for row in rows:
        by_system.setdefault(row["system"], []).append(row)
    decides = next((row["ahead"]["metric"] for row in rows if row.get("ahead")), columns[0] if columns else "")
    ranked = sorted(by_system, key=lambda system: -statistics.fmean(row["metrics"][decides] for row in by_system[system]))
    beyond = sorted({name for row in rows for name in row["metrics"] if name.startswith("coverage@")})
    columns = [*columns, *beyond]
    header = ["system", *columns, f"two-tower ahead, {decides}", "seconds to answer"]
    body = []
    for system in ranked:
        found = by_system[system]
        figures = [_spread([row["metrics"][name] for row in found if name in row["metrics"]]) for name in columns]
        body.append([system, *figures, _ahead(found), f"{statistics.fmean(row['seconds'] for row in found):.1f}"])
    return _table(header, body)


def _quality_section(name: str, rows: Sequence[Row], published: Sequence[Row]) -> str:
    chosen = QUALITY_SETS[name]
    again, rows = [row for row in rows if _refit(row)], [row for row in rows if not _refit(row)]
    seeds = sorted({row["seed"] for row in rows})
    command = f"python benchmarks/quality.py {name} --seeds {','.join(map(str, seeds))}"
    stated = [
        f"`{command}`: settings `{rows[-1]['config_hash']}`, commit {_each(rows, 'commit')}, {_each(rows, 'machine')}",
        f"{_each(rows, 'queries')} questions" if all("queries" in row for row in rows) else "",
        f"{statistics.fmean(row['run_seconds'] for row in rows):.0f} s a seed, from raw files to the report"
        if all("run_seconds" in row for row in rows)
        else "",
    ]
    text = [f"## {chosen.title}", "", chosen.about, "", "; ".join(part for part in stated if part) + ".", "", *quality_table(rows)]
    tuned = [f"{row['system']} {_settings(row['settings'])}" for row in rows if row.get("settings") and row["seed"] == seeds[0]]
    if tuned:
        text += ["", f"Baselines' settings (seed {seeds[0]}): {'; '.join(sorted(tuned))}."]
    text += _slices_table(rows)
    if again:
        counted = len({row["seed"] for row in again})
        text += [
            "",
            f"Learned from the validation part too, all systems, with what was chosen on it (`--refit`; {counted} "
            f"seed{'s' * (counted > 1)}; commit {_each(again, 'commit')}):",
            "",
            *quality_table(again),
        ]
    if published:
        columns = _columns(published)
        figures = [[_figure(row["metrics"].get(column)) for column in columns] for row in published]
        body = [[row["system"], *cells, row["source"]] for row, cells in zip(published, figures, strict=True)]
        text += [
            "",
            "Published for the same split and protocol, not measured here:",
            "",
            *_table(["system", *columns, "source"], body),
        ]
    return "\n".join(text)


def _slices_table(rows: Sequence[Row]) -> list[str]:
    """Return the table of groups with enough users: the model and its lead over the rival; empty if no row has groups."""
    found = [row["slices"] for row in rows if row.get("slices")]
    body = []
    for title, groups in found[0].items() if found else ():
        for group, one in groups.items():
            same = [each[title][group] for each in found if group in each.get(title, {})]
            if one["users"] >= MIN_SLICE_USERS and all(RIVAL in each["ahead"] for each in same):
                value = _spread([each["value"] for each in same])
                body.append([title, group, f"{one['users']:,}", value, _ahead([{"ahead": each["ahead"][RIVAL]} for each in same])])
    if not body:
        return []
    return [
        "",
        f"By slice, those of at least {MIN_SLICE_USERS} users:",
        "",
        *_table(["", "", "users", "two-tower", f"ahead of {RIVAL}"], body),
    ]


def _claims_section(name: str, rows: Sequence[Row]) -> str:
    latest = {(row["claim"], row["against"]): row for row in rows}
    more = any(_more(row) for row in latest.values())
    header = ["what", "figure", "against", "ratio", *(["besides"] if more else []), "seed", "machine", "commit"]
    body = []
    for row in latest.values():
        against = f"{row['against']}: {row['against_figure']:g} {row['unit']}"
        figures = [f"{row['figure']:g} {row['unit']}", against, f"{row['ratio']:g}"]
        body.append([row["claim"], *figures, *([_more(row)] if more else []), str(row["seed"]), row["machine"], row["commit"]])
    return "\n".join([f"## Measured by `benchmarks/{name}.py`", "", *_table(header, body)])


def _more(row: Row) -> str:
    """Return the further values of a row as text."""
    told = {name: row[name] for name in BESIDES if name in row} | row.get("stages_ms", {}) | row.get("stages_s", {})
    return ", ".join(f"{name.replace('_', ' ')} {_told(value)}" for name, value in told.items())


def _told(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(f'{end:+.4f}' for end in value)}]".replace("-", "−")
    return f"{round(value) if isinstance(value, float) and value >= 1000 else value:,}"


def _columns(rows: Sequence[Row]) -> list[str]:
    """Return the metrics to show, by list length; recall is left out if it equals the hit rate (one target per query)."""
    names = {name for row in rows for name in row["metrics"] if name.partition("@")[0] in SHOWN}
    single = all(row["metrics"].get(n) == row["metrics"].get(n.replace("Recall", "HitRate")) for row in rows for n in names)
    kept = [name for name in names if not (single and name.startswith("Recall@"))]
    return sorted(kept, key=lambda name: (int(name.partition("@")[2]), SHOWN.index(name.partition("@")[0])))


def _ahead(rows: Sequence[Row]) -> str:
    """Return the mean lead of the model over the seeds, and the range of the seeds' 95 % intervals."""
    leads = [row["ahead"] for row in rows if row.get("ahead")]
    if not leads:
        return ""
    value = statistics.fmean(lead["value"] for lead in leads)
    low, high = min(lead["low"] for lead in leads), max(lead["high"] for lead in leads)
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]".replace("-", "−")


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = _figure(statistics.fmean(values))
    return f"{mean} ± {_figure(statistics.stdev(values))}" if len(values) > 1 else mean


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _refit(row: Row) -> bool:
    return bool(row.get("refit", False))


def _each(rows: Iterable[Row], key: str) -> str:
    return ", ".join(dict.fromkeys(str(row[key]) for row in rows))


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in settings.items())


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *body]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    sys.exit(main())
