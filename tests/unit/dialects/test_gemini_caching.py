"""Gemini's cachedContents: what may be cached, lifetimes to the nanosecond, what may be changed, pages."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.cache_object import CacheObject, NewObject, ObjectStatus, ObjectUpdate, Walk
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import FilePart, Message, TextPart, Tool, ToolChoice, ToolMode
from keepwarm.dialects.gemini_caching import GeminiCaching
from tests.golden.transcripts import BOUNDS

CACHING = GeminiCaching(BOUNDS)
CONTENT = {"role": "user", "parts": [{"text": "a long text"}]}
ID = "ez2yh6u6my9gnjvyigtxvnuf6e5qc79vgd7cc668"
CREATED_AT = 1_788_743_897  # 2026-09-07T01:18:17Z
STORED = CacheObject(
    id=ID,
    tenant="t",
    model="gemini-3.5-flash-lite",
    status=ObjectStatus.READY,
    created_at=CREATED_AT,
    expires_at=CREATED_AT + 3601,
    messages=(Message("user", (TextPart("secret"),)),),
    tools=(Tool("f", "secret", "{}"),),
    n_tokens=7021,
    dialect="gemini",
    early_ns=1_000_000_000 - 23_637_828,
)


def create(**members: Any) -> bytes:
    return json.dumps({"model": "models/m", "contents": [CONTENT]} | members).encode()


def refused(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        CACHING.parse_create(body)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    return caught.value


def patch(body: dict[str, Any], **query: str) -> ObjectUpdate:
    return CACHING.parse_patch(list(query.items()), json.dumps(body).encode())


def test_contents_instruction_and_tools_become_the_prefix_and_toolconfig_its_choice() -> None:
    declared = {"functionDeclarations": [{"name": "f", "description": "d", "parameters": {"type": "OBJECT"}}]}
    new = CACHING.parse_create(
        create(
            systemInstruction={"role": "user", "parts": [{"text": "be brief"}]},
            contents=[
                {"role": "user", "parts": [{"fileData": {"fileUri": "http://h/v1beta/files/abc"}}, {"text": "read"}]},
                {"role": "model", "parts": [{"text": "done"}]},
            ],
            tools=[declared],
            toolConfig={"functionCallingConfig": {"mode": "ANY"}},
            displayName="manual",
            ttl="300s",
        )
    )
    assert new == NewObject(
        model="m",
        messages=(
            Message("system", (TextPart("be brief"),)),
            Message("user", (FilePart("abc", "contents[0].parts[0].fileData.fileUri"), TextPart("read"))),
            Message("assistant", (TextPart("done"),)),
        ),
        tools=(Tool("f", "d", '{"type":"object"}'),),
        tool_choice=ToolChoice(ToolMode.REQUIRED),
        name="manual",
        ttl_s=300,
        dialect="gemini",
    )


def test_both_spellings_and_numbers_for_enums_are_read() -> None:
    declared = [{"function_declarations": [{"name": "f"}]}]
    snake = create(
        system_instruction={"parts": {"text": "s"}},
        tools=declared,
        tool_config={"function_calling_config": {"mode": 3}},
        display_name="d",
        expire_time="2026-09-07T01:18:17Z",
        contents=CONTENT,
    )
    camel = create(
        systemInstruction={"parts": [{"text": "s"}]},
        tools=[{"functionDeclarations": [{"name": "f"}]}],
        toolConfig={"functionCallingConfig": {"mode": "NONE"}},
        displayName="d",
        expireTime="2026-09-07T01:18:17Z",
    )
    assert CACHING.parse_create(snake) == CACHING.parse_create(camel)
    assert CACHING.parse_create(camel).tool_choice == ToolChoice(ToolMode.NONE)


@pytest.mark.parametrize(
    "members,expected",
    [
        ({}, (None, 3600, 0)),
        ({"ttl": "300s"}, (None, 300, 0)),
        ({"ttl": "3.5s"}, (None, 4, 500_000_000)),
        ({"ttl": "0.000000001s"}, (None, 1, 999_999_999)),
        ({"expireTime": "2026-09-07T02:18:17Z"}, (CREATED_AT + 3600, None, 0)),
        ({"expireTime": "2026-09-07T04:18:17.023637828+02:00"}, (CREATED_AT + 3601, None, 976_362_172)),
    ],
)
def test_lifetimes(members: dict[str, str], expected: tuple[int | None, int | None, int]) -> None:
    new = CACHING.parse_create(create(**members))
    assert (new.expires_at, new.ttl_s, new.early_ns) == expected


@pytest.mark.parametrize(
    "members,param",
    [
        ({"model": None}, "model"),
        ({"model": "models/"}, "model"),
        ({"contents": []}, "contents"),
        ({"contents": None}, "contents"),
        ({"contents": [{"role": "system", "parts": [{"text": "x"}]}]}, "contents[0].role"),
        ({"displayName": "d" * 129}, "displayName"),
        ({"displayName": 1}, "displayName"),
        ({"ttl": "300"}, "ttl"),
        ({"ttl": 300}, "ttl"),
        ({"ttl": "1.0000000001s"}, "ttl"),
        ({"expireTime": "tomorrow"}, "expireTime"),
        ({"ttl": "1s", "expireTime": "2026-09-07T02:18:17Z"}, "ttl"),
        ({"tools": [{"googleSearch": {}}]}, "tools[0].googleSearch"),
    ],
)
def test_wrong_members_are_named(members: dict[str, Any], param: str) -> None:
    assert refused(create(**members)).param == param


def test_an_instruction_alone_is_enough_and_128_characters_of_name() -> None:
    new = CACHING.parse_create(
        create(contents=None, systemInstruction={"parts": [{"text": "s"}]}, displayName="é" * 128)
    )
    assert [message.role for message in new.messages] == ["system"]


IN_TEN_MINUTES = ObjectUpdate(ttl_s=600)
AT_ONE_SECOND = ObjectUpdate(expires_at=CREATED_AT + 1)
ONE_SECOND = "2026-09-07T01:18:18Z"


@pytest.mark.parametrize(
    "body,query,expected",
    [
        ({"ttl": "600s"}, {}, IN_TEN_MINUTES),
        ({"ttl": "600s"}, {"updateMask": "ttl"}, IN_TEN_MINUTES),
        ({"name": "cachedContents/x", "ttl": "600s"}, {"updateMask": "ttl", "$alt": "json"}, IN_TEN_MINUTES),
        ({"expireTime": ONE_SECOND}, {}, AT_ONE_SECOND),
        ({"expireTime": ONE_SECOND}, {"updateMask": "expireTime"}, AT_ONE_SECOND),
        ({"expire_time": ONE_SECOND}, {"update_mask": "expire_time"}, AT_ONE_SECOND),
        ({"ttl": "1.5s", "expireTime": ONE_SECOND}, {"updateMask": "ttl"}, ObjectUpdate(ttl_s=2, early_ns=500_000_000)),
        ({"ttl": "1.5s", "expireTime": ONE_SECOND}, {"updateMask": "expireTime"}, AT_ONE_SECOND),
        ({"ttl": "600s"}, {"updateMask": "*"}, IN_TEN_MINUTES),
        ({"displayName": "x", "model": "models/m", "ttl": "600s"}, {}, IN_TEN_MINUTES),
        ({"contents": [CONTENT], "ttl": "600s"}, {"updateMask": "ttl"}, IN_TEN_MINUTES),
    ],
)
def test_only_the_expiry_is_changed(body: dict[str, Any], query: dict[str, str], expected: ObjectUpdate) -> None:
    assert patch(body, **query) == expected


@pytest.mark.parametrize(
    "body,query,param",
    [
        ({}, {}, "ttl"),
        ({"displayName": "new"}, {}, "ttl"),
        ({"displayName": "new"}, {"updateMask": "displayName"}, "updateMask"),
        ({"ttl": "5s"}, {"updateMask": "ttl,contents"}, "updateMask"),
        ({"ttl": "5s"}, {"updateMask": "expire_time"}, "expireTime"),
        ({"ttl": "5s", "expireTime": "2026-09-07T01:18:18Z"}, {}, "ttl"),
        ({"ttl": "5s", "contents": [CONTENT]}, {}, "contents"),
        ({"ttl": "5s", "tools": []}, {}, "tools"),
        ({"ttl": "-5"}, {}, "ttl"),
    ],
)
def test_anything_else_is_refused(body: dict[str, Any], query: dict[str, str], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        patch(body, **query)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, param)


def test_the_refusal_says_that_only_the_expiry_can_be_changed() -> None:
    with pytest.raises(ApiError, match="only the expiry of a CachedContent can be changed"):
        patch({"displayName": "new"}, updateMask="displayName")


def test_an_object_is_told_as_recorded_and_without_its_contents() -> None:
    told = CACHING.render_object(STORED)
    assert json.loads(told) == {
        "name": f"cachedContents/{ID}",
        "model": "models/gemini-3.5-flash-lite",
        "createTime": "2026-09-07T01:18:17Z",
        "updateTime": "2026-09-07T01:18:17Z",
        "expireTime": "2026-09-07T02:18:17.023637828Z",
        "displayName": "",
        "usageMetadata": {"totalTokenCount": 7021},
    }
    assert b"secret" not in told


def test_an_empty_list_is_an_empty_object() -> None:
    assert CACHING.render_list([], has_more=False) == b"{}"
    assert CACHING.render_deleted() == b"{}"


def test_the_token_of_a_page_leads_to_the_place_behind_it() -> None:
    told = json.loads(CACHING.render_list([STORED], has_more=True))
    assert [one["name"] for one in told["cachedContents"]] == [f"cachedContents/{ID}"]
    query = [("pageSize", "1"), ("pageToken", told["nextPageToken"])]
    assert CACHING.parse_list(query) == Walk(1, (CREATED_AT, ID))
    assert "nextPageToken" not in json.loads(CACHING.render_list([STORED], has_more=False))


@pytest.mark.parametrize(
    "query,limit",
    [([], 100), ([("pageSize", "0")], 100), ([("page_size", "7")], 7), ([("pageSize", "5000")], 1000)],
)
def test_page_sizes(query: list[tuple[str, str]], limit: int) -> None:
    assert CACHING.parse_list(query) == Walk(limit)


@pytest.mark.parametrize("size", ["-1", "ten", "1.5", "1" * 30])
def test_what_is_no_page_size(size: str) -> None:
    with pytest.raises(ApiError) as caught:
        CACHING.parse_list([("pageSize", size)])
    assert caught.value.param == "pageSize"


@given(st.text(min_size=1))
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(ApiError) as caught:
        CACHING.parse_list([("pageToken", token)])
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, "pageToken")
