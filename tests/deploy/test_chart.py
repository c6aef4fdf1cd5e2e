"""The Helm chart and the plain manifests, against what Kubernetes, KEDA and Prometheus take."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Mapping
from typing import Any

import kubernetes_validate
import pytest
import yaml

from recallq.redis_client import check_url
from recallq_worker import probes, stopping
from tests import needs
from tests.deploy import chart
from tests.deploy.files import (
    ALERTS,
    CHART,
    DEPLOY,
    LANES,
    PORT,
    ROOT,
    longest_stop,
    seconds,
    variables,
)

IMAGE = {"image": {"repository": "registry.example.com/recallq"}}
REDIS = IMAGE | {"redis": {"secret": "recallq-redis"}}
"""The values that nobody can do without."""
OWN = ("keda.sh/", "monitoring.coreos.com/")
"""How the API versions of resources begin that are not Kubernetes' own."""


def of_kind(found: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """By lane, or by name where there is no lane."""
    return {
        each["metadata"]["labels"]
        .get("app.kubernetes.io/component", each["metadata"]["name"])
        .removeprefix("worker-"): each
        for each in found
        if each["kind"] == kind
    }


@pytest.fixture(scope="module")
def whole() -> list[dict[str, Any]]:
    return chart.resources(chart.everything() | {"dashboard": {"enabled": True}})


@pytest.fixture(scope="module")
def deployments(whole: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return of_kind(whole, "Deployment")


def container(deployment: Mapping[str, Any]) -> dict[str, Any]:
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def test_helm_finds_nothing_to_say() -> None:
    for values in (REDIS, chart.everything()):
        report = chart.library().lint(str(CHART), values, strict=True)
        said = [each for each in report["messages"] if each["error"] != "icon is recommended"]
        assert (said, report["errors"]) == ([], [])


def test_kubernetes_takes_it(whole: list[dict[str, Any]]) -> None:
    own = [each for each in whole if each["apiVersion"].startswith(OWN)]
    others = [each for each in whole if each not in own]
    assert {each["kind"] for each in others} == {
        "ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount",
    }  # fmt: skip
    assert {each["kind"] for each in own} == {"PodMonitor", "PrometheusRule", "ScaledObject"}
    for each in others:
        for version in ("1.25", "1.33"):
            kubernetes_validate.validate(each, version, strict=True)


def test_its_check_finds_mistakes(deployments: dict[str, dict[str, Any]]) -> None:
    broken = json.loads(json.dumps(deployments["live"]))
    broken["spec"]["template"]["spec"]["containers"][0]["argz"] = ["worker"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.33", strict=True)


def test_keda_and_prometheus_take_it(whole: list[dict[str, Any]]) -> None:
    """Their own definitions as types: what one of these does not know, it drops, and what it reads
    it can write again."""
    from cloudcoil.models.keda import v1alpha1 as keda
    from cloudcoil.models.prometheus_operator import v1 as prometheus

    kinds: dict[str, Any] = {
        "ScaledObject": keda.ScaledObject,
        "PodMonitor": prometheus.PodMonitor,
        "PrometheusRule": prometheus.PrometheusRule,
    }
    checked = [each for each in whole if each["kind"] in kinds]
    assert len(checked) == len(LANES) + 2
    for each in checked:
        read = kinds[each["kind"]].model_validate(each)
        written = read.model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert _plain(written["spec"]) == _plain(each["spec"])
        assert read.api_version == each["apiVersion"]


def _plain(value: Any) -> Any:
    """Values as Kubernetes compares them: some types write a number as text, or the other way."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool) else str(value)


def test_the_plain_manifests_are_the_chart_s() -> None:
    for path, text in chart.manifests().items():
        said = f"{path} is not what the chart says: run 'make manifests'"
        assert (chart.KUBERNETES / path).read_text() == text, said


def test_kustomize_builds_the_example() -> None:
    needs.program("kubectl", "it alone builds overlays")
    run = subprocess.run(
        ["kubectl", "kustomize", str(chart.KUBERNETES / "example")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    built = [each for each in yaml.safe_load_all(run.stdout) if each]
    assert {each["metadata"]["namespace"] for each in built} == {"memory"}
    for deployment in of_kind(built, "Deployment").values():
        kubernetes_validate.validate(deployment, "1.33", strict=True)
        assert container(deployment)["image"].startswith("registry.example.com/recallq:")
        assert {"name": "RECALLQ_CONCURRENCY", "value": "16"} in container(deployment)["env"]
    scaled = of_kind(built, "ScaledObject")
    assert sorted(scaled) == sorted(LANES)
    # Every trigger asks the overlay's Prometheus, and it is not the base's.
    addresses = {lane: _addresses(each) for lane, each in scaled.items()}
    asked = {address for each in addresses.values() for address in each}
    assert asked == {"http://prometheus.monitoring.svc:9090"}
    assert asked != {chart.everything()["autoscaling"]["prometheusUrl"]}
    assert {lane: len(each) for lane, each in addresses.items()} == {
        "live": 2,
        "bulk": 2,
        "slow": 4,
    }


def _addresses(scaled: Mapping[str, Any]) -> list[str]:
    return [each["metadata"]["serverAddress"] for each in scaled["spec"]["triggers"]]


def test_every_resource_of_the_plain_manifests_is_in_a_kustomization() -> None:
    for path in chart.MANIFESTS:
        file = chart.KUBERNETES / path
        kustomization = yaml.safe_load((file.parent / "kustomization.yaml").read_text())
        assert kustomization["resources"] == [file.name]


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["appVersion"] == about["version"] == project["version"]


# --- what workers get -----------------------------------------------------------------------------


def test_a_deployment_for_each_lane(deployments: dict[str, dict[str, Any]]) -> None:
    assert sorted(deployments) == sorted(LANES)
    for lane, deployment in deployments.items():
        worker = container(deployment)
        assert worker["args"] == ["worker", "--lanes", lane]
        assert "command" not in worker  # the image's entry point
        environment = {each["name"]: each for each in worker["env"]}
        assert environment["RECALLQ_HTTP_PORT"]["value"] == str(PORT)
        assert environment["RECALLQ_HTTP_HOST"]["value"] == "0.0.0.0"
        assert environment["RECALLQ_REDIS_URL"]["valueFrom"] == {
            "secretKeyRef": {"name": "recallq-redis", "key": "url"}
        }
        assert environment.keys() <= variables()
        assert worker["ports"] == [{"name": "http", "containerPort": PORT}]


def test_probes_wait_as_long_as_workers_do(deployments: dict[str, dict[str, Any]]) -> None:
    for deployment in deployments.values():
        worker = container(deployment)
        for name, path, patience in (
            ("startupProbe", "/healthz", probes._ALIVE_WITHIN),
            ("livenessProbe", "/healthz", probes._ALIVE_WITHIN),
            ("readinessProbe", "/readyz", probes._PATIENCE),
        ):
            assert worker[name]["httpGet"] == {"path": path, "port": "http"}
            assert worker[name]["timeoutSeconds"] > patience


def test_there_is_time_to_stop(deployments: dict[str, dict[str, Any]]) -> None:
    silence = stopping.PATIENCE + stopping._CLOSING
    for deployment in deployments.values():
        grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace > longest_stop() + silence
    for settings, least in (
        ({}, longest_stop() + silence),
        ({"RECALLQ_JOB_TIMEOUT": 200.5}, 200.5 + longest_stop() - 30 + silence),
        ({"RECALLQ_JOB_TIMEOUT": 200, "RECALLQ_SLOW_PATIENCE": 30}, 230 + silence),
    ):
        values = {**REDIS, "settings": settings}
        grace = int(least) + 2
        assert chart.resources(values | {"terminationGracePeriodSeconds": grace})
        with pytest.raises(chart.library().HelmError, match="terminationGracePeriodSeconds must"):
            chart.resources(values | {"terminationGracePeriodSeconds": int(least)})


def test_what_workers_may_do(deployments: dict[str, dict[str, Any]]) -> None:
    for deployment in deployments.values():
        pod = deployment["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001  # the image's
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(deployment)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {each["mountPath"] for each in container(deployment)["volumeMounts"]}
        assert mounts == {"/tmp"}


def test_selectors_find_the_pods(whole: list[dict[str, Any]]) -> None:
    pods = {
        lane: each["spec"]["template"]["metadata"]["labels"]
        for lane, each in of_kind(whole, "Deployment").items()
    }

    def found(labels: Mapping[str, str]) -> list[str]:
        return sorted(lane for lane, has in pods.items() if labels.items() <= has.items())

    for lane, budget in of_kind(whole, "PodDisruptionBudget").items():
        assert found(budget["spec"]["selector"]["matchLabels"]) == [lane]
    for lane, deployment in of_kind(whole, "Deployment").items():
        assert found(deployment["spec"]["selector"]["matchLabels"]) == [lane]
    (policy,) = of_kind(whole, "NetworkPolicy").values()
    assert found(policy["spec"]["podSelector"]["matchLabels"]) == sorted(LANES)
    (monitor,) = of_kind(whole, "PodMonitor").values()
    assert found(monitor["spec"]["selector"]["matchLabels"]) == sorted(LANES)
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")


def test_only_metrics_are_let_in(whole: list[dict[str, Any]]) -> None:
    (policy,) = of_kind(whole, "NetworkPolicy").values()
    (way_in,) = policy["spec"]["ingress"]
    assert way_in["ports"] == [{"port": "http", "protocol": "TCP"}]
    assert sorted(policy["spec"]["policyTypes"]) == ["Egress", "Ingress"]
    out = [port["port"] for each in policy["spec"]["egress"] for port in each["ports"]]
    assert out == [53, 53, 6379, 443]


def test_more_ways_out() -> None:
    rule = {
        "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        "ports": [{"port": 4318, "protocol": "TCP"}],
    }
    for services in (True, False):
        policies = {"extraEgress": [rule], "services": {"enabled": services}}
        found = of_kind(chart.resources({**REDIS, "networkPolicy": policies}), "NetworkPolicy")
        (policy,) = found.values()
        kubernetes_validate.validate(policy, "1.33", strict=True)
        assert policy["spec"]["egress"][-1] == rule
        assert len(policy["spec"]["egress"]) == 3 + services


@pytest.mark.parametrize("interval", ["9s", "10s", "15s", "60s", "1m", "2m"])
def test_prometheus_waits_for_a_worker_and_no_longer_than_it_may(interval: str) -> None:
    values = {**REDIS, "podMonitor": {"enabled": True, "interval": interval}}
    (monitor,) = of_kind(chart.resources(values), "PodMonitor").values()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["interval"] == interval
    patience = seconds(endpoint["scrapeTimeout"])
    assert probes._PATIENCE < patience <= min(seconds(interval), 12)


def test_an_interval_that_is_too_short() -> None:
    shortest = int(probes._PATIENCE)
    values = {**REDIS, "podMonitor": {"enabled": True, "interval": f"{shortest}s"}}
    with pytest.raises(chart.library().HelmError, match=f"must be more than {shortest} s"):
        chart.resources(values)


def test_certificates_as_the_page_says() -> None:
    page = (DEPLOY / "security.md").read_text()
    url = re.search(r"^ +RECALLQ_REDIS_URL=(rediss://\S+)$", page, re.MULTILINE)
    block = re.search(r"^    extraVolumes:\n(?:    .*\n)+", page, re.MULTILINE)
    assert url and block
    values = yaml.safe_load(block[0])
    comment = (CHART / "values.yaml").read_text().replace("#  ", "    ")
    assert block[0] in comment  # the same is told beside the values
    found = of_kind(chart.resources(REDIS | values), "Deployment")
    assert sorted(found) == sorted(LANES)
    for deployment in found.values():
        kubernetes_validate.validate(deployment, "1.33", strict=True)
        (mount,) = values["extraVolumeMounts"]
        assert check_url(url[1]).endswith(f"={mount['mountPath']}/ca.pem")
        names = [each["name"] for each in deployment["spec"]["template"]["spec"]["volumes"]]
        assert names == ["tmp", mount["name"]]
        mounted = container(deployment)["volumeMounts"]
        assert [each["mountPath"] for each in mounted] == ["/tmp", mount["mountPath"]]


def test_scaling(whole: list[dict[str, Any]], deployments: dict[str, dict[str, Any]]) -> None:
    for lane, scaled in of_kind(whole, "ScaledObject").items():
        target = scaled["spec"]["scaleTargetRef"]["name"]
        assert target == deployments[lane]["metadata"]["name"]
        assert "replicas" not in deployments[lane]["spec"]  # two would set them
        assert scaled["spec"]["minReplicaCount"] >= 1  # who else would tell the metrics?
        names = [each["name"] for each in scaled["spec"]["triggers"]]
        assert names[:2] == ["queued-batches", "oldest-queued"]
        assert ("slow-users" in names) == (lane == "slow")
        for each in scaled["spec"]["triggers"]:
            assert each["metadata"]["ignoreNullValues"] == "false"


def test_a_split_redis_and_settings() -> None:
    keys = {"broker": "b", "coordination": "c", "result": "r", "store": "s"}
    values = {
        **IMAGE,
        "redis": {"secret": "elsewhere", "keys": keys},
        "settings": {
            "RECALLQ_BACKEND": "mem0",
            "RECALLQ_MAX_JOB_BYTES": 100_000_000,
            "RECALLQ_SLOW_PAUSE": 0.25,
            "RECALLQ_EVENTS": True,
        },
        "secretEnvironment": ["models"],
        "extraEnvironment": [{"name": "FLOW_APP_NAME", "value": "x"}],
    }
    for deployment in of_kind(chart.resources(values), "Deployment").values():
        worker = container(deployment)
        environment = {each["name"]: each.get("value") for each in worker["env"]}
        urls = {name for name in environment if name.endswith("_URL")}
        assert urls == {f"RECALLQ_{each.upper()}_URL" for each in ("redis", *keys)}
        assert urls <= variables()
        assert environment["RECALLQ_MAX_JOB_BYTES"] == "100000000"
        assert environment["RECALLQ_SLOW_PAUSE"] == "0.25"
        assert environment["RECALLQ_EVENTS"] == "true"
        assert environment["FLOW_APP_NAME"] == "x"
        assert worker["envFrom"] == [{"secretRef": {"name": "models"}}]


def test_releases_live_side_by_side() -> None:
    one, other = (
        {(each["kind"], each["metadata"]["name"]) for each in chart.resources(REDIS, name)}
        for name in ("recallq", "memory-two")
    )
    assert one.isdisjoint(other)
    assert ("Deployment", "memory-two-recallq-live") in other


@pytest.mark.parametrize(
    ("enabled", "told"),
    [
        ("live bulk slow", "exec deploy/recallq-live --"),
        ("bulk slow", "exec deploy/recallq-bulk --"),
        ("slow", "exec deploy/recallq-slow --"),
        ("", "no lane is enabled"),
    ],
)
def test_what_is_said_in_the_end(enabled: str, told: str) -> None:
    lanes = {lane: {"enabled": lane in enabled.split()} for lane in LANES}
    notes = chart.render({**REDIS, "lanes": lanes})["NOTES.txt"]
    assert told in notes
    assert notes.count("exec deploy/") == bool(enabled)
    assert notes == notes.lstrip()


# --- values that are refused ----------------------------------------------------------------------


def test_without_a_secret_nothing_is_rendered() -> None:
    with pytest.raises(chart.library().HelmError, match="name of a Secret"):
        chart.resources(IMAGE)


def test_without_an_image_nothing_is_rendered() -> None:
    """Docker Hub's `recallq` would be somebody else's."""
    with pytest.raises(chart.library().HelmError, match=r"image\.repository is missing"):
        chart.resources({"redis": {"secret": "recallq-redis"}})


@pytest.mark.parametrize(
    "wrong",
    [
        {"nonsense": 1},
        {"settings": {"RECALLQ_BATCH_LINGR": 1}},
        {"settings": {"RECALLQ_REDIS_URL": "redis://:password@host"}},
        {"settings": {"RECALLQ_LLM_API_KEY": "sk-1"}},
        {"settings": {"RECALLQ_HTTP_PORT": 1}},
        {"settings": {"RECALLQ_JOB_TIMEOUT": 0}},
        {"extraEnvironment": [{"name": "RECALLQ_REDIS_URL", "value": "redis://host"}]},
        {"redis": {"secret": "Not A Name"}},
        {"lanes": {"fast": {"enabled": True}}},
        {"lanes": {"live": {"replicas": -1}}},
        {"lanes": {"live": {"replicas": "many"}}},
        {"lanes": {"live": {"autoscaling": {"minReplicas": 0}}}},
        {"lanes": {"live": {"autoscaling": {"slowUsers": 1}}}},
        {"http": {"port": 80}},
        {"image": {"pullPolicy": "Sometimes"}},
        {"extraVolumes": [{"emptyDir": {}}]},
        {"extraVolumes": [{"name": "tmp", "emptyDir": {}}]},
        {"extraVolumeMounts": [{"name": "certificates"}]},
        {"extraVolumeMounts": [{"name": "certificates", "mountPath": "etc/recallq"}]},
        {"extraVolumeMounts": [{"name": "certificates", "mountPath": "/tmp"}]},
        {"networkPolicy": {"extraEgress": [4318]}},
        {"alerts": {"limits": {"oldestQueuedSeconds": {"live": 0}}}},
        {"podMonitor": {"interval": "15"}},
    ],
)  # fmt: skip
def test_bad_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(chart.library().HelmValuesError):
        chart.resources(REDIS | wrong)


def test_scaling_needs_to_know_prometheus() -> None:
    lanes = {"live": {"autoscaling": {"enabled": True}}}
    with pytest.raises(chart.library().HelmError, match="prometheusUrl is missing"):
        chart.resources({**REDIS, "lanes": lanes})


def test_the_schema_knows_the_settings() -> None:
    schema = json.loads(chart.SCHEMA.read_text())
    known = schema["properties"]["settings"]["propertyNames"]["enum"]
    assert known == chart.settings_of_the_chart(), "run 'make manifests'"


# --- alerts ---------------------------------------------------------------------------------------


def test_the_rules_are_those_of_the_file(whole: list[dict[str, Any]]) -> None:
    (rule,) = of_kind(whole, "PrometheusRule").values()
    assert rule["spec"]["groups"] == yaml.safe_load(ALERTS.read_text())["groups"]


def test_limits_of_the_fleet_s_own() -> None:
    limits = {
        "oldestQueuedSeconds": {"live": 5, "slow": 60, "bulk": 86_400},
        "outstandingJobs": 1_000_000,
        "slowUsers": 50,
    }
    url = "https://wiki.example.com/recallq"
    values = {
        **REDIS,
        "prometheusRule": {"enabled": True},
        "alerts": {"limits": limits, "runbookUrl": url},
    }
    (rule,) = of_kind(chart.resources(values), "PrometheusRule").values()
    first, second = rule["spec"]["groups"]
    assert [each["expr"] for each in first["rules"]] == [
        "vector(5)", "vector(60)", "vector(86400)", "vector(1000000)", "vector(50)",
    ]  # fmt: skip
    for each in second["rules"]:
        runbook = each["annotations"]["runbook_url"]
        assert runbook == f"{url}#{each['alert'].lower()}"


def test_the_dashboard_is_the_file(whole: list[dict[str, Any]]) -> None:
    (dashboard,) = of_kind(whole, "ConfigMap").values()
    text = dashboard["data"]["recallq.json"]
    assert json.loads(text) == json.loads((CHART / "files" / "dashboard.json").read_text())
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_nothing_secret_is_among_the_files() -> None:
    for path in DEPLOY.rglob("*.y*ml"):
        assert "://:" not in path.read_text().replace("://:PASSWORD@", "").replace(
            "://:${REDIS_PASSWORD", ""
        )
