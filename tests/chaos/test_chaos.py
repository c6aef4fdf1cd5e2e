"""The short form of the chaos run: all kinds of faults, a few times each."""

from __future__ import annotations

import pytest

from tests.chaos.driver import Options, run

pytestmark = [
    pytest.mark.timeout(180),
    # Where a connection is cut as it is being made, redis-py leaves its socket to the collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


class TestAStore:
    """Each in a class of its own, so that they can run at the same time."""

    async def test_nothing_is_lost_doubled_misplaced_or_brought_back(self) -> None:
        await check("flaky_redis", "poison-permanent", "poison-kill", "poison-transient")


class TestAStoreThatTakesTwoSteps:
    async def test_nothing_is_lost_doubled_misplaced_or_brought_back(self) -> None:
        await check("flaky_indexed", "poison-permanent", "poison-kill", "poison-transient")


class TestAnExtractor:
    async def test_nothing_is_lost_doubled_misplaced_or_brought_back(self) -> None:
        # Of a user's extractions, one that is tried again for long would hold up the others.
        await check("flaky_extractor", "poison-permanent", "poison-kill")


async def check(backend: str, *poisons: str) -> None:
    report = await run(
        Options(
            backend=backend,
            poisons=list(poisons),
            jobs=2000,
            seed=1,
            users=25,
            clients=3,
            agents=8,
            rate=100,
            fault_every=1.5,
            longest_freeze=12,
            patience=60,
        )
    )
    print(report)
    assert report.ok, report
