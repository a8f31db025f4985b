"""Define the command `inspect`."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from twotower.commands.options import ANY_PATH, FileNamed, keep_file, overwriting, roles, say_next


@click.command(short_help="Show what files hold, and a configuration to begin with.")
@click.argument("paths", nargs=-1, required=True, type=ANY_PATH, metavar="FILE...")
@roles
@click.option("--out", type=FileNamed(".yaml", ".yml"), help="YAML file for the configuration. Default: it is printed.")
@overwriting
def inspect(paths: tuple[Path, ...], named: dict[str, str], out: Path | None, overwrite: bool) -> None:
    """Show what files hold: their columns with roles and kinds, the rows that can be read, and a configuration.

    FILE is a table of interactions, items or users, or a folder of such files.

    \b
    Example:
      twotower inspect orders.csv products.csv --out shop.yaml
    """
    if out:
        keep_file(out, overwrite=overwrite)
    from twotower.data.sources.guess_text import as_yaml, describe
    from twotower.errors import DataError
    from twotower.pipeline.raw_data import account, find_raw_data, role_options
    from twotower.utils.atomic_files import atomic_file
    from twotower.utils.config import parse_config

    raw = find_raw_data(paths, named)
    if raw.guess:
        click.echo(describe(raw.guess) + "\n")
    if raw.guess and raw.guess.questions:
        for question in raw.guess.questions[1:]:
            click.echo(f"Open: {question}")
        raise DataError(raw.guess.questions[0])
    for line in account(parse_config(raw.settings)):
        click.echo("\n".join(part.rstrip() for part in textwrap.wrap(line, 80, subsequent_indent="    ", drop_whitespace=False)))
    config = as_yaml(raw.settings, raw.guess)
    if out:
        with atomic_file(out) as beside:
            beside.write_text(config, encoding="utf-8")
        click.echo(f"\nConfiguration: {out}")
        say_next("run", "--config", out, "--out", Path("runs") / out.stem)
    else:
        click.echo(f"\n{config}", nl=False)
        files = [word for path in paths for word in ("--data", str(path))]
        chosen = [word for option in role_options(named) for word in option]
        say_next("run", *files, *chosen, "--out", Path("runs") / paths[0].resolve().name.partition(".")[0])
