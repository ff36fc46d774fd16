"""The OpenAI dialect: chat completions and the models list.

Bodies and their checks are in openai_request.py, answers in openai_answer.py, errors in openai_error.py. Kimi's dialect
(kimi.py) and MiniMax's (minimax.py) stand on the same files.
"""

import re
from collections.abc import Mapping, Sequence

import msgspec

from keepwarm.core.errors import ApiError
from keepwarm.core.rate_limit import LimitState
from keepwarm.dialects import CacheReport, ErrorReply, Frame, Identity, Parsed, WireBounds
from keepwarm.dialects.body import JsonBody
from keepwarm.dialects.limit_headers import openai_limit_headers
from keepwarm.dialects.openai_answer import CHAT_ID_PREFIX, AnswerForm, ChatRenderer, digest_call_id
from keepwarm.dialects.openai_error import OPENAI_ERRORS, error_reply
from keepwarm.dialects.openai_model import openai_model, render_model_list
from keepwarm.dialects.openai_request import (
    ChatCompletionRequest,
    RequestRules,
    neutral_messages,
    neutral_request,
    parsed_chat,
    require_messages,
)

DEFAULT_TEMPERATURE = 1.0
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}", re.ASCII)


class OpenAIChat:
    """`ChatDialect` for OpenAI's POST /chat/completions, and its models list."""

    name = "openai"
    id_prefix = CHAT_ID_PREFIX
    keepalive: Frame | None = None

    def __init__(self, bounds: WireBounds) -> None:
        self._rules = RequestRules(bounds, DEFAULT_TEMPERATURE, FUNCTION_NAME)
        self._body = JsonBody(ChatCompletionRequest)
        self._encoder = msgspec.json.Encoder()
        self._form = AnswerForm(self.render_error, digest_call_id)

    def parse_chat(self, headers: Mapping[str, str], body: bytes) -> Parsed:  # noqa: ARG002 (the protocol's)
        """Raises ApiError(INVALID_REQUEST) with the path of the offending field. No header has a meaning here."""
        wire = self._body.decode(body)
        require_messages(wire.messages, self._rules.bounds)
        request = neutral_request(wire, neutral_messages(wire.messages), self._rules)
        return parsed_chat(wire, request)

    def renderer(self, parsed: Parsed, identity: Identity) -> ChatRenderer:
        return ChatRenderer(parsed, identity, self._form, self._encoder)

    def reply_headers(self, report: CacheReport) -> tuple[tuple[str, str], ...]:  # noqa: ARG002 (the protocol's)
        """None: OpenAI has no cache objects."""
        return ()

    def limit_headers(self, state: LimitState) -> tuple[tuple[str, str], ...]:
        return openai_limit_headers(state)

    def render_error(self, error: ApiError, request_id: str | None = None) -> ErrorReply:  # noqa: ARG002 (the protocol's)
        return error_reply(OPENAI_ERRORS, error)

    def render_model(self, name: str, created: int, n_ctx: int | None) -> bytes:
        """The body of GET /models/{name}. `n_ctx` None: not known yet, the member is absent."""
        return self._encoder.encode(openai_model(name, created, n_ctx))

    def render_models(self, names: Sequence[str], created: int, n_ctx: int | None) -> bytes:
        """The body of GET /models."""
        return render_model_list([openai_model(name, created, n_ctx) for name in names])
