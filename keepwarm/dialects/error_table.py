"""What the dialects' error tables are made of: a row for each `ErrorKind`, and the headers that go with a row.

Every dialect has a total table of its own, since vendors use different statuses and words for one thing; what a client's
automatic retries need is the same for all.
"""

from msgspec import Struct

from keepwarm.core.errors import ApiError, ErrorKind

RETRY_AFTER_S = 1  # told with every 429, 503 and 529 whose cause knows no better
RETRYABLE = (429, 503, 529)


class ErrorRow(Struct, frozen=True):
    """How a dialect tells one `ErrorKind`. `retry` False: a client's automatic retries are pointless, tell it so."""

    status: int
    type: str
    code: str | None = None
    retry: bool = True


def error_headers(row: ErrorRow, error: ApiError) -> tuple[tuple[str, str], ...]:
    """Headers of `error` as an HTTP answer, in every dialect."""
    headers: list[tuple[str, str]] = []
    if error.kind is ErrorKind.UNAUTHENTICATED:
        headers.append(("www-authenticate", "Bearer"))
    if row.status in RETRYABLE or error.retry_after_s is not None:
        headers.append(("retry-after", str(RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s)))
    if not row.retry:
        headers.append(("x-should-retry", "false"))
    return tuple(headers)
