"""Test the rate limiter against an independent count, and what else is counted by client."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.errors import ConfigError
from twotower.serving.clients import Clients, cost
from twotower.serving.rate_limits import RateLimiter
from twotower.utils.config_serving import Limits


@given(st.lists(st.floats(0, 3), max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_no_interval_lets_more_through_than_burst_and_rate(gaps: list[float], rate: int, burst: int) -> None:
    limiter, now, passed = RateLimiter(rate, burst), 0.0, []
    for gap in gaps:
        now += gap
        wait = limiter.wait_s("a", now=now)
        assert 0 <= wait <= 1 / rate + 1e-9
        if not wait:
            passed.append(now)
    for i, start in enumerate(passed):
        for j in range(i, len(passed)):
            assert j - i + 1 <= burst + rate * (passed[j] - start) + 1e-6


def test_a_client_that_waits_is_accepted_and_clients_do_not_share() -> None:
    limiter = RateLimiter(2, 1)
    assert limiter.wait_s("a", now=0) == 0 and limiter.wait_s("b", now=0) == 0
    wait = limiter.wait_s("a", now=0.1)
    assert wait == pytest.approx(0.4) and limiter.wait_s("a", now=0.1 + wait) == 0


def test_memory_of_clients_is_bounded() -> None:
    limiter = RateLimiter(1, 2, most_clients=64)
    limiter.charge("busy", 100, now=0)
    for number in range(1000):
        limiter.wait_s(str(number), 2, now=0)
    remembered = sum(limiter.wait_s(str(number), now=0) > 0 for number in range(1000))
    assert remembered <= 64 and limiter.wait_s("busy", now=0) == 99, "fuller buckets are forgotten first"


def test_processes_share_the_rate_of_a_client() -> None:
    program = """if True:
        import os
        from twotower.serving.rate_limits import RateLimiter
        limiter = RateLimiter(0.001, 300)
        for _ in range(3):
            if os.fork() == 0:
                os._exit(sum(not limiter.wait_s("a") for _ in range(200)))
        print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)))
        print(limiter.wait_s("a") > 0, limiter.wait_s("b") > 0)
    """
    passed, later = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum(map(int, passed.split())) == 300 and later == "True False"


def test_of_requests_at_the_same_moment_each_counts() -> None:
    """Processes that are interrupted in the middle of a count: a switch every few microseconds on one core."""
    program = """if True:
        import os, time
        from twotower.serving.rate_limits import RateLimiter
        class Slow(RateLimiter):
            def _take(self, place, cost, now):
                time.sleep(0)  # another process runs between the look and the count
                super()._take(place, cost, now)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        limiter = Slow(0.001, 150)
        for _ in range(4):
            if os.fork() == 0:
                os._exit(sum(not limiter.wait_s("a") for _ in range(100)))
        print(sum(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(4)))
        if os.fork() == 0:
            limiter._place("b").__enter__()
            os._exit(os.kill(os.getpid(), 9))
        os.wait()
        print(limiter.wait_s("b"))
    """
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60).stdout
    assert printed.split() == ["150", "0.0"], "the second line: a process that dies releases its lock"


def test_a_body_counts_by_its_size_before_it_is_read() -> None:
    limiter = RateLimiter(10, 300)
    assert limiter.wait_s("a", cost(1_000_000), now=0) == 0
    assert limiter.wait_s("a", cost(1_000_000), now=0) == 0, "taken while one is left"
    assert limiter.wait_s("a", cost(10), now=0) == pytest.approx((2 * cost(1_000_000) - 300 + 1) / 10)


def test_addresses_of_one_ipv6_network_are_one_client() -> None:
    clients = Clients(Limits())
    assert clients.group("2001:db8:1:2::1") == clients.group("2001:db8:1:2:ffff::9") != clients.group("2001:db8:1:3::1")
    assert clients.group("::ffff:10.0.0.7") == clients.group("10.0.0.7") != clients.group("10.0.0.8")
    assert clients.group("fe80::1%eth0") == clients.group("fe80::2%eth1")


def test_only_a_trusted_proxy_says_who_the_client_is() -> None:
    forged = ["6.6.6.6, 203.0.113.9, 10.0.0.7"]
    assert Clients(Limits()).behind("127.0.0.1", forged) == "127.0.0.1"
    clients = Clients(Limits(), ["127.0.0.1", "10.0.0.0/8"])
    assert clients.behind("127.0.0.1", forged) == "203.0.113.9", "the last that no proxy of ours has"
    assert clients.behind("198.51.100.1", forged) == "198.51.100.1"
    assert clients.behind("127.0.0.1", ["nonsense"]) == "127.0.0.1" and clients.behind("127.0.0.1", []) == "127.0.0.1"
    assert clients.behind("127.0.0.1", ["6.6.6.6", "[2001:db8::5]"]) == "2001:db8::/64"
    with pytest.raises(ConfigError, match="is not the address of a proxy"):
        Clients(Limits(), ["everyone"])


def test_counts_of_clients_end_at_nothing() -> None:
    clients = Clients(Limits(connections_per_client=2, held_bytes_per_client=10, held_bytes=25))
    assert [clients.enter("a") for _ in range(3)] == [True, True, False] and clients.enter("b")
    assert clients.hold("a", 10) and not clients.hold("a", 1) and clients.hold("b", 9) and not clients.hold("c", 9)
    for client, size in (("a", 11), ("b", 9), ("c", 9)):
        clients.release(client, size)
    for client in ("a", "a", "b"):
        clients.leave(client)
    assert clients.held_bytes == 0 and not clients._bytes and not clients._connections


def test_the_next_request_waits_for_what_was_charged() -> None:
    limiter = RateLimiter(10, 5)
    assert limiter.wait_s("a", now=0) == 0
    limiter.charge("a", 255, 0)
    assert limiter.wait_s("a", now=0) == pytest.approx((1 + 255 - 4) / 10) and limiter.wait_s("b", now=0) == 0
    assert limiter.wait_s("a", now=25.2) == 0
    free = RateLimiter(0, 5)
    free.charge("a", 255, 0)
    assert free.wait_s("a", now=0) == 0
