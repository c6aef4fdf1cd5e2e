"""The Celery app: its configuration, and the start and stop of a worker process.

``celery -A recallq_worker worker -Q recallq.live`` and ``recallq worker`` run the same app; the
latter only chooses good flags. Where a setting differs from Celery's default, the reason stands
next to it.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from celery import Celery, bootsteps
from celery.signals import worker_process_init, worker_process_shutdown, worker_ready
from kombu.entity import Exchange, Queue

from recallq.contract import Lane
from recallq.errors import RecallQError
from recallq.redis_client import COMMAND_TIMEOUT, tls_options
from recallq_worker import broker, consumer, logs, runtime, tasks
from recallq_worker import settings as worker_settings
from recallq_worker.settings import WorkerSettings
from recallq_worker.stopping import StopDeadline

log = logging.getLogger(__name__)

_STEP_BACK = 10
READY_PROMPT = "recallq worker ready"


def make_app(settings: WorkerSettings) -> Celery:
    """The app for one set of settings. Connects to nothing."""
    broker.install()
    logs.install()
    consumer.quieten()
    app = Celery("recallq_worker", set_as_current=True)
    app.conf.update(configuration(settings))
    tasks.register(app)
    app.steps["worker"].update((RuntimeStep, StopDeadline))
    return app


def configuration(settings: WorkerSettings) -> dict[str, Any]:
    """Celery's configuration."""
    namespace = settings.namespace
    return {
        "broker_url": celery_url(settings.broker_url),
        "result_backend": "recallq_worker.results:ResultBackend+"
        + celery_url(settings.result_url).removeprefix("redis+"),
        "result_backend_transport_options": {"global_keyprefix": f"{namespace}:"},
        # Only JSON crosses the wire.
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        # A message is given up only when its batch is settled.
        "task_acks_late": True,
        "task_acks_on_failure_or_timeout": True,
        # Of a forked process that died: its batch is not answered as failed. What comes back at
        # once is dropped, and the ledger sees to it that the batch is run, and how often.
        "task_reject_on_worker_lost": True,
        "worker_prefetch_multiplier": 1,
        "result_expires": settings.result_expires,
        "result_backend_always_retry": True,
        "redis_max_connections": settings.concurrency + 16,
        "redis_socket_timeout": 30.0,
        "redis_retry_on_timeout": True,
        # Threads only wait for the process's loop; more processes would be more backends.
        "worker_pool": "threads",
        "worker_concurrency": settings.concurrency,
        "worker_consumer": "recallq_worker.consumer:Consumer",
        # It counts what a new connection adopts from the old one, so nothing is to be reduced.
        "worker_enable_prefetch_count_reduction": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry_on_startup": True,
        # A Redis that is full or read-only for a while is no reason to end.
        "broker_channel_error_retry": True,
        # Flower asks eight things at once, each of which takes a connection and then another.
        "broker_pool_limit": 10,
        "task_queues": [_queue(lane.queue(namespace)) for lane in Lane],
        "task_default_queue": Lane.LIVE.queue(namespace),
        "task_create_missing_queues": False,
        "broker_transport_options": {
            "visibility_timeout": settings.visibility_timeout,
            # One Redis list per queue instead of four: BRPOP reads them all.
            "priority_steps": [0],
            # Lanes in their order: who waits for an answer goes before who ingests.
            "queue_order_strategy": "priority",
            # Kombu's defaults are shared by all apps on a Redis; the shortest timeout would win.
            "unacked_key": f"{namespace}:unacked",
            "unacked_index_key": f"{namespace}:unacked_index",
            "unacked_mutex_key": f"{namespace}:unacked_mutex",
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            # A worker that dies while it looks for messages keeps others from it for so long.
            "unacked_mutex_expire": 30,
            "socket_connect_timeout": settings.connect_timeout,
            "socket_timeout": COMMAND_TIMEOUT,
            "socket_keepalive": True,
            "health_check_interval": 30,
        },
        # Fleets on one Redis must not hear each other's remote control, nor other Celery apps'.
        "control_exchange": f"{namespace}.control",
        "event_exchange": f"{namespace}.events",
        "worker_send_task_events": settings.events,
        # The ready line is for supervisors and people, not for the log.
        "worker_redirect_stdouts": False,
        "worker_proc_alive_timeout": 60.0,
    }


