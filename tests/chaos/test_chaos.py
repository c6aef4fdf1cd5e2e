"""The short form of the chaos run: all kinds of faults, a few times each."""

from __future__ import annotations

import pytest

from tests.chaos.driver import Options, run

pytestmark = [
    # Against hanging: how long a run takes depends on the machine. What it must keep to is in it.
    pytest.mark.timeout(600),
    # Where a connection is cut as it is being made, redis-py leaves its socket to the collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


class TestChaos:
    """In one class, for classes are run side by side, and two of these would starve each other."""

    async def test_a_store(self) -> None:
        await check("flaky_redis", "poison-permanent", "poison-kill", "poison-transient")

    async def test_a_store_that_takes_two_steps(self) -> None:
        await check("flaky_indexed", "poison-permanent", "poison-kill", "poison-transient")

    async def test_an_extractor(self) -> None:
        # Of a user's extractions, one that is tried again for long would hold up the others.
        await check("flaky_extractor", "poison-permanent", "poison-kill")

    async def test_reme(self) -> None:
        """The library itself, which a worker needs seconds to start with."""
        await check("reme_personal", jobs=600, rate=20, fault_every=3)


async def check(
    backend: str, *poisons: str, jobs: int = 2000, rate: float = 100, fault_every: float = 1.5
) -> None:
    report = await run(
        Options(
            backend=backend,
            poisons=list(poisons),
            jobs=jobs,
            seed=1,
            users=25,
            clients=3,
            agents=8,
            rate=rate,
            fault_every=fault_every,
            longest_freeze=12,
            patience=60,
        )
    )
    print(report)
    assert report.ok, report
