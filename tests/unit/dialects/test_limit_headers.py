"""What is left of the limits, and a refusal, in each dialect's own headers and words."""

import json
from typing import Any

import pytest

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.rate_limit import Allowance, LimitState
from keepwarm.dialects import ChatDialect
from keepwarm.dialects.anthropic import AnthropicMessages
from keepwarm.dialects.gemini import GeminiContent
from keepwarm.dialects.kimi import KimiChat
from keepwarm.dialects.limit_headers import duration_text, time_text
from keepwarm.dialects.minimax import MiniMaxChat
from keepwarm.dialects.openai import OpenAIChat
from tests.golden.transcripts import BOUNDS

NOW = 1_767_323_045.25  # 2026-01-02T03:04:05.25Z
STATE = LimitState(
    NOW,
    requests=Allowance(200, 199, 12.0),
    minute_tokens=Allowance(128_000, 96_500, 12.0),
    day_tokens=Allowance(10_000_000, 9_000_000, 75_354.75),
)
KIMI, OPENAI, MINIMAX = KimiChat(BOUNDS), OpenAIChat(BOUNDS), MiniMaxChat(BOUNDS)
ANTHROPIC, GEMINI = AnthropicMessages(BOUNDS), GeminiContent(BOUNDS)
DIALECTS: list[ChatDialect] = [KIMI, OPENAI, MINIMAX, ANTHROPIC, GEMINI]


@pytest.mark.parametrize("dialect", [KIMI, OPENAI, MINIMAX], ids=lambda dialect: dialect.name)
def test_openais_clients_read_numbers_and_durations(dialect: ChatDialect) -> None:
    assert dict(dialect.limit_headers(STATE)) == {
        "x-ratelimit-limit-requests": "200",
        "x-ratelimit-remaining-requests": "199",
        "x-ratelimit-reset-requests": "12s",
        "x-ratelimit-limit-tokens": "128000",
        "x-ratelimit-remaining-tokens": "96500",
        "x-ratelimit-reset-tokens": "12s",
    }


def test_anthropics_clients_read_numbers_and_times() -> None:
    assert dict(ANTHROPIC.limit_headers(STATE)) == {
        "anthropic-ratelimit-requests-limit": "200",
        "anthropic-ratelimit-requests-remaining": "199",
        "anthropic-ratelimit-requests-reset": "2026-01-02T03:04:18Z",
        "anthropic-ratelimit-tokens-limit": "128000",
        "anthropic-ratelimit-tokens-remaining": "96500",
        "anthropic-ratelimit-tokens-reset": "2026-01-02T03:04:18Z",
    }


def test_gemini_has_no_such_headers() -> None:
    assert GEMINI.limit_headers(STATE) == ()


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_what_is_not_limited_is_absent(dialect: ChatDialect) -> None:
    assert dialect.limit_headers(LimitState(NOW)) == ()
    names = [name for name, _ in dialect.limit_headers(LimitState(NOW, requests=STATE.requests))]
    assert not any("tokens" in name for name in names)
    names = [name for name, _ in dialect.limit_headers(LimitState(NOW, day_tokens=STATE.day_tokens))]
    assert not any("requests" in name for name in names)


def test_the_day_is_told_when_less_of_it_is_left() -> None:
    spent = LimitState(NOW, minute_tokens=Allowance(100, 50, 12.0), day_tokens=Allowance(1000, 0, 75_354.75))
    assert ("x-ratelimit-reset-tokens", "20h55m55s") in OPENAI.limit_headers(spent)
    assert ("anthropic-ratelimit-tokens-reset", "2026-01-03T00:00:00Z") in ANTHROPIC.limit_headers(spent)


@pytest.mark.parametrize(
    "duration_s,text",
    [(0.0, "0s"), (0.001, "1s"), (1.0, "1s"), (59.5, "1m0s"), (360.0, "6m0s"), (3600.0, "1h0m0s"), (86_399.1, "24h0m0s")],
)  # fmt: skip
def test_durations(duration_s: float, text: str) -> None:
    assert duration_text(duration_s) == text


def test_times_are_never_before_the_reset() -> None:
    assert time_text(NOW) == "2026-01-02T03:04:06Z"
    assert time_text(1_767_323_045.0) == "2026-01-02T03:04:05Z"


WORDS: dict[str, dict[str, Any]] = {
    "kimi": {"type": "rate_limit_reached_error"},
    "openai": {"type": "rate_limit_error", "code": "rate_limit_exceeded"},
    "minimax": {"type": "rate_limit_error", "code": "rate_limit_exceeded"},
    "anthropic": {"type": "rate_limit_error"},
    "gemini": {
        "status": "RESOURCE_EXHAUSTED",
        "code": 429,
        "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "30s"}],
    },
}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_a_refusal_says_when_to_come_back(dialect: ChatDialect) -> None:
    reply = dialect.render_error(ApiError(ErrorKind.RATE_LIMITED, "too many", retry_after_s=30))
    error = json.loads(reply.body)["error"]
    assert reply.status == 429
    assert ("retry-after", "30") in reply.headers
    assert "x-should-retry" not in dict(reply.headers)
    assert error["message"] == "too many"
    assert {name: error[name] for name in WORDS[dialect.name]} == WORDS[dialect.name]
