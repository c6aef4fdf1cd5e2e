"""How a Tablestore instance is reached: ``RECALLQ_TABLESTORE_*``, and which of its errors pass.

Shared by the tablestore backend, whose settings extend these, and by the import of the tables that
agentscope-runtime wrote. It does not need Tablestore's SDK.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from recallq.errors import ConfigurationError

NAME = r"^[A-Za-z_][A-Za-z0-9_]{0,254}$"
"""What Tablestore takes for the name of a table, an index or a column."""

_PREFIX = "RECALLQ_TABLESTORE_"
_NEEDED = ("end_point", "instance_name", "access_key_id", "access_key_secret")

# https://www.alibabacloud.com/help/en/tablestore/developer-reference/error-codes
_PASSING = frozenset(
    {
        "OTSCapacityUnitExhausted",
        "OTSInternalServerError",
        "OTSNotEnoughCapacityUnit",
        "OTSOperationConflict",
        "OTSOperationThrottled",
        "OTSPartitionUnavailable",
        "OTSRequestTimeout",
        "OTSRowOperationConflict",
        "OTSServerBusy",
        "OTSServerUnavailable",
        "OTSTableNotReady",
        "OTSTimeout",
        "OTSTunnelServerUnavailable",
    }
)


class TablestoreAccess(BaseSettings):
    """An instance and the key to it."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )
    asked_by: ClassVar[str] = "Tablestore"
    """Who needs it, for errors."""

    end_point: str = ""
    """``https://<instance>.<region>.ots.aliyuncs.com``."""
    instance_name: str = ""
    access_key_id: SecretStr = SecretStr("")
    access_key_secret: SecretStr = SecretStr("")
    sts_token: SecretStr | None = None
    region: str | None = None
    """Signs requests by version 4 of Tablestore's signature, which depends on the region."""

    @field_validator("*", mode="before")
    @classmethod
    def _nothing_around_it(cls, value: object) -> object:
        """A file of secrets ends with a new line more often than not."""
        return value.strip() if isinstance(value, str) else value

    @field_validator("end_point")
    @classmethod
    def _end_point_is_a_url(cls, end_point: str) -> str:
        if end_point and not end_point.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return end_point.rstrip("/")

    @classmethod
    def load(cls, **arguments: Any) -> Self:
        """Settings from arguments (None counts as not given) and the environment.

        Raises `ConfigurationError`, which names the variable and never its value.
        """
        try:
            settings = cls(
                **{name: value for name, value in arguments.items() if value is not None}
            )
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            reason = problem["msg"].removeprefix("Value error, ")
            raise ConfigurationError(f"{variable(str(problem['loc'][0]))}: {reason}") from error
        missing = [name for name in _NEEDED if not revealed(getattr(settings, name))]
        if missing:
            raise ConfigurationError(f"{cls.asked_by} needs {', '.join(map(variable, missing))}")
        return settings


def variable(name: str) -> str:
    """The variable of a setting."""
    return f"{_PREFIX}{name.upper()}"


def revealed(secret: str | SecretStr) -> str:
    return secret.get_secret_value() if isinstance(secret, SecretStr) else secret


def passes(code: str, message: str = "") -> bool:
    """Whether an error of Tablestore's is one that trying again may help against."""
    words = message.lower()
    # A table operation too many within a second; all other quotas are used up for good.
    too_fast = code == "OTSQuotaExhausted" and "frequent" in words
    return code in _PASSING or too_fast or is_being_built(message)


def is_being_built(message: str) -> bool:
    """Whether a search index cannot be asked yet, because it is new and reads the table."""
    return "building base state" in message.lower()
