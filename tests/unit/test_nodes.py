"""The local stand-ins for containers: what tests that kill and restart nodes rest on.

Small Python programs stand in for the worker, so that only the mechanics are tested.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestSetup,
    CeleryTestWorker,
    CeleryWorkerCluster,
)
from pytest_docker_tools.exceptions import ContainerFailed, ContainerNotReady

from tests.nodes import (
    LocalContainer,
    LocalProcess,
    LocalRedisContainer,
    LocalWorkerContainer,
    poll_until,
    signal_number,
)

# Says that it is ready, starts a child, and ends cleanly when asked to.
STUB = """
import os, signal, subprocess, sys, time

def end(*_):
    print("ended cleanly", flush=True)
    sys.exit(7)

signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGUSR1, lambda *_: print("signalled", flush=True))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
print("arguments", *sys.argv[1:], flush=True)
print("setting", os.environ.get("RECALLQ_BACKEND"), os.environ.get("RECALLQ_TENANT"), flush=True)
print("recallq worker ready", flush=True)
while True:
    time.sleep(600)
"""
STUBBORN = """
import signal, time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("recallq worker ready", flush=True)
while True:
    time.sleep(600)
"""


class StubWorker(LocalWorkerContainer):
    program = STUB

    @classmethod
    def command(cls, *args: str, **kwargs: Any) -> list[str]:
        return [sys.executable, "-c", cls.program, *args]


def stub(code: str) -> type[StubWorker]:
    return type("StubWorker", (StubWorker,), {"program": code})


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[StubWorker]:
    container = StubWorker.launch(tmp_path, "--flag", "value")
    yield container
    container.teardown()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[LocalRedisContainer]:
    container = LocalRedisContainer.launch(tmp_path / "redis")
    yield container
    container.teardown()


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def poll(condition: Callable[[], bool], what: str) -> None:
    poll_until(condition, 30, what)


def pid_of(container: LocalContainer) -> int:
    assert container.pid is not None
    return container.pid


def child_of(worker: StubWorker) -> int:
    """The process that the latest run of the stub started."""
    line = next(line for line in worker.recent_logs().splitlines() if line.startswith("child"))
    return int(line.split()[1])


# --- a worker -------------------------------------------------------------------------------------


def test_is_ready_when_it_says_so(worker: StubWorker) -> None:
    assert worker.ready()
    assert worker.status == "running"
    assert is_running(pid_of(worker))
    assert worker.attrs["State"]["Pid"] == worker.pid
    assert len(worker.id) == 64
    assert worker.name == "worker"
    assert "arguments --flag value\n" in worker.logs()


def test_the_real_command() -> None:
    assert LocalWorkerContainer.command("-x") == [sys.executable, "-m", "recallq_worker", "-x"]


def test_settings_come_from_the_test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALLQ_BACKEND", "the developer's")
    monkeypatch.setenv("RECALLQ_TENANT", "the developer's")
    worker = StubWorker.launch(tmp_path, env={"RECALLQ_BACKEND": "redis"})
    try:
        assert "setting redis None\n" in worker.logs()
        assert worker.env["RECALLQ_BACKEND"] == "redis"
    finally:
        worker.teardown()


def test_one_that_is_not_started_yet(tmp_path: Path) -> None:
    process = LocalProcess([sys.executable, "-c", STUB], log_path=tmp_path / "log")
    container = LocalContainer(process)
    assert container.status == "created"
    assert container.ready() is False
    assert container.logs() == ""
    with pytest.raises(ProcessLookupError, match="not running"):
        container.kill()
    container.teardown()


def test_sigkill_takes_its_children_along(worker: StubWorker) -> None:
    """As when the first process of a container is killed: no orphan finishes the job."""
    pid, child = pid_of(worker), child_of(worker)
    worker.kill()
    assert worker.status == "exited"
    assert worker.exit_code == -signal.SIGKILL
    assert worker.pid is None
    assert not is_running(pid)
    poll(lambda: not is_running(child), "its child to end")
    assert "ended cleanly" not in worker.logs()


def test_so_does_its_own_end(worker: StubWorker) -> None:
    child = child_of(worker)
    worker.kill("SIGTERM")
    worker.wait(10)
    assert worker.exit_code == 7
    assert worker.attrs["State"]["ExitCode"] == 7
    poll(lambda: not is_running(child), "its child to end")
    assert "ended cleanly" in worker.logs()


@pytest.mark.parametrize("given", ["SIGUSR1", "usr1", signal.SIGUSR1, str(int(signal.SIGUSR1))])
def test_any_signal_reaches_it(given: int | str, worker: StubWorker) -> None:
    worker.kill(given)
    poll(lambda: "signalled" in worker.logs(), "the signal to arrive")
    assert worker.status == "running"


def test_signals_as_docker_names_them() -> None:
    given = (None, 9, "9", "KILL", "SIGKILL", "sigkill", signal.SIGKILL)
    assert {signal_number(each) for each in given} == {signal.SIGKILL}


def test_can_be_stopped_and_continued(worker: StubWorker) -> None:
    process = psutil.Process(worker.pid)
    worker.kill("SIGSTOP")
    poll(lambda: process.status() == psutil.STATUS_STOPPED, "it to stop")
    assert worker.status == "running"
    worker.kill("SIGCONT")
    poll(lambda: process.status() != psutil.STATUS_STOPPED, "it to continue")


def test_restart_is_clean_and_waits_until_ready_again(worker: StubWorker) -> None:
    pid, identity, child = worker.pid, worker.id, child_of(worker)
    worker.restart()
    assert worker.ready_prompt in worker.recent_logs()
    assert worker.pid != pid
    assert worker.id == identity
    assert worker.logs().count("recallq worker ready") == 2
    assert worker.logs().count("ended cleanly") == 1
    assert child_of(worker) != child
    poll(lambda: not is_running(child), "the earlier child to end")


def test_restart_after_a_kill(worker: StubWorker) -> None:
    worker.kill()
    worker.restart()
    assert worker.ready()
    assert worker.logs().count("recallq worker ready") == 2
    assert "ended cleanly" not in worker.logs()


def test_teardown_leaves_nothing_running(worker: StubWorker) -> None:
    pid, child = pid_of(worker), child_of(worker)
    before = psutil.Process().num_fds()
    worker.teardown()
    assert not is_running(pid)
    poll(lambda: not is_running(child), "its child to end")
    assert "ended cleanly" in worker.logs()  # still there to be read
    assert psutil.Process().num_fds() <= before
    worker.teardown()  # again, and nothing happens


def test_one_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.nodes._STOP_TIMEOUT", 0.2)
    worker = stub(STUBBORN).launch(tmp_path)
    pid = pid_of(worker)
    worker.teardown()
    assert not is_running(pid)
    assert worker.exit_code == -signal.SIGKILL


def test_one_that_dies_before_it_is_ready(tmp_path: Path) -> None:
    with pytest.raises(ContainerFailed) as failure:
        stub("print('no such backend', flush=True)").launch(tmp_path)
    assert "no such backend" in failure.value._container.logs()


def test_one_that_dies_while_it_is_waited_for(tmp_path: Path) -> None:
    worker = stub("import time; print('starting', flush=True); time.sleep(600)").launch(
        tmp_path, wait=False
    )
    os.kill(pid_of(worker), signal.SIGKILL)
    with pytest.raises(ContainerFailed):
        worker._wait_ready()


def test_one_that_is_never_ready(tmp_path: Path) -> None:
    worker = stub("import time; print('starting', flush=True); time.sleep(600)").launch(
        tmp_path, wait=False
    )
    poll(lambda: "starting" in worker.logs(), "it to start")
    with pytest.raises(ContainerNotReady, match=r"not ready within 0 s:\nstarting"):
        worker._wait_ready(timeout=0)
    worker.teardown()


def test_an_earlier_runs_prompt_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    once = f"""
import pathlib, time
marker = pathlib.Path({str(marker)!r})
if not marker.exists():
    marker.touch()
    print("recallq worker ready", flush=True)
    time.sleep(600)
