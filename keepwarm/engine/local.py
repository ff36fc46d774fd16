"""The gateway's side of the engine process: starts it, talks to it, restarts it, and gives every turn its terminal event.

A crash of the engine ends the turns in flight with a retryable error and nothing else: the gateway, the ledger and the
objects' rows live here. Import-light: llama.cpp is loaded for its vocabulary only, when the tokenizer is opened.
"""

import asyncio
import importlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from msgspec.structs import replace

from keepwarm.config import Config
from keepwarm.core.clock import Clock, Ids
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Event, Failed, Finished, Usage
from keepwarm.core.prompt import Lease, Plan, Prompt
from keepwarm.engine import Counts, EngineState, EngineStatus, Tokenizer
from keepwarm.engine.scripted import ScriptedVocab
from keepwarm.engine.wire import (
    Cancel,
    Configure,
    Drop,
    Events,
    FrameBuffer,
    LeaseDamaged,
    LeaseFound,
    LeasesHeld,
    LoadFailed,
    LookUp,
    Release,
    RunPlan,
    StatusChanged,
    ToWorker,
    decode_from_worker,
    encode,
)

RESTART_DELAY_S = 0.5  # the first wait before a restart; doubles up to limits.engine_restart_delay_s_max
STALL_CHECK_S = 1.0  # how late a stall is noticed
LOG_TAIL_BYTES = 2000
READ_BYTES = 1 << 18
STOP_S = 2.0  # the process ends by itself when its socket closes; then it is killed
RETRY_AFTER_S = 2  # a small model is back within this; clients that come earlier are told again


class EngineFault(Exception):
    """The engine cannot be started as configured; one line that says what to do."""


def open_tokenizer(config: Config) -> Tokenizer:
    """The vocabulary and template of the configured model. Blocking: reads the file. Raises EngineFault."""
    if config.model.engine == "scripted":
        return ScriptedVocab()
    module = importlib.import_module("keepwarm.engine.vocabulary")  # not at the top: it loads llama.cpp
    try:
        tokenizer: Tokenizer = module.open_vocabulary(config.model)
    except module.LoadFault as exc:
        raise EngineFault(str(exc)) from exc
    return tokenizer


