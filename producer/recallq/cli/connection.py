"""Where a command finds its Redis.

In this order: ``--url`` or ``RECALLQ_*_URL``; a ``recallq up`` that is running; else, for commands
that do the user's work, an embedded stack of their own for as long as they take.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Optional

import typer

from recallq import tracing
from recallq.cli.stack import Stack, default_data_dir
from recallq.client import MemoryClient
from recallq.embedded import EmbeddedRedis
from recallq.errors import ServiceUnavailable
from recallq.redis_client import redact
from recallq.settings import ENV_PREFIX, ClientSettings

UrlOption = Annotated[
    Optional[str],
    typer.Option("--url", help="Redis URL; else RECALLQ_REDIS_URL, else a running 'recallq up'."),
]


_OWN = tuple(f"{ENV_PREFIX}{name}_URL" for name in ("REDIS", "BROKER", "COORDINATION"))
_REFERENCE = "MEMORY_REDIS_REDIS_URL"


def is_named() -> bool:
    """Whether the environment names a Redis."""
    return any(os.environ.get(name) for name in (*_OWN, _REFERENCE))


def named_url() -> str | None:
    """The URL that the reference's variable names; None leaves it to RecallQ's own variables."""
    if any(os.environ.get(name) for name in _OWN):
        return None
    return os.environ.get(_REFERENCE) or None


def running_url() -> str | None:
    """The URL of a running ``recallq up``."""
    return EmbeddedRedis.running(default_data_dir())


def describe_target(url: str | None, tenant: str | None) -> str:
    """Where `connect` leads and whose memory it is, for people to read; without credentials."""
    settings = ClientSettings.load(redis_url=url or named_url(), tenant=tenant)
    if url or is_named():
        place = redact(settings.redis_url)
    else:  # its address is another every time; its data is not
        place = f"the embedded Redis in {default_data_dir()}"
    return f"{place}, namespace {settings.namespace}, tenant {settings.tenant}"


@asynccontextmanager
async def connect(url: str | None, **settings: Any) -> AsyncIterator[MemoryClient]:
    """A started client, with an embedded stack under it if there is nothing else."""
    if url is None and is_named():
        url = named_url()
    elif url is None:
        url = await asyncio.to_thread(running_url)
        if url is None:
            async with _embedded() as url, _client(url, **settings) as client:
                yield client
            return
    async with _client(url, **settings) as client:
        yield client


@asynccontextmanager
async def connect_existing(url: str | None, **settings: Any) -> AsyncIterator[MemoryClient]:
    """A started client for what is running already. Raises `ServiceUnavailable` if nothing is."""
    async with _client(await existing_url(url), **settings) as client:
        yield client


def _client(url: str | None, **settings: Any) -> MemoryClient:
    client = MemoryClient(url, **settings)
    if client.settings.traces:
        tracing.export("recallq")  # what is left at the end, the SDK sends as the process exits
    return client


async def existing_url(url: str | None) -> str | None:
    """The URL of what is running already; None leaves it to the settings."""
    if url is not None:
        return url
    if is_named():
        return named_url()
    found = await asyncio.to_thread(running_url)
    if found is None:
        raise ServiceUnavailable(
            "no Redis was named and no 'recallq up' is running here; start 'recallq up', give "
            "--url, or set RECALLQ_REDIS_URL"
        )
    return found


@asynccontextmanager
async def _embedded() -> AsyncIterator[str]:
    data_dir = default_data_dir()
    stack = Stack(data_dir)
    print(
        f"recallq: no Redis was named; running an embedded one in {data_dir} for this command "
        "('recallq up' keeps one)",
        file=sys.stderr,
    )
    starting = asyncio.create_task(asyncio.to_thread(stack.start))
    try:
        # Shielded: a start that is interrupted half-way must end before it can be undone.
        await asyncio.shield(starting)
        yield stack.url
    finally:
        await asyncio.wait([starting])
        await asyncio.to_thread(stack.stop)
