"""The gateway's side of the process that reads a document: starts it, feeds it, takes its answer, ends it.

Nothing the process does is trusted: it gets so many seconds, its answer so many bytes, and it is killed whichever way this
ends, cancellation included. It leads a session of its own, so a terminal's interrupt meant for the gateway does not reach
it and whatever it started goes with it.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress

import msgspec

from keepwarm.documents import READY, Answer, DocumentFault, Extracted, Order, framed

Document = bytes | AsyncIterator[bytes]  # in pieces: a large one is never here as a whole
COMMAND = (sys.executable, "-m", "keepwarm.documents.worker")
READ_BYTES = 1 << 18
CHAR_BYTES_MAX = 4  # of UTF-8
ANSWER_BYTES = 4096  # what an answer needs beside its text
STOP_S = 5.0  # a killed process is gone at once; one that the kernel holds is not waited for


class ReaderFault(Exception):
    """The process could not start. Our fault, not the document's."""


async def extract(
    order: Order, document: Document, s_max: float, environment: Mapping[str, str], command: Sequence[str] = COMMAND
) -> str:
    """The text of a document. Raises DocumentFault, ReaderFault, OSError."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,  # a library's complaints quote the document
        env=dict(environment),
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    bytes_max = order.chars_max * CHAR_BYTES_MAX + ANSWER_BYTES
    try:
        async with asyncio.timeout(s_max), asyncio.TaskGroup() as tasks:
            tasks.create_task(_send(process.stdin, framed(order), document))
            said = await _receive(process.stdout, bytes_max)
            if len(said) <= bytes_max:
                await process.wait()
    except TimeoutError:
        raise DocumentFault(f"could not be read within {s_max:g} s (document_s_max)") from None
    except ExceptionGroup as group:
        raise ReaderFault("the document's pieces could not be fetched") from group
    finally:
        await _end(process)
    return _text(said, bytes_max, process.returncode, order)


async def _send(stdin: asyncio.StreamWriter, head: bytes, document: Document) -> None:
    with suppress(ConnectionError):  # the process ended first: what it said, or how it ended, tells why
        stdin.write(head)
        if isinstance(document, bytes):
            stdin.write(document)
        else:
            async for piece in document:
                stdin.write(piece)
                await stdin.drain()
        await stdin.drain()
        stdin.close()
        await stdin.wait_closed()


async def _receive(stdout: asyncio.StreamReader, bytes_max: int) -> bytes:
    """What the process says, at most one piece more than it may."""
    said = bytearray()
    while len(said) <= bytes_max:
        piece = await stdout.read(READ_BYTES)
        if not piece:
            break
        said += piece
    return bytes(said)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill what still runs and take back what was given to it: the process's entry, and the ends of its pipes."""
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):  # gone in between; macOS says the second of that
            os.killpg(process.pid, signal.SIGKILL)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    with suppress(TimeoutError):
        async with asyncio.timeout(STOP_S):
            while await process.stdout.read(READ_BYTES):
                pass
            await process.wait()


def _text(said: bytes, bytes_max: int, status: int | None, order: Order) -> str:
    if len(said) > bytes_max:
        raise DocumentFault(f"has more than {order.chars_max:,} characters of text (document_chars_max)")
    if not said.startswith(READY):
        raise ReaderFault(f"the process that reads documents ended with status {status} before it had read anything")
    try:
        answer: Answer = msgspec.msgpack.decode(said[len(READY) :], type=Answer)
    except msgspec.DecodeError:
        raise DocumentFault(_last_words(status, order)) from None
    if isinstance(answer, Extracted) and len(answer.text) <= order.chars_max:
        return answer.text
    raise DocumentFault(answer.why if not isinstance(answer, Extracted) else _last_words(status, order))


def _last_words(status: int | None, order: Order) -> str:
    """Why a process ended without an answer, as far as its status tells."""
    if status == -signal.SIGXCPU:
        return f"takes more than {order.cpu_s_max:g} s of CPU time to read (document_s_max)"
    if status == -signal.SIGKILL:
        return f"was stopped while it was read: it needs more memory than there is, or more than {order.cpu_s_max:g} s"
    return f"cannot be read as {order.kind.value}: reading it ended with status {status}"
