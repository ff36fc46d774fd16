"""The process itself: what a hostile document, or a hostile process, can cost."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from keepwarm.config import document_environment
from keepwarm.documents import DocumentFault, Kind, Order
from keepwarm.documents.extraction import ReaderFault, extract
from tests.files import bomb_pdf, docx

pytestmark = pytest.mark.anyio

MIB = 1 << 20
READY_THEN = "import os, signal, sys, time; sys.stdin.buffer.read(); os.write(1, b'+'); "
CONFINED = "from keepwarm.documents.confine import confine; "


def order(kind: Kind = Kind.TEXT, *, memory_bytes_max: int = 256 * MIB, chars_max: int = 1000) -> Order:
    return Order(kind, None, chars_max, cpu_s_max=60, memory_bytes_max=memory_bytes_max)


async def read(asked: Order, data: bytes = b"text", *, s_max: float = 60, script: str | None = None) -> str:
    """With `script`, a process that does this instead."""
    if script is None:
        return await extract(asked, data, s_max, document_environment())
    return await extract(asked, data, s_max, document_environment(), (sys.executable, "-c", script))


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The server's own loop: how pipes and processes end differs between loops."""
    return "asyncio", {"use_uvloop": True}


async def test_a_document_is_read_in_a_process():
    assert await read(order(), "Grüße\r\n".encode()) == "Grüße\n"
    assert await read(order(Kind.DOCX), docx(["Title", "text"])) == "# Title\n\ntext"


async def test_a_large_document_gets_through_the_pipes():
    text = "0123456789abcde\n" * 200_000
    assert await read(order(chars_max=len(text)), text.encode()) == text


async def test_a_document_in_pieces_is_the_same_and_one_whose_pieces_fail_is_our_fault():
    async def pieces(n_pieces: int, *, then: Exception | None = None) -> AsyncIterator[bytes]:
        for _ in range(n_pieces):
            yield b"0123456789abcde\n" * 4096
        if then is not None:
            raise then

    asked, environment = order(chars_max=4 * MIB), document_environment()
    assert await extract(asked, pieces(40), 60, environment) == "0123456789abcde\n" * 4096 * 40
    with pytest.raises(ReaderFault, match="pieces could not be fetched"):
        await extract(asked, pieces(40, then=OSError("gone")), 60, environment)
    script = "import os; os.write(1, b'+')"  # and ends without having read
    with pytest.raises(DocumentFault, match="cannot be read as plain text"):
        await extract(asked, pieces(40), 60, environment, (sys.executable, "-c", script))


async def test_what_the_process_refuses_is_the_documents_fault():
    with pytest.raises(DocumentFault, match="has 1,001 characters of text, limit 1,000"):
        await read(order(), b"x" * 1001)
    with pytest.raises(DocumentFault, match="is broken or no DOCX"):
        await read(order(Kind.DOCX), b"rubbish")


async def test_a_memory_bomb_is_refused():
    bomb = bomb_pdf(160 * MIB)
    assert len(bomb) < MIB
    with pytest.raises(DocumentFault, match="takes more than 67,108,864 bytes of memory"):
        await read(order(Kind.PDF, memory_bytes_max=64 * MIB), bomb)


async def test_memory_has_a_limit():
    script = f"{READY_THEN} {CONFINED} confine({32 * MIB}, 60); x = bytearray({64 * MIB}); print('not reached')"
    with pytest.raises(DocumentFault, match="reading it ended with status 1"):
        await read(order(), script=script)


async def test_cpu_time_has_a_limit():
    with pytest.raises(DocumentFault, match="takes more than 60 s of CPU time"):
        await read(order(), script=f"{READY_THEN} {CONFINED} confine({32 * MIB}, 0.1)\nwhile True: pass")


async def test_files_cannot_be_written(tmp_path: Path):
    target = tmp_path / "written"
    script = f"{READY_THEN} {CONFINED} confine({32 * MIB}, 60); open({str(target)!r}, 'w').write('x')"
    with pytest.raises(DocumentFault, match="ended with status"):
        await read(order(), script=script)
    assert not target.exists() or target.read_bytes() == b""


async def test_a_process_that_never_ends_is_killed():
    with pytest.raises(DocumentFault, match=r"could not be read within 0\.5 s \(document_s_max\)"):
        await read(order(), s_max=0.5, script=f"{READY_THEN} time.sleep(600)")


async def test_an_answer_without_end_is_cut_off():
    with pytest.raises(DocumentFault, match="has more than 1,000 characters"):
        await read(order(), script=f"{READY_THEN}\nwhile True: os.write(1, bytes(65536))")


@pytest.mark.parametrize(
    "ending, told",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "cannot be read as plain text: reading it ended with status -11"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "needs more memory than there is"),
        ("sys.exit(3)", "reading it ended with status 3"),
        ("os.write(1, b'rubbish')", "reading it ended with status 0"),
    ],
)
async def test_a_process_that_dies_over_a_document_tells_how(ending: str, told: str):
    with pytest.raises(DocumentFault, match=told):
        await read(order(), script=READY_THEN + ending)


@pytest.mark.parametrize("script", ["raise SystemExit(1)", "import os; os.close(0); os.write(1, b'-')"])
async def test_a_process_that_dies_before_it_is_ready_is_our_fault(script: str):
    with pytest.raises(ReaderFault, match="before it had read anything"):
        await read(order(), b"x" * MIB, script=script)


async def test_cancellation_kills_the_process(tmp_path: Path):
    told = tmp_path / "pid"
    os.mkfifo(told)
    script = f"{READY_THEN} open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read(order(), script=script))
        pid = int(await asyncio.to_thread(told.read_text))
        reading.cancel()
    assert reading.cancelled()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_the_process_sees_no_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KEEPWARM_API_KEY", "sk-secret")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    environment = document_environment()
    assert "sk-secret" not in environment.values()
    assert environment["LC_ALL"] == "C.UTF-8" and environment["PYTHONHASHSEED"] == "0"
