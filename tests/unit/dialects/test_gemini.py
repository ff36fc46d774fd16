"""The Gemini dialect's requests: what is refused and by which path, and how contents become neutral messages."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import (
    AnyJson,
    CacheUse,
    ChatRequest,
    DocumentPart,
    FilePart,
    JsonSchema,
    Message,
    Part,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
)
from keepwarm.dialects.gemini import GeminiContent, stream_shape
from keepwarm.dialects.gemini_request import CACHE_CONFLICT
from tests.golden.transcripts import BOUNDS

GEMINI = GeminiContent(BOUNDS)
USER = {"role": "user", "parts": [{"text": "q"}]}
CALL = {"functionCall": {"name": "f", "args": {}}}
RESPONSE = {"functionResponse": {"name": "f", "response": {"output": "r"}}}
FUNCTION = {"name": "f", "parametersJsonSchema": {"type": "object"}}
TOOLS = [{"functionDeclarations": [FUNCTION, {"name": "g"}, {"name": "h"}]}]
PDF = {"mimeType": "application/pdf", "data": "eA=="}


def body(**members: Any) -> bytes:
    return json.dumps({"contents": [USER]} | members).encode()


def config(**members: Any) -> bytes:
    return body(generationConfig=members)


def user(*parts: Any) -> bytes:
    return body(contents=[{"role": "user", "parts": list(parts)}])


def model(*parts: Any) -> bytes:
    return body(contents=[USER, {"role": "model", "parts": list(parts)}, USER])


def calling(mode: Any, *names: str, tools: Any = TOOLS) -> bytes:
    return body(tools=tools, toolConfig={"functionCallingConfig": {"mode": mode, "allowedFunctionNames": names}})


def schema(depth: int) -> dict[str, Any]:
    return {"properties": {"a": schema(depth - 1)}} if depth else {}


def request(raw: bytes) -> ChatRequest:
    return GEMINI.parse_generate("m", "whole", raw).request


def parsed(**members: Any) -> ChatRequest:
    return request(body(**members))


FIRST = "contents[0].parts[0]"
ANSWER = "contents[1].parts[0]"
CONFIG = "generationConfig"
CALLING = "toolConfig.functionCallingConfig"
REFUSED: list[tuple[bytes, str]] = [
    (b"{}", "contents"),
    (body(contents=[]), "contents"),
    (body(contents="q"), "contents"),
    (body(contents=[USER] * 4097), "contents"),
    (body(contents=[{"role": "system", "parts": [{"text": "x"}]}]), "contents[0].role"),
    (body(contents=[USER, {"role": "user"}]), "contents[1].parts"),
    (body(contents=[USER, {"role": "model", "parts": []}]), "contents[1].parts"),
    (user({}), f"{FIRST}.data"),
    (user({"unknown": 1}), f"{FIRST}.data"),
    (user({"text": "x", "inlineData": PDF}), f"{FIRST}.inlineData"),
    (user({"executableCode": {"code": "1"}}), f"{FIRST}.executableCode"),
    (user({"codeExecutionResult": {"outcome": 1}}), f"{FIRST}.codeExecutionResult"),
    (user({"inlineData": {"data": "eA=="}}), f"{FIRST}.inlineData.mimeType"),
    (user({"inlineData": {"mimeType": "image/png", "data": "eA=="}}), f"{FIRST}.inlineData.mimeType"),
    (user({"inlineData": {"mimeType": "Audio/MP3", "data": "eA=="}}), f"{FIRST}.inlineData.mimeType"),
    (user({"inlineData": {"mimeType": "text/plain"}}), f"{FIRST}.inlineData.data"),
    (user({"inlineData": {"mimeType": "text/plain", "data": "é"}}), f"{FIRST}.inlineData.data"),
    (user({"inlineData": {"mimeType": "text/plain", "data": "abcde"}}), f"{FIRST}.inlineData.data"),
    (user({"fileData": {}}), f"{FIRST}.fileData.fileUri"),
    (user({"fileData": {"fileUri": "gs://bucket/video.mp4"}}), f"{FIRST}.fileData.fileUri"),
    (user({"fileData": {"fileUri": "https://www.youtube.com/watch?v=files/x"}}), f"{FIRST}.fileData.fileUri"),
    (user({"fileData": {"fileUri": "files/../x"}}), f"{FIRST}.fileData.fileUri"),
    (user({"fileData": {"fileUri": "files/x", "mimeType": "video/mp4"}}), f"{FIRST}.fileData.mimeType"),
    (user(CALL), f"{FIRST}.functionCall"),
    (user({"functionResponse": {"response": {}}}), f"{FIRST}.functionResponse.name"),
    (user({"functionResponse": {"name": "f"}}), f"{FIRST}.functionResponse.response"),
    (user({"functionResponse": {"name": "f", "response": []}}), f"{FIRST}.functionResponse.response"),
    (user({"functionResponse": {"name": "f", "response": {}, "parts": [{}]}}), f"{FIRST}.functionResponse.parts"),
    (user({"functionResponse": {"name": "f", "response": schema(33)}}), f"{FIRST}.functionResponse.response"),
    (model({"inlineData": PDF}), f"{ANSWER}.inlineData"),
    (model({"fileData": {"fileUri": "files/x"}}), f"{ANSWER}.fileData"),
    (model(RESPONSE), f"{ANSWER}.functionResponse"),
    (model({"functionCall": {"args": {}}}), f"{ANSWER}.functionCall.name"),
    (model({"functionCall": {"name": "f", "args": schema(33)}}), f"{ANSWER}.functionCall.args"),
    (body(contents=[USER, {"role": "model", "parts": [CALL]}]), "contents"),
    (body(systemInstruction={"parts": [{"inlineData": PDF}]}), "systemInstruction.parts[0]"),
    (body(systemInstruction="be brief"), "systemInstruction"),
    (body(cachedContent="abc"), "cachedContent"),
    (body(cachedContent="cachedContents/a/b"), "cachedContent"),
    (body(tools=[{"googleSearch": {}}]), "tools[0].googleSearch"),
    (body(tools=[{"google_search_retrieval": {}}]), "tools[0].googleSearchRetrieval"),
    (body(tools=[*TOOLS, {"codeExecution": {}}]), "tools[1].codeExecution"),
    (body(tools=[{"functionDeclarations": [{}]}]), "tools[0].functionDeclarations[0].name"),
    (body(tools=[{"functionDeclarations": [{"name": "1f"}]}]), "tools[0].functionDeclarations[0].name"),
    (body(tools=[{"functionDeclarations": [{"name": "f" * 65}]}]), "tools[0].functionDeclarations[0].name"),
    (body(tools=[*TOOLS, *TOOLS]), "tools[1].functionDeclarations[0].name"),
    (body(tools=[{"functionDeclarations": [{"name": f"f{i}"} for i in range(129)]}]), "tools"),
    (body(tools=[{"functionDeclarations": [FUNCTION | {"parameters": {"type": 6}}]}]),
     "tools[0].functionDeclarations[0].parametersJsonSchema"),
    (body(tools=[{"functionDeclarations": [{"name": "f", "parameters": schema(33)}]}]),
     "tools[0].functionDeclarations[0].parameters"),
    (body(tools=[{"functionDeclarations": [{"name": "f", "parameters": {"type": "THING"}}]}]),
     "tools[0].functionDeclarations[0].parameters.type"),
    (body(tools=[{"functionDeclarations": [{"name": "f", "parameters": {"properties": {"a": {"type": 8}}}}]}]),
     "tools[0].functionDeclarations[0].parameters.properties.a.type"),
    (calling("SOMETIMES"), f"{CALLING}.mode"),
    (calling(5), f"{CALLING}.mode"),
    (calling("AUTO", "f"), f"{CALLING}.allowedFunctionNames"),
    (calling("NONE", "f"), f"{CALLING}.allowedFunctionNames"),
    (calling("ANY", "f", "x"), f"{CALLING}.allowedFunctionNames[1]"),
    (calling("ANY", tools=[]), f"{CALLING}.mode"),
    (config(temperature=2.1), f"{CONFIG}.temperature"),
    (config(topP=-0.1), f"{CONFIG}.topP"),
    (config(top_k=-1), f"{CONFIG}.topK"),
    (config(top_k=1.5), f"{CONFIG}.topK"),
    (config(maxOutputTokens=0), f"{CONFIG}.maxOutputTokens"),
    (config(candidateCount=0), f"{CONFIG}.candidateCount"),
    (config(candidateCount=6), f"{CONFIG}.candidateCount"),
    (config(stopSequences=["a"] * 17), f"{CONFIG}.stopSequences"),
    (config(stopSequences=["a", ""]), f"{CONFIG}.stopSequences[1]"),
    (config(presencePenalty=2.5), f"{CONFIG}.presencePenalty"),
    (config(logprobs=3), f"{CONFIG}.logprobs"),
    (config(responseLogprobs=True, logprobs=21), f"{CONFIG}.logprobs"),
    (config(responseModalities=["TEXT", "IMAGE"]), f"{CONFIG}.responseModalities"),
    (config(response_modalities=[3]), f"{CONFIG}.responseModalities"),
    (config(responseMimeType="text/x.enum"), f"{CONFIG}.responseMimeType"),
    (config(responseSchema={"type": "OBJECT"}), f"{CONFIG}.responseMimeType"),
    (config(responseMimeType="application/json", responseSchema={"type": "ROW"}), f"{CONFIG}.responseSchema.type"),
    (config(responseMimeType="application/json", responseSchema={}, responseJsonSchema={}),
     f"{CONFIG}.responseJsonSchema"),
    (config(responseMimeType="application/json", responseJsonSchema=schema(33)), f"{CONFIG}.responseJsonSchema"),
    (config(thinkingConfig={"thinkingBudget": -2}), f"{CONFIG}.thinkingConfig.thinkingBudget"),
    (body(contents=[USER, {"role": "model", "parts": [{"text": "{"}]}],
          generationConfig={"responseMimeType": "application/json"}), f"{CONFIG}.responseMimeType"),
]  # fmt: skip


@pytest.mark.parametrize("raw,param", REFUSED)
def test_refused_with_its_path(raw: bytes, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        request(raw)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")


def test_defaults() -> None:
    assert parsed() == ChatRequest("m", (Message("user", (TextPart("q"),)),))


@pytest.mark.parametrize("name,expected", [("m", "m"), ("models/m", "m"), ("models/org/m", "org/m")])
def test_the_model_is_in_the_path(name: str, expected: str) -> None:
    assert GEMINI.parse_generate(name, "events", body(model="other")).request.model == expected
    assert GEMINI.parse_count_tokens(name, body()).model == expected
    assert GEMINI.parse_chat({}, body(model=name)).request.model == expected


@pytest.mark.parametrize("name", ["", "models/", "m" * 257])
def test_no_model(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        GEMINI.parse_generate(name, "whole", body())
    assert caught.value.param == "model"


def test_every_option() -> None:
    found = request(
        config(
            temperature=0.5, topP=0.9, topK=40.0, maxOutputTokens="100", stopSequences=["x"], candidateCount=2, seed=7,
            presencePenalty=1, frequencyPenalty=-1, responseLogprobs=True, logprobs=3, responseModalities=["TEXT"],
            thinkingConfig={"thinkingBudget": 0},
        )
    )  # fmt: skip
    assert found.sampling == Sampling(0.5, 0.9, 40, seed=7, presence_penalty=1.0, frequency_penalty=-1.0)
    assert (found.max_tokens, found.stop, found.n, found.top_logprobs, found.thinking) == (100, ("x",), 2, 3, False)


def test_members_without_a_meaning_here_are_accepted() -> None:
    ignored = {
        "safetySettings": [{"category": 7, "threshold": "BLOCK_NONE"}], "labels": {"a": "b"}, "serviceTier": "flex",
        "store": True, "generationConfig": {"mediaResolution": "LOW", "speechConfig": {}, "audioTimestamp": True},
    }  # fmt: skip
    assert parsed(**ignored) == parsed()


def test_both_spellings_and_numbers_for_names_are_one_request() -> None:
    camel = {
        "systemInstruction": {"role": "user", "parts": [{"text": "s"}]},
        "contents": [{"role": "user", "parts": [{"inlineData": PDF}]}],
        "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["g"]}},
        "tools": [{"functionDeclarations": [
            {"name": "f", "parameters": {"type": "OBJECT", "properties": {"any_of": {"type": "STRING", "minLength": "2"}}}},
            {"name": "g", "parameters": {"anyOf": [{"type": "INTEGER"}, {"type": "NULL"}]}},
        ]}],
        "generationConfig": {"topK": 4, "responseMimeType": "application/json"},
    }  # fmt: skip
    snake = {
        "system_instruction": {"parts": {"text": "s"}},
        "contents": {"parts": {"inline_data": {"mime_type": "application/pdf", "data": "eA"}}},
        "tool_config": {"function_calling_config": {"mode": 2, "allowed_function_names": ["g"]}},
        "tools": [{"function_declarations": [
            {"name": "f", "parameters": {"type": 6, "properties": {"any_of": {"type": 1, "min_length": 2}}}},
            {"name": "g", "parameters": {"any_of": [{"type": 3}, {"type": 7}]}},
        ]}],
        "generation_config": {"top_k": "4", "response_mime_type": "application/json"},
    }  # fmt: skip
    found = parsed(**camel)
    assert found == parsed(**snake)
    assert found.tools[0].parameters == '{"type":"object","properties":{"any_of":{"type":"string","minLength":2}}}'
    assert found.tools[1].parameters == '{"anyOf":[{"type":"integer"},{"type":"null"}]}'


def test_turns_of_one_role_stay_apart() -> None:
    found = parsed(contents=[USER, USER, {"role": "function", "parts": [RESPONSE]}])
    assert [m.role for m in found.messages] == ["user", "user", "tool"]


def test_a_last_content_of_the_model_is_continued() -> None:
    said = {"role": "model", "parts": [{"text": "thought", "thought": True}, {"text": "De"}, {"text": "ar "}]}
    last = parsed(contents=[USER, said]).messages[-1]
    assert last == Message("assistant", (TextPart("De"), TextPart("ar ")), partial=True, reasoning="thought")
    counted = GEMINI.parse_count_tokens("m", body(contents=[USER, said])).messages[-1]
    assert not counted.partial


def test_responses_come_first_and_answer_the_first_open_call_of_their_name() -> None:
    def call(name: str, **more: Any) -> dict[str, Any]:
        return {"functionCall": {"name": name} | more}

    def response(name: str, **more: Any) -> dict[str, Any]:
        return {"functionResponse": {"name": name, "response": {"output": name}} | more}

    found = parsed(contents=[
        USER,
        {"role": "model", "parts": [call("f"), call("g", id="mine"), call("f", args={"b": 1.0, "a": "é"})]},
        {"parts": [{"text": "a"}, response("g"), response("f"), response("f"), {"text": "b"}, response("x")]},
        {"role": "model", "parts": [call("f")]},
        {"parts": [response("f")]},
    ])  # fmt: skip
    assert found.messages[1].tool_calls == (
        ToolCall("f:0", "f", "{}"), ToolCall("mine", "g", "{}"), ToolCall("f:2", "f", '{"b":1.0,"a":"é"}'),
    )  # fmt: skip
    results = [(m.role, m.tool_call_id) for m in found.messages[2:]]
    assert results == [
        ("tool", "mine"), ("tool", "f:0"), ("tool", "f:2"), ("tool", "x:3"), ("user", None), ("assistant", None),
        ("tool", "f:3"),
    ]  # fmt: skip
    assert found.messages[6].text == "ab"


def test_a_made_up_id_is_nobody_elses() -> None:
    calls = [{"functionCall": {"name": "f", "id": "f:1"}}, {"functionCall": {"name": "f"}}]
    assert [call.id for call in request(model(*calls)).messages[1].tool_calls] == ["f:1", "f:2"]


@pytest.mark.parametrize(
    "response,text,is_error",
    [
        ({"output": "21 °C"}, "21 °C", False),
        ({"output": {"t": 21}}, '{"t":21}', False),
        ({"result": "21 °C"}, '{"result":"21 °C"}', False),
        ({"output": "x", "more": 1}, '{"output":"x","more":1}', False),
        ({"error": "no such city"}, "no such city", True),
        ({"error": None, "output": 1}, '{"error":null,"output":1}', False),
        ({}, "{}", False),
    ],
)
def test_what_a_function_said(response: dict[str, Any], text: str, is_error: bool) -> None:
    (message,) = request(user({"functionResponse": {"name": "f", "response": response}})).messages
    assert (message.text, message.is_error) == (text, is_error)


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
def test_files_are_left_to_the_gateway(encode: Any) -> None:
    data = bytes(range(256))
    blob = {"mimeType": "text/csv; charset=utf-8", "data": encode(data).decode().rstrip("="), "displayName": "T"}
    found = request(user({"text": "a"}, {"inlineData": blob})).messages[0].parts
    assert found == (
        TextPart("a"),
        DocumentPart("text/csv; charset=utf-8", data, "contents[0].parts[1].inlineData", title="T"),
    )


@pytest.mark.parametrize("uri", ["files/abc-1", "http://127.0.0.1:8000/v1beta/files/abc-1", "/v1/files/abc-1"])
def test_uploaded_files(uri: str) -> None:
    found = request(user({"file_data": {"file_uri": uri, "mime_type": "application/pdf"}})).messages[0].parts
    assert found == (FilePart("abc-1", f"{FIRST}.fileData.fileUri"),)


def test_what_cannot_be_read_is_told_with_what_can() -> None:
    for kind in ("image/png", "audio/wav", "video/mp4"):
        with pytest.raises(ApiError, match=r"input modalities are TEXT"):
            request(user({"inlineData": {"mimeType": kind, "data": "eA=="}}))


@pytest.mark.parametrize(
    "mode,names,left,choice",
    [
        ("AUTO", (), "fgh", ToolChoice()),
        ("MODE_UNSPECIFIED", (), "fgh", ToolChoice()),
        ("NONE", (), "fgh", ToolChoice(ToolMode.NONE)),
        ("ANY", (), "fgh", ToolChoice(ToolMode.REQUIRED)),
        ("ANY", ("g",), "fgh", ToolChoice(ToolMode.NAMED, "g")),
        ("ANY", ("h", "f"), "fh", ToolChoice(ToolMode.REQUIRED)),
        (2, ("f", "g", "h"), "fgh", ToolChoice(ToolMode.REQUIRED)),
        ("VALIDATED", (), "fgh", ToolChoice()),
        ("VALIDATED", ("f", "g"), "fg", ToolChoice()),
    ],
)
def test_how_functions_may_be_called(mode: Any, names: tuple[str, ...], left: str, choice: ToolChoice) -> None:
    found = request(calling(mode, *names))
    assert ("".join(tool.name for tool in found.tools), found.tool_choice) == (left, choice)


def test_functions() -> None:
    found = parsed(tools=[*TOOLS, {"functionDeclarations": [{"name": "i", "description": "d", "parameters": {}}]}])
    nothing = '{"type":"object","properties":{}}'
    assert found.tools == (
        Tool("f", "", '{"type":"object"}'), Tool("g", "", nothing), Tool("h", "", nothing), Tool("i", "d", nothing),
    )  # fmt: skip


@pytest.mark.parametrize("members", [{"systemInstruction": {"parts": []}}, {"tools": TOOLS}, {"toolConfig": {}}])
def test_what_cannot_stand_beside_a_cached_content(members: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        parsed(cachedContent="cachedContents/abc", **members)
    assert (caught.value.kind, caught.value.message) == (ErrorKind.INVALID_REQUEST, CACHE_CONFLICT)
    wrapped = {"generateContentRequest": {"contents": [USER], "cachedContent": "cachedContents/abc"} | members}
    with pytest.raises(ApiError, match=r"^CachedContent can not be used"):
        GEMINI.parse_count_tokens("m", json.dumps(wrapped).encode())


def test_a_cached_content() -> None:
    found = parsed(cached_content="cachedContents/abc", tools=[])
    assert found.cache == CacheUse(object_id="abc", dialect="gemini")
    assert parsed(cachedContent="").cache is None


def test_both_bodies_of_count_tokens() -> None:
    inner = {"model": "models/m", "contents": [USER], "tools": TOOLS, "cachedContent": None}
    wrapped = GEMINI.parse_count_tokens("m", json.dumps({"generate_content_request": inner}).encode())
    assert wrapped == parsed(tools=TOOLS)
    assert GEMINI.parse_count_tokens("m", body()) == parsed()
    for raw, param in (
        (b"{}", "contents"),
        (json.dumps({"contents": [USER], "generateContentRequest": inner}).encode(), "generateContentRequest"),
    ):
        with pytest.raises(ApiError) as caught:
            GEMINI.parse_count_tokens("m", raw)
        assert caught.value.param == param


@pytest.mark.parametrize(
    "wanted,expected",
    [
        ({}, None),
        ({"includeThoughts": True}, None),
        ({"thinkingBudget": 0}, False),
        ({"thinkingBudget": -1}, None),
        ({"thinkingBudget": 512}, True),
        ({"thinkingLevel": "HIGH"}, True),
        ({"thinking_level": "THINKING_LEVEL_UNSPECIFIED"}, None),
    ],
)
def test_thinking(wanted: dict[str, Any], expected: bool | None) -> None:
    assert request(config(thinkingConfig=wanted)).thinking is expected


def answer_schema(gemini: dict[str, Any]) -> Any:
    found = request(config(responseMimeType="application/json", responseSchema=gemini)).answer_format
    assert isinstance(found, JsonSchema)
    return json.loads(found.schema)


def test_answers_as_json() -> None:
    assert request(config(responseMimeType="application/json")).answer_format == AnyJson()
    free = {"type": ["object", "null"], "$defs": {"A": {"type": "STRING"}}, "any_of": 1}
    found = request(config(responseMimeType="application/json", responseJsonSchema=free)).answer_format
    assert found == JsonSchema("answer", json.dumps(free, separators=(",", ":")))


@pytest.mark.parametrize(
    "gemini,expected",
    [
        ({"type": "STRING", "format": "enum", "enum": ["a"]}, {"type": "string", "format": "enum", "enum": ["a"]}),
        ({"type": "string", "nullable": True, "enum": ["a"]}, {"type": ["string", "null"], "enum": ["a", None]}),
        ({"type": 3, "nullable": False, "minimum": 1, "maximum": "9"}, {"type": "integer", "minimum": 1, "maximum": 9}),
        ({"any_of": [{"type": 1}, {"type": 2}], "nullable": True},
         {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}]}),
        ({"type": "ARRAY", "items": {"type": "BOOLEAN"}, "max_items": "3", "example": [True]},
         {"type": "array", "items": {"type": "boolean"}, "maxItems": 3, "examples": [[True]]}),
        ({"type": "OBJECT", "additional_properties": {"type": "NUMBER"}, "defs": {"ref": {"type": 0}}},
         {"type": "object", "additionalProperties": {"type": "number"}, "$defs": {"ref": {}}}),
        ({"ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}),
        ({"type": ["string", "null"], "oneOf": [{"type": 4}], "$comment": "c"},
         {"type": ["string", "null"], "oneOf": [{"type": "boolean"}], "$comment": "c"}),
    ],
)  # fmt: skip
def test_schemas(gemini: dict[str, Any], expected: dict[str, Any]) -> None:
    assert answer_schema(gemini) == expected


def test_properties_come_in_the_order_that_was_asked_for() -> None:
    properties = {"a": {"type": 1}, "b": {"type": 1}, "c": {"type": 1}}
    found = answer_schema({"type": 6, "properties": properties, "propertyOrdering": ["c", "x", "a", 1]})
    assert list(found["properties"]) == ["c", "a", "b"]
    assert "propertyOrdering" not in found


@pytest.mark.parametrize(
    "query,shape",
    [
        ([("alt", "sse")], "events"),
        ([("key", "k"), ("$alt", "sse")], "events"),
        ([], "array"),
        ([("$alt", "json;enum-encoding=int")], "array"),
        ([("alt", "json")], "array"),
    ],
)
def test_how_it_is_streamed(query: list[tuple[str, str]], shape: str) -> None:
    assert stream_shape(query) == shape


texts = st.text(max_size=5)
user_parts = st.one_of(
    texts.map(lambda text: ({"text": text}, TextPart(text))),
    st.binary(max_size=5).map(
        lambda data: (
            {"inlineData": {"mimeType": "text/plain", "data": base64.b64encode(data).decode()}},
            DocumentPart("text/plain", data, "?"),
        )
    ),
    st.sampled_from(["a", "b-1"]).map(lambda name: ({"fileData": {"fileUri": f"x/files/{name}"}}, FilePart(name, "?"))),
)


@given(st.lists(user_parts, min_size=1, max_size=6), st.lists(st.integers(0, 6), max_size=3))
def test_parts_of_any_structure(parts: list[tuple[dict[str, Any], Part]], responses: list[int]) -> None:
    """Everything that is no response keeps its order and its place in the body."""
    wire = [wire for wire, _ in parts]
    for place in responses:
        wire.insert(place, RESPONSE)
    *results, message = request(user(*wire)).messages
    assert [m.role for m in results] == ["tool"] * len(responses)
    assert [type(part) for part in message.parts] == [type(part) for _, part in parts]
    for found, (_, part) in zip(message.parts, parts, strict=True):
        match found, part:
            case TextPart(text=text), TextPart(text=expected):
                assert text == expected
            case DocumentPart(data=data, param=param), DocumentPart(data=expected_data):
                assert data == expected_data and param.endswith(".inlineData")
            case FilePart(file_id=file_id, param=param), FilePart(file_id=expected_id):
                assert file_id == expected_id and param.endswith(".fileData.fileUri")
    places = [found.param for found in message.parts if not isinstance(found, TextPart)]
    assert places == sorted(places, key=lambda param: int(param.split("parts[")[1].split("]")[0]))
