"""The closed error tree. Every error that can reach a client is an `ApiError` of one `ErrorKind`.

Raised at the point of knowledge with the numbers in the message; each dialect has a total table from kind to its own
status and type (`tests/unit/dialects` checks that the tables are total). `assert` is for our own bugs only.
"""

from enum import Enum


class ErrorKind(Enum):
    """What went wrong, by whose fault and with what remedy; never a vendor's word."""

    INVALID_REQUEST = "invalid_request"  # the body, a header or a parameter is wrong: `param` names the path
    PROMPT_TOO_LONG = "prompt_too_long"  # prompt + max_tokens do not fit the model's window
    UNKNOWN_MODEL = "unknown_model"
    UNKNOWN_CACHE = "unknown_cache"  # no such object or tag for this tenant; another tenant's looks the same
    EXPIRED_CACHE = "expired_cache"
    UNKNOWN_FILE = "unknown_file"  # no such file for this tenant, or it has expired; another tenant's looks the same
    UNKNOWN_ROUTE = "unknown_route"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    BODY_TOO_LARGE = "body_too_large"
    HEADERS_TOO_LARGE = "headers_too_large"
    UNAUTHENTICATED = "unauthenticated"  # no key, or an unknown, revoked or expired one
    PERMISSION_DENIED = "permission_denied"
    QUOTA_EXCEEDED = "quota_exceeded"
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"  # admission queue full: refused before any work, retry later
    ENGINE_DOWN = "engine_down"  # engine starting, stopped or crashed under the turn: retryable
    TIMEOUT = "timeout"
    CLIENT_CLOSED = "client_closed"  # the client went away; nobody reads this one, the log does
    INTERNAL = "internal"  # our bug


class ApiError(Exception):
    """One error on its way to a client.

    `param` is the path of the offending field ("messages[2].content"), `retry_after_s` is set where a retry can help.
    """

    def __init__(
        self, kind: ErrorKind, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __repr__(self) -> str:
        return f"ApiError({self.kind.name}, {self.message!r})"
