"""What the compute thread does next. Pure: views of the turns in, one action out; no clock, no model, no queue of its own.

- Turns are admitted to streams first come, first served within a tenant, the tenant with the fewest turns on streams first.
- A decode step for every decoding turn alternates with one prefill chunk, sized so that it delays the others' next token
  by at most `delay_ms`. Without decoding turns a chunk is a whole ubatch.
- Among prefilling turns the one with the least left goes next, so a short question never waits for a long document; a
  turn passed over `PASSED_OVER_MAX` times goes first, so a long document is never starved.
- IDLE turns run only when there is no other, and are abandoned as soon as one arrives.
"""

from collections.abc import Sequence
from enum import Enum

from msgspec import Struct

from keepwarm.core.prompt import Priority

PASSED_OVER_MAX = 8  # chunks given to shorter prompts before a long one goes first


class Phase(Enum):
    """Where a turn stands. WAITING: another turn is computing a prefix that this one will use, or the disk is reading it.

    STORING: evaluated, its lease is being made durable; it needs no stream any more.
    """

    QUEUED = "queued"
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    STORING = "storing"


class View(Struct, frozen=True):
    """What the scheduler may know of a turn; given in order of arrival."""

    turn_id: str
    tenant: str
    phase: Phase
    priority: Priority
    n_left: int = 0  # prompt tokens still to evaluate
    passed_over: int = 0  # prefill chunks given to others since this turn's last


class Admit(Struct, frozen=True):
    """Give the turn a stream."""

    turn_id: str


class Prefill(Struct, frozen=True):
    """Evaluate one chunk of the turn's prompt, at most `rows_max` rows."""

    turn_id: str
    rows_max: int


class Decode(Struct, frozen=True):
    """One decode step for each of the turns."""

    turn_ids: tuple[str, ...]


class Abandon(Struct, frozen=True):
    """End the idle turns now, keeping what they have evaluated."""

    turn_ids: tuple[str, ...]


Action = Admit | Prefill | Decode | Abandon


class Pace(Struct, frozen=True):
    """Measured and configured sizes: rows of one ubatch, and rows that take about `delay_ms` to evaluate."""

    rows_full: int
    rows_delay: int


def rows_within(delay_ms: float, ms_per_row: float | None, rows_full: int) -> int:
    """How many rows take at most `delay_ms`, by the latest measurement; a careful 32 before there is one."""
    if ms_per_row is None:
        return min(32, rows_full)
    return max(2, min(rows_full, int(delay_ms / max(ms_per_row, 1e-6))))


def decide(views: Sequence[View], n_streams_free: int, pace: Pace, *, prefilled_last: bool) -> Action | None:
    """The next action, or None when there is nothing to do (or everything waits)."""
    front = [v for v in views if v.priority is Priority.FOREGROUND]
    idle = [v for v in views if v.priority is Priority.IDLE]
    if front:
        running_idle = tuple(v.turn_id for v in idle if v.phase in (Phase.PREFILL, Phase.DECODE))
        if running_idle:
            return Abandon(running_idle)
        return _next(front, n_streams_free, pace, prefilled_last=prefilled_last)
    return _next(idle, n_streams_free, pace, prefilled_last=prefilled_last)


def _next(views: Sequence[View], n_streams_free: int, pace: Pace, *, prefilled_last: bool) -> Action | None:
    if n_streams_free:
        queued = [v for v in views if v.phase is Phase.QUEUED]
        if queued:
            return Admit(_fairest(queued, views).turn_id)
    prefilling = [v for v in views if v.phase is Phase.PREFILL]
    decoding = tuple(v.turn_id for v in views if v.phase is Phase.DECODE)
    if prefilling and not (decoding and prefilled_last):
        rows = pace.rows_delay if decoding else pace.rows_full
        return Prefill(_neediest(prefilling).turn_id, rows)
    if decoding:
        return Decode(decoding)
    return None


def _fairest(queued: Sequence[View], views: Sequence[View]) -> View:
    """The first of the tenant with the fewest turns on streams; `min` keeps the order of arrival among equals."""
    on_streams: dict[str, int] = {}
    for view in views:
        if view.phase in (Phase.PREFILL, Phase.DECODE):
            on_streams[view.tenant] = on_streams.get(view.tenant, 0) + 1
    return min(queued, key=lambda v: on_streams.get(v.tenant, 0))


def _neediest(prefilling: Sequence[View]) -> View:
    starved = [v for v in prefilling if v.passed_over >= PASSED_OVER_MAX]
    if starved:
        return max(starved, key=lambda v: v.passed_over)
    return min(prefilling, key=lambda v: v.n_left)
