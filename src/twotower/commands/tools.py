"""Define the commands `demo`, `doctor` and `config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower.commands.options import FOLDER, RUN_PARTS, configured, keep_existing, overwriting, say_next

if TYPE_CHECKING:
    from twotower.utils.config import Config


@click.command(short_help="Run all steps on a simulated town.")
@click.option("--out", type=FOLDER, default=Path("runs/town"), show_default=True, help="Folder for all output.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the simulation and of the training.")
@overwriting
def demo(out: Path, seed: int, overwrite: bool) -> None:
    """Simulate a town, prepare, train, evaluate, export and recommend.

    \b
    Example:
      twotower demo --out runs/town
    """
    keep_existing(out, ("raw", *RUN_PARTS), overwrite=overwrite)
    from twotower.pipeline.demo import demo as run_demo

    run_demo(out, seed=seed, say=click.echo)
    say_next("serve", out / "bundle")


@click.command(short_help="Check whether this machine can train and serve.")
@click.option("--data", type=FOLDER, help="Folder of the raw files. Default: the usual folders.")
def doctor(data: Path | None) -> None:
    """Check whether this machine can train and serve, and show how to fix problems.

    \b
    Example:
      twotower doctor
    """
    from twotower.pipeline.machine_check import diagnose, gather, refuse

    findings = diagnose(gather(data))
    for finding in findings:
        click.echo(str(finding))
    refuse(findings)
    if data:
        say_next("prepare", "--data-dir", data, "--output-dir", "data/processed")
    else:
        say_next("demo")


@click.command("config", short_help="Print the settings, or their JSON schema.")
@click.option("--show", "action", flag_value="show", help="Print the effective settings as YAML.")
@click.option("--schema", "action", flag_value="schema", help="Print the JSON schema of the settings, for editors.")
@configured
def show_config(action: str | None, config: Config) -> None:
    """Print the settings that a command would use, or their JSON schema.

    \b
    Example:
      twotower config --show --config configs/yelp.yaml
      twotower config --schema > twotower.schema.json
    """
    from twotower.utils.settings_reference import settings_schema, settings_yaml

    if action is None:
        raise click.UsageError("What to print is missing. Give --show or --schema.")
    if action == "schema":
        click.echo(json.dumps(settings_schema(), indent=2, ensure_ascii=False))
    else:
        click.echo(settings_yaml(config), nl=False)
