"""The OpenAPI document describes what the dialects really accept and send."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from keepwarm.core.principal import Access
from keepwarm.dialects.anthropic_answer import MessageReply, MessageStreamEvent
from keepwarm.dialects.anthropic_error import AnthropicErrorBody
from keepwarm.dialects.anthropic_request import CountTokensRequest, MessagesRequest
from keepwarm.dialects.caching import CacheListReply, CacheReply, NewCacheRequest
from keepwarm.dialects.gemini_answer import GenerateContentReply
from keepwarm.dialects.gemini_error import GeminiErrorBody
from keepwarm.dialects.gemini_json import ProtoBody
from keepwarm.dialects.gemini_request import GenerateContentRequest
from keepwarm.dialects.kimi import KimiChatCompletionRequest
from keepwarm.dialects.openai_answer import ChatCompletion, ChatCompletionChunk
from keepwarm.dialects.openai_error import ErrorBody
from keepwarm.dialects.openai_request import ChatCompletionRequest
from keepwarm.dialects.openapi import Param, Route, openapi
from tests.golden.transcripts import HERE

ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        Access.USE,
        "Chat",
        request=KimiChatCompletionRequest,
        response=ChatCompletion,
        events=ChatCompletionChunk,
        errors=ErrorBody,
        params=(Param("X-Msh-Context-Cache", "Id of a cache object", where="header"),),
        tags=("chat",),
    ),
    Route(
        "POST",
        "/openai/v1/chat/completions",
        Access.USE,
        "Chat",
        request=ChatCompletionRequest,
        response=ChatCompletion,
    ),
    Route("POST", "/v1/caching", Access.USE, "Create", request=NewCacheRequest, response=CacheReply, errors=ErrorBody),
    Route(
        "GET",
        "/v1/caching",
        Access.READ,
        "List",
        response=CacheListReply,
        params=(Param("limit", "Page size", int), Param("metadata", "Must all match", dict[str, str], deep=True)),
    ),
    Route("GET", "/v1/caching/{cache_id}", Access.READ, "Get", response=CacheReply),
    Route(
        "POST",
        "/v1/messages",
        Access.USE,
        "Messages",
        request=MessagesRequest,
        response=MessageReply,
        events=MessageStreamEvent,
        errors=AnthropicErrorBody,
    ),
    Route("POST", "/v1/messages/count_tokens", Access.READ, "Count", request=CountTokensRequest),
    Route(
        "POST",
        "/v1/models/{model}:streamGenerateContent",
        Access.USE,
        "Generate",
        request=GenerateContentRequest,
        response=GenerateContentReply,
        events=GenerateContentReply,
        errors=GeminiErrorBody,
    ),
    Route("GET", "/health", Access.PUBLIC, "Health"),
)
# By the stem of a stored file; the others are in OpenAI's shape.
ANSWERS = {"anthropic": "MessageReply", "gemini": "GenerateContentReply"}
ERRORS = {"anthropic": "AnthropicErrorBody", "gemini": "GeminiErrorBody"}
PATHS = {"anthropic": "/v1/messages", "gemini": "/v1/models/{model}:streamGenerateContent"}


def document() -> dict[str, Any]:
    return json.loads(openapi(ROUTES, title="Keepwarm", version="1"))


def schema_of(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}", "components": document()["components"]}


def event_schema(stem: str) -> dict[str, Any]:
    """The schema of one server-sent event."""
    whole = document()
    operation = whole["paths"][PATHS.get(stem, "/v1/chat/completions")]["post"]
    schema = operation["responses"]["200"]["content"]["text/event-stream"]["schema"]
    return schema | {"components": whole["components"]}


def test_every_route_is_there() -> None:
    paths = document()["paths"]
    assert {(method, path) for path, methods in paths.items() for method in methods} == {
        (route.method.lower(), route.path) for route in ROUTES
    }
    ids = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


def test_parameters() -> None:
    paths = document()["paths"]
    (cache_id,) = paths["/v1/caching/{cache_id}"]["get"]["parameters"]
    assert (cache_id["name"], cache_id["in"], cache_id["required"]) == ("cache_id", "path", True)
    limit, metadata = paths["/v1/caching"]["get"]["parameters"]
    assert limit["schema"] == {"type": "integer"}
    assert metadata["style"] == "deepObject"
    assert paths["/v1/chat/completions"]["post"]["parameters"][0]["in"] == "header"


def test_streaming_and_errors_are_described() -> None:
    responses = document()["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert responses["default"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}


def test_health_needs_no_key() -> None:
    paths = document()["paths"]
    assert paths["/health"]["get"]["security"] == []
    assert paths["/v1/caching"]["get"]["security"] == [{"bearer": []}]


def test_all_references_resolve() -> None:
    text = openapi(ROUTES, title="Keepwarm", version="1").decode()
    schemas = json.loads(text)["components"]["schemas"]
    references = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert references
    assert references <= set(schemas)
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_same_routes_same_bytes() -> None:
    assert openapi(ROUTES, title="K", version="1") == openapi(ROUTES, title="K", version="1")


@pytest.mark.parametrize(
    "path", sorted((HERE / "answers").glob("*/*.http")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_stored_answers_fit_the_document(path: Path) -> None:
    head, _, body = path.read_text(encoding="utf-8").partition("\n\n")
    shapes, name = (ANSWERS, "ChatCompletion") if head.startswith("200") else (ERRORS, "ErrorBody")
    name = shapes.get(path.stem, name)
    jsonschema.validate(json.loads(body), schema_of(name))


@pytest.mark.parametrize(
    "path", sorted((HERE / "answers").glob("*/*.sse")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_stored_frames_fit_the_document(path: Path) -> None:
    events, errors = event_schema(path.stem), schema_of(ERRORS.get(path.stem, "ErrorBody"))
    for frame in path.read_text(encoding="utf-8").split("\n\n")[:-1]:
        data = frame.partition("data: ")[2]
        if data != "[DONE]":
            value = json.loads(data)
            jsonschema.validate(value, errors if "error" in value else events)


@pytest.mark.parametrize("path", sorted((HERE / "requests").glob("*.json")), ids=lambda path: path.stem)
def test_accepted_requests_fit_the_document(path: Path) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    for dialect, name in (("openai", "ChatCompletionRequest"), ("kimi", "KimiChatCompletionRequest")):
        if "request" in case["expect"][dialect]:
            jsonschema.validate(case["body"], schema_of(name))


@pytest.mark.parametrize("path", sorted((HERE / "conversations").glob("*.json")), ids=lambda path: path.stem)
def test_accepted_messages_fit_the_document(path: Path) -> None:
    bodies = json.loads(path.read_text(encoding="utf-8"))["bodies"]
    jsonschema.validate(bodies["anthropic"], schema_of("MessagesRequest"))
    if "gemini" in bodies:
        jsonschema.validate(as_documented(bodies["gemini"]), schema_of("GenerateContentRequest"))


def as_documented(body: dict[str, Any]) -> Any:
    """A Gemini body in the one form of the document; it is accepted in others, too."""
    wire = ProtoBody(GenerateContentRequest).decode(json.dumps(body).encode())
    return json.loads(msgspec.json.encode(wire))


def test_stored_objects_fit_the_document() -> None:
    listed = json.loads((HERE / "caching" / "objects.json").read_text(encoding="utf-8"))["expect"]
    jsonschema.validate(listed, schema_of("CacheListReply"))
