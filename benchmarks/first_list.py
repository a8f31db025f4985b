"""Measure how long the page takes to show its first list on a slow phone, beside a file with one card or an older version.

    python benchmarks/first_list.py [--bundle FOLDER] [--against SRC] [--runs 9]

Chromium opens the page as a phone does: 390 x 844 pixels, an empty cache, a processor that is four times slower, and a slow
network, all emulated by the browser (`PROFILES`). Each run has a browser context of its own. The list is there when the browser has
painted the name of its first card. Pages are opened in turn, so that other load of the machine affects all. Rows hold medians:

- against an HTML file with one card, without styles and scripts: less is not possible on this network;
- with --against, also against the server of another checkout, whose folder `src` is given.

`requests` and `bytes` are those that had ended when the list was there, `in_sequence` the longest chain of requests of which each
began after the end of the one before. The waterfall of the median run is written to stderr. Needs playwright and Chromium.
"""

from __future__ import annotations

import argparse
import http.server
import os
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import RESULTS, Row, claim, in_words, tell
from playwright.sync_api import Browser, CDPSession, sync_playwright
from serving_load import Server

from twotower.data.prepare import prepare
from twotower.pipeline.stages import simulate_stage, train_stage
from twotower.utils.config import parse_config
from twotower.utils.console import setup_logging

TOWN = {"users": 2400, "businesses": 1200, "events": 48_000}  # that of `twotower demo`
STEPS = 30
CPU_SLOWER = 4
KBIT = 1000 / 8  # bytes


@dataclass(frozen=True, slots=True)
class Profile:
    """A network: milliseconds that each request waits, and bytes per second down and up."""

    latency_ms: float
    down: float
    up: float


PROFILES = {
    # Round trips of 150 ms, 1.6 Mbit/s. The browser delays requests, not packets, and connections cost nothing.
    "150 ms, 1.6 Mbit/s": Profile(150, 1638.4 * KBIT, 750 * KBIT),
    # The presets of Chrome's developer tools. Their latencies contain what connections cost: 3.75 x 150 ms and 2.75 x 60 ms.
    "Slow 4G": Profile(150 * 3.75, 1638.4 * 0.9 * KBIT, 750 * 0.9 * KBIT),
    "Fast 4G": Profile(60 * 2.75, 9000 * 0.9 * KBIT, 1500 * 0.9 * KBIT),
}
FLOOR = "an HTML file with one card"
FILE = b"""<!doctype html><html lang="en"><meta name="viewport" content="width=device-width"><title>Floor</title>
<link rel="icon" href="data:,"><ol id="list"><li class="best"><h3>An item</h3></li></ol></html>"""
WATCH = """
  window.firstList = new Promise((found, failed) => {
    setTimeout(failed, 30000);
    const look = () => {
      const name = document.querySelector("#list > .best h3");
      if (!name?.textContent.trim() || !name.checkVisibility({ visibilityProperty: true })) return requestAnimationFrame(look);
      const { port1, port2 } = new MessageChannel(); // its message comes after the paint of this frame
      port1.onmessage = () => found(performance.now());
      port2.postMessage(null);
    };
    requestAnimationFrame(look);
  });
"""


