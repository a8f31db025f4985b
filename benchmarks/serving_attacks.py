"""Attack a server on this machine with one hostile client, and measure what others notice.

    python benchmarks/serving_attacks.py BUNDLE [--seconds 24] [--only NAME …] [--mixed-minutes 30]

Each attack runs in a process of its own, from an address of its own in 127.0.1.0/24, without a key. A well-behaved client on
127.0.0.2 asks for recommendations and for readiness ten times a second. Before each attack, the same client is measured for as long
without it.

One row per kind of attack, whose attacks take turns on a new server: the client's 99th percentile beside that without an attack,
its failures, the growth of the server's memory, and the seconds until everything is answered as before. `processor_ms` is the 99th
percentile of the processor time that the server used, for whomever, from a request of the client to its response: what the client
would wait for on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common import RESULTS, claim, in_words, tell
from hostile import ATTACKS, KINDS, ask, run_attack
from serving_load import Server

POLITE = "127.0.0.2"
WANTED_MS, WANTED_MB, WANTED_S = 100, 100, 2


@dataclass
class Noticed:
    """Effect of an attack on a well-behaved client and on the server's memory.

    Attributes
    ----------
    seconds
        Time of each answered request.
    failures
        Status or error of each request that was not answered with 200.
    processor_s
        Processor seconds of the server, all threads, from each of these requests to its response.
    grown_mb
        Peak memory during the attack minus that before.
    recovered_s
        Seconds from the end of the attack until both requests were answered with 200 within 100 ms; infinite if they never were.
    """

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    grown_mb: float = 0.0
    recovered_s: float = float("inf")

    def ms(self, share: float) -> float:
        """Return a quantile of the latency in ms."""
        return quantile_ms(self.seconds, share)

    def add(self, other: Noticed) -> None:
        """Add the effect of another attack."""
        self.seconds += other.seconds
        self.failures += other.failures
        self.processor_s += other.processor_s
        self.grown_mb = max(self.grown_mb, other.grown_mb)
        self.recovered_s = max(self.recovered_s, other.recovered_s)


def quantile_ms(seconds: Sequence[float], share: float) -> float:
    """Return a quantile in ms; infinite if there is no value."""
    ordered = sorted(seconds) or [float("inf")]
    return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def polite(server: Server, noticed: Noticed, pause_s: float = 0.05) -> None:
    """Ask for recommendations and for readiness once."""
    for method, path, body in (("POST", "/v1/recommend", b'{"k": 10}'), ("GET", "/health/ready", None)):
        began, used = time.perf_counter(), server.processor_s()
        try:
            status, _ = ask(server.port, method, path, body, POLITE)
            if status == 200:
                noticed.seconds.append(time.perf_counter() - began)
                noticed.processor_s.append(server.processor_s() - used)
            else:
                noticed.failures.append(str(status))
        except OSError as error:
            noticed.failures.append(type(error).__name__)
        time.sleep(pause_s)


@contextmanager
def attacking(names: Sequence[str], port: int, seconds: float) -> Iterator[None]:
    """Run attacks in separate processes while the block runs, and stop them at its end."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_attack, args=(name, port, seconds), daemon=True) for name in names]
    for process in processes:
        process.start()
    try:
        yield
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"an attack failed: {', '.join(names)}")
    finally:
        for process in processes:
            process.kill()
            process.join()


