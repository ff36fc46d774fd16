"""The engine as the gateway sees it: lease, run, drop, status; and the tokenizer that belongs to its model.

`LocalEngine` (llama.cpp or the scripted model in a process of its own) is the first implementation. The gateway knows
these protocols, not which engine is behind them.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from enum import Enum
from typing import Protocol

from msgspec import Struct

from keepwarm.core.event import Event, Usage
from keepwarm.core.prompt import Lease, Plan, Prompt


class EngineState(Enum):
    """STARTING covers model loading, preparation and the self-test; DOWN is between a crash and the restart."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"


class ModelInfo(Struct, frozen=True):
    """What the engine found out about its model. `granularity` None: caching is off because it is not exact here."""

    digest: str  # blake3 of the model file, hex
    n_ctx: int  # tokens one turn may hold, prompt and answer
    n_streams: int
    n_vocab: int
    weights: str  # "Q4_0 (prepared from Q4_1)"
    attention: str  # "plain" | "flash"
    determinism: str  # "strict" | "fast"
    granularity: int | None
    kv_type: str
    bytes_per_token: int


class PoolStatus(Struct, frozen=True):
    """One byte budget: free + resident + leased = total, always. `leased` cannot be evicted, `resident` can."""

    name: str  # "live" (running turns' KV) | "host" | "disk"
    bytes_total: int
    bytes_free: int
    bytes_resident: int
    bytes_leased: int
    bytes_configured: int  # the total without memory pressure
    n_blocks: int = 0


class StoreStatus(Struct, frozen=True):
    """The prefix store as GET /admin/store shows it. Counters since the engine process started; unknown is None."""

    pools: tuple[PoolStatus, ...]
    policy: str
    n_leases: int
    n_hits_host: int = 0  # look-ups of turns that read something, by the slowest tier they read from
    n_hits_disk: int = 0
    n_misses: int = 0
    n_tokens_recomputed: int = 0  # stored, but computing was expected to be faster than reading
    n_evicted_host: int = 0  # blocks
    n_evicted_disk: int = 0
    n_written: int = 0
    n_write_faults: int = 0
    n_not_admitted: int = 0  # blocks that left the host tier unseen a second time, so never reached the disk
    damaged: dict[str, int] = {}  # deleted blocks by cause (tiers.Damage)
    prefill_tokens_per_s: float | None = None  # as measured while running; the break-even is judged by these
    host_bytes_per_s: float | None = None
    disk_bytes_per_s: float | None = None
    scan_s: float | None = None  # reading the heads of all stored blocks at start
    memory_pressure: float | None = None  # share of the last 10 s in which some task waited for memory, in percent


class EngineStatus(Struct, frozen=True):
    """Counters since the engine process started; `epoch` grows with each start. Absent numbers are None."""

    state: EngineState
    epoch: int
    detail: str  # one line for people: "loading model", "measuring granularity (2 of 4)"
    model: ModelInfo | None = None
    n_running: int = 0
    n_queued: int = 0
    n_tokens_evaluated: int = 0
    n_tokens_restored: int = 0
    n_tokens_decoded: int = 0
    host_bytes_total: int = 0
    host_bytes_resident: int = 0
    host_bytes_pinned: int = 0
    store: StoreStatus | None = None  # None: caching is off


Counts = asyncio.Future[Usage | None]


class Engine(Protocol):
    """Runs plans. Every `run` ends in exactly one terminal event or, if its consumer goes away, in a cancelled turn."""

    def lease(self, prompt: Prompt) -> AbstractAsyncContextManager[Lease]:
        """Find and lock the longest stored prefix. Raises ApiError(ENGINE_DOWN)."""
        ...

    def run(self, plan: Plan, counts: Counts | None = None) -> AsyncIterator[Event]:
        """Run one plan. Closing the iterator cancels the turn within one step. Raises ApiError(ENGINE_DOWN, OVERLOADED).

        `counts` is set after the iterator was closed before its terminal event: to what had been evaluated and produced by
        then, or None if the engine is not there to tell.
        """
        ...

    async def drop(self, pin_id: str) -> None:
        """Give back what a plan with this `pin_id` leased. Unknown ids are no error."""
        ...

    def status(self) -> EngineStatus: ...


class SpecialToken(Struct, frozen=True):
    """A control token of the vocabulary: its text, its id, and whether it swallows white space on either side."""

    text: str
    token: int
    strips_left: bool = False
    strips_right: bool = False


class Tokenizer(Protocol):
    """The model's vocabulary, without its weights. Thread-safe, synchronous, no I/O after construction."""

    @property
    def specials(self) -> tuple[SpecialToken, ...]:
        """All control tokens."""
        ...

    @property
    def bos(self) -> int | None:
        """The token every prompt must begin with, or None when the model wants none."""
        ...

    @property
    def chat_template(self) -> str:
        """The Jinja source stored with the model."""
        ...

    def special_text(self, name: str) -> str:
        """Text of the "bos" or "eos" token, "" when there is none."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text without control tokens: a control token's text in it is ordinary text."""
        ...

    def piece(self, token: int) -> bytes:
        """The token's bytes, b"" for control tokens."""
        ...
