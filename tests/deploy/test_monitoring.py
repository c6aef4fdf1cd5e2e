"""Dashboard, alerts and scaling ask for what a real worker tells a real Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from recallq import BackendError, MemoryClient
from recallq.embedded import EmbeddedRedis
from recallq.settings import ClientSettings
from tests.deploy import chart, tools
from tests.deploy.files import ALERTS, DASHBOARD, DEPLOY, LANES, PORT, seconds
from tests.deploy.promql import TARGET, Labels, Misfit, labels_of, names_in
from tests.support import Worker, clean_environment, wait_or_kill

PROMETHEUS = DEPLOY / "prometheus" / "prometheus.yml"
OPERATIONS = DEPLOY / "operations.md"

ELSEWHERE: Mapping[str, Labels] = {
    # Told by workers that call models, which the one of these tests does not.
    "recallq_model_calls_total": frozenset({"backend", "kind", "outcome"}),
    "recallq_model_tokens_total": frozenset({"backend", "kind", "direction"}),
    "recallq_embedded_texts_total": frozenset({"backend", "source"}),
    # Told by any worker, about what this one is spared.
    "recallq_retries_total": frozenset({"operation", "lane"}),
    # Prometheus's own.
    "up": frozenset(),
}


def groups() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"]
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for group in groups() for rule in group["rules"] if "alert" in rule]


def records() -> list[dict[str, Any]]:
    return [rule for group in groups() for rule in group["rules"] if "record" in rule]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [each for each in found if each["type"] != "row"]


def queries() -> list[str]:
    """The dashboard's, with a value for each of its variables."""
    return [
        target["expr"]
        .replace("$__rate_interval", "15s")
        .replace("$fleet", "tested")
        .replace("$lane", ".*")
        for panel in panels()
        for target in panel["targets"]
    ]


def scaling_queries() -> list[str]:
    return [
        trigger["metadata"]["query"]
        for each in chart.resources(chart.everything())
        if each["kind"] == "ScaledObject"
        for trigger in each["spec"]["triggers"]
    ]


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    """A Redis of its own, for it is stopped."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(scope="module")
def address(redis: EmbeddedRedis) -> Iterator[str]:
    """Where a worker answers that has run jobs of each kind, one of which is a dead letter."""

    async def work() -> str:
        async with MemoryClient(redis.url, namespace="watched") as client:
            await client.add_memory("ann", "tea")
            await client.search_memory("ann", "tea")
            await client.list_memory("ann")
            await client.delete_memory("ann")
            await (await client.submit_add("ann", "milk", lane="bulk")).result(30)
            with pytest.raises(BackendError):
                await client.add_memory("ann", "refuse this")
            (found,) = [each.http for each in await client.workers()]
        assert found is not None
        return found

    with Worker(redis.url, namespace="watched", backend="slow_redis", http_port=0):
        yield asyncio.run(work())


@pytest.fixture(scope="module")
def known(address: str) -> dict[str, Labels]:
    """The labels of every series that there is, by its name."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as reply:
        text = reply.read().decode()
    found: dict[str, Labels] = {
        sample.name: frozenset(sample.labels) | TARGET
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for name, labels in ELSEWHERE.items():
        found.setdefault(name, labels | TARGET)
    for rule in records():
        found[rule["record"]] = frozenset(rule.get("labels", {}))
    return found


# --- names and labels -----------------------------------------------------------------------------


def test_the_dashboard_asks_for_what_is_told(known: dict[str, Labels]) -> None:
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "5m")
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert legend <= labels_of(query, known), f"{panel['title']}: {legend}"


def test_alerts_ask_for_what_is_told(known: dict[str, Labels]) -> None:
    for rule in records():
        labels_of(rule["expr"], known)
    for alert in alerts():
        has = labels_of(alert["expr"], known)
        said = " ".join(alert["annotations"].values())
        assert set(re.findall(r"\$labels\.(\w+)", said)) <= has, alert["alert"]


def test_scaling_asks_for_what_is_told(known: dict[str, Labels]) -> None:
    asked = scaling_queries()
    assert len(asked) == 2 * len(LANES) + 2
    for query in asked:
        assert labels_of(query, known) == frozenset()  # one number


