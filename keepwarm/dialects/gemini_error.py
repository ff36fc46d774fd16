"""Gemini's errors: a total table of HTTP codes and google.rpc codes, and the google.rpc.Status they are told in.

The same body answers a call and ends a stream. Messages that clients compare are Google's own, as far as they are known: a
cache that is not there for whatever reason, and a key that is not valid. The others say what happened here.
"""

from collections.abc import Mapping

import msgspec
from msgspec import UNSET, Struct, UnsetType

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.dialects import ErrorReply
from keepwarm.dialects.error_table import ErrorRow, error_headers
from keepwarm.dialects.gemini_json import NS_PER_S, duration_text

NO_CACHE = "CachedContent not found (or permission denied)"
BAD_KEY = "API key not valid. Please pass a valid API key."
NO_KEY = (
    "Method doesn't allow unregistered callers (callers without established identity). Please use API Key or other form "
    "of API consumer identity to call this API."
)
TOO_LONG = "The input token count exceeds the maximum number of tokens allowed: "
DETAIL = "type.googleapis.com/google.rpc."


class ErrorInfo(Struct, tag=DETAIL + "ErrorInfo", tag_field="@type"):
    """A stable word for programs."""

    reason: str
    domain: str = "googleapis.com"


class RetryInfo(Struct, tag=DETAIL + "RetryInfo", tag_field="@type", rename="camel"):
    """When to try again: "30s"."""

    retry_delay: str


class FieldViolation(Struct):
    """`field` is the path of what is wrong in the body."""

    field: str
    description: str


class BadRequest(Struct, tag=DETAIL + "BadRequest", tag_field="@type", rename="camel"):
    """What is wrong where."""

    field_violations: tuple[FieldViolation, ...]


class RpcStatus(Struct):
    """google.rpc.Status, with the HTTP code for `code` and the name of its own code in `status`."""

    code: int
    message: str
    status: str
    details: tuple[ErrorInfo | RetryInfo | BadRequest, ...] | UnsetType = UNSET


class GeminiErrorBody(Struct):
    """The body of every answer with a status of 400 or more, and of a stream's last element when a turn fails."""

    error: RpcStatus


GEMINI_ERRORS: Mapping[ErrorKind, ErrorRow] = {
    ErrorKind.INVALID_REQUEST: ErrorRow(400, "INVALID_ARGUMENT"),
    ErrorKind.PROMPT_TOO_LONG: ErrorRow(400, "INVALID_ARGUMENT"),
    ErrorKind.UNKNOWN_MODEL: ErrorRow(404, "NOT_FOUND"),
    ErrorKind.UNKNOWN_CACHE: ErrorRow(403, "PERMISSION_DENIED"),
    ErrorKind.EXPIRED_CACHE: ErrorRow(403, "PERMISSION_DENIED"),
    ErrorKind.UNKNOWN_FILE: ErrorRow(403, "PERMISSION_DENIED"),
    ErrorKind.UNKNOWN_ROUTE: ErrorRow(404, "NOT_FOUND"),
    ErrorKind.METHOD_NOT_ALLOWED: ErrorRow(405, "UNIMPLEMENTED"),
    ErrorKind.BODY_TOO_LARGE: ErrorRow(413, "INVALID_ARGUMENT"),
    ErrorKind.HEADERS_TOO_LARGE: ErrorRow(431, "INVALID_ARGUMENT"),
    ErrorKind.UNAUTHENTICATED: ErrorRow(400, "INVALID_ARGUMENT", "API_KEY_INVALID"),
    ErrorKind.PERMISSION_DENIED: ErrorRow(403, "PERMISSION_DENIED"),
    ErrorKind.QUOTA_EXCEEDED: ErrorRow(429, "RESOURCE_EXHAUSTED", retry=False),
    ErrorKind.RATE_LIMITED: ErrorRow(429, "RESOURCE_EXHAUSTED"),
    ErrorKind.OVERLOADED: ErrorRow(503, "UNAVAILABLE"),
    ErrorKind.ENGINE_DOWN: ErrorRow(503, "UNAVAILABLE"),
    ErrorKind.TIMEOUT: ErrorRow(504, "DEADLINE_EXCEEDED"),
    ErrorKind.CLIENT_CLOSED: ErrorRow(499, "CANCELLED"),
    ErrorKind.INTERNAL: ErrorRow(500, "INTERNAL"),
}


def gemini_error_reply(error: ApiError) -> ErrorReply:
    """`error` as an HTTP answer; its body is also what a stream that has begun ends with."""
    row = GEMINI_ERRORS[error.kind]
    status = RpcStatus(row.status, _message(error), row.type, _details(row, error) or UNSET)
    # The key goes in x-goog-api-key or the query and the status is no 401, so no scheme is asked for.
    headers = tuple(header for header in error_headers(row, error) if header[0] != "www-authenticate")
    return ErrorReply(row.status, msgspec.json.encode(GeminiErrorBody(status)), headers)


def missing_key() -> ApiError:
    """A call without any key, which Google answers otherwise than one with a key that is not valid."""
    return ApiError(ErrorKind.PERMISSION_DENIED, NO_KEY)


def _message(error: ApiError) -> str:
    match error.kind:
        case ErrorKind.UNKNOWN_CACHE | ErrorKind.EXPIRED_CACHE:
            return NO_CACHE
        case ErrorKind.UNAUTHENTICATED:
            return BAD_KEY
        case ErrorKind.PROMPT_TOO_LONG:
            return TOO_LONG + error.message
        case _:
            return error.message


def _details(row: ErrorRow, error: ApiError) -> tuple[ErrorInfo | RetryInfo | BadRequest, ...]:
    details: list[ErrorInfo | RetryInfo | BadRequest] = []
    if row.code is not None:
        details.append(ErrorInfo(row.code))
    if error.kind is ErrorKind.INVALID_REQUEST and error.param is not None:
        details.append(BadRequest((FieldViolation(error.param, error.message),)))
    if error.retry_after_s is not None:
        details.append(RetryInfo(duration_text(error.retry_after_s * NS_PER_S)))
    return tuple(details)
