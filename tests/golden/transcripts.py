"""Golden transcripts: stored inputs, and what each dialect makes of them.

requests/NAME.json   a body (and headers) → under "expect", per dialect, the neutral request or the error
answers/NAME/        input.json (a body and the turn's events) → per dialect the exact frames (.sse) and whole answer (.http)
caching/NAME.json    a body, a query or stored objects of the cache resource → under "expect", what is parsed or rendered

`python -m tests.golden.regenerate` rewrites the expectations; read the diff before you commit it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from keepwarm.config import Limits
from keepwarm.core.cache_object import CacheObject, Tag
from keepwarm.core.errors import ApiError
from keepwarm.core.event import Event
from keepwarm.dialects import CacheReport, ChatDialect, ErrorReply, Identity, WireBounds
from keepwarm.dialects.caching import KimiCaching
from keepwarm.dialects.kimi import KimiChat
from keepwarm.dialects.minimax import MiniMaxChat
from keepwarm.dialects.openai import OpenAIChat

HERE = Path(__file__).parent
BOUNDS = msgspec.convert(Limits(), WireBounds, from_attributes=True)
IDENTITY = Identity(turn_id="chatcmpl-0a1b2c3d4e5f6g7h8i9j", created=1718680442)
NOW = 1718680500

DIALECTS: dict[str, ChatDialect] = {
    "openai": OpenAIChat(BOUNDS),
    "kimi": KimiChat(BOUNDS),
    "minimax": MiniMaxChat(BOUNDS),
}


class AnswerInput(msgspec.Struct):
    """A request body, the events of its turn, and the cache object it used, if it used one.

    `not_in` are the dialects that refuse such a body.
    """

    body: dict[str, Any]
    events: list[Event]
    report: CacheReport | None = None
    not_in: tuple[str, ...] = ()


def expectations() -> Iterator[tuple[Path, str]]:
    """Every stored file with the text it should hold."""
    for path in sorted((HERE / "requests").glob("*.json")):
        yield path, _pretty(_request(msgspec.json.decode(path.read_bytes())))
    for path in sorted((HERE / "answers").glob("*/input.json")):
        case = msgspec.json.decode(path.read_bytes(), type=AnswerInput)
        for name, dialect in DIALECTS.items():
            if name in case.not_in:
                continue
            yield path.with_name(f"{name}.sse"), _streamed(dialect, case)
            yield path.with_name(f"{name}.http"), _whole(dialect, case)
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


def _streamed(dialect: ChatDialect, case: AnswerInput) -> str:
    parsed = dialect.parse_chat({}, msgspec.json.encode(case.body | {"stream": True}))
    renderer = dialect.renderer(parsed, IDENTITY)
    frames = [frame for event in case.events for frame in renderer.feed(event)]
    return "".join(f"data: {frame.data.decode()}\n\n" for frame in frames)


def _whole(dialect: ChatDialect, case: AnswerInput) -> str:
    body = {key: value for key, value in case.body.items() if key != "stream_options"}
    parsed = dialect.parse_chat({}, msgspec.json.encode(body))
    renderer = dialect.renderer(parsed, IDENTITY)
    for event in case.events:
        assert renderer.feed(event) == []
    try:
        reply = ErrorReply(200, renderer.whole(), dialect.reply_headers(case.report) if case.report else ())
    except ApiError as error:
        reply = dialect.render_error(error)
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
