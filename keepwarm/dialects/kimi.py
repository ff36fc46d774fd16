"""The Kimi dialect: OpenAI's chat endpoint with Moonshot's additions, all from its 2024-06 document.

Additions: the two ways to use a cache object (a first message with the role "cache", or X-Msh-Context-Cache headers),
partial mode, a flat `cached_tokens`, usage in the finishing chunk's choice, its own defaults, error words and reply
headers. Everything else is the OpenAI dialect's. Cache objects themselves are in caching.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import ToolCallDelta
from keepwarm.core.rate_limit import LimitState
from keepwarm.core.request import AnyText, CacheUse, ChatRequest, Message
from keepwarm.dialects import CacheReport, ErrorReply, Frame, Identity, Parsed, WireBounds
from keepwarm.dialects.body import JsonBody, invalid, quoted
from keepwarm.dialects.error_table import ErrorRow
from keepwarm.dialects.limit_headers import openai_limit_headers
from keepwarm.dialects.openai_answer import CHAT_ID_PREFIX, AnswerForm, ChatRenderer
from keepwarm.dialects.openai_error import error_reply
from keepwarm.dialects.openai_model import kimi_model, render_model_list
from keepwarm.dialects.openai_request import (
    ROLES,
    ChatCompletionRequest,
    ChatMessage,
    RequestRules,
    neutral_messages,
    neutral_request,
    parsed_chat,
    require_messages,
)

CACHE_ROLE = "cache"
CACHE_HEADER = "x-msh-context-cache"
DRY_RUN_HEADER = "x-msh-context-cache-dryrun"
RESET_TTL_HEADER = "x-msh-context-cache-reset-ttl"

DEFAULT_TEMPERATURE = 0.0
GREEDY_BELOW = 1e-6  # several choices would all be the same below this temperature
FUNCTION_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_-]{0,63}", re.ASCII)

_SECONDS = re.compile(r"[0-9]{1,10}", re.ASCII)
_FLAGS = {"0": False, "1": True}

KIMI_ERRORS: Mapping[ErrorKind, ErrorRow] = {
    ErrorKind.INVALID_REQUEST: ErrorRow(400, "invalid_request_error"),
    ErrorKind.PROMPT_TOO_LONG: ErrorRow(400, "invalid_request_error", "context_length_exceeded"),
    ErrorKind.UNKNOWN_MODEL: ErrorRow(404, "resource_not_found_error", "model_not_found"),
    ErrorKind.UNKNOWN_CACHE: ErrorRow(404, "resource_not_found_error", "cache_not_found"),
    ErrorKind.EXPIRED_CACHE: ErrorRow(404, "resource_not_found_error", "cache_expired"),
    ErrorKind.UNKNOWN_FILE: ErrorRow(404, "resource_not_found_error", "file_not_found"),
    ErrorKind.UNKNOWN_ROUTE: ErrorRow(404, "resource_not_found_error", "unknown_url"),
    ErrorKind.METHOD_NOT_ALLOWED: ErrorRow(405, "invalid_request_error", "method_not_supported"),
    ErrorKind.BODY_TOO_LARGE: ErrorRow(413, "invalid_request_error", "body_too_large"),
    ErrorKind.HEADERS_TOO_LARGE: ErrorRow(431, "invalid_request_error", "headers_too_large"),
    ErrorKind.UNAUTHENTICATED: ErrorRow(401, "invalid_authentication_error", "invalid_api_key"),
    ErrorKind.PERMISSION_DENIED: ErrorRow(403, "permission_denied_error", "permission_denied"),
    ErrorKind.QUOTA_EXCEEDED: ErrorRow(429, "exceeded_current_quota_error", "insufficient_quota", retry=False),
    ErrorKind.RATE_LIMITED: ErrorRow(429, "rate_limit_reached_error", "rate_limit_exceeded"),
    ErrorKind.OVERLOADED: ErrorRow(429, "engine_overloaded_error", "engine_overloaded"),
    ErrorKind.ENGINE_DOWN: ErrorRow(503, "engine_overloaded_error", "engine_unavailable"),
    ErrorKind.TIMEOUT: ErrorRow(504, "server_error", "timeout"),
    ErrorKind.CLIENT_CLOSED: ErrorRow(499, "client_closed_request"),
    ErrorKind.INTERNAL: ErrorRow(500, "server_error", "internal_error"),
}


class KimiMessage(ChatMessage):
    """One message. `partial`: the answer continues this assistant message, which must be the last one.

    A first message with the role "cache" names a cache object: "cache_id=ID" or "tag=TAG", then ";reset_ttl=SECONDS"
    and ";dry_run=1" as wanted.
    """

    role: Annotated[str, Meta(extra_json_schema={"enum": [CACHE_ROLE, *ROLES]})]
    partial: bool | None = None


class KimiChatCompletionRequest(ChatCompletionRequest):
    """The body of POST /chat/completions in Kimi's dialect."""

    messages: tuple[KimiMessage, ...]


