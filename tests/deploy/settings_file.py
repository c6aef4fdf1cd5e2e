"""The settings that compose.yaml hands to its containers: `deploy/compose.settings.yaml`.

It is made from the settings themselves, so that whatever a page tells an operator to set arrives
where it is read. `python -m tests.deploy.chart` writes it, and a test says so if it is not as this
would.
"""

from __future__ import annotations

from recallq.settings import ClientSettings
from tests.deploy.files import DEPLOY, variables

FILE = DEPLOY / "compose.settings.yaml"

FIXED = {"RECALLQ_REDIS_URL", "RECALLQ_HTTP_HOST", "RECALLQ_HTTP_PORT"}
"""What compose.yaml says itself, as its other services go by it."""

DEFAULTS = {"RECALLQ_EVENTS": "true", "RECALLQ_LOG_FORMAT": "json"}
"""What is another thing here than elsewhere, for Flower and for whoever collects logs."""

TRACES = [
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_SERVICE_NAME",
    "OTEL_TRACES_EXPORTER",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
]

SERVICES = [
    "DASHSCOPE_API_KEY",
    "DASHSCOPE_BASE_URL",
    "DASHSCOPE_HTTP_BASE_URL",
    "FLOW_EMBEDDING_API_KEY",
    "FLOW_EMBEDDING_BASE_URL",
    "FLOW_LLM_API_KEY",
    "FLOW_LLM_BASE_URL",
    "MEM0_API_KEY",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "OPENAI_CUSTOM_HEADERS",
    "OPENAI_ORG_ID",
    "OPENAI_PROJECT_ID",
    "OPENROUTER_API_KEY",
]
"""What clients of models and of other services read by themselves. Not what a shell has for its own
machine, as proxies and files of certificates, which would be wrong in a container."""

_HEAD = """\
# Made from the settings by 'make manifests', for compose.yaml: what of .env, or of the shell, goes
# into which container. What has no value there is left out.
services:
"""


def of_clients() -> list[str]:
    """What the command line reads: nothing about models, and no key of one."""
    prefix = ClientSettings.model_config["env_prefix"]
    own = {f"{prefix}{name}".upper() for name in ClientSettings.model_fields}
    return sorted(own - FIXED) + TRACES


def of_workers() -> list[str]:
    return sorted(variables() - FIXED) + TRACES + SERVICES


def text() -> str:
    """The file as it should be."""
    parts = [_HEAD]
    for service, names in (("client", of_clients()), ("worker", of_workers())):
        parts.append(f"  {service}:\n    environment:\n")
        parts += (f"      {name}:{_default(name)}\n" for name in names)
    return "".join(parts)


def _default(name: str) -> str:
    return f' "${{{name}:-{DEFAULTS[name]}}}"' if name in DEFAULTS else ""
