"""API keys, as far as embedders handle them: they are sent, and never shown."""

from __future__ import annotations

from hashlib import blake2b

from pydantic import SecretStr

from recallq.errors import ConfigurationError


def clean_key(api_key: SecretStr) -> str:
    """The key without the white space that files and copies bring along.

    Raises `ConfigurationError` for one that no HTTP header can hold: the libraries would quote it
    as they fail.
    """
    key = api_key.get_secret_value().strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            "the key for embeddings is none: it is empty, or has spaces or special characters in it"
        )
    return key


def account_of(base_url: str, api_key: SecretStr) -> str:
    """What all share whose requests count together; says nothing of the key."""
    digest = blake2b(digest_size=16, person=b"recallq.account")
    for part in (base_url.rstrip("/"), api_key.get_secret_value().strip()):
        digest.update(part.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()
