import asyncio

import msgspec
import pytest

from keepwarm.bench import BenchError
from keepwarm.bench.client import connected
from keepwarm.bench.messages import Lookup, MessageUsage, read_event, read_lookup, stream_message
from keepwarm.core.clock import SystemClock

START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant",'
    b'"model":"m","content":[],"usage":{"input_tokens":7,"cache_creation_input_tokens":30,"cache_read_input_tokens":900,'
    b'"output_tokens":0}}}\n\n'
)
OPENED = (
    b"event: content_block_start\n"
    b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
)
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
TIMINGS = b': keepwarm-timings {"render_ms":1.5}\n\n'


def delta(kind: str, member: str, text: str) -> bytes:
    data = msgspec.json.encode({"type": "content_block_delta", "index": 0, "delta": {"type": kind, member: text}})
    return b"event: content_block_delta\ndata: " + data + b"\n\n"


ENDED = (
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"max_tokens"},"usage":{"output_tokens":2}}'
    b'\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
FAILED = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"x"}}\n\n'


def answered(*parts: bytes):
    """What is read of a server that answers with these chunks."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nX-Keepwarm-Cache: partial; read=900; tier=disk; cause=evicted\r\n"
        writer.write(head + b"\r\n")
        for part in (*parts, b""):
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        await writer.drain()
        writer.close()

    async def ask():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with connected("127.0.0.1", port, "key", SystemClock()) as connection:
                return await stream_message(connection, b"{}")

    return asyncio.run(ask())


def test_an_answer_is_read_to_its_end() -> None:
    answer = answered(
        START, PING, OPENED + delta("text_delta", "text", "a") + delta("text_delta", "text", "b"), ENDED, TIMINGS
    )
    assert (answer.id, answer.text, answer.timings) == ("msg_1", "ab", {"render_ms": 1.5})
    assert answer.usage == MessageUsage(7, 30, 900)
    assert answer.lookup == Lookup("partial", "disk", "evicted")
    assert answer.ttft_ms > 0


def test_a_calls_pieces_are_part_of_what_was_said() -> None:
    said = answered(START, OPENED, delta("input_json_delta", "partial_json", '{"a"'), ENDED, TIMINGS).text
    assert said == '{"a"'


def test_an_empty_answer_has_its_first_token_where_it_ends() -> None:
    assert answered(START, ENDED, TIMINGS).text == ""


@pytest.mark.parametrize("rest", [(), (FAILED, TIMINGS), (OPENED, TIMINGS), (ENDED,)])
def test_a_stream_without_its_end_is_no_measurement(rest: tuple[bytes, ...]) -> None:
    with pytest.raises(BenchError):
        answered(START, *rest)


def test_comments_are_no_events_and_broken_ones_are_not_passed_over() -> None:
    assert read_event(b": keepwarm-timings {}") is None
    with pytest.raises(msgspec.DecodeError):
        read_event(b'event: ping\ndata: {"type":')


def test_the_header_of_a_hit_has_no_cause() -> None:
    assert read_lookup("hit; read=5120; tier=host") == Lookup("hit", "host", None)
    assert read_lookup("miss; read=0; cause=first_seen") == Lookup("miss", None, "first_seen")
