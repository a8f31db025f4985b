"""Measure the search in Milvus Lite against the exact search of the same vectors.

    python benchmarks/milvus.py BUNDLE

The bundle is published to a file of Milvus Lite. For users of the bundle, lists of ten without a filter and with one are compared
with those of the exact search: the recall at the default width of the search, the share of equal lists at the largest width, and
the median time of a single list. Each claim gives a JSON line, appended to benchmarks/results/milvus.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, claim, in_words, tell

from twotower.bundle.bundle import load_bundle
from twotower.bundle.publish import RemoteIndex, publish_milvus, with_milvus
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Request
from twotower.schema import FIRST_ROW
from twotower.search.milvus_index import EF, MAX_EF
from twotower.search.milvus_store import read_address
from twotower.utils.console import setup_logging

K, TIMED, PATIENT_S = 10, 100, 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--filter", default='category == "Restaurants" and price <= 2')
    parser.add_argument("--results", type=Path, default=RESULTS / "milvus.jsonl", help="file the rows are appended to")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    bundle = load_bundle(given.bundle)
    rows = np.random.default_rng(0).choice(bundle.dataset.n_users, min(given.users, bundle.dataset.n_users), replace=False)
    users = [str(bundle.dataset.user_ids[row + FIRST_ROW]) for row in rows]
    exact = Recommender(bundle)
    with tempfile.TemporaryDirectory() as folder:
        address = read_address(str(Path(folder) / "vectors.db"))
        began = time.perf_counter()
        items = publish_milvus(bundle, address)
        published_s = time.perf_counter() - began
        remote = with_milvus(bundle, RemoteIndex(address, EF, PATIENT_S))
        widest = with_milvus(bundle, RemoteIndex(address, MAX_EF, PATIENT_S))
        for condition in (None, given.filter):
            requests = [Request(user=user, k=K, filter=condition) for user in users]
            wanted = [one.rows for one in exact.ranked(requests)]
            found, full = ([one.rows for one in Recommender(which).ranked(requests)] for which in (remote, widest))
            recall = float(np.mean([np.isin(one, other).mean() for one, other in zip(wanted, found, strict=True)]))
            equal = float(np.mean([np.array_equal(one, other) for one, other in zip(wanted, full, strict=True)]))
            alone, here = (_p50_ms(which, requests[:TIMED]) for which in (Recommender(remote), exact))
            what = f"recall of {K} of {items:,} items in Milvus Lite, {'no filter' if condition is None else condition}"
            more: dict[str, Any] = {"users": len(users), "equal_lists_at_full_width": equal, "published_s": round(published_s, 1)}
            more |= {"p50_ms": round(alone, 2), "exact_p50_ms": round(here, 2), "ef": EF}
            row = claim(what, recall, "", "exact search", 1.0, 0, **more)
            tell(row, given.results)
            sys.stderr.write(in_words(row))
        remote.index.store.close()  # type: ignore[attr-defined]
    return 0


def _p50_ms(recommender: Recommender, requests: Sequence[Request]) -> float:
    """Return the median milliseconds of single lists, on two threads at most."""
    taken = []
    for request in requests:
        began = time.perf_counter()
        recommender.ranked([request])
        taken.append(time.perf_counter() - began)
    return float(1000 * np.median(taken))


if __name__ == "__main__":
    sys.exit(main())