def watch(server: Server, names: Sequence[str], seconds: float) -> Noticed:
    """Attack a server and return the effect on others."""
    noticed, warm = Noticed(), Noticed()
    for _ in range(20):
        polite(server, warm)
    before = server.memory_mb()
    with attacking(names, server.port, seconds + 5):
        time.sleep(1.0)  # the processes start
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            polite(server, noticed)
            noticed.grown_mb = max(noticed.grown_mb, server.memory_mb() - before)
    ended = time.monotonic()
    while time.monotonic() < ended + 20:
        after = Noticed()
        polite(server, after, 0.0)
        if not after.failures and after.ms(1) < 100:
            noticed.recovered_s = time.monotonic() - ended
            break
    return noticed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; returns the exit code: 1 if a limit was exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=24, help="of each kind of attack (default: 24)")
    parser.add_argument("--only", nargs="*", choices=list(ATTACKS), help="attacks to run, each for so long (default: all kinds)")
    parser.add_argument("--mixed-minutes", type=float, default=0, help="all attacks in turn, three at once, for so long")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving_attacks.jsonl", help="file the rows are appended to")
    given = parser.parse_args(arguments)
    kinds: Mapping[str, Sequence[str]] = {name: (name,) for name in given.only} if given.only else KINDS
    sound = True
    for kind, names in kinds.items() if given.only or not given.mixed_minutes else ():
        with warm_server(given.bundle) as server:
            calm, noticed = Noticed(), Noticed(recovered_s=0.0)
            for name in names:  # in turn, so that the load of the machine affects both
                calm.add(unattacked(server, given.seconds / len(names)))
                noticed.add(watch(server, [name], given.seconds / len(names)))
            sound &= note(kind, calm, noticed, given.results)
    if given.mixed_minutes:
        with warm_server(given.bundle) as server:
            calm = unattacked(server, 30)
            what = f"all of them mixed for {given.mixed_minutes:g} minutes"
            sound &= note(what, calm, mixed(server, given.mixed_minutes), given.results)
    return 0 if sound else 1


@contextmanager
def warm_server(bundle: Path) -> Iterator[Server]:
    """Yield a new server, of which no client has used up its rate, after its first answers, which are slow."""
    with tempfile.TemporaryDirectory() as folder, Server(bundle, f"sqlite:{folder}/e.sqlite", Path(folder) / "log") as server:
        for _ in range(100):
            polite(server, Noticed())
        yield server


def unattacked(server: Server, seconds: float) -> Noticed:
    """Return the latencies of the well-behaved client alone."""
    noticed, end = Noticed(recovered_s=0.0), time.monotonic() + seconds
    while time.monotonic() < end:
        polite(server, noticed)
    return noticed


def note(kind: str, calm: Noticed, noticed: Noticed, results: Path) -> bool:
    """Print and append a row. Return False if a limit was exceeded."""
    more = {
        "p50_ms": round(noticed.ms(0.5), 1),
        "p50_unattacked_ms": round(calm.ms(0.5), 1),
        "processor_ms": round(quantile_ms(noticed.processor_s, 0.99), 1),
        "processor_unattacked_ms": round(quantile_ms(calm.processor_s, 0.99), 1),
        "worst_ms": round(noticed.ms(1), 1),
        "worst_unattacked_ms": round(calm.ms(1), 1),
        "answered": len(noticed.seconds),
        "failures": {one: noticed.failures.count(one) for one in sorted(set(noticed.failures))},
        "grown_mb": round(noticed.grown_mb, 1),
        "recovered_s": round(noticed.recovered_s, 2),
        "load_average": round(os.getloadavg()[0], 1),
    }
    what = f"others' 99th percentile under attack: {kind}"
    row = claim(what, noticed.ms(0.99), "ms", "the same client without an attack", calm.ms(0.99), 0, **more)
    tell(row, results)
    sys.stderr.write(in_words(row))
    quick = noticed.ms(0.99) <= WANTED_MS and noticed.recovered_s <= WANTED_S
    return not noticed.failures and quick and noticed.grown_mb <= WANTED_MB


def mixed(server: Server, minutes: float) -> Noticed:
    """Run three attacks at a time, in turn, until the time is over; compare memory with that at the beginning."""
    total, end, chance = Noticed(recovered_s=0.0), time.monotonic() + 60 * minutes, random.Random(3)
    before = server.memory_mb()
    while time.monotonic() < end:
        names = chance.sample(list(ATTACKS), 3)
        one = watch(server, names, 10)
        one.grown_mb = server.memory_mb() - before
        sys.stderr.write(
            f"{', '.join(names)}: p99 {one.ms(0.99):.0f} ms, memory {one.grown_mb:+.0f} MB, {len(one.failures)} failures\n"
        )
        total.add(one)
    return total


if __name__ == "__main__":
    sys.exit(main())
