"""Define the commands that train and evaluate."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from twotower.commands.feedback import check_address
from twotower.commands.options import (
    ANY_PATH,
    FOLDER,
    FloatRange,
    a_user,
    configured,
    inside,
    keep_existing,
    overwriting,
    reading,
    resuming,
    say_next,
)
from twotower.errors import ResponseError, TwoTowerError, UnreachableError, require
from twotower.utils.run_parts import OF_A_RUN, PRECIOUS

if TYPE_CHECKING:
    from twotower.client import Client
    from twotower.utils.config import Config

RELOAD_TIMEOUT_S = 300.0


@click.command(short_help="Estimate memory and time of training.")
@click.option("--data", type=FOLDER, help="Dataset made by `twotower prepare`.")
@click.option("--users", type=click.IntRange(1), help="Number of users, instead of --data.")
@click.option("--items", type=click.IntRange(1), help="Number of items, instead of --data.")
@click.option("--events", type=click.IntRange(1), help="Number of events, instead of --data.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "T4", "P100", "L4", "H100", "H200"]),
    default="cpu",
    show_default=True,
    help="Device that trains.",
)
@click.option("--budget", type=FloatRange(0, min_open=True), metavar="GB", help="Memory to stay below. Default: the device's.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Number of processes, each with a device.")
@configured
def plan(
    data: Path | None,
    users: int | None,
    items: int | None,
    events: int | None,
    device: str,
    budget: float | None,
    processes: int,
    config: Config,
) -> None:
    """Estimate the memory that training takes, part by part, and find settings that fit. Predict its time.

    The time is predicted for this CPU, for GPUs, and for a session of Kaggle.

    \b
    Example:
      twotower plan --data data/processed --device T4
      twotower plan --users 2000000 --items 150000 --events 7000000
    """
    from twotower.pipeline.stages import plan_stage

    if data is None and None in (users, items, events):
        raise click.UsageError("The size of the data is missing. Give --data, or --users, --items and --events.")
    sizes = {"users": users or 0, "items": items or 0, "events": events or 0}
    source = inside(data, "dataset") if data else sizes
    click.echo(plan_stage(config, source, device=device, budget_gb=budget, processes=processes))
    if data:
        say_next("train", "--data", inside(data, "dataset"), "--out", Path("runs") / data.resolve().name)
    else:
        say_next("prepare", "--help")


@click.command(short_help="Train a model on a dataset.")
@click.option("--data", type=FOLDER, required=True, help="Dataset made by `twotower prepare`.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the run: checkpoints, metrics and the bundle.")
@resuming
@overwriting
@configured
def train(data: Path, out: Path, resume: bool, overwrite: bool, config: Config) -> None:
    """Train both towers, and write the best model by validation with its bundle.

    Without a validation part the last model is written.

    \b
    Example:
      twotower train --data data/processed --out runs/yelp
    """
    keep_existing(out, PRECIOUS, overwrite=overwrite, resume=resume)
    from twotower.pipeline.stages import train_stage
    from twotower.utils.console import is_first_process

    best = train_stage(config, inside(data, "dataset"), out, resume=resume)
    if is_first_process():
        reached = "no validation part" if best.value is None else f"best {best.metric} {best.value:.4f}"
        click.echo(f"{out}: {reached}; the saved model is from step {best.step}; bundle in {out / 'bundle'}")
    say_next("evaluate", out)


@click.command(short_help="Prepare, train, evaluate and export in one process.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the dataset, the model, the bundle and the report.")
@resuming
@overwriting
@reading
def run(out: Path, resume: bool, overwrite: bool, config: Config) -> None:
    """Prepare, train, evaluate and export in one process.

    \b
    Example:
      twotower run --data orders.csv --data products.csv --out runs/shop
      twotower run --config configs/yelp.yaml --out runs/yelp
    """
    keep_existing(out, OF_A_RUN, overwrite=overwrite, resume=resume)
    from twotower.pipeline.stages import run_all, verdict

    click.echo(verdict(run_all(config, out, resume=resume), out))
    say_next("recommend", out / "bundle", f"--user={a_user(out / 'dataset')}")


@click.command(short_help="Train a run on new events; publish it if it is not worse.")
@click.argument("run", type=FOLDER)
@click.option("--data", multiple=True, type=ANY_PATH, help="New events: files or a folder like those of the run.")
@click.option("--events", metavar="STORE", help="Event store of a server, instead of --data: sqlite:PATH or redis://….")
@click.option("--out", type=FOLDER, help="Folder for the new dataset, model and bundle. Default: RUN, which is exchanged at once.")
@click.option(
    "--set", "overrides", multiple=True, metavar="updating.A=VALUE", help="Override one setting of the update. Can be repeated."
)
@click.option("--reload", "server", metavar="URL", help="Address of a server that then loads the bundle. Key: TWOTOWER_API_KEY.")
@click.option("--every", type=FloatRange(0, min_open=True), metavar="HOURS", help="Update again every HOURS. Stop with Ctrl+C.")
def update(
    run: Path,
    data: tuple[Path, ...],
    events: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    server: str | None,
    every: float | None,
) -> None:
    """Go on with the training of a run on new events.

    New users, items and values are added. The new model is compared with the one before on the
    newest events, and published if it is not worse. A command that was killed goes on when it is
    given again. With --every, an update that fails is reported, and the next one begins on time.

    \b
    Example:
      twotower update runs/shop --data orders-monday.csv
      twotower update runs/shop --events redis://localhost:6379/0 --every 24
    """
    if events is not None and not os.path.isfile(events):  # the name of an export may have any character
        check_address(events)
    if bool(data) == (events is not None):
        raise click.UsageError("An update needs the new events: give either --data or --events.")
    if every is not None and out is not None:
        raise click.UsageError("--every updates RUN itself again and again. Leave out --out.")
    client = None if server is None else _client(server)

    def once() -> None:
        bundle = _update_once(run, data, events, out, overrides)
        if client is not None:
            _reload(client, bundle)

    if every is None:
        once()
        return
    with _interruption() as interrupted:
        while not interrupted:
            began = time.monotonic()
            try:
                once()
            except TwoTowerError as error:
                click.echo(f"twotower: error: {error}", err=True)
            if not interrupted:
                time.sleep(max(0.0, began + every * 3600 - time.monotonic()))
    raise click.Abort


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """Yield a list that Ctrl-C makes longer: a `KeyboardInterrupt` alone can get lost in a library that calls Python."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def _update_once(run: Path, data: tuple[Path, ...], events: str | None, out: Path | None, overrides: tuple[str, ...]) -> Path:
    """Update a run into `out` (None: the run itself), tell what changed, and return the folder of the newest bundle."""
    from twotower.utils.config import load_config

    load_config(None, list(overrides))  # reports a mistyped setting before PyTorch loads
    from twotower.pipeline.new_data import source_of_files, source_of_store
    from twotower.pipeline.run_folder import root_of, run_dataset
    from twotower.pipeline.update import update as update_run
    from twotower.pipeline.update_verdict import in_words
    from twotower.utils.run_parts import REPORT_BEFORE

    run = root_of(run)
    out = out or run
    base = run_dataset(inside(run, "model"))
    source = source_of_files(data, base) if events is None else source_of_store(events, base)
    record = update_run(run, source, out, overrides=overrides)
    if record is None:
        click.echo(f"There are no new events for {run}. Nothing was changed.")
        return run / "bundle"
    click.echo(f"{in_words(record)}\nBundle: {out / 'bundle'}")
    if (report := out / REPORT_BEFORE / "report.html").is_file():
        click.echo(f"Report: {report}, of the model before it was updated. An updated run has no test part to evaluate.")
    say_next("recommend", out / "bundle", f"--user={a_user(out / 'dataset')}")
    return out / "bundle"


