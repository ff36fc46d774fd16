"""Golden transcripts: stored inputs, and what each dialect makes of them.

requests/NAME.json   a body (and headers) → under "expect", per dialect, the neutral request or the error
answers/NAME/        input.json (bodies and the turn's events) → per dialect the exact frames (.sse) and whole answer (.http),
                     of Gemini's also the stream that is one array (.array)
conversations/NAME.json  one conversation as a body of each dialect → under "expect", the neutral request that all of them are
caching/NAME.json    a body, a query or stored objects of the cache resource → under "expect", what is parsed or rendered

`python -m tests.golden.regenerate` rewrites the expectations; read the diff before you commit it.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from keepwarm.config import Limits
from keepwarm.core.cache_object import CacheObject, Tag
from keepwarm.core.errors import ApiError
from keepwarm.core.event import Event
from keepwarm.core.request import ChatRequest
from keepwarm.dialects import CacheReport, ChatDialect, ErrorReply, Identity, WireBounds
from keepwarm.dialects.anthropic import AnthropicMessages
from keepwarm.dialects.caching import KimiCaching
from keepwarm.dialects.gemini import GeminiContent
from keepwarm.dialects.gemini_answer import AnswerShape
from keepwarm.dialects.kimi import KimiChat
from keepwarm.dialects.minimax import MiniMaxChat
from keepwarm.dialects.openai import OpenAIChat
from keepwarm.server.exchange import encoded

HERE = Path(__file__).parent
BOUNDS = msgspec.convert(Limits(), WireBounds, from_attributes=True)
IDENTITY = Identity(turn_id="chatcmpl-0a1b2c3d4e5f6g7h8i9j", created=1718680442)
ANTHROPIC_IDENTITY = Identity(turn_id="msg_0a1b2c3d4e5f6g7h8i9j", created=1718680442)
GEMINI_IDENTITY = Identity(turn_id="0a1b2c3d4e5f6g7h8i9j", created=1718680442)
NOW = 1718680500

DIALECTS: dict[str, ChatDialect] = {
    "openai": OpenAIChat(BOUNDS),
    "kimi": KimiChat(BOUNDS),
    "minimax": MiniMaxChat(BOUNDS),
}

ANTHROPIC = AnthropicMessages(BOUNDS)
GEMINI = GeminiContent(BOUNDS)
ALL: dict[str, ChatDialect] = {**DIALECTS, "anthropic": ANTHROPIC, "gemini": GEMINI}


class AnswerInput(msgspec.Struct):
    """The events of a turn, the cache object it used, if it used one, and the request's body.

    `body` is what the dialects in OpenAI's shape read, those in `not_in` excepted, `anthropic` what Anthropic's does and
    `gemini` what Gemini's does. A dialect without a body renders nothing.
    """

    events: list[Event]
    body: dict[str, Any] | None = None
    anthropic: dict[str, Any] | None = None
    gemini: dict[str, Any] | None = None
    report: CacheReport | None = None
    not_in: tuple[str, ...] = ()


def expectations() -> Iterator[tuple[Path, str]]:
    """Every stored file with the text it should hold."""
    for path in sorted((HERE / "requests").glob("*.json")):
        yield path, _pretty(_request(msgspec.json.decode(path.read_bytes())))
    for path in sorted((HERE / "answers").glob("*/input.json")):
        case = msgspec.json.decode(path.read_bytes(), type=AnswerInput)
        for name, dialect in DIALECTS.items():
            if case.body is not None and name not in case.not_in:
                yield path.with_name(f"{name}.sse"), _streamed(dialect, case, case.body, IDENTITY)
                yield path.with_name(f"{name}.http"), _whole(dialect, case, case.body, IDENTITY)
        if case.anthropic is not None:
            if case.anthropic["max_tokens"]:  # warming cannot be streamed
                yield path.with_name("anthropic.sse"), _streamed(ANTHROPIC, case, case.anthropic, ANTHROPIC_IDENTITY)
            yield path.with_name("anthropic.http"), _whole(ANTHROPIC, case, case.anthropic, ANTHROPIC_IDENTITY)
        if case.gemini is not None:
            yield path.with_name("gemini.sse"), _gemini_streamed(case, case.gemini, "events")
            yield path.with_name("gemini.array"), _gemini_streamed(case, case.gemini, "array")
            yield path.with_name("gemini.http"), _whole(GEMINI, case, case.gemini, GEMINI_IDENTITY)
    for path in sorted((HERE / "conversations").glob("*.json")):
        conversation = msgspec.json.decode(path.read_bytes())
        name, body = next(iter(conversation["bodies"].items()))
        yield path, _pretty(conversation | {"expect": msgspec.to_builtins(neutral(name, body))})
    for path in sorted((HERE / "caching").glob("*.json")):
        yield path, _pretty(_caching(msgspec.json.decode(path.read_bytes())))


def _request(case: dict[str, Any]) -> dict[str, Any]:
    body = msgspec.json.encode(case["body"])
    headers = case.get("headers", {})
    case["expect"] = {
        name: _outcome(dialect.render_error, lambda dialect=dialect: dialect.parse_chat(headers, body))
        for name, dialect in DIALECTS.items()
    }
    return case


def neutral(name: str, body: dict[str, Any]) -> ChatRequest:
    """What dialect `name` makes of a conversation; lifetimes of marks aside, since OpenAI's have none."""
    request = ALL[name].parse_chat({}, msgspec.json.encode(body)).request
    text = msgspec.json.encode(request, order="deterministic").decode()
    return msgspec.json.decode(re.sub(r'"ttl_s":\d+', '"ttl_s":null', text), type=ChatRequest)


