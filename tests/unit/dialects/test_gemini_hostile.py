"""Whatever arrives, the Gemini parser answers with a value or an ApiError that renders; nothing else ever comes out."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.dialects.gemini import GeminiContent
from keepwarm.dialects.gemini_model import parse_models_page
from tests.golden.transcripts import BOUNDS
from tests.unit.dialects.test_hostile_bodies import documents, paths, replaced

GEMINI = GeminiContent(BOUNDS)
SCHEMA = {
    "type": "OBJECT",
    "properties": {"a": {"type": 1, "nullable": True, "enum": ["x"]}, "b": {"anyOf": [{"type": "INTEGER"}]}},
    "propertyOrdering": ["b", "a"],
    "required": ["a"],
    "additionalProperties": {"type": "ARRAY", "items": {"type": "NUMBER"}, "max_items": "3"},
    "example": {},
}
FULL: dict[str, Any] = {
    "model": "m",
    "systemInstruction": {"role": "user", "parts": [{"text": "s"}]},
    "contents": [
        {"role": "user", "parts": [
            {"text": "q"},
            {"inlineData": {"mimeType": "text/plain", "data": "eA==", "displayName": "t"}},
            {"fileData": {"fileUri": "files/a", "mimeType": "application/pdf"}},
        ]},
        {"role": "model", "parts": [
            {"text": "t", "thought": True, "thoughtSignature": "c2ln"},
            {"functionCall": {"id": "c", "name": "f", "args": {"a": [1]}}},
        ]},
        {"role": "function", "parts": [{"functionResponse": {"id": "c", "name": "f", "response": {"output": "r"}}}]},
    ],
    "tools": [{"functionDeclarations": [{"name": "f", "description": "d", "parameters": SCHEMA}]}],
    "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}},
    "generationConfig": {
        "temperature": 1, "topP": 0.95, "topK": 64, "maxOutputTokens": 100, "stopSequences": ["a"], "candidateCount": 1,
        "responseMimeType": "application/json", "responseSchema": SCHEMA, "seed": 1, "presencePenalty": 0,
        "frequencyPenalty": 0, "responseLogprobs": True, "logprobs": 1, "responseModalities": ["TEXT"],
        "thinkingConfig": {"thinkingBudget": 0, "includeThoughts": False},
    },
    "safetySettings": [{"category": 1, "threshold": "BLOCK_NONE"}],
    "cachedContent": "",
}  # fmt: skip


def answers(parse: Callable[[], object]) -> None:
    try:
        parse()
    except ApiError as refused:
        error = refused
    else:
        return
    assert error.kind is ErrorKind.INVALID_REQUEST
    status = json.loads(GEMINI.render_error(error, "req_1").body)["error"]
    assert status["status"] == "INVALID_ARGUMENT" and len(error.message) < 1_000


def parse_all(body: bytes) -> None:
    answers(lambda: GEMINI.parse_chat({}, body))
    answers(lambda: GEMINI.parse_generate("m", "array", body))
    answers(lambda: GEMINI.parse_count_tokens("m", body))
    answers(lambda: GEMINI.parse_count_tokens("m", b'{"generateContentRequest":' + body + b"}"))


def test_the_whole_body_is_accepted() -> None:
    body = json.dumps(FULL).encode()
    assert GEMINI.parse_generate("m", "events", body).request == GEMINI.parse_chat({}, body).request
    assert GEMINI.parse_count_tokens("m", b'{"generateContentRequest":' + body + b"}").tools


@given(st.binary(max_size=200))
def test_bytes(body: bytes) -> None:
    parse_all(body)


@given(documents)
def test_documents(document: Any) -> None:
    parse_all(json.dumps(document).encode())


@given(st.sampled_from(paths(FULL)[1:]), documents | st.just(...))
def test_one_member_replaced(path: tuple[Any, ...], new: Any) -> None:
    parse_all(json.dumps(replaced(FULL, path, new), ensure_ascii=True).encode())


@given(st.sampled_from(paths(FULL)[1:]), st.binary(max_size=12), st.integers(0, 2500))
def test_bytes_written_over_a_body(path: tuple[Any, ...], patch: bytes, at: int) -> None:
    body = bytearray(json.dumps(replaced(FULL, path, ...)).encode())
    body[at : at + len(patch)] = patch
    parse_all(bytes(body))


@given(st.lists(st.tuples(st.sampled_from(["pageSize", "pageToken", "page_size", "x"]), st.text())))
def test_list_queries(query: list[tuple[str, str]]) -> None:
    answers(lambda: parse_models_page(query))


def test_schemas_nested_without_end() -> None:
    head = b'{"contents":[{"parts":[{"text":"q"}]}],"tools":[{"functionDeclarations":[{"name":"f","parameters":'
    parse_all(head + b'{"items":' * 50_000)
    parse_all(head + b'{"items":' * 500 + b"{}" + b"}" * 500 + b"}]}]}")
