"""``python -m recallq_worker``: what the ``recallq`` command runs for all that needs the worker."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Annotated, Optional

import orjson
import typer

from recallq.contract import Lane
from recallq.errors import ConfigurationError, MissingExtra, RecallQError
from recallq_worker.backends import registry
from recallq_worker.settings import WorkerSettings

_LAST_CHANCE = 20.0
"""Seconds that a worker whose owner is gone has to finish what it holds."""

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@cli.command()
def worker(
    lanes: Annotated[str, typer.Option(help="Lanes to work on, by comma.")] = "live,bulk,slow",
    backend: Annotated[Optional[str], typer.Option(help="Memory backend.")] = None,
    concurrency: Annotated[Optional[int], typer.Option(min=1, help="Batches at once.")] = None,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "WARNING",
    name: Annotated[Optional[str], typer.Option(help="Celery node name.")] = None,
    until_stdin_ends: Annotated[
        bool, typer.Option(help="Stop when standard input ends, as it does with its owner.")
    ] = False,
) -> None:
    """Run a worker until it is told to stop."""
    # By way of the environment: the app reads its settings there, in this process and in forks.
    if backend is not None:
        os.environ["RECALLQ_BACKEND"] = backend
    if concurrency is not None:
        os.environ["RECALLQ_CONCURRENCY"] = str(concurrency)
    settings = WorkerSettings.load()
    wanted = _lanes(lanes)
    missing = registry.missing_requirements("worker")
    if missing:
        raise MissingExtra("the worker", "worker")
    registry.load(settings.backend)
    if until_stdin_ends:
        threading.Thread(target=_stop_with_stdin, name="recallq-stdin", daemon=True).start()

    from celery.bin.celery import celery

    # Not app.worker_main(), which drops the exit code.
    code = celery.main(
        args=[
            "--app=recallq_worker",
            "--quiet",  # no banner: one line says that it is ready
            "worker",
            f"--loglevel={_log_level(log_level)}",
            # Chatter between workers that nobody here listens to; it costs Redis and CPU.
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            f"--hostname={name or f'recallq-{os.getpid()}@%h'}",
            "--queues=" + ",".join(lane.queue(settings.namespace) for lane in wanted),
        ],
        prog_name="recallq",
        standalone_mode=False,
    )
    raise SystemExit(code or 0)


@cli.command()
def backends() -> None:
    """Print the registered backends as JSON."""
    print(orjson.dumps([each.model_dump() for each in registry.available()]).decode())


def _stop_with_stdin() -> None:
    """Ends the worker once nobody holds the other end of its standard input: whoever started it
    is gone, perhaps without having had the time to stop it, and perhaps Redis with it."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST_CHANCE)
    os._exit(1)


def _lanes(names: str) -> list[Lane]:
    try:
        wanted = [Lane(name.strip()) for name in names.split(",") if name.strip()]
    except ValueError as error:
        known = ", ".join(lane.value for lane in Lane)
        raise ConfigurationError(f"--lanes {names}: the lanes are {known}") from error
    if not wanted:
        raise ConfigurationError("--lanes names no lane")
    return wanted


def _log_level(name: str) -> str:
    level = name.upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ConfigurationError(f"--log-level {name} is not a log level")
    return level


def main() -> None:
    try:
        cli()
    except RecallQError as error:
        print(f"recallq worker: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
