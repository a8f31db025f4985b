"""Measure indexes of more vectors than fit into memory several times: building, opening, searching with and without a filter.

    python benchmarks/large_index.py [--items 10000000] [--kinds ivf_pq,sq,int8] [--folder FOLDER]

Vectors, with a popularity in the last component, lie in a file, as in a bundle. They are drawn around 20,000 centres in 32 of the
dimensions, with some noise in all of them. Each kind is built and searched by processes of their own, whose address space is
limited to 16 GiB, on one thread. Rows:

- seconds and peak memory of the build, and the size of the index file;
- recall of the 10 best of each query against brute force, without a filter and with filters that 10 % and 1 % of the items match,
  with the median and the 99th percentile of single searches (wall and CPU time);
- the first search after the files have left the page cache, against the median;
- the memory of the process that searches: its own, and pages of files, which the system can reclaim.

Searches are timed for at most a minute per filter. Each claim gives a JSON line in benchmarks/results/large_index.jsonl.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from common import RESULTS, claim, in_words, tell
from index import recall

from twotower.bundle.index_tuning import SWEEPS, balance_of
from twotower.errors import TwoTowerError
from twotower.schema import FIRST_ROW
from twotower.search.approximate import Approximate, one_thread
from twotower.search.registry import INDEXES, load_index
from twotower.utils.types import Array, Mask

K, WIDTH, LATENT, CENTRES, QUERIES, WARMING = 10, 128, 32, 20_000, 200, 20
LIMIT_GIB, RECALL, TIMED_S, PORTION = 16, 0.95, 60.0, 2**17
SHARES = {"no filter": 1.0, "10 % allowed": 0.1, "1 % allowed": 0.01}
RESCORE = 16.0  # candidates for each item of a list, of a kind with inverted lists: four are few for lists of ten
VECTORS = "vectors.f32"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    given = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        queries = write_vectors(folder / VECTORS, given.items, given.seed)
        truth = brute_force(vectors_of(folder), queries, given.seed)
        try:
            for kind in given.kinds.split(","):
                built = apart(build, folder, kind, queries, given.nlist)
                searched = apart(search, folder, kind, queries, truth, given.seed)
                searched |= apart(first_search, folder, kind, queries, searched["settings"])
                for row in rows(kind, given, built, searched):
                    tell(row, given.results)
                    sys.stderr.write(in_words(row))
        except TwoTowerError as error:
            sys.stderr.write(f"large_index: error: {' '.join(str(error).split())}\n")
            return 2
    return 0


def rows(kind: str, given: argparse.Namespace, built: dict[str, Any], searched: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the claims of one kind."""
    of, seed = f"{kind}, {given.items:,} × {WIDTH}", given.seed
    found = [
        claim(f"{of}: seconds of the build", built["wall_s"], "s", "CPU time", built["cpu_s"], seed, bytes=built["bytes"]),
        claim(f"{of}: peak memory of the build, mapped pages included", built["peak_gib"], "GiB", "limit", LIMIT_GIB, seed),
        claim(f"{of}: peak memory of the build, its own", built["own_gib"], "GiB", "limit", LIMIT_GIB, seed),
        claim(f"{of}: own memory while searching", searched["own_gib"], "GiB", "pages of files", searched["file_gib"], seed),
    ]
    for share, one in searched["filters"].items():
        more = {name: value for name, value in one.items() if name != "recall"} | {"settings": searched["settings"]}
        found.append(claim(f"{of}: recall of the {K} best, {share}", one["recall"], "", "brute force", 1.0, seed, **more))
    first, warm = searched["first_ms"], searched["filters"]["no filter"]["p50"]
    found.append(claim(f"{of}: first search, files not in memory", first, "ms", "median", warm, seed, read_mb=searched["read_mb"]))
    return found


