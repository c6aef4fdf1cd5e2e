"""The short form of the chaos run: all kinds of faults, a few times each."""

from __future__ import annotations

import pytest

from tests.chaos.driver import Options, run


# Where a connection is cut as it is being made, redis-py leaves its socket to the collector.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("backend", ["flaky_redis", "flaky_indexed", "flaky_extractor"])
async def test_nothing_is_lost_doubled_misplaced_or_brought_back(backend: str) -> None:
    poisons = ["poison-permanent", "poison-kill"]
    if backend != "flaky_extractor":
        # Of a user's extractions, one that is tried again for long would hold up the others.
        poisons.append("poison-transient")
    report = await run(
        Options(
            backend=backend,
            poisons=poisons,
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
