"""The bench's end of the baseline's pipe: starts the process, asks, ends it."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from keepwarm.bench import BenchError
from keepwarm.bench.raw_frames import Base, Cold, DecodeAll, Load, Loaded, Question, Took, Warm, encoded
from keepwarm.config import Config
from keepwarm.engine import ModelInfo


class Baseline:
    """Raw llama.cpp in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def load(self, config: Config, served: ModelInfo) -> None:
        """Raises BenchError when it did not load what the server serves."""
        loaded = msgspec.json.decode(await self._asked(Load(config)), type=Loaded)
        wanted = Loaded(
            served.digest, "flash" if served.attention == "flash" else "plain", served.n_ctx, served.n_streams
        )
        if loaded != wanted:
            raise BenchError(f"the baseline loaded {loaded}, the server serves {wanted}; give both the same --data-dir")

    async def ask(self, question: Cold | Base | Warm | DecodeAll) -> Took:
        return msgspec.json.decode(await self._asked(question), type=Took)

    async def _asked(self, question: Question) -> bytes:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(encoded(question))
        line = await self._process.stdout.readline()
        if not line:
            raise BenchError("the baseline's process ended; what it said is above")
        return line

    async def close(self) -> None:
        """The process ends when its stdin does."""
        assert self._process.stdin
        self._process.stdin.close()
        await self._process.wait()


@asynccontextmanager
async def baseline(config: Config, served: ModelInfo) -> AsyncIterator[Baseline | None]:
    """A loaded baseline for as long as the context lasts; None for the scripted engine, which has no raw side."""
    if config.model.engine == "scripted":
        yield None
        return
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "keepwarm.bench.raw",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=config.engine_environment(),
        start_new_session=True,  # like the server: Linux shares processors between sessions first, then within them
    )
    found = Baseline(process)
    try:
        await found.load(config, served)
        yield found
    finally:
        await found.close()
