"""Whatever arrives, the Anthropic parser answers with a value or an ApiError that renders; nothing else ever comes out."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.errors import ApiError
from keepwarm.dialects.anthropic import AnthropicMessages
from tests.golden.transcripts import BOUNDS
from tests.unit.dialects.test_hostile_bodies import documents, paths, replaced

ANTHROPIC = AnthropicMessages(BOUNDS)
MARK = {"type": "ephemeral", "ttl": "5m"}
TEXT = {"type": "text", "text": "x", "citations": None}
SOURCES: list[dict[str, Any]] = [
    {"type": "text", "media_type": "text/plain", "data": "x"},
    {"type": "base64", "media_type": "application/pdf", "data": "eA=="},
    {"type": "content", "content": [TEXT]},
]
FULL: dict[str, Any] = {
    "model": "m",
    "max_tokens": 2000,
    "system": [TEXT | {"cache_control": MARK}],
    "messages": [
        {
            "role": "user",
            "content": [
                TEXT | {"cache_control": MARK},
                *({"type": "document", "source": source, "title": "t", "context": "c"} for source in SOURCES),
                {"type": "search_result", "source": "s", "title": "t", "content": [TEXT]},
            ],
        },
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "x", "signature": "y"},
            {"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1]}, "cache_control": MARK},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t", "content": [TEXT], "is_error": True},
        ]},
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}, "description": "d", "type": "custom"}],
    "tool_choice": {"type": "auto"},
    "cache_control": MARK,
    "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    "diagnostics": {"previous_message_id": "msg_1"},
    "stop_sequences": ["a"],
    "temperature": 0.5,
    "top_k": 4,
}  # fmt: skip


def answers(parse: Callable[[], object]) -> None:
    try:
        parse()
    except ApiError as refused:
        error = refused
    else:
        return
    body = json.loads(ANTHROPIC.render_error(error, "req_1").body)
    assert body["error"]["type"] == "invalid_request_error" and len(error.message) < 1_000


def parse_all(body: bytes) -> None:
    answers(lambda: ANTHROPIC.parse_chat({}, body))
    answers(lambda: ANTHROPIC.parse_count({}, body))


def test_the_whole_body_is_accepted() -> None:
    assert ANTHROPIC.parse_chat({}, json.dumps(FULL).encode()).wants_diagnostics


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


def test_blocks_nested_without_end() -> None:
    body = b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":'
    parse_all(body + b'[{"type":"tool_result","tool_use_id":"t","content":' * 50_000)
    parse_all(body + b'[{"type":"tool_result","tool_use_id":"t","content":' * 200 + b'"x"' + b"}]" * 200 + b"}]}")
