"""A chat completion's stream read back: what a frame means for a measurement, and the timings in its last comment. Pure."""

import msgspec
from msgspec import Struct

TIMINGS_PREFIX = b": keepwarm-timings "
DATA_PREFIX = b"data: "
DONE = b"[DONE]"


class Usage(Struct, frozen=True):
    """The counts that every dialect with a flat `cached_tokens` gives; absent means none."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class _Delta(Struct):
    content: str | None = None


class _Choice(Struct):
    delta: _Delta
    finish_reason: str | None = None
    usage: Usage | None = None


class _Chunk(Struct):
    choices: list[_Choice]


class Frame(Struct, frozen=True):
    """One `data:` line: whether it brings text, whether it ends the answer, and the usage if it is there."""

    has_text: bool
    is_last: bool
    usage: Usage | None


def split_events(buffer: bytes) -> tuple[list[bytes], bytes]:
    """The whole events in `buffer` (without their empty lines) and what is left of it."""
    *events, rest = buffer.split(b"\n\n")
    return events, rest


def read_frame(event: bytes) -> Frame | None:
    """The meaning of an event; None for comments and the end marker. Raises msgspec.DecodeError."""
    if not event.startswith(DATA_PREFIX) or event.endswith(DONE):
        return None
    choices = msgspec.json.decode(event[len(DATA_PREFIX) :], type=_Chunk).choices
    usage = next((choice.usage for choice in choices if choice.usage is not None), None)
    return Frame(
        has_text=any(choice.delta.content for choice in choices),
        is_last=any(choice.finish_reason is not None for choice in choices),
        usage=usage,
    )


def read_timings(event: bytes) -> dict[str, float] | None:
    """Milliseconds by phase from the trailing comment; None when the event is something else."""
    if not event.startswith(TIMINGS_PREFIX):
        return None
    return msgspec.json.decode(event[len(TIMINGS_PREFIX) :], type=dict[str, float])


GATEWAY_PHASES = ("auth_ms", "read_ms", "parse_ms", "objects_ms", "render_ms", "lease_ms")
ENGINE_PHASES = ("engine_queue_ms", "engine_lookup_ms", "engine_restore_ms", "engine_evaluate_ms")


def until_first_token(ttft_ms: float, timings: dict[str, float]) -> dict[str, float]:
    """The phases up to the first token and what is left of `ttft_ms` as "http_ms".

    The rest is everything nobody measured: HTTP on both sides, the way between the processes, sampling the first token.
    """
    known = {phase: timings[phase] for phase in (*GATEWAY_PHASES, *ENGINE_PHASES) if phase in timings}
    return {"http_ms": round(ttft_ms - sum(known.values()), 3)} | known


def engine_ms(timings: dict[str, float]) -> float:
    """All the engine's own time of a turn."""
    return sum(ms for phase, ms in timings.items() if phase.startswith("engine_"))
