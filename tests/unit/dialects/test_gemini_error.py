"""Gemini's errors, models and OpenAPI types: total, in the SDKs' shapes."""

import json
from typing import Any

import httpx2
import pytest

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.principal import Access
from keepwarm.dialects.gemini import GeminiContent
from keepwarm.dialects.gemini_answer import GeminiTokenCountReply, GenerateContentReply
from keepwarm.dialects.gemini_error import GEMINI_ERRORS, GeminiErrorBody, missing_key
from keepwarm.dialects.gemini_model import GeminiModelList, ModelsPage, parse_models_page
from keepwarm.dialects.gemini_request import GeminiCountTokensRequest, GenerateContentRequest
from keepwarm.dialects.openapi import Route, openapi
from tests.gemini_sdks import genai, glm, google_client
from tests.golden.transcripts import BOUNDS

GEMINI = GeminiContent(BOUNDS)
CODES = {  # google.rpc's own pairs, as google.golang.org/grpc and cloud.google.com/apis/design/errors have them
    "INVALID_ARGUMENT": 400, "PERMISSION_DENIED": 403, "NOT_FOUND": 404, "RESOURCE_EXHAUSTED": 429, "CANCELLED": 499,
    "INTERNAL": 500, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504,
}  # fmt: skip
OURS = {405: "UNIMPLEMENTED", 413: "INVALID_ARGUMENT", 431: "INVALID_ARGUMENT"}
NAMES = [f"m{i}" for i in range(5)]


def told(error: ApiError) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(GEMINI.render_error(error).body)
    assert body.keys() == {"error"}
    found: dict[str, Any] = body["error"]
    return found


def test_the_table_is_total_and_in_googles_words() -> None:
    assert GEMINI_ERRORS.keys() == set(ErrorKind)
    for row in GEMINI_ERRORS.values():
        assert CODES.get(row.type) == row.status or OURS.get(row.status) == row.type


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_is_a_status_that_the_sdk_raises(kind: ErrorKind) -> None:
    reply = GEMINI.render_error(ApiError(kind, "what happened", param="contents", retry_after_s=30), "req_1")
    status = json.loads(reply.body)["error"]
    assert {"code", "message", "status"} <= status.keys() <= {"code", "message", "status", "details"}
    assert status["code"] == reply.status and status["message"]
    assert {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "30s"} in status["details"]
    answered = httpx2.Response(reply.status, content=reply.body)
    with google_client(lambda _: answered) as client, pytest.raises(genai.errors.APIError) as caught:
        client.models.generate_content(model="m", contents="q")
    raised = caught.value
    assert (raised.code, raised.status, raised.message) == (status["code"], status["status"], status["message"])
    assert isinstance(raised, genai.errors.ClientError if reply.status < 500 else genai.errors.ServerError)


@pytest.mark.parametrize("kind", [ErrorKind.UNKNOWN_CACHE, ErrorKind.EXPIRED_CACHE])
def test_a_cache_that_is_not_there_is_always_told_alike(kind: ErrorKind) -> None:
    status = told(ApiError(kind, "cache 'abc' not found"))
    assert status == {
        "code": 403, "message": "CachedContent not found (or permission denied)", "status": "PERMISSION_DENIED",
    }  # fmt: skip


def test_messages_that_clients_look_for() -> None:
    assert told(ApiError(ErrorKind.UNAUTHENTICATED, "unknown")) == {
        "code": 400, "message": "API key not valid. Please pass a valid API key.", "status": "INVALID_ARGUMENT",
        "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID",
                     "domain": "googleapis.com"}],
    }  # fmt: skip
    assert (told(missing_key())["code"], told(missing_key())["status"]) == (403, "PERMISSION_DENIED")
    assert told(ApiError(ErrorKind.PROMPT_TOO_LONG, "prompt has 9,120 tokens, limit 8,192"))["message"] == (
        "The input token count exceeds the maximum number of tokens allowed: prompt has 9,120 tokens, limit 8,192"
    )


def test_where_it_is_wrong() -> None:
    (detail,) = told(ApiError(ErrorKind.INVALID_REQUEST, "contents: no", param="contents"))["details"]
    violation = {"field": "contents", "description": "contents: no"}
    assert detail == {"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": [violation]}
    assert "details" not in told(ApiError(ErrorKind.INVALID_REQUEST, "the body is not valid JSON"))


