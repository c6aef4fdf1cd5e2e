"""Configurations of other libraries, as users write them: in a variable, or in a file it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recallq.errors import ConfigurationError


def read_object(
    value: str, variable: str, *, form: str, parse: Callable[[str], Any]
) -> dict[str, Any]:
    """The object that `value` is, or that is in the file it names; empty if there is none.

    `parse` reads the `form`, and raises ValueError. Raises `ConfigurationError`, which names
    `variable`.
    """
    text, source = value.strip(), variable
    if not text:
        return {}
    if not text.startswith("{"):
        source = text
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            # Not shown: it may be an object after all, in quotes, with keys in it.
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise ConfigurationError(
                f"{variable} is no {form} object (it does not begin with a brace), and "
                f"as the path of a file it cannot be read: {reason}"
            ) from None
    try:
        found = parse(text)
    except ValueError as error:
        raise ConfigurationError(f"{source} is not {form}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{source} must be a {form} object")
    return found
