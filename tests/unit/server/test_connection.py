"""Connections over a real socket: what may come in before there is a request, and how the server stops."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from keepwarm import app
from keepwarm.app import Server
from keepwarm.config import Config
from tests.engines import says
from tests.world import CONFIG, World, world

pytestmark = pytest.mark.anyio

BODY = msgspec.json.encode({"model": "small", "stream": True, "messages": [{"role": "user", "content": "hi"}]})
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\ncontent-length: %d\r\n\r\n%b"
Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def listening(data_dir: Path, config: Config = CONFIG) -> AsyncIterator[tuple[World, Server, int]]:
    """A gateway behind uvicorn on a free port; told to stop at the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with world(data_dir, config=config) as gateway:
            server = Server(config, gateway.running)
            serving = gateway.tasks.create_task(server.serve(sockets=[listener]))
            yield gateway, server, listener.getsockname()[1]
            server.handle_exit(signal.SIGTERM, None)
            await serving


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):  # the server may have cut it off
            await writer.wait_closed()


async def said(client: Client, *requests: bytes) -> tuple[int, bytes]:
    """Status and everything until the server closes."""
    reader, writer = client
    for request in requests:
        writer.write(request)
    answer = await reader.read()
    return int(answer.split(b" ", 2)[1]), answer


@pytest.mark.parametrize("request_", [b"GET / HTTP/1.1\r\nx: " + b"a" * 50_000, b"GET /" + b"a" * 50_000])
async def test_headers_that_never_end_are_cut_off(tmp_path: Path, request_: bytes) -> None:
    async with listening(tmp_path) as (_, _, port), connected(port) as client:
        status, answer = await said(client, request_)
        assert status == 431
        assert b"limit" in answer or b"more than 32,768 bytes" in answer
        assert b"invalid_request_error" in answer


async def test_what_is_not_http_gets_an_error_in_the_dialects_shape(tmp_path: Path) -> None:
    async with listening(tmp_path) as (_, _, port), connected(port) as client:
        status, answer = await said(client, b"what is this\r\n\r\n")
        assert status == 400
        assert b'"type":"invalid_request_error"' in answer


async def test_a_connection_that_says_nothing_is_closed(tmp_path: Path) -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, body_read_s_max=0.01))
    async with listening(tmp_path, config) as (_, _, port), connected(port) as (reader, writer):
        writer.write(b"GET /health HT")
        assert await reader.read() == b""


async def test_one_connection_too_many_is_told_so(tmp_path: Path) -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, connections_max=1))
    async with listening(tmp_path, config) as (_, _, port), connected(port) as first:
        first[1].write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        await first[0].readuntil(b"\r\n\r\n")
        async with connected(port) as second:
            status, answer = await said(second, b"")
        assert status == 429
        assert b"retry-after: 1" in answer


async def test_a_body_in_the_same_segment_is_not_taken_for_headers(tmp_path: Path) -> None:
    async with listening(tmp_path) as (gateway, _, port), connected(port) as (reader, writer):
        body = msgspec.json.encode(
            {"model": "small", "messages": [{"role": "user", "content": "x" * 1500}], "pad": "y" * 60_000}
        )
        writer.write(CHAT % (len(body), body))
        assert b" 200 " in await reader.readline()
        assert len(gateway.engine.plans) == 1


CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\ntransfer-encoding: chunked\r\n\r\n"
)


@pytest.mark.parametrize("endless", [b"x: 1\r\n" * 4_000, b"x: " + b"a" * 20_000], ids=["trailers", "a trailer"])
async def test_trailers_that_never_end_are_cut_off_and_are_no_headers(tmp_path: Path, endless: bytes) -> None:
    async with listening(tmp_path) as (gateway, _, port), connected(port) as (reader, writer):
        writer.write(CHUNKED + b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY))
        with suppress(ConnectionError):
            for _ in range(20):
                writer.write(endless)
                await writer.drain()
                await asyncio.sleep(0)
            assert b"431" not in await reader.read()
        assert writer.transport.is_closing() or await reader.read() == b""
        gateway.assert_clean()


