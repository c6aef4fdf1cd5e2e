"""Asking workers what they tell those who watch over them."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from typing import Any, TypeAlias

from prometheus_client.parser import text_string_to_metric_families

from recallq import MemoryClient

Samples: TypeAlias = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""By name and labels."""


def ask(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://{address}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def addresses(client: MemoryClient) -> list[str]:
    return [each.http for each in await client.workers() if each.http is not None]


async def scraped(address: str) -> Samples:
    status, text = await asyncio.to_thread(ask, address, "/metrics")
    assert status == 200, text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: Any) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)