def write_vectors(file: Path, size: int, seed: int) -> Array:
    """Write item vectors, with the two reserved rows, block by block; return vectors of queries."""
    rng = np.random.default_rng(seed)
    spread = (1 / np.sqrt(1 + np.arange(LATENT) / 4)).astype(np.float32)
    basis = np.linalg.qr(rng.standard_normal((WIDTH - 1, LATENT)))[0].T.astype(np.float32)
    centres = rng.standard_normal((CENTRES, LATENT), np.float32) * spread

    def tower(latent: Array) -> Array:
        """Return unit vectors near the plane of the latent dimensions."""
        wide = latent @ basis + 0.05 * rng.standard_normal((len(latent), WIDTH - 1), np.float32)
        return wide / np.linalg.norm(wide, axis=1, keepdims=True)

    def drawn(count: int) -> Array:
        return centres[rng.integers(0, CENTRES, count)] + 0.5 * spread * rng.standard_normal((count, LATENT), np.float32)

    with file.open("wb") as target:
        for start in range(0, size + FIRST_ROW, PORTION):
            count = min(PORTION, size + FIRST_ROW - start)
            popularity = np.log1p(rng.pareto(1.0, (count, 1)).astype(np.float32))
            target.write(np.concatenate([tower(drawn(count)), popularity], axis=1))
        target.flush()
        os.fsync(target.fileno())
    users = tower(drawn(QUERIES) + 0.25 * drawn(QUERIES))
    return np.concatenate([users, rng.uniform(0, 0.05, (QUERIES, 1)).astype(np.float32)], axis=1)


def vectors_of(folder: Path) -> Array:
    """Return the vectors as a memory map, as a bundle opens them."""
    content: Array = np.memmap(folder / VECTORS, np.float32, mode="c").view(np.ndarray).reshape(-1, WIDTH)
    return content


def allowed(size: int, share: float, seed: int) -> Mask | None:
    """Return the mask of a filter that a share of the items match, whatever their vectors; None if all do."""
    return None if share == 1 else np.random.default_rng(seed + 1).random(size) < share


def brute_force(vectors: Array, queries: Array, seed: int) -> dict[str, Array]:
    """Return the best items of each query under each filter, from all inner products, block by block."""
    masks = {name: allowed(len(vectors), share, seed) for name, share in SHARES.items()}
    parts: dict[str, list[tuple[Array, Array]]] = {name: [] for name in SHARES}
    for start in range(0, len(vectors), PORTION):
        scores = queries @ vectors[start : start + PORTION].T
        if start == 0:
            scores[:, :FIRST_ROW] = -np.inf
        for name, mask in masks.items():
            hidden = scores if mask is None else np.where(mask[start : start + PORTION], scores, -np.inf)
            best = torch.topk(torch.from_numpy(hidden), min(K, hidden.shape[1]), dim=1)
            parts[name].append((best.indices.numpy() + start, best.values.numpy()))
    found = {}
    for name, blocks in parts.items():
        items = np.concatenate([one for one, _ in blocks], axis=1)
        scores = np.concatenate([one for _, one in blocks], axis=1)
        found[name] = np.take_along_axis(items, np.argsort(-scores, axis=1, kind="stable")[:, :K], 1)
    return found


def apart(work: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Return what `work` returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _limited) as pool:
        return pool.submit(work, *given).result()


def build(folder: Path, kind: str, queries: Array, nlist: int) -> dict[str, Any]:
    """Build and save an index."""
    chosen: dict[str, Any] = {"balance": balance_of(queries, 1)} if issubclass(INDEXES[kind], Approximate) else {}
    chosen |= {"nlist": nlist} if kind == "ivf_pq" else {}
    with one_thread(), _Peak() as peak:
        began, began_cpu = time.perf_counter(), time.process_time()
        index = INDEXES[kind].build(torch.from_numpy(vectors_of(folder)), **chosen)
        index.save(folder / kind)
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    size = sum(file.stat().st_size for file in (folder / kind).iterdir())
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_gib": peak_gib, "own_gib": peak.own_gib, "bytes": size}


