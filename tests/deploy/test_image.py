"""The image: its Dockerfile is sound, its steps install what is locked, and its worker stops."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from packaging.requirements import Requirement

from recallq.embedded import EmbeddedRedis
from tests import needs
from tests.deploy import tools
from tests.deploy.files import DEPLOY, PORT, ROOT
from tests.needs import lacking
from tests.support import READY, RECALLQ, clean_environment

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    """What stands behind an instruction, for each time that it is there."""
    joined = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", "")
    return re.findall(rf"^{name} +(.*)$", joined, re.MULTILINE)


def test_the_linter_finds_nothing() -> None:
    run = subprocess.run(
        [tools.hadolint(), str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, "")


def test_what_the_image_is() -> None:
    assert instructions("FROM") == ["${BASE} AS build", "${BASE}"]
    assert all("slim" in each for each in instructions("ARG") if each.startswith("BASE="))
    assert instructions("USER") == ["10001:10001"]
    assert instructions("ENTRYPOINT") == ['["recallq"]']  # no shell, which would swallow SIGTERM
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert instructions("EXPOSE") == [str(PORT)]
    (environment,) = [each for each in instructions("ENV") if "RECALLQ" in each]
    assert f"RECALLQ_HTTP_PORT={PORT}" in environment
    assert "RECALLQ_HTTP_HOST=0.0.0.0" in environment
    # The user's number is what Kubernetes is told, too.
    assert "--uid 10001 --gid 10001" in " ".join(instructions("RUN"))


def test_what_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for each in instructions("COPY")
        if not each.startswith("--from")
        for source in each.split()[:-1]
    }
    assert copied == let_in
    assert all((ROOT / each).exists() for each in let_in)


def test_the_steps_install_what_is_locked(tmp_path: Path) -> None:
    """The instructions of the build stage, in a directory in place of the image's root."""
    for name in ("src", "opt", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    environment = clean_environment(
        EXTRAS="worker",
        PATH=f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}",
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PYTHONPATH="",
    )
    build = DOCKERFILE[: DOCKERFILE.index("# --- the image")].replace("\\\n", "")
    for kind, rest in re.findall(r"^(RUN|COPY) +(.*)$", build, re.MULTILINE):
        if kind == "COPY":
            _copy(*rest.split(), into=tmp_path / "src")
            continue
        command = ["sh", "-ec", rest.replace("/opt/", f"{tmp_path}/opt/")]
        run = subprocess.run(
            command,
            cwd=tmp_path / "src",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if "NewConnectionError" in run.stderr or "NameResolutionError" in run.stderr:
            # The steps install from the index, as an image's build does: offline there is nothing
            # to be told about them. Any other failure of theirs is one of the test.
            lacking("there is no package index to install from")
        assert run.returncode == 0, run.stderr
    (packages,) = tmp_path.glob("opt/recallq/lib/*/site-packages")
    found = {
        _normal(each.metadata["Name"]): each.version
        for each in importlib.metadata.distributions(path=[str(packages)])
    }
    assert found.pop("recallq")
    assert {"pip", "uv", "pytest"}.isdisjoint(found)
    lock = (ROOT / "requirements.lock").read_text()
    assert found.items() <= set(re.findall(r"^([\w.-]+)==([\w.]+)", lock, re.MULTILINE))
    run = subprocess.run(
        [str(tmp_path / "opt" / "recallq" / "bin" / "recallq"), "backends"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (redis,) = [line.split() for line in run.stdout.splitlines() if line.startswith("redis ")]
    assert redis == ["redis", "extra", "worker", "installed"]


def _copy(*names: str, into: Path) -> None:
    """As COPY does: the last name is the target, and of a directory its content is copied."""
    *sources, target = names
    for source in (ROOT / name for name in sources):
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, into / target, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy(source, into / target)


def test_the_lock_has_what_extras_need() -> None:
    locked = {
        _normal(name)
        for name in re.findall(
            r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE
        )
    }
    (extras,) = [each.split("=")[1] for each in instructions("ARG") if each.startswith("EXTRAS=")]
    assert extras == "worker"
    wanted = ("worker", "mem0", "reme", "tablestore", "dashscope", "openai", "flower")
    assert all(f"`{each}`" in DOCKERFILE for each in wanted)
    needed: set[str] = set()
    _follow("recallq", frozenset(wanted), needed)
    assert needed - {"recallq"} <= locked


def _follow(name: str, extras: frozenset[str], needed: set[str]) -> None:
    """Adds what `name` with `extras` needs, as far as it is installed here."""
    seen = set()
    todo = [(name, extras)]
    while todo:
        each = todo.pop()
        if each in seen:
            continue
        seen.add(each)
        name, extras = each
        needed.add(_normal(name))
        for line in importlib.metadata.requires(name) or []:
            wanted = Requirement(line)
            marker = wanted.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in extras | {""}):
                todo.append((wanted.name, frozenset(wanted.extras)))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_worker_stops_as_first_process(tmp_path: Path) -> None:
    """In a container it is process 1, for which SIGTERM has no default, and can write to one
    directory alone: here not to /tmp, in which the repository may be."""
    needs.program("unshare", "it makes the namespaces that a container has")
    if os.geteuid() != 0:
        lacking("only root may make namespaces and mount in them")
    if subprocess.run(["unshare", "--pid", "--mount", "--fork", "true"], check=False).returncode:
        # As in a container without CAP_SYS_ADMIN, where root may not either.
        lacking("this machine gives no namespaces of processes")
    writable = tmp_path / "writable"
    writable.mkdir()
    with EmbeddedRedis() as redis:
        environment = clean_environment(
            RECALLQ_REDIS_URL=redis.url,
            RECALLQ_HTTP_PORT="0",
            HOME=str(writable),
            TMPDIR=str(writable),
            PYTHONDONTWRITEBYTECODE="1",
        )
        script = (
            f"mount -t tmpfs none {writable}; mount -o remount,bind,ro /; cd {writable}; "
            f"if touch {tmp_path}/x 2>/dev/null; then echo writable; fi; "
            f"exec {RECALLQ} worker --lanes live"
        )
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                ["unshare", "--pid", "--mount", "--fork", "--kill-child", "sh", "-ec", script],
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            said = _wait_for(READY, tmp_path / "log", process)
            assert READY in said, said
            assert "writable" not in said.splitlines()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            os.kill(int(children.split()[0]), signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


def _wait_for(text: str, log: Path, process: subprocess.Popen[bytes]) -> str:
    """What the log says, as soon as it has `text` or the process has ended."""
    deadline = time.monotonic() + 60
    while text not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return log.read_text()
