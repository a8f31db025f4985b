"""Stress a server: kills, a mixed load for minutes, and overload.

    python benchmarks/serving_strength.py BUNDLE OTHER_BUNDLE [--kills 200] [--minutes 30]

Kills: while events arrive, the server is killed (SIGKILL) at a random time and started again. No acknowledged event may be lost,
and every start must succeed. Minutes: recommendations, events, reloads of two bundles and invalid requests at the same time.
Nothing may fail, and the final memory is compared with that after five minutes. Overload: many times the sustainable rate of
requests. Refusals must be fast, and later responses must be as fast as before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, claim, in_words, tell
from serving_load import ENDED, Load, Server, at_rate, closed, post, wire

GROUP = 8  # events in a request, at most
WRITERS = 4
WHILE_STARTING = 0.2  # share of the kills
FLAT_AFTER_MIN = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code: 1 if an event was lost or a request failed."""
    given = _parser().parse_args(arguments)
    sound = True

    def done(row: dict[str, Any]) -> None:
        tell(row, given.results)
        sys.stderr.write(in_words(row))

    with tempfile.TemporaryDirectory() as folder:
        if given.kills:
            options, during = (), ""
            if given.refresh_s is not None:
                options, during = ("--refresh-s", str(given.refresh_s)), f", items refreshed every {given.refresh_s:g} s"
            found = kill_often(given.bundle, Path(folder), given.kills, given.seed, options=options)
            sound = sound and not found["lost"] and not found["tracebacks"]
            what = f"acknowledged events still there after {given.kills} kills{during}"
            kept = found["acknowledged"] - found["lost"]
            more = {name: found[name] for name in ("start_s", "while_starting", "tracebacks")}
            done(claim(what, kept, "events", "acknowledged", found["acknowledged"], given.seed, **more))
        if given.minutes:
            mixed = asyncio.run(mix((given.bundle, given.other), Path(folder), given.minutes, given.seed))
            sound = sound and not mixed["failed"]
            what = f"resident memory after {given.minutes:g} minutes of mixed load"
            against = f"after {mixed['flat_after_min']:g} minutes"
            more = {name: mixed[name] for name in ("requests", "failed", "statuses", "reloads")}
            done(claim(what, mixed["last_mb"], "MB", against, mixed["first_mb"], given.seed, **more))
            crowd = asyncio.run(overload(given.bundle, Path(folder)))
            what = "99 of 100 refusals under overload"
            done(claim(what, crowd["refusal_ms"], "ms", "median answer afterwards", crowd["after_ms"], given.seed, **crowd))
    return 0 if sound else 1


