"""The edge, driven over ASGI: answers, errors in the mount's dialect, bounds, streams, clients that go away."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from keepwarm.core.clock import RandomIds
from keepwarm.core.identity import NewKey, NewOrganisation
from keepwarm.engine import EngineState, PoolStatus, StoreStatus
from keepwarm.gateway.identities import Identities
from tests.engines import StepEngine, says
from tests.world import CONFIG, World, world

pytestmark = pytest.mark.anyio


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as running:
        yield running


class Gate:
    """Lets a run of the engine go on event by event."""

    def __init__(self, engine: StepEngine) -> None:
        self._steps: asyncio.Semaphore = asyncio.Semaphore(0)
        engine.gate = self._steps.acquire

    def open(self, n_steps: int = 1) -> None:
        for _ in range(n_steps):
            self._steps.release()


@pytest.mark.parametrize("mount", ["/v1", "/moonshot/v1", "/openai/v1"])
async def test_an_answer_whole_and_streamed_says_the_same(server: World, mount: str) -> None:
    server.engine.script = says("Hel", "lo")
    path = f"{mount}/chat/completions"
    whole = await server.chat(path=path)
    streamed = await server.chat(path=path, stream=True)
    assert whole.status == streamed.status == 200
    assert whole.text == streamed.text == "Hello"
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.body.endswith(b"data: [DONE]\n\n")
    assert whole.json()["usage"]["completion_tokens"] == 2
    assert whole.json()["usage"]["prompt_tokens"] == server.engine.plans[0].prompt.n_tokens
    assert whole.headers["x-request-id"] == whole.json()["id"]
    server.assert_clean()


async def test_every_choice_has_its_own_text_and_the_prompt_counts_once(server: World) -> None:
    server.engine.script = lambda plan: says(f"choice {plan.turn_id[-2:]}")(plan)
    answer = await server.chat(n=3, temperature=1.0, seed=7)
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1, 2]
    assert {plan.sampling.seed for plan in server.engine.plans} == {7, 8, 9}
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert answer.json()["usage"]["prompt_tokens"] == server.engine.plans[0].prompt.n_tokens
    server.assert_clean()


async def test_timings_come_when_asked_for(server: World) -> None:
    whole = await server.chat(headers={"x-keepwarm-timings": "1"})
    timings = msgspec.json.decode(whole.headers["x-keepwarm-timings"])
    assert timings["engine_evaluate_ms"] == 1.5
    assert {"auth_ms", "parse_ms", "render_ms", "lease_ms"} <= timings.keys()
    assert "objects_ms" not in timings  # no cache object was looked up
    assert "render;dur=" in whole.headers["server-timing"]
    streamed = await server.chat(stream=True, headers={"x-keepwarm-timings": "1"})
    assert b": keepwarm-timings {" in streamed.body
    plain = await server.chat(stream=True)
    assert b"keepwarm-timings" not in plain.body


async def test_silence_is_filled_with_comments(tmp_path: Path) -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, sse_comment_s=0.001))
    async with world(tmp_path, config=config) as server:
        gate = Gate(server.engine)
        gate.open(2)  # the lease, Started
        call = server.call("POST", "/v1/chat/completions", {**QUESTION, "stream": True})
        await call.until(b": keepalive\n\n")
        gate.open(10)
        assert (await call.answer()).text == "ok"


QUESTION = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n_steps", [0, 1, 2, 3])
async def test_a_client_that_goes_away_ends_its_turn(server: World, stream: bool, n_steps: int) -> None:
    gate = Gate(server.engine)
    gate.open(n_steps)
    server.engine.script = says("a", "b", "c")
    call = server.call("POST", "/v1/chat/completions", {**QUESTION, "stream": stream})
    for _ in range(50):
        await asyncio.sleep(0)
    assert server.running.turns.n_turns == 1
    call.disconnect()
    await call.task
    server.assert_clean()
    assert len(server.engine.cancelled) == len(server.engine.plans)  # those that had begun
    (line,) = [entry for entry in server.logged if entry["event"] == "request"]
    assert line["error"] == "client_closed"


async def test_headers_go_out_when_the_turn_has_started_not_before(server: World) -> None:
    gate = Gate(server.engine)
    gate.open(1)
    call = server.call("POST", "/v1/chat/completions", {**QUESTION, "stream": True})
    for _ in range(50):
        await asyncio.sleep(0)
    assert not call.has_begun
    gate.open(1)
    for _ in range(50):
        await asyncio.sleep(0)
    assert call.has_begun
    gate.open(10)
    assert (await call.answer()).status == 200


async def test_models(server: World) -> None:
    listed = (await server.request("GET", "/v1/models")).json()["data"]
    assert "small" in [model["id"] for model in listed]
    assert all(model["context_length"] == 2048 for model in listed)
    assert (await server.request("GET", "/v1/models/small")).json()["id"] == "small"
    assert (await server.request("GET", "/openai/v1/models/org/name")).json()["id"] == "org/name"  # dev takes any


async def test_the_token_estimate_is_what_the_engine_is_asked(server: World) -> None:
    estimate = await server.request("POST", "/v1/tokenizers/estimate-token-count", QUESTION)
    await server.chat()
    assert estimate.json()["data"]["total_tokens"] == server.engine.plans[0].prompt.n_tokens


async def test_health_follows_the_engine(server: World) -> None:
    ready = await server.request("GET", "/health", key=None)
    assert (ready.status, ready.json()["status"]) == (200, "ok")
    assert ready.json()["engine"]["model"]["granularity"] == 1
    server.engine.state = EngineState.STARTING
    starting = await server.request("GET", "/health", key=None)
    assert (starting.status, starting.json()["status"]) == (503, "starting")


async def test_the_document_names_every_route_and_the_page_shows_it(server: World) -> None:
    document = (await server.request("GET", "/openapi.json", key=None)).json()
    assert {"/v1/caching/{cache_id}", "/openai/v1/chat/completions", "/health"} <= document["paths"].keys()
    assert "/openai/v1/caching" not in document["paths"]
    page = await server.request("GET", "/docs", key=None)
    assert page.headers["content-type"].startswith("text/html")
    for path in document["paths"]:
        assert path.encode() in page.body
    assert b"<script" not in page.body
    assert b"http://" not in page.body
    assert b"https://" not in page.body


async def test_restarting_the_engine_is_for_development_only(tmp_path: Path) -> None:
    async with world(tmp_path / "dev") as server:
        assert (await server.request("POST", "/admin/engine/restart")).status == 202
        assert server.engine.restarts == 1
        assert (await server.request("POST", "/admin/engine/restart", key=None)).status == 401
    async with world(tmp_path / "real", config=replace(CONFIG, dev=False)) as server:
        assert (await server.request("POST", "/admin/engine/restart")).status == 404


async def test_the_store_is_told_with_any_key_once_there_was_an_engine(server: World) -> None:
    pool = PoolStatus("disk", 1000, 700, 200, 100, 1000, n_blocks=3)
    server.engine.store = StoreStatus((pool,), "cost", 1, n_hits_disk=4, damaged={"checksum": 2})
    told = await server.request("GET", "/admin/store")
    assert told.status == 200
    assert told.json() == {
        "state": "ready",
        "epoch": 1,
        "detail": "ready",
        "store": msgspec.json.decode(msgspec.json.encode(server.engine.store)),
    }
    assert (await server.request("GET", "/admin/store", key=None)).status == 401
    server.engine.go_down()
    server.engine.store = None  # what a lost process held is not known
    down = await server.request("GET", "/admin/store")
    assert (down.status, down.json()["state"], down.json()["store"]) == (200, "down", None)
    server.engine.model = None
    status, error, headers = await error_of(server, "GET", "/admin/store")
    assert (status, error["type"]) == (503, "engine_overloaded_error")
    assert "retry-after" in headers


async def error_of(server: World, *request: Any, **options: Any) -> tuple[int, Any, dict[str, str]]:
    answer = await server.request(*request, **options)
    return answer.status, answer.json()["error"], answer.headers


@pytest.mark.parametrize(
    "path, error_type", [("/v1", "resource_not_found_error"), ("/openai/v1", "invalid_request_error")]
)
async def test_a_path_without_a_route_is_its_mounts_error(server: World, path: str, error_type: str) -> None:
    status, error, headers = await error_of(server, "GET", f"{path}/nothing")
    assert (status, error["type"]) == (404, error_type)
    assert headers["x-request-id"]


async def test_openai_has_no_caching(server: World) -> None:
    assert (await server.request("POST", "/openai/v1/caching", {})).status == 404


async def test_a_method_a_path_does_not_have(server: World) -> None:
    status, error, headers = await error_of(server, "DELETE", "/v1/caching")
    assert status == 405
    assert headers["allow"] == "POST, GET"
    assert "DELETE" in error["message"]


@pytest.mark.parametrize("authorization", [None, "Basic x", "Bearer", ""])
async def test_without_a_key_nothing_is_read(server: World, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    call = server.call("POST", "/v1/chat/completions", key=None, headers=headers, chunks=[])
    answer = await call.answer()  # the body never came
    assert answer.status == 401
    assert answer.json()["error"]["type"] == "invalid_authentication_error"


async def test_a_body_announced_too_large_is_not_read(tmp_path: Path) -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, body_bytes_max=1000))
    async with world(tmp_path, config=config) as server:
        call = server.call("POST", "/v1/chat/completions", headers={"content-length": "1001"}, chunks=[])
        answer = await call.answer()
        assert answer.status == 413
        assert "1,001 bytes or more, limit 1,000" in answer.json()["error"]["message"]
        call = server.call("POST", "/v1/chat/completions", chunks=[b"x" * 600, b"x" * 600])
        assert (await call.answer()).status == 413


async def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, body_read_s_max=0.01))
    async with world(tmp_path, config=config) as server:
        answer = await server.call("POST", "/v1/chat/completions", chunks=[]).answer()
        assert answer.status == 504
        assert "0.01 s" in answer.json()["error"]["message"]


async def test_headers_too_large(server: World) -> None:
    answer = await server.chat(headers={"x-long": "x" * 40_000})
    assert answer.status == 431


@pytest.mark.parametrize(
    "body, words",
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid"),
        ({"model": "small", "messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"model": "small"}, "messages"),
    ],
)
async def test_a_wrong_body_is_told_where(server: World, body: object, words: str) -> None:
    status, error, _ = await error_of(server, "POST", "/v1/chat/completions", body)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


async def test_with_keys_only_known_keys_and_known_models_are_served(tmp_path: Path) -> None:
    async with world(tmp_path, config=replace(CONFIG, dev=False)) as server:
        identities = Identities(server.storage, server.clock, RandomIds(), tiers={}, default_tier=None)
        await identities.create_organisation(NewOrganisation("acme"))
        key, made = await identities.create_key("acme", NewKey("anna"), by=None)
        assert (await server.chat(key="sk-kw-unknown")).status == 401
        assert (await server.chat(key=key)).status == 200
        assert server.engine.plans[0].prompt.tenant == "acme"
        for path in ("/v1/chat/completions", "/openai/v1/chat/completions"):
            unknown = await server.request("POST", path, {**QUESTION, "model": "gpt"}, key=key)
            assert unknown.status == 404
            assert "no model 'gpt' here; known are: small" in unknown.json()["error"]["message"]
        assert (await server.request("GET", "/v1/models/gpt", key=key)).status == 404
        await identities.revoke_key("acme", made.id, by=None)
        assert (await server.chat(key=key)).status == 401


async def test_a_prompt_too_long_gives_both_numbers(server: World) -> None:
    answer = await server.chat("x" * 3000)
    assert answer.status == 400
    assert "2,048" in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    server.assert_clean()


async def test_overload_is_refused_before_any_work(tmp_path: Path) -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, turns_max=1))
    async with world(tmp_path, config=config) as server:
        gate = Gate(server.engine)
        first = server.call("POST", "/v1/chat/completions", QUESTION)
        for _ in range(50):
            await asyncio.sleep(0)
        refused = await server.chat(key="k2")
        assert refused.status == 429
        assert refused.json()["error"]["type"] == "engine_overloaded_error"
        assert refused.headers["retry-after"] == "1"
        assert "render" not in refused.headers["server-timing"]
        gate.open(20)
        assert (await first.answer()).status == 200


async def test_an_engine_that_is_down_is_a_503_to_try_again(server: World) -> None:
    server.engine.state = EngineState.DOWN
    answer = await server.chat()
    assert answer.status == 503
    assert answer.headers["retry-after"] == "2"


async def test_an_engines_own_overload_is_passed_on(server: World) -> None:
    server.engine.overloaded = True
    answer = await server.chat(stream=True)
    assert answer.status == 429
    assert answer.headers["retry-after"] == "2"
    server.assert_clean()


async def test_a_turn_that_takes_too_long_ends_with_an_error(tmp_path: Path) -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, turn_s_max=0.05))
    async with world(tmp_path, config=config) as server:
        gate = Gate(server.engine)
        whole = await server.chat()
        assert whole.status == 504
        gate.open(3)
        streamed = await server.chat(stream=True)
        assert streamed.status == 200
        assert streamed.events[-1]["error"]["type"] == "server_error"
        assert b"[DONE]" not in streamed.body
        server.assert_clean()


async def test_our_own_bug_is_a_plain_error_and_the_log_has_no_text_of_the_clients(server: World) -> None:
    def broken(plan: object) -> Any:
        raise ZeroDivisionError("secret prompt")

    server.engine.script = broken
    answer = await server.chat("secret prompt")
    assert answer.status == 500
    assert answer.json()["error"]["message"].startswith("internal error")
    (entry,) = [entry for entry in server.logged if entry["event"] == "turn failed"]
    assert entry["error"] == "ZeroDivisionError"
    assert entry["turn_id"] == answer.headers["x-request-id"]
    assert "secret" not in repr(server.logged)
    server.assert_clean()


async def test_one_log_line_tells_a_turn_without_its_text(server: World) -> None:
    await server.chat("secret prompt", key="secret-key")
    (line,) = [entry for entry in server.logged if entry["event"] == "request"]
    assert line["status"] == 200
    assert line["path"] == "/chat/completions"
    assert line["dialect"] == "kimi"
    assert line["output"] == 1
    assert line["tenant"].startswith("dev-")
    assert "secret" not in repr(server.logged)


async def test_a_stopping_server_ends_turns_with_an_error_and_takes_no_new_ones(server: World) -> None:
    gate = Gate(server.engine)
    gate.open(2)
    call = server.call("POST", "/v1/chat/completions", {**QUESTION, "stream": True})
    for _ in range(50):
        await asyncio.sleep(0)
    server.running.turns.stop()
    answer = await call.answer()
    assert "the server is stopping" in answer.events[-1]["error"]["message"]
    assert (await server.chat()).status == 503
    server.assert_clean()
