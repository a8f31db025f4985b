"""Define the commands of the feedback loop: `events export`, `events backup`, `forget` and `estimate`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from twotower.commands.options import BUNDLE, FILE, FOLDER, PARQUET, FloatRange, keep_file, overwriting, say_next
from twotower.errors import ConfigError, DataError


def check_address(store: str) -> None:
    """Refuse an address with a password: every user of the machine can read command lines."""
    if "@" in store and not store.startswith("sqlite:"):
        raise ConfigError(
            "The address has a password, which every user of this machine can read. Use one without, such as unix://PATH."
        )


def keep_store(store: str, out: Path, *, overwrite: bool) -> None:
    """Refuse to write over a file, and in any case over the store itself: a server would go on in a file that has no name."""
    file = Path(store.removeprefix("sqlite:"))
    if store.startswith("sqlite:") and out.exists() and file.exists() and out.samefile(file):
        raise DataError(f"{out} is the store itself, which a server may use. Choose another file.")
    keep_file(out, overwrite=overwrite)


@click.group(short_help="Export or back up the events that a server has accepted.")
def events() -> None:
    """Export or back up the events that a server has accepted, while it runs.

    \b
    Example:
      twotower events export sqlite:events.sqlite --out events.parquet
      twotower events backup sqlite:events.sqlite --out copy.sqlite
    """


@events.command(short_help="Write accepted events as Parquet.")
@click.argument("store")
@click.option("--since", metavar="TIME", help="Events from this day or time on (UTC), such as 2026-11-01. Default: all.")
@click.option("--answers", is_flag=True, help="Write the logged answers with their propensities, instead of the events.")
@click.option("--out", type=PARQUET, required=True, help="Parquet file to write.")
@overwriting
def export(store: str, since: str | None, answers: bool, out: Path, overwrite: bool) -> None:
    """Write the events of STORE in the columns that `twotower update` reads. A server may go on using the store.

    STORE is sqlite:PATH or redis://HOST:PORT/NUMBER.

    \b
    Example:
      twotower events export sqlite:events.sqlite --since 2026-11-01 --out events.parquet
    """
    check_address(store)
    keep_store(store, out, overwrite=overwrite)
    from twotower.serving.event_export import export_events, since_of

    count = export_events(store, out, since_of(since), answers=answers)
    click.echo(f"{out}: {count:,} {'answers' if answers else 'events'}")
    if not answers:
        say_next("update", "RUN", "--data", out)


@events.command(short_help="Write a copy of an SQLite store.")
@click.argument("store")
@click.option("--out", type=FILE, required=True, help="File to write; a server can use it as its store.")
@overwriting
def backup(store: str, out: Path, overwrite: bool) -> None:
    """Write a copy of STORE with all events and answers, while a server goes on using it.

    \b
    Example:
      twotower events backup sqlite:events.sqlite --out copy.sqlite
    """
    check_address(store)
    keep_store(store, out, overwrite=overwrite)
    from twotower.serving.event_store import open_store

    opened = open_store(store, reading=True)
    try:
        opened.backup(out)
    finally:
        opened.close()
    click.echo(f"{out}: a copy of {store}")


@click.command(short_help="Delete all data of users from runs, bundles and stores.")
@click.argument("target", type=FOLDER)
@click.option("--user", "users", multiple=True, required=True, metavar="ID", help="User to forget. Can be repeated.")
@click.option("--events", "store", metavar="STORE", help="Event store, too: sqlite:PATH or redis://…. No server may use the file.")
def forget(target: Path, users: tuple[str, ...], store: str | None) -> None:
    """Delete users from TARGET, a run or a bundle: dataset, checkpoints, bundle and report.

    A running server forgets a user with DELETE /v1/users/ID. Raw files, exports and backups are yours to clean.

    \b
    Example:
      twotower forget runs/shop --user C0001 --events sqlite:events.sqlite
    """
    if store is not None:
        check_address(store)
    for user in users:
        if not user:
            raise DataError("A user is empty, and no user has an empty id. Check the variable or list that --user is made from.")
        if not user.isascii() and user.encode(errors="ignore").decode() != user:
            raise DataError(
                f"The user {user!r} is not UTF-8 text, so nothing holds it. Check the encoding of your terminal or script."
            )
    from twotower.pipeline.forget import forget as forget_users

    removed = forget_users(target, users, store)
    parts = [f"users in the bundle: {removed.bundle}", f"users in the dataset: {removed.dataset}"]
    click.echo("; ".join([*parts, f"events in the store: {removed.events:,}"] if store is not None else parts))


@click.command(short_help="Estimate what a bundle would get, from the log of a server.")
@click.argument("bundle", type=BUNDLE)
@click.option(
    "--log", "store", required=True, metavar="STORE", help="Event store of the server, or a backup: sqlite:PATH, redis://…."
)
@click.option(
    "--explore",
    type=FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the positions that the bundle would give to uncertain items.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def estimate(bundle: Path, store: str, explore: float, as_json: bool) -> None:
    """Estimate the outcomes per list of BUNDLE from lists that another version has shown (off-policy).

    The server must explore (`serving.explore`), or the log says nothing about other items.

    \b
    Example:
      twotower estimate runs/new/bundle --log sqlite:events.sqlite
    """
    check_address(store)
    from twotower.pipeline.estimate import estimate_bundle

    found = estimate_bundle(bundle, store, explore=explore)
    if as_json:
        click.echo(json.dumps(found.as_json()))
        return
    click.echo(found.in_words(str(bundle)))
