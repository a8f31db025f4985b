"""Test the rate limiter against an independent count, and the key check."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.errors import ConfigError, DataError
from twotower.serving.limits import Limits, RateLimiter, is_key
from twotower.serving.server import KEY_VARIABLE, Options, read_key, serve


@given(st.lists(st.floats(0, 3), max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_no_interval_lets_more_through_than_burst_and_rate(gaps: list[float], rate: int, burst: int) -> None:
    limiter, now, passed = RateLimiter(rate, burst), 0.0, []
    for gap in gaps:
        now += gap
        wait = limiter.wait_s("a", now)
        assert 0 <= wait <= 1 / rate + 1e-9
        if not wait:
            passed.append(now)
    for i, start in enumerate(passed):
        for j in range(i, len(passed)):
            assert j - i + 1 <= burst + rate * (passed[j] - start) + 1e-6


def test_a_client_that_waits_is_accepted_and_clients_do_not_share() -> None:
    limiter = RateLimiter(2, 1)
    assert limiter.wait_s("a", 0) == 0 and limiter.wait_s("b", 0) == 0
    wait = limiter.wait_s("a", 0.1)
    assert wait == pytest.approx(0.4) and limiter.wait_s("a", 0.1 + wait) == 0


def test_memory_of_clients_is_bounded() -> None:
    limiter = RateLimiter(1, 1, most_clients=10)
    for number in range(1000):
        limiter.wait_s(str(number), 0)
    assert len(limiter._buckets) == 10 and limiter.wait_s("999", 0) > 0


def test_only_the_whole_key_is_the_key() -> None:
    assert is_key("schlüssel", "schlüssel")
    assert not any(is_key(given, "schlüssel") for given in ("", "schlüsse", "schlüssel ", "\ud800"))


def test_the_key_comes_from_the_file_else_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, "e" * 20)
    (tmp_path / "key").write_text("f" * 20 + "\n")
    assert read_key(None) == "e" * 20 and read_key(tmp_path / "key") == "f" * 20
    (tmp_path / "key").write_text("short")
    with pytest.raises(ConfigError, match="at least 16 are required"):
        read_key(tmp_path / "key")


def test_settings_that_do_not_fit_are_refused_before_anything_starts(tmp_path: Path) -> None:
    given = {"bundle": tmp_path, "host": "127.0.0.1", "port": 0, "events": None, "api_key_file": None, "limits": Limits()}
    with pytest.raises(ConfigError, match="needs both"):
        serve(Options(**given, tls_cert=tmp_path, tls_key=None))
    with pytest.raises(ConfigError, match="Expected a certificate and its key as PEM files"):
        serve(Options(**given, tls_cert=tmp_path / "nope", tls_key=tmp_path / "nope"))
    with pytest.raises(DataError, match="is not a bundle"):
        serve(Options(**given, tls_cert=None, tls_key=None))


def test_the_next_request_waits_for_what_was_charged() -> None:
    limiter = RateLimiter(10, 5)
    assert limiter.wait_s("a", 0) == 0
    limiter.charge("a", 255, 0)
    assert limiter.wait_s("a", 0) == pytest.approx((1 + 255 - 4) / 10) and limiter.wait_s("b", 0) == 0
    assert limiter.wait_s("a", 25.2) == 0
    free = RateLimiter(0, 5)
    free.charge("a", 255, 0)
    assert free.wait_s("a", 0) == 0