def _streamed(dialect: ChatDialect, case: AnswerInput, body: dict[str, Any], identity: Identity) -> str:
    parsed = dialect.parse_chat({}, msgspec.json.encode(body | {"stream": True}))
    renderer = dialect.renderer(parsed, identity)
    frames = [frame for event in case.events for frame in renderer.feed(event)]
    return "".join(encoded(frame).decode() for frame in frames)


def _gemini_streamed(case: AnswerInput, body: dict[str, Any], shape: AnswerShape) -> str:
    """The model is in the path there and the way of streaming in the query."""
    parsed = GEMINI.parse_generate(body["model"], shape, msgspec.json.encode(body))
    renderer = GEMINI.renderer(parsed, GEMINI_IDENTITY)
    frames = [frame for event in case.events for frame in renderer.feed(event)]
    return "".join((frame.data if frame.is_raw else encoded(frame)).decode() for frame in frames)


def _whole(dialect: ChatDialect, case: AnswerInput, body: dict[str, Any], identity: Identity) -> str:
    parsed = dialect.parse_chat({}, msgspec.json.encode({k: v for k, v in body.items() if k != "stream_options"}))
    renderer = dialect.renderer(parsed, identity)
    for event in case.events:
        assert renderer.feed(event) == []
    try:
        reply = ErrorReply(200, renderer.whole(), dialect.reply_headers(case.report) if case.report else ())
    except ApiError as error:
        reply = dialect.render_error(error, identity.turn_id)
    headers = "".join(f"{name}: {value}\n" for name, value in reply.headers)
    return f"{reply.status}\n{headers}\n{reply.body.decode()}\n"


def _caching(case: dict[str, Any]) -> dict[str, Any]:
    caching = KimiCaching(BOUNDS)
    parse: dict[str, Callable[[], object]] = {
        "create": lambda: caching.parse_create(msgspec.json.encode(case["create"])),
        "update": lambda: caching.parse_update(msgspec.json.encode(case["update"])),
        "tag": lambda: caching.parse_tag(msgspec.json.encode(case["tag"])),
        "list": lambda: caching.parse_list([(key, value) for key, value in case["list"]]),
    }
    for verb, function in parse.items():
        if verb in case:
            case["expect"] = _outcome(DIALECTS["kimi"].render_error, function)
    if "objects" in case:
        objects = msgspec.convert(case["objects"], list[CacheObject])
        case["expect"] = msgspec.json.decode(caching.render_list(objects, NOW, has_more=False))
    if "tags" in case:
        tags = msgspec.convert(case["tags"], list[Tag])
        case["expect"] = msgspec.json.decode(caching.render_tags(tags, has_more=True))
    return case


def _outcome(render_error: Callable[[ApiError], ErrorReply], parse: Callable[[], object]) -> Any:
    try:
        return msgspec.to_builtins(parse())
    except ApiError as error:
        reply = render_error(error)
        return {"status": reply.status, "body": msgspec.json.decode(reply.body)}


def _pretty(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"
