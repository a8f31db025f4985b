"""Define the commands for bundles: export, recommend, tune, change and serve."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower.commands.options import (
    BUNDLE,
    FILE,
    FOLDER,
    PARQUET,
    FileNamed,
    FloatRange,
    a_user,
    inside,
    keep_existing,
    keep_file,
    overwriting,
    say_next,
    served,
)
from twotower.errors import ConfigError
from twotower.utils.run_parts import keep_sealed

if TYPE_CHECKING:
    from twotower.utils.config_serving import ServingConfig


def listed_ids(text: str) -> list[str]:
    """Return the ids of a line of CSV; an id with a comma stands in double quotes.

    Examples
    --------
    >>> listed_ids('b_1, "a,b"')
    ['b_1', 'a,b']
    """
    return [part.strip() for part in next(csv.reader([text], skipinitialspace=True), []) if part.strip()]


INDEX_KINDS = ("exact", "int8", "sq", "hnsw", "ivf_pq")  # repeated, so that a mistyped one is refused before PyTorch loads


@click.command(short_help="Write a run's bundle, the folder that answers requests.")
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder for the bundle.")
@overwriting
def export(run: Path, out: Path, overwrite: bool) -> None:
    """Write a bundle: one folder with everything needed to answer requests, and no code.

    RUN is a folder of `twotower run` or `twotower train`.

    \b
    Example:
      twotower export runs/yelp --out bundles/yelp
    """
    keep_existing(out, ("manifest.json",), overwrite=overwrite)
    from twotower.pipeline.stages import export_stage

    manifest = export_stage(inside(run, "model"), out)
    click.echo(f"{out}: {len(manifest.hashes)} files")
    say_next("recommend", out, f"--user={a_user(out / 'dataset')}")


@click.command(short_help="Recommend items to one user, a history, or all users.")
@click.argument("bundle", type=BUNDLE)
@click.option("--user", help="Id of a known user.")
@click.option(
    "--history",
    help="Item ids, oldest first, separated by commas (quote an id that has one). With --user they follow the user's own.",
)
@click.option(
    "--all", "all_users", is_flag=True, help="Recommend to every user of the bundle, into --out. Resumes after an interruption."
)
@click.option("--out", metavar="PATH", help="With --all: Parquet file of user_id, rank, item_id and score; on Spark a folder.")
@click.option(
    "--engine",
    type=click.Choice(["local", "spark"]),
    default="local",
    show_default=True,
    help="With --all: compute in this process, or on a Spark cluster.",
)
@click.option(
    "--spark-master", metavar="URL", help="With --engine spark: the master. Default: that of spark-submit, else local[*]."
)
@click.option("--k", type=click.IntRange(1, 10_000), default=10, show_default=True, help="Number of items.")
@click.option(
    "--filter",
    "filter",
    metavar="TEXT",
    help="""Condition on the items, such as 'category == "Mexican" and price <= 2 and within(5)' (km).""",
)
@click.option("--near", type=(float, float), metavar="LAT LON", help="Location of the request. Default: centre of the history.")
@click.option("--include-seen", is_flag=True, help="Recommend items of the history too.")
@click.option("--diversity", type=FloatRange(0, 1), default=0.0, show_default=True, help="Diversity of the list, from 0 to 1.")
@click.option(
    "--popularity-bias",
    type=FloatRange(-1, 1),
    default=0.0,
    show_default=True,
    help="Popularity bias, from -1 (rare) to 1 (popular).",
)
@click.option("--explain", is_flag=True, help="With --json: add the reasons of each score.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@overwriting
def recommend(
    bundle: Path,
    user: str | None,
    history: str | None,
    all_users: bool,
    out: str | None,
    engine: str,
    spark_master: str | None,
    include_seen: bool,
    as_json: bool,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Recommend items to a known user, to an unknown user with a history, or to all users.

    BUNDLE is a bundle, or the run that has one.

    \b
    Example:
      twotower recommend runs/town/bundle --history ITEM,ITEM --k 5
      twotower recommend runs/town/bundle --all --out lists.parquet
      twotower recommend runs/town/bundle --all --engine spark --out s3a://lists
    """
    if all_users != (out is not None) or (all_users and (user or history or as_json or settings["explain"])):
        raise click.UsageError("--all goes with --out PATH, and with neither --user, --history, --json nor --explain.")
    if engine == "spark" and not all_users:
        raise click.UsageError("--engine spark computes the lists of all users. Add --all and --out FOLDER.")
    if spark_master and engine != "spark":
        raise click.UsageError("--spark-master needs --engine spark.")
    if out is not None:
        file = None if engine == "spark" else PARQUET.convert(out, None, None)
        _recommend_to_all(bundle, out, file, spark_master, {"exclude_seen": not include_seen, **settings}, overwrite=overwrite)
        return
    from twotower.pipeline.bundle_stages import as_table
    from twotower.retrieval.recommender import Recommender

    ids = None if history is None else listed_ids(history)
    recommender = Recommender.load(bundle)
    found = recommender.recommend(user=user, history=ids, exclude_seen=not include_seen, **settings)
    if not as_json:
        click.echo(as_table(found, recommender.dataset.noun))
    for item in found if as_json else ():
        row = asdict(item)
        if not settings["explain"]:
            del row["reasons"]
        click.echo(json.dumps(row, ensure_ascii=False))
    say_next("serve", bundle)


