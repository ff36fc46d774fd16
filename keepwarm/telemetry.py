"""Log lines: one event per line, as JSON for machines or coloured text for people. No prompt text, no keys.

structlog's own configuration is the only process-wide state; whoever logs is handed a `Log`.
"""

import logging
import sys
import traceback
from typing import Literal

import msgspec
import structlog

Log = structlog.typing.FilteringBoundLogger


def configure(log_format: Literal["auto", "console", "json"]) -> Log:
    """Set up structlog and return the root logger. "auto" is console on a terminal, JSON elsewhere."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    common: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if console:
        common += [_printable, structlog.dev.ConsoleRenderer()]
    else:
        common.append(structlog.processors.JSONRenderer(serializer=_as_json))
    structlog.configure(
        processors=common,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr)
        if console
        else structlog.BytesLoggerFactory(file=sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
    log: Log = structlog.get_logger()
    return log


def _as_json(line: structlog.typing.EventDict, **_options: object) -> bytes:
    return msgspec.json.encode(line)


def _printable(_log: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """A terminal obeys what it is sent, and a model's name is a client's text: what does not print is escaped."""
    return {
        name: value.encode("unicode_escape").decode("ascii")
        if isinstance(value, str) and not value.isprintable()
        else value
        for name, value in line.items()
    }


def where(exc: BaseException) -> list[str]:
    """The places an exception came through, innermost last: no message and no values, those may hold a client's text."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(exc.__traceback__)]
