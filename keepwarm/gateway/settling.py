"""Settling: after an answer, its text is evaluated again as a prompt would be, so that the conversation's next turn hits.

Tokens of an answer were decoded one at a time, and their state is not the one a prefill gives (DESIGN of the engine:
exact caching), so it is not stored. This runs behind the answer, at idle priority: the queue is bounded and drops the
oldest, the engine gives it up as soon as a turn arrives, and nothing depends on it.
"""

import asyncio
from collections import deque
from typing import NamedTuple

from msgspec.structs import replace

from keepwarm.cache.planner import goes_on, plan_settling
from keepwarm.config import CacheConfig
from keepwarm.core.cache_object import CacheObject
from keepwarm.core.errors import ApiError
from keepwarm.core.event import ChoiceFinished, Event, Failed, Finished, FinishReason, TextDelta, ToolCallDelta
from keepwarm.core.request import ChatRequest, Message, TextPart, ToolCall
from keepwarm.engine import Engine
from keepwarm.gateway.rendering import Rendering
from keepwarm.gateway.runtime import Runtime
from keepwarm.gateway.stream import closing
from keepwarm.telemetry import where

QUEUE_MAX = 64  # conversations; older ones are the least likely to be asked on soon


class AnswerText:
    """Collects an answer into the assistant message that the client's next request will probably repeat."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: dict[int, tuple[str, list[str]]] = {}
        self.reason: FinishReason | None = None

    def feed(self, event: Event) -> None:
        match event:
            case TextDelta():
                self._text.append(event.text)
            case ToolCallDelta():
                _, arguments = self._calls.setdefault(event.index, (event.name or "", []))
                arguments.append(event.arguments)
            case ChoiceFinished():
                self.reason = event.reason
            case _:
                pass  # reasoning is not repeated by clients

    def conversation(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The messages with the answer behind them; a partial last message is completed by it."""
        text = "".join(self._text)
        calls = tuple(
            ToolCall(id=f"{name}:{index}", name=name, arguments="".join(arguments))
            for index, (name, arguments) in sorted(self._calls.items())
        )
        last = messages[-1]
        if last.partial:
            whole = replace(last, parts=(TextPart(last.text + text),), tool_calls=calls, partial=False)
            return (*messages[:-1], whole)
        return (*messages, Message("assistant", (TextPart(text),), tool_calls=calls))


class Conversation(NamedTuple):
    """A conversation to settle: the request that was answered, the cache object it used, and the answer."""

    turn_id: str
    tenant: str
    request: ChatRequest
    object: CacheObject | None
    answer: AnswerText


class Settling:
    """The background queue."""

    def __init__(self, config: CacheConfig, rendering: Rendering, engine: Engine, runtime: Runtime) -> None:
        self._config = config
        self._rendering = rendering
        self._engine = engine
        self._log = runtime.log
        self._waiting: deque[Conversation] = deque(maxlen=QUEUE_MAX)
        self._wake = asyncio.Event()

    def offer(self, conversation: Conversation) -> None:
        """Settle this soon, or never; returns at once."""
        self._waiting.append(conversation)
        self._wake.set()

    async def work(self) -> None:
        """Settle one conversation after another, forever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                try:
                    await self.settle(self._waiting.popleft())
                except ApiError as error:
                    self._log.info("not settled", kind=error.kind.value)
                except Exception as exc:  # noqa: BLE001 - a turn boundary: nothing depends on settling, so it ends nothing
                    self._log.error("settling failed", error=type(exc).__name__, where=where(exc))

    async def settle(self, conversation: Conversation) -> Finished | Failed | None:
        """Settle one conversation; None when it is not worth it."""
        request, reason = conversation.request, conversation.answer.reason
        if reason is None or not goes_on(request, reason, self._config.settle):
            return None
        obj = conversation.object
        built = await self._rendering.build(
            conversation.tenant,
            conversation.answer.conversation(request.messages),
            request.tools,
            request.tool_choice,
            object_tokens=obj.n_tokens if obj is not None else None,
            generate=False,
            thinking=request.thinking,
        )
        async with self._engine.lease(built.prompt) as lease:
            plan = plan_settling(
                f"{conversation.turn_id}-settle",
                request,
                reason,
                built,
                lease,
                settle=self._config.settle,
                auto_tokens_min=self._config.auto_tokens_min,
            )
            if plan is None:
                return None
            async with closing(self._engine.run(plan)) as events:
                async for event in events:
                    if isinstance(event, Finished | Failed):
                        return event
        raise AssertionError("the engine ended a run without a terminal event")
