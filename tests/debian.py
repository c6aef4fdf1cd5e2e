"""Programs of Debian's packages, for tests, without installing them: any user may, and apt checks
where they come from."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_PATIENCE = 90
"""Seconds for one call of apt."""


def unpack(packages: Sequence[str], into: Path, *, optional: Sequence[str] = ()) -> None:
    """Fetches packages and unpacks them below `into`. What a release does not have of `optional`,
    it does not need. Raises `OSError`, saying what went wrong."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise OSError("this is no Debian")
    scratch = into.with_name(f"{into.name}.apt")
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (scratch / name).mkdir(parents=True)
    debs = scratch / "debs"
    common = ["-qq", "-o", "APT::Sandbox::User=root"]
    # Lists of its own, if the machine's are missing or too old: they need no rights.
    own = ["-o", f"Dir::State::lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
    for options in ([*common], [*common, *own]):
        if own[1] in options:
            _apt([*options, "update"], debs)
        failed = [each for each in packages if not _apt([*options, "download", each], debs)]
        if not failed:
            break
    else:
        raise OSError(f"apt-get download {' '.join(failed)} failed")
    for each in optional:
        _apt([*options, "download", each], debs)
    try:
        for deb in debs.glob("*.deb"):
            command = ["dpkg-deb", "--extract", str(deb), str(into)]
            subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE)
    except subprocess.SubprocessError as error:
        raise OSError(f"a package cannot be unpacked: {type(error).__name__}") from error
    shutil.rmtree(scratch)


def _apt(arguments: Sequence[str], directory: Path) -> bool:
    command = ["apt-get", *arguments]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        run = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, timeout=_PATIENCE,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:  # no way out to the network, say
        return False
    return run.returncode == 0