def _client(server: str) -> Client:
    """Return a client of a server; an invalid address is an error before the update begins."""
    require("client", "urllib3")
    from twotower.client import Client

    return Client(server, timeout_s=RELOAD_TIMEOUT_S, retries=0)


def _reload(client: Client, bundle: Path) -> None:
    """Let a server load a bundle, and tell its version."""
    try:
        version = client.reload_bundle(str(bundle.resolve()))["version"]
    except (ResponseError, UnreachableError) as error:
        unauthorized = isinstance(error, ResponseError) and error.status == 401
        reason = "Set TWOTOWER_API_KEY to a key of the server with the role admin." if unauthorized else str(error)
        raise TwoTowerError(f"{bundle} is ready, but no server loaded it. {reason} Then repeat the command.") from None
    click.echo(f"Serving: version {version}")


@click.command(short_help="Train a run again on the validation part too.")
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder for the new dataset, model, bundle and report.")
@click.option("--include-test", is_flag=True, help="Train on the test part too. Then nothing is left to evaluate on.")
@resuming
@overwriting
def refit(run: Path, out: Path, include_test: bool, resume: bool, overwrite: bool) -> None:
    """Train a run again with the validation part, for the number of steps of its best checkpoint.

    RUN is a folder of `twotower run` or `twotower train`.

    \b
    Example:
      twotower refit runs/yelp --out runs/yelp-served --include-test
    """
    keep_existing(out, OF_A_RUN, overwrite=overwrite, resume=resume)
    from twotower.pipeline.refit import refit as refit_run
    from twotower.pipeline.stages import verdict

    click.echo(verdict(refit_run(inside(run, "model"), out, include_test=include_test, resume=resume), out))
    say_next("recommend", out / "bundle", f"--user={a_user(out / 'dataset')}")


