"""OpenAI-shaped error bodies. Kimi's are the same shape with its own words, so it has a table of its own (kimi.py)."""

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.dialects import ErrorReply
from keepwarm.dialects.error_table import ErrorRow, error_headers


class ErrorDetail(Struct):
    """What went wrong; `param` is the path of the offending field, `code` a stable word for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Struct):
    """The body of every answer with a status of 400 or more, and of a stream's last frame when a turn fails."""

    error: ErrorDetail


OPENAI_ERRORS: Mapping[ErrorKind, ErrorRow] = {
    ErrorKind.INVALID_REQUEST: ErrorRow(400, "invalid_request_error"),
    ErrorKind.PROMPT_TOO_LONG: ErrorRow(400, "invalid_request_error", "context_length_exceeded"),
    ErrorKind.UNKNOWN_MODEL: ErrorRow(404, "invalid_request_error", "model_not_found"),
    ErrorKind.UNKNOWN_CACHE: ErrorRow(404, "invalid_request_error", "cache_not_found"),
    ErrorKind.EXPIRED_CACHE: ErrorRow(404, "invalid_request_error", "cache_expired"),
    ErrorKind.UNKNOWN_FILE: ErrorRow(404, "invalid_request_error", "file_not_found"),
    ErrorKind.UNKNOWN_ROUTE: ErrorRow(404, "invalid_request_error", "unknown_url"),
    ErrorKind.METHOD_NOT_ALLOWED: ErrorRow(405, "invalid_request_error", "method_not_supported"),
    ErrorKind.BODY_TOO_LARGE: ErrorRow(413, "invalid_request_error", "body_too_large"),
    ErrorKind.HEADERS_TOO_LARGE: ErrorRow(431, "invalid_request_error", "headers_too_large"),
    ErrorKind.UNAUTHENTICATED: ErrorRow(401, "authentication_error", "invalid_api_key"),
    ErrorKind.PERMISSION_DENIED: ErrorRow(403, "permission_error", "permission_denied"),
    ErrorKind.QUOTA_EXCEEDED: ErrorRow(429, "insufficient_quota", "insufficient_quota", retry=False),
    ErrorKind.RATE_LIMITED: ErrorRow(429, "rate_limit_error", "rate_limit_exceeded"),
    ErrorKind.OVERLOADED: ErrorRow(429, "server_error", "engine_overloaded"),
    ErrorKind.ENGINE_DOWN: ErrorRow(503, "server_error", "engine_unavailable"),
    ErrorKind.TIMEOUT: ErrorRow(504, "server_error", "timeout"),
    ErrorKind.CLIENT_CLOSED: ErrorRow(499, "client_closed_request"),
    ErrorKind.INTERNAL: ErrorRow(500, "server_error", "internal_error"),
}


def error_reply(errors: Mapping[ErrorKind, ErrorRow], error: ApiError) -> ErrorReply:
    """`error` as an HTTP answer in the words of the table `errors`."""
    row = errors[error.kind]
    body = ErrorBody(ErrorDetail(error.message, row.type, error.param, row.code))
    return ErrorReply(row.status, msgspec.json.encode(body), error_headers(row, error))
