"""What the tests of `deploy/` share: where things are, and what RecallQ's settings are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr
from pydantic_settings import BaseSettings

from recallq.contract import Lane
from recallq_worker.backends.mem0.settings import Mem0Settings
from recallq_worker.backends.reme.settings import RemeSettings
from recallq_worker.backends.tablestore.settings import TablestoreSettings
from recallq_worker.models import ModelSettings
from recallq_worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "recallq"
ALERTS = CHART / "files" / "alerts.yml"
DASHBOARD = CHART / "files" / "dashboard.json"

PORT = 9465
LANES = [lane.value for lane in Lane]

_SETTINGS: tuple[type[BaseSettings], ...] = (
    WorkerSettings,
    ModelSettings,
    Mem0Settings,
    RemeSettings,
    TablestoreSettings,
)


def variables(*, secret: bool = True) -> set[str]:
    """The names of all RECALLQ_* variables; without `secret`, not those that hold one."""
    found = set()
    for settings in _SETTINGS:
        prefix = settings.model_config["env_prefix"]
        for name, field in settings.model_fields.items():
            hidden = SecretStr.__name__ in str(field.annotation) or not field.repr
            if secret or not hidden:
                found.add(f"{prefix}{name}".upper())
    return found


def default(name: str) -> Any:
    """The default of one of the worker's settings."""
    return WorkerSettings.model_fields[name].default


def longest_stop() -> float:
    """Seconds that a worker with default settings may need to finish what it holds."""
    return float(default("job_timeout") + default("slow_patience"))


def documents(text: str) -> list[dict[str, Any]]:
    """The documents of some YAML, without empty ones."""
    return [each for each in yaml.safe_load_all(text) if each]


def seconds(duration: str) -> float:
    """What ``90s``, ``2m`` or ``1m30s`` are."""
    total, number = 0.0, ""
    for character in duration:
        if character in "hms":
            total += float(number) * {"h": 3600, "m": 60, "s": 1}[character]
            number = ""
        else:
            number += character
    assert not number, f"{duration} has no unit"
    return total
