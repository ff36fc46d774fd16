"""Questions to the server, as a user of the openai SDK asks them; the time to the first token is taken here."""

from collections.abc import Iterable
from typing import Any, cast

import msgspec
import openai
from msgspec import Struct
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from keepwarm.core.clock import Clock
from keepwarm.demo import DemoError

MODEL = "moonshot-v1-8k"
FAMILY = "moonshot-v1"
TTL_S = 3600
OUTPUT_TOKENS_MAX = 48
TIMEOUT_S = 600.0

Messages = list[dict[str, str]]


class Answer(Struct, frozen=True):
    """What came back for a question. Counts in tokens, as the server's usage gives them."""

    text: str
    n_prompt: int
    n_cached: int
    n_output: int
    ttft_ms: float


class CacheState(Struct, frozen=True):
    """A cache object as far as the demo looks at it."""

    id: str
    status: str
    tokens: int
    created_at: int
    error: dict[str, str] | None = None


class WireUsage(Struct, frozen=True):
    """Kimi's usage, in the finishing chunk's choice. Without `cached_tokens` nothing was cached."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Client:
    """The SDK pointed at our server. Each client has a key, thus a tenant and a cold cache, of its own."""

    def __init__(self, url: str, key: str, clock: Clock) -> None:
        self._clock = clock
        self._sdk = openai.OpenAI(
            base_url=url + "/v1",
            api_key=key,
            max_retries=0,
            timeout=TIMEOUT_S,
            http_client=openai.DefaultHttpxClient(trust_env=False),  # no proxy stands between us and loopback
        )

    def ask(self, messages: Messages) -> Answer:
        """One question, streamed, at temperature 0."""
        began = self._clock.monotonic()
        stream = self._sdk.chat.completions.create(
            model=MODEL,
            messages=cast(
                "list[ChatCompletionMessageParam]", messages
            ),  # "cache" is Kimi's role, not in the SDK's types
            temperature=0,
            max_tokens=OUTPUT_TOKENS_MAX,
            stream=True,
        )
        with stream:
            return collected(stream, began, self._clock)

    def count_tokens(self, messages: Messages) -> int:
        """Tokens of a prompt with these messages."""
        reply = self._post("/tokenizers/estimate-token-count", {"model": MODEL, "messages": messages})
        n_tokens = reply["data"]["total_tokens"]
        assert isinstance(n_tokens, int)
        return n_tokens

    def create_object(self, messages: Messages, name: str) -> CacheState:
        body = {"model": FAMILY, "messages": messages, "name": name, "ttl": TTL_S}
        return msgspec.convert(self._post("/caching", body), CacheState)

    def object_state(self, object_id: str) -> CacheState:
        return msgspec.convert(self._sdk.get(f"/caching/{object_id}", cast_to=object), CacheState)

    def _post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        return cast("dict[str, Any]", self._sdk.post(path, body=body, cast_to=object))


def collected(chunks: Iterable[ChatCompletionChunk], began: float, clock: Clock) -> Answer:
    """The answer that a stream begun at `began` brings. Raises DemoError when it has no text or no usage."""
    pieces: list[str] = []
    first: float | None = None
    usage: WireUsage | None = None
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.delta.content:
                first = clock.monotonic() if first is None else first
                pieces.append(choice.delta.content)
            if choice.model_extra and choice.model_extra.get("usage") is not None:
                usage = msgspec.convert(choice.model_extra["usage"], WireUsage)
    if first is None or usage is None:
        raise DemoError("the server's answer had no text or no usage; see its last words above")
    ttft_ms = (first - began) * 1000
    return Answer("".join(pieces), usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, ttft_ms)
