"""The README: its program runs, its commands exist, and it stays short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from recallq.settings import ENV_PREFIX
from recallq_worker.settings import WorkerSettings
from tests.support import Worker, clean_environment

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_its_program_runs(redis_worker: Worker) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    run = subprocess.run(
        [sys.executable, "-c", program.replace("redis://localhost:6379/0", redis_worker.url)],
        env=clean_environment(RECALLQ_NAMESPACE=redis_worker.namespace),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "added=1" in run.stdout


@pytest.mark.parametrize(
    "line", sorted(set(re.findall(r"^    recallq (.+)$", README, re.MULTILINE)))
)
def test_its_commands_exist(line: str) -> None:
    """Each is parsed by the command it names; --help keeps it from running."""
    words = line.partition("#")[0].split()
    run = subprocess.run(
        [sys.executable, "-c", "from recallq.cli import main; main()", words[0], "--help"],
        env=clean_environment(COLUMNS="200"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0
    for option in (word for word in words if word.startswith("--")):
        assert option in run.stdout


def test_its_settings_exist_with_these_defaults() -> None:
    rows = re.findall(r"^\| `RECALLQ_([A-Z_]+)` \| (.+?) \|", README, re.MULTILINE)
    assert len(rows) > 5
    for name, default in rows:
        field = WorkerSettings.model_fields[name.lower()]
        assert str(field.default) == ("None" if default == "none" else default.strip("`"))
    for name in re.findall(rf"{ENV_PREFIX}([A-Z_]+)=", README):
        assert name.lower() in WorkerSettings.model_fields


def test_the_files_it_names_exist() -> None:
    for name in re.findall(r"`((?:producer|worker|tests)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name