class TokenEstimate(Struct):
    """How many tokens the prompt of such a request has."""

    total_tokens: int


class TokenEstimateReply(Struct):
    """The body of POST /tokenizers/estimate-token-count's answer."""

    data: TokenEstimate


class KimiChat:
    """`ChatDialect` for Kimi's POST /chat/completions, its models list and its token estimate."""

    name = "kimi"
    id_prefix = CHAT_ID_PREFIX
    keepalive: Frame | None = None

    def __init__(self, bounds: WireBounds) -> None:
        self._rules = RequestRules(bounds, DEFAULT_TEMPERATURE, FUNCTION_NAME)
        self._body = JsonBody(KimiChatCompletionRequest)
        self._encoder = msgspec.json.Encoder()
        self._form = AnswerForm(self.render_error, _call_id, call_index=True, kimi_usage=True)

    def parse_chat(self, headers: Mapping[str, str], body: bytes) -> Parsed:
        """Raises ApiError(INVALID_REQUEST) with the path of the offending field. Header names are lower-case."""
        wire = self._body.decode(body)
        require_messages(wire.messages, self._rules.bounds)
        use = _header_use(headers)
        in_first_message = wire.messages[0].role == CACHE_ROLE
        if in_first_message:
            if use is not None:
                raise invalid("messages[0]", f"a 'cache' message and the header {CACHE_HEADER} exclude each other")
            use = _message_use(wire)
        messages = kimi_messages(wire.messages[1:] if in_first_message else wire.messages, int(in_first_message))
        request = neutral_request(wire, messages, self._rules, tools_elsewhere=in_first_message)
        _require_sense(request)
        return parsed_chat(wire, replace(request, cache=use))

    def renderer(self, parsed: Parsed, identity: Identity) -> ChatRenderer:
        return ChatRenderer(parsed, identity, self._form, self._encoder)

    def reply_headers(self, report: CacheReport) -> tuple[tuple[str, str], ...]:
        """-Token-Exp is the documented header, -Token-Ttl the one Kimi's own Go sample reads; both are sent."""
        return (
            ("msh-context-cache-id", report.object_id),
            ("msh-context-cache-token-saved", str(report.n_tokens_saved)),
            ("msh-context-cache-token-exp", str(report.expires_at)),
            ("msh-context-cache-token-ttl", str(max(report.expires_at - report.now, 0))),
        )

    def limit_headers(self, state: LimitState) -> tuple[tuple[str, str], ...]:
        """OpenAI's, which Kimi's clients read."""
        return openai_limit_headers(state)

    def render_error(self, error: ApiError, request_id: str | None = None) -> ErrorReply:  # noqa: ARG002 (the protocol's)
        return error_reply(KIMI_ERRORS, error)

    def render_model(self, name: str, created: int, n_ctx: int | None) -> bytes:
        """The body of GET /models/{name}. `n_ctx` None: not known yet, the member is absent."""
        return self._encoder.encode(kimi_model(name, created, n_ctx))

    def render_models(self, names: Sequence[str], created: int, n_ctx: int | None) -> bytes:
        """The body of GET /models."""
        return render_model_list([kimi_model(name, created, n_ctx) for name in names])

    def render_token_estimate(self, n_tokens: int) -> bytes:
        """The answer of POST /tokenizers/estimate-token-count, whose body `parse_chat` reads."""
        return self._encoder.encode(TokenEstimateReply(TokenEstimate(n_tokens)))


