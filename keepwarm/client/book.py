"""The cache book over the synchronous openai client. Threads and processes may share a book's file, threads a book.

The calls about an object have a time limit of their own and are not retried by the SDK: a creation that is repeated
blindly may make two objects.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, overload

import openai
from openai import Stream
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from keepwarm.client.bookkeeping import Bookkeeping, Call, Reply, advance, end
from keepwarm.client.decision import CALL_S, Policy
from keepwarm.client.knowledge import Form, Knowledge, Sending, WireMessage
from keepwarm.client.rows import Rows
from keepwarm.core.clock import Clock, Ids, RandomIds, SystemClock


class CacheBook:
    """Which cache object holds which knowledge.

    `model` is the name objects are created for: Kimi's family name, or any name a Keepwarm server serves. Raises
    sqlite3.Error when `path` cannot be a book.
    """

    def __init__(
        self,
        client: openai.OpenAI,
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

    def prepare(
        self, key: str, knowledge: Knowledge, new: Sequence[WireMessage] = (), *, form: Form = Form.MESSAGE
    ) -> Sending:
        """How to send `new` behind `knowledge`: with the key's object when it is ready, in full otherwise.

        Never raises for the cache's sake and never waits for another worker. Without `new` it begins the object.
        """
        steps = self._books.prepare(key, knowledge, new, form)
        full = Sending(key, knowledge, tuple(new), 0.0)
        reply: Reply | None = None
        try:
            while True:
                step = advance(steps, reply, full)
                if isinstance(step, Sending):
                    return step
                reply = self._perform(step)
        finally:
            end(steps)

    def again(self, sending: Sending, error: openai.APIStatusError) -> Sending | None:
        """After a request was refused: send this instead, or raise the error when there is none."""
        return self._books.again(sending, error.status_code, error.code)

    @overload
    def ask(
        self, key: str, knowledge: Knowledge, new: Sequence[WireMessage], *, model: str, form: Form = Form.MESSAGE,
        stream: Literal[False] = False, **options: object,
    ) -> ChatCompletion: ...  # fmt: skip
    @overload
    def ask(
        self, key: str, knowledge: Knowledge, new: Sequence[WireMessage], *, model: str, form: Form = Form.MESSAGE,
        stream: Literal[True], **options: object,
    ) -> Stream[ChatCompletionChunk]: ...  # fmt: skip
    def ask(
        self, key: str, knowledge: Knowledge, new: Sequence[WireMessage], *, model: str, form: Form = Form.MESSAGE,
        stream: bool = False, **options: object,
    ) -> ChatCompletion | Stream[ChatCompletionChunk]:  # fmt: skip
        """A chat completion; `options` as for `chat.completions.create`. Sent again in full if the object has vanished.

        Raises what the SDK raises for a request without a cache.
        """
        sending = self.prepare(key, knowledge, new, form=form)
        arguments = {"model": model, "stream": stream, **options}
        try:
            raw = self._create(sending, arguments)
        except openai.APIStatusError as error:
            instead = self.again(sending, error)
            if instead is None:
                raise
        else:
            self._books.answered(sending, raw.headers)
            return cast("ChatCompletion | Stream[ChatCompletionChunk]", raw.parse())
        return cast("ChatCompletion | Stream[ChatCompletionChunk]", self._create(instead, arguments).parse())

    def _create(self, sending: Sending, arguments: dict[str, object]) -> Any:  # noqa: ANN401  a raw answer or its stream
        create = cast("Any", self._client.chat.completions.with_raw_response.create)
        return create(**merged(arguments, sending))

    def _perform(self, call: Call) -> Reply:
        options: Any = {} if call.query is None else {"params": call.query}
        try:
            match call.method:
                case "GET":
                    return Reply(200, self._caching.get(call.path, cast_to=object, options=options))
                case "POST":
                    return Reply(200, self._caching.post(call.path, cast_to=object, body=call.body))
                case "PUT":
                    return Reply(200, self._caching.put(call.path, cast_to=object, body=call.body))
                case _:
                    return Reply(200, self._caching.delete(call.path, cast_to=object))
        except openai.APIStatusError as error:
            return Reply(error.status_code, error=error.code or error.type)
        except (openai.OpenAIError, ValueError):  # no connection, no answer in time, an answer that is no JSON
            return Reply(None)


def merged(arguments: dict[str, object], sending: Sending) -> dict[str, object]:
    """Arguments of a request; headers that the application gave stay beside the cache's."""
    with_cache = {**arguments, **sending.arguments}
    given = arguments.get("extra_headers")
    if given and sending.extra_headers:
        with_cache["extra_headers"] = {**cast("dict[str, str]", given), **sending.extra_headers}
    return with_cache
