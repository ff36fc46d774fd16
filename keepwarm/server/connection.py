"""What a connection may take in beside bodies that somebody reads: header bytes, time, and how many connections there may be.

uvicorn's httptools protocol bounds none of them, and what it has not parsed to the end the application never sees. Nor does
that see what comes behind a body (trailers, which are dropped) and the rest of a body that was answered before its end. The
few answers made here are made before a mount is known, so they are in the words of the default dialect.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config as UvicornConfig
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from keepwarm.config import Limits
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.dialects import ErrorReply


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with bounds. Subclass with `bounded_http`."""

    limits: Limits
    too_many: bytes  # whole answers
    too_large: bytes
    malformed: bytes

    def __init__(
        self,
        config: UvicornConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._in_headers = True
        self._is_heard = False  # whether the bytes just parsed ended headers or a message, or were of a body
        self._n_unheard_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None  # for headers, or for the rest of a body that nobody reads

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the base class has it
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections_max:
            self._refuse(self.too_many)
            return
        self._await()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_awaiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        if self._deadline is None:
            self._await()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # a trailer would be put among the headers of a request that is being answered
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers, self._is_heard = False, True
        self._stop_awaiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._is_heard = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_heard = True
        self._stop_awaiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._await()  # a client that is still sending reads its answer afterwards

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._is_heard = False
        super().data_received(data)
        self._n_unheard_bytes = 0 if self._is_heard else self._n_unheard_bytes + len(data)
        if self._n_unheard_bytes <= self.limits.header_bytes_max:
            return
        if self._in_headers:
            self._refuse(self.too_large)
        else:  # trailers or the extension of a chunk: its answer may be under way
            self.transport.close()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (the base class's; it says no more than ours)
        self._refuse(self.malformed)

    def _await(self) -> None:
        self._stop_awaiting()
        self._deadline = self.loop.call_later(self.limits.body_read_s_max, self.transport.close)

    def _stop_awaiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, answer: bytes) -> None:
        self._stop_awaiting()
        self.transport.write(answer)
        self.transport.close()


def bounded_http(limits: Limits, render_error: Callable[[ApiError], ErrorReply]) -> type[BoundedHttp]:
    """The protocol class for uvicorn's `http=`; `render_error` is the default dialect's."""
    too_many = ApiError(ErrorKind.OVERLOADED, f"there are {limits.connections_max} connections, which is the limit")
    too_large = ApiError(
        ErrorKind.HEADERS_TOO_LARGE, f"the request's path and headers have more than {limits.header_bytes_max:,} bytes"
    )
    malformed = ApiError(ErrorKind.INVALID_REQUEST, "this is not an HTTP/1.1 request")
    answers = {"too_many": too_many, "too_large": too_large, "malformed": malformed}
    rendered = {name: _raw(render_error(error)) for name, error in answers.items()}
    return type("BoundedHttp", (BoundedHttp,), {"limits": limits, **rendered})


def _raw(reply: ErrorReply) -> bytes:
    headers = [*reply.headers, ("content-type", "application/json"), ("content-length", str(len(reply.body)))]
    lines = "".join(f"{name}: {value}\r\n" for name, value in [*headers, ("connection", "close")])
    return STATUS_LINE[reply.status] + lines.encode("latin-1") + b"\r\n" + reply.body
