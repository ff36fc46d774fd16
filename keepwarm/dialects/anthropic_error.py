"""Anthropic's errors: a total table of statuses and types, and the body they are told in.

Only statuses of Anthropic's own list where it has one, since its clients choose by status whether to try again: what a
client should send again soon is 529, whatever keeps the server from it.
"""

from collections.abc import Mapping

import msgspec
from msgspec import UNSET, Struct, UnsetType

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.dialects import ErrorReply
from keepwarm.dialects.error_table import ErrorRow, error_headers

TOO_LONG = "prompt is too long: "  # Anthropic's words; agents look for them to know when to compact


class AnthropicErrorDetail(Struct):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorBody(Struct, tag="error"):
    """The body of every answer with a status of 400 or more, and of a stream's last event when a turn fails."""

    error: AnthropicErrorDetail
    request_id: str | UnsetType = UNSET


ANTHROPIC_ERRORS: Mapping[ErrorKind, ErrorRow] = {
    ErrorKind.INVALID_REQUEST: ErrorRow(400, "invalid_request_error"),
    ErrorKind.PROMPT_TOO_LONG: ErrorRow(400, "invalid_request_error"),
    ErrorKind.UNKNOWN_MODEL: ErrorRow(404, "not_found_error"),
    ErrorKind.UNKNOWN_CACHE: ErrorRow(404, "not_found_error"),
    ErrorKind.EXPIRED_CACHE: ErrorRow(404, "not_found_error"),
    ErrorKind.UNKNOWN_FILE: ErrorRow(404, "not_found_error"),
    ErrorKind.UNKNOWN_ROUTE: ErrorRow(404, "not_found_error"),
    ErrorKind.METHOD_NOT_ALLOWED: ErrorRow(405, "invalid_request_error"),
    ErrorKind.BODY_TOO_LARGE: ErrorRow(413, "request_too_large"),
    ErrorKind.HEADERS_TOO_LARGE: ErrorRow(431, "request_too_large"),
    ErrorKind.UNAUTHENTICATED: ErrorRow(401, "authentication_error"),
    ErrorKind.PERMISSION_DENIED: ErrorRow(403, "permission_error"),
    ErrorKind.QUOTA_EXCEEDED: ErrorRow(402, "billing_error", retry=False),
    ErrorKind.RATE_LIMITED: ErrorRow(429, "rate_limit_error"),
    ErrorKind.OVERLOADED: ErrorRow(529, "overloaded_error"),
    ErrorKind.ENGINE_DOWN: ErrorRow(529, "overloaded_error"),
    ErrorKind.TIMEOUT: ErrorRow(504, "timeout_error"),
    ErrorKind.CLIENT_CLOSED: ErrorRow(499, "invalid_request_error"),
    ErrorKind.INTERNAL: ErrorRow(500, "api_error"),
}


def anthropic_error_reply(error: ApiError, request_id: str | None = None) -> ErrorReply:
    """`error` as an HTTP answer; its body is also what a stream that has begun ends with."""
    row = ANTHROPIC_ERRORS[error.kind]
    message = TOO_LONG + error.message if error.kind is ErrorKind.PROMPT_TOO_LONG else error.message
    body = AnthropicErrorBody(AnthropicErrorDetail(row.type, message), UNSET if request_id is None else request_id)
    return ErrorReply(row.status, msgspec.json.encode(body), error_headers(row, error))
