"""``recallq demo``: the main job from end to end, in front of the user's eyes.

A real Redis, a real worker process and the public client, on the sample conversations that come
with the package. Nothing is left behind.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress

import orjson

from recallq import sample
from recallq.cli.memory import printable
from recallq.cli.runner import fail, guarded, run
from recallq.cli.stack import Stack
from recallq.client import MemoryClient
from recallq.contract import Hit, Lane
from recallq.ingest import ingest

_QUERIES = (("alice", "peanuts allergy"), ("小林", "杭州 龙井"))


def demo() -> None:
    """Show the main job on a sample conversation log, with a Redis and a worker of its own."""
    print("Starting a private Redis and a worker ...", flush=True)
    stack = Stack(None)
    began = time.monotonic()
    try:
        guarded(stack.start)
        print(f"  ready after {time.monotonic() - began:.1f} s: {stack.url}\n", flush=True)
        run(_show(stack.url))
    finally:
        stack.stop()
    print("\nStopped the worker and Redis; nothing is left behind.")
