"""Define the commands for bundles: export, recommend, tune, change and serve."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from twotower.commands.options import BUNDLE, FILE, FOLDER, a_user, inside, keep_existing, keep_file, overwriting, say_next

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
@click.option("--history", help="Item ids, oldest first, separated by commas. With --user they follow the user's own.")
@click.option(
    "--all", "everybody", is_flag=True, help="Recommend to every user of the bundle, into --out. Resumes after an interruption."
)
@click.option("--out", type=FILE, help="With --all: Parquet file of user_id, rank, item_id and score.")
@click.option("--k", type=click.IntRange(1, 10_000), default=10, show_default=True, help="Number of items.")
@click.option(
    "--filter",
    "filter",
    metavar="TEXT",
    help="""Condition on the items, such as 'category == "Mexican" and price <= 2 and within(5)' (km).""",
)
@click.option("--near", type=(float, float), metavar="LAT LON", help="Location of the request. Default: centre of the history.")
@click.option("--include-seen", is_flag=True, help="Recommend items of the history too.")
@click.option(
    "--diversity", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Diversity of the list, from 0 to 1."
)
@click.option(
    "--popularity",
    type=click.FloatRange(-1, 1),
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
    everybody: bool,
    out: Path | None,
    include_seen: bool,
    as_json: bool,
    overwrite: bool,
    **asked: Any,
) -> None:
    """Recommend items to a known user, to an unknown user with a history, or to all users.

    BUNDLE is a bundle, or the run that has one.

    \b
    Example:
      twotower recommend runs/town/bundle --history ITEM,ITEM --k 5
      twotower recommend runs/town/bundle --all --out lists.parquet
    """
    if everybody != (out is not None) or (everybody and (user or history or as_json or asked["explain"])):
        raise click.UsageError("--all goes with --out FILE, and with neither --user, --history, --json nor --explain.")
    if out is not None:
        keep_file(out, overwrite=overwrite)
    from twotower.pipeline.bundle_stages import as_table, recommend_all_stage
    from twotower.retrieval.recommender import Recommender
    from twotower.retrieval.request import Request

    if out is not None:
        users = recommend_all_stage(bundle, out, Request(exclude_seen=not include_seen, **asked))
        click.echo(f"{out}: {users:,} users")
        say_next("serve", bundle)
        return
    ids = None if history is None else [part.strip() for part in history.split(",") if part.strip()]
    found = Recommender.load(bundle).recommend(user=user, history=ids, exclude_seen=not include_seen, **asked)
    if not as_json:
        click.echo(as_table(found))
    for item in found if as_json else ():
        row = asdict(item)
        if not asked["explain"]:
            del row["reasons"]
        click.echo(json.dumps(row, ensure_ascii=False))
    say_next("serve", bundle)


@click.command("tune-index", short_help="Build the cheapest index that reaches a target recall.")
@click.argument("bundle", type=BUNDLE)
@click.option(
    "--recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.99,
    show_default=True,
    help="Recall that the index must reach.",
)
@click.option("--k", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Length of the lists that are measured.")
@click.option("--kinds", metavar="A,B", help=f"Index types to try: {', '.join(INDEX_KINDS)}. Default: all.")
@click.option("--plot", type=FILE, help="SVG file for the plot of the measurements. Default: BUNDLE-index.svg.")
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
@click.option("--ids", required=True, help="Item ids, separated by commas.")
def remove_items(bundle: Path, ids: str) -> None:
    """Stop recommending items. They still count as part of histories.

    \b
    Example:
      twotower remove-items runs/town/bundle --ids ITEM,ITEM
    """
    from twotower.bundle import revision

    manifest = revision.remove_items(bundle, [part.strip() for part in ids.split(",") if part.strip()])
    click.echo(f"{bundle}: revision {manifest.revision}")
    say_next("serve", bundle)


@click.command(short_help="Answer requests over HTTP, with a web page.")
@click.argument("bundle", type=BUNDLE)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. 0.0.0.0 means all.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="Port to listen on.")
@click.option("--events", metavar="URL", help="Store of accepted events: sqlite:PATH (default: beside BUNDLE) or redis://…")
@click.option("--api-key-file", type=FILE, help="File with the key of the write routes. Default: $TWOTOWER_API_KEY.")
@click.option("--tls-cert", type=FILE, help="PEM file of the certificate. With --tls-key the server speaks HTTPS.")
@click.option("--tls-key", type=FILE, help="PEM file of the certificate's key.")
@click.option(
    "--rate", type=click.FloatRange(0), default=100, show_default=True, help="Requests per second of each client. 0 means no limit."
)
def serve(rate: float, **options: Any) -> None:
    """Answer requests over HTTP, with a web page at the same address. Stop with Ctrl+C.

    \b
    Example:
      twotower serve runs/town/bundle      then open http://127.0.0.1:8000
    """
    from twotower.serving.limits import Limits
    from twotower.serving.server import Options
    from twotower.serving.server import serve as run_server

    run_server(Options(**options, limits=Limits(rate=rate, burst=max(2 * rate, 1))))
