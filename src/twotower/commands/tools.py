"""Commands around the journey."""

from __future__ import annotations

from pathlib import Path

import click

from twotower.commands.options import FOLDER, RUN_PARTS, keep_existing, overwriting, say_next


@click.command(short_help="Walk the whole way on a simulated town.")
@click.option("--out", type=FOLDER, default=Path("runs/town"), show_default=True, help="Folder for everything.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the town and of the training.")
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


@click.command(short_help="Check whether this machine can do the work.")
@click.option("--data", type=FOLDER, help="Folder of the raw files. Default: the usual places.")
def doctor(data: Path | None) -> None:
    """Check whether this machine can do the work, and say what to do where it cannot.

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
