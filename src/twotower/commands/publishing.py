"""Define the commands that give a bundle to others: `publish` for vector databases, and `sign`."""

from __future__ import annotations

from pathlib import Path

import click

from twotower.commands.options import BUNDLE, FILE, PARQUET, keep_file, overwriting, say_next
from twotower.utils.run_parts import keep_sealed


@click.command(short_help="Write the vectors of a bundle to Parquet or Milvus.")
@click.argument("bundle", type=BUNDLE)
@click.option(
    "--to",
    "target",
    required=True,
    metavar="TARGET",
    help="A .parquet file; or a collection of Milvus: milvus://HOST:PORT/NAME, or a .db file of Milvus Lite.",
)
@click.option("--users", type=PARQUET, help="Parquet file for the vectors that users are queried with, and what they have seen.")
@click.option("--exact", is_flag=True, help="In Milvus: scan all vectors, instead of a graph. For up to some 100,000 items.")
@overwriting
def publish(bundle: Path, target: str, users: Path | None, exact: bool, overwrite: bool) -> None:
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
    if exact and address is None:
        raise click.UsageError("--exact needs --to milvus://… or a .db file: a Parquet file has no index.")
    if users is not None and (address is None and Path(target).absolute() == users.absolute()):
        raise click.UsageError(f"--to and --users are both {users}. Give two files.")
    if address is not None and "://" not in target:
        keep_sealed(Path(target))
    for file in (None if address else Path(target), users):
        if file is not None:
            keep_file(file, overwrite=overwrite)
    from twotower.bundle.bundle import load_bundle
    from twotower.bundle.publish import publish_milvus, publish_parquet, publish_users
    from twotower.utils.nouns import plural

    opened = load_bundle(bundle)
    items = publish_milvus(opened, address, exact=exact) if address else publish_parquet(opened, Path(target))
    noun = opened.dataset.noun
    click.echo(f"{target}: {items:,} {noun if items == 1 else plural(noun)}, version {opened.manifest.seal[:12]}")
    if users is not None:
        click.echo(f"{users}: {publish_users(opened, users):,} users")
    if address:
        say_next("serve", bundle, "--index", target)


@click.command(short_help="Sign a bundle, so that servers can trust it.")
@click.argument("bundle", type=BUNDLE)
@click.option("--key", type=FILE, required=True, help="PEM file of a private Ed25519 key.")
def sign(bundle: Path, key: Path) -> None:
    """Sign a bundle. `twotower serve --trusted-key` then serves only bundles with this signature.

    \b
    Example:
      twotower sign runs/town/bundle --key bundle.key

    \b
    A pair of keys:
      openssl genpkey -algorithm ed25519 -out bundle.key
      openssl pkey -in bundle.key -pubout -out bundle.pub
    """
    from twotower.bundle.signature import sign_bundle

    sign_bundle(bundle, key)
    click.echo(f"{bundle}: signed")
    say_next("serve", bundle)