def _queue(name: str) -> Queue:
    """A queue on the default exchange, where a message's routing key is its queue's name."""
    return Queue(name, Exchange(""), routing_key=name)  # type: ignore[no-untyped-call]


def celery_url(url: str) -> str:
    """A Redis URL as kombu and Celery spell it.

    They know Unix sockets by another scheme, the database only as the path, and credentials only
    in front of the host; and without a word they do not check a server's certificate.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    database = query.pop("db", None) or parts.path.strip("/") or "0"
    username, password = query.pop("username", None), query.pop("password", None)
    location = parts.netloc
    if password is not None and "@" not in location:
        location = f"{quote(username or '', safe='')}:{quote(password, safe='')}@{location}"
    if parts.scheme == "unix":
        query["virtual_host"] = database if database.isdigit() else "0"
        return f"redis+socket://{location}{parts.path}?{urlencode(query)}"
    if parts.scheme == "rediss":
        query.setdefault("ssl_cert_reqs", "required")
        if "ssl_check_hostname" in query:  # kombu knows one word only for not to
            checks = tls_options(query)["ssl_check_hostname"]
            query["ssl_check_hostname"] = "false" if checks is False else "true"
    options = f"?{urlencode(query)}" if query else ""
    return f"{parts.scheme}://{location}/{database}{options}"


class RuntimeStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no annotations
    """Opens the process's runtime before the first message is taken, closes it after the last."""

    def start(self, worker: Any) -> None:
        if _forks(worker):
            _check_port()
            return  # each child opens its own
        try:
            _open(worker.app, worker.concurrency)
            worker.app.backend  # noqa: B018  # a result URL that cannot work must end the start
        except RecallQError as error:
            print(f"recallq worker: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error

    def stop(self, worker: Any) -> None:
        # Celery orders steps without a dependency at random, so the pool may come after this one.
        # Stopping it waits for what runs, which needs the loop; stopping it again does nothing.
        if not _forks(worker) and getattr(worker, "pool", None) is not None:
            worker.pool.stop()
        runtime.stop()

    def terminate(self, worker: Any) -> None:
        runtime.stop()


def _check_port() -> None:
    if worker_settings.current().http_port:
        print(
            "recallq worker: forked processes cannot share RECALLQ_HTTP_PORT; set it to 0, and "
            "each takes a port that 'recallq status' tells",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1)


def _open(celery: Celery, concurrency: int) -> None:
    settings = worker_settings.current()
    queues = {lane.queue(settings.namespace): lane for lane in Lane}
    consumed = [queues[name] for name in celery.amqp.queues.consume_from if name in queues]
    step_back = settings.nice
    if step_back is None:
        step_back = 0 if Lane.LIVE in consumed else _STEP_BACK
    os.nice(step_back)  # before the threads are there, which inherit it
    runtime.start(settings, lanes=consumed, concurrency=concurrency, on_lost=_give_up)
    _collect_less_often()


def _collect_less_often() -> None:
    """Spares the garbage collector what is here for good, and lets it look at the rest more rarely:
    a batch makes thousands of objects that go as soon as it is answered, and hardly a cycle. It is
    a tenth of what a search costs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _forks(worker: Any) -> bool:
    return "prefork" in worker.pool_cls.__module__


def _give_up(reason: str) -> None:
    """Stops this process as a supervisor would, finishing what it holds."""
    log.critical("stopping: %s", reason)
    os.kill(os.getpid(), signal.SIGTERM)


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _open_in_child(**_: Any) -> None:
    try:
        _open(app, concurrency=1)
    except RecallQError as error:
        print(f"recallq worker: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


@worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _close_in_child(**_: Any) -> None:
    runtime.stop()


@worker_ready.connect  # type: ignore[untyped-decorator]
def _announce(sender: Any, **_: Any) -> None:
    settings = worker_settings.current()
    queues = ", ".join(sorted(app.amqp.queues.consume_from))
    print(
        f"{READY_PROMPT}: backend {settings.backend}, queues {queues}, "
        f"{sender.controller.concurrency} batches at once",
        flush=True,
    )


app = make_app(worker_settings.current())
