"""The turns that a client's writes take."""

from __future__ import annotations

import asyncio

import pytest

from recallq import QueueFull, ServiceUnavailable
from recallq.in_turn import InTurn

AWAY = ServiceUnavailable("Redis is away")


class Road:
    """Batches that wait until each is let through, or fails."""

    def __init__(self) -> None:
        self.turns = InTurn()
        self.begun: list[int] = []
        self.gates: list[asyncio.Future[None]] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def come(self, count: int) -> None:
        for _ in range(count):
            number = len(self.tasks)
            self.gates.append(asyncio.get_running_loop().create_future())
            self.tasks.append(asyncio.create_task(self._go(number)))
        await self.settle()

    async def _go(self, number: int) -> None:
        async with self.turns.turn():
            self.begun.append(number)
            await self.gates[number]

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
def road() -> Road:
    return Road()


async def test_one_after_the_other(road: Road) -> None:
    await road.come(4)
    for number in range(4):
        assert road.begun == list(range(number + 1))
        road.gates[number].set_result(None)
        await road.settle()
    await asyncio.gather(*road.tasks)


async def test_one_that_is_refused_lets_the_next_go_and_no_more(road: Road) -> None:
    await road.come(3)
    road.gates[0].set_exception(QueueFull("full", retry_after=1.0))
    await road.settle()
    assert road.begun == [0, 1]
    for gate in road.gates[1:]:
        gate.set_result(None)
    ended = await asyncio.gather(*road.tasks, return_exceptions=True)
    assert [type(each) for each in ended] == [QueueFull, type(None), type(None)]


async def test_in_an_outage_those_who_wait_go_at_once(road: Road) -> None:
    await road.come(5)
    road.gates[0].set_exception(AWAY)
    await road.settle()
    assert sorted(road.begun) == [0, 1, 2, 3, 4]
    await road.come(2)  # who comes now does not know of it
    assert sorted(road.begun) == [0, 1, 2, 3, 4]
    road.gates[2].set_exception(AWAY)
    await road.settle()
    assert sorted(road.begun) == [0, 1, 2, 3, 4, 5, 6]
    for gate in (road.gates[1], *road.gates[3:]):
        gate.set_result(None)
    await asyncio.gather(*road.tasks, return_exceptions=True)
    await road.come(2)
    assert road.begun[-1] == 7, "in turn again"
    for gate in road.gates[7:]:
        gate.set_result(None)
    await asyncio.gather(*road.tasks[7:])


async def test_one_that_is_cancelled_holds_up_nobody(road: Road) -> None:
    await road.come(3)
    road.tasks[0].cancel()
    await road.settle()
    assert road.begun == [0, 1]
    road.tasks[1].cancel()
    road.gates[2].set_result(None)
    await road.tasks[2]