def kill_often(bundle: Path, folder: Path, times: int, seed: int, events: str = "", options: Sequence[str] = ()) -> dict[str, Any]:
    """Kill the server `times` times, while events arrive or during startup; return counts of events and of starts."""
    chance, log = random.Random(seed), folder / "server.log"
    events = events or f"sqlite:{folder / 'events.sqlite'}"
    acknowledged: list[dict[str, Any]] = []
    lost, starts, checked, code, early = 0, [], 0, 0, 0
    for number in range(times + 1):
        if starts and number < times and chance.random() < WHILE_STARTING:
            with Server(bundle, events, log, "--rate", "0", *options, wait=False):
                time.sleep(chance.uniform(0.1, 1.0) * starts[-1])
            early += 1
            continue
        with Server(bundle, events, log, "--rate", "0", *options) as server:
            starts.append(server.start_s)
            if number == times:
                checked = 0  # at the end, check all events again
            lost += asyncio.run(_missing(server.port, acknowledged[checked:]))
            checked = len(acknowledged)
            if number < times:
                acknowledged += asyncio.run(_write_until_killed(server, number, chance))
            else:
                code = server.end()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    tracebacks = sum("traceback" in line or line["level"] == "error" for line in lines)
    return {
        "kills": times,
        "acknowledged": len(acknowledged),
        "lost": lost,
        "tracebacks": tracebacks + (code != 0),
        "while_starting": early,
        "start_s": round(sorted(starts)[len(starts) // 2], 3),
    }


async def _write_until_killed(server: Server, number: int, chance: random.Random) -> list[dict[str, Any]]:
    """Send events until the server dies, and return the acknowledged ones."""
    items = [item["item_id"] for item in json.loads(server.get("/v1/items?limit=20")[1])["items"]]
    acknowledged: list[dict[str, Any]] = []

    async def write(writer: int) -> None:
        async with wire(server.port) as connection:
            for group in range(1_000_000):
                ids = [f"{number}-{writer}-{group}-{i}" for i in range(1 + group % GROUP)]
                sent = [{"event_id": i, "user": f"u{writer}", "item_id": items[group % len(items)], "time_s": group} for i in ids]
                status, _ = await connection.ask(post("/v1/events", {"events": sent}))
                if status == 200:
                    acknowledged.extend(sent)

    async def kill() -> None:
        await asyncio.sleep(chance.uniform(0.02, 0.5))
        server.process.send_signal(signal.SIGKILL)

    ends = await asyncio.gather(kill(), *(write(writer) for writer in range(WRITERS)), return_exceptions=True)
    surprises = [end for end in ends if end is not None and not isinstance(end, ENDED)]
    if surprises:
        raise surprises[0]
    server.process.wait()
    return acknowledged


async def _missing(port: int, events: list[dict[str, Any]]) -> int:
    """Return the number of events that the server has lost. They are sent again; a stored one is reported as repeated."""
    missing = 0
    async with wire(port) as connection:
        for start in range(0, len(events), 1000):
            status, body = await connection.ask(post("/v1/events", {"events": events[start : start + 1000]}))
            missing += json.loads(body)["accepted"] if status == 200 else 1000
    return missing


async def mix(bundles: tuple[Path, Path], folder: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Run the mixed load for some minutes; return failures, and the memory after five minutes (or half) and at the end."""
    with Server(bundles[0], f"sqlite:{folder / 'mixed.sqlite'}", folder / "mixed.log", "--rate", "0") as server:
        return await _mix(server, bundles, minutes, seed)


async def _mix(server: Server, bundles: tuple[Path, Path], minutes: float, seed: int) -> dict[str, Any]:
    chance, end = random.Random(seed), time.monotonic() + 60 * minutes
    users = [user["user"] for user in json.loads(server.get("/v1/users?limit=100")[1])["users"]]
    found = json.loads(server.get("/v1/items?limit=100")[1])["items"]
    items, categories = [item["item_id"] for item in found], [name for item in found for name in item["categories"]]
    statuses: Counter[str] = Counter()
    failed = 0

    async def repeat(kind: str, pause_s: float, fine: set[int], make: Any) -> None:
        nonlocal failed
        async with wire(server.port) as connection:
            number = 0
            while time.monotonic() < end:
                status, body = await connection.ask(make(number))
                statuses[f"{kind} {status}"] += 1
                failed += status not in fine
                if status not in fine:
                    sys.stderr.write(f"{kind}: {status} {body[:300]!r}\n")
                number += 1
                await asyncio.sleep(pause_s * chance.uniform(0.5, 1.5))

    def ask(_: int) -> bytes:
        body = {"user": chance.choice(users), "history": [{"item_id": item} for item in chance.sample(items, 3)], "k": 20}
        where = {"filter": {"category": {"any": [chance.choice(categories)]}}} if categories and chance.random() < 0.3 else {}
        return post("/v1/recommend", body | where)

    def event(number: int) -> bytes:
        one = {"event_id": f"m{number}", "user": f"{chance.choice(users)}", "item_id": chance.choice(items)}
        return post("/v1/events", {"events": [one]})

    def bad(number: int) -> bytes:
        bodies: list[Any] = [
            {"k": 0},
            {"filter": "nonsense <"},
            {"history": [{"item_id": "unknown"}], "strict": True},
            [],
            {"near": [91, 0]},
        ]
        return post("/v1/recommend", bodies[number % len(bodies)])

    def reload(number: int) -> bytes:
        return post("/admin/reload", {"bundle": str(bundles[(number + 1) % 2])})

    memory: list[tuple[float, float]] = []

    async def watch() -> None:
        began = time.monotonic()
        while time.monotonic() < end:
            memory.append(((time.monotonic() - began) / 60, server.memory_mb()))
            await asyncio.sleep(min(5.0, 6 * minutes))

    await asyncio.gather(
        *(repeat("recommend", 0.02, {200}, ask) for _ in range(4)),
        repeat("event", 0.02, {200}, event),
        repeat("bad", 0.05, {422}, bad),
        repeat("reload", 5.0, {200}, reload),
        watch(),
    )
    code = server.end()
    after = min(FLAT_AFTER_MIN, minutes / 2)
    tail = [mb for _, mb in memory[-max(1, len(memory) // 20) :]]
    return {
        "failed": failed + (code != 0),
        "statuses": dict(statuses),
        "requests": sum(statuses.values()),
        "reloads": statuses["reload 200"],
        "flat_after_min": after,
        "first_mb": next(mb for at, mb in memory if at >= after),
        "last_mb": sum(tail) / len(tail),
    }


async def overload(bundle: Path, folder: Path, seconds: float = 5.0) -> dict[str, Any]:
    """Send many times the sustainable rate; return the latency of refusals, and that of later responses."""
    with Server(bundle, f"sqlite:{folder / 'crowd.sqlite'}", folder / "crowd.log", "--rate", "0") as server:
        items = [item["item_id"] for item in json.loads(server.get("/v1/items?limit=100")[1])["items"]]
        asked = {"requests": [{"history": [{"item_id": item}], "k": 100} for item in items] * 2}
        single = [post("/v1/recommend", {"history": [{"item_id": item}], "k": 10}) for item in items]
        crowd = await closed(server.port, [post("/v1/recommend:batch", asked)], connections=16, seconds=seconds)
        after = await at_rate(server.port, single, rate=20, seconds=3)
    refused = Load(seconds=crowd.refused_s)
    return {
        "requests": len(crowd.seconds),
        "refused": crowd.statuses.get(503, 0),
        "statuses": crowd.statuses,
        "refusal_ms": refused.ms(0.99),
        "after_ms": after.ms(0.5),
        "after_statuses": after.statuses,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("other", type=Path, help="another bundle of the same dataset, for the reloads")
    parser.add_argument("--kills", type=int, default=200, help="0 leaves them out (default: 200)")
    parser.add_argument("--refresh-s", type=float, help="between refreshes of the items during the kills (default: the server's)")
    parser.add_argument("--minutes", type=float, default=30, help="of mixed load; 0 leaves them out (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "serving_strength.jsonl", help="file the rows are appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