@dataclass
class Visit:
    """One opening of a page: milliseconds to the list and its first paint, and its requests as (begin, end, bytes, address)."""

    list_ms: float = 0.0
    paint_ms: float = 0.0
    requests: list[tuple[float, float, float, str]] = field(default_factory=list)

    @property
    def needed(self) -> list[tuple[float, float, float, str]]:
        """Requests that had ended when the list was there, by their begin."""
        return sorted(one for one in self.requests if one[1] <= self.list_ms)

    @property
    def in_sequence(self) -> int:
        """Length of the longest chain of requests of which each began after the end of the one before."""
        longest: list[int] = []
        for begin, _, _, _ in self.needed:
            before = [longest[at] for at, (_, end, _, _) in enumerate(self.needed[: len(longest)]) if end <= begin]
            longest.append(1 + max(before, default=0))
        return max(longest, default=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="bundle to serve (default: a small model of the demo's town)")
    parser.add_argument("--against", type=Path, help="folder src of another checkout")
    parser.add_argument("--against-name", default="before", help="its name in the rows (default: before)")
    parser.add_argument("--runs", type=int, default=9, help="openings of each page in each network (default: 9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "first_list.jsonl", help="file the rows are appended to")
    given = parser.parse_args(arguments)
    setup_logging(quiet=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundle = given.bundle or make_bundle(folder, given.seed)
        addresses = {FLOOR: stack.enter_context(floor())}
        sources = {"page": None} | ({given.against_name: given.against} if given.against else {})
        for at, (name, source) in enumerate(sources.items()):
            path = {} if source is None else {"PYTHONPATH": str(source.resolve())}
            server = Server(bundle, f"sqlite:{folder / f'{at}.sqlite'}", folder / f"log{at}", "--rate", "0", **path)
            addresses[name] = f"http://127.0.0.1:{stack.enter_context(server).port}/"
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in PROFILES:
            for row in rows_of(name, open_in_turn(browser, addresses, PROFILES[name], given.runs), given.seed):
                tell(row, given.results)
                sys.stderr.write(in_words(row))
        browser.close()
    return 0


def make_bundle(folder: Path, seed: int) -> Path:
    """Return a bundle of the demo's town after a few steps of training."""
    simulate_stage(folder / "raw", **TOWN, seed=seed, impressions=False)
    settings = {"seed": seed, "data": {"source": "yelp", "path": str(folder / "raw")}}
    prepare(parse_config(settings), folder / "dataset")
    config = parse_config({**settings, "training": {"max_steps": STEPS, "device": "cpu"}})
    train_stage(config, folder / "dataset", folder / "model", bundle=folder / "bundle")
    return folder / "bundle"


@contextmanager
def floor() -> Iterator[str]:
    """Yield the address of a server of one small file."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.send_header("content-length", str(len(FILE)))
            self.end_headers()
            self.wfile.write(FILE)

        def log_message(self, *_: Any) -> None:
            """Write nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def open_in_turn(browser: Browser, addresses: dict[str, str], profile: Profile, runs: int) -> dict[str, list[Visit]]:
    """Return the visits of each page. The first visit of each is not counted: it warms the server and the browser."""
    visits: dict[str, list[Visit]] = {name: [] for name in addresses}
    for turn in range(runs + 1):
        for name in addresses if turn % 2 else reversed(addresses):
            found = visit(browser, addresses[name], profile)
            if turn:
                visits[name].append(found)
    return visits


def visit(browser: Browser, address: str, profile: Profile) -> Visit:
    """Open a page with an empty cache, and return when its list was there."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True, has_touch=True)
    page = context.new_page()
    page.add_init_script(WATCH)
    session = context.new_cdp_session(page)
    found, requests = Visit(), watched(session)
    network = {"latency": profile.latency_ms, "downloadThroughput": profile.down, "uploadThroughput": profile.up}
    session.send("Network.emulateNetworkConditions", {"offline": False, **network})
    session.send("Emulation.setCPUThrottlingRate", {"rate": CPU_SLOWER})
    page.goto(address, wait_until="commit")
    found.list_ms = page.evaluate("window.firstList")
    found.paint_ms = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0")
    context.close()
    ended = [one for one in requests.values() if "end" in one]
    first = min(one["begin"] for one in ended)
    found.requests = [(1000 * (one["begin"] - first), 1000 * (one["end"] - first), one["bytes"], one["url"]) for one in ended]
    return found


def watched(session: CDPSession) -> dict[str, dict[str, Any]]:
    """Return a dict that is filled with the requests of a page: begin and end in seconds, and bytes on the wire."""
    found: dict[str, dict[str, Any]] = {}

    def began(event: dict[str, Any]) -> None:
        found[event["requestId"]] = {"begin": event["timestamp"], "url": event["request"]["url"]}

    def ended(event: dict[str, Any]) -> None:
        found.get(event["requestId"], {}).update(end=event["timestamp"], bytes=event["encodedDataLength"])

    session.send("Network.enable")
    session.on("Network.requestWillBeSent", began)
    session.on("Network.loadingFinished", ended)
    return found


def rows_of(network: str, visits: dict[str, list[Visit]], seed: int) -> Iterator[Row]:
    """Yield a row of the page against each of the others."""
    page = visits["page"]
    middle = sorted(page, key=lambda one: one.list_ms)[len(page) // 2]
    for begin, end, size, url in middle.needed:
        sys.stderr.write(
            f"  {begin:6.0f} to {end:6.0f} ms, {size:7,.0f} bytes  {url.partition('/')[2][1:].partition('/')[2] or '/'}\n"
        )
    for name in visits:
        if name != "page":
            more = {"network": network, "runs": len(page), **shape(page), "against_shape": shape(visits[name])}
            what = f"first list of the page on a phone, {network}"
            yield claim(what, median_ms(page), "ms", name, median_ms(visits[name]), seed, load=round(os.getloadavg()[0], 1), **more)


def median_ms(visits: Sequence[Visit]) -> float:
    """Return the median time to the list."""
    return statistics.median(one.list_ms for one in visits)


def shape(visits: Sequence[Visit]) -> dict[str, float]:
    """Return what had happened until the list was there, as medians."""
    return {
        "low_ms": round(min(one.list_ms for one in visits)),
        "high_ms": round(max(one.list_ms for one in visits)),
        "first_paint_ms": round(statistics.median(one.paint_ms for one in visits)),
        "requests": statistics.median_low([len(one.needed) for one in visits]),
        "bytes": round(statistics.median(sum(size for _, _, size, _ in one.needed) for one in visits)),
        "in_sequence": statistics.median_low([one.in_sequence for one in visits]),
    }


if __name__ == "__main__":
    sys.exit(main())
