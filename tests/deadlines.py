"""Deadlines of asyncio that pass when a test says so, and never because the machine is busy."""

import asyncio

import pytest


class Deadlines:
    """Stands in for asyncio.timeout. ``limits_s`` has the seconds of every call."""

    def __init__(self) -> None:
        self.limits_s: list[float | None] = []
        self._of_task: dict[asyncio.Task[object] | None, asyncio.Timeout] = {}

    def __call__(self, seconds: float | None) -> asyncio.Timeout:
        self.limits_s.append(seconds)
        limit = asyncio.Timeout(None)
        self._of_task[asyncio.current_task()] = limit
        return limit

    async def pass_now(self) -> None:
        """Lets the newest deadline of the present task pass. Does not return."""
        self._of_task[asyncio.current_task()].reschedule(asyncio.get_running_loop().time())
        await asyncio.sleep(3600)


@pytest.fixture
def deadlines(monkeypatch: pytest.MonkeyPatch) -> Deadlines:
    stand_in = Deadlines()
    monkeypatch.setattr(asyncio, "timeout", stand_in)
    return stand_in
