"""Define the commands that create data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower.commands.options import FOLDER, keep_existing, overwriting, reading, say_next

if TYPE_CHECKING:
    from twotower.utils.config import Config


@click.command(short_help="Write the raw files of a simulated town.")
@click.option("--users", type=int, default=3000, show_default=True, help="Number of users.")
@click.option("--businesses", type=int, default=1500, show_default=True, help="Number of businesses, the items.")
@click.option("--events", type=int, default=60_000, show_default=True, help="Number of reviews and tips.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed: the same seed writes the same files.")
@click.option("--impressions", is_flag=True, help="Also write the lists that were shown to users.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the raw files.")
@overwriting
def simulate(users: int, businesses: int, events: int, seed: int, impressions: bool, out: Path, overwrite: bool) -> None:
    """Write the raw Yelp files of a simulated town, whose true preferences are known.

    \b
    Example:
      twotower simulate --out data/town
    """
    keep_existing(out, (), overwrite=overwrite)
    from twotower.pipeline.stages import simulate_stage

    counts = simulate_stage(out, users=users, businesses=businesses, events=events, seed=seed, impressions=impressions)
    click.echo(f"{out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    say_next("prepare", "--data-dir", out, "--output-dir", out.with_name(f"{out.name}-dataset"))


@click.command(short_help="Turn raw files into a dataset.")
@click.option("--output-dir", "--output_dir", "--out", type=FOLDER, required=True, help="Folder for the dataset.")
@click.option("--engine", type=click.Choice(["duckdb", "spark"]), help="Engine that computes it. Default: prepare.engine.")
@overwriting
@reading
def prepare(output_dir: Path, engine: str | None, overwrite: bool, config: Config) -> None:
    """Turn raw files into a dataset: filtered, split, with point-in-time features.

    \b
    Example:
      twotower prepare --data-dir data/raw --output-dir data/processed
      twotower prepare --data orders.csv --output-dir data/shop
    """
    keep_existing(output_dir, ("manifest.json",), overwrite=overwrite)
    from twotower.pipeline.stages import prepare_stage, summary

    if engine:
        config = config.model_copy(update={"prepare": config.prepare.model_copy(update={"engine": engine})})
    click.echo(summary(prepare_stage(config, output_dir), output_dir))
    say_next("train", "--data", output_dir, "--out", Path("runs") / output_dir.resolve().name)
