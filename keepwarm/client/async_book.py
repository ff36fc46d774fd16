"""The cache book over the asynchronous openai client: the same story as `book`, with SQLite in a worker thread."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, overload

import anyio
import openai
from anyio.to_thread import run_sync
from openai import AsyncStream
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from keepwarm.client.book import merged
from keepwarm.client.bookkeeping import Bookkeeping, Call, Reply, advance, end
from keepwarm.client.decision import CALL_S, Policy
from keepwarm.client.knowledge import Form, Knowledge, Sending, WireMessage
from keepwarm.client.rows import Rows
from keepwarm.core.clock import Clock, Ids, RandomIds, SystemClock


class AsyncCacheBook:
    """As `CacheBook`. The constructor opens the file, so make the book before the event loop is busy."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        path: str | PathLike[str],
        *,
        model: str = "moonshot-v1",
        policy: Policy = Policy(),  # noqa: B008  frozen
        clock: Clock | None = None,
        ids: Ids | None = None,
    ) -> None:
        self._client = client
        self._caching = client.with_options(max_retries=0, timeout=CALL_S)
        rows = Rows(Path(path), str(client.base_url))
        self._books = Bookkeeping(rows, model, policy, clock or SystemClock(), ids or RandomIds())

    async def prepare(
        self, key: str, knowledge: Knowledge, new: Sequence[WireMessage] = (), *, form: Form = Form.MESSAGE
    ) -> Sending:
        """As `CacheBook.prepare`."""
        steps = self._books.prepare(key, knowledge, new, form)
        full = Sending(key, knowledge, tuple(new), 0.0)
        reply: Reply | None = None
        try:
            while True:
                step = await run_sync(advance, steps, reply, full)
                if isinstance(step, Sending):
                    return step
                reply = await self._perform(step)
        finally:
            with anyio.CancelScope(shield=True):
                await run_sync(end, steps)

    async def again(self, sending: Sending, error: openai.APIStatusError) -> Sending | None:
        """As `CacheBook.again`."""
        return await run_sync(self._books.again, sending, error.status_code, error.code)

    @overload
    async def ask(
        self, key: str, knowledge: Knowledge, new: Sequence[WireMessage], *, model: str, form: Form = Form.MESSAGE,
        stream: Literal[False] = False, **options: object,
    ) -> ChatCompletion: ...  # fmt: skip
    @overload
    async def ask(
        self, key: str, knowledge: Knowledge, new: Sequence[WireMessage], *, model: str, form: Form = Form.MESSAGE,
        stream: Literal[True], **options: object,
    ) -> AsyncStream[ChatCompletionChunk]: ...  # fmt: skip
    async def ask(
        self, key: str, knowledge: Knowledge, new: Sequence[WireMessage], *, model: str, form: Form = Form.MESSAGE,
        stream: bool = False, **options: object,
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]:  # fmt: skip
        """As `CacheBook.ask`."""
        sending = await self.prepare(key, knowledge, new, form=form)
        arguments = {"model": model, "stream": stream, **options}
        try:
            raw = await self._create(sending, arguments)
        except openai.APIStatusError as error:
            instead = await self.again(sending, error)
            if instead is None:
                raise
        else:
            await run_sync(self._books.answered, sending, raw.headers)
            return cast("ChatCompletion | AsyncStream[ChatCompletionChunk]", raw.parse())
        raw = await self._create(instead, arguments)
        return cast("ChatCompletion | AsyncStream[ChatCompletionChunk]", raw.parse())

    async def _create(self, sending: Sending, arguments: dict[str, object]) -> Any:  # noqa: ANN401  as in the other book
        create = cast("Any", self._client.chat.completions.with_raw_response.create)
        return await create(**merged(arguments, sending))

    async def _perform(self, call: Call) -> Reply:
        options: Any = {} if call.query is None else {"params": call.query}
        try:
            match call.method:
                case "GET":
                    return Reply(200, await self._caching.get(call.path, cast_to=object, options=options))
                case "POST":
                    return Reply(200, await self._caching.post(call.path, cast_to=object, body=call.body))
                case "PUT":
                    return Reply(200, await self._caching.put(call.path, cast_to=object, body=call.body))
                case _:
                    return Reply(200, await self._caching.delete(call.path, cast_to=object))
        except openai.APIStatusError as error:
            return Reply(error.status_code, error=error.code or error.type)
        except (openai.OpenAIError, ValueError):  # no connection, no answer in time, an answer that is no JSON
            return Reply(None)
