"""One HTTP request and its answer, in plain ASGI: bounded body, whole replies, event streams, the client going away.

Invariant: at most one response is begun. What fails before that is answered with an HTTP status; what fails after it is
the last frame of the stream.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence
from typing import TypeVar

from blake3 import blake3
from starlette.types import Message, Receive, Scope, Send

from keepwarm.config import Limits
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.principal import Principal
from keepwarm.dialects import ErrorReply, Frame
from keepwarm.gateway.phases import Phases

JSON_TYPE = "application/json"
EVENT_STREAM_TYPE = "text/event-stream; charset=utf-8"
KEEPALIVE = b": keepalive\n\n"  # a comment: clients skip it, proxies see a live connection
IDEMPOTENCY_HEADER = "idempotency-key"
PACE_BYTES = 1 << 20  # of an upload, within `body_read_s_max`: 17 kB/s, as slow as a modem

T = TypeVar("T")
Headers = Sequence[tuple[str, str]]


class Exchange:
    """What endpoints see of a request, and how they answer it."""

    __slots__ = (
        "_limits",
        "_principal",
        "_receive",
        "_send",
        "body_digest",
        "error_headers",
        "headers",
        "log_fields",
        "method",
        "path",
        "path_params",
        "phases",
        "query_string",
        "scheme",
        "status",
        "tenant",
        "turn_id",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, turn_id: str, phases: Phases, limits: Limits
    ) -> None:
        self._receive = receive
        self._send = send
        self._limits = limits
        self.turn_id = turn_id
        self.phases = phases
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.method: str = scope["method"]
        self.scheme: str = scope["scheme"]
        self.path: str = scope["path"]  # with the mount's
        self.path_params: dict[str, str] = scope.get("path_params", {})
        self.query_string: bytes = scope["query_string"]
        self.tenant = ""  # where what is cached for the caller is; "" before he is known
        self._principal: Principal | None = None
        self.error_headers: Headers = ()  # beside those of the error itself, if there is one
        self.body_digest = b""  # of path and body, where the client means to repeat the request
        self.status: int | None = None  # of the response once it has begun
        self.log_fields: dict[str, str | int | float] = {}

    @property
    def principal(self) -> Principal:
        """Who is calling. Only where the route wanted a key, and got one."""
        assert self._principal is not None, "nobody was identified"
        return self._principal

    def identify(self, principal: Principal) -> None:
        """The caller is known now."""
        self._principal = principal
        self.tenant = principal.tenant

    async def body(self) -> bytes:
        """The whole request body. Raises ApiError: BODY_TOO_LARGE, TIMEOUT, CLIENT_CLOSED."""
        limits = self._limits
        self._check_announced(limits.body_bytes_max)
        chunks: list[bytes] = []
        n_bytes = 0
        try:
            async with asyncio.timeout(limits.body_read_s_max):
                while True:
                    message = await self._receive()
                    chunks.append(_body_of(message))
                    n_bytes += len(chunks[-1])
                    if n_bytes > limits.body_bytes_max:
                        raise _too_large(n_bytes, limits.body_bytes_max)
                    if not message.get("more_body", False):
                        return self._digested(b"".join(chunks))
        except TimeoutError as exc:
            message_text = f"the request body did not arrive within {limits.body_read_s_max:g} s"
            raise ApiError(ErrorKind.TIMEOUT, message_text) from exc

    async def pieces(self, bytes_max: int) -> AsyncGenerator[bytes, None]:
        """The request body as it arrives; nothing is read ahead of who takes it.

        Its time is bounded as a whole body's is, for every `PACE_BYTES` of it: so long the client may take to send them,
        not counting what is done with them here. Raises ApiError: BODY_TOO_LARGE, TIMEOUT, CLIENT_CLOSED.
        """
        self._check_announced(bytes_max)
        loop = asyncio.get_running_loop()
        left_s, n_paced, n_bytes = self._limits.body_read_s_max, 0, 0
        more = True
        while more:
            began = loop.time()
            try:
                async with asyncio.timeout(left_s):
                    message = await self._receive()
            except TimeoutError as exc:
                pace = (
                    f"{PACE_BYTES:,} bytes of the request body did not arrive within {self._limits.body_read_s_max:g} s"
                )
                raise ApiError(ErrorKind.TIMEOUT, pace) from exc
            piece = _body_of(message)
            more = message.get("more_body", False)
            left_s -= loop.time() - began
            n_bytes += len(piece)
            n_paced += len(piece)
            if n_bytes > bytes_max:
                raise _too_large(n_bytes, bytes_max)
            if n_paced >= PACE_BYTES:
                left_s, n_paced = self._limits.body_read_s_max, 0
            if piece:
                yield piece

    async def disconnected(self) -> None:
        """Returns when the client has gone away. Only after `body`."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """What `work` returns or raises; a client that goes away cancels it. Only after `body`.

        Raises ApiError(CLIENT_CLOSED), when `work` has cleaned up.
        """

        async def watch() -> None:
            await self.disconnected()
            raise ApiError(ErrorKind.CLIENT_CLOSED, "the client closed the connection")

        try:
            async with asyncio.TaskGroup() as tasks:
                watcher = tasks.create_task(watch())
                result = await work
                watcher.cancel()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return result

    async def reply(
        self, body: bytes, *, status: int = 200, headers: Headers = (), content_type: str = JSON_TYPE
    ) -> None:
        """A whole answer."""
        await self._begin(status, [("content-type", content_type), ("content-length", str(len(body))), *headers])
        await self._write(body, more=False)

    async def reply_error(self, reply: ErrorReply, headers: Headers = ()) -> None:
        await self.reply(reply.body, status=reply.status, headers=[*reply.headers, *headers])

    async def begin_events(self, headers: Headers = (), content_type: str = EVENT_STREAM_TYPE) -> None:
        """Begin a stream, of events unless another type is said. `x-accel-buffering` keeps nginx from collecting it."""
        fixed = (("content-type", content_type), ("cache-control", "no-cache"), ("x-accel-buffering", "no"))
        await self._begin(200, [*fixed, *headers])

    async def write_events(self, data: bytes, *, more: bool) -> None:
        await self._write(data, more=more)

    def _digested(self, body: bytes) -> bytes:
        if IDEMPOTENCY_HEADER in self.headers:
            self.body_digest = blake3(body, key=blake3(self.path.encode()).digest()).digest()
        return body

    def _check_announced(self, bytes_max: int) -> None:
        announced = self.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > bytes_max:
            raise _too_large(int(announced), bytes_max)

    async def _begin(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        assert self.status is None, "a response has begun already"
        self.status = status
        message: Message = {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"x-request-id", self.turn_id.encode()),
                (b"request-id", self.turn_id.encode()),  # Anthropic's name for it
                *_server_timing(self.phases),
                *((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers),
            ],
        }
        await self._send(message)

    async def _write(self, body: bytes, *, more: bool) -> None:
        """Raises TimeoutError when the client does not take the bytes: it may be slow, but not stop for ever."""
        async with asyncio.timeout(self._limits.body_read_s_max):
            await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _body_of(message: Message) -> bytes:
    """Raises ApiError(CLIENT_CLOSED)."""
    if message["type"] == "http.disconnect":
        raise ApiError(ErrorKind.CLIENT_CLOSED, "the client closed the connection")
    body: bytes = message.get("body", b"")
    return body


def encoded(frame: Frame) -> bytes:
    """A frame as it stands in an event stream. Frames are one line: JSON text has no bare line breaks."""
    if frame.is_raw:
        return frame.data
    if frame.name is None:
        return b"data: " + frame.data + b"\n\n"
    return b"event: " + frame.name.encode() + b"\ndata: " + frame.data + b"\n\n"


def _server_timing(phases: Phases) -> list[tuple[bytes, bytes]]:
    """The gateway's own phases so far, in milliseconds."""
    if not phases.ms:
        return []
    return [(b"server-timing", ", ".join(f"{name};dur={ms:.3f}" for name, ms in phases.ms.items()).encode())]


def _too_large(n_bytes: int, limit: int) -> ApiError:
    return ApiError(ErrorKind.BODY_TOO_LARGE, f"the request body has {n_bytes:,} bytes or more, limit {limit:,}")