@pytest.mark.parametrize(
    "query",
    [
        "recallq_worker_count",
        'recallq_workers{queue="live"}',
        "sum by (operation) (recallq_workers)",
        "max by (lane) (recallq_workers) > max by (fleet) (recallq_workers)",
        "recallq_workers > on (operation) recallq_jobs_total",
        "histogram_quantile(0.5, sum by (lane) (rate(recallq_job_seconds_bucket[5m])))",
    ],
)
def test_the_check_finds_mistakes(query: str, known: dict[str, Labels]) -> None:
    with pytest.raises(Misfit):
        labels_of(query, known)


def test_everything_that_is_told_is_shown(known: dict[str, Labels]) -> None:
    shown = {name for query in queries() for name in names_in(query)}
    told = {
        re.sub(r"_(bucket|sum|count)$", "", each) for each in known if each.startswith("recallq_")
    }
    assert told == {re.sub(r"_(bucket|sum|count)$", "", each) for each in shown if each[0] == "r"}


def test_what_the_page_says_of_them(known: dict[str, Labels]) -> None:
    """The labels on the page of metrics, which another test holds against the names."""
    page = (DEPLOY / "metrics.md").read_text()
    for name, labels in re.findall(r"^\| `(recallq_\w+)` \| ([^|]*) \|", page, re.MULTILINE):
        series = name if name in known else f"{name}_count"
        assert known[series] - TARGET - {"le"} == set(re.findall(r"`(\w+)`", labels)), name


# --- the dashboard --------------------------------------------------------------------------------


