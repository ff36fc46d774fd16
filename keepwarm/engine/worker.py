"""The engine's process: `python -m keepwarm.engine.worker FD`, FD one end of a Unix socket pair (frames: wire.py).

Two threads. The reader takes frames and answers look-ups at once, so that a lease never waits for a long ubatch; the
compute thread (this process's main one) owns the model. Beside them the store's threads read, write and assemble, and a
governor keeps the host tier within what the machine can spare. When the gateway goes away, so does this process.
"""

import ctypes
import importlib
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from keepwarm.config import Config
from keepwarm.core.clock import Clock, SystemClock, draw_seed
from keepwarm.core.event import Event
from keepwarm.core.prompt import Lease
from keepwarm.engine import EngineState, EngineStatus, ModelInfo, StoreStatus
from keepwarm.engine.core import CoreSettings, EngineCore
from keepwarm.engine.disk import DirectoryLocked, DiskTier
from keepwarm.engine.files import Files
from keepwarm.engine.governor import Governed, govern, pool
from keepwarm.engine.layout import Layout
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.model import LoadFault, Prepared
from keepwarm.engine.prefix import root_key
from keepwarm.engine.pressure import MemoryReading, read_memory
from keepwarm.engine.ram import RamTier
from keepwarm.engine.reuse import Match, Store
from keepwarm.engine.scripted import N_CTX, ScriptedModel
from keepwarm.engine.selftest import granularity, layout_of
from keepwarm.engine.snapshots import LAYOUT_VERSION as SNAPSHOT_VERSION
from keepwarm.engine.snapshots import SnapshotStore
from keepwarm.engine.store import PrefixStore, slot_bytes
from keepwarm.engine.tiers import HostTier, TierFault
from keepwarm.engine.wire import (
    FRAME_BYTES_MAX,
    LENGTH,
    Cancel,
    Configure,
    Drop,
    Events,
    FromWorker,
    LeaseDamaged,
    LeaseFound,
    LeasesHeld,
    LoadFailed,
    LookUp,
    Release,
    RunPlan,
    StatusChanged,
    ToWorker,
    decode_to_worker,
    encode,
)

PR_SET_PDEATHSIG = 1
STATUS_INTERVAL_S = 0.2  # while busy
IDLE_S = 0.01  # without work for this long the counters are sent at once
SOCKET_BUFFER = 4 << 20
GOVERN_S = 1.0  # how often memory pressure is looked at: the kernel's averages change every two seconds
LAYOUT_VERSION = "blocks-64.1"  # of what a block's bytes mean; part of every key


