"""Threads that run library calls: as many as are needed, no more than allowed, none at the end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError

import pytest

from recallq_worker.daemon_threads import DaemonThreads


def test_results_and_errors_are_the_callers() -> None:
    threads = DaemonThreads(2, "t")
    assert threads.submit(lambda a, b: a + b, 1, b=2).result(30) == 3
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 / 0).result(30)
    assert threads.submit(threading.current_thread).result(30).daemon
    threads.shutdown()
    with pytest.raises(RuntimeError):
        threads.submit(time.time)


def test_no_more_at_once_than_allowed() -> None:
    threads = DaemonThreads(3, "t")
    running, most, lock = 0, 0, threading.Lock()

    def work() -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return threading.current_thread().name

    names = {each.result(30) for each in [threads.submit(work) for _ in range(30)]}
    assert most == 3
    assert len(names) == 3
    threads.shutdown()


def test_threads_are_used_again() -> None:
    threads = DaemonThreads(10, "t")
    names = set()
    for _ in range(20):
        names.add(threads.submit(threading.current_thread).result(30).name)
        time.sleep(0.02)
    assert len(names) < 5
    threads.shutdown()


def test_what_was_cancelled_before_its_turn_is_not_run() -> None:
    threads = DaemonThreads(1, "t")
    gate = threading.Event()
    ran: list[int] = []
    first = threads.submit(gate.wait, 30)
    second = threads.submit(ran.append, 1)
    assert second.cancel()
    gate.set()
    assert first.result(30)
    with pytest.raises(CancelledError):
        second.result(30)
    threads.submit(time.time).result(30)
    assert ran == []
    threads.shutdown()


def test_a_process_does_not_wait_for_them() -> None:
    program = (
        "import time; from recallq_worker.daemon_threads import DaemonThreads;"
        "DaemonThreads(1, 't').submit(time.sleep, 90); time.sleep(0.2)"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=80)
    assert time.monotonic() - began < 60