async def test_trailers_of_a_request_are_dropped(tmp_path: Path) -> None:
    async with listening(tmp_path) as (gateway, _, port), connected(port) as (reader, writer):
        writer.write(CHUNKED + b"%x\r\n%b\r\n0\r\nauthorization: Bearer other\r\n\r\n" % (len(BODY), BODY))
        assert b" 200 " in await reader.readline()
        await reader.readuntil(b"[DONE]")
        assert len(gateway.engine.plans) == 1


async def test_a_body_in_small_chunks_is_not_taken_for_trailers(tmp_path: Path) -> None:
    body = msgspec.json.encode({"model": "small", "messages": [{"role": "user", "content": "hi"}], "pad": "y" * 9_000})
    async with listening(tmp_path) as (_, _, port), connected(port) as (reader, writer):
        writer.write(CHUNKED + b"".join(b"1\r\n%b\r\n" % body[i : i + 1] for i in range(len(body))) + b"0\r\n\r\n")
        assert b" 200 " in await reader.readline()


async def test_the_rest_of_a_body_that_was_answered_has_bounded_time(tmp_path: Path) -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, body_read_s_max=0.05))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
    async with listening(tmp_path, config) as (_, _, port), connected(port) as (reader, writer):
        writer.write(head)
        assert b" 401 " in await reader.readline()
        await reader.readuntil(b"\r\n\r\n")
        n_sent = 0
        with suppress(ConnectionError):
            while not reader.at_eof() and n_sent < 2_000:  # a byte from time to time keeps it open no longer
                writer.write(b"x")
                await writer.drain()
                n_sent += 1
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.005):
                        await reader.read(1000)
        assert n_sent < 2_000


async def test_a_body_that_was_answered_early_may_still_come_and_the_connection_serves_on(tmp_path: Path) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n"
    async with listening(tmp_path) as (_, _, port), connected(port) as (reader, writer):
        writer.write(head)
        assert b" 401 " in await reader.readline()
        writer.write(b"x" * 10 + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"HTTP/1.1 ")
        assert (await reader.readline()).startswith(b"200")


async def test_a_client_that_closes_its_connection_ends_its_turn(tmp_path: Path) -> None:
    async with listening(tmp_path) as (gateway, _, port):
        steps = asyncio.Semaphore(3)
        gateway.engine.gate = steps.acquire
        gateway.engine.script = says("first", "second")
        async with connected(port) as (reader, writer):
            writer.write(CHAT % (len(BODY), BODY))
            await reader.readuntil(b"first")
            assert gateway.running.turns.n_turns == 1
        while gateway.running.turns.n_turns:  # noqa: ASYNC110 - the server learns of it from its socket
            await asyncio.sleep(0)
        gateway.assert_clean()
        assert len(gateway.engine.cancelled) == 1


async def test_a_stop_gives_running_turns_time_and_then_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "STOP_S", 0.0)
    async with listening(tmp_path) as (gateway, server, port):
        steps = asyncio.Semaphore(3)
        gateway.engine.gate = steps.acquire
        gateway.engine.script = says("first", "second")
        async with connected(port) as (reader, writer):
            writer.write(CHAT % (len(BODY), BODY))
            await reader.readuntil(b"first")
            server.handle_exit(signal.SIGTERM, None)
            rest = await reader.read()
        assert b"the server is stopping; try again" in rest
        assert b"second" not in rest
        gateway.assert_clean()


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "x-goog-api-key"])
async def test_two_keys_of_one_kind_are_refused(tmp_path: Path, name: str) -> None:
    """A proxy ahead of the server may have looked at the other one."""
    head = f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{name}: Bearer a\r\n{name}: Bearer b\r\nconnection: close\r\n\r\n"
    async with listening(tmp_path) as (_, _, port), connected(port) as client:
        status, answer = await said(client, head.encode())
        assert status == 400
        assert f"2 {name} headers".encode() in answer
