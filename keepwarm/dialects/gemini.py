"""The Gemini dialect: generateContent, its two streams, countTokens and the models list.

Bodies and their checks are in gemini_request.py (contents in gemini_content.py, functions and schemas in gemini_schema.py,
the JSON they come in in gemini_json.py), answers in gemini_answer.py, errors in gemini_error.py. The model is in the path, and
how an answer is streamed in the path and the query, so `parse_generate` takes both.
"""

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import UNSET

from keepwarm.core.errors import ApiError
from keepwarm.core.rate_limit import LimitState
from keepwarm.core.request import ChatRequest
from keepwarm.dialects import CacheReport, ErrorReply, Frame, Identity, Parsed, WireBounds
from keepwarm.dialects.body import invalid
from keepwarm.dialects.gemini_answer import (
    AnswerShape,
    GeminiParsed,
    GeminiRenderer,
    GeminiTokenCountReply,
    text_tokens,
)
from keepwarm.dialects.gemini_error import gemini_error_reply
from keepwarm.dialects.gemini_json import ProtoBody
from keepwarm.dialects.gemini_model import ModelsPage, gemini_model, render_gemini_models
from keepwarm.dialects.gemini_request import (
    GeminiCountTokensRequest,
    GenerateContentRequest,
    neutral_gemini_count,
    neutral_generate,
)


class GeminiContent:
    """`ChatDialect` for Gemini's POST /models/{model}:generateContent and :streamGenerateContent, and what goes with them.

    `id_prefix` is empty: a responseId has none. A blank line keeps streams of either shape alive: google-genai takes any
    other line that is no data, comments too, for part of a JSON text.
    """

    name = "gemini"
    id_prefix = ""
    keepalive: Frame | None = Frame(b"\n", is_raw=True)

    def __init__(self, bounds: WireBounds) -> None:
        self._bounds = bounds
        self._body = ProtoBody(GenerateContentRequest)
        self._count_body = ProtoBody(GeminiCountTokensRequest)

    def parse_chat(self, headers: Mapping[str, str], body: bytes) -> GeminiParsed:  # noqa: ARG002 (the protocol's)
        """A body that names its model, for a whole answer. Raises ApiError(INVALID_REQUEST) with the offending path."""
        wire = self._body.decode(body)
        if wire.model is None:
            raise invalid("model", "is required")
        return self._parsed(wire, wire.model, "whole")

    def parse_generate(self, model: str, shape: AnswerShape, body: bytes) -> GeminiParsed:
        """The body of a call on `model`. Raises ApiError(INVALID_REQUEST) with the path of the offending field."""
        return self._parsed(self._body.decode(body), model, shape)

    def parse_count_tokens(self, model: str, body: bytes) -> ChatRequest:
        """The request whose prompt :countTokens asks about. Raises ApiError(INVALID_REQUEST)."""
        return neutral_gemini_count(self._count_body.decode(body), model, self._bounds)

    def renderer(self, parsed: Parsed, identity: Identity) -> GeminiRenderer:
        assert isinstance(parsed, GeminiParsed), "parsed by another dialect"
        return GeminiRenderer(parsed, identity)

    def reply_headers(self, report: CacheReport) -> tuple[tuple[str, str], ...]:  # noqa: ARG002 (the protocol's)
        """None: what was read from a cache is in the usage."""
        return ()

    def limit_headers(self, state: LimitState) -> tuple[tuple[str, str], ...]:  # noqa: ARG002 (the protocol's)
        """None: Gemini tells when to come back in a refusal's RetryInfo."""
        return ()

    def render_error(self, error: ApiError, request_id: str | None = None) -> ErrorReply:  # noqa: ARG002 (the protocol's)
        return gemini_error_reply(error)

    def render_token_count(self, n_tokens: int, n_cached: int = 0) -> bytes:
        """The answer of :countTokens; `n_cached` of the tokens are a cachedContent's."""
        return msgspec.json.encode(GeminiTokenCountReply(n_tokens, text_tokens(n_tokens), n_cached or UNSET))

    def render_model(self, name: str, created: int, n_ctx: int | None) -> bytes:  # noqa: ARG002 (the protocol's)
        """The body of GET /models/{name}. `n_ctx` None: not known yet, the limits are absent."""
        return msgspec.json.encode(gemini_model(name, n_ctx))

    def render_models(
        self,
        names: Sequence[str],
        created: int,  # noqa: ARG002 (the protocol's)
        n_ctx: int | None,
        page: ModelsPage | None = None,
    ) -> bytes:
        """The body of GET /models: the page that `parse_models_page` read, None the first."""
        return render_gemini_models(names, n_ctx, page or ModelsPage())

    def _parsed(self, wire: GenerateContentRequest, model: str, shape: AnswerShape) -> GeminiParsed:
        request = neutral_generate(wire, model, self._bounds)
        config = wire.generation_config
        thinking = config.thinking_config if config is not None else None
        tells_thoughts = thinking is not None and bool(thinking.include_thoughts)
        return GeminiParsed(request, stream=shape != "whole", shape=shape, tells_thoughts=tells_thoughts)


def stream_shape(query: Sequence[tuple[str, str]]) -> AnswerShape:
    """How :streamGenerateContent streams: as events with `alt=sse`, else as one array."""
    return "events" if any(name in ("alt", "$alt") and value == "sse" for name, value in query) else "array"
