"""Who is asking: the headers and signatures of Tablestore's requests and answers.

Version 2 of the signature is an HMAC-SHA1 with the secret, version 4 an HMAC-SHA256 with a key that
is made of the secret for a day and a region. Answers are signed with the key of the request, always
with HMAC-SHA1.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from tests.loopback.faults import Received
from tests.loopback.tablestore_errors import failure, invalid

_PREFIX = "x-ots-"
_V2, _V4 = "x-ots-signature", "x-ots-signaturev4"
_SIGN_DATE, _SIGN_REGION = "x-ots-signdate", "x-ots-signregion"
_NEEDED = (
    "x-ots-date",
    "x-ots-apiversion",
    "x-ots-accesskeyid",
    "x-ots-instancename",
    "x-ots-contentmd5",
)
_TOLERANCE = timedelta(minutes=15)
_DATE = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass(frozen=True)
class Credentials:
    """What a server lets in."""

    instance_name: str
    access_key_id: str
    access_key_secret: str
    sts_token: str | None
    region: str | None
    """If given, the only one that version 4 signs for."""

    def check(self, request: Received) -> None:
        headers = request.headers
        for name in _NEEDED:
            if name not in headers:
                raise invalid(f"Missing header: '{name}'.")
        _check_date(headers["x-ots-date"])
        if headers["x-ots-instancename"] != self.instance_name:
            raise failure("OTSAuthFailed", "The instance is not found.")
        if headers["x-ots-accesskeyid"] != self.access_key_id:
            raise failure("OTSAuthFailed", "The AccessKeyID does not exist.")
        if headers.get("x-ots-ststoken") != self.sts_token:
            raise failure("OTSAuthFailed", "The security token is invalid.")
        self._check_signature(request)
        if headers["x-ots-contentmd5"] != _md5(request.raw):
            raise failure(
                "OTSAuthFailed",
                "Mismatch between MD5 value of request body and x-ots-contentmd5 in header.",
            )

    def _check_signature(self, request: Received) -> None:
        headers = request.headers
        # Sorted in place of what is between: no action has anything in its query.
        text = f"{request.path}\n{request.method}\n\n{_lines(headers, {_V2, _V4})}\n"
        if _V4 in headers:
            self._check_day_and_region(headers)
            digest: Callable[[], Any] = hashlib.sha256
            text, given = text + "ots", headers[_V4]
        else:
            digest = hashlib.sha1
            given = headers.get(_V2, "")
        expected = _hmac(self._key(headers), text, digest)
        if not hmac.compare_digest(expected.encode(), given.encode()):
            raise failure("OTSAuthFailed", "Signature mismatch.")

    def _check_day_and_region(self, headers: Mapping[str, str]) -> None:
        now = datetime.now(UTC)
        days = {(now + timedelta(days=days)).strftime("%Y%m%d") for days in (-1, 0, 1)}
        if headers.get(_SIGN_DATE) not in days:
            raise failure("OTSAuthFailed", "Signature mismatch.")
        if self.region is not None and headers.get(_SIGN_REGION) != self.region:
            raise failure("OTSAuthFailed", "Signature mismatch.")

    def _key(self, headers: Mapping[str, str]) -> bytes:
        if _V4 not in headers:
            return self.access_key_secret.encode()
        return _v4_key(
            self.access_key_secret, headers.get(_SIGN_DATE, ""), headers.get(_SIGN_REGION, "")
        )

    def answer_headers(self, request: Received, body: bytes) -> dict[str, str]:
        """What an answer carries, signed if the request came from somebody known."""
        headers = {
            "x-ots-contentmd5": _md5(body),
            "x-ots-requestid": str(uuid.uuid4()),
            "x-ots-date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "x-ots-contenttype": "protocol buffer",
        }
        if request.headers.get("x-ots-accesskeyid") == self.access_key_id:
            text = f"{_lines(headers, set())}\n{request.path}"
            signature = _hmac(self._key(request.headers), text, hashlib.sha1)
            headers["Authorization"] = f"OTS {self.access_key_id}:{signature}"
        return headers


@cache
def _v4_key(secret: str, day: str, region: str) -> bytes:
    key = f"aliyun_v4{secret}".encode()
    for text in (day, region, "ots", "aliyun_v4_request"):
        key = hmac.new(key, text.encode(), hashlib.sha256).digest()
    return base64.b64encode(key)


def _check_date(text: str) -> None:
    try:
        date = datetime.strptime(text, _DATE).replace(tzinfo=UTC)
    except ValueError as error:
        raise invalid(f"Invalid date format: {text}.") from error
    if abs(datetime.now(UTC) - date) > _TOLERANCE:
        raise failure("OTSAuthFailed", f"Mismatch between system time and x-ots-date: {text}.")


def _lines(headers: Mapping[str, str], without: set[str]) -> str:
    return "\n".join(
        sorted(
            f"{name}:{value.strip()}"
            for name, value in headers.items()
            if name.startswith(_PREFIX) and name not in without
        )
    )


def _hmac(key: bytes, text: str, digest: Callable[[], Any]) -> str:
    signature = hmac.new(key, text.encode(), digest)
    return base64.b64encode(signature.digest()).decode()


def _md5(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
