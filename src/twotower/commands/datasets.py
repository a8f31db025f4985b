"""Define the commands `datasets`: datasets that are known by name."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from twotower.commands.options import FOLDER, keep_existing, overwriting, say_next

WIDTH = 80


@click.group(invoke_without_command=True, short_help="List and download datasets that are known by name.")
@click.pass_context
def datasets(context: click.Context) -> None:
    """List the datasets that are known by name: rows, size, licence, address, and what is special.

    \b
    Example:
      twotower datasets
      twotower datasets get movielens-1m
      twotower run --data movielens-1m --out runs/movielens-1m
    """
    if context.invoked_subcommand:
        return
    from twotower.data.named_datasets import named_dataset, names

    for name in names():
        known = named_dataset(name)
        click.echo(name)
        for line in (f"{known.title}. {known.rows}; {known.size}", f"licence: {known.licence}", known.address, known.special):
            click.echo(
                textwrap.fill(
                    line, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
                )
            )
    say_next("datasets", "get", "movielens-1m")


@datasets.command(short_help="Download a dataset.")
@click.argument("name")
@click.option("--out", type=FOLDER, help="Folder for the files. Default: where its configuration expects them, data/NAME.")
@click.option("--category", help="Category of products or books. Default: the one that `twotower datasets` shows.")
@overwriting
def get(name: str, out: Path | None, category: str | None, overwrite: bool) -> None:
    """Download a dataset, check its checksum and unpack it. The folder appears whole or not at all.

    \b
    Example:
      twotower datasets get movielens-1m
      twotower datasets get amazon-2014 --category Toys_and_Games
    """
    from twotower.data.named_datasets import download, named_dataset

    known = named_dataset(name)
    target = out or known.path
    keep_existing(target, (), overwrite=overwrite)
    for file, digest in download(known, target, category=category, say=lambda line: click.echo(line, err=True)).items():
        click.echo(f"{file}: {digest}")
    click.echo(f"{target}: {known.title}. Licence: {known.licence}")
    elsewhere = [] if target == known.path else ["--set", f"data.path={target}"]
    say_next("run", "--data", name, *elsewhere, "--out", Path("runs") / name)


@datasets.command(short_help="Print the configuration of a dataset.")
@click.argument("name")
def config(name: str) -> None:
    """Print the configuration that reads a dataset, to be changed and used with --config.

    \b
    Example:
      twotower datasets config movielens-1m > movielens.yaml
    """
    import yaml

    from twotower.data.named_datasets import named_dataset

    settings = named_dataset(name).settings
    click.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100), nl=False)
    say_next("run", "--data", name, "--out", Path("runs") / name)