def test_the_dashboard_is_laid_out() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [each["id"] for each in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for each in dashboard["panels"]:
        place = each["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, f"{each['title']} lies on another"
        cells |= own
    for panel in panels():
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", " ".join(t["expr"] for p in panels() for t in p["targets"])))
    assert used - {"__rate_interval"} | {"datasource"} == variables


def test_what_is_of_the_fleet_is_not_added_up() -> None:
    """Each worker tells the same of it."""
    page = (DEPLOY / "metrics.md").read_text().partition("## Of the fleet")[2]
    fleet = re.findall(r"^\| `(recallq_\w+)`", page, re.MULTILINE)
    everywhere = [*queries(), *scaling_queries(), *(each["expr"] for each in alerts())]
    for query in everywhere:
        for summed in re.findall(
            r"\b(?:sum|avg)(?: by \([^)]*\))? ?\(([^()]*(?:\([^()]*\))?)", query
        ):
            assert not any(name in summed for name in fleet), query


# --- a real Prometheus ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus with our configuration, which looks at that worker once a second."""
    directory = tmp_path_factory.mktemp("prometheus")
    configuration = yaml.safe_load(PROMETHEUS.read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(ALERTS)]
    (job,) = configuration["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [address]}]
    job["relabel_configs"][0]["replacement"] = "tested"
    (directory / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            tools.prometheus(),
            f"--config.file={directory}/prometheus.yml",
            f"--storage.tsdb.path={directory}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ],
        env=clean_environment(GOMAXPROCS="1"),
        cwd=directory,
    )
    try:
        deadline = time.monotonic() + 60
        while not _is_ready(f"127.0.0.1:{port}"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        wait_or_kill(process)


def _is_ready(server: str) -> bool:
    """Whether it has looked at the worker often enough for a rate."""
    try:
        found = ask(server, "query", query='sum(count_over_time(up{fleet="tested"}[1m]))')
    except OSError:
        return False
    return bool(found["result"]) and float(found["result"][0]["value"][1]) >= 4


def ask(server: str, what: str, **parameters: str) -> dict[str, Any]:
    url = f"http://{server}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=20) as reply:
        answer = json.load(reply)
    assert answer["status"] == "success", answer
    data: dict[str, Any] = answer["data"]
    return data


def test_prometheus_answers_the_dashboard(server: str) -> None:
    for query in queries():
        found = ask(server, "query", query=query)["result"]
        if not names_in(query) & ELSEWHERE.keys():
            assert found, query


def test_prometheus_answers_keda(server: str) -> None:
    for query in scaling_queries():
        found = ask(server, "query", query=query.replace('"recallq"', '"tested"'))["result"]
        assert len(found) == 1, query


def test_prometheus_takes_the_rules(server: str) -> None:
    told = {
        rule["name"]: rule for group in ask(server, "rules")["groups"] for rule in group["rules"]
    }
    assert told.keys() == {rule.get("alert", rule.get("record")) for rule in alerts() + records()}
    assert {rule["health"] for rule in told.values()} == {"ok"}
    # The worker of the test is well; what is told is pending at most.
    assert not [name for name, rule in told.items() if rule.get("state") == "firing"]


def test_an_alert_for_real(server: str, redis: EmbeddedRedis) -> None:
    """Comes last: it stops Redis."""
    redis.stop()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        waiting = {each["labels"]["alertname"] for each in ask(server, "alerts")["alerts"]}
        if "RecallQCoordinationDown" in waiting:
            return
        time.sleep(0.5)
    raise AssertionError("nobody saw that Redis is away")


# --- Prometheus's own checks ----------------------------------------------------------------------


def promtool(*arguments: str) -> None:
    run = subprocess.run(
        [tools.promtool(), *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_promtool_checks_the_rules() -> None:
    promtool("check", "rules", "--lint-fatal", str(ALERTS))


def test_promtool_checks_the_configuration(tmp_path: Path) -> None:
    text = PROMETHEUS.read_text().replace("/etc/prometheus/alerts.yml", str(ALERTS))
    (tmp_path / "prometheus.yml").write_text(text)
    promtool("check", "config", "--lint-fatal", str(tmp_path / "prometheus.yml"))


WELL = {'recallq_coordination_up{fleet="f",instance="a"}': "1x60"}
"""What keeps RecallQNoWorkers quiet."""

CASES: list[tuple[dict[str, str], set[str]]] = [
    (WELL, set()),
    ({}, {"RecallQNoWorkers"}),
    # Of two fleets, one is gone.
    (
        {**WELL, 'recallq_coordination_up{fleet="g",instance="b"}': "1x24 stale"},
        {"RecallQNoWorkers"},
    ),
    ({**WELL, 'up{job="recallq",fleet="f",instance="a"}': "1x10 0x50"}, {"RecallQWorkerDown"}),
    # A PodMonitor's name for it; and somebody else's targets.
    (
        {**WELL, 'up{job="memory/two-recallq",fleet="f",instance="a"}': "1x10 0x50"},
        {"RecallQWorkerDown"},
    ),
    (
        {
            **WELL,
            'up{job="lorries",fleet="f",instance="a"}': "1x10 0x50",
            'up{job="recallq-exporter",instance="a"}': "1x10 0x50",
        },
        set(),
    ),
    (
        {'recallq_coordination_up{fleet="f",instance="a"}': "1x10 0x50"},
        {"RecallQCoordinationDown"},
    ),
    (
        {
            **WELL,
            'recallq_outstanding_jobs{fleet="f",lane="bulk"}': "5x60",
            'recallq_outstanding_jobs{fleet="f",lane="live"}': "0x60",
            'recallq_workers{fleet="f",lane="bulk"}': "0x60",
            'recallq_workers{fleet="f",lane="live"}': "0x60",
        },
        {"RecallQLaneWithoutWorkers"},
    ),
    # A Redis that is full, in which no worker can say that it lives.
    (
        {
            **WELL,
            'recallq_coordination_memory_bytes{fleet="f"}': "105x60",
            'recallq_coordination_memory_limit_bytes{fleet="f"}': "100x60",
            'recallq_outstanding_jobs{fleet="f",lane="bulk"}': "5x60",
            'recallq_workers{fleet="f",lane="bulk"}': "0x60",
            'recallq_slow_users{fleet="f"}': "5x60",
            'recallq_workers{fleet="f",lane="slow"}': "0x60",
        },
        {"RecallQRedisFull"},
    ),
    (
        {
            **WELL,
            'recallq_coordination_memory_bytes{fleet="f"}': "95x60",
            'recallq_coordination_memory_limit_bytes{fleet="f"}': "100x60",
            'recallq_outstanding_jobs{fleet="f",lane="bulk"}': "5x60",
            'recallq_workers{fleet="f",lane="bulk"}': "0x60",
        },
        {"RecallQRedisFull", "RecallQLaneWithoutWorkers"},
    ),
    (
        {
            **WELL,
            'recallq_coordination_memory_bytes{fleet="f"}': "95x60",
            'recallq_coordination_memory_limit_bytes{fleet="f"}': "0x60",
        },
        set(),
    ),
    (
        {
            **WELL,
            'recallq_slow_users{fleet="f"}': "5x60",
            'recallq_workers{fleet="f",lane="slow"}': "0x60",
        },
        {"RecallQSlowLaneWithoutWorkers"},
    ),
    (
        {
            **WELL,
            'recallq_oldest_queued_seconds{fleet="f",lane="live",instance="a"}': "40x60",
            'recallq_oldest_queued_seconds{fleet="f",lane="bulk",instance="a"}': "40x60",
        },
        {"RecallQQueueTooOld"},
    ),
    (
        {**WELL, 'recallq_oldest_queued_seconds{fleet="f",lane="slow"}': "899x60"},
        set(),
    ),
    (
        {**WELL, 'recallq_outstanding_jobs{fleet="f",lane="live"}': "80001x60"},
        {"RecallQNearHighWaterMark"},
    ),
    ({**WELL, 'recallq_outstanding_jobs{fleet="f",lane="live"}': "80000x60"}, set()),
    (
        {**WELL, 'recallq_kept_dead_letters{fleet="f"}': "7x20 8x40"},
        {"RecallQDeadLettersGrow"},
    ),
    ({**WELL, 'recallq_kept_dead_letters{fleet="f"}': "7x60"}, set()),
    (
        {
            **WELL,
            'recallq_retries_total{fleet="f",operation="add",lane="live"}': "0+10x60",
            'recallq_jobs_total{fleet="f",operation="add",lane="live",outcome="succeeded"}': (
                "0+100x60"
            ),
        },
        {"RecallQBackendErrors"},
    ),
    # Nothing ends at all.
    (
        {**WELL, 'recallq_retries_total{fleet="f",operation="add",lane="live"}': "0+2x60"},
        {"RecallQBackendErrors"},
    ),
    # One job that is tried several times, in a quiet time.
    (
        {**WELL, 'recallq_retries_total{fleet="f",operation="add",lane="live"}': "0x22 1+1x3 4x60"},
        set(),
    ),
    (
        {
            **WELL,
            'recallq_jobs_total{fleet="f",operation="add",lane="live",outcome="succeeded"}': (
                "0x22 1+1x3 4x60"
            ),
            'recallq_jobs_total{fleet="f",operation="add",lane="live",outcome="failed"}': (
                "0x22 1x60"
            ),
        },
        set(),
    ),
    # As few jobs, of which many fail.
    (
        {
            **WELL,
            'recallq_jobs_total{fleet="f",operation="add",lane="live",outcome="succeeded"}': (
                "0x22 1+1x3 4x60"
            ),
            'recallq_jobs_total{fleet="f",operation="add",lane="live",outcome="failed"}': (
                "0x20 1+1x6 7x60"
            ),
        },
        {"RecallQJobsFail"},
    ),
    (
        {
            **WELL,
            'recallq_jobs_total{fleet="f",operation="add",lane="live",outcome="succeeded"}': (
                "0+100x60"
            ),
            'recallq_jobs_total{fleet="f",operation="add",lane="live",outcome="expired"}': (
                "0+10x60"
            ),
        },
        {"RecallQJobsFail"},
    ),
    (
        {
            **WELL,
            'recallq_jobs_total{fleet="f",operation="add",lane="live",outcome="succeeded"}': (
                "0+100x60"
            ),
            'recallq_jobs_total{fleet="f",operation="add",lane="live",outcome="cancelled"}': (
                "0+50x60"
            ),
        },
        set(),
    ),
    (
        {**WELL, 'recallq_swept_batches_total{fleet="f",why="taken_over",instance="a"}': "0+1x60"},
        {"RecallQSweeperBusy"},
    ),
    ({**WELL, 'recallq_slow_users{fleet="f"}': "1000+5x60"}, {"RecallQSlowUsersGrow"}),
    ({**WELL, 'recallq_slow_users{fleet="f"}': "0+5x60"}, set()),
    (
        {
            **WELL,
            'recallq_model_calls_total{fleet="f",backend="mem0",kind="llm",outcome="ok"}': "0+9x60",
            'recallq_model_calls_total{fleet="f",backend="mem0",kind="llm",outcome="error"}': (
                "0+1x60"
            ),
        },
        {"RecallQModelErrors"},
    ),
    (
        {
            **WELL,
            'recallq_model_calls_total{fleet="f",backend="mem0",kind="llm",outcome="error"}': (
                "0x22 1x60"
            ),
        },
        set(),
    ),
]


def check(tests: list[dict[str, Any]], directory: Path) -> None:
    """Has promtool run tests of the rules."""
    file = directory / "tests.yml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests})
    )
    promtool("test", "rules", str(file))


OUTAGES: list[tuple[dict[str, str], dict[str, list[str]]]] = [
    # Of two fleets, one is gone for good: for a day.
    (
        {"f": "1x1600", "g": "1x24 stale"},
        {"20m": [], "31m": ["g"], "2h": ["g"], "12h": ["g"], "23h": ["g"], "25h": []},
    ),
    # It comes back.
    ({"f": "1x1600", "g": "1x24 _x200 1x1400"}, {"3h": ["g"], "5h": []}),
    # Both are gone.
    ({"f": "1x60 stale", "g": "1x24 stale"}, {"50m": ["g"], "2h": ["f", "g"], "23h": ["f", "g"]}),
    # The only one is gone: without an end, for after a day there is no fleet at all.
    ({"f": "1x24 stale"}, {"2h": ["f"], "23h": ["f"], "25h": [""], "40h": [""]}),
]
"""The workers of fleets, and at which time which fleet has none."""


def test_an_outage_is_told_for_as_long_as_it_lasts(tmp_path: Path) -> None:
    name = 'ALERTS{alertname="RecallQNoWorkers",alertstate="firing"}'
    check(
        [
            {
                "interval": "1m",
                "input_series": [
                    {"series": f'recallq_coordination_up{{fleet="{fleet}"}}', "values": values}
                    for fleet, values in fleets.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": f"count by (fleet) ({name})",
                        "eval_time": time,
                        "exp_samples": [
                            {"labels": f'{{fleet="{fleet}"}}' if fleet else "{}", "value": 1}
                            for fleet in gone
                        ],
                    }
                    for time, gone in told.items()
                ],
            }
            for fleets, told in OUTAGES
        ],
        tmp_path,
    )


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    """Each case is an hour, of which the 31st minute is looked at."""
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": each} for name, each in series.items()],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": "31m",
                    "exp_samples": [
                        {"labels": f'{{alertname="{name}"}}', "value": 1} for name in expected
                    ],
                }
            ],
        }
        for series, expected in CASES
    ]
    check(tests, tmp_path)
    assert {each["alert"] for each in alerts()} == {name for _, found in CASES for name in found}