class Channel:
    """The socket: whole frames in, whole frames out."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        self._sock, self._lock = sock, threading.Lock()

    def send(self, frame: FromWorker) -> None:
        """Write one frame; from any thread."""
        with self._lock:
            self._sock.sendall(encode(frame))

    def receive(self) -> ToWorker | None:
        """The next frame, None at the end of the stream."""
        head = self._exactly(LENGTH.size)
        if head is None:
            return None
        (n,) = LENGTH.unpack(head)
        assert n <= FRAME_BYTES_MAX, n
        body = self._exactly(n)
        return None if body is None else decode_to_worker(body)

    def _exactly(self, n: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < n:
            part = self._sock.recv(min(n - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)


def prepare_scripted(config: Config) -> Prepared:
    """The model without weights, measured like any other."""
    wanted = config.model
    model = ScriptedModel(n_streams=wanted.n_streams, n_ctx=wanted.n_ctx or N_CTX, n_ubatch=wanted.n_ubatch)
    determinism: Literal["strict", "fast"] = "fast" if wanted.determinism == "fast" else "strict"
    found = granularity(model, lambda _: None)
    return Prepared(model, "scripted", "scripted", "plain", determinism, found, reuse="blocks" if found else "none")


class Call(Struct, frozen=True):
    """Something to do on the compute thread, asked for by another thread of this process."""

    work: Callable[[], None]


Work = RunPlan | Cancel | Drop | Call


class Worker:
    """The process: configure, load, then compute until the gateway goes away."""

    def __init__(self, channel: Channel, clock: Clock) -> None:
        self._channel, self._clock = channel, clock
        self._inbox: queue.SimpleQueue[Work] = queue.SimpleQueue()  # bounded by the gateway's turns
        self._store: Store[Any] | None = None
        self._leases: dict[str, Match] = {}  # reader thread only
        self._epoch = 0
        self._info: ModelInfo | None = None
        self._told = EngineStatus(EngineState.STARTING, 0, "starting")
        self._told_at = 0.0
        self._memory: MemoryReading | None = None

    def run(self) -> None:
        """Serve until the socket ends. Returns early when the model cannot be loaded."""
        frame = self._channel.receive()
        if frame is None:
            return
        assert isinstance(frame, Configure), frame
        self._epoch = frame.epoch
        config = frame.config
        try:
            prepared = self._prepare(config)
        except LoadFault as exc:
            self._channel.send(LoadFailed(str(exc)))
            return
        try:
            core = self._build(prepared, config, frame.template_digest)
        except (DirectoryLocked, TierFault) as exc:
            self._channel.send(LoadFailed(str(exc)))
            return
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        if self._store:
            self._store.prepare_host()
            self._channel.send(LeasesHeld(self._store.pins))
            self._store.on_damage = lambda pin: self._channel.send(LeaseDamaged(pin))
            threading.Thread(target=self._govern, args=(self._store,), name="governor", daemon=True).start()
        self._tell_status(core, EngineState.READY, prepared.detail)
        self._compute(core, prepared.detail)

    def _prepare(self, config: Config) -> Prepared:
        if config.model.engine == "scripted":
            return prepare_scripted(config)
        module = importlib.import_module("keepwarm.engine.prepare")  # not at the top: it loads llama.cpp
        prepared: Prepared = module.prepare(config, self._clock, self._report)
        return prepared

    def _report(self, line: str) -> None:
        self._channel.send(StatusChanged(EngineStatus(EngineState.STARTING, self._epoch, line)))

    def _build(self, prepared: Prepared, config: Config, template_digest: str) -> EngineCore:
        model = prepared.model
        layout = layout_of(model) if prepared.reuse == "blocks" else None
        if prepared.reuse != "none":
            self._report("setting up the prefix store")
            self._store = self._open_store(layout, prepared, config, template_digest)
        self._info = ModelInfo(
            digest=prepared.digest,
            n_ctx=model.n_ctx,
            n_streams=model.n_streams,
            n_vocab=model.n_vocab,
            weights=prepared.weights,
            attention=prepared.attention,
            determinism=prepared.determinism,
            granularity=prepared.granularity,
            kv_type=prepared.kv_type,
            bytes_per_token=layout.cell_bytes if layout else 0,
        )
        for stream in range(model.n_streams):
            model.forget(stream, 0, -1)
        settings = CoreSettings(prepared.determinism == "strict", config.limits.prefill_delay_ms_max)
        return EngineCore(
            model, self._store, settings, emit=self._emit, clock=self._clock, seeds=draw_seed, later=self._later
        )

    def _open_store(
        self, layout: Layout | None, prepared: Prepared, config: Config, template_digest: str
    ) -> Store[Any]:
        """Blocks by the model's layout, whole states without one. Raises DirectoryLocked, TierFault."""
        assert prepared.granularity
        version = LAYOUT_VERSION if layout else SNAPSHOT_VERSION
        identity = (
            prepared.digest, template_digest, prepared.kv_type, version, prepared.attention, str(prepared.granularity)
        )  # fmt: skip
        disk_bytes = config.disk_bytes()
        disk = None
        if disk_bytes:
            self._report("reading what is stored")
            root = config.store_dir()
            disk = DiskTier(root, disk_bytes, root_key(*identity)), LeaseFiles(Files(), root)
        if layout is None:
            return SnapshotStore(
                RamTier(config.host_bytes()),
                identity=identity,
                granularity=prepared.granularity,
                disk=disk,
                policy_name=config.cache.policy,
                clock=self._clock,
            )
        return PrefixStore(
            layout,
            HostTier(config.host_bytes(), slot_bytes(layout)),
            identity=identity,
            granularity=prepared.granularity,
            n_ctx=prepared.model.n_ctx,
            disk=disk,
            policy_name=config.cache.policy,
            breaks_even=config.model.engine != "scripted",  # its prefill costs nothing, and clients test hits with it
            clock=self._clock,
        )

    def _later(self, work: Callable[[], None]) -> None:
        self._inbox.put(Call(work))

    def _emit(self, events: Sequence[tuple[str, Event]]) -> None:
        self._channel.send(Events(tuple(events)))

    # --- reader thread

    def _read(self) -> None:
        """Take frames until the gateway is gone or sends what it never should; the process ends either way."""
        status = 1
        try:
            self._take_frames()
            status = 0
        except ConnectionError:
            status = 0  # the gateway is gone with frames unread
        except Exception:  # noqa: BLE001 - a thread's exception would not end the process
            traceback.print_exc()  # into the engine's log: its last words
        finally:
            os._exit(status)  # the compute thread may be deep in llama.cpp

    def _take_frames(self) -> None:
        while (frame := self._channel.receive()) is not None:
            match frame:
                case LookUp():
                    self._channel.send(LeaseFound(self._look_up(frame)))
                case Release(lease_id):
                    held = self._leases.pop(lease_id, None)
                    if held and self._store:
                        self._store.release(held)
                case RunPlan() | Cancel() | Drop():
                    self._inbox.put(frame)
                case Configure():
                    raise AssertionError("configured twice")

    def _look_up(self, frame: LookUp) -> Lease:
        if self._store is None:
            return Lease(frame.lease_id, 0)
        held = self._store.hold(frame.prompt, want_logits=True, uses=False)
        self._leases[frame.lease_id] = held
        return Lease(frame.lease_id, held.n_tokens, held.tier)

    # --- governor thread

    def _govern(self, store: Store[Any]) -> None:
        """Keep the host tier within what the machine can spare, for ever."""
        state = Governed(store.bytes_configured)
        pause = threading.Event()
        while not pause.wait(GOVERN_S):
            self._memory = read_memory()
            taken_bytes = store.bytes_resident + store.bytes_pinned
            state = govern(store.bytes_configured, state, self._memory, taken_bytes=taken_bytes)
            store.limit_host(state.bytes_target)
            store.prepare_host()

    # --- compute thread

    def _compute(self, core: EngineCore, detail: str) -> None:
        busy = True
        while True:
            if not busy:
                self._take(core, self._next_frame(core, detail))
            while not self._inbox.empty():
                self._take(core, self._inbox.get())
            busy = core.step()
            if busy and self._clock.monotonic() - self._told_at > STATUS_INTERVAL_S:
                self._tell_status(core, EngineState.READY, detail)

    def _next_frame(self, core: EngineCore, detail: str) -> Work:
        """Wait for work; the counters are told when none comes for a moment, not between two turns that follow at once.

        And now and then after that: writing goes on behind the last turn, and memory pressure changes by itself.
        """
        wait_s = IDLE_S
        while True:
            try:
                return self._inbox.get(timeout=wait_s)
            except queue.Empty:
                self._tell_status(core, EngineState.READY, detail)
                wait_s = GOVERN_S

    def _take(self, core: EngineCore, frame: Work) -> None:
        match frame:
            case RunPlan(plan):
                core.submit(plan)
            case Cancel(turn_id):
                core.cancel(turn_id)
            case Drop(pin_id):
                core.drop(pin_id)
            case Call(work):
                work()

    def _tell_status(self, core: EngineCore, state: EngineState, detail: str) -> None:
        store = self._store
        status = EngineStatus(
            state,
            self._epoch,
            detail,
            self._info,
            n_running=core.n_running,
            n_queued=core.n_queued,
            n_tokens_evaluated=core.counters.evaluated,
            n_tokens_restored=core.counters.restored,
            n_tokens_decoded=core.counters.decoded,
            host_bytes_total=store.bytes_total if store else 0,
            host_bytes_resident=store.bytes_resident if store else 0,
            host_bytes_pinned=store.bytes_pinned if store else 0,
            store=self._store_status(core, store) if store else None,
        )
        self._told_at = self._clock.monotonic()
        if status != self._told:
            self._told = status
            self._channel.send(StatusChanged(status))

    def _store_status(self, core: EngineCore, store: Store[Any]) -> StoreStatus:
        status = store.status()
        info = self._info
        assert info is not None
        total = info.n_streams * info.n_ctx * info.bytes_per_token
        live = pool(
            "live",
            total=total,
            resident=0,
            leased=core.n_live_tokens * info.bytes_per_token,  # a running turn's cells are nobody's to evict
            configured=total,
            n_blocks=core.n_running,
        )
        pressure = self._memory.some_avg10 if self._memory else None
        return replace(status, pools=(live, *status.pools), memory_pressure=pressure)


def main() -> None:
    """Entry point of the engine's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the gateway ends this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    Worker(Channel(socket.socket(fileno=int(sys.argv[1]))), SystemClock()).run()


if __name__ == "__main__":
    main()
