"""Test the worker thread: batching, one result or error for each argument, and bounded waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest
import torch

from twotower.errors import BusyError, RequestError
from twotower.serving import batching
from twotower.serving.batching import Batcher

SOON = 60.0


class Doubles:
    """Doubles numbers, rejects negative ones, fails on zero; can be blocked."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()
        self.held = threading.Event()

    def work(self, numbers: Sequence[int]) -> list[int | RequestError]:
        self.held.set()
        assert self.open.wait(10)
        self.batches.append(list(numbers))
        return [RequestError(f"{number} is negative") if number < 0 else 2 * number // (number and 1) for number in numbers]


async def gathered(batcher: Batcher, doubles: Doubles, numbers: Sequence[int]) -> list[object]:
    """Return the results of numbers that all wait while the first is blocked."""
    doubles.open.clear()
    first = batcher.submit(doubles.work, [100], time.perf_counter() + SOON)
    assert await asyncio.to_thread(doubles.held.wait, 10)
    rest = [batcher.submit(doubles.work, [number], time.perf_counter() + SOON)[0] for number in numbers]
    doubles.open.set()
    return list(await asyncio.gather(*first, *rest, return_exceptions=True))[1:]


def test_what_waits_together_is_done_together_in_order() -> None:
    doubles, told = Doubles(), []
    batcher = Batcher("numbers", max_waiting=100, max_batch=4, on_batch=lambda size, _: told.append(size))
    assert asyncio.run(gathered(batcher, doubles, range(1, 11))) == [2 * number for number in range(1, 11)]
    assert doubles.batches == [[100], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]] and told == [1, 4, 4, 2]
    batcher.close()
    assert not batcher.alive


def test_a_request_error_is_raised_for_its_own_request_only() -> None:
    doubles = Doubles()
    batcher = Batcher("numbers", max_waiting=100, max_batch=8)
    found = asyncio.run(gathered(batcher, doubles, [1, -5, 3]))
    assert found[0] == 2 and found[2] == 6 and isinstance(found[1], RequestError) and "-5" in str(found[1])
    batcher.close()


def test_a_defect_is_raised_for_all_requests_and_the_thread_goes_on() -> None:
    doubles = Doubles()
    batcher = Batcher("numbers", max_waiting=100, max_batch=8)
    assert all(isinstance(one, ZeroDivisionError) for one in asyncio.run(gathered(batcher, doubles, [1, 0, 3])))
    assert asyncio.run(gathered(batcher, doubles, [4])) == [8]
    batcher.close()


def test_other_work_is_not_mixed_in_and_keeps_its_turn() -> None:
    one, other = Doubles(), Doubles()
    batcher = Batcher("numbers", max_waiting=100, max_batch=8)

    async def ask() -> list[object]:
        one.open.clear()
        futures = batcher.submit(one.work, [7], time.perf_counter() + SOON)
        await asyncio.to_thread(one.held.wait, 10)
        for who, number in ((one, 1), (one, 2), (other, 3), (one, 4)):
            futures += batcher.submit(who.work, [number], time.perf_counter() + SOON)
        one.open.set()
        return list(await asyncio.gather(*futures))

    assert asyncio.run(ask()) == [14, 2, 4, 6, 8]
    assert (one.batches, other.batches) == ([[7], [1, 2], [4]], [[3]])
    batcher.close()


def test_more_requests_than_fit_in_the_queue_are_refused_completely() -> None:
    doubles = Doubles()
    batcher = Batcher("numbers", max_waiting=3, max_batch=8)

    async def ask() -> list[object]:
        doubles.open.clear()
        futures = batcher.submit(doubles.work, [1], time.perf_counter() + SOON)
        await asyncio.to_thread(doubles.held.wait, 10)
        futures += batcher.submit(doubles.work, [2, 3], time.perf_counter() + SOON)
        with pytest.raises(BusyError, match="Too many numbers are waiting: at most 3"):
            batcher.submit(doubles.work, [4, 5], time.perf_counter() + SOON)
        futures += batcher.submit(doubles.work, [6], time.perf_counter() + SOON)
        assert batcher.waiting == 3
        doubles.open.set()
        return list(await asyncio.gather(*futures))

    assert asyncio.run(ask()) == [2, 4, 6, 12]
    batcher.close()


def test_what_comes_too_late_is_not_begun() -> None:
    doubles = Doubles()
    batcher = Batcher("numbers", max_waiting=100, max_batch=8)

    async def ask() -> list[object]:
        now = time.perf_counter()
        futures = batcher.submit(doubles.work, [1], now - 1) + batcher.submit(doubles.work, [2], now + SOON)
        return list(await asyncio.gather(*futures, return_exceptions=True))

    late, timely = asyncio.run(ask())
    assert isinstance(late, BusyError) and timely == 4 and doubles.batches == [[2]]
    batcher.close()


def test_what_would_come_too_late_by_the_pace_so_far_is_refused_at_once() -> None:
    doubles = Doubles()
    batcher = Batcher("numbers", max_waiting=100, max_batch=1)

    async def ask() -> list[object]:
        asyncio.get_running_loop().call_later(0.2, doubles.open.set)
        await asyncio.gather(*hold())  # one takes 0.2 s: that is the pace
        futures = hold()
        await asyncio.to_thread(doubles.held.wait, 10)
        futures += batcher.submit(doubles.work, [2], time.perf_counter() + SOON)
        with pytest.raises(BusyError, match="before the deadline"):
            batcher.submit(doubles.work, [3, 4, 5], time.perf_counter() + 0.5)
        futures += batcher.submit(doubles.work, [6, 7, 8], time.perf_counter() + SOON)
        doubles.open.set()
        return list(await asyncio.gather(*futures))

    def hold() -> list[asyncio.Future[object]]:
        doubles.open.clear()
        doubles.held.clear()
        return batcher.submit(doubles.work, [1], time.perf_counter() + SOON)

    assert asyncio.run(ask()) == [2, 4, 12, 14, 16]
    batcher.close()


def test_closing_finishes_what_waits_and_takes_no_more() -> None:
    doubles = Doubles()
    batcher = Batcher("numbers", max_waiting=100, max_batch=2)

    async def ask() -> list[object]:
        futures = batcher.submit(doubles.work, [1, 2, 3], time.perf_counter() + SOON)
        await asyncio.to_thread(batcher.close)
        with pytest.raises(BusyError):
            batcher.submit(doubles.work, [4], time.perf_counter() + SOON)
        return list(await asyncio.gather(*futures))

    assert asyncio.run(ask()) == [2, 4, 6]


def test_who_has_gone_is_not_waited_for() -> None:
    doubles = Doubles()
    batcher = Batcher("numbers", max_waiting=100, max_batch=8)

    async def ask() -> None:
        gone, stays = batcher.submit(doubles.work, [1, 2], time.perf_counter() + SOON)
        gone.cancel()
        assert await stays == 4

    asyncio.run(ask())
    batcher.close()


@pytest.mark.parametrize("heavy", [False, True])
def test_heavy_work_computes_on_one_core_and_returns_memory(monkeypatch: pytest.MonkeyPatch, heavy: bool) -> None:
    trims: list[None] = []
    monkeypatch.setattr(batching, "trim_heap", lambda: trims.append(None))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cores: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", cores.append)
    doubles = Doubles()
    batcher = Batcher("numbers", max_waiting=100, max_batch=4, heavy=heavy)
    assert asyncio.run(gathered(batcher, doubles, range(1, 11))) == [2 * number for number in range(1, 11)]
    batcher.close()
    assert cores == [1 if heavy else 2] and len(trims) == (1 if heavy else 0), "at most once in half a second"
