"""``python -m tests.fuzz --seconds 600 [--only results]``: for as long as it is told."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import TARGETS, Target

_ROUND = 500


def attempt(target: Target, number: int) -> int:
    """Tries some inputs, others for each number. Raises what the smallest bad one raised."""
    tried = 0

    @seed(number)
    @settings(
        max_examples=_ROUND,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(target.inputs)
    def once(value: Any) -> None:
        nonlocal tried
        tried += 1
        target.use(value)

    run: Callable[[], None] = once
    run()
    return tried


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, altogether")
    parser.add_argument("--only", choices=sorted(TARGETS), help="one of the readers")
    parser.add_argument("--seed", type=int, default=1, help="where to begin")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # a damaged row is told of each time
    chosen = [options.only] if options.only else sorted(TARGETS)
    tried = dict.fromkeys(chosen, 0)
    end, number = time.monotonic() + options.seconds, options.seed
    while time.monotonic() < end:
        for name in chosen:
            tried[name] += attempt(TARGETS[name], number)
        number += 1
    for name, times in tried.items():
        print(f"{times:>10,}  {name}")
    print(f"seeds {options.seed} to {number - 1}: nothing but documented errors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
