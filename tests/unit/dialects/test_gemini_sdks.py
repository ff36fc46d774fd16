"""What Google's two SDKs really send is parsed to what was meant: the new one over its client, the old one's messages."""

import io
import json
from typing import Any, Literal

import httpx2
import pydantic
import pytest
import requests
from google.protobuf.json_format import MessageToJson

from keepwarm.core.event import ChoiceFinished, Event, Finished, Started, TextDelta, Usage
from keepwarm.core.request import (
    ChatRequest,
    DocumentPart,
    JsonSchema,
    Message,
    TextPart,
    ToolCall,
    ToolChoice,
    ToolMode,
)
from keepwarm.dialects import Frame, Identity
from keepwarm.dialects.gemini import GeminiContent
from keepwarm.dialects.gemini_answer import AnswerShape
from keepwarm.server.exchange import encoded
from tests.gemini_sdks import genai, generativeai, google_client, rest_streaming
from tests.golden.transcripts import BOUNDS

GEMINI = GeminiContent(BOUNDS)
types = genai.types
WEATHER = '{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}'
ANSWER = {"candidates": [{"content": {"role": "model", "parts": [{"text": "a"}]}, "finishReason": "STOP"}]}


class Recipe(pydantic.BaseModel):
    name: str
    minutes: int | None
    kind: Literal["soup", "cake"]
    steps: list[str]


def get_weather(city: str) -> str:
    """Weather of a city"""
    return city


def new_sdk(contents: Any, **config: Any) -> ChatRequest:
    sent: list[bytes] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.content)
        return httpx2.Response(200, json=ANSWER)

    with google_client(answer) as client:
        client.models.generate_content(model="m", contents=contents, config=types.GenerateContentConfig(**config))
    (body,) = sent
    return GEMINI.parse_generate("m", "whole", body).request


def old_sdk(contents: Any, *, model: dict[str, Any] | None = None, **members: Any) -> ChatRequest:
    """The bodies of its REST transport are its messages as JSON, enums as integers."""
    asked = {"tools": None, "tool_config": None} | members
    request = generativeai.GenerativeModel("m", **(model or {}))._prepare_request(contents=contents, **asked)
    body = json.loads(MessageToJson(type(request).pb(request), use_integers_for_enums=True))
    name = body.pop("model")
    return GEMINI.parse_generate(name, "array", json.dumps(body).encode()).request


@pytest.mark.parametrize("sdk", [new_sdk, old_sdk])
def test_a_question(sdk: Any) -> None:
    assert sdk("q") == ChatRequest("m", (Message("user", (TextPart("q"),)),))


def test_new_options_and_files() -> None:
    part = types.Part.from_bytes(data=b"\xff\xfe\xfd", mime_type="application/pdf")
    found = new_sdk(
        ["a", part], system_instruction="s", temperature=0.5, top_k=40, max_output_tokens=9, stop_sequences=["x"],
        seed=3, candidate_count=2, thinking_config=types.ThinkingConfig(thinking_budget=0),
        safety_settings=[types.SafetySetting(category="HARM_CATEGORY_HARASSMENT", threshold="BLOCK_NONE")],
    )  # fmt: skip
    assert found.messages == (
        Message("system", (TextPart("s"),)),
        Message(
            "user",
            (TextPart("a"), DocumentPart("application/pdf", b"\xff\xfe\xfd", "contents[0].parts[1].inlineData")),
        ),
    )
    sampling = found.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 40, 3)
    assert (found.max_tokens, found.stop, found.n, found.thinking) == (9, ("x",), 2, False)


def test_new_functions_and_their_round_trip() -> None:
    config = types.FunctionCallingConfig(mode="ANY", allowed_function_names=["get_weather"])
    call = types.Part.from_function_call(name="get_weather", args={"city": "Kyoto"})
    response = types.Part.from_function_response(name="get_weather", response={"result": "21 °C"})
    found = new_sdk(
        [types.UserContent("q"), types.ModelContent(call), types.UserContent(response)],
        tools=[get_weather],
        tool_config=types.ToolConfig(function_calling_config=config),
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
    )
    (tool,) = found.tools
    assert (tool.name, tool.description) == ("get_weather", "Weather of a city")
    assert json.loads(tool.parameters) == json.loads(WEATHER)
    assert found.tool_choice == ToolChoice(ToolMode.NAMED, "get_weather")
    assert found.messages[1:] == (
        Message("assistant", (), tool_calls=(ToolCall("get_weather:0", "get_weather", '{"city":"Kyoto"}'),)),
        Message("tool", (TextPart('{"result":"21 °C"}'),), tool_call_id="get_weather:0"),
    )


