"""One chaos run: load and faults together, then quiet, then the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recallq import MemoryClient, ServiceUnavailable, UnknownJob
from recallq.contract import JobState, Lane
from recallq.embedded import EmbeddedRedis
from recallq.errors import JobError
from tests.chaos.agents import Agents, Pace, World
from tests.chaos.checker import UNKNOWN, Checker, Kind, Violation
from tests.chaos.faults import Fault, Faults, keep_every_write
from tests.chaos.fleet import Fleet
from tests.chaos.history import Call, Journal, read_journals
from tests.chaos.leftovers import leftovers
from tests.chaos.llm import is_needed, model_server
from tests.chaos.weather import FAIR, set_weather
from tests.support import redis_at

NAMESPACE = "chaos"

_WORKER_SETTINGS = {
    "visibility_timeout": "10",
    "job_timeout": "4",
    "retry_attempts": "12",
    "slow_attempts": "12",
    "retry_base": "0.1",
    "retry_cap": "2",
    "result_expires": str(6 * 3600),
    "slow_timeout": "4",
    "slow_patience": "2",
}
_LAST_CALLS = 75.0
"""Longest time that calls may take to end once no more are made."""
_ASKING_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Options:
    jobs: int
    seed: int
    backend: str = "flaky_redis"
    users: int = 200
    sessions: int = 4
    workers: int = 3
    clients: int = 4
    producers: int = 1
    agents: int = 16
    """Per client."""
    rate: float = 200.0
    """Jobs per second, all clients together."""
    minutes_limit: float | None = None
    """After so long no more jobs are submitted."""
    faults: Sequence[Fault] = tuple(Fault)
    fault_every: float = 3.0
    """Seconds from one fault to the next, on average."""
    longest_freeze: float = 15.0
    weather: dict[str, float] = field(default_factory=lambda: dict(FAIR))
    poisons: Sequence[str] = ("poison-permanent", "poison-transient", "poison-kill")
    """To be dealt out in turn, as many as there are."""
    patience: float = 120.0
    """Seconds in which everything must have settled once the faults are over."""
    keep: bool = False
    """Leave the run's directory behind in any case."""

    @property
    def call_timeout(self) -> float:
        """Of calls that wait for their answer, in seconds. What an extractor does for a user waits
        for what comes before, however often that has to be tried again."""
        return 20.0 if self.backend in ("flaky_redis", "flaky_indexed") else 60.0


@dataclass(slots=True)
class Report:
    """What a run did and what came of it."""

    seed: int
    directory: Path
    jobs: int = 0
    seconds: float = 0.0
    """For how long jobs were submitted."""
    quiet_after: float | None = None
    """Seconds from the last fault until everything had settled; None if it never did."""
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.violations and not self.orphans and self.quiet_after is not None

    def __str__(self) -> str:
        kinds = Counter(violation.kind for violation in self.violations)
        speed = self.jobs / max(self.seconds, 0.001)
        lines = [
            f"seed {self.seed}: {self.jobs:,} jobs in {self.seconds:.0f} s ({speed:,.0f}/s)",
            *(f"  {number:7,} {what}" for what, number in sorted(self.outcomes.items())),
            "faults",
            *(f"  {number:7,} {what}" for what, number in sorted(self.faults.items())),
            *(f"  {number:7,} ended by itself: {what}" for what, number in self.exits.items()),
            "recovery of what a killed worker held: " + _spread(self.recoveries),
            "all settled "
            + (f"{self.quiet_after:.1f} s after the last fault" if self.quiet_after else "NEVER"),
            "violations",
            *(f"  {kinds[kind]:7,} {kind}" for kind in Kind),
            f"  {len(self.orphans):7,} orphans",
        ]
        if not self.ok:
            shown: Counter[Kind] = Counter()
            for violation in self.violations:
                shown[violation.kind] += 1
                if shown[violation.kind] <= 3:
                    lines.append(str(violation))
            lines += [f"ORPHAN: {name}" for name in self.orphans[:10]]
            lines.append(f"journals, logs and data are in {self.directory}")
        return "\n".join(lines)


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "nothing was held"
    ordered = sorted(seconds)
    return (
        f"p50 {ordered[len(ordered) // 2]:.1f} s, max {ordered[-1]:.1f} s, of {len(ordered)} kills"
    )


