"""Define the commands `demo`, `doctor` and `config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower.commands.options import FOLDER, configured, keep_existing, overwriting, say_next
from twotower.utils.run_parts import OF_A_RUN

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
    keep_existing(out, ("raw", *OF_A_RUN), overwrite=overwrite)
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


@click.command("config", short_help="Print the settings, or the JSON schema of a file.")
@click.option("--show", is_flag=True, help="Print the effective settings as YAML.")
@click.option(
    "--schema",
    is_flag=False,
    flag_value="settings",
    type=click.Choice(["settings", "dataset", "run", "bundle", "report"]),
    help="Print the JSON schema of the settings, of a manifest, or of report.json. Without a value: of the settings.",
)
@configured
def show_config(show: bool, schema: str | None, config: Config) -> None:
    """Print the settings that a command would use, or the JSON schema of a file.

    \b
    Example:
      twotower config --show --config configs/yelp.yaml
      twotower config --schema > twotower.schema.json
      twotower config --schema report
    """
    from twotower.utils.manifests import document_schema
    from twotower.utils.settings_reference import settings_schema, settings_yaml

    if show == (schema is not None):
        raise click.UsageError("Give either --show or --schema.")
    if schema is None:
        click.echo(settings_yaml(config), nl=False)
    else:
        printed = settings_schema() if schema == "settings" else document_schema(schema)
        click.echo(json.dumps(printed, indent=2, ensure_ascii=False))
