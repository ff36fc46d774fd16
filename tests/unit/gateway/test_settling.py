"""What is evaluated again behind an answer, and that the answer never waits for it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from keepwarm.core.event import ChoiceFinished, ReasoningDelta, TextDelta, ToolCallDelta
from keepwarm.core.prompt import Plan, Priority
from keepwarm.core.request import Message, TextPart, ToolCall
from keepwarm.gateway import settling
from keepwarm.gateway.settling import AnswerText
from tests.engines import says
from tests.world import CONFIG, World, until, world

USER = Message("user", (TextPart("how?"),))
ALWAYS = replace(CONFIG, cache=replace(CONFIG.cache, settle="always", auto_tokens_min=8))


def test_an_answer_becomes_the_message_a_client_repeats() -> None:
    answer = AnswerText()
    for event in [ReasoningDelta("hm"), TextDelta("Hel"), TextDelta("lo"), ChoiceFinished("stop", 2)]:
        answer.feed(event)
    assert answer.conversation((USER,)) == (USER, Message("assistant", (TextPart("Hello"),)))
    assert answer.reason == "stop"


def test_tool_calls_are_put_together() -> None:
    answer = AnswerText()
    answer.feed(ToolCallDelta(0, "look", '{"a":'))
    answer.feed(ToolCallDelta(1, "wait"))
    answer.feed(ToolCallDelta(0, arguments="1}"))
    (_, message) = answer.conversation((USER,))
    assert message.tool_calls == (ToolCall("look:0", "look", '{"a":1}'), ToolCall("wait:1", "wait", ""))


def test_a_partial_message_is_completed_not_followed() -> None:
    answer = AnswerText()
    answer.feed(TextDelta("lo"))
    partial = Message("assistant", (TextPart("Hel"),), partial=True)
    assert answer.conversation((USER, partial)) == (USER, Message("assistant", (TextPart("Hello"),)))


async def plans(server: World, n: int) -> list[Plan]:
    await until(lambda: len(server.engine.plans) >= n and not server.engine.running)
    return server.engine.plans


@pytest.mark.anyio
async def test_the_next_turn_begins_with_what_was_settled(tmp_path: Path) -> None:
    async with world(tmp_path, config=ALWAYS) as server:
        server.engine.script = says("fine")
        await server.chat("how are you?")
        _, settled = await plans(server, 2)
        assert settled.priority is Priority.IDLE
        assert settled.output.max_tokens == 0
        history: list[Any] = [
            {"role": "user", "content": "how are you?"},
            {"role": "assistant", "content": "fine"},
            {"role": "user", "content": "and now?"},
        ]
        await server.request("POST", "/v1/chat/completions", {"model": "small", "messages": history})
        following = server.engine.plans[2]
        n = settled.prompt.n_tokens
        assert following.prompt.tokens[:n].tolist() == settled.prompt.tokens.tolist()


@pytest.mark.anyio
async def test_an_answer_does_not_wait_and_a_cancelled_one_is_not_settled(tmp_path: Path) -> None:
    async with world(tmp_path, config=ALWAYS) as server:
        server.engine.script = lambda plan: [] if plan.priority is Priority.IDLE else says("a")(plan)
        steps = asyncio.Semaphore(5)  # enough for the answer, not for what follows
        server.engine.gate = steps.acquire
        assert (await server.chat()).text == "a"
        call = server.call(
            "POST", "/v1/chat/completions", {"model": "small", "messages": [{"role": "user", "content": "b"}]}
        )
        for _ in range(20):
            await asyncio.sleep(0)
        call.disconnect()
        await call.task
        assert not server.running.settling._waiting  # the queue is what is asked about


@pytest.mark.anyio
async def test_switched_off_nothing_follows(tmp_path: Path) -> None:
    config = replace(ALWAYS, cache=replace(ALWAYS.cache, settle="off"))
    async with world(tmp_path, config=config) as server:
        await server.chat()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(server.engine.plans) == 1


@pytest.mark.anyio
async def test_the_queue_keeps_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "QUEUE_MAX", 2)
    async with world(tmp_path, config=ALWAYS) as server:
        server.engine.gate = None
        queue = server.running.settling
        for number in range(5):
            queue.offer(number)  # type: ignore[arg-type]
        assert list(queue._waiting) == [3, 4]  # the bound is what is asked about
        queue._waiting.clear()
