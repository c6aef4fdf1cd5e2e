"""Programs and rights that some tests need, and not every machine has.

What is in `deploy/` is for systems that a developer need not have: nobody can install systemd or
kubectl from a package index, make namespaces without root, or fetch anything offline. All other
tests are worth running there. So a test that lacks something is skipped, here and nowhere else, and
says what it lacked; where `REQUIRED` is set, as `.ci/run` does, it fails.
"""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

REQUIRED = "RECALLQ_TEST_ALL_REQUIRED"
_REQUIRED = bool(os.environ.get(REQUIRED))
"""As this process was started: tests run with variables of their own."""


def lacking(what: str) -> NoReturn:
    """Ends a test for want of something."""
    if _REQUIRED:
        pytest.fail(f"{what} ({REQUIRED} is set)")
    # What the test is about cannot be had on this machine, which says nothing about RecallQ.
    pytest.skip(reason=f"not to be had on this machine: {what}")


def program(name: str, why: str) -> None:
    """Ends a test where a program is not on PATH; `why` nothing else will do."""
    if not shutil.which(name):
        lacking(f"there is no {name} here, and {why}")
