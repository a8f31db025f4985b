"""Define `publish`, which writes the vectors of a bundle for vector databases."""

from __future__ import annotations

from pathlib import Path

import click

from twotower.commands.options import BUNDLE, FILE, keep_file, overwriting, say_next


@click.command(short_help="Write the vectors of a bundle to Parquet or Milvus.")
@click.argument("bundle", type=BUNDLE)
@click.option(
    "--to",
    "target",
    required=True,
    metavar="TARGET",
    help="A .parquet file; or a collection of Milvus: milvus://HOST:PORT/NAME, or a .db file of Milvus Lite.",
)
@click.option("--users", type=FILE, help="Parquet file for the vectors that users are queried with, and what they have seen.")
@overwriting
def publish(bundle: Path, target: str, users: Path | None, overwrite: bool) -> None:
    """Write the vectors of a bundle to a Parquet file for any vector database, or to Milvus.

    In Milvus a new version takes the place of the last one when it is complete. Publish again after every change of the bundle.

    \b
    Example:
      twotower publish runs/town/bundle --to vectors.parquet --users users.parquet
      twotower publish runs/town/bundle --to milvus://localhost:19530/town
    """
    from twotower.search.milvus_store import is_milvus, read_address

    address = read_address(target) if is_milvus(target) else None
    if address is None and not target.endswith(".parquet"):
        raise click.UsageError(f"--to is {target!r}. It must end with .parquet or .db, or start with milvus://.")
    for file in (None if address else Path(target), users):
        if file is not None:
            keep_file(file, overwrite=overwrite)
    from twotower.bundle.bundle import load_bundle
    from twotower.bundle.publish import publish_milvus, publish_parquet, publish_users
    from twotower.utils.nouns import plural

    opened = load_bundle(bundle)
    items = publish_milvus(opened, address) if address else publish_parquet(opened, Path(target))
    noun = opened.dataset.noun
    click.echo(f"{target}: {items:,} {noun if items == 1 else plural(noun)}, version {opened.manifest.seal[:12]}")
    if users is not None:
        click.echo(f"{users}: {publish_users(opened, users):,} users")
    if address:
        say_next("serve", bundle, "--index", target)
