"""A producer in a process of its own, that may be killed at any moment.

``python -m tests.chaos.producer NAME --journals DIR ...`` works until its standard input ends. Its
settings come from the environment, as an agent's do.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import threading
from pathlib import Path

from recallq import MemoryClient, ServiceUnavailable
from tests.chaos.agents import Agents, Pace, World
from tests.chaos.history import Journal


async def produce(options: argparse.Namespace) -> None:
    pace = Pace(options.rate, float("inf"))
    loop = asyncio.get_running_loop()

    def finish_with_stdin() -> None:
        while os.read(0, 4096):
            pass
        loop.call_soon_threadsafe(pace.finish)

    with Journal(options.journals, options.name) as journal:
        threading.Thread(target=finish_with_stdin, daemon=True).start()
        memory = await _connect()
        try:
            chance = random.Random(f"{options.seed}-{options.name}")
            world = World(options.users, options.sessions, options.call_timeout)
            agents = Agents(memory, journal, world, chance)
            await asyncio.gather(*(agents.work(pace) for _ in range(options.agents)))
        finally:
            await memory.stop()


async def _connect() -> MemoryClient:
    while True:
        memory = MemoryClient(backend=None)
        try:
            await memory.start()
        except ServiceUnavailable:
            await asyncio.sleep(0.1)  # Redis is being restarted
        else:
            return memory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--journals", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--users", type=int, required=True)
    parser.add_argument("--sessions", type=int, required=True)
    parser.add_argument("--agents", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--call-timeout", type=float, required=True)
    asyncio.run(produce(parser.parse_args()))


if __name__ == "__main__":
    main()
