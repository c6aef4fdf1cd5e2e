"""Clients of servers that speak OpenAI's protocol, on OpenAI's SDK."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from pydantic import SecretStr

from recallq.errors import MissingExtra

_KEEP_ALIVE = 60.0
"""Seconds that an idle connection is kept, so that a request does not begin with a handshake."""


def open_client(
    *,
    base_url: str,
    api_key: SecretStr,
    timeout: float,
    own_environment: bool,
    wanted_by: str,
    extra: str,
) -> tuple[Any, Any]:
    """An ``AsyncOpenAI`` that tries nothing again by itself, and the SDK's module.

    With `own_environment`, what ``OPENAI_ORG_ID``, ``OPENAI_PROJECT_ID`` and
    ``OPENAI_CUSTOM_HEADERS`` say goes with requests; other servers shall not hear of it. `timeout`
    is in seconds. Importing the SDK takes most of a second, and making a client reads the
    certificates: call it in a thread. Raises `MissingExtra`, which says that `wanted_by` needs
    `extra`.
    """
    try:
        sdk: Any = import_module("openai")
        # It would be, within the first request.
        import_module("openai.resources.embeddings")
        import_module("openai.resources.chat")
    except ImportError:
        raise MissingExtra(wanted_by, extra) from None
    key = api_key.get_secret_value()
    headers: dict[str, Any] = {}
    for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n"):
        name, colon, _ = line.partition(":")
        # The key is not theirs to change, in whatever case they write its name.
        if colon and (not own_environment or name.strip().lower() == "authorization"):
            headers[name.strip()] = sdk.Omit()
    limits = type(sdk.DEFAULT_CONNECTION_LIMITS)(
        max_connections=None, max_keepalive_connections=64, keepalive_expiry=_KEEP_ALIVE
    )
    client = sdk.AsyncOpenAI(
        api_key=key,
        base_url=base_url,
        max_retries=0,
        timeout=timeout,
        default_headers={**headers, "Authorization": f"Bearer {key}"},
        http_client=sdk.DefaultAsyncHttpxClient(limits=limits),
    )
    if not own_environment:
        client.organization = client.project = None
    return client, sdk
