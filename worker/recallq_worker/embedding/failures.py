"""A provider's refusal, in the errors that embedders raise.

An HTTP status says most of it. The rest is in the provider's code: an account without money is not
overloaded, although it is answered 429 as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from recallq.errors import BackendError, BackendUnavailable, JobError
from recallq_worker.embedding.base import Refused, Throttled
from recallq_worker.retries import retry_after

_PASSING = frozenset({408, 409, 423, 425})
_REFUSED = frozenset({400, 413, 422})

# The account: nothing that is sent succeeds before somebody pays or is let in.
_NO_MONEY = re.compile(
    r"^(Arrearage|AllocationQuota\.FreeTierOnly|CommodityNotPurchased"
    r"|(Prepaid|Postpaid)BillOverdue|AccessDenied\.Unpurchased"
    r"|billing_(hard_limit_reached|not_active)|account_deactivated|insufficient_user_quota)$"
)
_NO_QUOTA = "insufficient_quota"
_NO_ACCESS = re.compile(
    r"^(InvalidApiKey|invalid_api_key|.*AccessDenied.*|access_denied|permission_denied"
    r"|unsupported_country_region_territory)$"
)
_NO_MODEL = re.compile(r"^(Model\.?Not(Exist|Found)|model_not_found)$", re.IGNORECASE)
_OVERLOADED = re.compile(r"^(Throttling|limit_|rate_limit)")
_INVALID = re.compile(r"^(Invalid|BadRequest|Unsupported|DataInspection)|\.InvalidParameter")


def failure(
    doing: str,
    status: int,
    *,
    codes: tuple[object, ...] = (),
    message: object = None,
    request_id: object = None,
    headers: Mapping[str, str] | None = None,
    quota_renews: bool = False,
    key_hint: str = "check the key",
) -> JobError:
    """What to raise for an answer with `status`, whose provider calls the failure `codes`.

    `doing` begins the message. With `quota_renews`, "insufficient_quota" means the tokens of this
    minute, as it does at DashScope; at OpenAI, it means an account without money. `message` is
    looked at, and never shown: providers quote what was sent.
    """
    named = [code for code in codes if isinstance(code, str)]
    said = f"{doing}: {_described(status, named, request_id)}"
    broke = any(_NO_MONEY.match(code) for code in named)
    if status == 429:
        broke = broke or (_NO_QUOTA in named and not quota_renews)
        broke = broke or (isinstance(message, str) and "free allocated quota" in message.lower())
    if broke:
        return BackendError(f"{said}; the account has no quota left, or a bill is not paid")
    if status == 429 or any(_OVERLOADED.match(code) for code in named):
        return Throttled(said, retry_after=retry_after(headers))
    if status == 401 or any(_NO_ACCESS.match(code) for code in named):
        return BackendError(f"{said}; {key_hint}")
    if status >= 500 or status in _PASSING:
        return BackendUnavailable(said, retry_after=retry_after(headers))
    if status == 404 or any(_NO_MODEL.match(code) for code in named):
        return BackendError(f"{said}; check the model and the base URL")
    if status in _REFUSED:
        return Refused(said)
    if status == 403:
        # Without a code it may be a firewall on the way, which did not like a text.
        return BackendError(f"{said}; {key_hint}") if named else Refused(f"{said}; {key_hint}")
    if status < 300:
        # DashScope may say so in the body of a success.
        invalid = any(_INVALID.search(code) for code in named)
        return Refused(said) if invalid else BackendUnavailable(said)
    return BackendError(said)


def _described(status: int, codes: list[str], request_id: object) -> str:
    said = f"HTTP {status}"
    code = next((code for code in codes if re.fullmatch(r"[\w.-]{1,60}", code)), None)
    if code is not None:
        said += f" ({code})"
    if isinstance(request_id, str) and re.fullmatch(r"[\w-]{1,80}", request_id):
        said += f", request {request_id}"
    return said
