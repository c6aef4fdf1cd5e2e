"""Finds backends by name, through the entry-point group ``recallq.backends``.

RecallQ's own backends are registered in the same way as anybody else's. Listing them imports none
of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any, cast

from packaging.markers import UndefinedEnvironmentName
from packaging.requirements import Requirement
from pydantic import BaseModel

from recallq.errors import ConfigurationError, MissingExtra
from recallq_worker.backends.base import MemoryBackend

GROUP = "recallq.backends"
_DISTRIBUTION = "recallq"

_EXTRAS = {
    "in_memory": "worker",
    "mem0": "mem0",
    "redis": "worker",
    "reme_personal": "reme",
    "reme_task": "reme",
    "tablestore": "tablestore",
}
"""The extra that brings what a built-in backend needs."""


class BackendInfo(BaseModel):
    """A registered backend."""

    name: str
    extra: str | None
    """RecallQ's extra that it needs; None for somebody else's backend."""
    installed: bool
    """Whether everything it needs is there."""
    provider: str
    """The distribution that registered it."""


def available() -> list[BackendInfo]:
    """Every registered backend, by name."""
    found = []
    for entry in sorted(_entry_points(), key=lambda each: each.name):
        provider = entry.dist.name if entry.dist is not None else "unknown"
        extra = _EXTRAS.get(entry.name) if provider == _DISTRIBUTION else None
        found.append(
            BackendInfo(
                name=entry.name,
                extra=extra,
                installed=extra is None or not missing_requirements(extra),
                provider=provider,
            )
        )
    return found


def load(name: str) -> type[MemoryBackend]:
    """The backend class called `name`.

    Raises `ConfigurationError` for an unknown name, `MissingExtra` if its libraries are missing.
    """
    entries = {entry.name: entry for entry in _entry_points()}
    entry = entries.get(name)
    if entry is None:
        raise ConfigurationError(
            f"unknown memory backend {name!r}; registered are {', '.join(sorted(entries))}"
        )
    try:
        backend: Any = entry.load()
    except ImportError as error:
        extra = _EXTRAS.get(name)
        if extra is None:
            raise ConfigurationError(
                f"memory backend {name!r} cannot be imported: {error}"
            ) from error
        raise MissingExtra(f"memory backend {name!r}", extra) from error
    return cast("type[MemoryBackend]", backend)


def missing_requirements(extra: str) -> list[str]:
    """The requirements of one of RecallQ's extras that are not installed in a fitting version."""
    missing = []
    for line in metadata.requires(_DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.marker is None or not _wanted_by(requirement, extra):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement.name}{requirement.specifier} (installed: {version})")
    return missing


def _wanted_by(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    assert marker is not None  # the caller has looked
    try:
        return marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
    except UndefinedEnvironmentName:
        return False


def _entry_points() -> Iterator[metadata.EntryPoint]:
    return iter(metadata.entry_points(group=GROUP))
