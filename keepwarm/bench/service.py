"""The server as the benches use it: in processes of its own, reached over HTTP, watched through /health."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape

from keepwarm.bench import BenchError
from keepwarm.bench.client import Answer, Connection, connected
from keepwarm.core.clock import Clock
from keepwarm.engine import EngineStatus
from keepwarm.launch import HOST, LaunchError, ServerProcess, ending_on_sigterm, serving

MODEL, FAMILY = "moonshot-v1-8k", "moonshot-v1"
TTL_S = 3600
POLL_S = 0.05
QUIET_POLLS = 4  # so many looks in a row without a change: what ran is over, storing included
WAIT_S_MAX = 600.0


class _Health(Struct):
    engine: EngineStatus
    n_turns: int


class CacheObject(Struct, frozen=True):
    """A cache object as far as the bench looks at it."""

    id: str
    status: str
    tokens: int


class Service:
    """One tenant's view of a running server."""

    def __init__(self, port: int, key: str, clock: Clock) -> None:
        self._port, self._key, self._clock = port, key, clock

    @asynccontextmanager
    async def connect(self, n: int = 1) -> AsyncIterator[list[Connection]]:
        """`n` connections, each used once already: clients keep theirs, so accepting one is in no measurement."""
        async with AsyncExitStack() as open_ones:
            connections = [
                await open_ones.enter_async_context(connected(HOST, self._port, self._key, self._clock))
                for _ in range(n)
            ]
            for connection in connections:
                await connection.call_ok("GET", "/health")
            yield connections

    async def ask(self, messages: list[dict[str, str]], max_tokens: int) -> Answer:
        """One streamed answer at temperature 0, over a connection of its own."""
        async with self.connect() as [connection]:
            return await connection.stream_chat(chat_body(messages, max_tokens, stream=True))

    async def ask_together(self, conversations: list[list[dict[str, str]]], max_tokens: int) -> list[Answer]:
        """All at once, each over a connection of its own."""
        async with self.connect(len(conversations)) as connections:
            return await asyncio.gather(
                *(
                    connection.stream_chat(chat_body(messages, max_tokens, stream=True))
                    for connection, messages in zip(connections, conversations, strict=True)
                )
            )

    async def status(self) -> EngineStatus:
        return (await self._health()).engine

    async def idle(self) -> EngineStatus:
        """Wait until nothing runs and the counters stand still. Raises BenchError."""
        deadline, last, n_quiet = self._clock.monotonic() + WAIT_S_MAX, await self._health(), 0
        while n_quiet < QUIET_POLLS:
            if self._clock.monotonic() > deadline:
                raise BenchError(f"the server was still busy after {WAIT_S_MAX:.0f} s")
            await asyncio.sleep(POLL_S)
            health = await self._health()
            busy = health.n_turns or health.engine.n_running or health.engine.n_queued
            n_quiet = 0 if busy or health.engine != last.engine else n_quiet + 1
            last = health
        return last.engine

    async def create_object(self, context: str) -> CacheObject:
        """A cache object that is ready. Raises BenchError."""
        messages = [{"role": "system", "content": context}]
        body = {"model": FAMILY, "messages": messages, "name": "bench", "ttl": TTL_S}
        async with self.connect() as [connection]:
            reply = await connection.call_ok("POST", "/v1/caching", msgspec.json.encode(body))
            made = msgspec.json.decode(reply.body, type=CacheObject)
            deadline = self._clock.monotonic() + WAIT_S_MAX
            while made.status == "pending" and self._clock.monotonic() < deadline:
                await asyncio.sleep(POLL_S)
                made = msgspec.json.decode(
                    (await connection.call_ok("GET", f"/v1/caching/{made.id}")).body, type=CacheObject
                )
        if made.status != "ready":
            raise BenchError(f"the cache object is {made.status} instead of ready")
        return made

    async def delete_object(self, object_id: str) -> None:
        async with self.connect() as [connection]:
            await connection.call_ok("DELETE", f"/v1/caching/{object_id}")

    async def _health(self) -> _Health:
        async with connected(HOST, self._port, self._key, self._clock) as connection:
            reply = await connection.call_ok("GET", "/health")
        return msgspec.json.decode(reply.body, type=_Health)


def chat_body(messages: list[dict[str, str]], max_tokens: int, *, stream: bool) -> bytes:
    """The body of a chat completion."""
    return msgspec.json.encode(
        {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": stream}
    )


@contextmanager
def running_server(data_dir: Path, config_file: Path | None, console: Console, clock: Clock) -> Iterator[ServerProcess]:
    """A ready development server of our own. Raises BenchError, with its last words printed."""
    options = () if config_file is None else ("--config", str(config_file))
    with ending_on_sigterm(), serving(data_dir, clock, options) as server:
        try:
            with console.status("starting a server") as status:
                server.wait_ready(lambda detail: status.update(f"starting a server: {escape(detail)}"))
            yield server
        except (LaunchError, BenchError, OSError) as error:
            console.print(server.log_tail(), style="dim", markup=False, highlight=False)
            raise BenchError(str(error)) from error
