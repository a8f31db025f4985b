"""Test what a process does with its memory and its threads."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from twotower.utils import hardware


def test_freed_memory_is_returned_to_the_system_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[None] = []
    monkeypatch.setattr(hardware, "trim_heap", lambda: trims.append(None))

    async def for_a_moment() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hardware.keep_trimmed(every_s=0.01), 1)

    asyncio.run(for_a_moment())
    assert len(trims) > 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, a priority is that of the whole process")
def test_a_thread_in_the_background_has_one_core_and_the_lower_priority_alone() -> None:
    def seen() -> tuple[int, int]:
        return torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = seen()
    with ThreadPoolExecutor(1, initializer=hardware.yield_to_others) as background:
        assert background.submit(seen).result() == (1, before[1] + hardware.BACKGROUND_NICE)
    assert seen() == before
