"""Signed messages: workers run what was made by who has a key, and nothing else.

A message carries, in a header, the HMAC-SHA256 of its task's name and id, its queue and payload.
Keys are shared secrets: whoever can check a signature can make one. The first key signs and all are
accepted, so that keys are exchanged one after the other.

It says who made a message, and not that it is new: what was signed once can be sent again. Nothing
else in Redis is signed. `deploy/security.md` has what that means.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256
from typing import Self

HEADER = "recallq-signature"
SHORTEST_KEY = 32


class Signer:
    """Signs and checks with shared secrets."""

    def __init__(self, keys: Sequence[str]) -> None:
        """At least one."""
        self._keys = [key.encode() for key in keys]

    @classmethod
    def of(cls, setting: str) -> Self | None:
        """The signer that ``RECALLQ_SIGNING_KEYS`` describes, if it does."""
        keys = keys_in(setting)
        return cls(keys) if keys else None

    def sign(self, task: str, task_id: str, queue: str, payload: str) -> str:
        """The header's value."""
        return _digest(self._keys[0], task, task_id, queue, payload)

    def is_signed(
        self, signature: object, task: str, task_id: str, queue: str, payload: str
    ) -> bool:
        """Whether one of the keys made `signature` for this very message."""
        if not isinstance(signature, str) or not signature.isascii():
            return False
        return any(
            hmac.compare_digest(signature, _digest(key, task, task_id, queue, payload))
            for key in self._keys
        )


def keys_in(setting: str) -> list[str]:
    """The keys, by comma. Raises ValueError for one that could be guessed, and for words that hold
    none: signatures are not to be off by mistake."""
    keys = [each.strip() for each in setting.split(",") if each.strip()]
    if any(len(key) < SHORTEST_KEY for key in keys):
        raise ValueError(
            f"has a key of fewer than {SHORTEST_KEY} characters; 'openssl rand -hex 32' makes one"
        )
    if setting and not keys:
        raise ValueError("holds no key; leave it empty or unset for messages without signatures")
    return keys


def _digest(key: bytes, *parts: str) -> str:
    """Each part goes in with its length, so that none can pass for another's end."""
    mac = hmac.new(key, digestmod=sha256)
    for part in parts:
        encoded = part.encode(errors="surrogatepass")
        mac.update(b"%d:" % len(encoded))
        mac.update(encoded)
    return mac.hexdigest()