def search(folder: Path, kind: str, queries: Array, truth: dict[str, Array], seed: int) -> dict[str, Any]:
    """Open an index, choose its settings, and search it."""
    with one_thread():
        index = _tuned(load_index(folder / kind, torch.from_numpy(vectors_of(folder))), queries, truth["no filter"])
        filters = {}
        for name, share in SHARES.items():
            allow = allowed(len(index.vectors), share, seed)
            found = recall(index.search(queries, K, allow=allow).items, truth[name])
            filters[name] = {
                "recall": round(found, 4),
                **_timed(lambda query, allow=allow: index.search(query, K, allow=allow), queries),
            }
    memory = _memory()
    return {
        "filters": filters,
        "settings": index.settings,
        "own_gib": memory["RssAnon"],
        "file_gib": memory["RssFile"],
    }


def first_search(folder: Path, kind: str, queries: Array, settings: dict[str, Any]) -> dict[str, Any]:
    """Open an index with no page of its files in memory, and search it once."""
    _forget(folder)
    with one_thread():
        index = load_index(folder / kind, torch.from_numpy(vectors_of(folder)))
        index = index.changed(**settings) if isinstance(index, Approximate) else index
        read, began = _bytes_read(), time.perf_counter()
        index.search(queries[:1], K)
        wall_s = time.perf_counter() - began
    return {"first_ms": 1000 * wall_s, "read_mb": round((_bytes_read() - read) / 1e6, 1)}


def _tuned(index: Any, queries: Array, truth: Array) -> Any:
    """Return the index with the first search settings that reach the recall, else with the last ones."""
    if not isinstance(index, Approximate):
        return index
    rescore: dict[str, Any] = {"rescore_factor": RESCORE} if "nprobe" in index.settings else {}
    for setting in SWEEPS[index.kind][0][1]:
        tried = index.changed(**setting, **rescore)
        if recall(tried.changed(exact_scan_below=0).search(queries, K).items, truth) >= RECALL:
            break
    return tried.with_break_even()


def _timed(call: Callable[[Array], Any], queries: Array) -> dict[str, Any]:
    """Return milliseconds of single searches: median and 99th percentile of wall and CPU time, and their number."""
    wall, cpu, deadline = [], [], time.monotonic() + TIMED_S
    for number, query in enumerate([*queries[:WARMING], *queries]):
        began, began_cpu = time.perf_counter(), time.process_time()
        call(query[None])
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
        if time.monotonic() > deadline and number >= 2 * WARMING:
            break
    wall, cpu = wall[WARMING:], cpu[WARMING:]
    figures = {"p50": (wall, 50), "p99": (wall, 99), "cpu_p50": (cpu, 50), "cpu_p99": (cpu, 99)}
    return {name: round(1000 * float(np.percentile(*pair)), 2) for name, pair in figures.items()} | {"timed": len(wall)}


class _Peak:
    """Samples the memory that belongs to this process, without pages of files."""

    def __enter__(self) -> _Peak:
        self.own_gib, self._done = 0.0, Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.own_gib = max(self.own_gib, _memory()["RssAnon"])


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_GIB * 2**30, LIMIT_GIB * 2**30))
    torch.set_num_threads(1)


def _memory() -> dict[str, float]:
    """Return the resident memory of this process in GiB by kind."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss")]
    return {name.rstrip(":"): int(kib) / 2**20 for name, kib, _ in lines}


def _bytes_read() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def _forget(folder: Path) -> None:
    """Remove the pages of all files below a folder from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--kinds", default="ivf_pq,sq,int8", help="separated by commas")
    parser.add_argument("--folder", type=Path, help="where to put the files: 700 bytes an item (default: the temporary folder)")
    parser.add_argument("--nlist", type=int, default=0, help="lists of ivf_pq (default: 4 √items)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "large_index.jsonl", help="file the rows are appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