@click.command(short_help="Search for settings that beat the default recipe.")
@click.option("--data", type=FOLDER, required=True, help="Dataset made by `twotower prepare`, with a validation part.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the study. An existing one is continued.")
@click.option("--hours", type=float, required=True, help="Time of the search. A running training is stopped, and can go on.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Number of trainings at the same time.")
@click.option("--trials", type=click.IntRange(1), help="Stop earlier, at this number of trials in the study.")
@configured
def tune(data: Path, out: Path, hours: float, processes: int, trials: int | None, config: Config) -> None:
    """Search for settings that beat the default recipe on the validation part.

    Settings in --config and --set stay as they are. The command writes best.yaml into --out, or
    says that no trial beats the default. Repeat it to continue the search.

    \b
    Example:
      twotower tune --data runs/shop/dataset --hours 2 --out runs/tuned
      twotower run --config runs/tuned/best.yaml --out runs/better
    """
    require("tune", "optuna")
    from twotower.pipeline.tune import tune_stage

    result = tune_stage(config, inside(data, "dataset"), out, hours=hours, processes=processes, most_trials=trials)
    click.echo(f"{result.table()}\n{result.verdict()}")
    if result.beats:
        say_next("run", "--config", out / "best.yaml", "--out", out / "run")


@click.command(short_help="Evaluate a run against the baselines.")
@click.argument("run", type=FOLDER)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="evaluation.A=VALUE",
    help="Override one setting of the evaluation. Can be repeated.",
)
def evaluate(run: Path, overrides: tuple[str, ...]) -> None:
    """Evaluate a run on the test part against every baseline.

    RUN is a folder of `twotower run` or `twotower train`. The command writes report.json and
    report.html into RUN, and replaces those of an earlier evaluation.

    \b
    Example:
      twotower evaluate runs/yelp
    """
    from twotower.utils.config import load_config

    load_config(None, list(overrides))  # reports a mistyped setting before PyTorch loads
    from twotower.bundle.sealed_folder import bundle_in
    from twotower.pipeline.evaluate import evaluate_stage
    from twotower.pipeline.run_folder import run_dataset
    from twotower.pipeline.stages import verdict

    model = inside(run, "model")
    click.echo(verdict(evaluate_stage(model, run, list(overrides)), run))
    say_next("recommend", bundle_in(run), f"--user={a_user(run_dataset(model).path)}")
