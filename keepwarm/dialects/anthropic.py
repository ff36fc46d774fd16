"""The Anthropic dialect: messages, their token count and the models list.

Bodies and their checks are in anthropic_request.py (blocks in anthropic_block.py and anthropic_content.py, cache_control in
anthropic_marks.py), answers in anthropic_answer.py, errors in anthropic_error.py. Both API versions are served alike:
the version header is neither required nor read, and beta names are ignored.
"""

from collections.abc import Mapping, Sequence

import msgspec

from keepwarm.core.errors import ApiError
from keepwarm.core.rate_limit import LimitState
from keepwarm.core.request import ChatRequest
from keepwarm.dialects import CacheReport, ErrorReply, Frame, Identity, Parsed, WireBounds
from keepwarm.dialects.anthropic_answer import (
    AnthropicParsed,
    MessageRenderer,
    Ping,
    TokenCountReply,
    event_frame,
)
from keepwarm.dialects.anthropic_error import anthropic_error_reply
from keepwarm.dialects.anthropic_model import anthropic_model, render_anthropic_models
from keepwarm.dialects.anthropic_request import (
    CountTokensRequest,
    MessagesRequest,
    neutral_count,
    neutral_request,
)
from keepwarm.dialects.body import JsonBody
from keepwarm.dialects.limit_headers import anthropic_limit_headers


class AnthropicMessages:
    """`ChatDialect` for Anthropic's POST /messages, its token count and its models list."""

    name = "anthropic"
    id_prefix = "msg_"
    keepalive: Frame | None = event_frame(Ping())

    def __init__(self, bounds: WireBounds) -> None:
        self._bounds = bounds
        self._body = JsonBody(MessagesRequest)
        self._count_body = JsonBody(CountTokensRequest)

    def parse_chat(self, headers: Mapping[str, str], body: bytes) -> AnthropicParsed:  # noqa: ARG002 (the protocol's)
        """Raises ApiError(INVALID_REQUEST) with the path of the offending field. No header has a meaning here."""
        wire = self._body.decode(body)
        request = neutral_request(wire, self._bounds)
        return AnthropicParsed(
            request,
            stream=bool(wire.stream),
            max_tokens_cut=True,  # coding agents ask for as much as the vendor's own models can say
            wants_diagnostics=bool(wire.diagnostics),
            hides_thinking=wire.thinking is not None and wire.thinking.display == "omitted",
        )

    def parse_count(self, headers: Mapping[str, str], body: bytes) -> ChatRequest:  # noqa: ARG002 (as parse_chat)
        """The request whose prompt POST /messages/count_tokens asks about. Raises ApiError(INVALID_REQUEST)."""
        return neutral_count(self._count_body.decode(body), self._bounds)

    def renderer(self, parsed: Parsed, identity: Identity) -> MessageRenderer:
        assert isinstance(parsed, AnthropicParsed), "parsed by another dialect"
        return MessageRenderer(parsed, identity)

    def reply_headers(self, report: CacheReport) -> tuple[tuple[str, str], ...]:  # noqa: ARG002 (the protocol's)
        """None: Anthropic has no cache objects."""
        return ()

    def limit_headers(self, state: LimitState) -> tuple[tuple[str, str], ...]:
        return anthropic_limit_headers(state)

    def render_error(self, error: ApiError, request_id: str | None = None) -> ErrorReply:
        return anthropic_error_reply(error, request_id)

    def render_token_count(self, n_tokens: int) -> bytes:
        """The answer of POST /messages/count_tokens."""
        return msgspec.json.encode(TokenCountReply(n_tokens))

    def render_model(self, name: str, created: int, n_ctx: int | None) -> bytes:
        """The body of GET /models/{name}. `n_ctx` None: not known yet, the limits are absent."""
        return msgspec.json.encode(anthropic_model(name, created, n_ctx))

    def render_models(self, names: Sequence[str], created: int, n_ctx: int | None) -> bytes:
        """The body of GET /models."""
        return render_anthropic_models(names, created, n_ctx)
