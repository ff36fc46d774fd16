"""Rendering without stopping the event loop: short requests inline, long ones on one thread of their own.

A long context that was never seen takes up to a second to render and tokenise, and every open stream would wait for it.
`Templating` allows one caller at a time, so while the thread works, short requests queue behind it, too. The queue is
bounded by admission: whoever calls here holds a permit, but for the two background workers.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from keepwarm.cache.normalise import normalise
from keepwarm.cache.planner import output_rules
from keepwarm.cache.render import Built, Templating
from keepwarm.config import Limits
from keepwarm.core.prompt import OutputRules
from keepwarm.core.request import ChatRequest, JsonSchema, Message, TextPart, Tool, ToolChoice
from keepwarm.gateway.documents import Documents

INLINE_CHARS_MAX = 16_384  # some 4,000 tokens: a few milliseconds when nothing of it is known
T = TypeVar("T")


class Rendering:
    """The gateway's way to `Templating`."""

    def __init__(
        self, templating: Templating, to_gbnf: Callable[[str], str], limits: Limits, documents: Documents
    ) -> None:
        """`to_gbnf` turns a JSON Schema into a grammar, or raises ValueError."""
        self._documents = documents
        self._templating = templating
        self._to_gbnf = to_gbnf
        self._limits = limits
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rendering")
        self._n_running = 0  # on the thread or waiting for it

    @property
    def digest(self) -> str:
        """See `Templating.digest`."""
        return self._templating.digest

    async def normalised(
        self, request: ChatRequest, names: Sequence[str], n_fixed: int
    ) -> tuple[ChatRequest, tuple[str, ...]]:
        """See `cache.normalise.normalise`."""
        return await self._run(_n_chars(request.messages, ()), lambda: normalise(request, names, n_fixed=n_fixed))

    async def with_documents(self, tenant: str, request: ChatRequest) -> ChatRequest:
        """See `Documents.read`."""
        return await self._documents.read(request, tenant)

    async def request(
        self, tenant: str, request: ChatRequest, object_tokens: int | None, n_ctx: int, *, max_tokens_cut: bool
    ) -> tuple[Built, OutputRules]:
        """The prompt of a request and how its answer ends (`output_rules`). Raises ApiError: INVALID_REQUEST, PROMPT_TOO_LONG."""

        def call() -> tuple[Built, OutputRules]:
            built = self._templating.build(
                tenant,
                request.messages,
                request.tools,
                request.tool_choice,
                object_tokens=object_tokens,
                thinking=request.thinking,
            )
            return built, output_rules(
                request, built, n_ctx, self._limits, self._to_gbnf, max_tokens_cut=max_tokens_cut
            )

        n_chars = _n_chars(request.messages, request.tools)
        if isinstance(request.answer_format, JsonSchema):
            n_chars += len(request.answer_format.schema)
        return await self._run(n_chars, call)

    async def build(
        self,
        tenant: str,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        tool_choice: ToolChoice,
        *,
        object_tokens: int | None,
        generate: bool = True,
        thinking: bool | None = None,
    ) -> Built:
        """See `Templating.build`. Raises ApiError(INVALID_REQUEST)."""

        def call() -> Built:
            return self._templating.build(
                tenant,
                messages,
                tools,
                tool_choice,
                object_tokens=object_tokens,
                generate=generate,
                thinking=thinking,
            )

        return await self._run(_n_chars(messages, tools), call)

    async def object_prefix(self, tenant: str, messages: Sequence[Message], tools: Sequence[Tool]) -> Built:
        """See `Templating.object_prefix`. Raises ApiError(INVALID_REQUEST)."""
        return await self._run(
            _n_chars(messages, tools), lambda: self._templating.object_prefix(tenant, messages, tools)
        )

    def close(self) -> None:
        """Wait for the thread."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    async def _run(self, n_chars: int, call: Callable[[], T]) -> T:
        if n_chars <= INLINE_CHARS_MAX and not self._n_running:
            return call()
        loop = asyncio.get_running_loop()

        def done(_future: Future[T]) -> None:
            # Counted until the thread is really through: a cancelled awaiter does not stop it.
            loop.call_soon_threadsafe(self._done)

        self._n_running += 1
        future = self._worker.submit(call)
        future.add_done_callback(done)
        return await asyncio.wrap_future(future)

    def _done(self) -> None:
        self._n_running -= 1


def _n_chars(messages: Sequence[Message], tools: Sequence[Tool]) -> int:
    texts = (part for message in messages for part in message.parts if isinstance(part, TextPart))
    n_chars = sum(len(part.text) for part in texts)
    n_chars += sum(len(call.arguments) for message in messages for call in message.tool_calls)
    return n_chars + sum(len(tool.parameters) + len(tool.description) for tool in tools)