def kimi_messages(messages: Sequence[KimiMessage], first: int = 0) -> tuple[Message, ...]:
    """`messages` in neutral form with partial mode; `first` is the place of the first one in the body.

    Raises ApiError(INVALID_REQUEST).
    """
    for i, message in enumerate(messages):
        if message.role == CACHE_ROLE:
            raise invalid(f"messages[{first + i}].role", "a 'cache' message must be the first and only one of its role")
    neutral = neutral_messages(messages, first)
    partial = [i for i, message in enumerate(messages) if message.partial]
    if not partial:
        return neutral
    last = len(messages) - 1
    if partial != [last] or neutral[last].role != "assistant" or neutral[last].tool_calls:
        path = f"messages[{first + partial[0]}].partial"
        raise invalid(path, "is for the last message only, an assistant message without tool_calls")
    return (*neutral[:last], replace(neutral[last], partial=True))


def _require_sense(request: ChatRequest) -> None:
    """Combinations Kimi refuses."""
    if request.n > 1 and request.sampling.temperature < GREEDY_BELOW:
        problem = f"is {request.n} at temperature {request.sampling.temperature:g}; all answers would be the same"
        raise invalid("n", problem)
    if request.messages and request.messages[-1].partial and not isinstance(request.answer_format, AnyText):
        raise invalid("response_format", "a JSON format cannot be combined with a partial message")


def _header_use(headers: Mapping[str, str]) -> CacheUse | None:
    object_id = headers.get(CACHE_HEADER)
    dry_run = _flag(headers.get(DRY_RUN_HEADER, "0"), DRY_RUN_HEADER)
    if object_id is None:
        if dry_run:  # without an object it would be an ordinary call, computed and charged
            raise invalid(DRY_RUN_HEADER, f"needs the header {CACHE_HEADER}")
        return None
    if not object_id:
        raise invalid(CACHE_HEADER, "must be a cache id, it is empty")
    reset_ttl = headers.get(RESET_TTL_HEADER)
    reset_ttl_s = None if reset_ttl is None else _seconds(reset_ttl, RESET_TTL_HEADER)
    return CacheUse(object_id=object_id, resent=True, reset_ttl_s=reset_ttl_s, dry_run=dry_run)


def _message_use(body: KimiChatCompletionRequest) -> CacheUse:
    message = body.messages[0]
    if not isinstance(message.content, str):
        raise invalid("messages[0].content", "must be a string such as 'cache_id=ID;reset_ttl=3600' in a cache message")
    if body.tools is not None:
        raise invalid("tools", "must be absent beside a role 'cache' message, the cache brings its own")
    if message.tool_calls or message.partial:
        raise invalid("messages[0]", "a cache message has a role and content only")
    return parse_cache_content(message.content)


def parse_cache_content(content: str) -> CacheUse:
    """`ref (";" option)*` with ref `cache_id=ID` or `tag=TAG` and options `reset_ttl=SECONDS`, `dry_run=1|0`.

    Raises ApiError(INVALID_REQUEST, param "messages[0].content").
    """
    path = "messages[0].content"
    reference, *options = content.split(";")
    kind, _, name = reference.partition("=")
    if kind not in ("cache_id", "tag") or not name:
        raise invalid(path, f"must begin with 'cache_id=ID' or 'tag=TAG', not {quoted(reference)}")
    values: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in ("reset_ttl", "dry_run"):
            raise invalid(path, f"{quoted(option)} is not an option, they are reset_ttl=SECONDS and dry_run=1|0")
        if key in values:
            raise invalid(path, f"{key} is given twice")
        values[key] = value
    return CacheUse(
        object_id=name if kind == "cache_id" else None,
        tag=name if kind == "tag" else None,
        reset_ttl_s=_seconds(values["reset_ttl"], path, "reset_ttl ") if "reset_ttl" in values else None,
        dry_run=_flag(values.get("dry_run", "0"), path, "dry_run "),
    )


def _seconds(value: str, path: str, what: str = "") -> int:
    if not _SECONDS.fullmatch(value) or int(value) == 0:
        raise invalid(path, f"{what}must be a positive whole number of seconds, not {quoted(value)}")
    return int(value)


def _flag(value: str, path: str, what: str = "") -> bool:
    if value not in _FLAGS:
        raise invalid(path, f"{what}must be 1 or 0, not {quoted(value)}")
    return _FLAGS[value]


def _call_id(parsed: Parsed, _identity: Identity, call: ToolCallDelta) -> str:
    """The third call of a conversation is "get_weather:2": counting on keeps ids unique in the history."""
    n_before = sum(len(message.tool_calls) for message in parsed.request.messages)
    return f"{call.name}:{n_before + call.index}"
