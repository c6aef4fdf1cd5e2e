"""``python -m tests.chaos --jobs 50000 --seed 1``: the long form."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys

from tests.chaos.driver import Options, run
from tests.chaos.faults import Fault
from tests.chaos.llm import is_needed
from tests.support import SETTINGS

_MILD = (Fault.STOP_WORKER, Fault.CUT_SUBSCRIPTIONS, Fault.KILL_PRODUCER)
_JOBS_PER_POISON = 1000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=None, help="by default a new one")
    parser.add_argument(
        "--backend", default="flaky_redis", help="or flaky_indexed, flaky_extractor, reme_personal"
    )
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--producers", type=int, default=1, help="in processes of their own")
    parser.add_argument("--rate", type=float, default=200, help="jobs per second")
    parser.add_argument("--minutes-limit", type=float, default=None)
    parser.add_argument("--mild", action="store_true", help="only what loses nothing by itself")
    parser.add_argument("--keep", action="store_true", help="leave the run's directory behind")
    given = vars(parser.parse_args())
    if given["seed"] is None:
        given["seed"] = secrets.randbelow(1_000_000)
    poisons: tuple[str, ...] = ("poison-permanent", "poison-transient", "poison-kill")
    if given["backend"] == "flaky_extractor":
        # Of a user everything happens in order: what is tried again for long holds up the rest.
        poisons = ("poison-permanent", "poison-kill")
    if is_needed(given["backend"]):
        poisons = ()  # it is the other backends that take it
    if given.pop("mild"):
        given |= {"faults": _MILD, "weather": {"slow": 0.05}}
        poisons = poisons[:1]
    share = max(1, given["jobs"] // _JOBS_PER_POISON // max(1, len(poisons)))
    given["poisons"] = poisons * share
    for name in list(os.environ):
        if name.startswith(SETTINGS):
            del os.environ[name]  # the run has settings of its own
    report = asyncio.run(run(Options(**given)))
    print(report)
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
