"""Run everything at Yelp's full size with the default settings: raw files to bundle and report, by stage, beside tuned iALS.

    twotower simulate --users 2000000 --businesses 150000 --events 7000000 --out RAW
    python benchmarks/full_run.py RAW OUT

`twotower run` writes OUT; a finished OUT is only read. The seconds of a stage are those between the files that it writes. The curve
of the model has the seconds of its training steps, from their logged speed, iALS's factors included and validations left out. iALS
has the settings that the report chose on the validation part, and is fitted again for each number of iterations. Prints a JSON line
for each claim, appended to benchmarks/results/full_run.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, Row, claim, in_words, tell
from quality_over_time import METRIC, Curve, factorised

from twotower.data.dataset import Dataset
from twotower.evaluation.report import read_report
from twotower.pipeline.run_folder import run_manifest
from twotower.trainers.run_files import read_rows
from twotower.utils.console import setup_logging

LIMIT_MINUTES, LIMIT_GIB = 120, 16
MODEL, USAGE = "two-tower", "full_run.json"
BUNDLE_ENDS = "bundle/towers/item.onnx"  # of an export; the manifest is written again when the report is noted in it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--results", type=Path, default=RESULTS / "full_run.jsonl")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    if not (given.out / USAGE).is_file():
        code = run(given.raw, given.out, given.overrides)
        if code:
            return code
    rows = [*costs(given.out), *qualities(given.out), *curves(given.out)]
    for row in rows:
        tell(row, given.results)
        sys.stderr.write(in_words(row))
    return 0


def run(raw: Path, out: Path, overrides: Sequence[str]) -> int:
    """Run the command, note its time and its peak memory in OUT, and return its exit code."""
    began = time.time()
    command = [sys.executable, "-m", "twotower", "run", "--data-dir", str(raw), "--out", str(out)]
    command += [word for override in overrides for word in ("--set", override)]
    code = subprocess.run(command, check=False).returncode
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    if not code:
        (out / USAGE).write_text(json.dumps({"began": began, "ended": time.time(), "peak_bytes": peak}) + "\n", encoding="utf-8")
    return code


def costs(out: Path) -> list[Row]:
    """Return the time of every stage, the time in all, and the memory."""
    usage = json.loads((out / USAGE).read_text(encoding="utf-8"))
    race = json.loads((out / "model" / "recipe.json").read_text(encoding="utf-8"))
    ends = {
        "prepare, with text": out / "dataset" / "manifest.json",
        "training, the recipe race included": out / "model" / "last.pt",
        "calibration": out / "model" / "manifest.json",
        "export of the bundle": out / BUNDLE_ENDS,
        "evaluation, tuning of the baselines included": out / "report.json",
    }
    began, rows = usage["began"], []
    total = usage["ended"] - began
    for stage, file in ends.items():
        ended = file.stat().st_mtime
        rows.append(claim(f"full size: {stage}", (ended - began) / 60, "minutes", "all stages", total / 60, 0))
        began = ended
    rows.append(claim("full size: the recipe race alone", race["seconds"] / 60, "minutes", "all stages", total / 60, 0))
    rows.append(claim("full size: raw files to report", total / 60, "minutes", "limit", LIMIT_MINUTES, 0, chosen=race["chosen"]))
    served = (out / BUNDLE_ENDS).stat().st_mtime - usage["began"]
    rows.append(claim("full size: raw files to bundle", served / 60, "minutes", "limit", LIMIT_MINUTES, 0))
    without = total - read_report(out / "report.json").seconds["oracle"]  # which only simulated data have
    rows.append(claim("full size: raw files to report, without the oracle", without / 60, "minutes", "limit", LIMIT_MINUTES, 0))
    rows.append(claim("full size: peak memory", usage["peak_bytes"] / 2**30, "GiB", "limit", LIMIT_GIB, 0))
    return rows


def qualities(out: Path) -> list[Row]:
    """Return the test metric of every system beside the model's."""
    report = read_report(out / "report.json")
    own = report.systems[MODEL][METRIC].value
    rows = []
    for name, figures in report.systems.items():
        more: dict[str, Any] = {"low": figures[METRIC].low, "high": figures[METRIC].high, "settings": report.settings[name]}
        if name in report.differences:
            gap = report.differences[name][METRIC]
            more |= {"model_ahead_low": gap.low, "model_ahead_high": gap.high}
        title = f"full size: test {METRIC} of {name}"
        rows.append(claim(title, figures[METRIC].value, "", MODEL, own, 0, **more))
    return rows


def curves(out: Path) -> list[Row]:
    """Return the validation metric over the seconds of training, of the model and of iALS."""
    dataset, config = Dataset.open(out / "dataset"), run_manifest(out / "model").config
    settings = read_report(out / "report.json").settings["ials"]
    factors = factorised(dataset, config, settings)
    rows = []
    for name, curve in {"iALS": factors, MODEL: trained(out, config.training.batch_size)}.items():
        for seconds, value in curve:
            title = f"full size: validation {METRIC} of {name} after {seconds:.3g} s"
            rows.append(claim(title, value, "", f"iALS after {factors[-1][0]:.0f} s", factors[-1][1], 0, seconds=round(seconds)))
    return rows


def trained(out: Path, batch_size: int) -> Curve:
    """Return the curve of the model from the log of its run."""
    curve, seconds, before = [], 0.0, 0
    for row in read_rows(out / "model" / "metrics.jsonl"):
        if row.get("examples_per_s"):
            seconds += (row["step"] - before) * batch_size / row["examples_per_s"]
            before = row["step"]
        elif METRIC in row:
            curve.append((seconds, row[METRIC]))
    return curve


if __name__ == "__main__":
    sys.exit(main())