class LocalEngine:
    """llama.cpp or the scripted model in a process of its own (`keepwarm.engine.Engine`).

    `supervise` must run in a task for the engine's whole life; it raises EngineFault when a start can never work.
    """

    def __init__(self, config: Config, template_digest: str, clock: Clock, ids: Ids) -> None:
        self._config, self._template_digest = config, template_digest
        self._clock, self._ids = clock, ids
        self._status = EngineStatus(EngineState.STARTING, 0, "starting the engine process")
        self._changed = asyncio.Condition()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._turns: dict[str, asyncio.Queue[Event]] = {}
        self._overrun: set[str] = set()  # turns ended since their events were not read; the engine has not answered yet
        self._cancelled: dict[str, Counts] = {}  # runs given up whose counts somebody waits for
        self._leases: dict[str, asyncio.Future[Lease]] = {}
        self._held: frozenset[str] = frozenset()
        self._damaged: dict[str, None] = {}  # in order, each once: no more than there are leases
        self._damage = asyncio.Event()
        self._heard_at = 0.0
        self._stopping = False

    # --- the Engine protocol

    def status(self) -> EngineStatus:
        return self._status

    async def epochs(self) -> AsyncIterator[int]:
        """Yields an epoch when its process has become ready, and again when it is gone; never ends by itself."""
        seen, is_ready = 0, False
        while True:
            async with self._changed:
                while (self._status.state is EngineState.READY) == is_ready and self._status.epoch in (0, seen):
                    await self._changed.wait()
                status = self._status
            if is_ready:  # also when a new one is ready by now: the loss is told first
                is_ready = False
                yield seen
            elif status.state is EngineState.READY:
                seen, is_ready = status.epoch, True
                yield seen
            else:
                seen = status.epoch  # it starts, or died before it was ready

    def held_leases(self) -> frozenset[str]:
        """The pin ids whose leases this process found whole at its start; none before it is ready."""
        return self._held

    async def damaged(self) -> AsyncIterator[str]:
        """Pin ids of leases with a damaged block, as they are found; for one reader, and never ends by itself."""
        while True:
            await self._damage.wait()
            while self._damaged:
                pin_id = next(iter(self._damaged))
                del self._damaged[pin_id]
                yield pin_id
            self._damage.clear()

    @asynccontextmanager
    async def lease(self, prompt: Prompt) -> AsyncIterator[Lease]:
        self._need_ready()
        lease_id = self._ids.new("lease-")
        found: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._leases[lease_id] = found
        try:
            self._send(LookUp(lease_id, prompt))
            yield await found
        finally:
            self._leases.pop(lease_id, None)
            if self._status.state is EngineState.READY:
                self._send(Release(lease_id))

    async def run(self, plan: Plan, counts: Counts | None = None) -> AsyncIterator[Event]:
        self._need_ready()
        events: asyncio.Queue[Event] = asyncio.Queue(self._config.limits.event_queue_max)
        self._turns[plan.turn_id] = events
        ended = False
        try:
            self._send(RunPlan(plan))
            while not ended:
                event = await events.get()
                ended = isinstance(event, Finished | Failed)
                yield event
        finally:
            del self._turns[plan.turn_id]
            self._overrun.discard(plan.turn_id)
            last = None if ended else _last(events)
            if last is not None:  # it had ended; its end was not read yet
                _set(counts, last.usage)
            elif not ended:
                self._cancel(plan.turn_id, counts)

    async def drop(self, pin_id: str) -> None:
        if self._status.state is EngineState.READY:  # what another process finds of it is `held_leases`
            self._send(Drop(pin_id))

    def restart(self) -> None:
        """Kill the engine process; the supervisor starts it again."""
        if self._process and self._process.returncode is None:
            self._process.kill()

    # --- the process

    async def supervise(self) -> None:
        """Start the process, read it, restart it with growing delays. Ends by cancellation. Raises EngineFault."""
        delay_s, epoch = RESTART_DELAY_S, 0
        try:
            while True:
                epoch += 1
                await self._live(epoch)
                if self._status.state is EngineState.READY:
                    delay_s = RESTART_DELAY_S  # it had come up: not a crash loop
                detail = f"engine process ended{await asyncio.to_thread(self._last_words)}; restarting"
                await self._set(EngineStatus(EngineState.DOWN, epoch, detail))
                self._fail_all("the engine restarted during this request; try again")
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, self._config.limits.engine_restart_delay_s_max)
        finally:
            self._fail_all("the server is stopping")
            await asyncio.shield(self._stop())

    async def _live(self, epoch: int) -> None:
        """One life of the process, from start to end of its socket."""
        self._held = frozenset()
        self._damaged.clear()  # the new process says what is whole
        await self._set(EngineStatus(EngineState.STARTING, epoch, "starting the engine process"))
        environment = await asyncio.to_thread(self._config.engine_environment)  # counts cores: reads files
        log = await asyncio.to_thread(self._open_log)
        ours, theirs = socket.socketpair()
        try:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "keepwarm.engine.worker", str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL, stderr=log,
                    env=environment,
                )  # fmt: skip
            finally:
                theirs.close()
                log.close()
            reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 22)
        except BaseException:  # a stop in the middle of the start, too: nothing else owns this end yet
            ours.close()
            raise
        self._heard_at = self._clock.monotonic()
        self._send(Configure(self._config, epoch, self._template_digest))
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self._watch())
                refused = await self._read(reader)
                watch.cancel()
        finally:
            self._writer.close()
            self._writer = None
            await self._stop()
        if refused is not None:
            raise EngineFault(refused)

    async def _read(self, reader: asyncio.StreamReader) -> str | None:
        """Take frames until the process is gone; returns why it refused to load, if it did."""
        frames = FrameBuffer()
        while True:
            try:
                read = await reader.read(READ_BYTES)
            except ConnectionError:
                return None
            if not read:
                return None
            self._heard_at = self._clock.monotonic()
            for body in frames.feed(read):
                frame = decode_from_worker(body)
                if isinstance(frame, LoadFailed):
                    return frame.message
                await self._take(frame)

    async def _take(self, frame: Events | LeaseFound | LeasesHeld | LeaseDamaged | StatusChanged) -> None:
        match frame:
            case Events(events):
                for turn_id, event in events:
                    self._deliver(turn_id, event)
            case LeaseFound(lease):
                waiting = self._leases.get(lease.lease_id)
                if waiting and not waiting.done():
                    waiting.set_result(lease)
            case LeasesHeld(pin_ids):
                self._held = frozenset(pin_ids)
            case LeaseDamaged(pin_id):
                self._damaged[pin_id] = None
                self._damage.set()
            case StatusChanged(status):
                await self._set(status)

    def _deliver(self, turn_id: str, event: Event) -> None:
        events = self._turns.get(turn_id)
        if events is None:  # cancelled; its last events were already on the way
            if isinstance(event, Finished | Failed):
                _set(self._cancelled.pop(turn_id, None), event.usage)
            return
        if events.full():  # the reader has fallen behind: end the turn, do not let its queue grow
            while not events.empty():
                events.get_nowait()
            self._send(Cancel(turn_id))
            self._overrun.add(turn_id)
        if turn_id in self._overrun:
            if not isinstance(event, Finished | Failed):
                return
            message = f"{events.maxsize:,} events were not read; the turn was cancelled"
            event = Failed(ErrorKind.CLIENT_CLOSED, message, event.usage)
        events.put_nowait(event)

    def _cancel(self, turn_id: str, counts: Counts | None) -> None:
        """End a run that nobody reads any more. What it says last, be it that it had ended, is what `counts` gets."""
        if self._status.state is EngineState.READY:
            if counts is not None:
                self._cancelled[turn_id] = counts
            self._send(Cancel(turn_id))
        else:
            _set(counts, None)

    async def _watch(self) -> None:
        """Kill an engine that has turns and has said nothing for too long, or that does not come up."""
        limits = self._config.limits
        while True:
            await asyncio.sleep(STALL_CHECK_S)
            if self._status.state is EngineState.READY:
                if not self._turns and not self._leases:
                    self._heard_at = self._clock.monotonic()
                bound_s = limits.engine_stall_s_max
            else:
                bound_s = limits.engine_start_s_max
            if self._clock.monotonic() - self._heard_at > bound_s:
                self.restart()

    async def _set(self, status: EngineStatus) -> None:
        if status.model is None:  # between two lives the model is still the one that was loaded
            status = replace(status, model=self._status.model)
        async with self._changed:
            self._status = status
            self._changed.notify_all()

    def _send(self, frame: ToWorker) -> None:
        # Unbounded by itself; bounded by limits.turns_max prompts, since every turn holds a permit.
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(frame))

    def _need_ready(self) -> None:
        status = self._status
        if status.state is not EngineState.READY:
            raise ApiError(
                ErrorKind.ENGINE_DOWN, f"the engine is not ready: {status.detail}", retry_after_s=RETRY_AFTER_S
            )

    def _fail_all(self, message: str) -> None:
        failed = Failed(ErrorKind.ENGINE_DOWN, message, retry_after_s=RETRY_AFTER_S)
        for turn_id in list(self._turns):
            self._deliver(turn_id, failed)
        for counts in self._cancelled.values():
            _set(counts, None)
        self._cancelled.clear()
        for waiting in self._leases.values():
            if not waiting.done():
                waiting.set_exception(ApiError(ErrorKind.ENGINE_DOWN, message, retry_after_s=RETRY_AFTER_S))

    def _log_path(self) -> Path:
        return Path(self._config.data_dir) / "engine.log"

    def _open_log(self) -> BinaryIO:
        """What the process writes to stderr (llama.cpp's last words before it aborts) is kept for one life."""
        path = self._log_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")

    def _last_words(self) -> str:
        try:
            with self._log_path().open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - LOG_TAIL_BYTES))
                lines = log.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        code = self._process.returncode if self._process else None
        return f" (status {code}{': ' + lines[-1] if lines else ''})"

    async def _stop(self) -> None:
        if self._process and self._process.returncode is None:
            try:
                async with asyncio.timeout(STOP_S):
                    await self._process.wait()  # not killed at once: Popen.kill may reap it, and asyncio then says 255
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


def _last(events: asyncio.Queue[Event]) -> Finished | Failed | None:
    """The terminal event, if it waits to be read."""
    while not events.empty():
        event = events.get_nowait()
        if isinstance(event, Finished | Failed):
            return event
    return None


def _set(counts: Counts | None, usage: Usage | None) -> None:
    """Tell who waits for them, unless that one has left."""
    if counts is not None and not counts.done():
        counts.set_result(usage)