async def run(options: Options) -> Report:
    """Runs the chaos. Leaves a directory behind if anything was wrong."""
    directory = Path(tempfile.mkdtemp(prefix="recallq-chaos-"))
    (directory / "journals").mkdir()
    report = Report(options.seed, directory)
    server = EmbeddedRedis(directory / "redis")
    await asyncio.to_thread(server.start)
    log = logging.FileHandler(directory / "clients.log")
    logging.getLogger("recallq").addHandler(log)
    weather = directory / "weather.json"
    set_weather(weather, {})
    try:
        await keep_every_write(server)
        async with contextlib.AsyncExitStack() as stack:
            variables: dict[str, str] = {}
            if is_needed(options.backend):
                chance = random.Random(f"{options.seed}-llm")
                variables = stack.enter_context(model_server(weather, chance))
            await _Run(options, server, report, weather, variables).go()
    finally:
        await asyncio.to_thread(server.stop)
        logging.getLogger("recallq").removeHandler(log)
        log.close()
    if report.ok and not options.keep:
        shutil.rmtree(directory)
    return report


class _Run:
    def __init__(
        self,
        options: Options,
        server: EmbeddedRedis,
        report: Report,
        weather: Path,
        variables: dict[str, str],
    ) -> None:
        """`variables` are for workers, besides their settings."""
        self._options = options
        self._server = server
        self._report = report
        self._directory = report.directory
        share = options.rate / (options.clients + options.producers)
        self._fleet = Fleet(
            self._directory,
            url=server.url,
            namespace=NAMESPACE,
            workers=options.workers,
            producers=options.producers,
            worker_settings={
                **_WORKER_SETTINGS,
                # What a library does for a job takes a busy machine its time.
                **({"slow_timeout": "10"} if is_needed(options.backend) else {}),
                "backend": options.backend,
            },
            variables=variables,
            producer_arguments=[
                f"--journals={self._directory / 'journals'}",
                f"--seed={options.seed}",
                f"--users={options.users}",
                f"--sessions={options.sessions}",
                f"--agents={options.agents}",
                f"--rate={share}",
                f"--call-timeout={options.call_timeout}",
            ],
            weather=weather,
        )
        self._faults = Faults(
            self._fleet,
            server,
            namespace=NAMESPACE,
            weather_file=weather,
            weather=options.weather,
            kinds=options.faults,
            every=options.fault_every,
            longest_freeze=options.longest_freeze,
            chance=random.Random(f"{options.seed}-faults"),
        )
        # What producers do in their own processes counts as well.
        here = options.clients / (options.clients + options.producers)
        self._pace = Pace(options.rate * here, int(options.jobs * here))

    async def go(self) -> None:
        tending: asyncio.Task[None] | None = None
        try:
            await self._fleet.start()
            tending = asyncio.create_task(self._fleet.tend())
            began = time.monotonic()
            await self._make_chaos()
            self._report.seconds = time.monotonic() - began
            last_fault = time.monotonic()
            if await self._quiet():
                self._report.quiet_after = time.monotonic() - last_fault
            calls = await self._take_stock()
        finally:
            if tending is not None:
                tending.cancel()
                await asyncio.gather(tending, return_exceptions=True)
            await self._fleet.stop()
        self._judge(calls, began)

    # --- chaos ----------------------------------------------------------------------------------

    async def _make_chaos(self) -> None:
        """Load and faults, until there are no jobs left."""
        striking = asyncio.create_task(self._faults.strike())
        async with contextlib.AsyncExitStack() as stack:
            load = asyncio.create_task(self._load(stack))
            limit = self._options.minutes_limit
            done, _ = await asyncio.wait([load], timeout=limit and limit * 60)
            if not done:
                self._pace.finish()
            striking.cancel()
            await asyncio.gather(striking, return_exceptions=True)
            # A fault that was cut short may have left Redis down.
            await asyncio.to_thread(self._server.start)
            await keep_every_write(self._server)
            await self._faults.calm_down()
            # Calls that do not end are left without one in their journal, where they are found.
            _, pending = await asyncio.wait([load], timeout=_LAST_CALLS)
            for task in pending:
                task.cancel()
            await asyncio.gather(load, return_exceptions=bool(pending))
            await self._fleet.stop_producers()

    async def _load(self, stack: contextlib.AsyncExitStack) -> None:
        options = self._options
        world = World(options.users, options.sessions, options.call_timeout)
        world.poisons = list(options.poisons)
        # The last of them well before the end: poison takes its time to die.
        world.poison_every = options.jobs // (4 * max(1, len(world.poisons)))
        all_agents = []
        for number in range(options.clients):
            journal = stack.enter_context(Journal(self._directory / "journals", f"c{number}"))
            memory = await stack.enter_async_context(self._client())
            chance = random.Random(f"{options.seed}-c{number}")
            all_agents.append(Agents(memory, journal, world, chance))
        for agents in all_agents:
            agents.others = all_agents
        await asyncio.gather(
            *(agents.work(self._pace) for agents in all_agents for _ in range(options.agents))
        )

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[MemoryClient]:
        """A client of this run, as soon as Redis answers."""
        while True:
            memory = MemoryClient(self._server.url, namespace=NAMESPACE, max_page_size=100_000)
            try:
                await memory.start()
            except ServiceUnavailable:
                await asyncio.sleep(0.1)
            else:
                break
        try:
            yield memory
        finally:
            await memory.stop()

    # --- quiet ----------------------------------------------------------------------------------

    async def _quiet(self) -> bool:
        """Whether everything settles, and nothing is left over, in time."""
        deadline = time.monotonic() + self._options.patience
        async with self._client() as memory, redis_at(self._server.url) as redis:
            while time.monotonic() < deadline:
                outstanding = (await memory.transport.fleet()).outstanding
                self._report.orphans = await leftovers(redis, NAMESPACE)
                if not outstanding and not self._report.orphans:
                    return True
                await asyncio.sleep(0.5)
        return False

    async def _take_stock(self) -> list[Call]:
        """Every call there was, with the state of its job, and what every user sees in the end."""
        calls = read_journals(self._directory / "journals")
        async with self._client() as memory:
            slots = asyncio.Semaphore(_ASKING_AT_ONCE)
            options = self._options

            async def ask(call: Call) -> None:
                assert call.job_id is not None
                async with slots:
                    handle = memory.handle(call.job_id)
                    try:
                        call.state = (await handle.status()).value
                        if call.state in (JobState.FAILED, JobState.DEAD):
                            await handle.result(timeout=options.call_timeout)
                    except UnknownJob:
                        call.state = UNKNOWN
                    except JobError as error:
                        call.code = error.code
                    if call.state == JobState.SUCCEEDED and call.settled is None:
                        call.settled = time.monotonic()

            await asyncio.gather(*(ask(call) for call in calls if call.job_id is not None))
            with Journal(self._directory / "journals", "last") as journal:
                world = World(options.users, options.sessions, options.call_timeout)
                agents = Agents(memory, journal, world, random.Random(0))
                for user in range(self._options.users):
                    calls.append(await agents.read(f"u{user}", None, Lane.LIVE))
        return calls

    # --- the verdict ----------------------------------------------------------------------------

    def _judge(self, calls: list[Call], began: float) -> None:
        report = self._report
        report.violations = Checker(
            calls, origin=began, patience=2 * self._options.call_timeout
        ).check()
        report.jobs = len(calls)
        for call in calls:
            told = call.state or call.outcome or "never ended"
            report.outcomes[f"{call.operation} {told}"] += 1
        report.faults = self._faults.counts
        report.exits = self._fleet.exits
        report.recoveries = self._faults.recoveries
