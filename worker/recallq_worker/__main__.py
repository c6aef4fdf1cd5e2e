"""``python -m recallq_worker``: what the ``recallq`` command runs for all that needs the worker."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated, Optional

import orjson
import typer
from rich.console import Console

from recallq.contract import Lane, Scope
from recallq.errors import ConfigurationError, MissingExtra, RecallQError
from recallq_worker.backends import registry
from recallq_worker.settings import WorkerSettings, misspelt

if TYPE_CHECKING:
    from recallq_worker.reindexing import Reindexed

_LAST_CHANCE = 20.0
"""Seconds that a worker whose owner is gone has to finish what it holds."""

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@cli.command()
def worker(
    lanes: Annotated[str, typer.Option(help="Lanes to work on, by comma.")] = "live,bulk,slow",
    backend: Annotated[Optional[str], typer.Option(help="Memory backend.")] = None,
    concurrency: Annotated[Optional[int], typer.Option(min=1, help="Batches at once.")] = None,
    log_level: Annotated[
        Optional[str], typer.Option(help="DEBUG, INFO, WARNING or ERROR; else RECALLQ_LOG_LEVEL.")
    ] = None,
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
    if log_level is not None:
        os.environ["RECALLQ_LOG_LEVEL"] = _log_level(log_level)
    # numpy's threads would begin before the process steps back, and there are other workers for
    # the other processors.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    settings = WorkerSettings.load()
    for wrong, right in misspelt(os.environ).items():
        print(f"recallq worker: {wrong} is not a setting; is it {right}?", file=sys.stderr)
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
            f"--loglevel={settings.log_level}",
            # Chatter between workers that nobody here listens to; it costs Redis and CPU.
            "--without-gossip",
            "--without-mingle",
            *([] if settings.events else ["--without-heartbeat"]),
            f"--hostname={name or f'recallq-{os.getpid()}@%h'}",
            "--queues=" + ",".join(lane.queue(settings.namespace) for lane in wanted),
        ],
        prog_name="recallq",
        standalone_mode=False,
    )
    raise SystemExit(code or 0)


@cli.command()
def reindex(
    user: Annotated[Optional[str], typer.Argument(help="Only this user's index.")] = None,
    tenant: Annotated[Optional[str], typer.Option(help="The user's tenant.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Rebuild also those that are as they should be.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Bring search indexes up to date."""
    try:
        _reindex(user, tenant, everything=everything, as_json=as_json)
    except RecallQError as error:
        print(f"recallq: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("recallq: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _reindex(user: str | None, tenant: str | None, *, everything: bool, as_json: bool) -> None:
    settings = WorkerSettings.load(tenant=tenant)
    scope = None if user is None else Scope(settings.tenant, user)
    registry.load(settings.backend)
    from recallq_worker.reindexing import reindex

    console = Console(stderr=True)
    with console.status("looking for indexes") as status:

        def advance(so_far: Reindexed) -> None:
            status.update(f"{so_far.users:,} users, {so_far.messages:,} messages indexed anew")

        done = asyncio.run(reindex(settings, scope, everything=everything, advance=advance))
    if as_json:
        print(orjson.dumps(done.to_dict()).decode())
        return
    print(
        f"looked at the indexes of {done.users:,} users: rebuilt {done.rebuilt:,}, of "
        f"{done.messages:,} messages"
    )
    if settings.search_strategy != "keyword":
        print(f"embedded {done.embedded:,} messages that had no vector")
    if done.refused:
        print(
            f"{done.refused:,} messages have no vector, for the embedding model will not take "
            "them; they are found by their words"
        )
    if done.skipped:
        print(
            f"{done.skipped:,} users have ids of more than 200 characters; their older messages "
            "have no vectors"
        )


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
