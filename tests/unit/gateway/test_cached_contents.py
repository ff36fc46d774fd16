"""Gemini's cachedContents in the gateway: made before they are told, gone when their time is over, used by the next turn."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from keepwarm.core.cache_object import CacheObject, NewObject, ObjectStatus, ObjectUpdate, Page, Tag, Walk
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Event, Failed
from keepwarm.core.prompt import Plan
from keepwarm.core.request import (
    CacheUse,
    ChatRequest,
    DocumentPart,
    Message,
    Part,
    TextPart,
    Tool,
    ToolChoice,
    ToolMode,
)
from keepwarm.engine import EngineState
from keepwarm.gateway import warming
from keepwarm.gateway.auth import DevAuth
from keepwarm.gateway.caching import Caching
from keepwarm.gateway.phases import Phases
from tests.engines import says
from tests.world import CONFIG, DURABLE, World, developer, until, world

pytestmark = pytest.mark.anyio

TEXT = "x" * 1100  # tokens, in this model
QUESTION = Message("user", (TextPart("how?"),))
TOOL = Tool("look", "looks", '{"type":"object"}')
NOT_FOUND = r"^CachedContent not found \(or permission denied\)$"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as running:
        yield running


def caching(server: World) -> Caching:
    return server.running.turns._caching


async def tenant(key: str = "k1") -> str:
    return (await DevAuth().principal(f"Bearer {key}")).tenant


def content(*parts: Part, **members: Any) -> NewObject:
    messages = (Message("user", parts or (TextPart(TEXT),)),)
    lifetime = {} if "expires_at" in members else {"ttl_s": 300}
    return NewObject(**{"model": "small", "messages": messages, "dialect": "gemini", **lifetime, **members})


async def made(server: World, *parts: Part, key: str = "k1", **members: Any) -> CacheObject:
    return await caching(server).create_ready(developer(await tenant(key)), content(*parts, **members))


async def generate(server: World, cached: CacheObject, *, key: str = "k1", model: str = "small") -> Plan:
    """The plan of a turn that names a cachedContent. Raises ApiError when the turn fails."""
    request = ChatRequest(model, (QUESTION,), cache=CacheUse(object_id=cached.id, dialect="gemini"))
    turn_id = f"gen-{len(server.engine.plans)}"
    turns, owner = server.running.turns, await tenant(key)
    async with turns.open(turn_id, developer(owner), request, Phases(server.clock), dialect="gemini") as turn:
        while not turn.stream.is_read:
            await turn.stream.batch(None)
        if turn.stream.error is not None:
            raise turn.stream.error
    return next(plan for plan in server.engine.plans if plan.turn_id == turn_id)


async def everyones(server: World) -> list[CacheObject]:
    return await caching(server)._objects.everyones()


async def test_it_is_ready_when_it_is_told(server: World) -> None:
    cached = await made(server)
    assert cached.status is ObjectStatus.READY
    assert (len(cached.id), cached.id.isalnum(), cached.id.islower() or cached.id.isdigit()) == (40, True, True)
    assert server.engine.pins == {cached.id}
    assert [plan.prompt.n_tokens for plan in server.engine.plans] == [cached.n_tokens]
    assert await caching(server).get(await tenant(), cached.id, "gemini") == cached
    server.assert_clean()


async def test_with_a_disk_tier_it_is_ready_in_the_engine_that_keeps_its_lease(tmp_path: Path) -> None:
    async with world(tmp_path, config=DURABLE) as server:
        cached = await made(server)
        assert cached.status is ObjectStatus.READY
        assert server.engine.pins == {cached.id}


async def test_below_the_minimum_the_message_has_both_numbers(server: World) -> None:
    with pytest.raises(ApiError, match=r"^Cached content is too small\. total_token_count=\d+, min_") as caught:
        await made(server, TextPart("short"))
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    assert caught.value.message.endswith("min_total_token_count=1024")
    assert await everyones(server) == []


@pytest.mark.parametrize("configured,least", [(16, 16), (5000, 1024)])
async def test_the_minimum_is_configured_and_leaves_half_of_the_window(
    tmp_path: Path, configured: int, least: int
) -> None:
    config = replace(CONFIG, cache=replace(CONFIG.cache, object_tokens_min=configured))
    async with world(tmp_path, config=config) as server:
        with pytest.raises(ApiError, match=f"min_total_token_count={least}$"):
            await made(server, TextPart(""))
        await made(server)
        await server.ready_cache("Kimi has no minimum")


async def test_the_window_is_its_maximum_and_kimis_limit_is_not(tmp_path: Path) -> None:
    config = replace(CONFIG, cache=replace(CONFIG.cache, object_tokens_max=50))
    async with world(tmp_path, config=config) as server:
        await made(server)
        with pytest.raises(ApiError, match="the model's window of 2048") as caught:
            await made(server, TextPart("x" * 2100))
        assert caught.value.kind is ErrorKind.PROMPT_TOO_LONG


async def test_a_failed_computation_is_the_calls_error_and_leaves_nothing(server: World) -> None:
    server.engine.script = lambda plan: [Failed(ErrorKind.OVERLOADED, "no room to keep this cache", retry_after_s=3)]
    with pytest.raises(ApiError, match="no room to keep this cache") as caught:
        await made(server)
    assert (caught.value.kind, caught.value.retry_after_s) == (ErrorKind.OVERLOADED, 3)
    assert await everyones(server) == []
    assert server.engine.pins == set()
    server.assert_clean()


async def test_one_that_takes_too_long_is_a_timeout_and_leaves_nothing(tmp_path: Path) -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, turn_s_max=0.2))
    async with world(tmp_path, config=config) as server:
        steps = asyncio.Semaphore(0)
        server.engine.gate = steps.acquire
        with pytest.raises(ApiError, match=r"within 0\.2 s") as caught:
            await made(server)
        assert caught.value.kind is ErrorKind.TIMEOUT
        assert await everyones(server) == []
        for _ in range(10):
            steps.release()
        await until(lambda: server.engine.is_clean)
        await server.running.warming.tick()
        assert server.engine.pins == set()
        assert server.running.turns.n_turns == 0


async def test_a_call_that_is_given_up_leaves_nothing(server: World) -> None:
    steps = asyncio.Semaphore(1)
    server.engine.gate = steps.acquire
    call = asyncio.create_task(made(server))
    await until(lambda: bool(server.engine.running))
    (obj,) = await everyones(server)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    assert server.engine.dropped == [obj.id]
    assert await everyones(server) == []
    assert server.running.turns.n_turns == 0
    for _ in range(10):
        steps.release()
    await until(lambda: server.engine.is_clean)
    await server.running.warming.tick()
    assert server.engine.pins == set()


async def test_deleted_while_it_is_made_it_is_not_found(server: World) -> None:
    steps = asyncio.Semaphore(1)
    server.engine.gate = steps.acquire
    call = asyncio.create_task(made(server))
    await until(lambda: bool(server.engine.running))
    (obj,) = await everyones(server)
    await caching(server).delete(obj.tenant, obj.id, "gemini")
    with pytest.raises(ApiError, match=NOT_FOUND):
        await call
    for _ in range(10):
        steps.release()


async def test_an_engine_lost_on_the_way_is_waited_for(server: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "RETRY_S", 0.0)
    lost = False

    def script(plan: Plan) -> list[Event]:
        nonlocal lost
        if plan.pin_id and not lost:
            lost = True
            server.engine.lose()
        return list(says("ok")(plan))

    server.engine.script = script
    assert (await made(server)).status is ObjectStatus.READY
    assert len(server.engine.plans) == 2


async def test_one_whose_engine_is_gone_by_its_end_is_not_ready(server: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "RETRY_S", 0.0)

    def script(plan: Plan) -> list[Event]:
        server.engine.script = says("ok")
        server.engine.go_down()
        return list(says("ok")(plan))

    server.engine.script = script
    call = asyncio.create_task(made(server))
    await asyncio.wait([call], timeout=0.2)
    assert not call.done()
    assert [obj.status for obj in await everyones(server)] == [ObjectStatus.PENDING]
    server.engine.come_up()
    cached = await call
    assert cached.status is ObjectStatus.READY
    assert server.engine.pins == {cached.id}
    assert len(server.engine.plans) == 2


async def test_it_is_made_in_no_engine_whose_coming_would_still_make_it_pending(
    server: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warming, "RETRY_S", 0.0)
    told: list[int] = []

    def script(plan: Plan) -> list[Event]:
        if plan.pin_id and not told:
            server.engine.lose()
            told.extend(server.engine._epochs)
            server.engine._epochs.clear()
        return list(says("ok")(plan))

    server.engine.script = script
    call = asyncio.create_task(made(server))
    await until(lambda: bool(told))
    await asyncio.wait([call], timeout=0.2)
    assert not call.done(), "the new engine's leases were not yet compared with the database"
    assert len(server.engine.plans) == 1
    for epoch in told:
        server.engine._tell(epoch)
    cached = await call
    assert cached.status is ObjectStatus.READY
    assert await caching(server).get(cached.tenant, cached.id, "gemini") == cached
    assert len(server.engine.plans) == 2


async def test_an_engine_that_is_not_there_is_told_at_once(server: World) -> None:
    server.engine.state = EngineState.DOWN
    with pytest.raises(ApiError) as caught:
        await made(server)
    assert caught.value.kind is ErrorKind.ENGINE_DOWN
    assert await everyones(server) == []


async def test_a_lifetime_shorter_than_its_making_is_told_as_it_is(server: World) -> None:
    def script(plan: Plan) -> list[Event]:
        server.clock.advance(5)
        return list(says("ok")(plan))

    server.engine.script = script
    cached = await made(server, ttl_s=3)
    with pytest.raises(ApiError, match=NOT_FOUND):
        await caching(server).get(await tenant(), cached.id, "gemini")


async def test_one_whose_time_is_over_before_its_turn_comes_is_not_waited_for(server: World) -> None:
    steps = asyncio.Semaphore(1)
    server.engine.gate = steps.acquire
    first = asyncio.create_task(made(server))
    await until(lambda: bool(server.engine.running))
    second = asyncio.create_task(made(server, TextPart(f"2{TEXT}"), ttl_s=3))
    await until(lambda: server.running.turns.n_turns == 2)
    while len(await everyones(server)) < 2:
        pass
    server.clock.advance(5)
    server.engine.gate = None
    for _ in range(10):
        steps.release()
    assert (await first).status is ObjectStatus.READY
    assert (await second).is_over(server.clock.now())
    assert len(server.engine.plans) == 1


async def test_making_one_holds_a_place_as_a_turn_does(server: World) -> None:
    steps = asyncio.Semaphore(0)
    server.engine.gate = steps.acquire
    calls = [asyncio.create_task(made(server, TextPart(f"{n}{TEXT}"))) for n in range(6)]
    await until(lambda: server.running.turns.n_turns == 6)
    with pytest.raises(ApiError) as caught:
        await made(server)
    assert caught.value.kind is ErrorKind.OVERLOADED
    server.engine.gate = None
    for _ in range(20):
        steps.release()
    assert len({(await call).id for call in calls}) == 6
    pins = [plan.pin_id or "" for plan in server.engine.plans]
    assert pins == sorted(pins), "in the order of asking: ids count up here"
    server.assert_clean()


async def test_a_document_becomes_text_once_when_it_is_made(server: World) -> None:
    document = DocumentPart("text/plain", TEXT.encode(), "contents[0].parts[0].inlineData", title="manual")
    cached = await made(server, document)
    assert all(isinstance(part, TextPart) for message in cached.messages for part in message.parts)
    assert TEXT in cached.messages[0].text


async def test_expiry_by_the_clock_on_every_call_and_nothing_is_kept(server: World) -> None:
    owner, cached = await tenant(), await made(server, ttl_s=10, early_ns=500_000_000)
    server.clock.advance(9.4)
    assert await caching(server).walk(owner, Walk(10)) != []
    await generate(server, cached)
    server.clock.advance(0.1)
    assert await caching(server).walk(owner, Walk(10)) == []
    for call in (
        caching(server).get(owner, cached.id, "gemini"),
        caching(server).extend(developer(owner), cached.id, ObjectUpdate(ttl_s=60)),
        caching(server).delete(owner, cached.id, "gemini"),
        generate(server, cached),
    ):
        with pytest.raises(ApiError, match=NOT_FOUND) as caught:
            await call
        assert caught.value.kind is ErrorKind.UNKNOWN_CACHE
    server.clock.advance(1)
    await server.running.warming.tick()
    assert await everyones(server) == []
    assert server.engine.pins == set()


async def test_a_longer_life_is_given_without_computing(server: World) -> None:
    owner, cached = await tenant(), await made(server, ttl_s=10)
    server.clock.advance(5)
    n_plans, now = len(server.engine.plans), int(server.clock.now())
    renewed = await caching(server).extend(developer(owner), cached.id, ObjectUpdate(ttl_s=7200))
    assert renewed == replace(cached, expires_at=now + 7200, updated_at=now)
    server.clock.advance(3600)
    assert await caching(server).get(owner, cached.id, "gemini") == renewed
    exact = ObjectUpdate(expires_at=now + 5000, early_ns=1)
    assert await caching(server).extend(developer(owner), cached.id, exact) == replace(
        cached, expires_at=now + 5000, early_ns=1, updated_at=now + 3600
    )
    assert len(server.engine.plans) == n_plans
    with pytest.raises(ApiError, match="expire_time must be in the future"):
        await caching(server).extend(developer(owner), cached.id, ObjectUpdate(expires_at=now))


async def test_one_whose_state_could_not_be_made_again_is_served_and_made_anew_by_a_new_lifetime(
    server: World,
) -> None:
    owner, cached = await tenant(), await made(server)
    server.engine.script = lambda plan: [Failed(ErrorKind.OVERLOADED, "no room")] if plan.pin_id else says("ok")(plan)
    server.engine.lose()
    while (await caching(server).get(owner, cached.id, "gemini")).status is not ObjectStatus.ERROR:
        pass
    assert (await generate(server, cached)).prompt.n_tokens > cached.n_tokens
    server.engine.script = says("ok")
    await caching(server).extend(developer(owner), cached.id, ObjectUpdate(ttl_s=60))
    await until(lambda: cached.id in server.engine.pins)


async def test_a_turn_has_the_contents_the_tools_and_the_choice_before_its_own(server: World) -> None:
    cached = await made(server, tools=(TOOL,), tool_choice=ToolChoice(ToolMode.NONE))
    plan = await generate(server, cached)
    assert plan.prompt.marks == (cached.n_tokens,)
    assert plan.prompt.tokens[: cached.n_tokens].tolist() == server.engine.plans[0].prompt.tokens.tolist()
    assert plan.output.tool_format is None, "NONE: the answer is not read for calls"
    plain = await made(server, tools=(TOOL,))
    assert (await generate(server, plain)).output.tool_format is not None


async def test_a_forced_call_of_the_object_forces_the_turn(server: World) -> None:
    """There are no grammars in this world, so that forcing a call is refused, by the name of what it needs."""
    cached = await made(server, tools=(TOOL,), tool_choice=ToolChoice(ToolMode.REQUIRED))
    with pytest.raises(ApiError, match="no grammars in this test"):
        await generate(server, cached)


async def test_another_name_of_the_same_model_is_refused(server: World) -> None:
    cached = await made(server)
    message = (
        "Model used by GenerateContent request (models/other) and CachedContent (models/small) has to be the same."
    )
    with pytest.raises(ApiError) as caught:
        await generate(server, cached, model="other")
    assert (caught.value.kind, caught.value.message) == (ErrorKind.INVALID_REQUEST, message)


async def test_neither_another_tenant_nor_kimis_api_sees_it_and_it_sees_nothing_of_theirs(server: World) -> None:
    gemini, kimi = await made(server), await server.ready_cache("a long text", tags=["manual"])
    owner, api = await tenant(), caching(server)
    for method, path, body in (
        ("GET", f"/v1/caching/{gemini.id}", None),
        ("PUT", f"/v1/caching/{gemini.id}", {"ttl": 5}),
        ("DELETE", f"/v1/caching/{gemini.id}", None),
        ("POST", "/v1/caching/refs/tags", {"tag": "mine", "cache_id": gemini.id}),
    ):
        assert (await server.request(method, path, body)).status == 404, (method, path)
    listed = (await server.request("GET", "/v1/caching")).json()["data"]
    assert [obj["id"] for obj in listed] == [kimi["id"]]
    asked = {"messages": [{"role": "cache", "content": f"cache_id={gemini.id}"}, {"role": "user", "content": "how?"}]}
    assert (await server.request("POST", "/v1/chat/completions", {"model": "small", **asked})).status == 404

    assert [obj.id for obj in await api.walk(owner, Walk(10))] == [gemini.id]
    assert await api.walk(await tenant("k2"), Walk(10)) == []
    for object_id, who in ((kimi["id"], owner), (gemini.id, await tenant("k2"))):
        for call in (
            api.get(who, object_id, "gemini"),
            api.extend(developer(who), object_id, ObjectUpdate(ttl_s=5)),
            api.delete(who, object_id, "gemini"),
        ):
            with pytest.raises(ApiError, match=NOT_FOUND):
                await call
    with pytest.raises(ApiError, match=NOT_FOUND):
        await generate(server, gemini, key="k2")
    assert await api.get(owner, gemini.id, "gemini") == gemini
    assert await server.cache(kimi["id"]) == kimi


async def test_kimi_reads_what_gemini_has_made(server: World) -> None:
    """Across the dialects the prompt is the same, and so are its first tokens, which is what the store goes by."""
    cached = await made(server)
    messages = [{"role": "user", "content": TEXT}, {"role": "user", "content": "how?"}]
    await server.request("POST", "/v1/chat/completions", {"model": "small", "messages": messages})
    kimi, gemini = server.engine.plans[-1], await generate(server, cached)
    assert kimi.prompt.tokens.tolist() == gemini.prompt.tokens.tolist()
    assert kimi.prompt.tenant == gemini.prompt.tenant == server.engine.plans[0].prompt.tenant


async def test_a_list_goes_on_though_what_it_gave_is_deleted(server: World) -> None:
    owner, api = await tenant(), caching(server)
    ids = []
    for number in range(5):
        ids.append((await made(server, TextPart(f"{number}{TEXT}"))).id)
        server.clock.advance(1)
    seen, after = [], None
    while page := await api.walk(owner, Walk(2, after)):
        assert not any(obj.messages or obj.tools for obj in page)
        after = (page[-1].created_at, page[-1].id)
        for obj in page:
            seen.append(obj.id)
            await api.delete(owner, obj.id, "gemini")
    assert seen == ids[::-1]
    assert server.engine.pins == set()


async def test_its_quota_is_the_tenants_quota(tmp_path: Path) -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, objects_per_tenant_max=1))
    async with world(tmp_path, config=config) as server:
        cached = await made(server)
        with pytest.raises(ApiError) as caught:
            await made(server)
        assert caught.value.kind is ErrorKind.QUOTA_EXCEEDED
        await caching(server).delete(await tenant(), cached.id, "gemini")
        await made(server)


async def test_it_survives_a_restart_of_everything(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        cached = await made(server, tools=(TOOL,), tool_choice=ToolChoice(ToolMode.NONE), name="manual", early_ns=7)
    async with world(tmp_path) as server:
        await until(lambda: cached.id in server.engine.pins)
        found = await caching(server).get(cached.tenant, cached.id, "gemini")
        assert replace(found, status=cached.status, generation=cached.generation) == cached
        assert (await generate(server, found)).prompt.marks == (cached.n_tokens,)


async def test_objects_of_kimi_list_as_before(server: World) -> None:
    owner = await tenant()
    await made(server)
    with pytest.raises(ApiError, match="there is no"):
        await caching(server).list(owner, Page(after=(await everyones(server))[0].id))
    with pytest.raises(ApiError):
        await caching(server)._objects.bind(Tag("t", owner, (await everyones(server))[0].id, 0), "kimi")


async def test_the_whole_story_over_http(server: World) -> None:
    key = {"x-goog-api-key": "k1"}

    async def call(method: str, path: str, body: object = None) -> tuple[int, Any]:
        answer = await server.request(method, f"/v1beta/{path}", body, key=None, headers=key)
        return answer.status, answer.json()

    contents = [{"role": "user", "parts": [{"text": TEXT}]}]
    assert await call("GET", "cachedContents") == (200, {})
    status, cached = await call("POST", "cachedContents", {"model": "models/small", "contents": contents})
    name, now = cached["name"], int(server.clock.now())
    assert (status, cached) == (
        200,
        {
            "name": name,
            "model": "models/small",
            "createTime": "2023-11-14T22:13:20Z",
            "updateTime": "2023-11-14T22:13:20Z",
            "expireTime": "2023-11-14T23:13:20Z",
            "displayName": "",
            "usageMetadata": {"totalTokenCount": server.engine.plans[0].prompt.n_tokens},
        },
    )
    assert await call("GET", name) == (200, cached)
    assert await call("GET", "cachedContents?pageSize=1") == (200, {"cachedContents": [cached]})
    n_cached = cached["usageMetadata"]["totalTokenCount"]
    server.engine.script = says("ok", cache_read=n_cached)
    ask = {"contents": [{"role": "user", "parts": [{"text": "how?"}]}], "cachedContent": name}
    status, answer = await call("POST", "models/small:generateContent", ask)
    assert (status, answer["usageMetadata"]["cachedContentTokenCount"]) == (200, n_cached)
    assert answer["usageMetadata"]["promptTokenCount"] == server.engine.plans[-1].prompt.n_tokens
    status, counted = await call("POST", "models/small:countTokens", {"generateContentRequest": ask})
    assert (status, counted["cachedContentTokenCount"]) == (200, n_cached)

    server.clock.advance(60)
    status, longer = await call("PATCH", f"{name}?updateMask=ttl", {"name": name, "ttl": "7200s"})
    times = {"updateTime": "2023-11-14T22:14:20Z", "expireTime": "2023-11-15T00:14:20Z"}
    assert (status, longer) == (200, cached | times)
    server.clock.advance(now + 60 + 7200 - server.clock.now())
    gone = {"code": 403, "message": "CachedContent not found (or permission denied)", "status": "PERMISSION_DENIED"}
    for method, path, body in (
        ("GET", name, None),
        ("PATCH", name, {"ttl": "60s"}),
        ("DELETE", name, None),
        ("POST", "models/small:generateContent", ask),
        ("POST", "models/small:streamGenerateContent?alt=sse", ask),
        ("POST", "models/small:countTokens", {"generateContentRequest": ask}),
    ):
        assert await call(method, path, body) == (403, {"error": gone}), (method, path)

    status, second = await call(
        "POST", "cachedContents", {"model": "models/small", "contents": contents, "ttl": "3.5s"}
    )
    assert await call("DELETE", second["name"]) == (200, {})
    assert (await call("DELETE", second["name"]))[0] == 403
    status, refused = await call(
        "POST", "cachedContents", {"model": "models/small", "contents": [{"parts": [{"text": "a"}]}]}
    )
    assert status == 400
    assert refused["error"]["message"].startswith("Cached content is too small. total_token_count=")


BODY = {"model": "models/small", "contents": [{"role": "user", "parts": [{"text": "x" * 1100}]}]}


async def test_a_client_that_leaves_while_it_is_made_leaves_nothing(server: World) -> None:
    steps = asyncio.Semaphore(1)
    server.engine.gate = steps.acquire
    call = server.call("POST", "/v1beta/cachedContents", BODY, key=None, headers={"x-goog-api-key": "k1"})
    await until(lambda: bool(server.engine.running))
    call.disconnect()
    await call.task
    assert await everyones(server) == []
    assert server.running.turns.n_turns == 0
    for _ in range(10):
        steps.release()
    await until(lambda: server.engine.is_clean)
    await server.running.warming.tick()
    assert server.engine.pins == set()


@pytest.mark.parametrize("n_steps", range(0, 40, 3))
async def test_whenever_a_client_leaves_there_is_an_object_if_it_was_told_so(server: World, n_steps: int) -> None:
    call = server.call("POST", "/v1beta/cachedContents", BODY, key=None, headers={"x-goog-api-key": "k1"})
    for step in range(n_steps):
        await asyncio.sleep(0.0003 if step % 3 == 0 else 0)  # the database's thread needs time, too
    call.disconnect()
    answer = await call.answer()
    await until(lambda: server.engine.is_clean)
    await server.running.warming.tick()
    left = await everyones(server)
    assert len(left) == (answer.status == 200)
    assert server.engine.pins == {obj.id for obj in left}