# --- and the pages --------------------------------------------------------------------------------


def test_every_alert_has_its_section() -> None:
    page = OPERATIONS.read_text()
    sections = re.findall(r"^### (RecallQ\w+)$", page, re.MULTILINE)
    assert sections == [each["alert"] for each in alerts()]
    for alert in alerts():
        annotations = alert["annotations"]
        assert annotations["runbook_url"] == f"deploy/operations.md#{alert['alert'].lower()}"
        assert annotations["summary"] and annotations["description"]
        assert alert["labels"]["severity"] in ("critical", "warning")


def test_limits_are_those_of_the_settings() -> None:
    limits = {
        (rule["record"], rule.get("labels", {}).get("lane")): rule["expr"] for rule in records()
    }
    mark = ClientSettings.model_fields["high_water_mark"].default
    assert limits["recallq:limit_outstanding_jobs", None] == f"vector({mark})"
    for lane in LANES:
        assert ("recallq:limit_oldest_queued_seconds", lane) in limits


def test_prometheus_looks_where_workers_answer() -> None:
    configuration = yaml.safe_load(PROMETHEUS.read_text())
    (job,) = configuration["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert found["port"] == PORT
    assert sorted(found["names"]) == sorted(f"worker-{lane}" for lane in LANES)
    from recallq_worker import probes

    patience = seconds(configuration["global"]["scrape_timeout"])
    assert probes._PATIENCE < patience <= seconds(configuration["global"]["scrape_interval"])
    (monitor,) = [
        each for each in chart.resources(chart.everything()) if each["kind"] == "PodMonitor"
    ]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert seconds(endpoint["scrapeTimeout"]) > probes._PATIENCE
    # What alerts know workers by is the same for both.
    labels = {each["targetLabel"]: each["replacement"] for each in endpoint["relabelings"]}
    assert labels == {"job": job["job_name"], "fleet": chart.NAME}