def test_new_schemas() -> None:
    found = new_sdk("q", response_mime_type="application/json", response_schema=list[Recipe]).answer_format
    assert isinstance(found, JsonSchema)
    schema = json.loads(found.schema)
    assert schema["type"] == "array"
    recipe = schema["items"]
    assert (recipe["type"], recipe["required"]) == ("object", ["name", "minutes", "kind", "steps"])
    assert list(recipe["properties"]) == ["name", "minutes", "kind", "steps"]
    assert recipe["properties"]["minutes"]["type"] == ["integer", "null"]
    assert recipe["properties"]["kind"]["enum"] == ["soup", "cake"]
    assert recipe["properties"]["steps"]["items"]["type"] == "string"
    raw = new_sdk("q", response_mime_type="application/json", response_json_schema=Recipe.model_json_schema())
    assert isinstance(raw.answer_format, JsonSchema)
    assert json.loads(raw.answer_format.schema) == Recipe.model_json_schema()


def test_new_count() -> None:
    sent: list[bytes] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.content)
        return httpx2.Response(200, content=GEMINI.render_token_count(7, 3))

    with google_client(answer) as client:
        counted = client.models.count_tokens(model="m", contents="q")
    assert (counted.total_tokens, counted.cached_content_token_count) == (7, 3)
    assert GEMINI.parse_count_tokens("m", sent[0]).messages == (Message("user", (TextPart("q"),)),)


def test_old_options_functions_and_schemas() -> None:
    recipe = {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer", "nullable": True}}}
    found = old_sdk(
        ["a", {"mime_type": "text/plain", "data": b"\xff\xfe"}],
        model={"system_instruction": "s", "safety_settings": {"HARASSMENT": "BLOCK_NONE"}},
        generation_config={
            "temperature": 0.5, "top_k": 40, "candidate_count": 1, "stop_sequences": ["x"], "max_output_tokens": 9,
            "response_mime_type": "application/json", "response_schema": recipe,
        },
        tools=[get_weather],
        tool_config={"function_calling_config": {"mode": "any"}},
    )  # fmt: skip
    assert [m.role for m in found.messages] == ["system", "user"]
    assert found.messages[1].parts[1] == DocumentPart("text/plain", b"\xff\xfe", "contents[0].parts[1].inlineData")
    assert (found.sampling.temperature, found.sampling.top_k, found.stop, found.max_tokens) == (0.5, 40, ("x",), 9)
    assert found.tool_choice == ToolChoice(ToolMode.REQUIRED)
    assert json.loads(found.tools[0].parameters) == json.loads(WEATHER)
    assert isinstance(found.answer_format, JsonSchema)
    assert json.loads(found.answer_format.schema)["properties"] == {
        "name": {"type": "string"}, "n": {"type": ["integer", "null"]},
    }  # fmt: skip


def test_old_round_trip() -> None:
    protos = generativeai.protos
    call = protos.FunctionCall(name="get_weather", args={"city": "Kyoto"})
    response = protos.FunctionResponse(name="get_weather", response={"output": "21 °C"})
    history = [
        {"role": "user", "parts": ["q"]},
        {"role": "model", "parts": [protos.Part(function_call=call)]},
        protos.Content(parts=[protos.Part(function_response=response)]),
    ]
    found = old_sdk(history)
    assert found.messages[1].tool_calls == (ToolCall("get_weather:0", "get_weather", '{"city":"Kyoto"}'),)
    assert found.messages[2] == Message("tool", (TextPart("21 °C"),), tool_call_id="get_weather:0")


def streams(shape: AnswerShape) -> list[Frame]:
    """The frames of an answer, with a keepalive between any two."""
    parsed = GEMINI.parse_generate("m", shape, b'{"contents":{"parts":{"text":"q"}}}')
    renderer = GEMINI.renderer(parsed, Identity("id", 0))
    usage = Usage(1, 0, 0, 2)
    events: list[Event] = [
        Started(1, 0),
        TextDelta("a {"),
        TextDelta('"]}\n'),
        ChoiceFinished("stop", 2),
        Finished(usage),
    ]
    assert GEMINI.keepalive is not None
    return [one for event in events for frame in renderer.feed(event) for one in (frame, GEMINI.keepalive)][:-1]


def test_new_stream_with_keepalives() -> None:
    body = b"".join(encoded(frame) for frame in streams("events"))
    sse = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=body)
    with google_client(lambda _: sse) as client:
        found = list(client.models.generate_content_stream(model="m", contents="q"))
    assert [chunk.text for chunk in found] == ["a {", '"]}\n', ""]


def test_old_stream_with_keepalives() -> None:
    response = requests.Response()
    response.status_code, response.encoding = 200, "utf-8"
    response.raw = io.BytesIO(b"".join(encoded(frame) for frame in streams("array")))
    chunks = rest_streaming.ResponseIterator(response, generativeai.protos.GenerateContentResponse)
    found = generativeai.types.GenerateContentResponse.from_iterator(chunks)
    assert [chunk.text for chunk in found] == ["a {", '"]}\n', ""]
    assert (found.text, found.usage_metadata.total_token_count) == ('a {"]}\n', 3)
