"""Define the command `inspect`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower.commands.options import FILE, keep_file, overwriting, roles, say_next

if TYPE_CHECKING:
    from twotower.pipeline.raw_data import Account


@click.command(short_help="Show what files hold, and a configuration to begin with.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@roles
@click.option("--out", type=FILE, help="File for the configuration. Default: it is printed.")
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
    from twotower.pipeline.raw_data import account, find_raw_data
    from twotower.utils.atomic_files import atomic_file
    from twotower.utils.config import parse_config

    raw = find_raw_data(paths, named)
    if raw.guess:
        click.echo(describe(raw.guess) + "\n")
    if raw.guess and raw.guess.questions:
        for question in raw.guess.questions[1:]:
            click.echo(f"Open: {question}")
        raise DataError(raw.guess.questions[0])
    click.echo(_as_text(account(parse_config(raw.settings))))
    config = as_yaml(raw.settings, raw.guess)
    if out:
        with atomic_file(out) as beside:
            beside.write_text(config, encoding="utf-8")
        click.echo(f"\nConfiguration: {out}")
        say_next("run", "--config", out, "--out", Path("runs") / out.stem)
    else:
        click.echo(f"\n{config}", nl=False)
        files = [word for path in paths for word in ("--data", str(path))]
        chosen = [word for role, column in named.items() for word in (f"--{role}", column)]
        say_next("run", *files, *chosen, "--out", Path("runs") / paths[0].resolve().name.partition(".")[0])


def _as_text(found: Account) -> str:
    """Return the account in lines of at most 80 columns."""
    from twotower.data.sources.guess_text import cut

    lines = [f"{'file':30}{'rows':>14}{'rejected':>12}{'left out':>12}"]
    for file, rows in found.read.items():
        lost = [found.rejected[file], found.left_out[file]]
        lines.append(f"{cut(file, 29):30}{rows:14,}" + "".join(f"{sum(reasons.values()):12,}" for reasons in lost))
        for what, reasons in zip(("rejected", "left out"), lost, strict=True):
            lines += [cut(f"  {count:,} {what}: {reason}", 80) for reason, count in reasons.items()]
    lines.append("")
    when = ""
    if found.times:
        first, last = (datetime.fromtimestamp(second, UTC) for second in found.times)
        when = f", {first:%Y-%m-%d} to {last:%Y-%m-%d}"
    lines.append(f"{found.events:,} events of {found.users:,} users at {found.items:,} items{when}")
    for key, (matched, pairs) in found.matches.items():
        what = key.removesuffix("_id")
        lines.append(f"{what}s table: it has the {what} of {matched:,} of the {found.events:,} events")
        lines += [cut(f"  alike but not equal: {theirs!r} in the events, {ours!r} in the table", 80) for theirs, ours in pairs]
    return "\n".join(lines)