def _recommend_to_all(
    bundle: Path, out: str, file: Path | None, master: str | None, settings: dict[str, Any], *, overwrite: bool
) -> None:
    """Write the lists of all users to a file, or on Spark to the folder `out`."""
    if file is not None:
        keep_file(file, overwrite=overwrite)
    elif "://" not in out:
        keep_sealed(Path(out))
    from twotower.pipeline.bundle_stages import recommend_all_stage, recommend_on_spark_stage
    from twotower.retrieval.request import Request

    request = Request(**settings)
    if file is not None:
        users = recommend_all_stage(bundle, file, request)
    else:
        users = recommend_on_spark_stage(bundle, out, request, master=master, overwrite=overwrite)
    click.echo(f"{out}: {users:,} users")
    say_next("serve", bundle)


@click.command("tune-index", short_help="Build the cheapest index that reaches a target recall.")
@click.argument("bundle", type=BUNDLE)
@click.option(
    "--recall",
    type=FloatRange(0, 1, min_open=True),
    default=0.99,
    show_default=True,
    help="Recall that the index must reach.",
)
@click.option("--k", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Length of the lists that are measured.")
@click.option("--kinds", metavar="A,B", help=f"Index types to try: {', '.join(INDEX_KINDS)}. Default: all.")
@click.option("--plot", type=FileNamed(".svg"), help="SVG file for the plot of the measurements. Default: BUNDLE-index.svg.")
def tune_index(bundle: Path, recall: float, k: int, kinds: str | None, plot: Path | None) -> None:
    """Measure indexes on a bundle's vectors and users, and add the cheapest that reaches the recall.

    \b
    Example:
      twotower tune-index runs/town/bundle --recall 0.99
    """
    from twotower.utils.registry import Names

    chosen = [kind.strip() for kind in kinds.split(",")] if kinds else []
    for kind in chosen:
        Names("index", INDEX_KINDS).check(kind)
    from twotower.pipeline.bundle_stages import tune_index_stage

    if plot is not None:
        keep_sealed(plot)
    picture = plot or bundle.with_name(f"{bundle.name}-index.svg")
    best = tune_index_stage(bundle, recall=recall, k=k, kinds=chosen, plot=picture, say=click.echo)
    click.echo(f"{bundle}: {best.kind} {best.settings}; recall {best.recall:.4f}, {best.p50_ms:.3f} ms; plot in {picture}")
    say_next("serve", bundle)


@click.command(short_help="Add new items to a bundle, without training.")
@click.argument("bundle", type=BUNDLE)
@click.option("--items", type=FILE, required=True, help="JSON lines, CSV or Parquet file with columns of the catalogue.")
def add_items(bundle: Path, items: Path) -> None:
    """Add new items to a bundle by their features, without training.

    \b
    Example:
      twotower add-items runs/town/bundle --items new.jsonl
    """
    from twotower.bundle import revision

    manifest = revision.add_items(bundle, items)
    click.echo(f"{bundle}: revision {manifest.revision}")
    say_next("serve", bundle)


@click.command(short_help="Stop recommending items of a bundle.")
@click.argument("bundle", type=BUNDLE)
@click.option("--ids", required=True, help="Item ids, separated by commas; quote an id that has one: '\"a,b\",c'.")
def remove_items(bundle: Path, ids: str) -> None:
    """Stop recommending items. They still count as part of histories.

    \b
    Example:
      twotower remove-items runs/town/bundle --ids ITEM,ITEM
    """
    from twotower.bundle import revision

    manifest = revision.remove_items(bundle, listed_ids(ids))
    click.echo(f"{bundle}: revision {manifest.revision}")
    say_next("serve", bundle)


@click.command("new-key", short_help="Make an API key for a server.")
@click.argument("name")
@click.option(
    "--role",
    "roles",
    multiple=True,
    required=True,
    type=click.Choice(["read", "write", "admin"]),
    help="What the key allows: read, write (events) or admin (all). Can be repeated.",
)
@click.option("--into", type=FILE, required=True, help="File of keys to add it to; only the hash is stored.")
def new_key(name: str, roles: tuple[str, ...], into: Path) -> None:
    """Make a key, print it once, and add its hash to the file that `twotower serve --api-keys` reads.

    \b
    Example:
      twotower new-key till-7 --role write --into api.keys
    """
    from twotower.serving.access import new_key as made
    from twotower.serving.access import read_keys

    key, line = made(name, roles)
    keep_sealed(into)
    if into.is_file():
        read_keys(into)  # refuses another kind of file
    with open(os.open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    click.echo(key)


def _shares(_: click.Context, __: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """Return the shares of `--split`; the settings check them."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{str(text)[:40]!r} is not two numbers. Write 90,10.") from None


@click.command(short_help="Answer requests over HTTP, with a web page.")
@click.argument("bundle", type=BUNDLE)
@click.argument("other", type=BUNDLE, required=False)
@click.option("--split", metavar="A,B", callback=_shares, help="Shares of the users of BUNDLE and OTHER, such as 90,10.")
@click.option("--shadow", type=BUNDLE, help="A second bundle that computes the same lists, which users do not see.")
@click.option("--explore", type=FloatRange(0, 1), help="Share of positions for uncertain and new items. Default: 0.")
@click.option("--host", help="Address to listen on. 0.0.0.0 means all. Default: 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65_535), help="Port to listen on. Default: 8000.")
@click.option("--unix-socket", type=FILE, help="Unix socket to listen on, in place of host and port.")
@click.option("--workers", type=click.IntRange(1, 256), help="Processes that share port and bundle. Default: 1.")
@click.option("--events", metavar="URL", help="Store of accepted events: sqlite:PATH (default: beside BUNDLE) or redis://….")
@click.option(
    "--index", metavar="ADDRESS", help="Vectors of `twotower publish`: milvus://HOST:PORT/NAME or FILE.db. Default: BUNDLE's."
)
@click.option("--api-keys", type=FILE, help="File of keys written by `twotower new-key`. Read again when it changes.")
@click.option(
    "--public", is_flag=True, default=None, help="Let everyone read recommendations, items, users and histories without a key."
)
@click.option("--allowed-host", "allowed_hosts", multiple=True, metavar="NAME", help="Host name of this server. Can be repeated.")
@click.option(
    "--allowed-origin", "allowed_origins", multiple=True, metavar="URL", help="Site whose pages may call. Can be repeated."
)
@click.option(
    "--trusted-proxy", "trusted_proxies", multiple=True, metavar="IP", help="Proxy or network to believe X-Forwarded-For of."
)
@click.option("--trusted-key", type=FILE, help="PEM file of an Ed25519 public key: only bundles signed for it are served.")
@click.option("--tls-cert", type=FILE, help="PEM file of the certificate. With --tls-key the server speaks HTTPS.")
@click.option("--tls-key", type=FILE, help="PEM file of the certificate's key.")
@click.option("--root-path", metavar="PATH", help="Path under which a proxy publishes the server, such as /recommender.")
@click.option("--map-tiles", metavar="URL", help="Images of the ground for the map of the page: an address with {z}, {x} and {y}.")
@click.option("--map-attribution", metavar="TEXT", help="Text on the map that the server of --map-tiles requires.")
@click.option(
    "--refresh-s",
    type=FloatRange(0, 86_400),
    help="Seconds between two refreshes of the items with accepted events. 0: only on demand. Default: 60.",
)
@click.option("--rate", type=FloatRange(0), help="Requests per second of each client. 0 means no limit. Default: 100.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least important lines. Default: info.")
@served
def serve(bundle: Path, other: Path | None, config: ServingConfig) -> None:
    """Answer requests over HTTP, with a web page at the same address. Stop with Ctrl+C.

    All settings of the section serving can also be given with --config, --set serving.NAME=VALUE, or as environment variables
    TWOTOWER_SERVING_NAME. `twotower config --show` lists them.

    \b
    Example:
      twotower serve runs/town/bundle      then open http://127.0.0.1:8000
      twotower serve runs/town/bundle runs/new/bundle --split 90,10
    """
    given = click.get_current_context().params
    if any("@" in one for one in (given["events"] or "", *given["overrides"])):
        text = "--events has a password, which every user of this machine can read in the list of processes. "
        raise ConfigError(f"{text}Set TWOTOWER_SERVING_EVENTS.")
    from twotower.serving.server import serve as run_server

    run_server(bundle, config, other)
