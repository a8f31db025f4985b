"""Test what a process does with its memory."""

from __future__ import annotations

import asyncio

import pytest

from twotower.utils import hardware


def test_freed_memory_is_returned_to_the_system_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[None] = []
    monkeypatch.setattr(hardware, "trim_heap", lambda: trims.append(None))

    async def for_a_moment() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hardware.keep_trimmed(every_s=0.01), 1)

    asyncio.run(for_a_moment())
    assert len(trims) > 2
