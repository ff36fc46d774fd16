"""What Google's two SDKs send and read of cachedContents: the new one over its client, the old one's messages as JSON."""

import datetime as dt
import json
from typing import Any

import httpx2
from google.protobuf.json_format import MessageToJson, Parse
from msgspec.structs import replace

from keepwarm.core.cache_object import CacheObject, NewObject, ObjectStatus, ObjectUpdate, Walk
from keepwarm.core.request import FilePart, Message, TextPart, ToolChoice, ToolMode
from keepwarm.dialects.gemini_caching import GeminiCaching
from tests.gemini_sdks import genai, generativeai, glm, google_client
from tests.golden.transcripts import BOUNDS

CACHING = GeminiCaching(BOUNDS)
types = genai.types
AT = dt.datetime(2026, 9, 7, 1, 18, 17, 438678, tzinfo=dt.UTC)
STORED = CacheObject(
    id="a" * 40,
    tenant="t",
    model="m",
    status=ObjectStatus.READY,
    created_at=1_788_743_897,
    expires_at=1_788_743_898,
    messages=(),
    tools=(),
    n_tokens=7021,
    name="manual",
    early_ns=561_322_000,  # .438678
)
CACHED = NewObject(
    model="m",
    messages=(
        Message("system", (TextPart("be brief"),)),
        Message("user", (FilePart("abc", "contents[0].parts[0].fileData.fileUri"), TextPart("read it"))),
    ),
    name="manual",
    ttl_s=300,
    dialect="gemini",
)


def look(word: str) -> str:
    """Looks a word up"""
    return word


def test_the_new_sdk() -> None:
    sent: list[tuple[str, httpx2.Request]] = []
    answers = [
        CACHING.render_object(STORED),
        CACHING.render_list([STORED], has_more=True),
        CACHING.render_list([STORED], has_more=False),  # its pager takes no empty page behind another
        CACHING.render_list([], has_more=False),
        CACHING.render_object(STORED),
        CACHING.render_object(STORED),
        CACHING.render_deleted(),
    ]

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append((f"{request.method} {request.url.path}", request))
        return httpx2.Response(200, content=answers[len(sent) - 1], headers={"content-type": "application/json"})

    file = types.Part.from_uri(file_uri="http://127.0.0.1/v1beta/files/abc", mime_type="text/plain")
    config = types.CreateCachedContentConfig(
        contents=[file, "read it"],
        system_instruction="be brief",
        display_name="manual",
        ttl="300s",
        tools=[types.Tool(function_declarations=[types.FunctionDeclaration(name="look")])],
        tool_config=types.ToolConfig(function_calling_config=types.FunctionCallingConfig(mode="ANY")),
    )
    with google_client(answer) as client:
        made = client.caches.create(model="m", config=config)
        listed = list(client.caches.list(config=types.ListCachedContentsConfig(page_size=1)))
        assert list(client.caches.list()) == []
        client.caches.update(name=made.name, config=types.UpdateCachedContentConfig(ttl="7200s"))
        client.caches.update(name=made.name, config=types.UpdateCachedContentConfig(expire_time=AT))
        client.caches.delete(name=made.name)
    create, first, second, _empty, by_ttl, by_time, delete = (request for _, request in sent)

    new = CACHING.parse_create(create.content)
    assert [tool.name for tool in new.tools] == ["look"]
    assert new.tool_choice == ToolChoice(ToolMode.REQUIRED)
    assert replace(new, tools=(), tool_choice=ToolChoice()) == CACHED
    assert [call.rsplit("/", 2)[1:] for call, _ in sent][4:] == [["cachedContents", STORED.id]] * 3
    assert [call.split(" ")[0] for call, _ in sent] == ["POST", "GET", "GET", "GET", "PATCH", "PATCH", "DELETE"]
    assert delete.content == b""

    assert (made.name, made.model, made.display_name) == (f"cachedContents/{STORED.id}", "models/m", "manual")
    assert made.expire_time == AT
    assert made.usage_metadata is not None
    assert made.usage_metadata.total_token_count == 7021
    assert [one.name for one in listed] == [made.name] * 2
    assert CACHING.parse_list(first.url.params.multi_items()) == Walk(1)
    assert CACHING.parse_list(second.url.params.multi_items()) == Walk(1, (STORED.created_at, STORED.id))
    assert CACHING.parse_patch(by_ttl.url.params.multi_items(), by_ttl.content) == ObjectUpdate(ttl_s=7200)
    assert CACHING.parse_patch(by_time.url.params.multi_items(), by_time.content) == ObjectUpdate(
        expires_at=STORED.expires_at, early_ns=STORED.early_ns
    )


def old_body(message: Any) -> bytes:
    """As its REST transport sends a message."""
    return json.dumps(json.loads(MessageToJson(type(message).pb(message), use_integers_for_enums=True))).encode()


def test_the_old_sdk() -> None:
    caching = generativeai.caching.CachedContent
    file = generativeai.protos.FileData(file_uri="http://127.0.0.1/v1beta/files/abc", mime_type="text/plain")
    request = caching._prepare_create_request(
        model="m",
        display_name="manual",
        system_instruction="be brief",
        contents=[generativeai.protos.Part(file_data=file), "read it"],
        tools=[look],
        tool_config={"function_calling_config": {"mode": "none"}},
        ttl=dt.timedelta(minutes=5),
    )
    new = CACHING.parse_create(old_body(request.cached_content))
    assert [(tool.name, tool.description) for tool in new.tools] == [("look", "Looks a word up")]
    assert new.tool_choice == ToolChoice(ToolMode.NONE)
    assert replace(new, tools=(), tool_choice=ToolChoice()) == CACHED

    changed = glm.CachedContent(name=f"cachedContents/{STORED.id}", ttl=dt.timedelta(seconds=3.5))
    mask = [("updateMask", "ttl"), ("$alt", "json;enum-encoding=int")]
    assert CACHING.parse_patch(mask, old_body(changed)) == ObjectUpdate(ttl_s=4, early_ns=500_000_000)
    changed = glm.CachedContent(name=f"cachedContents/{STORED.id}", expire_time=AT)
    assert CACHING.parse_patch([("updateMask", "expireTime")], old_body(changed)) == ObjectUpdate(
        expires_at=STORED.expires_at, early_ns=STORED.early_ns
    )

    told = glm.CachedContent.from_json(CACHING.render_object(STORED), ignore_unknown_fields=False)
    assert (told.name, told.expire_time, told.usage_metadata.total_token_count) == (changed.name, AT, 7021)
    page = glm.ListCachedContentsResponse()
    Parse(CACHING.render_list([STORED], has_more=True), type(page).pb(page))
    assert CACHING.parse_list([("pageSize", "1"), ("pageToken", page.next_page_token)]).after == (
        STORED.created_at,
        STORED.id,
    )
    Parse(CACHING.render_list([], has_more=False), type(page).pb(page))
