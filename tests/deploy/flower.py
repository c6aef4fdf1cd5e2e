"""A real Flower, started as compose does."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from tests.deploy.files import DEPLOY
from tests.support import Worker, clean_environment, wait_or_kill


def ask(address: str, path: str) -> Any:
    """What its API says; None if it does not answer yet."""
    credentials = base64.b64encode(b"recallq:secret").decode()
    headers = {"Authorization": f"Basic {credentials}"}
    request = urllib.request.Request(f"http://{address}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)
    except (OSError, ValueError):
        return None


@contextmanager
def flower_for(worker: Worker) -> Iterator[str]:
    """Its address, when it has heard of the worker."""
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["flower"]
    assert service["entrypoint"][0] == "celery"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = [
        each.replace("0.0.0.0", "127.0.0.1").replace("5555", str(port))
        for each in service["command"]
    ]
    environment = clean_environment(
        RECALLQ_REDIS_URL=worker.url,
        RECALLQ_NAMESPACE=worker.namespace,
        FLOWER_BASIC_AUTH="recallq:secret",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", *service["entrypoint"], *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        # It hears of a worker by its heart-beat.
        while not any((ask(address, "/api/workers?status=1") or {}).values()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        wait_or_kill(process)
