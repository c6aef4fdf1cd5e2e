"""The Helm chart, rendered by Helm's own code; and what is made of it.

`python -m tests.deploy.chart` writes deploy/kubernetes/*.yaml from the chart, the names of the
settings into its schema, and deploy/compose.settings.yaml. A test says so if they are not as this
would write them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import yaml

from tests.deploy import settings_file
from tests.deploy.files import CHART, DEPLOY, documents, variables
from tests.needs import lacking

SCHEMA = CHART / "values.schema.json"
KUBERNETES = DEPLOY / "kubernetes"
NAME = "recallq"
"""Of the release from which the plain manifests are made."""

_HEAD = (
    "# Made from the Helm chart by 'make manifests': change that, or patch this with Kustomize.\n"
)

MANIFESTS: Mapping[str, tuple[str, ...]] = {
    "base/recallq.yaml": (
        "serviceaccount.yaml",
        "deployments.yaml",
        "poddisruptionbudgets.yaml",
        "networkpolicy.yaml",
    ),
    "monitoring/monitoring.yaml": ("podmonitor.yaml", "prometheusrule.yaml"),
    "keda/keda.yaml": ("scaledobjects.yaml",),
}
"""Plain manifests, and the chart's templates that are in them."""


def library() -> Any:
    """Helm as a library."""
    try:
        return import_module("helm_python")
    except ImportError:
        lacking("there is no wheel with Helm for this platform")


def render(values: Mapping[str, Any], name: str = NAME) -> dict[str, str]:
    """The rendered templates, by their file names. Raises what Helm does."""
    with library().Chart.load(str(CHART)) as chart:
        rendered = chart.render(dict(values), name=name, namespace="memory")
    return {path.rpartition("/")[2]: text for path, text in rendered.items()}


def resources(values: Mapping[str, Any], name: str = NAME) -> list[dict[str, Any]]:
    """Everything that the chart makes of these values."""
    texts = render(values, name)
    return [each for path, text in texts.items() if path != "NOTES.txt" for each in documents(text)]


def everything() -> dict[str, Any]:
    """Values with all that is optional; those of the plain manifests."""
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / "values.yaml").read_text())
    return found


def manifests() -> dict[str, str]:
    """The plain manifests as they should be, by path below deploy/kubernetes."""
    rendered = render(everything())
    found = {}
    for path, templates in MANIFESTS.items():
        parts = (rendered[each].strip().removeprefix("---").strip() for each in templates)
        found[path] = _HEAD + "".join(f"---\n{part}\n" for part in parts)
    return found


def settings_of_the_chart() -> list[str]:
    """What may be among the chart's values: no secrets, and nothing that it sets itself."""
    own = {"RECALLQ_HTTP_HOST", "RECALLQ_HTTP_PORT"}
    redis = {f"RECALLQ_{use}_URL" for use in ("REDIS", "BROKER", "COORDINATION", "RESULT", "STORE")}
    return sorted(variables(secret=False) - own - redis)


def main() -> None:
    for path, text in manifests().items():
        (KUBERNETES / path).parent.mkdir(exist_ok=True)
        (KUBERNETES / path).write_text(text)
    schema = json.loads(SCHEMA.read_text())
    schema["properties"]["settings"]["propertyNames"]["enum"] = settings_of_the_chart()
    SCHEMA.write_text(json.dumps(schema, indent=2) + "\n")
    settings_file.FILE.write_text(settings_file.text())


if __name__ == "__main__":
    main()
