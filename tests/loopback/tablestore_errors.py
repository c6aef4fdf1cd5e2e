"""Errors as Tablestore reports them: a status, a code, a message, in a protobuf body.

Codes and messages are those of the public list of error codes, or of the tests of the official SDKs
where the list leaves them open.
"""

from __future__ import annotations

from tablestore.protobuf import table_store_pb2 as pb

from tests.loopback.faults import HttpFailure

STATUS = {
    "OTSAuthFailed": 403,
    "OTSNoPermissionAccess": 403,
    "OTSQuotaExhausted": 403,
    "OTSCapacityUnitExhausted": 403,
    "OTSNotEnoughCapacityUnit": 403,
    "OTSConditionCheckFail": 403,
    "OTSObjectNotExist": 404,
    "OTSTableNotReady": 404,
    "OTSMethodNotAllowed": 405,
    "OTSRequestTimeout": 408,
    "OTSObjectAlreadyExist": 409,
    "OTSRowOperationConflict": 409,
    "OTSRequestBodyTooLarge": 413,
    "OTSFlowControl": 429,
    "OTSInternalServerError": 500,
    "OTSServerBusy": 503,
    "OTSPartitionUnavailable": 503,
    "OTSTimeout": 503,
    "OTSServerUnavailable": 503,
}
"""Of all codes that are not 400."""

MESSAGES = {
    "OTSQuotaExhausted": "Too frequent table operations.",
    "OTSCapacityUnitExhausted": "Capacity unit is not enough.",
    "OTSNotEnoughCapacityUnit": "Remaining capacity unit is not enough.",
    "OTSConditionCheckFail": "Condition check failed.",
    "OTSObjectNotExist": "Requested table does not exist.",
    "OTSTableNotReady": "The table is not ready.",
    "OTSObjectAlreadyExist": "Requested table already exists.",
    "OTSRowOperationConflict": "Data is being modified by the other request.",
    "OTSFlowControl": "The requests have been throttled.",
    "OTSInternalServerError": "Internal server error.",
    "OTSServerBusy": "Server is busy.",
    "OTSPartitionUnavailable": "The partition is not available.",
    "OTSTimeout": "Operation timeout.",
    "OTSServerUnavailable": "Server is not available.",
}

_BY_STATUS = {
    403: "OTSQuotaExhausted",
    404: "OTSObjectNotExist",
    405: "OTSMethodNotAllowed",
    409: "OTSRowOperationConflict",
    429: "OTSFlowControl",
    500: "OTSInternalServerError",
    503: "OTSServerBusy",
}


def failure(code: str, message: str = "") -> HttpFailure:
    text = message or MESSAGES.get(code, code)
    return HttpFailure(STATUS.get(code, 400), text, code=code)


def invalid(message: str) -> HttpFailure:
    return failure("OTSParameterInvalid", message)


def code_and_message(error: HttpFailure) -> tuple[str, str]:
    """Also of failures that were asked for by their status only."""
    if error.code is not None:
        return error.code, error.message
    code = _BY_STATUS.get(error.status, "OTSParameterInvalid")
    return code, MESSAGES.get(code, error.message)


def error_bytes(error: HttpFailure) -> bytes:
    code, message = code_and_message(error)
    return bytes(pb.Error(code=code, message=message).SerializeToString())
