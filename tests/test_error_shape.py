"""Every error kind, in every dialect, before and in the middle of an answer, streamed and whole: one shape, never a traceback."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Event, Failed, Started, TextDelta
from keepwarm.core.prompt import Plan
from keepwarm.dialects import WireBounds
from keepwarm.dialects.kimi import KimiChat
from keepwarm.dialects.openai import OpenAIChat
from tests.engines import Script
from tests.world import CONFIG, Answer, World, world

pytestmark = pytest.mark.anyio

BOUNDS = msgspec.convert(CONFIG.limits, WireBounds, from_attributes=True)
DIALECTS = {"/v1": KimiChat(BOUNDS), "/moonshot/v1": KimiChat(BOUNDS), "/openai/v1": OpenAIChat(BOUNDS)}
MESSAGE = "what went wrong, with 12 numbers"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as running:
        yield running


def failing(kind: ErrorKind, *before: Event) -> Script:
    def script(plan: Plan) -> Sequence[Event]:
        return [*before, Failed(kind, MESSAGE, retry_after_s=9)]

    return script


def assert_is_the_error(answer: Answer, mount: str, kind: ErrorKind) -> None:
    expected = DIALECTS[mount].render_error(ApiError(kind, MESSAGE, retry_after_s=9))
    assert answer.status == expected.status
    assert answer.json() == msgspec.json.decode(expected.body)
    assert set(expected.headers) <= set(answer.headers.items())
    assert answer.headers["x-request-id"]
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("mount", DIALECTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_answer_it_is_an_http_status(server: World, mount: str, stream: bool) -> None:
    for kind in ErrorKind:
        server.engine.script = failing(kind)
        answer = await server.chat(path=f"{mount}/chat/completions", stream=stream)
        assert_is_the_error(answer, mount, kind)
        server.assert_clean()


@pytest.mark.parametrize("mount", DIALECTS)
async def test_in_the_middle_it_is_the_streams_last_frame(server: World, mount: str) -> None:
    for kind in ErrorKind:
        server.engine.script = failing(kind, Started(9, 0), TextDelta("Hel"))
        answer = await server.chat(path=f"{mount}/chat/completions", stream=True)
        assert answer.status == 200
        assert answer.text == "Hel"
        expected = DIALECTS[mount].render_error(ApiError(kind, MESSAGE, retry_after_s=9))
        assert answer.events[-1] == msgspec.json.decode(expected.body)
        assert b"[DONE]" not in answer.body
        server.assert_clean()


@pytest.mark.parametrize("mount", DIALECTS)
async def test_in_the_middle_of_a_whole_answer_it_is_still_a_status(server: World, mount: str) -> None:
    for kind in ErrorKind:
        server.engine.script = failing(kind, Started(9, 0), TextDelta("Hel"))
        assert_is_the_error(await server.chat(path=f"{mount}/chat/completions"), mount, kind)


async def test_one_choice_that_fails_ends_the_turn_once(server: World) -> None:
    for kind in ErrorKind:

        def script(plan: Plan, kind: ErrorKind = kind) -> Sequence[Event]:
            started = Started(plan.prompt.n_tokens, 0)
            return [started, Failed(kind, MESSAGE, retry_after_s=9)] if plan.turn_id.endswith("-1") else [started] * 50

        server.engine.script = script
        answer = await server.chat(n=3, temperature=1.0)
        assert_is_the_error(answer, "/v1", kind)
        server.assert_clean()
