"""What strikes a backend without anybody's doing: how often, a file says, which may change at any
moment, so that all processes of a run are in the same weather.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

_LOOK_EVERY = 0.1
FAIR = {"unavailable": 0.03, "lost_reply": 0.02, "slow": 0.1, "stuck": 0.0005}
"""Chances for each call: to fail before it takes effect, to fail after it, to take its time, and
never to end."""
STORM = {"unavailable": 0.5, "lost_reply": 0.2, "slow": 0.2, "stuck": 0.0}


def set_weather(path: Path, rates: dict[str, float]) -> None:
    """Replaces what `Weather` reads."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rates))
    new.replace(path)


class Weather:
    """What the file says, at most a tenth of a second late."""

    def __init__(self, path: Path | None, chance: random.Random) -> None:
        self.chance = chance
        self._path = path
        self._looked_at = 0.0
        self._rates: dict[str, float] = {}

    def happens(self, what: str, share: float = 1.0) -> bool:
        """By a coin, as often as the file says, or in a share of these times."""
        return self.chance.random() < share * self._now().get(what, 0.0)

    def coin(self) -> bool:
        return self.chance.random() < 0.5

    def nap(self) -> float:
        """Seconds: mostly short."""
        return self.chance.uniform(0.01, 0.1) * self.chance.choice((1, 2, 4, 8))

    def _now(self) -> dict[str, float]:
        if self._path is not None and time.monotonic() > self._looked_at + _LOOK_EVERY:
            self._looked_at = time.monotonic()
            self._rates = json.loads(self._path.read_text())
        return self._rates
