"""Kimi's cache resource: the rules on what may be cached, lifetimes, metadata, tags and list queries."""

import json
from typing import Any

import pytest

from keepwarm.core.cache_object import CacheObject, NewObject, ObjectStatus, ObjectUpdate, Page
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.dialects.caching import KimiCaching
from tests.golden.transcripts import BOUNDS

CACHING = KimiCaching(BOUNDS)
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f"}}


def create(**members: Any) -> bytes:
    return json.dumps({"model": "moonshot-v1", "messages": [SYSTEM]} | members).encode()


def call(*ids: str) -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def answer(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "1"}


def refused(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        CACHING.parse_create(body)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    return caught.value


@pytest.mark.parametrize(
    "members,param",
    [
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system"}]}, "messages[0].content"),
        ({"name": "n" * 257}, "name"),
        ({"description": "d" * 513}, "description"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"": "v"}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"metadata": "k=v"}, "metadata"),
        ({"ttl": -1}, "ttl"),
        ({"ttl": "5m"}, "ttl"),
        ({"ttl": 60, "expired_at": 1718684042}, "ttl"),
        ({"expired_at": 2**60}, "expired_at"),
        ({"tags": ["t"] * 33}, "tags"),
        ({"tags": ["t" * 129]}, "tags[0]"),
        ({"tags": [""]}, "tags[0]"),
        ({"tags": ["ok", "a\n"]}, "tags[1]"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    ],
)
def test_refused_with_its_path(members: dict[str, Any], param: str) -> None:
    assert refused(create(**members)).param == param


def test_lengths_are_counted_in_characters() -> None:
    assert CACHING.parse_create(create(name="漢" * 256, description="é" * 512)).name == "漢" * 256


@pytest.mark.parametrize(
    "members,expires_at,ttl_s",
    [
        ({}, None, None),
        ({"expired_at": 0}, None, None),
        ({"expired_at": None, "ttl": None}, None, None),
        ({"ttl": 0}, None, None),
        ({"ttl": 300}, None, 300),
        ({"ttl": 300, "expired_at": -1}, None, 300),
        ({"ttl": 0, "expired_at": 1718684042}, 1718684042, None),
    ],
)
def test_lifetimes(members: dict[str, Any], expires_at: int | None, ttl_s: int | None) -> None:
    new = CACHING.parse_create(create(**members))
    assert (new.expires_at, new.ttl_s) == (expires_at, ttl_s)


def test_tags_are_taken_once() -> None:
    assert CACHING.parse_create(create(tags=["a", "b", "a"])).tags == ("a", "b")


def test_unset_and_empty_metadata_differ() -> None:
    assert CACHING.parse_create(create()).metadata is None
    assert CACHING.parse_create(create(metadata={})).metadata == ()
    assert CACHING.parse_update(b"{}") == ObjectUpdate()
    assert CACHING.parse_update(b'{"metadata":{}}') == ObjectUpdate(metadata=())


@pytest.mark.parametrize(
    "messages",
    [
        [call("1"), answer("1")],
        [call("1", "2"), answer("2"), answer("1")],
        [call("1"), answer("1"), call("1"), answer("1")],
        [call("1"), SYSTEM, answer("1")],
    ],
)
def test_answered_calls_may_be_cached(messages: list[Any]) -> None:
    assert len(CACHING.parse_create(create(messages=messages, tools=[TOOL])).messages) == len(messages)


@pytest.mark.parametrize(
    "messages,tools,param",
    [
        ([answer("1")], [TOOL], "messages[0].tool_call_id"),
        ([answer("1"), call("1")], [TOOL], "messages[0].tool_call_id"),
        ([call("1"), answer("1"), answer("1")], [TOOL], "messages[2].tool_call_id"),
        ([call("1"), answer("2")], [TOOL], "messages[1].tool_call_id"),
        ([call("1", "2"), answer("1")], [TOOL], "messages[0].tool_calls[1]"),
        ([call("1", "1"), answer("1")], [TOOL], "messages[0].tool_calls[1].id"),
        ([call("1"), answer("1")], [], "messages[0].tool_calls[0].function.name"),
    ],
)
def test_tool_message_rules(messages: list[Any], tools: list[Any], param: str) -> None:
    assert refused(create(messages=messages, tools=tools)).param == param


