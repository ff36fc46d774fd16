"""A lean HTTP/1.1 client over asyncio streams that notes when things arrive; it costs less than what it measures."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType

import msgspec
from msgspec import Struct

from keepwarm.bench import BenchError
from keepwarm.bench.sse import Frame, Usage, read_frame, read_timings, split_events
from keepwarm.core.clock import Clock

CHAT_PATH = "/v1/chat/completions"
TIMINGS_HEADER = "x-keepwarm-timings"
SNIPPET_BYTES = 300
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Answer(Struct, frozen=True):
    """A streamed answer. Times in seconds of the clock given; `texts_at` has one for each frame that brought text."""

    sent_at: float
    first_at: float
    finished_at: float
    ended_at: float
    texts_at: tuple[float, ...]
    usage: Usage
    timings: dict[str, float]

    @property
    def ttft_ms(self) -> float:
        return (self.first_at - self.sent_at) * 1000

    @property
    def ended_ms(self) -> float:
        """Until the stream had ended, not only the answer."""
        return (self.ended_at - self.sent_at) * 1000

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of the tokens behind the first; None when there are none."""
        n, spent_s = self.usage.completion_tokens - 1, self.finished_at - self.first_at
        return n / spent_s if n > 0 and spent_s > 0 else None


class Stream(Struct, frozen=True):
    """A streamed answer that has begun: its events as they arrive, each with the clock's time."""

    sent_at: float
    headers: dict[str, str]
    events: AsyncIterator[tuple[float, bytes]]


class Reply(Struct, frozen=True):
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    ms: float

    @property
    def timings(self) -> dict[str, float]:
        """The phases, where they were asked for."""
        return msgspec.json.decode(self.headers[TIMINGS_HEADER], type=dict[str, float])


class Connection:
    """One kept-alive connection; one request at a time."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, key: str, clock: Clock
    ) -> None:
        self._reader, self._writer, self._clock = reader, writer, clock
        self._fixed = f"host: {host}\r\nauthorization: Bearer {key}\r\n"

    async def call(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = NO_HEADERS) -> Reply:
        """A request and its whole answer, whatever the status."""
        sent_at = self._clock.monotonic()
        status, found = await self._send(method, path, body, headers)
        payload = b"".join([part async for part in self._parts(found)])
        return Reply(status, found, payload, (self._clock.monotonic() - sent_at) * 1000)

    async def call_ok(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = NO_HEADERS
    ) -> Reply:
        """Raises BenchError for any status but 200."""
        reply = await self.call(method, path, body, headers)
        if reply.status != 200:
            raise _refused(path, reply.status, reply.body)
        return reply

    async def stream_chat(self, body: bytes) -> Answer:
        """A streamed chat completion with its timings. Raises BenchError."""
        stream = await self.stream(CHAT_PATH, body)
        texts_at: list[float] = []
        last: Frame | None = None
        finished_at, usage, timings = 0.0, None, None
        async for now, event in stream.events:
            timings = read_timings(event) or timings
            frame = read_frame(event)
            if frame is None:
                continue
            if frame.has_text:
                texts_at.append(now)
            if frame.is_last:
                last, finished_at = frame, now
            usage = frame.usage or usage
        if last is None or usage is None or timings is None:
            raise BenchError("a stream of the server ended without a finish, usage or timings; see its log")
        first_at = texts_at[0] if texts_at else finished_at
        ended_at = self._clock.monotonic()
        return Answer(stream.sent_at, first_at, finished_at, ended_at, tuple(texts_at), usage, timings)

    async def stream(self, path: str, body: bytes) -> Stream:
        """A streamed answer of any dialect, with its timings at the end; to be read to its end. Raises BenchError."""
        sent_at = self._clock.monotonic()
        status, found = await self._send("POST", path, body, {TIMINGS_HEADER: "1"})
        if status != 200:
            raise _refused(path, status, b"".join([part async for part in self._parts(found)]))
        return Stream(sent_at, found, self._events(found))

    def close(self) -> None:
        self._writer.close()

    async def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str]]:
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        length = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body else ""
        self._writer.write(f"{method} {path} HTTP/1.1\r\n{self._fixed}{length}{more}\r\n".encode("latin-1") + body)
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as exc:
            raise BenchError("the server closed a connection; see its log") from exc
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        return int(first.split(" ", 2)[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}

    async def _events(self, headers: Mapping[str, str]) -> AsyncIterator[tuple[float, bytes]]:
        rest = b""
        async for part in self._parts(headers):
            now = self._clock.monotonic()
            events, rest = split_events(rest + part)
            for event in events:
                yield now, event

    async def _parts(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The body as it arrives."""
        reader = self._reader
        if headers.get("transfer-encoding") != "chunked":
            yield await reader.readexactly(int(headers.get("content-length", "0")))
            return
        while n := int(await reader.readuntil(b"\r\n"), 16):
            part = await reader.readexactly(n + 2)
            yield part[:-2]
        await reader.readuntil(b"\r\n")


@asynccontextmanager
async def connected(host: str, port: int, key: str, clock: Clock) -> AsyncIterator[Connection]:
    """A connection for as long as the context lasts; `key` is its tenant on a development server."""
    reader, writer = await asyncio.open_connection(host, port)
    connection = Connection(reader, writer, f"{host}:{port}", key, clock)
    try:
        yield connection
    finally:
        connection.close()


def _refused(path: str, status: int, body: bytes) -> BenchError:
    return BenchError(f"{path} was answered with {status}: {body[:SNIPPET_BYTES].decode(errors='replace')}")
