"""Cache objects through the API, over a real database and an engine that is steered."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from keepwarm.core.errors import ErrorKind
from keepwarm.core.event import Event, Failed
from keepwarm.core.prompt import Plan
from keepwarm.engine import EngineState
from keepwarm.gateway import warming
from tests.engines import says
from tests.world import CONFIG, World, until, world

pytestmark = pytest.mark.anyio

KNOWLEDGE = "a long text"
QUESTION = {"role": "user", "content": "how?"}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as running:
        yield running


def by_role(cache: Any, options: str = "") -> dict[str, Any]:
    return {"messages": [{"role": "cache", "content": f"cache_id={cache['id']}{options}"}, QUESTION]}


def by_header(cache: Any, *, text: str = KNOWLEDGE, **headers: str) -> dict[str, Any]:
    fields = {"x-msh-context-cache": cache["id"]} | {name.replace("_", "-"): value for name, value in headers.items()}
    return {"messages": [{"role": "system", "content": text}, QUESTION], "headers": fields}


async def ask(server: World, question: dict[str, Any], **fields: Any) -> Any:
    question = dict(question)
    options = {"headers": question.pop("headers")} if "headers" in question else {}
    if "key" in fields:
        options["key"] = fields.pop("key")
    return await server.request("POST", "/v1/chat/completions", {"model": "small", **question, **fields}, **options)


def turn_plans(server: World) -> list[Plan]:
    return [plan for plan in server.engine.plans if plan.turn_id.startswith("chatcmpl-")]


async def test_an_object_is_durable_before_it_is_acknowledged_and_ready_after_it_is_computed(server: World) -> None:
    created = await server.create_cache(KNOWLEDGE, ttl=300, tags=["manual"], metadata={"a": "b"})
    assert created["status"] == "pending"
    assert created["expired_at"] == int(server.clock.now()) + 300
    ready = await server.settled(created["id"])
    assert ready["status"] == "ready"
    assert ready["tokens"] == created["tokens"] == server.engine.plans[0].prompt.n_tokens
    assert server.engine.pins == {created["id"]}
    assert server.engine.plans[0].output.max_tokens == 0
    server.assert_clean()


async def test_both_forms_use_the_same_prefix_and_say_so(server: World) -> None:
    cache = await server.ready_cache(KNOWLEDGE)
    server.engine.script = says("ok", cache_read=cache["tokens"])
    role, header = await ask(server, by_role(cache)), await ask(server, by_header(cache))
    one, two = turn_plans(server)
    assert one.prompt.tokens.tolist() == two.prompt.tokens.tolist()
    assert one.prompt.marks == two.prompt.marks == (cache["tokens"],)
    for answer in (role, header):
        assert answer.headers["msh-context-cache-id"] == cache["id"]
        assert answer.headers["msh-context-cache-token-saved"] == str(cache["tokens"])
        assert answer.headers["msh-context-cache-token-exp"] == str(cache["expired_at"])
        assert answer.headers["msh-context-cache-token-ttl"] == "3600"
        assert answer.json()["usage"]["cached_tokens"] == cache["tokens"]


async def test_a_tag_names_the_object_it_was_last_bound_to(server: World) -> None:
    first = await server.ready_cache("first text", tags=["manual"])
    second = await server.ready_cache("second text")
    by_tag = {"messages": [{"role": "cache", "content": "tag=manual"}, QUESTION]}
    server.engine.script = says("ok", cache_read=1)
    assert (await ask(server, by_tag)).headers["msh-context-cache-id"] == first["id"]
    bound = await server.request("POST", "/v1/caching/refs/tags", {"tag": "manual", "cache_id": second["id"]})
    assert bound.json()["cache_id"] == second["id"]
    assert (await ask(server, by_tag)).headers["msh-context-cache-id"] == second["id"]
    content = await server.request("GET", "/v1/caching/refs/tags/manual/content")
    assert content.json()["id"] == second["id"]
    assert (await server.request("GET", "/v1/caching/refs/tags/manual")).json()["cache_id"] == second["id"]
    assert [tag["tag"] for tag in (await server.request("GET", "/v1/caching/refs/tags")).json()["data"]] == ["manual"]
    for _ in range(2):
        assert (await server.request("DELETE", "/v1/caching/refs/tags/manual")).json()["deleted"] is True
    assert (await ask(server, by_tag)).status == 404


async def test_another_tenants_object_is_not_found_on_every_route(server: World) -> None:
    cache = await server.ready_cache(KNOWLEDGE, tags=["manual"])
    object_id = cache["id"]
    server.engine.script = says("ok", cache_read=5)
    others = [
        await server.request("GET", f"/v1/caching/{object_id}", key="k2"),
        await server.request("PUT", f"/v1/caching/{object_id}", {"ttl": 5}, key="k2"),
        await server.request("DELETE", f"/v1/caching/{object_id}", key="k2"),
        await server.request("POST", "/v1/caching/refs/tags", {"tag": "mine", "cache_id": object_id}, key="k2"),
        await server.request("GET", "/v1/caching/refs/tags/manual", key="k2"),
        await server.request("GET", "/v1/caching/refs/tags/manual/content", key="k2"),
        await ask(server, by_role(cache), key="k2"),
    ]
    assert [(answer.status, answer.json()["error"]["type"]) for answer in others] == [
        (404, "resource_not_found_error")
    ] * len(others)
    assert (await server.request("GET", "/v1/caching", key="k2")).json()["data"] == []
    header = await ask(server, by_header(cache), key="k2")
    assert header.status == 200
    assert "msh-context-cache-id" not in header.headers
    own = await ask(server, by_header(cache))
    assert own.headers["msh-context-cache-id"] == object_id
    tenants = {plan.prompt.tenant for plan in turn_plans(server)}
    assert len(tenants) == 2
    assert await server.cache(object_id) == cache


async def test_lists_page_and_tell_whether_there_are_more(server: World) -> None:
    ids = []
    for number in range(4):
        ids.append((await server.create_cache(f"text {number}", metadata={"n": str(number)}))["id"])
        server.clock.advance(1)

    async def listed(query: str) -> tuple[list[str], bool]:
        body = (await server.request("GET", f"/v1/caching?{query}")).json()
        return [obj["id"] for obj in body["data"]], body["has_more"]

    assert await listed("limit=2&order=asc") == (ids[:2], True)
    assert await listed(f"limit=2&order=asc&after={ids[1]}") == (ids[2:], False)
    assert await listed(f"limit=2&order=asc&before={ids[3]}") == (ids[1:3], True)
    assert await listed("limit=4") == (ids[::-1], False)
    assert await listed("metadata%5Bn%5D=2") == ([ids[2]], False)
    answer = await server.request("GET", "/v1/caching?after=cache-unknown")
    assert answer.status == 400


async def test_expiry_is_decided_at_look_up_and_the_tick_gives_the_pin_back(server: World) -> None:
    cache = await server.ready_cache(KNOWLEDGE, ttl=10)
    server.clock.advance(10)
    assert (await server.cache(cache["id"]))["status"] == "inactive"
    answer = await ask(server, by_role(cache))
    assert answer.status == 404
    assert "expired at" in answer.json()["error"]["message"]
    assert (await ask(server, by_header(cache))).status == 200
    assert server.engine.pins == {cache["id"]}
    await server.running.warming.tick()
    assert server.engine.pins == set()


async def test_reset_ttl_after_success_counts_from_now_and_computes_again(server: World) -> None:
    cache = await server.ready_cache(KNOWLEDGE, ttl=10)
    server.engine.script = says("ok", cache_read=cache["tokens"])
    server.clock.advance(5)
    answer = await ask(server, by_role(cache, ";reset_ttl=100"))
    assert answer.headers["msh-context-cache-token-ttl"] == "100"
    told = await server.settled(cache["id"])
    assert (told["status"], told["expired_at"]) == ("ready", int(server.clock.now()) + 100)
    assert server.engine.pins == {cache["id"]}


async def test_reset_ttl_brings_an_expired_object_back_by_an_ordinary_call(server: World) -> None:
    cache = await server.ready_cache(KNOWLEDGE, ttl=10)
    server.clock.advance(11)
    await server.running.warming.tick()
    answer = await ask(server, by_header(cache, x_msh_context_cache_reset_ttl="60"))
    assert answer.status == 200
    assert "msh-context-cache-id" not in answer.headers
    assert (await server.settled(cache["id"]))["status"] == "ready"
    assert server.engine.pins == {cache["id"]}


async def test_a_failed_call_leaves_the_lifetime_alone(server: World) -> None:
    cache = await server.ready_cache(KNOWLEDGE, ttl=10)
    server.engine.script = lambda plan: [Failed(ErrorKind.ENGINE_DOWN, "gone")]
    assert (await ask(server, by_role(cache, ";reset_ttl=100"))).status == 503
    assert await server.cache(cache["id"]) == cache


async def test_a_dry_run_runs_nothing_and_tells_what_would_be_saved(server: World) -> None:
    cache = await server.ready_cache(KNOWLEDGE)
    n_plans = len(server.engine.plans)
    answers = [
        await ask(server, by_role(cache, ";reset_ttl=100;dry_run=1")),
        await ask(server, by_header(cache, x_msh_context_cache_dryrun="1")),
    ]
    for answer in answers:
        assert answer.text == ""
        usage = answer.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["cached_tokens"]) == (0, 0, 0)
        assert answer.headers["msh-context-cache-token-saved"] == str(cache["tokens"])
    miss = await ask(server, by_header(cache, text="another", x_msh_context_cache_dryrun="1"))
    assert miss.text == ""
    assert "msh-context-cache-id" not in miss.headers
    assert len(server.engine.plans) == n_plans
    assert await server.cache(cache["id"]) == cache


async def test_tools_beside_a_cache_message_are_refused(server: World) -> None:
    cache = await server.ready_cache(KNOWLEDGE)
    answer = await ask(server, by_role(cache), tools=[])
    assert (answer.status, answer.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize("options", [";reset_ttl=0", ";reset_ttl=86401", ";ttl=1", ";dry_run=yes"])
async def test_wrong_options_are_refused_before_anything_runs(server: World, options: str) -> None:
    cache = await server.ready_cache(KNOWLEDGE)
    assert (await ask(server, by_role(cache, options))).status == 400
    assert turn_plans(server) == []


async def test_pending_and_failed_objects_are_served_by_ordinary_prefill(server: World) -> None:
    server.engine.script = lambda plan: (
        [Failed(ErrorKind.OVERLOADED, "no room to keep this cache")] if plan.pin_id else says("ok")(plan)
    )
    cache = await server.ready_cache(KNOWLEDGE)
    assert (cache["status"], cache["error"]["message"]) == ("error", "no room to keep this cache")
    answer = await ask(server, by_role(cache))
    assert answer.status == 200
    assert "msh-context-cache-id" not in answer.headers
    updated = await server.request("PUT", f"/v1/caching/{cache['id']}", {"ttl": 60})
    assert updated.json()["status"] == "pending"


@pytest.mark.parametrize("status", ["pending", "error", "inactive"])
async def test_an_object_that_was_not_ready_saved_nothing_though_its_prefix_was_read(
    server: World, status: str
) -> None:
    if status == "error":
        server.engine.script = lambda plan: [Failed(ErrorKind.OVERLOADED, "no room")]
        cache = await server.ready_cache(KNOWLEDGE)
    elif status == "inactive":
        cache = await server.ready_cache(KNOWLEDGE, ttl=10)
        server.clock.advance(10)
    else:
        server.running.warming._adopted_epoch = 0  # it computes nothing before it has seen this engine's leases
        cache = await server.create_cache(KNOWLEDGE)
    assert cache["status"] == ("ready" if status == "inactive" else status)
    server.engine.script = says("ok", cache_read=cache["tokens"])
    answer = await ask(server, by_header(cache, x_msh_context_cache_reset_ttl="60"))
    assert answer.json()["usage"]["cached_tokens"] == cache["tokens"]
    assert not [name for name in answer.headers if name.startswith("msh-context-cache")]


async def test_deleting_gives_the_pin_back_at_once(server: World) -> None:
    cache = await server.ready_cache(KNOWLEDGE, tags=["manual"])
    deleted = await server.request("DELETE", f"/v1/caching/{cache['id']}")
    assert deleted.json() == {"deleted": True, "id": cache["id"], "object": "context_cache_object.deleted"}
    assert server.engine.pins == set()
    assert (await server.request("DELETE", f"/v1/caching/{cache['id']}")).status == 404
    assert (await server.request("GET", "/v1/caching/refs/tags/manual")).status == 404


async def test_an_object_deleted_behind_our_back_loses_its_pin_at_the_next_tick(server: World) -> None:
    cache = await server.ready_cache(KNOWLEDGE)
    objects = server.running.warming._objects  # another process has its own
    found = await objects.find(cache["id"])
    assert found is not None
    await objects.delete(found.tenant, found.id)
    await server.running.warming.tick()
    assert server.engine.pins == set()


async def test_deleted_while_it_is_computed_it_is_not_kept(server: World) -> None:
    steps = asyncio.Semaphore(2)
    server.engine.gate = steps.acquire
    created = await server.create_cache(KNOWLEDGE)
    await until(lambda: bool(server.engine.running))
    await server.request("DELETE", f"/v1/caching/{created['id']}")
    for _ in range(10):
        steps.release()
    await until(lambda: not server.engine.running)
    await server.running.warming.tick()
    assert server.engine.pins == set()


async def test_a_new_engine_gets_all_ready_objects_again_the_most_recently_used_first(server: World) -> None:
    caches = []
    for number in range(3):
        caches.append(await server.ready_cache(f"text {number}"))
        server.clock.advance(1)
    await ask(server, by_role(caches[1]))
    server.engine.plans.clear()
    server.engine.lose()
    for cache in (caches[0], caches[2], caches[1]):
        await until(lambda object_id=cache["id"]: object_id in server.engine.pins)
        await server.settled(cache["id"])
    assert [plan.pin_id for plan in server.engine.plans] == [caches[1]["id"], caches[2]["id"], caches[0]["id"]]
    assert all([(await server.settled(cache["id"]))["status"] == "ready" for cache in caches])


async def test_after_a_restart_of_the_server_objects_are_pending_until_computed_again(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        cache = await server.ready_cache(KNOWLEDGE)
    async with world(tmp_path) as server:
        server.engine.state = EngineState.STARTING
        server.clock.advance(1)
        assert (await server.cache(cache["id"]))["status"] in ("pending", "ready")
        server.engine.state = EngineState.READY
        told = await server.settled(cache["id"])
        assert {**told, "status": "ready"} == cache


async def test_an_object_that_takes_the_engine_down_is_given_up(server: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "RETRY_S", 0.0)
    server.engine.script = lambda plan: [Failed(ErrorKind.ENGINE_DOWN, "the engine restarted during this request")]
    cache = await server.ready_cache(KNOWLEDGE)
    assert cache["status"] == "error"
    assert len(server.engine.plans) == warming.ATTEMPTS_MAX


async def test_while_the_engine_is_down_objects_wait(server: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "RETRY_S", 0.0)
    server.engine.state = EngineState.DOWN
    created = await server.create_cache(KNOWLEDGE)
    for _ in range(100):
        await asyncio.sleep(0)
    assert (await server.cache(created["id"]))["status"] == "pending"
    server.engine.state = EngineState.READY
    assert (await server.settled(created["id"]))["status"] == "ready"


async def test_an_object_must_leave_room_in_the_window(server: World) -> None:
    answer = await server.request("POST", "/v1/caching", {"model": "small", "messages": [message("x" * 2100)]})
    assert answer.status == 400
    assert "the model's window of 2048 leaves 2046" in answer.json()["error"]["message"]
    assert (await server.request("GET", "/v1/caching")).json()["data"] == []


def message(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"ttl": 86_401}, "between 1 and 86400 s"),
        ({"expired_at": 1_600_000_000}, "must be after now"),
        ({"ttl": 5, "expired_at": 1_700_000_005}, "exclude each other"),
    ],
)
async def test_lifetimes_out_of_bounds(server: World, fields: dict[str, int], words: str) -> None:
    answer = await server.request("POST", "/v1/caching", {"model": "small", "messages": [message("a")], **fields})
    assert answer.status == 400
    assert words in answer.json()["error"]["message"]


async def test_simultaneous_creates_cannot_pass_the_quota_together(tmp_path: Path) -> None:
    config = replace(CONFIG, cache=replace(CONFIG.cache, tenant_tokens_max=250))
    async with world(tmp_path, config=config) as server:
        body = {"model": "small", "messages": [message("x" * 90)]}  # some 110 tokens
        answers = await asyncio.gather(*(server.request("POST", "/v1/caching", body) for _ in range(4)))
        assert sorted(answer.status for answer in answers) == [200, 200, 429, 429]
        refused = next(answer for answer in answers if answer.status == 429)
        assert refused.json()["error"]["type"] == "exceeded_current_quota_error"
        assert refused.headers["x-should-retry"] == "false"
        assert (await server.request("POST", "/v1/caching", body, key="k2")).status == 200


async def test_a_tenants_leases_have_a_quota_in_bytes(tmp_path: Path) -> None:
    """The steered engine keeps 8 bytes a token."""
    config = replace(CONFIG, cache=replace(CONFIG.cache, tenant_lease_bytes_max=2000))
    async with world(tmp_path, config=config) as server:
        body = {"model": "small", "messages": [message("x" * 90)]}  # some 110 tokens
        answers = [await server.request("POST", "/v1/caching", body) for _ in range(3)]
        n_bytes = 8 * answers[0].json()["tokens"]
        n_held = 2000 // n_bytes
        assert [answer.status for answer in answers] == [200] * n_held + [429] * (3 - n_held)
        error = answers[-1].json()["error"]
        assert error["type"] == "exceeded_current_quota_error"
        assert (
            f"needs {n_bytes:,} bytes and your live caches hold {n_held * n_bytes:,}, limit 2,000" in error["message"]
        )
        assert (await server.request("POST", "/v1/caching", body, key="k2")).status == 200
        await server.request("DELETE", f"/v1/caching/{answers[0].json()['id']}")
        assert (await server.request("POST", "/v1/caching", body)).status == 200


async def test_expired_objects_do_not_count_until_they_are_brought_back(tmp_path: Path) -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, objects_per_tenant_max=1))
    async with world(tmp_path, config=config) as server:
        old = await server.ready_cache("old", ttl=5)
        assert (
            await server.request("POST", "/v1/caching", {"model": "small", "messages": [message("new")]})
        ).status == 429
        server.clock.advance(5)
        await server.ready_cache("new")
        revived = await server.request("PUT", f"/v1/caching/{old['id']}", {"ttl": 5})
        assert revived.status == 429
        answer = await ask(server, by_role(old, ";reset_ttl=5"))
        assert answer.status == 200  # served; the lifetime is not renewed
        assert (await server.cache(old["id"]))["status"] == "inactive"


async def test_an_update_without_a_lifetime_keeps_it(server: World) -> None:
    cache = await server.ready_cache(KNOWLEDGE, ttl=100)
    updated = (await server.request("PUT", f"/v1/caching/{cache['id']}", {"metadata": {"x": "y"}})).json()
    assert (updated["status"], updated["metadata"], updated["expired_at"]) == (
        "pending",
        {"x": "y"},
        cache["expired_at"],
    )
    assert (await server.settled(cache["id"]))["status"] == "ready"


async def test_an_engine_lost_while_it_computes_is_not_taken_for_an_answer(server: World) -> None:
    lost = False

    def script(plan: Plan) -> list[Event]:
        nonlocal lost
        if plan.pin_id and not lost:
            lost = True
            server.engine.lose()
        return list(says("ok")(plan))

    server.engine.script = script
    assert (await server.ready_cache(KNOWLEDGE))["status"] == "ready"
    assert len(server.engine.plans) == 2


async def test_an_object_that_cannot_be_rendered_any_more_stops_nothing(server: World) -> None:
    def script(plan: Plan) -> list[Event]:
        if plan.prompt.tokens.tobytes().find(b"p\0\0\0o\0\0\0i") >= 0:
            raise ZeroDivisionError
        return list(says("ok")(plan))

    server.engine.script = script
    bad = await server.ready_cache("poison")
    assert bad["status"] == "error"
    assert bad["error"]["message"].startswith("internal error")
    assert (await server.ready_cache(KNOWLEDGE))["status"] == "ready"
