"""What is left of an organisation's rate limits, as headers of every answer of a turn. Absent where there is no limit.

The vendors' headers know one limit on tokens; of a minute's and a day's it is the one with less left.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from math import ceil

from keepwarm.core.rate_limit import Allowance, LimitState

Headers = tuple[tuple[str, str], ...]


def openai_limit_headers(state: LimitState) -> Headers:
    """x-ratelimit-…, with the time to a reset as a duration: "6m0s". Kimi's and MiniMax's clients read the same."""
    return tuple(
        header
        for what, left in _allowances(state)
        for header in (
            (f"x-ratelimit-limit-{what}", str(left.limit)),
            (f"x-ratelimit-remaining-{what}", str(left.remaining)),
            (f"x-ratelimit-reset-{what}", duration_text(left.reset_s)),
        )
    )


def anthropic_limit_headers(state: LimitState) -> Headers:
    """anthropic-ratelimit-…, with the time of a reset in RFC 3339. Input and output have no limits of their own here.

    And anthropic-organization-id, which is told with them.
    """
    named = () if state.organisation is None else (("anthropic-organization-id", state.organisation),)
    return named + tuple(
        header
        for what, left in _allowances(state)
        for header in (
            (f"anthropic-ratelimit-{what}-limit", str(left.limit)),
            (f"anthropic-ratelimit-{what}-remaining", str(left.remaining)),
            (f"anthropic-ratelimit-{what}-reset", time_text(state.now + left.reset_s)),
        )
    )


def duration_text(duration_s: float) -> str:
    """Seconds, rounded up, as OpenAI writes them: "1s", "6m0s", "23h0m5s"."""
    minutes, seconds = divmod(ceil(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{seconds}s"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def time_text(at: float) -> str:
    """A unix time, rounded up to seconds, in RFC 3339: "2026-01-02T03:04:05Z"."""
    return datetime.fromtimestamp(ceil(at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _allowances(state: LimitState) -> Iterator[tuple[str, Allowance]]:
    if state.requests is not None:
        yield "requests", state.requests
    if state.tokens is not None:
        yield "tokens", state.tokens
