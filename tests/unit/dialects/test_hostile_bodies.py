"""Whatever arrives, a parser answers with a value or an ApiError that renders; nothing else ever comes out."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.errors import ApiError
from keepwarm.dialects.caching import KimiCaching
from keepwarm.dialects.kimi import KimiChat
from keepwarm.dialects.openai import OpenAIChat
from tests.golden.transcripts import BOUNDS

OPENAI = OpenAIChat(BOUNDS)
KIMI = KimiChat(BOUNDS)
CACHING = KimiCaching(BOUNDS)

CALL = {"id": "f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FULL: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "cache", "content": "cache_id=cache-a;reset_ttl=60"},
        {"role": "user", "content": [{"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "f:0", "content": "1"},
        {"role": "assistant", "content": "a", "partial": True},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    "stop": ["a"],
    "logit_bias": {"1": 1.0},
    "n": 1,
    "temperature": 0.5,
    "logprobs": True,
    "top_logprobs": 1,
    "metadata": {"k": "v"},
    "tags": ["t"],
    "ttl": 60,
    "expired_at": 0,
    "tag": "t",
    "cache_id": "cache-a",
}

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.sampled_from(["", "cache"])
)
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths(inner, (*at, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    head, *rest = path
    copy = value.copy()
    if new is ... and not rest:
        del copy[head]
    else:
        copy[head] = replaced(value[head], tuple(rest), new)
    return copy


def answers(parse: Callable[[], object]) -> None:
    try:
        parse()
    except ApiError as refused:
        error = refused
    else:
        return
    assert json.loads(KIMI.render_error(error).body)["error"]["type"] == "invalid_request_error"
    assert len(error.message) < 1_000


def parse_all(body: bytes) -> None:
    answers(lambda: OPENAI.parse_chat({}, body))
    answers(lambda: KIMI.parse_chat({}, body))
    answers(lambda: CACHING.parse_create(body))
    answers(lambda: CACHING.parse_update(body))
    answers(lambda: CACHING.parse_tag(body))


@given(st.binary(max_size=200))
def test_bytes(body: bytes) -> None:
    parse_all(body)


@given(documents)
def test_documents(document: Any) -> None:
    parse_all(json.dumps(document).encode())


@given(st.sampled_from(paths(FULL)[1:]), documents | st.just(...), st.booleans())
def test_one_member_replaced(path: tuple[Any, ...], new: Any, with_cache: bool) -> None:
    whole = FULL if with_cache else FULL | {"messages": [FULL["messages"][1], *FULL["messages"][1:]]}
    body = json.dumps(replaced(whole, path, new), ensure_ascii=True)
    parse_all(body.encode())


@given(st.sampled_from(paths(FULL)[1:]), st.binary(max_size=12), st.integers(0, 4000))
def test_bytes_written_over_a_body(path: tuple[Any, ...], patch: bytes, at: int) -> None:
    body = bytearray(json.dumps(replaced(FULL, path, ...)).encode())
    body[at : at + len(patch)] = patch
    parse_all(bytes(body))


@given(st.lists(st.tuples(st.sampled_from(["limit", "order", "after", "metadata[a]", "metadata[", "x"]), st.text())))
def test_list_queries(query: list[tuple[str, str]]) -> None:
    answers(lambda: CACHING.parse_list(query))


@given(
    st.dictionaries(
        st.sampled_from(["x-msh-context-cache", "x-msh-context-cache-dryrun", "x-msh-context-cache-reset-ttl"]),
        st.text(),
    )
)
def test_headers(headers: dict[str, str]) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "q"}]}).encode()
    answers(lambda: KIMI.parse_chat(headers, body))
