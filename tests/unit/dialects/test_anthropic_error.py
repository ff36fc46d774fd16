"""Anthropic's errors, models and OpenAPI types: total, in the SDK's shapes."""

import json

import pytest
from anthropic.types import ErrorResponse, ModelInfo

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.principal import Access
from keepwarm.dialects.anthropic import AnthropicMessages
from keepwarm.dialects.anthropic_answer import MessageReply, MessageStreamEvent, TokenCountReply
from keepwarm.dialects.anthropic_error import ANTHROPIC_ERRORS, AnthropicErrorBody
from keepwarm.dialects.anthropic_model import AnthropicModelList
from keepwarm.dialects.anthropic_request import CountTokensRequest, MessagesRequest
from keepwarm.dialects.openapi import Route, openapi
from tests.golden.transcripts import BOUNDS

ANTHROPIC = AnthropicMessages(BOUNDS)
VENDORS = {  # the vendor's own pairs of status and type
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 504: "timeout_error",
    529: "overloaded_error",
}  # fmt: skip
OURS = {405: "invalid_request_error", 431: "request_too_large", 499: "invalid_request_error"}

UNKNOWN_TO_SDK = (413, 431)


def test_the_table_is_total_and_in_the_vendors_words() -> None:
    assert ANTHROPIC_ERRORS.keys() == set(ErrorKind)
    assert {row.status: row.type for row in ANTHROPIC_ERRORS.values()} == VENDORS | OURS


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_has_the_sdks_shape(kind: ErrorKind) -> None:
    reply = ANTHROPIC.render_error(ApiError(kind, "what happened", param="messages"), "req_1")
    body = json.loads(reply.body)
    assert (body["type"], body["request_id"], body["error"]["type"]) == ("error", "req_1", ANTHROPIC_ERRORS[kind].type)
    assert body["error"]["message"].endswith("what happened")
    if reply.status not in UNKNOWN_TO_SDK:
        assert ErrorResponse.model_validate(body).error.type == body["error"]["type"]
    assert "request_id" not in json.loads(ANTHROPIC.render_error(ApiError(kind, "x")).body)


def test_agents_see_that_the_prompt_is_too_long() -> None:
    reply = ANTHROPIC.render_error(ApiError(ErrorKind.PROMPT_TOO_LONG, "prompt has 9,120 tokens, limit 8,192"))
    assert json.loads(reply.body)["error"]["message"] == "prompt is too long: prompt has 9,120 tokens, limit 8,192"


def test_retries_are_told_when_and_whether() -> None:
    def headers(kind: ErrorKind, after_s: int | None = None) -> dict[str, str]:
        return dict(ANTHROPIC.render_error(ApiError(kind, "x", retry_after_s=after_s)).headers)

    assert headers(ErrorKind.OVERLOADED) == headers(ErrorKind.RATE_LIMITED) == {"retry-after": "1"}
    assert headers(ErrorKind.ENGINE_DOWN, 7) == {"retry-after": "7"}
    assert headers(ErrorKind.QUOTA_EXCEEDED) == {"x-should-retry": "false"}
    assert headers(ErrorKind.INVALID_REQUEST) == {}


def test_models() -> None:
    model = ModelInfo.model_validate_json(ANTHROPIC.render_model("claude", 1718680442, 8192))
    assert (model.id, model.type, model.display_name) == ("claude", "model", "claude")
    assert model.created_at.isoformat() == "2024-06-18T03:14:02+00:00"
    assert (model.max_input_tokens, model.max_tokens) == (8192, 8192)
    page = json.loads(ANTHROPIC.render_models(["a", "b"], 1718680442, None))
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, "a", "b")
    assert [one["id"] for one in page["data"]] == ["a", "b"]
    assert page["data"][0]["lifecycle"] == "active" and "max_input_tokens" not in page["data"][0]
    assert json.loads(ANTHROPIC.render_models([], 0, None)) == {
        "data": [], "has_more": False, "first_id": None, "last_id": None,
    }  # fmt: skip


def test_the_types_can_be_shown() -> None:
    chat = Route(
        "POST", "/messages", Access.USE, "s", request=MessagesRequest, response=MessageReply, events=MessageStreamEvent,
        errors=AnthropicErrorBody,
    )  # fmt: skip
    count = Route(
        "POST", "/messages/count_tokens", Access.READ, "s", request=CountTokensRequest, response=TokenCountReply
    )
    models = Route("GET", "/models", Access.READ, "s", response=AnthropicModelList)
    document = json.loads(openapi([chat, count, models], title="t", version="1"))
    shapes = document["components"]["schemas"]
    assert {"MessagesRequest", "ContentBlock", "MessageReply", "ToolUseBlock", "AnthropicModel"} <= shapes.keys()
    assert {"model", "messages", "max_tokens"} == set(shapes["MessagesRequest"]["required"])