"""
    worker = stub(once).launch(tmp_path)
    with pytest.raises(ContainerFailed):
        worker.restart()


def test_a_log_that_is_half_written(tmp_path: Path) -> None:
    code = "import os, time; os.write(1, 'grö'.encode()[:-1]); time.sleep(600)"
    worker = stub(code).launch(tmp_path, wait=False)
    poll(lambda: "gr" in worker.logs(), "its output")
    assert worker.logs() == "gr\N{REPLACEMENT CHARACTER}"
    worker.teardown()


# --- Redis ----------------------------------------------------------------------------------------


def test_redis_is_ready_and_says_where(redis: LocalRedisContainer) -> None:
    assert redis.ready()
    assert redis.url == redis.host_url == f"redis://127.0.0.1:{redis.port}/0"
    assert redis.celeryconfig == {
        "url": redis.url,
        "host_url": redis.url,
        "hostname": "127.0.0.1",
        "port": redis.port,
        "vhost": "0",
    }
    with redis.client as client:
        assert client.ping()
        assert client.info("server")["redis_version"] == redis.version()


def test_redis_has_a_port_as_a_container_has(redis: LocalRedisContainer) -> None:
    assert redis._wait_port(f"{redis.port}/tcp") == redis.port
    assert redis.ports[f"{redis.port}/tcp"] == [redis.port]
    assert redis.ips.primary == "127.0.0.1"


@pytest.mark.parametrize("kill", [False, True])
def test_redis_restarts_on_its_port_with_its_data(kill: bool, redis: LocalRedisContainer) -> None:
    url, pid = redis.url, redis.pid
    with redis.client as client:
        client.set("key", "kept")
    if kill:
        redis.kill()
        assert redis.status == "exited"
        assert redis.url == url
    redis.restart()
    assert redis.url == url
    assert redis.pid != pid
    with redis.client as client:
        assert client.get("key") == "kept"
    assert redis.logs().count("Ready to accept connections") == 2


def test_redis_can_be_frozen(redis: LocalRedisContainer) -> None:
    process = psutil.Process(redis.pid)
    redis.kill("SIGSTOP")
    poll(lambda: process.status() == psutil.STATUS_STOPPED, "it to stop")
    redis.kill("SIGCONT")
    with redis.client as client:
        assert client.ping()


def test_redis_ends_with_its_teardown(redis: LocalRedisContainer) -> None:
    pid = pid_of(redis)
    redis.teardown()
    assert not is_running(pid)
    assert redis.status == "exited"
    assert "Ready to accept connections" in redis.logs()
    redis.teardown()


# --- under pytest-celery --------------------------------------------------------------------------


@pytest.fixture
def setup(redis: LocalRedisContainer, worker: StubWorker) -> CeleryTestSetup:
    """As pytest-celery's own `celery_setup` puts it together."""
    broker = CeleryBrokerCluster(CeleryTestBroker(redis))
    backend = CeleryBackendCluster(CeleryTestBackend(redis))
    config = CeleryTestSetup.config(
        {
            "celery_broker_cluster_config": broker.config(),
            "celery_backend_cluster_config": backend.config(),
        }
    )
    app = CeleryTestSetup.create_setup_app(config, CeleryTestSetup.name())
    workers = CeleryWorkerCluster(CeleryTestWorker(worker, app=app))
    return CeleryTestSetup(workers, broker, backend, app)


