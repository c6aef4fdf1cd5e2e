"""One event loop and one open backend per worker process.

Celery's pool threads run no asyncio code of their own: they hand coroutines to the loop that lives
here, in a thread of its own, from the start of the process to its end. It is made after fork, so
that no connection or lock is shared between processes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar, cast

from recallq import contract, tracing
from recallq.clock import FleetClock, keep_time
from recallq.contract import Lane
from recallq.errors import ConfigurationError, MissingExtra, RecallQError, ServiceUnavailable
from recallq.fleet import FleetState, look
from recallq.keys import Keys
from recallq.redis_client import (
    COMMAND_TIMEOUT,
    LOST,
    RedisClient,
    asking,
    connect,
    refusal_of,
    trouble_of,
)
from recallq.signing import Signer
from recallq.workers import SIGN_OF_LIFE_EVERY, WorkerInfo, WorkerRegistry
from recallq_worker.backends import registry
from recallq_worker.backends.base import (
    MemoryBackend,
    MemoryExtractor,
    MemoryStore,
    takes_second_step,
)
from recallq_worker.dead_letters import DeadLetters
from recallq_worker.insistence import insistently
from recallq_worker.ledger import WorkerLedger
from recallq_worker.meters import JobLog, Meter, Meters
from recallq_worker.probes import Probes
from recallq_worker.retries import RetryPolicy
from recallq_worker.runner import BatchRunner
from recallq_worker.seclusion import Seclusion
from recallq_worker.service import MemoryService
from recallq_worker.settings import WorkerSettings
from recallq_worker.single_process import LEASE_SECONDS, RENEW_EVERY, OwnerLease
from recallq_worker.slow_lane import SlowLane
from recallq_worker.slow_ledger import SlowLedger
from recallq_worker.slow_turn import Rules
from recallq_worker.slow_work import Extraction, Indexing
from recallq_worker.sweeper import Sweeper

if TYPE_CHECKING:
    from recallq_worker.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

_EXTRACTS = 60
"""Seconds for which the word of a worker that extracts memories counts more than that of a store's:
where one takes the place of the other, both are there for a while."""
_READY_WITHIN = 6.0
"""Seconds in which Redis and the backend are to answer for a process to be ready: fewer than those
for which `recallq_worker.probes` waits to hear of it."""
_LOOK_WITHIN = 2.0
"""Seconds that a look at the fleet may take, of those that whoever asks for metrics waits."""


@dataclass(slots=True)
class Services:
    """What a running process works with; used on its loop only."""

    backend: MemoryBackend
    runner: BatchRunner
    slow_lane: SlowLane | None
    """None where the backend has nothing for it, or another process works in it."""
    ledger: WorkerLedger
    dead_letters: DeadLetters
    clock: FleetClock


class Runtime:
    """The loop, the backend and the coordination of one process."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        lanes: list[Lane],
        concurrency: int,
        on_lost: Callable[[str], None],
    ) -> None:
        """`on_lost` is called with a reason when the process must not go on working."""
        self.settings = settings
        self.worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.services: Services
        self._lanes = lanes
        self._concurrency = concurrency
        self._on_lost = on_lost
        self._keys = Keys(settings.namespace)
        self._clients: dict[str, RedisClient] = {}
        self._lease: OwnerLease | None = None
        self._background: list[asyncio.Task[None]] = []
        self._unable: str | None = None
        """Why Redis takes no sign of life."""
        self._metrics = self._make_metrics()
        self._probes: Probes | None = None
        self._exports: Any = tracing.export("recallq-worker") if settings.traces else None
        self._tracer = tracing.Tracer() if settings.traces else None
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._serve, name="recallq-loop", daemon=True)
        self._serving = threading.Event()

    def start(self) -> None:
        """Starts the loop and opens everything. Raises `ConfigurationError` or
        `ServiceUnavailable`, with nothing left open."""
        self._loop_factory = _loop_factory()
        self._thread.start()
        self._serving.wait()
        try:
            self._listen()
            self.submit(self._open()).result()
        except BaseException:
            self.stop()
            raise

    def _make_metrics(self) -> Metrics | None:
        """None where nobody asks for them. Raises `MissingExtra`."""
        if self.settings.http_port is None:
            return None
        try:
            from recallq_worker.metrics import Metrics
        except ImportError as error:
            raise MissingExtra("the worker's /metrics", "worker") from error
        return Metrics(
            backend=self.settings.backend, version=version("recallq"), worker_id=self.worker_id
        )

    def _listen(self) -> None:
        """From the start: alive, and not ready yet."""
        settings, metrics = self.settings, self._metrics
        if settings.http_port is not None and metrics is not None:
            self._probes = Probes(
                settings.http_host,
                settings.http_port,
                submit=self.submit,
                trouble=self._trouble,
                fleet=self._fleet,
                text=metrics.text,
            )

    async def _trouble(self) -> str | None:
        """Why this process cannot work now; None if it can."""
        services = getattr(self, "services", None)
        if services is None or not self._background:
            return "starting"
        try:
            async with asyncio.timeout(_READY_WITHIN):
                for url, client in self._clients.items():
                    async with asking(url, "Redis does not answer", _READY_WITHIN / 2):
                        await client.ping()
                if self._unable is not None:
                    return f"Redis takes no writes: {self._unable}"
                health = await services.backend.health()
        except RecallQError as error:
            return str(error)
        except TimeoutError:
            return f"backend {self.settings.backend} does not answer"
        return None if health.ok else f"backend {health.backend}: {health.detail}"

    async def _fleet(self) -> FleetState | None:
        coordination = self._clients.get(self.settings.coordination_url)
        if coordination is not None:
            with contextlib.suppress(*LOST, TimeoutError):
                async with asyncio.timeout(_LOOK_WITHIN):
                    return await look(coordination, self._keys)
        return None

    def stop(self) -> None:
        """Closes everything and ends the loop."""
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.submit(self._close()).result(timeout=15 + self.settings.slow_patience)
        if self._probes is not None:
            self._probes.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=15)
        if self._exports is not None:
            self._exports.shutdown()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Runs a coroutine on the loop; to be called from other threads."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def keep_undecodable(self, payload: str, error: str, batch_id: str | None) -> None:
        """Keeps what nobody can read as a dead letter; returns once it is kept. For other threads.

        If it is a batch that the ledger knows, the letter tells its lane and its jobs' epochs, so
        that it can be replayed as what it was.
        """
        log.error("undecodable message: %s; kept as a dead letter", error)
        self.submit(self._keep_undecodable(payload, error, batch_id or "")).result()

    def hand_back(self) -> None:
        """Hands what runs here back, for others to run. Does not wait."""
        self.submit(self.services.runner.stop())
        if self.services.slow_lane is not None:
            self.submit(self.services.slow_lane.stop())

    def bury(self, raw: bytes, reason: str, batch_id: str | None, *, keep: bool = True) -> bool:
        """The same for what came on a queue and is no task, and its bytes. Without `keep`, they are
        dropped.

        Returns whether the ledger has a batch of that id, which somebody waits for.
        """
        if not keep:
            log.error("undecodable message: %s; it is of a read, and dropped", reason)
            return self.submit(self._entry(batch_id or "")).result() is not None
        text = raw.decode(errors="backslashreplace")
        log.error("undecodable message: %s; kept as a dead letter", reason)
        unsigned = bool(self.settings.signing_keys)  # nobody has looked, or found a good one
        keeping = self._keep_undecodable(text, reason, batch_id or "", unsigned=unsigned)
        return self.submit(keeping).result()

    async def _entry(self, batch_id: str) -> tuple[Lane, list[int]] | None:
        ledger = self.services.ledger
        return await insistently(lambda: ledger.entry(batch_id))

    async def _keep_undecodable(
        self, payload: str, error: str, batch_id: str, *, unsigned: bool = False
    ) -> bool:
        services = self.services
        entry = await self._entry(batch_id)
        lane, epochs = entry or (None, [])
        await insistently(
            lambda: services.dead_letters.keep_message(
                payload,
                error,
                at=services.clock.now(),
                batch_id=batch_id if entry is not None else None,
                lane=lane,
                epochs=epochs,
                unsigned=unsigned,
            )
        )
        return entry is not None

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=self._loop_factory) as runner:
            self._loop = runner.get_loop()
            self._loop.call_soon(self._serving.set)
            self._loop.run_forever()

    # --- on the loop ----------------------------------------------------------------------------

    async def _open(self) -> None:
        settings = self.settings
        backend = registry.load(settings.backend)
        for url in {settings.coordination_url, settings.broker_url, settings.result_url}:
            client = self._clients[url] = connect(
                url, max_connections=64, connect_timeout=settings.connect_timeout
            )
            async with asking(url, "cannot start the worker"):
                await client.ping()
        coordination = self._clients[settings.coordination_url]
        broker = self._clients[settings.broker_url]
        async with asking(settings.broker_url, "cannot start the worker"):
            for lane in self._lanes:  # a client's user may put messages there, and no more
                await broker.llen(lane.queue(settings.namespace))
        clock = FleetClock()
        async with asking(settings.coordination_url, "cannot read the time"):
            await clock.calibrate(coordination)
        if backend.single_process:
            lease = OwnerLease(
                coordination,
                self._keys.backend_owner(backend.name),
                backend.name,
                self.worker_id,
            )
            async with asking(
                settings.coordination_url,
                "cannot take the backend's lease",
                timeout=LEASE_SECONDS + COMMAND_TIMEOUT,  # a dead owner's lease is waited out
            ):
                await lease.acquire()
            self._lease = lease
        memory = cast("MemoryStore | MemoryExtractor", backend.from_settings(settings))
        retries = RetryPolicy(settings.retry_attempts, settings.retry_base, settings.retry_cap)
        seclusion = Seclusion()
        told: list[Meter] = [] if self._metrics is None else [self._metrics]
        if JobLog.is_wanted():
            told.append(JobLog())
        meters = Meters(told)
        service = MemoryService(
            memory,
            now=clock.now,
            job_timeout=settings.job_timeout,
            parallel_jobs=settings.parallel_jobs,
            retries=retries,
            pause=settings.slow_pause,
            seclusion=seclusion,
            meters=meters,
            tracer=self._tracer,
        )
        ledger = WorkerLedger(
            coordination,
            broker,
            self._clients[settings.result_url],
            self._keys,
            self.worker_id,
            one_step=settings.broker_url == settings.coordination_url,
            signer=Signer.of(settings.signing_keys),
        )
        slow_ledger = SlowLedger(
            coordination, self._keys, ledger, indexing=takes_second_step(memory)
        )
        slow_lane = None
        patient = RetryPolicy(settings.slow_attempts, settings.retry_base, settings.retry_cap)
        rules = Rules(
            settings.slow_tokens, settings.slow_timeout, patient, clock.now, self._tracer, meters
        )
        if Lane.SLOW not in self._lanes:
            pass  # another process works in it
        elif isinstance(memory, MemoryExtractor):
            slow_lane = SlowLane(
                Extraction(memory),
                slow_ledger,
                rules,
                seclusion,
                users_at_once=settings.slow_users,
                pause=settings.slow_pause,
            )
        elif takes_second_step(memory):
            slow_lane = SlowLane(
                Indexing(memory),
                slow_ledger,
                rules,
                seclusion,
                users_at_once=settings.index_batches,
                pause=0.0,
            )
        dead_letters = DeadLetters(coordination, self._keys)
        runner = BatchRunner(
            service, ledger, dead_letters, self._keys, clock, slow_ledger, slow_lane
        )
        self.services = Services(memory, runner, slow_lane, ledger, dead_letters, clock)
        try:
            await memory.start()
        except RecallQError as error:
            raise ServiceUnavailable(f"backend {backend.name} does not start: {error}") from error
        async with asking(settings.coordination_url, "cannot start the worker"):
            await self._say_whether_it_extracts(coordination)
        workers = WorkerRegistry(coordination, self._keys)
        swept = None if self._metrics is None else self._metrics.swept
        self._background += [
            asyncio.create_task(_for_ever(lambda: self._sign(workers, coordination))),
            asyncio.create_task(_for_ever(lambda: keep_time(clock, coordination))),
            asyncio.create_task(_for_ever(runner.keep_leases)),
            asyncio.create_task(_for_ever(Sweeper(ledger, swept).sweep)),
        ]
        if slow_lane is not None:
            self._background.append(asyncio.create_task(_for_ever(slow_lane.work)))
        if self._lease is not None:
            self._background.append(asyncio.create_task(self._hold(self._lease)))

    async def _close(self) -> None:
        services = getattr(self, "services", None)
        if services is not None:
            await services.runner.stop()
            if services.slow_lane is not None:
                await services.slow_lane.stop(self.settings.slow_patience)
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        with contextlib.suppress(*LOST):
            coordination = self._clients.get(self.settings.coordination_url)
            if coordination is not None and self._background:
                await WorkerRegistry(coordination, self._keys).sign_off(self.worker_id)
            if self._lease is not None:
                await self._lease.release()
        if services is not None:
            await services.backend.stop()
        for client in self._clients.values():
            await client.aclose(close_connection_pool=True)

    async def _sign(self, workers: WorkerRegistry, coordination: RedisClient) -> None:
        info = WorkerInfo(
            id=self.worker_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=version("recallq"),
            protocol=contract.PROTOCOL_VERSION,
            backend=self.settings.backend,
            lanes=self._lanes,
            concurrency=self._concurrency,
            started_at=time.time(),
            http=None if self._probes is None else self._probes.address,
        )
        while True:
            try:
                async with asyncio.timeout(COMMAND_TIMEOUT):
                    await workers.sign(info)
                    await self._say_whether_it_extracts(coordination)
            except LOST as error:
                self._unable = refusal_of(error)
                log.warning("cannot give a sign of life: %s", trouble_of(error))
            else:
                self._unable = None
            await asyncio.sleep(SIGN_OF_LIFE_EVERY)

    async def _say_whether_it_extracts(self, coordination: RedisClient) -> None:
        """Unless workers extract nothing, producers say which adds are on their way."""
        if isinstance(self.services.backend, MemoryExtractor):
            await coordination.set(self._keys.extracts, 1, ex=_EXTRACTS)
        else:
            await coordination.set(self._keys.extracts, 0, nx=True)

    async def _hold(self, lease: OwnerLease) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY)
            try:
                async with asyncio.timeout(COMMAND_TIMEOUT):
                    kept = await lease.renew() or await self._take_again(lease)
            except LOST as error:
                log.warning("cannot renew the backend's lease: %s", type(error).__name__)
                continue
            if not kept:
                self._on_lost("another worker has taken over the single-process backend")
                return

    async def _take_again(self, lease: OwnerLease) -> bool:
        """After a Redis without persistence was restarted, say: the lease is gone, not taken."""
        try:
            await lease.acquire(patience=0)
        except ConfigurationError:
            return False
        return True


async def _for_ever(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Does work that never ends by itself; what nobody expected ends it for a moment only."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("a defect in the worker's background work")
        await asyncio.sleep(1.0)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError as error:
        raise MissingExtra("the worker", "worker") from error
    return uvloop.new_event_loop


_current: tuple[int, Runtime] | None = None


def start(
    settings: WorkerSettings,
    *,
    lanes: list[Lane],
    concurrency: int,
    on_lost: Callable[[str], None],
) -> Runtime:
    """Starts this process's runtime."""
    global _current  # noqa: PLW0603  # one runtime per process is what this module owns
    runtime = Runtime(settings, lanes=lanes, concurrency=concurrency, on_lost=on_lost)
    runtime.start()
    _current = (os.getpid(), runtime)
    return runtime


def current() -> Runtime:
    """This process's runtime. Raises `ConfigurationError` if none was started in it."""
    if _current is None or _current[0] != os.getpid():
        raise ConfigurationError("no runtime was started in this process")
    return _current[1]


def stop() -> None:
    """Stops this process's runtime, if there is one."""
    global _current  # noqa: PLW0603  # see start()
    if _current is not None and _current[0] == os.getpid():
        _current[1].stop()
    _current = None