def test_retries_are_told_when_and_whether() -> None:
    def headers(kind: ErrorKind, after_s: int | None = None) -> dict[str, str]:
        return dict(GEMINI.render_error(ApiError(kind, "x", retry_after_s=after_s)).headers)

    assert headers(ErrorKind.OVERLOADED) == headers(ErrorKind.RATE_LIMITED) == {"retry-after": "1"}
    assert headers(ErrorKind.ENGINE_DOWN, 7) == {"retry-after": "7"}
    assert headers(ErrorKind.QUOTA_EXCEEDED)["x-should-retry"] == "false"
    assert headers(ErrorKind.UNAUTHENTICATED) == headers(ErrorKind.INVALID_REQUEST) == {}


def test_models() -> None:
    body = GEMINI.render_model("gemini-2.5-flash", 0, 8192)
    with google_client(lambda _: httpx2.Response(200, content=body)) as client:
        new = client.models.get(model="gemini-2.5-flash")
    assert new.supported_actions == ["generateContent", "countTokens", "createCachedContent"]
    assert (new.name, new.input_token_limit, new.output_token_limit) == ("models/gemini-2.5-flash", 8192, 8192)
    old = glm.Model.from_json(body.decode())  # knows every member
    assert list(old.supported_generation_methods) == ["generateContent", "countTokens", "createCachedContent"]
    assert (old.display_name, old.max_temperature) == ("gemini-2.5-flash", 2.0)
    assert not {"inputTokenLimit", "outputTokenLimit"} & json.loads(GEMINI.render_model("m", 0, None)).keys()


def page(**query: str) -> ModelsPage:
    return parse_models_page(list(query.items()))


@pytest.mark.parametrize("size", ["1", "2", "3", "5", "6"])
def test_pages_follow_each_other(size: str) -> None:
    names, token = [], ""
    for _ in range(9):
        shown = json.loads(GEMINI.render_models(NAMES, 0, None, page(pageSize=size, pageToken=token)))
        assert 0 < len(shown["models"]) <= int(size)
        names += [model["name"] for model in shown["models"]]
        token = shown.get("nextPageToken", "")
        if not token:
            break
    assert names == [f"models/{name}" for name in NAMES]


def test_page_sizes_are_brought_into_range() -> None:
    assert page() == page(pageSize="0") == page(page_size="50") == ModelsPage(50, 0)
    assert page(pageSize="999999999999999999999999").size == 1000
    assert json.loads(GEMINI.render_models(NAMES, 0, None)) == json.loads(GEMINI.render_models(NAMES, 0, None, page()))


@pytest.mark.parametrize(
    "query,param",
    [
        ({"pageSize": "-1"}, "pageSize"),
        ({"pageSize": "many"}, "pageSize"),
        ({"pageSize": "٣"}, "pageSize"),
        ({"pageToken": "x"}, "pageToken"),
        ({"pageToken": "bW9kZWxzIGZyb20gLTE="}, "pageToken"),
        ({"pageToken": "MQ=="}, "pageToken"),
        ({"pageToken": "é"}, "pageToken"),
    ],
)
def test_pages_that_are_none(query: dict[str, str], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        page(**query)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, param)


def test_the_types_can_be_shown() -> None:
    generate = Route(
        "POST", "/models/{model}:generateContent", Access.USE, "s", request=GenerateContentRequest, response=GenerateContentReply,
        errors=GeminiErrorBody,
    )  # fmt: skip
    count = Route(
        "POST",
        "/models/{model}:countTokens",
        Access.READ,
        "s",
        request=GeminiCountTokensRequest,
        response=GeminiTokenCountReply,
    )
    models = Route("GET", "/models", Access.READ, "s", response=GeminiModelList)
    shapes = json.loads(openapi([generate, count, models], title="t", version="1"))["components"]["schemas"]
    assert {
        "GenerateContentRequest",
        "GeminiTurn",
        "GeminiPart",
        "GenerateContentReply",
        "GeminiModel",
    } <= shapes.keys()
    assert "systemInstruction" in shapes["GenerateContentRequest"]["properties"]