def test_a_setup_of_local_nodes(setup: CeleryTestSetup, redis: LocalRedisContainer) -> None:
    assert setup.ready(ping=False, control=False, docker=True)
    assert len(setup) == 3
    assert setup.app.conf.broker_url == redis.url
    assert setup.app.conf.result_backend == redis.url
    assert setup.worker.worker_queue == "recallq.live"
    assert setup.worker_cluster.versions == {LocalWorkerContainer.version()}
    assert setup.worker.hostname().startswith("recallq@")
    setup.worker.assert_log_exists("recallq worker ready")


@pytest.mark.parametrize("force", [False, True])
def test_nodes_restart(force: bool, setup: CeleryTestSetup, redis: LocalRedisContainer) -> None:
    assert setup.ready()
    url = redis.url
    pids = redis.pid, setup.worker.container.pid
    setup.broker.restart(force=force)
    setup.worker.restart(force=force)
    assert setup.ready()
    assert setup.app.conf.broker_url == url
    assert not {redis.pid, setup.worker.container.pid} & set(pids)


def test_a_killed_node(setup: CeleryTestSetup) -> None:
    setup.worker.kill()
    setup.worker.kill()  # of what has exited already
    assert setup.worker.container.status == "exited"
    with pytest.raises(ContainerFailed, match="already exited"):
        setup.worker.ready()
