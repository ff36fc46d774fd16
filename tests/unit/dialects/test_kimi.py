"""What Kimi's dialect adds to OpenAI's: the two ways to use a cache object, partial mode, its own rules and headers."""

import json
from typing import Any

import pytest

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import ToolCallDelta
from keepwarm.core.request import CacheUse, ToolChoice, ToolMode
from keepwarm.dialects import CacheReport, Identity
from keepwarm.dialects.kimi import KimiChat, parse_cache_content
from tests.golden.transcripts import BOUNDS

KIMI = KimiChat(BOUNDS)
USER = {"role": "user", "content": "q"}
ID = "x-msh-context-cache"


def chat(**members: Any) -> bytes:
    return json.dumps({"model": "moonshot-v1-8k", "messages": [USER]} | members).encode()


def refused(headers: dict[str, str], body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        KIMI.parse_chat(headers, body)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    return caught.value


@pytest.mark.parametrize(
    "content,use",
    [
        ("cache_id=cache-a", CacheUse(object_id="cache-a")),
        ("tag=a.b_c-1", CacheUse(tag="a.b_c-1")),
        ("cache_id=cache-a;reset_ttl=3600", CacheUse(object_id="cache-a", reset_ttl_s=3600)),
        ("tag=t;dry_run=1;reset_ttl=60", CacheUse(tag="t", reset_ttl_s=60, dry_run=True)),
        ("tag=t;dry_run=0", CacheUse(tag="t")),
    ],
)
def test_cache_message_grammar(content: str, use: CacheUse) -> None:
    assert parse_cache_content(content) == use


@pytest.mark.parametrize(
    "content",
    [
        "",
        "cache-a",
        "cache_id=",
        "tag=",
        "reset_ttl=60",
        "cache_id=a;",
        ";cache_id=a",
        "cache_id=a;;dry_run=1",
        "cache_id=a;tag=b",
        "cache_id=a;cache_id=b",
        "cache_id=a;dry_run=2",
        "cache_id=a;dry_run=",
        "cache_id=a;dry_run",
        "cache_id=a;dry_run=1;dry_run=1",
        "cache_id=a;reset_ttl=0",
        "cache_id=a;reset_ttl=-5",
        "cache_id=a;reset_ttl=1.5",
        "cache_id=a;reset_ttl=1e3",
        "cache_id=a;reset_ttl=٣",
        "cache_id=a;reset_ttl=99999999999",
        "cache_id=a; dry_run=1",
    ],
)
def test_cache_message_grammar_refuses(content: str) -> None:
    error = refused({}, chat(messages=[{"role": "cache", "content": content}, USER]))
    assert error.param == "messages[0].content"


def test_cache_message_is_replaced_and_paths_still_count_it() -> None:
    body = chat(messages=[{"role": "cache", "content": "tag=t"}, USER])
    request = KIMI.parse_chat({}, body).request
    assert [message.role for message in request.messages] == ["user"]
    assert refused({}, chat(messages=[{"role": "cache", "content": "tag=t"}, USER, {"role": "x"}])).param == (
        "messages[2].role"
    )


def test_cache_message_alone_asks_the_cached_messages() -> None:
    request = KIMI.parse_chat({}, chat(messages=[{"role": "cache", "content": "tag=t"}])).request
    assert request.messages == ()
    assert request.cache == CacheUse(tag="t")


def test_cache_message_content_must_be_a_string() -> None:
    parts = [{"type": "text", "text": "tag=t"}]
    assert refused({}, chat(messages=[{"role": "cache", "content": parts}])).param == "messages[0].content"


@pytest.mark.parametrize("tools", [[], [{"type": "function", "function": {"name": "f"}}]])
def test_tools_beside_a_cache_message_are_refused(tools: list[Any]) -> None:
    assert refused({}, chat(messages=[{"role": "cache", "content": "tag=t"}, USER], tools=tools)).param == "tools"


def test_null_tools_beside_a_cache_message_are_absent() -> None:
    body = chat(messages=[{"role": "cache", "content": "tag=t"}, USER], tools=None)
    assert KIMI.parse_chat({}, body).request.tools == ()


def test_a_named_tool_may_be_the_caches() -> None:
    choice = {"type": "function", "function": {"name": "f"}}
    body = chat(messages=[{"role": "cache", "content": "tag=t"}, USER], tool_choice=choice)
    assert KIMI.parse_chat({}, body).request.tool_choice == ToolChoice(ToolMode.NAMED, "f")


def test_header_form() -> None:
    headers = {ID: "cache-a", f"{ID}-dryrun": "1", f"{ID}-reset-ttl": "300"}
    use = KIMI.parse_chat(headers, chat()).request.cache
    assert use == CacheUse(object_id="cache-a", resent=True, reset_ttl_s=300, dry_run=True)
    assert KIMI.parse_chat({}, chat()).request.cache is None
    assert KIMI.parse_chat({f"{ID}-dryrun": "0"}, chat()).request.cache is None


@pytest.mark.parametrize(
    "headers,param",
    [
        ({ID: ""}, ID),
        ({ID: "cache-a", f"{ID}-dryrun": "yes"}, f"{ID}-dryrun"),
        ({ID: "cache-a", f"{ID}-reset-ttl": "soon"}, f"{ID}-reset-ttl"),
        ({ID: "cache-a", f"{ID}-reset-ttl": "0"}, f"{ID}-reset-ttl"),
        ({f"{ID}-dryrun": "1"}, f"{ID}-dryrun"),
    ],
)
def test_header_form_refuses(headers: dict[str, str], param: str) -> None:
    assert refused(headers, chat()).param == param


def test_both_forms_at_once_are_refused() -> None:
    error = refused({ID: "cache-a"}, chat(messages=[{"role": "cache", "content": "tag=t"}, USER]))
    assert error.param == "messages[0]"


def test_partial_marks_the_last_message() -> None:
    last = {"role": "assistant", "name": "Holmes", "content": "I am", "partial": True}
    messages = KIMI.parse_chat({}, chat(messages=[USER, last])).request.messages
    assert [message.partial for message in messages] == [False, True]
    assert messages[1].name == "Holmes"


CALL = {"id": "f:0", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "messages,param",
    [
        ([{"role": "assistant", "content": "a", "partial": True}, USER], "messages[0].partial"),
        ([USER | {"partial": True}], "messages[0].partial"),
        ([USER, {"role": "assistant", "content": "a", "tool_calls": [CALL], "partial": True}], "messages[1].partial"),
        ([USER, {"role": "assistant", "content": None, "partial": True}], "messages[1].content"),
        ([{"role": "cache", "content": "tag=t", "partial": True}, USER], "messages[0]"),
    ],
)
def test_partial_elsewhere_is_refused(messages: list[Any], param: str) -> None:
    assert refused({}, chat(messages=messages)).param == param


def test_partial_false_is_absent() -> None:
    assert not KIMI.parse_chat({}, chat(messages=[USER | {"partial": False}])).request.messages[0].partial


def test_temperature_defaults_to_zero_and_then_one_choice() -> None:
    assert KIMI.parse_chat({}, chat()).request.sampling.temperature == 0.0
    assert refused({}, chat(n=2)).param == "n"
    assert refused({}, chat(n=2, temperature=1e-7)).param == "n"
    assert KIMI.parse_chat({}, chat(n=2, temperature=0.3)).request.n == 2
    assert KIMI.parse_chat({}, chat(n=1, temperature=0)).request.n == 1


def test_reply_headers_never_tell_a_negative_lifetime() -> None:
    headers = dict(KIMI.reply_headers(CacheReport("cache-a", expires_at=100, now=130, n_tokens_saved=7)))
    assert headers == {
        "msh-context-cache-id": "cache-a",
        "msh-context-cache-token-saved": "7",
        "msh-context-cache-token-exp": "100",
        "msh-context-cache-token-ttl": "0",
    }


def test_call_ids_count_on_through_the_conversation() -> None:
    history = [
        USER,
        {"role": "assistant", "tool_calls": [CALL, CALL | {"id": "f:1"}]},
        {"role": "tool", "tool_call_id": "f:0", "content": "1"},
        {"role": "tool", "tool_call_id": "f:1", "content": "2"},
    ]
    parsed = KIMI.parse_chat({}, chat(messages=history, stream=True))
    frames = KIMI.renderer(parsed, Identity("chatcmpl-1", 1)).feed(ToolCallDelta(0, "g", "{}"))
    (call,) = json.loads(frames[-1].data)["choices"][0]["delta"]["tool_calls"]
    assert call == {"index": 0, "id": "g:2", "type": "function", "function": {"name": "g", "arguments": "{}"}}


def test_token_estimate() -> None:
    assert json.loads(KIMI.render_token_estimate(80)) == {"data": {"total_tokens": 80}}
