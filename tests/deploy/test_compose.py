"""The compose file, as Docker Compose itself reads it: that needs no engine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis import Redis
from redis.exceptions import AuthenticationError

from recallq.embedded import find_server
from recallq.redis_client import check_url
from tests.deploy import settings_file, tools
from tests.deploy.files import CHART, DEPLOY, LANES, PORT, longest_stop, seconds, variables
from tests.support import clean_environment, wait_or_kill

PASSWORDS = {"REDIS_PASSWORD": "r-1", "GRAFANA_PASSWORD": "g-1", "FLOWER_PASSWORD": "f-1"}
OURS = ["flower", "recallq", "worker-bulk", "worker-live", "worker-slow"]


def config(
    *files: str, options: Sequence[str] = (), **given: str
) -> subprocess.CompletedProcess[str]:
    arguments = [part for name in files for part in ("--file", str(DEPLOY / name))]
    return subprocess.run(
        [*tools.docker_compose(), *options, *arguments, "--profile", "*", "config"],
        env=clean_environment(**given),
        capture_output=True,
        text=True,
        check=False,
    )


def read(*files: str, **given: str) -> dict[str, Any]:
    """What Docker Compose makes of the files, which it holds against its own schema."""
    run = config(*files, **PASSWORDS, **given)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = yaml.safe_load(run.stdout)
    return found


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = read("compose.yaml")["services"]
    return found


def test_compose_understands_it(services: dict[str, Any]) -> None:
    assert sorted(services) == sorted([*OURS, "redis", "prometheus", "grafana"])


@pytest.mark.parametrize("missing", PASSWORDS)
def test_a_password_that_is_missing(missing: str) -> None:
    given = {name: value for name, value in PASSWORDS.items() if name != missing}
    run = config("compose.yaml", **given)
    assert run.returncode != 0
    assert missing in run.stderr
    assert "copy compose.env.example to .env" in run.stderr


def test_the_example_names_what_is_needed() -> None:
    example = (DEPLOY / "compose.env.example").read_text()
    text = (DEPLOY / "compose.yaml").read_text()
    needed = set(re.findall(r"\$\{(\w+):\?", text))
    assert needed == set(PASSWORDS)
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == needed
    told = set(re.findall(r"^#(\w+)=", example, re.MULTILINE))
    known = set(re.findall(r"\$\{(\w+):-", text)) | set(settings_file.of_workers())
    assert told <= known


def test_the_settings_are_all_that_there_are() -> None:
    said = f"{settings_file.FILE.name} is not what the settings say: run 'make manifests'"
    assert settings_file.FILE.read_text() == settings_file.text(), said


def test_what_is_set_arrives_where_it_is_read() -> None:
    """And a secret nowhere else."""
    given = {name: f"{name}-1" for name in settings_file.of_workers()}
    services = read("compose.yaml", **given)["services"]
    found = {
        name: {key: value for key, value in (each.get("environment") or {}).items() if key in given}
        for name, each in services.items()
    }
    for lane in LANES:
        assert found[f"worker-{lane}"] == given
    assert found["recallq"] == {name: given[name] for name in settings_file.of_clients()}
    assert found["flower"] == {"RECALLQ_NAMESPACE": "RECALLQ_NAMESPACE-1"}
    for name in ("redis", "prometheus", "grafana"):
        assert found[name] == {}
    for name in OURS:
        own = {"FLOWER_PASSWORD", "GRAFANA_PASSWORD", "REDIS_PASSWORD"}
        assert not own & services[name]["environment"].keys()


def test_a_settings_file_does_as_the_shell_does(tmp_path: Path) -> None:
    """What is told to operators: .env beside the compose file."""
    lines = [f"{name}={value}\n" for name, value in PASSWORDS.items()]
    lines += ["RECALLQ_SLOW_PATIENCE=30\n", "RECALLQ_LOG_FORMAT=text\n"]
    (tmp_path / ".env").write_text("".join(lines))
    run = config("compose.yaml", options=["--env-file", str(tmp_path / ".env")])
    assert run.returncode == 0, run.stderr
    for lane in LANES:
        environment = yaml.safe_load(run.stdout)["services"][f"worker-{lane}"]["environment"]
        assert environment["RECALLQ_SLOW_PATIENCE"] == "30"
        assert environment["RECALLQ_LOG_FORMAT"] == "text"
        assert environment["RECALLQ_EVENTS"] == "true"  # for Flower, where nothing else is said
        assert environment["RECALLQ_CONCURRENCY"] is None  # which leaves it out


def test_the_pages_name_what_compose_hands_on() -> None:
    """Of the variables that others than RecallQ read."""
    pages = "".join(path.read_text() for path in DEPLOY.glob("*.md"))
    named = set(re.findall(r"\b(?:FLOW|OPENAI|DASHSCOPE|OTEL)_[A-Z_]*[A-Z]\b(?!_?\*)", pages))
    named |= set(re.findall(r"\b\w+_API_KEY\b", pages)) - variables()
    assert "FLOW_LLM_API_KEY" in named and "OTEL_EXPORTER_OTLP_HEADERS" in named
    assert named <= set(settings_file.of_workers())


def test_a_worker_for_each_lane(services: dict[str, Any]) -> None:
    for lane in LANES:
        worker = services[f"worker-{lane}"]
        assert worker["command"] == ["worker", "--lanes", lane]
        assert "entrypoint" not in worker or worker["entrypoint"] is None
        assert worker["environment"]["RECALLQ_HTTP_PORT"] == str(PORT)
        assert worker["environment"]["RECALLQ_HTTP_HOST"] == "0.0.0.0"
        assert seconds(worker["stop_grace_period"]) > longest_stop()
        assert worker["depends_on"]["redis"]["condition"] == "service_healthy"
        assert f":{PORT}/healthz" in worker["healthcheck"]["test"][-1]
        assert worker["restart"] == "unless-stopped"
        assert "ports" not in worker  # so that there can be several
        assert "container_name" not in worker


def test_what_they_may_do(services: dict[str, Any]) -> None:
    for name in OURS:
        assert services[name]["read_only"] is True
        assert services[name]["tmpfs"] == ["/tmp"]
        assert services[name]["init"] is True
    for each in services.values():
        assert each["cap_drop"] == ["ALL"]
        assert each["security_opt"] == ["no-new-privileges:true"]
        assert not each.get("privileged")


def test_everything_is_healthy_or_not(services: dict[str, Any]) -> None:
    for name, each in services.items():
        assert ("healthcheck" in each) == (name != "recallq")


def test_the_settings_are_known(services: dict[str, Any]) -> None:
    for name in OURS:
        environment = services[name]["environment"]
        assert {each for each in environment if each.startswith("RECALLQ_")} <= variables()
        url = environment["RECALLQ_REDIS_URL"]
        assert check_url(url) == "redis://:r-1@redis:6379/0"


def test_what_can_be_reached(services: dict[str, Any]) -> None:
    assert read("compose.yaml")["networks"]["data"]["internal"] is True
    assert list(services["redis"]["networks"]) == ["data"]
    assert "ports" not in services["redis"]
    published = {
        name: [(port["host_ip"], port["target"]) for port in each["ports"]]
        for name, each in services.items()
        if "ports" in each
    }
    assert published == {
        "flower": [("127.0.0.1", 5555)],
        "grafana": [("127.0.0.1", 3000)],
        "prometheus": [("127.0.0.1", 9090)],
    }
    for name in ("prometheus", "grafana"):
        assert "data" not in services[name]["networks"]


def test_redis_is_published_when_asked_to() -> None:
    opened = read("compose.yaml", "compose.publish.yaml", REDIS_ADDRESS="10.0.0.5")
    redis = opened["services"]["redis"]
    assert [(each["host_ip"], each["target"]) for each in redis["ports"]] == [("10.0.0.5", 6379)]
    assert set(redis["networks"]) == {"data", "outside"}


def test_what_is_mounted_is_there(services: dict[str, Any]) -> None:
    mounted = [
        Path(volume["source"])
        for each in services.values()
        for volume in each.get("volumes", [])
        if volume["type"] == "bind"
    ]
    assert all(each.exists() for each in mounted)
    # One set of rules and one dashboard, which are the chart's.
    assert {CHART / "files" / "alerts.yml", CHART / "files" / "dashboard.json"} <= set(mounted)


@pytest.fixture
def redis_as_in_compose(services: dict[str, Any], tmp_path: Path) -> Iterator[str]:
    """A Redis that is started by the compose file's command, and the password."""
    script = services["redis"]["command"][2].replace("$$", "$")
    configuration = (DEPLOY / "redis" / "redis.conf").read_text()
    (tmp_path / "redis.conf").write_text(
        f"{configuration}\nport 0\nunixsocket {tmp_path}/redis.sock\ndir {tmp_path}\n"
    )
    script = script.replace("/usr/local/etc/redis/redis.conf", str(tmp_path / "redis.conf"))
    server = str(find_server())
    process = subprocess.Popen(
        ["sh", "-c", script.replace("redis-server", server, 1)],
        env=clean_environment(REDIS_PASSWORD="s3-cret_", REDIS_MAXMEMORY="100mb"),
        stdout=subprocess.DEVNULL,
    )
    while not (tmp_path / "redis.sock").exists():
        assert process.poll() is None
    yield str(tmp_path / "redis.sock")
    process.terminate()  # reaches Redis, as there is no shell in between
    wait_or_kill(process)
    assert process.returncode == 0


def test_redis_is_as_recallq_wants_it(redis_as_in_compose: str) -> None:
    with (
        Redis(unix_socket_path=redis_as_in_compose) as stranger,
        pytest.raises(AuthenticationError),
    ):
        stranger.ping()
    with Redis(unix_socket_path=redis_as_in_compose, password="s3-cret_") as redis:
        info = redis.info()
    assert info["aof_enabled"] == 1
    assert info["maxmemory_policy"] == "noeviction"
    assert info["maxmemory"] == 100 * 2**20


def test_redis_has_no_limit_but_the_operator_s(services: dict[str, Any]) -> None:
    assert services["redis"]["environment"]["REDIS_MAXMEMORY"] == "0"  # to Redis, none
    given = read("compose.yaml", REDIS_MAXMEMORY="4gb")["services"]["redis"]
    assert given["environment"]["REDIS_MAXMEMORY"] == "4gb"
    assert "maxmemory $REDIS_MAXMEMORY" in given["command"][-1].replace("$$", "$")
