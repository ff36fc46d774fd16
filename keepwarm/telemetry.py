"""Log lines: one event per line, as JSON for machines or coloured text for people. No prompt text, no keys.

structlog's own configuration is the only process-wide state; whoever logs is handed a `Log`.
"""

import logging
import sys
import traceback
from typing import Literal

import structlog

Log = structlog.typing.FilteringBoundLogger


def configure(log_format: Literal["auto", "console", "json"]) -> Log:
    """Set up structlog and return the root logger. "auto" is console on a terminal, JSON elsewhere."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    log: Log = structlog.get_logger()
    return log


def where(exc: BaseException) -> list[str]:
    """The places an exception came through, innermost last: no message and no values, those may hold a client's text."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(exc.__traceback__)]
