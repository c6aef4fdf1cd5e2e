"""Imports ReMe, and leaves no trace of that in the process.

As they are imported, ReMe and flowllm read a ``.env`` file from this directory or one of four above
into the environment, set variables of their own, change the filters of warnings, and announce
themselves; what they log quotes prompts, which are what users said. Libraries that they bring along
fetch price lists and report usage, unless told not to.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from importlib import import_module, metadata

from recallq.errors import MissingExtra

_QUIET = {
    "ANONYMIZED_TELEMETRY": "False",  # chromadb
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}

_lock = threading.Lock()
_imported: list[Imported] = []
"""Once it is."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What importing came to."""

    version: str
    seconds: float
    megabytes: float
    """By which the process has grown."""

    def __str__(self) -> str:
        return f"ReMe {self.version}, imported in {self.seconds:.1f} s, {self.megabytes:.0f} MB"


def import_reme(wanted_by: str) -> Imported:
    """Imports ReMe, unless that is done. Blocks for seconds: call it in a thread.

    Raises `MissingExtra`.
    """
    with _lock:
        if not _imported:
            _imported.append(_import(wanted_by))
        return _imported[0]


def _import(wanted_by: str) -> Imported:
    try:
        from loguru import logger
    except ImportError:
        raise MissingExtra(wanted_by, "reme") from None
    for name in ("flowllm", "reme_ai"):
        logger.disable(name)
    environment, began, size = dict(os.environ), time.perf_counter(), _peak()
    os.environ.update(_QUIET)
    try:
        with warnings.catch_warnings():
            import_module("reme_ai")
    except ImportError:
        raise MissingExtra(wanted_by, "reme") from None
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
    seconds = time.perf_counter() - began
    return Imported(metadata.version("reme-ai"), seconds, _peak() - size)


def _peak() -> float:
    """Megabytes that the process has had at most."""
    if sys.platform == "win32":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
