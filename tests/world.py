"""A whole gateway in one process for tests: real storage, templating, services and edge; only engine, clock and ids are ours.

`World` drives it over plain ASGI, so a test sees every chunk as it is sent and can go away in the middle.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import structlog
from msgspec.structs import replace
from structlog.testing import LogCapture

from keepwarm.app import Gateway, Model, gateway
from keepwarm.cache.render import Templating
from keepwarm.config import CacheConfig, Config, Limits, ModelConfig
from keepwarm.core.principal import Principal, Role
from keepwarm.engine.scripted import ScriptedVocab
from keepwarm.storage import Storage, database_path
from keepwarm.telemetry import Log
from tests.engines import StepEngine

CONFIG = Config(
    dev=True,
    model=ModelConfig(name="small", engine="scripted"),
    cache=CacheConfig(auto_tokens_min=64, disk_bytes=0),
    limits=Limits(turns_max=8, turns_per_organisation_max=6),
)

HANG_S = 60.0  # a hang is a failure
DURABLE = replace(CONFIG, cache=replace(CONFIG.cache, disk_bytes=1 << 30))  # leases outlive the engine


class FakeClock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0
        self.monotonic_s = 0.0

    def now(self) -> float:
        return self.now_s

    def monotonic(self) -> float:
        return self.monotonic_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self.monotonic_s += seconds


class CountingIds:
    """cache-00000000000000000001, …: unique, and as long as the real ones."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def new(self, prefix: str) -> str:
        return f"{prefix}{next(self._numbers):020}"


@dataclass
class Answer:
    """A complete HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def events(self) -> list[Any]:
        """Decoded data of a server-sent event stream, without comments and [DONE]."""
        lines = self.body.decode().splitlines()
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [msgspec.json.decode(text) for text in data if text != "[DONE]"]

    @property
    def text(self) -> str:
        """The answer's text, of choice 0, streamed or whole."""
        if self.headers["content-type"].startswith("text/event-stream"):
            deltas = [choice["delta"] for event in self.events for choice in event.get("choices", [])]
            return "".join(delta.get("content") or "" for delta in deltas)
        return str(self.json()["choices"][0]["message"]["content"])


@dataclass
class Call:
    """A request under way."""

    task: asyncio.Task[None]
    sent: list[Any]
    gone: asyncio.Event
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def disconnect(self) -> None:
        """The client goes away."""
        self.gone.set()

    @property
    def has_begun(self) -> bool:
        return bool(self.sent)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    async def until(self, text: bytes) -> None:
        """Wait until the body has `text` in it."""
        while text not in self.body:
            assert not self.task.done(), self.body
            self.changed.clear()
            await self.changed.wait()

    async def answer(self) -> Answer:
        await self.task
        start = self.sent[0]
        assert start["type"] == "http.response.start"
        assert self.sent[-1].get("more_body", False) is False
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], headers, self.body)


@dataclass
class World:
    """The gateway and everything around it."""

    running: Gateway
    engine: StepEngine
    clock: FakeClock
    storage: Storage
    logged: list[Any]
    tasks: asyncio.TaskGroup
    config: Config

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str | None = "k1",
        headers: Mapping[str, str] | None = None,
        chunks: list[bytes] | None = None,
    ) -> Call:
        """Begin a request. `body` is sent as JSON, bytes as they are; `chunks` in pieces, an unfinished body if empty."""
        path, _, query = path.partition("?")
        raw = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        fields = {
            "content-type": "application/json",
            **({"authorization": f"Bearer {key}"} if key else {}),
            **(headers or {}),
        }
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
        }
        pieces = [raw] if chunks is None else list(chunks)
        call = Call(None, [], asyncio.Event())  # type: ignore[arg-type]  # set below

        async def receive() -> dict[str, object]:
            if pieces:
                piece = pieces.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(pieces) or chunks == [piece]}
            await call.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            call.sent.append(message)
            call.changed.set()

        call.task = self.tasks.create_task(self.running.app(scope, receive, send))
        return call

    async def request(self, method: str, path: str, body: object = None, **options: Any) -> Answer:
        """A whole request."""
        return await self.call(method, path, body, **options).answer()

    async def chat(self, text: str = "hello", *, path: str = "/v1/chat/completions", **fields: Any) -> Answer:
        """One question."""
        options = {name: fields.pop(name) for name in ("key", "headers") if name in fields}
        body = {"model": "small", "messages": [{"role": "user", "content": text}], **fields}
        return await self.request("POST", path, body, **options)

    async def create_cache(self, text: str = "a long text", *, key: str = "k1", **fields: Any) -> Any:
        """A ready cache object, as the server tells it."""
        body = {"model": "small", "messages": [{"role": "system", "content": text}], **fields}
        created = await self.request("POST", "/v1/caching", body, key=key)
        assert created.status == 200, created.body
        return created.json()

    async def cache(self, object_id: str, *, key: str = "k1") -> Any:
        return (await self.request("GET", f"/v1/caching/{object_id}", key=key)).json()

    async def ready_cache(self, text: str = "a long text", *, key: str = "k1", **fields: Any) -> Any:
        created = await self.create_cache(text, key=key, **fields)
        return await self.settled(created["id"], key=key)

    async def settled(self, object_id: str, *, key: str = "k1") -> Any:
        """The object once it is no longer pending."""
        while True:
            told = await self.cache(object_id, key=key)
            if told["status"] != "pending":
                return told

    def assert_clean(self) -> None:
        """Nothing is held: no permit, no lease, no run."""
        assert self.running.turns.n_turns == 0
        assert self.engine.is_clean


def developer(tenant: str) -> Principal:
    """Who calls with --dev, as this tenant: limited and billed by nobody."""
    return Principal(tenant, tenant, "default", None, "dev", Role.OPERATOR)


async def until(condition: Callable[[], bool]) -> None:
    """Let the others run until `condition` holds."""
    async with asyncio.timeout(HANG_S):
        while not condition():  # noqa: ASYNC110 - any state of the engine can be asked, not only those with an event
            await asyncio.sleep(0)


def capturing_log() -> tuple[Log, list[Any]]:
    capture = LogCapture()
    log: Log = structlog.wrap_logger(
        None,
        processors=[capture],
        wrapper_class=structlog.make_filtering_bound_logger(0),
        cache_logger_on_first_use=True,
    )
    return log, capture.entries


def no_grammar(schema: str) -> str:
    raise ValueError("no grammars in this test")


@asynccontextmanager
async def world(data_dir: Path, *, config: Config = CONFIG, engine: StepEngine | None = None) -> AsyncIterator[World]:
    """A running gateway with its data in `data_dir`; a second one over the same directory is a restart.

    The engine has no disk tier (`config`), so its leases end with it; see `DURABLE`.
    """
    log, logged = capturing_log()
    clock, engine = FakeClock(), engine or StepEngine()
    storage = await asyncio.to_thread(Storage.open, database_path(data_dir), config.limits.db_busy_s_max)
    templating = Templating(ScriptedVocab(), fragment_cache_bytes=config.limits.fragment_cache_bytes)
    model = Model(templating, no_grammar, engine)
    try:
        async with (
            gateway(config, model, storage, clock, CountingIds(), log) as running,
            asyncio.TaskGroup() as tasks,
        ):
            yield World(running, engine, clock, storage, logged, tasks, config)
    finally:
        await asyncio.to_thread(storage.close)
