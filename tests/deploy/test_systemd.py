"""The systemd units, as far as that can be told without a running systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from recallq_worker import stopping
from tests import needs
from tests.deploy.files import DEPLOY, longest_stop, variables
from tests.support import RECALLQ

UNITS = DEPLOY / "systemd"
UNIT = (UNITS / "recallq-worker@.service").read_text()


def values(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def test_systemd_understands_it(tmp_path: Path) -> None:
    """With a program that is here in place of the one that is to be installed."""
    needs.program("systemd-analyze", "only systemd itself can judge its units")
    text = UNIT.replace("/opt/recallq/bin/recallq", RECALLQ)
    shutil.copy(UNITS / "recallq.slice", tmp_path)
    units = ["./recallq-worker@.service", "./recallq-worker@live.service"]
    for unit in units:
        (tmp_path / unit).write_text(text)
    run = subprocess.run(
        ["systemd-analyze", "verify", *units],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in run.stderr.splitlines() if "recallq" in line]
    assert (run.returncode, ours) == (0, [])


def test_it_may_do_little(tmp_path: Path) -> None:
    needs.program("systemd-analyze", "only systemd itself can judge its units")
    (tmp_path / "recallq-worker@live.service").write_text(UNIT)
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager"]
    run = subprocess.run(
        [*command, "./recallq-worker@live.service"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if "unrecognized option" in run.stderr:
        # Before systemd 250, --offline and --threshold are not known.
        needs.lacking("this systemd cannot judge units that it does not run")
    assert run.returncode == 0, run.stdout


def test_a_worker_can_count_what_it_uses() -> None:
    """The process_* metrics come from /proc/stat, which is not of a process."""
    assert values("ProcSubset") == []
    assert values("ProtectProc") == ["invisible"]


def test_the_file_of_an_instance_for_several_lanes() -> None:
    needs.program("systemd-escape", "only systemd itself says how it writes names")
    run = subprocess.run(
        ["systemd-escape", "live,bulk"], capture_output=True, text=True, check=True
    )
    assert f"/etc/recallq/{run.stdout.strip()}.env" in UNIT
    assert f"{run.stdout.strip()}.env" in (UNITS / "recallq.env.example").read_text()


@pytest.mark.parametrize(
    ("instance", "lanes"), [("live", "live"), ("slow:2", "slow"), ("live,bulk", "live,bulk")]
)
def test_the_instance_says_the_lanes(instance: str, lanes: str) -> None:
    (command,) = values("ExecStart")
    matched = re.fullmatch(r"/bin/sh -c '(.*)' recallq-worker %I", command)
    assert matched
    script = matched[1].replace("$$", "$").replace("%%", "%")
    assert script.startswith("exec /opt/recallq/bin/recallq ")  # the worker gets the signals
    script = script.replace("exec /opt/recallq/bin/recallq", "echo")
    run = subprocess.run(
        ["/bin/sh", "-c", script, "recallq-worker", instance],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["worker", "--lanes", lanes]


def test_there_is_time_to_stop() -> None:
    (limit,) = values("TimeoutStopSec")
    assert float(limit) > longest_stop() + stopping.PATIENCE + stopping._CLOSING
    assert values("KillMode") == ["mixed"]
    assert values("Restart") == ["always"]


def test_its_environment() -> None:
    example = (UNITS / "recallq.env.example").read_text()
    assert values("EnvironmentFile") == ["/etc/recallq/recallq.env", "-/etc/recallq/%i.env"]
    named = set(re.findall(r"^#?(RECALLQ_\w+)=", example, re.MULTILINE))
    assert named <= variables()
    assert {"RECALLQ_REDIS_URL", "RECALLQ_HTTP_PORT"} <= named