def test_update_takes_one_lifetime() -> None:
    assert CACHING.parse_update(b'{"ttl":60}') == ObjectUpdate(ttl_s=60)
    with pytest.raises(ApiError, match="exclude each other"):
        CACHING.parse_update(b'{"ttl":60,"expired_at":1718684042}')


@pytest.mark.parametrize("tag", ["a", "Z9", "moonshot_knowledge_0002", "a" * 128, "a.b-c_d"])
def test_tag_names(tag: str) -> None:
    assert CACHING.parse_tag(json.dumps({"tag": tag, "cache_id": "cache-a"}).encode()) == (tag, "cache-a")


@pytest.mark.parametrize("body", [{"tag": "1a"}, {"tag": "a b"}, {"tag": "é"}, {"tag": "a/b"}, {"cache_id": ""}])
def test_bad_tags(body: dict[str, str]) -> None:
    with pytest.raises(ApiError) as caught:
        CACHING.parse_tag(json.dumps({"tag": "a", "cache_id": "cache-a"} | body).encode())
    assert caught.value.param == next(iter(body))


def test_list_query() -> None:
    query = [("limit", "3"), ("limit", "4"), ("before", "b"), ("after", ""), ("metadata[a]", "1"), ("metadata[b]", "2")]
    assert CACHING.parse_list(query) == Page(limit=4, before="b", metadata=(("a", "1"), ("b", "2")))


@pytest.mark.parametrize(
    "key,value", [("limit", "0"), ("limit", "1001"), ("limit", "ten"), ("limit", "-1"), ("limit", "٣"), ("order", "")]
)
def test_bad_list_query(key: str, value: str) -> None:
    with pytest.raises(ApiError) as caught:
        CACHING.parse_list([(key, value)])
    assert caught.value.param == key


def stored(new: NewObject) -> CacheObject:
    return CacheObject(
        id="cache-a",
        tenant="acme",
        model=new.model,
        status=ObjectStatus.READY,
        created_at=1,
        expires_at=100,
        messages=new.messages,
        tools=new.tools,
        n_tokens=5,
        name=new.name,
        description=new.description,
        metadata=new.metadata,
    )


def test_what_is_echoed_parses_to_the_same_object() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "prompt_cache_breakpoint": {}}]
    parameters = {"z": {"type": "string"}, "a": {"type": "number", "maximum": 1.0}}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}
    user = {"role": "user", "name": "Ann", "content": parts}
    messages = [SYSTEM, user, call("1"), answer("1"), {"role": "assistant", "content": ""}]
    new = CACHING.parse_create(create(messages=messages, tools=[tool], metadata={"k": "v"}, name="n"))
    echoed = json.loads(CACHING.render_object(stored(new), now=50.0))
    body = {key: echoed[key] for key in ("model", "messages", "tools", "name", "description", "metadata")}
    assert CACHING.parse_create(json.dumps(body).encode()) == new


def test_expiry_is_told_by_the_clock() -> None:
    cached = stored(CACHING.parse_create(create()))
    assert json.loads(CACHING.render_object(cached, 99.9))["status"] == "ready"
    assert json.loads(CACHING.render_object(cached, 100.0))["status"] == "inactive"


def test_deletions() -> None:
    assert json.loads(CACHING.render_deleted("cache-a")) == {
        "deleted": True,
        "id": "cache-a",
        "object": "context_cache_object.deleted",
    }
    assert json.loads(CACHING.render_tag_deleted("t")) == {
        "deleted": True,
        "object": "cache_object.tag.deleted",
        "tag": "t",
    }
