"""``recallq up | worker | reindex | backends``: what runs the service."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import orjson
import typer

from recallq.cli.connection import UrlOption, existing_url, is_named, running_url
from recallq.cli.memory import JsonOption, TenantOption
from recallq.cli.runner import fail, guarded, run
from recallq.cli.stack import Stack, default_data_dir, worker_command, worker_environment
from recallq.embedded import EmbeddedRedis
from recallq.errors import ConfigurationError, RecallQError

LanesOption = Annotated[str, typer.Option("--lanes", help="Lanes to work on, by comma.")]
BackendOption = Annotated[
    Optional[str], typer.Option("--backend", help="Memory backend; else RECALLQ_BACKEND.")
]

_RESTART_DELAY = 1.0


def up(
    data_dir: Annotated[
        Optional[Path],
        typer.Option(help="Where Redis keeps its data; else RECALLQ_DATA_DIR.", show_default=False),
    ] = None,
    port: Annotated[Optional[int], typer.Option(min=1, max=65535, help="Redis port.")] = None,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="Processes.")] = 1,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run an embedded Redis and workers until Ctrl-C."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    directory = data_dir if data_dir is not None else default_data_dir()

    def work() -> None:
        with Stack(directory, workers=workers, backend=backend, port=port) as stack:
            if as_json:
                sys.stdout.write(orjson.dumps({"url": stack.url}).decode() + "\n")
                sys.stdout.flush()
            else:
                _greet(stack, directory)
            _supervise(stack, stopping)
            if not as_json:
                print("stopping: letting the workers finish what they hold", flush=True)

    guarded(work)


def _greet(stack: Stack, directory: Path) -> None:
    noun = "worker" if len(stack.workers) == 1 else "workers"
    print(
        f"RecallQ is up: Redis and {len(stack.workers)} {noun}, data in {directory}\n"
        f"  in Python   MemoryClient({stack.url!r})\n"
        f"  in a shell  export RECALLQ_REDIS_URL={stack.url}\n"
        f"  {_who_finds_it(directory)} Ctrl-C stops it.",
        flush=True,
    )


def _who_finds_it(directory: Path) -> str:
    if is_named():
        return "Commands go to the Redis that the environment names, unless you change that."
    if directory.resolve() != default_data_dir().resolve():
        return "Commands find it with that, or with RECALLQ_DATA_DIR set to its directory."
    return "'recallq status' and the other commands find it by themselves."


def _supervise(stack: Stack, stopping: threading.Event) -> None:
    """Starts again what ends by itself, until it is told to stop."""
    while not stopping.wait(0.2):
        if not stack.redis.is_alive():
            raise ConfigurationError(
                f"the embedded Redis has ended by itself; see {stack.redis.log_path}"
            )
        for worker in stack.workers:
            if not worker.is_alive() and not stopping.is_set():
                print(
                    f"recallq: a worker has ended by itself (see {worker.log_path}); "
                    "starting another",
                    file=sys.stderr,
                    flush=True,
                )
                stopping.wait(_RESTART_DELAY)
                worker.launch()


def worker(
    lanes: LanesOption = "live,bulk,slow",
    backend: BackendOption = None,
    concurrency: Annotated[
        Optional[int], typer.Option("--concurrency", "-c", min=1, help="Batches at once.")
    ] = None,
    log_level: Annotated[
        Optional[str], typer.Option(help="DEBUG, INFO, WARNING or ERROR; else RECALLQ_LOG_LEVEL.")
    ] = None,
    name: Annotated[Optional[str], typer.Option(help="Celery node name.")] = None,
    url: UrlOption = None,
) -> None:
    """Run a worker until it is told to stop. Start more of them to scale out."""
    arguments = ["worker", "--lanes", lanes]
    if log_level is not None:
        arguments += ["--log-level", log_level]
    if backend is not None:
        arguments += ["--backend", backend]
    if concurrency is not None:
        arguments += ["--concurrency", str(concurrency)]
    if name is not None:
        arguments += ["--name", name]
    command = guarded(lambda: worker_command(*arguments))
    if url is None and not is_named():
        url = running_url()
        if url is None:
            guarded(lambda: _worker_with_embedded_redis(command))
            return
    environment = dict(os.environ) if url is None else worker_environment(url)
    # Takes this process's place, so that signals and exit codes are the worker's own.
    sys.stdout.flush()
    os.execve(command[0], command, environment)  # noqa: S606  # no shell is wanted


def _worker_with_embedded_redis(command: list[str]) -> None:
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    with EmbeddedRedis(default_data_dir()) as redis:
        print(
            f"no Redis was named; running an embedded one at {redis.url}, data in {redis.data_dir}",
            flush=True,
        )
        process = subprocess.Popen(
            [*command, "--until-stdin-ends"],
            stdin=subprocess.PIPE,
            env=worker_environment(redis.url),
            start_new_session=True,
        )
        try:
            while process.poll() is None and not stopping.is_set():
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
            code = process.wait()
    if code:
        raise SystemExit(code)


def reindex(
    user: Annotated[Optional[str], typer.Argument(help="Only this user's index.")] = None,
    tenant: TenantOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Rebuild also those that are as they should be.")
    ] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring the search indexes of the redis backend up to date; workers may go on meanwhile."""
    arguments = ["reindex"]
    if tenant is not None:
        arguments += ["--tenant", tenant]
    arguments += ["--all"] * everything + ["--json"] * as_json
    if user is not None:
        arguments += ["--", user]
    command = guarded(lambda: worker_command(*arguments))
    found = run(existing_url(url))
    sys.stdout.flush()
    environment = dict(os.environ) if found is None else worker_environment(found)
    os.execve(command[0], command, environment)  # noqa: S606  # no shell is wanted


def backends(as_json: JsonOption = False) -> None:
    """Show every registered memory backend, and whether it is installed."""

    def work() -> list[dict[str, Any]]:
        # Asked of the worker's package, in a process of its own: the client knows no backends.
        listed = subprocess.run(
            [sys.executable, "-m", "recallq_worker", "backends"],
            capture_output=True,
            check=False,
        )
        if listed.returncode != 0:
            last = listed.stderr.decode(errors="replace").strip().splitlines() or ["no reason"]
            raise RecallQError(f"cannot list the backends: {last[-1]}")
        found: list[dict[str, Any]] = orjson.loads(listed.stdout)
        return found

    found = guarded(work)
    if as_json:
        sys.stdout.write(orjson.dumps(found).decode() + "\n")
        return
    if not found:
        fail("no backend is registered; is recallq installed properly?")
    for each in found:
        state = "installed" if each["installed"] else f"needs 'recallq[{each['extra']}]'"
        extra = f"extra {each['extra']}" if each["extra"] else f"from {each['provider']}"
        print(f"{each['name']:<16}{extra:<20}{state}")
