"""The calls on files over plain ASGI, with real storage and disk; only documents' reader, clock and ids are ours."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.routing import Route as Path_

from keepwarm.config import Config, Limits
from keepwarm.core.clock import RandomIds
from keepwarm.dialects import WireBounds
from keepwarm.dialects.gemini import GeminiContent
from keepwarm.dialects.gemini_files import GeminiFiles
from keepwarm.dialects.kimi import KimiChat
from keepwarm.dialects.kimi_files import KimiFiles
from keepwarm.documents import DocumentFault, Order
from keepwarm.documents.extraction import Document
from keepwarm.gateway.auth import DevAuth
from keepwarm.gateway.file_disk import FileDisk
from keepwarm.gateway.file_rows import FileRows
from keepwarm.gateway.files import Files
from keepwarm.gateway.reading import Reading
from keepwarm.gateway.runtime import Runtime
from keepwarm.server.endpoints import Services
from keepwarm.server.routes import Operation, PathCalls
from keepwarm.server.uploads import (
    Entry,
    GeminiFileCalls,
    KimiFileCalls,
    gemini_discovery_entries,
    gemini_file_entries,
    gemini_upload_entries,
    kimi_file_entries,
)
from keepwarm.storage import Storage, database_path
from tests.world import Answer, FakeClock, capturing_log

MOUNT = "/gemini"


async def read(order: Order, document: Document, s_max: float, environment: Mapping[str, str]) -> str:
    """A document is its bytes; one that begins with "no" cannot be read."""
    data = document if isinstance(document, bytes) else b"".join([piece async for piece in document])
    if data.startswith(b"no"):
        raise DocumentFault("is encrypted")
    return data.decode("utf-8", "replace")


@dataclasses.dataclass
class Site:
    """The server."""

    app: Starlette
    files: Files
    clock: FakeClock
    directory: Path
    logged: list[Any]

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | Sequence[bytes] = b"",
        headers: Mapping[str, str] | None = None,
        *,
        is_broken: bool = False,
        is_silent: bool = False,
        key: str | None = "k",
    ) -> Answer:
        """`is_broken`: the client goes away behind the last piece, and before the body's end; `is_silent`: it says no more."""
        path, _, query = path.partition("?")
        sent: list[Any] = []
        pieces = [body] if isinstance(body, bytes) else list(body)
        named = {"host": "kw:80", **({"x-goog-api-key": key, "authorization": f"Bearer {key}"} if key else {})}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "scheme": "http",
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in {**named, **(headers or {})}.items()],
        }

        async def receive() -> dict[str, object]:
            if not pieces and is_silent:
                await asyncio.Event().wait()
            if not pieces:
                return {"type": "http.disconnect"}
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces) or is_broken or is_silent}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        told = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], told, b"".join(message.get("body", b"") for message in sent[1:]))

    async def settled(self, file: Any, dialect: str = "gemini") -> None:
        """Until its text is there, or is known not to be."""
        tenant = (await DevAuth().principal("Bearer k")).tenant
        found = await self.files.get(tenant, file["name"].removeprefix("files/"))
        await self.files.settled(found, 60.0)


@asynccontextmanager
async def site(tmp_path: Path, limits: Limits = Limits()) -> AsyncIterator[Site]:
    clock, (log, logged) = FakeClock(), capturing_log()
    config = Config(dev=True, limits=limits)
    storage = await asyncio.to_thread(Storage.open, database_path(tmp_path), 1.0)
    disk = FileDisk(tmp_path / "files")
    files = Files(limits, disk, FileRows(storage), Reading(limits, read), clock, RandomIds(), log)
    try:
        await files.recover()
        async with asyncio.TaskGroup() as tasks:
            runtime = Runtime(clock, RandomIds(), log, tasks)
            made = {"config": config, "auth": DevAuth(), "runtime": runtime, "created_at": 0}
            absent = {field.name: None for field in dataclasses.fields(Services)}
            services = Services(**{**absent, **made})
            work = tasks.create_task(files.work())
            yield Site(_app(services, files), files, clock, tmp_path / "files", logged)
            work.cancel()
    finally:
        await asyncio.to_thread(disk.close)
        await asyncio.to_thread(storage.close)


def _app(services: Services, files: Files) -> Starlette:
    bounds = msgspec.convert(services.config.limits, WireBounds, from_attributes=True)
    limits, gemini = services.config.limits, GeminiContent(bounds)
    calls = GeminiFileCalls(files, GeminiFiles(limits.file_ttl_s), limits)
    kimi = kimi_file_entries(KimiFileCalls(files, KimiFiles(), limits))

    def paths(dialect: Any, entries: Sequence[Entry]) -> list[Path_]:
        by_path: dict[str, dict[str, Operation]] = {}
        for route, call in entries:
            by_path.setdefault(route.path, {})[route.method] = Operation(call, route)
        return [Path_(path, PathCalls(services, dialect, path, found)) for path, found in by_path.items()]

    routes: list[Any] = []
    for mount in (MOUNT, ""):
        routes += [
            Mount(f"{mount}/v1beta", routes=paths(gemini, gemini_file_entries(calls))),
            Mount(f"{mount}/upload/v1beta", routes=paths(gemini, gemini_upload_entries(calls))),
            Mount(f"{mount}/upload/v1", routes=paths(gemini, gemini_upload_entries(calls))),
            *([Mount(mount, routes=paths(gemini, gemini_discovery_entries(calls)))] if mount else []),
        ]
    routes += [*paths(gemini, gemini_discovery_entries(calls)), Mount("/v1", routes=paths(KimiChat(bounds), kimi))]
    return Starlette(routes=routes)
