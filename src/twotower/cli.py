"""The command line: parse, call one function, print. Heavy modules load inside the commands, so that `--help` is instant.

Exit codes: 0 done, 2 a mistake of the caller (one line on stderr), 1 a defect of ours (traceback).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from twotower.errors import TwoTowerError
from twotower.utils.config import load_config
from twotower.utils.console import setup_logging, speaks

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


def configured(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config and --set."""
    command = click.option("--set", "overrides", multiple=True, metavar="a.b=c", help="Override one setting; repeatable.")(command)
    return click.option("--config", "config_path", type=FILE, help="YAML file; without one the defaults hold.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="two-tower-rec", prog_name="twotower")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="No log lines.")
def app(debug: bool, quiet: bool) -> None:  # noqa: ARG001 - read by main()
    """Two-tower retrieval: from raw files to recommendations that were judged."""
    setup_logging(quiet=quiet)


@app.command()
@click.option("--users", type=int, default=3000, show_default=True, help="Number of users.")
@click.option("--businesses", type=int, default=1500, show_default=True, help="Number of businesses.")
@click.option("--events", type=int, default=60_000, show_default=True, help="Number of events.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the simulation.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the raw files.")
def simulate(users: int, businesses: int, events: int, seed: int, out: Path) -> None:
    """Write the raw Yelp files of a simulated town whose true preferences are known."""
    from twotower.pipeline.stages import simulate_stage

    counts = simulate_stage(out, users=users, businesses=businesses, events=events, seed=seed)
    click.echo(f"{out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


@app.command()
@click.option("--data-dir", "--data_dir", type=FOLDER, help="Folder of the raw files (data.path).")
@click.option("--output-dir", "--output_dir", type=FOLDER, required=True, help="Folder for the dataset.")
@click.option("--engine", type=click.Choice(["duckdb", "spark"]), help="What computes it (prepare.engine).")
@configured
def prepare(
    data_dir: Path | None, output_dir: Path, engine: str | None, config_path: Path | None, overrides: tuple[str, ...]
) -> None:
    """Raw files → a dataset: filtered, split, with features as they were known at the time."""
    from twotower.pipeline.stages import prepare_stage, summary

    extra = [f"data.path={json.dumps(str(data_dir))}"] if data_dir else []
    extra += [f"prepare.engine={engine}"] if engine else []
    click.echo(summary(prepare_stage(load_config(config_path, [*overrides, *extra]), output_dir), output_dir))


@app.command()
@click.option("--data", type=FOLDER, required=True, help="A dataset made by `twotower prepare`.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the run.")
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
@configured
def train(data: Path, out: Path, resume: bool, config_path: Path | None, overrides: tuple[str, ...]) -> None:
    """Train both towers; the best model by validation (without such a part, the last) is left in OUT, with its bundle."""
    from twotower.pipeline.stages import train_stage

    best = train_stage(load_config(config_path, list(overrides)), data, out, resume=resume)
    if speaks():
        reached = "no validation part" if best["value"] is None else f"best {best['metric']} {best['value']:.4f}"
        click.echo(f"{out}: {reached}; the model is that of step {best['step']}; bundle in {out / 'bundle'}")


@app.command()
@click.option("--data", type=FOLDER, help="A dataset made by `twotower prepare`; or give its sizes.")
@click.option("--users", type=click.IntRange(1), help="Number of users, instead of --data.")
@click.option("--items", type=click.IntRange(1), help="Number of items, instead of --data.")
@click.option("--events", type=click.IntRange(1), help="Number of events, instead of --data.")
@click.option(
    "--device", type=click.Choice(["cpu", "T4", "P100"]), default="cpu", show_default=True, help="Where training will run."
)
@click.option("--budget", type=click.FloatRange(0, min_open=True), metavar="GB", help="Instead of the device's memory.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Each with such a device.")
@configured
def plan(
    data: Path | None,
    users: int | None,
    items: int | None,
    events: int | None,
    device: str,
    budget: float | None,
    processes: int,
    config_path: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Say what training will take of memory, and the settings that fit."""
    from twotower.pipeline.stages import plan_stage

    if data is None and None in (users, items, events):
        raise click.UsageError("plan needs --data, or --users, --items and --events.")
    sizes = {"users": users or 0, "items": items or 0, "events": events or 0}
    config = load_config(config_path, list(overrides))
    click.echo(plan_stage(config, data or sizes, device=device, budget_gb=budget, processes=processes))


@app.command()
@click.argument("run", type=FOLDER)
@click.option(
    "--set", "overrides", multiple=True, metavar="evaluation.b=c", help="Override one setting of the evaluation; repeatable."
)
def evaluate(run: Path, overrides: tuple[str, ...]) -> None:
    """Judge a run on the test part against every baseline; write report.json and report.html into RUN."""
    from twotower.pipeline.stages import evaluate_stage, verdict

    click.echo(verdict(evaluate_stage(run, run, list(overrides)), run))


@app.command()
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder for the bundle.")
def export(run: Path, out: Path) -> None:
    """Write everything needed to answer into one folder, without any code in it."""
    from twotower.pipeline.stages import export_stage

    manifest = export_stage(run, out)
    click.echo(f"{out}: {len(manifest['hashes'])} files")


@app.command()
@click.option("--bundle", type=FOLDER, required=True, help="Folder of the bundle.")
@click.option("--user", help="A known user's id.")
@click.option(
    "--history", help="Item ids somebody visited, oldest first, separated by commas; with --user: after what the bundle knows."
)
@click.option("--all", "everybody", is_flag=True, help="Every user of the bundle, into --out; a run that was cut off goes on.")
@click.option("--out", type=FILE, help="With --all: a Parquet file of user_id, rank, item_id, score.")
@click.option("--k", type=click.IntRange(1, 10_000), default=10, show_default=True, help="Length of the list.")
@click.option(
    "--filter",
    "where",
    metavar="TEXT",
    help="""E.g. 'category == "Mexican" and price <= 2 and within(5)' (km from the user's places).""",
)
@click.option(
    "--near", type=(float, float), metavar="LAT LON", help="Where the request comes from; default: the middle of the history."
)
@click.option("--include-seen", is_flag=True, help="Recommend places of the history too.")
@click.option("--diversity", type=click.FloatRange(0, 1), default=0.0, help="Of the list, from 0 to 1.")
@click.option("--popularity", type=click.FloatRange(-1, 1), default=0.0, help="From -1, rarely visited, to 1, often visited.")
@click.option("--explain", is_flag=True, help="With --json: what moved each score.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def recommend(
    bundle: Path,
    user: str | None,
    history: str | None,
    everybody: bool,
    out: Path | None,
    include_seen: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """The best places for a known user, for whoever visited some places, or for everybody."""
    from twotower.pipeline.demo import as_table
    from twotower.pipeline.stages import recommend_all_stage
    from twotower.retrieval.recommender import Recommender
    from twotower.retrieval.request import Request

    if everybody != (out is not None) or (everybody and (user or history or as_json or asked["explain"])):
        raise click.UsageError("--all goes with --out FILE, and with neither --user, --history, --json nor --explain.")
    if out is not None:
        users = recommend_all_stage(bundle, out, Request(exclude_seen=not include_seen, **asked))
        click.echo(f"{out}: {users:,} users")
        return
    ids = None if history is None else [part.strip() for part in history.split(",") if part.strip()]
    found = Recommender.load(bundle).recommend(user=user, history=ids, exclude_seen=not include_seen, **asked)
    if not as_json:
        click.echo(as_table(found))
        return
    for place in found:
        said = asdict(place)
        if not asked["explain"]:
            del said["reasons"]
        click.echo(json.dumps(said, ensure_ascii=False))


@app.command()
@click.argument("bundle", type=FOLDER)
@click.option("--items", type=FILE, required=True, help="JSON lines, CSV or Parquet with columns of the catalogue.")
def add_items(bundle: Path, items: Path) -> None:
    """Put new items into a bundle by their features alone, without training."""
    from twotower.bundle import revision

    manifest = revision.add_items(bundle, items)
    click.echo(f"{bundle}: revision {manifest['revision']}")


@app.command()
@click.argument("bundle", type=FOLDER)
@click.option("--ids", required=True, help="Item ids, separated by commas.")
def remove_items(bundle: Path, ids: str) -> None:
    """Take items out of what a bundle offers; in histories they still count."""
    from twotower.bundle import revision

    manifest = revision.remove_items(bundle, [part.strip() for part in ids.split(",") if part.strip()])
    click.echo(f"{bundle}: revision {manifest['revision']}")


@app.command("tune-index")
@click.argument("bundle", type=FOLDER)
@click.option("--recall", type=click.FloatRange(0, 1, min_open=True), default=0.99, show_default=True, help="Least recall.")
@click.option("--k", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Length of the lists it is measured on.")
@click.option("--kinds", metavar="A,B", help="Indexes to try, of exact, int8, sq, hnsw, ivf_pq; default: all.")
@click.option("--plot", type=FILE, help="Picture of what was measured; default: BUNDLE-index.svg.")
def tune_index(bundle: Path, recall: float, k: int, kinds: str | None, plot: Path | None) -> None:
    """Measure indexes on a bundle's own vectors and users, and build the cheapest that finds enough into it."""
    from twotower.pipeline.stages import tune_index_stage

    chosen = [kind.strip() for kind in kinds.split(",")] if kinds else []
    picture = plot or bundle.with_name(f"{bundle.name}-index.svg")
    best = tune_index_stage(bundle, recall=recall, k=k, kinds=chosen, plot=picture, say=click.echo)
    click.echo(f"{bundle}: {best.kind} {best.settings}; recall {best.recall:.4f}, {best.p50_ms:.3f} ms; picture in {picture}")


@app.command()
@click.option("--out", type=FOLDER, required=True, help="Folder for the dataset, the model, the bundle and the report.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
@configured
def run(out: Path, resume: bool, config_path: Path | None, overrides: tuple[str, ...]) -> None:
    """The whole way in one process: prepare, train, evaluate, export."""
    from twotower.pipeline.stages import run_all, verdict

    click.echo(verdict(run_all(load_config(config_path, list(overrides)), out, resume=resume), out))


@app.command()
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder for the new dataset, model, bundle and report.")
@click.option("--everything", is_flag=True, help="Learn from the test part too: a model to serve, that nothing is left to judge.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
def refit(run: Path, out: Path, everything: bool, resume: bool) -> None:
    """Train a run anew on its validation part too, for as long as its best took."""
    from twotower.pipeline.refit import refit as refit_run
    from twotower.pipeline.stages import verdict

    click.echo(verdict(refit_run(run, out, everything=everything, resume=resume), out))


@app.command()
@click.option("--out", type=FOLDER, default=Path("runs/town"), show_default=True, help="Folder for everything.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the simulation.")
def demo(out: Path, seed: int) -> None:
    """Simulate a town, walk the whole way, and recommend."""
    from twotower.pipeline.demo import demo as run_demo

    run_demo(out, seed=seed, say=click.echo)


@app.command()
@click.option("--data", type=FOLDER, help="Folder of the raw files; without one the usual places are looked into.")
def doctor(data: Path | None) -> None:
    """Say whether this machine can do the work, and what to do where it cannot."""
    from twotower.pipeline.machine_check import diagnose, gather, refuse

    findings = diagnose(gather(data))
    for finding in findings:
        click.echo(str(finding))
    refuse(findings)


@app.command()
@click.argument("bundle", type=FOLDER)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="Port to listen on; 0 for a free one."
)
@click.option("--events", metavar="URL", help="Where accepted events go: sqlite:PATH (default: beside BUNDLE), or redis://…")
@click.option("--api-key-file", type=FILE, help="File with the key of the routes that write; default: $TWOTOWER_API_KEY.")
@click.option("--tls-cert", type=FILE, help="PEM file; with --tls-key the server speaks HTTPS.")
@click.option("--tls-key", type=FILE, help="PEM file of the private key.")
@click.option("--rate", type=click.FloatRange(0), default=100, show_default=True, help="Requests a second for each client; 0: any.")
def serve(rate: float, **options: Any) -> None:
    """Answer over HTTP, with a page to look at it; see docs/serving.md."""
    from twotower.serving.limits import Limits
    from twotower.serving.server import Options
    from twotower.serving.server import serve as run_server

    run_server(Options(**options, limits=Limits(rate=rate, burst=max(2 * rate, 1))))


@app.command("config")
@click.option("--show", "action", flag_value="show", help="Print the effective settings as YAML.")
@click.option("--schema", "action", flag_value="schema", help="Print the JSON schema of the settings, for editors.")
@configured
def show_config(action: str | None, config_path: Path | None, overrides: tuple[str, ...]) -> None:
    """Print the settings that a command would use, or their JSON schema."""
    from twotower.utils.settings_reference import settings_schema, settings_yaml

    if action is None:
        raise click.UsageError("config needs --show or --schema.")
    if action == "schema":
        click.echo(json.dumps(settings_schema(), indent=2, ensure_ascii=False))
    else:
        click.echo(settings_yaml(load_config(config_path, list(overrides))), nl=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app.main(given, prog_name="twotower", standalone_mode=False)
    except (TwoTowerError, click.ClickException) as error:
        if "--debug" in given:
            raise
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"twotower: error: {' '.join(text.split())}", err=True)
        return 2
    except OSError as error:
        if "--debug" in given or error.filename is None:
            raise
        click.echo(
            f"twotower: error: A path must be usable. {error.filename}: {error.strerror}. Check it and its rights.", err=True
        )
        return 2
    except click.exceptions.Abort:
        click.echo("twotower: interrupted; the last checkpoint stands.", err=True)
        return 130
    except click.exceptions.Exit as stop:
        return stop.exit_code
    return 0
